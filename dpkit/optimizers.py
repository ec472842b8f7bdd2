"""What the engine has to know of the user's optimizer: its settings, the one that runs hooks, the closure's loss."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .errors import ConfigurationError


def settings(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer does with a gradient: its plain numbers."""
    numbers = {k: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in group.items()}
    return {k: v for k, v in numbers.items() if isinstance(v, bool | int | float | str | tuple)}


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` runs hooks, inside what another library (Accelerate) has wrapped around it."""
    while "_optimizer_step_pre_hooks" not in vars(optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            return optimizer
        optimizer = inner
    return optimizer


def called_by_step(optimizer: Optimizer) -> bool:
    """Whether the ``step`` whose hooks run now is called by another of the same optimizer: a derived class's own, which
    has run them already."""
    mine = sys._getframe(2)  # torch's wrapper, around every class's step
    outer = mine.f_back
    while outer is not None:
        if outer.f_code is mine.f_code and optimizer in outer.f_locals.get("args", ())[:1]:
            return True
        outer = outer.f_back
    return False


class Evaluated:
    """A closure's loss, for the optimizer that asks for it."""

    def __init__(self, loss: Any) -> None:
        self._loss, self._asked = loss, False

    def __call__(self) -> Any:
        if self._asked:
            raise ConfigurationError(
                "the optimizer evaluated its closure a second time",
                why="it would use the data beyond the one noisy gradient that is accounted.",
                cure="use any first-order optimizer (SGD, Adam, AdamW, ...).",
            )
        self._asked = True
        return self._loss
