"""Where the records are in a tensor: a dimension of their own, or one that they share with positions or windows.

Letters: n record, k rows a record (1 where the dimension is the records' own).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Records:
    """Dimension ``dim`` holds the records, ``factor`` rows each: record-major ([n, k]), or ``inner`` ([k, n])."""

    dim: int
    factor: int = 1
    inner: bool = False

    def split(self, x: Tensor) -> Tensor:
        """One batch [..., n·k, ...] as n batches of one record: [n, ..., k, ...]."""
        if self.factor == 1:
            return x.movedim(self.dim, 0).unsqueeze(self.dim + 1)
        if self.inner:
            return _unfold(x, self.dim, (self.factor, -1)).movedim(self.dim + 1, 0)
        return _unfold(x, self.dim, (-1, self.factor)).movedim(self.dim, 0)

    def join(self, x: Tensor) -> Tensor:
        """n batches of one record [n, ..., k, ...] as one batch [..., n·k, ...]."""
        if self.factor == 1:
            return x.squeeze(self.dim + 1).movedim(0, self.dim)
        return x.movedim(0, self.dim + self.inner).flatten(self.dim, self.dim + 1)

    def owners(self, shape: Shape, n: int, device: torch.device) -> Tensor:
        """The number of the record that each element belongs to, in ``shape`` (expanded)."""
        rows = torch.arange(n * self.factor, dtype=torch.int32, device=device)
        rows = rows % n if self.inner else torch.div(rows, self.factor, rounding_mode="floor")
        return rows.view(*[1] * self.dim, -1, *[1] * (len(shape) - self.dim - 1)).expand(shape)

    def lead(self, x: Tensor) -> Tensor:
        """The rows first, record-major: [n·k, ...]."""
        x = x.movedim(self.dim, 0) if self.dim else x
        return _unfold(x, 0, (self.factor, -1)).transpose(0, 1).flatten(0, 1) if self.inner else x


@dataclass(frozen=True)
class Folded:
    """A dimension that grows with the records in a way that could not be told: never used, always refused."""

    dim: int
    factor: float

    def shares(self, other: Place) -> bool:
        """Whether the other holds as many rows a record in the same dimension, in an order that is known."""
        return isinstance(other, Records) and (self.dim, self.factor) == (other.dim, other.factor)


Place = Records | Folded | None
"""Where the records are; None: nowhere, the tensor does not depend on their number."""


def place(
    full: Shape, part: Shape, n: int, m: int, values: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Place:
    """Where the records are in a tensor that has shape ``full`` with n records and ``part`` with m of them.

    ``values``, the tensor in both runs, tells in which order a shared dimension holds its rows.
    """
    if len(full) != len(part):
        return Folded(0, float("nan"))
    changed = [d for d, (a, b) in enumerate(zip(full, part, strict=True)) if a != b]
    if not changed:
        return None
    alone = [d for d in changed if (full[d], part[d]) == (n, m)]
    if len(changed) > 1 and len(alone) == 1:  # the longest record was left out: lengths shrank too
        return Records(alone[0])
    d = changed[0]
    k = full[d] // n
    if len(changed) > 1 or full[d] != n * k or part[d] != m * k or k == 0:
        return Folded(d, full[d] / n)
    if k == 1:
        return Records(d)
    x, y = values
    if x is None or y is None or x.shape != full or y.shape != part:
        return Folded(d, k)
    orders = [r for r in (Records(d, k), Records(d, k, inner=True)) if _agree(r.split(x), r.split(y), min(n, m))]
    return orders[0] if len(orders) == 1 else Folded(d, k)


def _unfold(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    folded: Tensor = x.unflatten(dim, sizes)
    return folded


def _agree(x: Tensor, y: Tensor, kept: int) -> bool:
    x, y = x[:kept], y[:kept]
    if not x.is_floating_point():
        return torch.equal(x, y)
    scale = float(x.abs().max()) if x.numel() else 0.0
    return bool(torch.allclose(x, y, rtol=1e-3, atol=1e-5 * scale, equal_nan=True))
