"""Opacus's MNIST example, our way: the same network, settings and loop; other imports and set-up lines.

    python -m examples.mnist --epochs 15 --lr 0.25 --sigma 1.3 --clip 1.5

The lines that differ from an ordinary loop are marked. One image is one record: ε speaks of images, not of writers.
`python -m benchmarks.mnist` runs the three settings that Opacus publishes figures for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit

DATA = Path(__file__).parent / "data" / "mnist_60k_3k.npz"
MEAN, STD = 0.1307, 0.3081  # of MNIST, known to everybody; of data that is private itself they would cost privacy


class ConvNet(nn.Module):
    """The network of Opacus's example, 26,010 parameters: [n, 1, 28, 28] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 8, stride=2, padding=3)
        self.conv2 = nn.Conv2d(16, 32, 4, stride=2)
        self.fc1 = nn.Linear(32 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)  # [n, 16, 13, 13]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)  # [n, 32, 4, 4]
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@dataclass(frozen=True)
class Result:
    """What a run came to. ``epsilon`` is None without privacy; ``steps`` are those that were released."""

    accuracy: float
    epsilon: float | None
    steps: int


def load(split: str, limit: int | None = None) -> TensorDataset:
    """The first ``limit`` images and labels of "train" (60,000) or "test" (the first 3,000 of MNIST's 10,000)."""
    with np.load(DATA) as held:
        images, labels = held[f"x_{split}"][:limit], held[f"y_{split}"][:limit]
    pixels = (torch.from_numpy(images).float().div(255) - MEAN) / STD
    return TensorDataset(pixels.view(-1, 1, 28, 28), torch.from_numpy(labels).long())


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """The share of the test images that are told right."""
    x, y = test.tensors
    return (model(x).argmax(1) == y).float().mean().item()


def main(argv: Sequence[str] | None = None) -> Result:
    """Train, print and return the result."""
    parser = argparse.ArgumentParser(description="MNIST as Opacus trains it.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=240, help="expected; Opacus: sample rate 0.004")
    parser.add_argument("--lr", type=float, default=0.25)
    parser.add_argument("--sigma", type=float, default=1.3, help="the noise multiplier")
    parser.add_argument("--clip", type=float, default=1.5, help="the clipping norm")
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--disable-dp", action="store_true")
    parser.add_argument("--secure", action="store_true", help="cryptographic noise")
    parser.add_argument("--limit", type=int, help="train on this many images only")
    parser.add_argument("--seed", type=int, help="for initial weights; draws and noise are seeded by the system")
    args = parser.parse_args(argv)

    if args.seed is not None:
        torch.manual_seed(args.seed)
    train, test = load("train", args.limit), load("test")
    loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)

    if not args.disable_dp:
        engine = dpkit.PrivacyEngine(secure_mode=args.secure)  # ← opacus.PrivacyEngine(secure_mode=...)
        model, optimizer, loader = engine.make_private(  # ← the same call; the same objects come back, unwrapped
            module=model, optimizer=optimizer, data_loader=loader,
            noise_multiplier=args.sigma, max_grad_norm=args.clip,
        )  # fmt: skip

    steps, epsilon = 0, None
    for epoch in range(1, args.epochs + 1):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        steps += len(loader)
        model.eval()
        if not args.disable_dp:
            epsilon = engine.get_epsilon(args.delta)
        spent = "no privacy" if epsilon is None else f"ε = {epsilon:.3f} at δ = {args.delta:g}"
        print(f"epoch {epoch:2d}: test accuracy {accuracy(model, test):.4f}, {spent}", flush=True)
    return Result(accuracy(model, test), epsilon, steps)


if __name__ == "__main__":
    main()
