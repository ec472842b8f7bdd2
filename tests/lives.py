"""A training run with chance everywhere, that is saved, killed and resumed: what the tests of long lives share.

Run as a program it trains in a process of its own, for tests that kill it:
``python -m tests.lives FOLDER STEPS_BETWEEN_CHECKPOINTS [SECONDS_IN_SAVE]``.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dpkit

EPOCHS, RECORDS = 3, 20


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Records that are augmented by every global generator there is."""

    def __init__(self, records: int = RECORDS) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(records, 4, generator=generator), torch.randn(records, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.x[k] + 0.1 * torch.rand(4) + 0.1 * random.random() + 0.1 * float(np.random.rand()), self.y[k]


@dataclass
class Life:
    """One process's share of a run."""

    engine: dpkit.PrivacyEngine
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int = 0

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(path, also={"scheduler": self.scheduler}, extra={"steps": self.steps})

    def load(self, path: Path, *, replay: bool = True) -> None:
        extra = self.engine.load_checkpoint(path, also={"scheduler": self.scheduler}, replay=replay)
        self.steps = extra["steps"]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - y).square().mean()

    def train(self, after: Callable[[Life], bool | None] = lambda life: False) -> Life:
        """The ordinary loop over what is left of the run; ``after`` each batch something may happen, True ends it."""
        for _ in range(self.engine.completed_passes, EPOCHS):
            for x, y in self.loader:
                self.optimizer.zero_grad()
                self.loss(x, y).backward()
                self.optimizer.step()
                self.scheduler.step()
                self.steps += 1
                if after(self):
                    return self
        return self


def begin(
    *,
    ledger: Path | None = None,
    dataset: Dataset[Any] | None = None,
    width: int = 6,
    kind: type[torch.optim.Optimizer] = torch.optim.Adam,
    loader: dict[str, Any] | None = None,
    batch_size: int = 4,
    accountant: str = "rdp",
    seeds: bool = True,
    **options: Any,
) -> Life:
    """Model, optimizer, data and engine as at the start of the process; everything by seed."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.Tanh(), nn.Linear(width, 1))
    optimizer = kind(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
    if seeds:
        options.setdefault("noise_generator", torch.Generator().manual_seed(2))
        loader = {"generator": torch.Generator().manual_seed(1), **(loader or {})}
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-5, **options}
    engine = dpkit.PrivacyEngine(accountant=accountant, ledger=ledger)
    given: DataLoader[Any] = DataLoader(dataset or Noisy(), batch_size=batch_size, **(loader or {}))
    return Life(engine, *engine.make_private(model, optimizer, given, **options), scheduler)


def main(folder: Path, every: int) -> None:
    """Train to the end, from the last checkpoint if there is one, and leave weights and ε behind."""
    torch.set_num_threads(1)
    life, checkpoint = begin(ledger=folder / "ledger", max_physical_batch_size=3), folder / "checkpoint"
    if checkpoint.exists():
        life.load(checkpoint)

    def after(life: Life) -> None:
        with (folder / "handed_out").open("a") as seen:  # what user code has in its hands, in the order of its doing
            seen.write(f"{sum(n for _, n in life.engine.accountant.ledger)}\n")
        if life.steps % every == 0:
            life.save(checkpoint)
        time.sleep(0.002)

    life.train(after)
    torch.save({"weights": life.weights(), "epsilon": life.engine.get_epsilon()}, folder / "result")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
