"""What is trained in the benchmarks: three models that every contestant can handle, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model, its inputs for n records, and the batch sizes it is measured at; the loss is cross-entropy."""

    name: str
    what: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch_sizes: tuple[int, ...]
    classes: int = 10

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """n records and their labels, the same at every call."""
        torch.manual_seed(1)
        return self.inputs(n), torch.randint(0, self.classes, (n,))

    def model(self) -> nn.Module:
        """The model with the same initial weights at every call, in train mode."""
        torch.manual_seed(0)
        return self.build().train()


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def mnist_cnn() -> nn.Module:
    """The network of Opacus's MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class Block(nn.Module):
    """A pre-norm encoder block; its attention is four linear layers, so that module hooks see every weight."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(n, t, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextClassifier(nn.Module):
    """A small transformer encoder; the positions are repeated for every record, as Opacus needs them."""

    def __init__(
        self, vocab: int = 5000, width: int = 256, length: int = 128, depth: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads=4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]).repeat(len(tokens), 1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("mlp", "MLP 784-1024-1024-10", mlp, lambda n: torch.randn(n, 784), (64, 256)),
        Workload(
            "mnist-cnn", "CNN of Opacus's MNIST example", mnist_cnn, lambda n: torch.randn(n, 1, 28, 28), (64, 256)
        ),
        Workload(
            "transformer",
            "encoder, 3 layers, d 256, T 128, vocabulary 5000",
            TextClassifier,
            lambda n: torch.randint(0, 5000, (n, 128)),
            (8, 32),
        ),
    )
}
