"""Opacus's character-level LSTM example, our way: which language is a surname from?

    python -m examples.char_lstm                      # private; some minutes
    python -m examples.char_lstm --disable-dp --lr 0.5

The same network and settings as Opacus's, with torch's own ``nn.LSTM`` (or GRU, RNN) where Opacus needs its DPLSTM; the
lines that differ from an ordinary loop are marked. One entry of a list of surnames is one record.

Every name is padded to one fixed length. Opacus's example pads each batch to its longest name and reads the network's
last output, after the padding; what a record contributes then depends on how long the others are, and no noise covers
that.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit

DATA = Path(__file__).parent / "data" / "surnames.jsonl.gz"
LANGUAGES = [  # fixed beforehand, not read off the records
    "Croatian", "Dutch", "English", "Estonian", "Finnish", "French", "German", "Icelandic", "Indian", "Irish",
    "Italian", "Polish", "Slovak", "Spanish", "Swedish", "Zulu",
]  # fmt: skip
START, END, PAD, VOCABULARY = 256, 257, 258, 259  # beside the 256 values of a byte
LENGTH = 24


class CharClassifier(nn.Module):
    """Embedding, recurrent layer, and a linear layer on its last output: [n, t] -> [n, number of languages]."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.rnn = kind(width, hidden, batch_first=True)  # ← opacus.layers.DPLSTM(...)
        self.out = nn.Linear(hidden, len(LANGUAGES))

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.rnn(self.embedding(tokens))
        return self.out(outputs[:, -1])


@dataclass(frozen=True)
class Result:
    """What a run came to. ``epsilon`` is None without privacy; ``steps`` are those that were released."""

    accuracy: float
    epsilon: float | None
    steps: int
    sample_rate: float


def encode(name: str) -> list[int]:
    """LENGTH tokens: padding, start, the name's bytes in UTF-8 (cut where there are too many), end."""
    tokens = [START, *name.encode()[: LENGTH - 2], END]
    return [PAD] * (LENGTH - len(tokens)) + tokens


def load(split: str, limit: int | None = None) -> TensorDataset:
    """Tokens [n, LENGTH] and languages [n] of "train" (14,931 names) or "test" (3,812)."""
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["split"] == split]
    step = 1 if limit is None else max(1, len(rows) // limit)  # the file is sorted by language
    rows = rows[::step][:limit]
    tokens = torch.tensor([encode(row["name"]) for row in rows])
    return TensorDataset(tokens, torch.tensor([LANGUAGES.index(row["language"]) for row in rows]))


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The share of the test names that are told right."""
    x, y = test.tensors
    return (model(x).argmax(1) == y).float().mean().item()


def main(argv: Sequence[str] | None = None) -> Result:
    """Train, print and return the result."""
    parser = argparse.ArgumentParser(description="A private character-level LSTM.")
    parser.add_argument("--kind", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=747, help="expected: 5%% of the names")
    parser.add_argument("--lr", type=float, default=2.0)
    parser.add_argument("--sigma", type=float, default=1.0, help="the noise multiplier")
    parser.add_argument("--clip", type=float, default=1.5, help="the clipping norm")
    parser.add_argument("--delta", type=float, default=8e-5)
    parser.add_argument("--disable-dp", action="store_true")
    parser.add_argument("--limit", type=int, help="train on this many names only")
    parser.add_argument("--seed", type=int, help="for initial weights; draws and noise are seeded by the system")
    args = parser.parse_args(argv)

    if args.seed is not None:
        torch.manual_seed(args.seed)
    train, test = load("train", args.limit), load("test")
    loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)
    model = CharClassifier(getattr(nn, args.kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    if not args.disable_dp:
        engine = dpkit.PrivacyEngine()  # ← opacus.PrivacyEngine()
        model, optimizer, loader = engine.make_private(  # ← the same call; the same objects come back, unwrapped
            module=model, optimizer=optimizer, data_loader=loader,
            noise_multiplier=args.sigma, max_grad_norm=args.clip,
        )  # fmt: skip

    steps, epsilon = 0, None
    for epoch in range(1, args.epochs + 1):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        steps += len(loader)
        model.eval()
        if not args.disable_dp:
            epsilon = engine.get_epsilon(args.delta)
        spent = "no privacy" if epsilon is None else f"ε = {epsilon:.3f} at δ = {args.delta:g}"
        print(f"epoch {epoch:2d}: test accuracy {accuracy(model, test):.4f}, {spent}", flush=True)
    return Result(accuracy(model, test), epsilon, steps, args.batch_size / len(train))


if __name__ == "__main__":
    main()
