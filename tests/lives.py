"""A training run with chance everywhere, that is saved, killed and resumed: what the tests of long lives share.

Run as a program (``python -m tests.lives FOLDER KILLS SEED``) it trains in processes that it kills at random moments.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
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
from dpkit.ledger import Ledger

EPOCHS, RECORDS = 3, 20


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Records that are augmented by every global generator there is."""

    def __init__(self, records: int = RECORDS) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(records, 4, generator=generator), torch.randn(records, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.x[k] + 0.1 * torch.rand(4) + 0.1 * random.random() + 0.1 * float(np.random.rand()), self.y[k]  # noqa: NPY002


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
    secure: bool = False,
    **options: Any,
) -> Life:
    """Model, optimizer, data and engine as at the start of the process; everything by seed."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.Tanh(), nn.Linear(width, 1))
    optimizer = kind(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
    if seeds:
        options.setdefault("noise_generator", torch.Generator().manual_seed(2))
        loader = {"generator": torch.Generator().manual_seed(1), **(loader or {})}
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-5, **options}
    engine = dpkit.PrivacyEngine(accountant=accountant, ledger=ledger, secure_mode=secure)
    given: DataLoader[Any] = DataLoader(dataset or Noisy(), batch_size=batch_size, **(loader or {}))
    return Life(engine, *engine.make_private(model, optimizer, given, **options), scheduler)


def live(folder: Path) -> None:
    """Train to the end, from the last checkpoint if there is one, and leave weights and ε behind."""
    life, checkpoint = begin(ledger=folder / "ledger", max_physical_batch_size=3), folder / "checkpoint"
    if checkpoint.exists():
        life.load(checkpoint)
    seen = os.open(folder / "handed_out", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def after(life: Life) -> None:
        # user code has these weights in its hands now: how many releases are in them, as far as this process knows
        spending = life.engine._spending
        os.write(seen, f"{spending.run} {spending.released}\n".encode())
        if life.steps % 2 == 0:
            life.save(checkpoint)

    life.train(after)
    torch.save({"weights": life.weights(), "epsilon": life.engine.get_epsilon()}, folder / "result")


def supervise(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run `live` in processes that are killed at random moments until there were ``kills``; what came of it.

    Each life is a fork, so that a life costs milliseconds and most moments are within the training.
    """
    torch.set_num_threads(1)
    told = {"kills": 0, "in a save": 0, "runs": 0, "unequal": 0, "uncounted": 0, "crashed": 0}

    def fork(where: Path) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(where)
                code = 0
            finally:
                os._exit(code)
        return child

    for name in ("warm", "whole"):  # what torch does only once is done before the first fork
        (folder / name).mkdir()
        begun = time.monotonic()
        live(folder / name)
    length, whole = time.monotonic() - begun, torch.load(folder / "whole" / "result")
    chance = random.Random(seed)
    while told["kills"] < kills:
        run = folder / str(told["runs"])
        run.mkdir()
        while not (run / "result").exists():
            child = fork(run)
            if told["kills"] < kills:
                time.sleep(chance.uniform(0.0, 0.6 * length))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            told["kills"] += status == -signal.SIGKILL
            told["crashed"] += status > 0
            told["in a save"] += any(name.name.endswith(f".{child}.partial") for name in run.iterdir())
            if (run / "handed_out").exists():
                held = Ledger(run / "ledger", None).runs
                for line in (run / "handed_out").read_text().splitlines():
                    name, releases = line.split()
                    told["uncounted"] += int(releases) > (len(held[name].releases) if name in held else 0)
            if status > 0:
                return told
        told["runs"] += 1
        result = torch.load(run / "result")
        same = torch.equal(result["weights"], whole["weights"]) and result["epsilon"] == whole["epsilon"]
        told["unequal"] += not same
    return told


if __name__ == "__main__":
    print(json.dumps(supervise(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
