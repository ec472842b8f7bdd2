"""A model's buffers while it runs aside: kept, put back, and refused where they take in what the records are.

A buffer that is part of the ``state_dict`` is released with the model. Running statistics, codebooks or counters that
the forward updates from the batch would be released without clipping and without noise, whatever the weights do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModuleError


class Buffers:
    """The buffers of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[str, dict[str, Tensor | None], str, bool]] = []
        self._kept: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
        for path, module in model.named_modules():
            for name, b in module._buffers.items():
                released = name not in module._non_persistent_buffers_set
                self._places.append((f"{path}.{name}" if path else name, module._buffers, name, released))
                if b is not None:
                    self._kept.append((module._buffers, name, b, b.detach().clone()))

    def put_back(self) -> None:
        """Every buffer is the object that it was, with the value that it had."""
        with torch.no_grad():
            for home, name, b, value in self._kept:
                home[name] = b
                if not _equal(b, value):
                    b.copy_(value)

    def released(self) -> dict[str, Tensor]:
        """Copies of what the buffers that are released hold now, by their names."""
        found = ((path, home.get(name)) for path, home, name, released in self._places if released)
        return {path: b.detach().clone() for path, b in found if b is not None}

    def reached(self, taint: Any, *, released: bool = True) -> set[str]:
        """The names of those (that are released, or not) which ``taint`` says hold what is computed from the batch."""
        return {path for path, home, name, r in self._places if r == released and taint.has(home.get(name))}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """The names of the buffers that differ."""
    both = one.keys() & other.keys()
    return (one.keys() ^ other.keys()) | {path for path in both if not _equal(one[path], other[path])}


def refuse_written(paths: set[str]) -> None:
    """Raise if there are buffers that take in what the records are."""
    if paths:
        raise UnsupportedModuleError(
            f"the forward writes what the records are into the buffer {', '.join(sorted(paths))}",
            why="it is part of the state_dict and is released with the model, without clipping or noise.",
            cure="stop the update (eval mode, if it stops then), keep the statistic out of the model, or take it from "
            "public data.",
        )


def refuse_remembered(paths: set[str]) -> None:
    """Raise for buffers that carry what the records are into the next batch, where outputs follow from it."""
    raise UnsupportedModuleError(
        f"the forward writes what the records are into the buffer {', '.join(sorted(paths))}, and uses it in the next "
        "batch",
        why="a record would act in steps that it was not drawn for, through the other records' gradients.",
        cure="stop the update, or take the statistic from public data.",
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
