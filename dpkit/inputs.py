"""What the loop does to a batch before the model gets it: a row that is made of several records is none of theirs.

What was handed out is compared with what a module of the model is called on. Augmentation of each row by itself is the
loop's own affair; mixup, cutmix, statistics of the batch, rows that are drawn again and rows of other records (negative
examples) leave traces that augmentation does not: a row that is, to the last digits, a combination of two of the rows.

Letters: n row, w number in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .errors import CoupledRecordsError
from .trees import leaves, row_bytes

_WIDEST, _LEAST, _ROWS = 4096, 8, 16
"""Numbers of a row that are looked at; fewer tell too little; rows that are looked for patches of others."""


class Given:
    """A batch as it was handed out.

    Args:
        tree, n: what the loader yields, and its number of rows.
        owners: [n] the unit that each row is of; None: each of its own.
        sampled: whether it is a part of the data set: of all of it, the statistics may be constants.
        batch_first: whether records lead.
    """

    def __init__(self, tree: Any, n: int, owners: Tensor | None, *, sampled: bool, batch_first: bool) -> None:
        self.owners = torch.arange(n) if owners is None else owners
        self.sampled, dims = sampled, (0,) if batch_first else (1, 0)
        self._rows: list[Tensor] = []
        for v in leaves(tree):
            d = next((d for d in dims if isinstance(v, Tensor) and v.ndim > d and v.shape[d] == n), None)
            if d is not None and v.layout == torch.strided and v.numel():
                self._rows.append(v.detach().movedim(d, 0).reshape(n, -1).clone())
        self._order: Tensor | None = None  # in which the rows came to the model, where they tell it

    def refuse_mixed(self, path: str, arguments: Sequence[tuple[Tensor, int | None]]) -> None:
        """Raise if a row of the arguments is made of several records.

        Args:
            path: the module that is called on them.
            arguments: tensors, and the dimension in which their records are.

        Raises:
            CoupledRecordsError: with what was recognised.
        """
        for t, d in arguments:
            if d is None or t.grad_fn is not None or t.layout != torch.strided or t.shape[d] != len(self.owners):
                continue
            rows = t.detach().movedim(d, 0).flatten(1) if t.ndim > 1 else t.detach()[:, None]
            fitting = [given.to(rows.device) for given in self._rows if given.shape == rows.shape]
            self._compare(path, fitting, rows)

    def _compare(self, path: str, fitting: list[Tensor], rows: Tensor) -> None:
        owners = self.owners.to(rows.device)
        orders = [order for given in fitting if (order := _order(given.to(rows.dtype), rows)) is not None]
        plain = torch.arange(len(rows), device=rows.device)
        if any(torch.equal(order, plain) for order in orders):
            orders = [plain]
        if len(orders) == 1:
            (order,) = orders
            if len(order.unique()) < len(order):
                _refuse(path, "a record stands in several rows")
            if self._order is None:
                self._order = order
            if not torch.equal(order, self._order.to(order.device)):
                _refuse(path, "rows of different records meet (those of one record are in another order)")
            if len(owners.unique()) < len(owners) and not torch.equal(owners[order], owners):
                _refuse(path, "the rows are in another order, and units have several")
        elif not orders and rows.is_floating_point() and rows.shape[1] >= _LEAST and bool(torch.isfinite(rows).all()):
            step = -(-rows.shape[1] // _WIDEST)
            for given in fitting:
                x, y = given[:, ::step], rows[:, ::step]
                found = _patched(x.to(y.dtype), y, owners)
                if not found and self.sampled and len(x) > 2:
                    found = _centred(x.double(), y.double(), given.double().mean())
                found = found or _combined(x.double(), y.double(), owners, self.sampled)
                if found:
                    _refuse(path, found)


def _order(given: Tensor, rows: Tensor) -> Tensor | None:
    """[n]: which of the given rows each one is; None where one is none of them, or they do not differ."""
    known = {row: i for i, row in enumerate(row_bytes(given))}
    found = [known.get(row, -1) for row in row_bytes(rows)]
    return None if len(known) < len(given) or -1 in found else torch.tensor(found, device=rows.device)


def _patched(x: Tensor, y: Tensor, owners: Tensor) -> str:
    """Where rows differ, most have another record's numbers (cutmix)."""
    looked, explained = 0, 0
    for i in (y != x).any(1).nonzero().flatten().tolist()[:_ROWS]:
        there = y[i] != x[i]
        patch = y[i, there]
        if len(patch.unique()) >= _LEAST:
            looked += 1
            others = (x[:, there] == patch).all(1) & (owners != owners[i])
            explained += bool(others.any())
    return "rows have parts of other records' (cutmix?)" if explained > 1 and 2 * explained > looked else ""


def _combined(x: Tensor, y: Tensor, owners: Tensor, sampled: bool) -> str:
    """Most rows are a multiple of their own record and one of another's, or of the batch's mean."""
    candidates = torch.cat([x, x.mean(0, keepdim=True)]) if sampled else x
    apart = owners[:, None] != owners
    if sampled:
        apart = torch.cat([apart, torch.ones_like(apart[:, :1])], 1)
    own = x.square().sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    rest = y - (x * y).sum(1, keepdim=True) / own * x  # what is not its own record's direction
    moved = rest.norm(dim=1) > 1e-3 * y.norm(dim=1)
    along = candidates.square().sum(1)
    beside = along - (x @ candidates.T).square() / own  # [n, n]: the squares of what the others have beside it
    share = (rest @ candidates.T).square() / (rest.square().sum(1, keepdim=True) * beside)
    explained = ((share > 1 - 1e-6) & (beside > 1e-6 * along) & apart).any(1) & moved
    found, all_moved = int(explained.sum()), int(moved.sum())
    return "rows are mixtures of several records' (mixup?)" if found > 1 and 2 * found > all_moved else ""


def _centred(x: Tensor, y: Tensor, overall: Tensor) -> str:
    """y is x but for a factor and a constant in each feature, which are such that the batch's mean becomes zero."""
    mean, spread = x.mean(0), x.std(0)
    kept = spread > 1e-6 * spread.max()
    x, y, mean, spread = x[:, kept], y[:, kept], mean[kept], spread[kept]
    if x.shape[1] < _LEAST:
        return ""
    factor = ((x - mean) * (y - y.mean(0))).mean(0) / (x - mean).square().mean(0)
    size = factor.abs() * spread
    exact = ((y - y.mean(0) - factor * (x - mean)).abs() <= 1e-4 * size).all() and (size > 1e-6 * y.abs().max()).all()
    if not bool(exact):
        return ""
    centre = mean - y.mean(0) / factor
    centred = any(bool(((centre - m).abs() <= 1e-4 * spread).all()) for m in (mean, overall))
    return "rows are standardised by a mean of the batch" if centred else ""


def _refuse(path: str, seen: str) -> NoReturn:
    raise CoupledRecordsError(
        f"{path} was called on rows that the loop made of several records: in the loop, {seen}",
        why="a record then acts through other rows, each of which is clipped by itself.",
        cure="feed each row of one record alone: mix views of one record, take statistics and negative examples from "
        "public data, or leave it out.",
    )
