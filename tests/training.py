"""A private training run in one call, and draws chosen by hand, for the tests of the engine's manners."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpkit
from dpkit.sampling import PoissonSampling


@dataclass(frozen=True)
class Run:
    """An engine and what it is attached to."""

    engine: dpkit.PrivacyEngine
    model: nn.Module
    optimizer: Optimizer
    loader: DataLoader[Any]


def data(n: int = 8, inputs: int = 4, seed: int = 0) -> TensorDataset:
    """n records: inputs [i], one target."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, inputs, generator=generator), torch.randn(n, 1, generator=generator))


def mlp(inputs: int = 4, width: int = 5, seed: int = 0) -> nn.Sequential:
    """A small network with fixed initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1))


def attach(
    model: nn.Module,
    dataset: Dataset[Any] | None = None,
    batch_size: int | None = None,
    *,
    optimizer: Optimizer | None = None,
    lr: float = 1.0,
    loader: dict[str, Any] | None = None,
    accountant: Any = "rdp",
    **options: Any,
) -> Run:
    """`make_private` with σ = 0 and C = 1 unless told otherwise; the sampling rate is 1 without a batch size."""
    dataset = data() if dataset is None else dataset
    optimizer = torch.optim.SGD(model.parameters(), lr=lr) if optimizer is None else optimizer
    given = DataLoader(dataset, batch_size=batch_size or len(dataset), **(loader or {}))  # type: ignore[arg-type]
    if "target_epsilon" not in options:
        options.setdefault("noise_multiplier", 0.0)
    options.setdefault("max_grad_norm", 1.0)
    engine = dpkit.PrivacyEngine(accountant=accountant)
    return Run(engine, *engine.make_private(module=model, optimizer=optimizer, data_loader=given, **options))


def squared_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """The mean over records of the squared error."""
    return (model(batch[0]) - batch[1]).square().mean()


def work(run: Run, batch: Sequence[Tensor]) -> None:
    """Forward, backward and step on one batch."""
    run.optimizer.zero_grad()
    squared_loss(run.model, batch).backward()
    run.optimizer.step()


def train(run: Run, epochs: int = 1) -> None:
    """The ordinary loop."""
    for _ in range(epochs):
        for batch in run.loader:
            work(run, batch)


def weights(model: nn.Module) -> Tensor:
    """A copy of all parameters as one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@contextlib.contextmanager
def drawing(*draws: Sequence[int]) -> Iterator[None]:
    """Every pass consists of these logical batches, whatever the generator says."""

    def chosen(self: PoissonSampling, generator: torch.Generator) -> Iterator[list[int]]:
        return iter([list(d) for d in draws])

    with mock.patch.object(PoissonSampling, "draws", chosen):
        yield
