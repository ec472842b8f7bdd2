"""The sum of several forms of one parameter's per-sample gradients: of a module called twice, of tied weights.

Letters as in `dpkit.forms`; s, a position of another use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .forms import Dense, Form, Normed, Outer, Routed, Rows, not_below, wide


@dataclass(frozen=True)
class Joined(Form):
    """The sum of forms of different kinds, with exact cross terms (an embedding tied to the output head)."""

    parts: tuple[Form, ...]

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def narrow(self) -> bool:
        return any(p.narrow for p in self.parts)

    def dense(self) -> Tensor:
        first = self.parts[0].dense()
        return reduce(torch.add, (p.dense().reshape(first.shape) for p in self.parts[1:]), first)

    def sq_norm(self) -> Tensor:
        total = reduce(torch.add, (p.sq_norm() for p in self.parts))
        for k, one in enumerate(self.parts):
            for other in self.parts[k + 1 :]:
                total = total + 2 * _inner(one, other)
        return not_below(total, self.lengths().square())

    def lengths(self) -> Tensor:
        return reduce(torch.add, (p.lengths() for p in self.parts))

    def weighted_sum(self, w: Tensor) -> Tensor:
        return reduce(torch.add, (p.weighted_sum(w) for p in self.parts))

    def take(self, records: Tensor) -> Joined:
        return Joined(tuple(p.take(records) for p in self.parts))

    def folded(self, k: int) -> Joined:
        return Joined(tuple(p.folded(k) for p in self.parts))

    def scaled(self, w: Tensor) -> Joined:
        return Joined(tuple(p.scaled(w) for p in self.parts))


def _inner(one: Form, other: Form) -> Tensor:
    """[n]: inner products of two forms of one parameter, without making a table dense."""
    if isinstance(other, Rows):
        one, other = other, one
    if isinstance(one, Rows):
        g = wide(one.g)
        if isinstance(other, Outer) and other.g.ndim <= 3:  # [n, s, v] and [n, s, d]: pick the v's that were touched
            og, oa = other.summed()._wide()
            picked = og.gather(2, one.index.unsqueeze(1).expand(-1, og.shape[1], -1))  # [n, s, t]
            return (picked * (oa @ g.transpose(1, 2))).sum((1, 2))
        table = other.dense().reshape(one.n, one.v, -1)
        return (table.gather(1, one.index.unsqueeze(-1).expand_as(g)) * g).sum((1, 2))
    return (one.dense().reshape(one.n, -1) * other.dense().reshape(one.n, -1)).sum(1)


def joined(forms: Sequence[Form]) -> Form:
    """One form for all uses of a parameter: the same kinds are merged, the rest are `Joined`."""
    if len(forms) == 1:
        return forms[0]
    forms = [f.form if isinstance(f, Normed) else f for f in forms]
    merged: dict[object, list[Form]] = {}
    for form in forms:
        key: object = type(form)
        if isinstance(form, Outer):
            key = (Outer, form.g.shape[1:-2], form.g.shape[-1], form.a.shape[-1], form.g.dtype)
        merged.setdefault(key, []).append(form)
    parts = tuple(_merge(same) for same in merged.values())
    return parts[0] if len(parts) == 1 else Joined(parts)


def _merge(same: list[Form]) -> Form:
    first = same[0]
    if len(same) == 1:
        return first
    if isinstance(first, Outer):
        outers = [f.summed() for f in same if isinstance(f, Outer)]
        return Outer(torch.cat([f.g for f in outers], -2), torch.cat([f.a for f in outers], -2)).settled()
    if isinstance(first, Rows):
        rows = [f for f in same if isinstance(f, Rows)]
        return Rows(torch.cat([f.index for f in rows], 1), torch.cat([f.g for f in rows], 1), first.v)
    if isinstance(first, Routed):
        routed = [f for f in same if isinstance(f, Routed)]
        index, g, a = (torch.cat([getattr(f, name) for f in routed], 1) for name in ("index", "g", "a"))
        return Routed(index, g, a, first.m)
    return Dense(reduce(torch.add, (f.dense() for f in same)))
