"""The encoder trained as well: its last layer, on the prompts, without privacy.

A further run beside the others (`--train last`). It goes on from the fitted linear layer. Answers keep the frozen
encoder's features: to read them in their context takes most of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data import Record
from .encoder import Encoder, Head, Questions, losses
from .public import Space
from .train import Recipe, Run, seeds_of, train

NAME = "no privacy, encoder trained"
LAYERS = 1
RECIPE = Recipe(epochs=4, batch_size=64, lr=3e-4, optimizer="adam")


class Read(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Texts as the frozen lower layers leave them: means over tokens [n, l d], tokens [t, d] each, targets [n, k]."""

    def __init__(self, encoder: Encoder, asked: Questions, records: Sequence[Record]) -> None:
        below = len(encoder.layers) - LAYERS
        self.means = encoder.features(records)[:, : below * encoder.encoder.config.hidden_size]
        self.tokens = encoder.tokens([r.message for r in records], encoder.layers[below] - 1)
        self.targets = asked.targets(records)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.means[k], self.tokens[k], self.targets[k]


def collate(rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, list[Tensor], Tensor]:
    """A batch; the tokens stay apart, for they are of many lengths."""
    means, tokens, targets = zip(*rows, strict=True)
    return torch.stack(means), list(tokens), torch.stack(targets)


class Upper(nn.Module):
    """The encoder's last ``LAYERS`` and the head, both trained: from what is below them to logits [n, k]."""

    def __init__(self, encoder: Encoder, space: Space, head: Head) -> None:
        super().__init__()
        self.layers = copy.deepcopy(encoder.encoder.encoder.layer[-LAYERS:]).requires_grad_(True)
        self.head = copy.deepcopy(head)
        self.space = space

    def forward(self, means: Tensor, tokens: list[Tensor]) -> Tensor:
        """Of a message by itself; read in bfloat16."""
        order = torch.tensor([len(t) for t in tokens]).argsort()  # little padding: like lengths together
        parts = [self._means([tokens[k] for k in chunk]) for chunk in order.split(8)]
        alone = torch.cat([means[order], torch.cat(parts)], 1)
        logits: Tensor = self.head(self.space(torch.cat([alone, alone], 1)))
        return logits[order.argsort()]

    def _means(self, tokens: list[Tensor]) -> Tensor:
        """[n, LAYERS d]: each trained layer's mean over the tokens, of length 1."""
        states = nn.utils.rnn.pad_sequence(tokens, batch_first=True).float()
        counted = torch.arange(states.shape[1]) < torch.tensor([[len(t)] for t in tokens])
        hidden = torch.zeros(len(tokens), 1, 1, states.shape[1]).masked_fill(~counted[:, None, None], -1e9)
        weights = (counted / counted.sum(1, keepdim=True)).unsqueeze(-1)
        found = []
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                states = layer(states, attention_mask=hidden)
                states = states[0] if isinstance(states, tuple) else states
                found.append(F.normalize((states.float() * weights).sum(1), dim=1))
        return torch.cat(found, 1)


def fit(
    encoder: Encoder, space: Space, head: Head, rows: Dataset[Any], seed: int, recipe: Recipe = RECIPE
) -> tuple[Upper, Run]:
    """Go on from ``head``, which was fitted to the frozen encoder's features."""
    model = Upper(encoder, space, head)
    run = train(model, rows, lambda m, x, t, y: losses(m(x, t), y), recipe, seeds=seeds_of(seed, 98), collate=collate)
    run.name = NAME
    return model, run


@torch.no_grad()
def logits(model: Upper, asked: Questions, rows: Read, frozen: Tensor) -> Tensor:
    """[n, k]: the prompts' questions answered by ``model``, the answers' as they are in ``frozen`` [n, k]."""
    parts = torch.arange(len(rows)).split(256)
    found = torch.cat([model(rows.means[part], [rows.tokens[k] for k in part]) for part in parts])
    prompts = torch.tensor([role == "User" for role, _ in asked.all])
    return torch.where(prompts, found.double(), frozen)
