"""What tells two releases, or two data sets, from each other, at the cost of a look at them."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import randomness
from .trees import leaves

_PIECE = 1 << 16
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Fingerprint:
    """A linear hash, Σ bits · odd weight mod 2^64: one entry that differs in any bit changes it for certain.

    Releases hold fresh Gaussian noise, so two different ones agree with a chance of about 2^-64; it does not protect
    against somebody who makes them agree on purpose.
    """

    def __init__(self) -> None:
        self._weights: dict[torch.device, Tensor] = {}

    def of(self, tensors: Iterable[Tensor]) -> str:
        """16 hexadecimal digits."""
        total = 0
        for t in tensors:
            weights, flat = self._odd(t.device), t.contiguous().view(-1).view(_WORDS[t.element_size()])
            sums = [(piece.long() * weights[: len(piece)]).sum() for piece in flat.split(len(weights))]
            for value in torch.stack(sums).tolist() if sums else []:
                total = (total * 0x9E3779B97F4A7C15 + value) % (1 << 64)
        return f"{total:016x}"

    def _odd(self, device: torch.device) -> Tensor:
        if device not in self._weights:
            size = _PIECE if device.type == "cpu" else 1 << 22  # few kernels on an accelerator, a CPU's cache else
            drawn = torch.randint(-(1 << 62), 1 << 62, (size,), generator=torch.Generator().manual_seed(0))
            self._weights[device] = (2 * drawn + 1).to(device)
        return self._weights[device]


def marks_of(dataset: Any) -> dict[str, int | None]:
    """What some rows of a map-style data set are, by name; None where one is not the same when it is read twice."""
    n = len(dataset)
    some = sorted({round(j * (n - 1) / (_LOOKED_AT - 1)) for j in range(_LOOKED_AT)})
    chance = randomness.capture()
    try:
        once, twice = ([_mark(_row(dataset, k)) for k in some] for _ in range(2))
    finally:
        randomness.restore(chance)
    return {f"row {k}": a if a == b else None for k, a, b in zip(some, once, twice, strict=True)}


_LOOKED_AT = 16


def _row(dataset: Any, k: int) -> Any:
    """Row k, read with chance that is the same in every process."""
    torch.manual_seed(k)
    random.seed(k)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(k)
    return dataset[k]


def _mark(row: Any) -> int:
    mark = 0
    for leaf in leaves(row):
        if isinstance(leaf, Tensor):
            raw = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(leaf, bool | int | float | str | bytes):
            raw = repr(leaf).encode()
        else:  # arrays and pictures have bytes; of other objects the kind alone is compared
            tobytes = getattr(leaf, "tobytes", None)
            pointers = getattr(getattr(leaf, "dtype", None), "hasobject", False)
            raw = tobytes() if callable(tobytes) and not pointers else type(leaf).__name__.encode()
        mark = zlib.crc32(raw, mark)
    return mark
