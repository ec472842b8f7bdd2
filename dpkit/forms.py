"""A per-sample gradient is a value, kept in the form in which its layer gives it.

Letters: n record, t position, i in, o out, d width, v row of a table, m member of a stack (a convolution's groups).

===========  ==============================  ======================================
form         holds                           the gradient of one record
===========  ==============================  ======================================
``Dense``    value [n, *shape]               value
``Outer``    g [n, *m, t, o], a [n, *m, t, i] sum over t of g ⊗ a:  [*m, o, i]
``Rows``     index [n, t], g [n, t, d]       row ``index`` of a [v, d] table gets g
``Routed``   index [n, t], g [n, t, o],      member ``index`` of a [m, o, i] stack gets
             a [n, t, i]                     g ⊗ a
===========  ==============================  ======================================

Each form offers ``sq_norm() -> [n]``, ``weighted_sum(w) -> flat [p]`` and ``dense()``. Ghost, materialised and
book-keeping clipping are never modes: where several ways lead to norm and sum, a form names them with their costs
(``ways()``) and `dpkit.methods` chooses. `dpkit.joined` adds up the forms of one parameter. All norms and sums are in
float32 or wider.

Source of the ghost norm: Li, Tramèr, Liang and Hashimoto, "Large Language Models Can Be Strong Differentially Private
Learners" (2022); of the weighted sum without a second backward: Bu, Wang, Zha and Karypis, "Differentially Private
Optimization on Large Model at Small Cost" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 if it is narrower, else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def norms(x: Tensor) -> Tensor:
    """Euclidean norms along the last dimension.

    On a CPU torch adds up a row's squares one after the other in a few lanes: where a million or more are alike, up to
    percents are rounded away. So long rows are taken in blocks.
    """
    if x.shape[-1] <= 2 * _BLOCK or x.device.type != "cpu":
        found: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return found
    whole = x.shape[-1] // _BLOCK * _BLOCK
    of_blocks = norms(torch.linalg.vector_norm(x[..., :whole].unflatten(-1, (-1, _BLOCK)), dim=-1))
    rest = x[..., whole:]
    return of_blocks.hypot(torch.linalg.vector_norm(rest, dim=-1)) if rest.shape[-1] else of_blocks


_BLOCK = 1024


def rounded(size: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(size - 1, 0).bit_length()


def described(x: Tensor) -> str:
    """Dtype and kind of device."""
    return _described(x.dtype, x.device)


@cache
def _described(dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {device.type}"


def times(w: Tensor, x: Tensor) -> Tensor:
    """``w`` [n] times ``x`` [n, ...]."""
    w = w if w.dtype == x.dtype and w.device == x.device else w.to(x)
    return x * w.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Way:
    """One way from a form to its norms and its weighted sum.

    Attributes:
        take: makes the form that goes this way (at once: what it needs is computed now, the rest is let go).
        cost: the model's estimate for one record, in floating-point operations (a number that passes through memory
            counts as what the processor computes meanwhile).
        kept: bytes that are kept for a record until the norms of all layers are known.
    """

    take: Callable[[], Form]
    cost: float
    kept: int


class Form:
    """The gradients of n records for one parameter.

    Attributes:
        held: bytes of a record's layer input that the form refers to; 0 where it refers to none.
    """

    @property
    def held(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        """What it keeps, for all records."""
        return sum(v.numel() * v.element_size() for v in vars(self).values() if isinstance(v, Tensor))

    def kind(self) -> str:
        """What forms have in common whose ways take the same time: lengths are rounded up to a power of two."""
        return type(self).__name__

    def ways(self) -> dict[str, Way]:
        """The ways to norm and sum, by name, the form as it is first; empty where there is only that one."""
        return {}

    def settled(self) -> Form:
        """The form that goes the way which the cost model takes for the cheapest of those that keep no more than it."""
        ways = self.ways() if self.n else {}
        kept = max((way.kept for way in list(ways.values())[:1]), default=0)
        within = [way for way in ways.values() if way.kept <= kept]
        return min(within, key=lambda way: way.cost).take() if within else self

    def dense(self) -> Tensor:
        """[n, ...]: every record's gradient, materialised."""
        raise NotImplementedError

    def sq_norm(self) -> Tensor:
        """[n]: squared Euclidean norms."""
        raise NotImplementedError

    def lengths(self) -> Tensor:
        """[n]: the summed lengths of the terms that a gradient is the sum of; rounding is measured against them."""
        return self.sq_norm().sqrt()

    def weighted_sum(self, w: Tensor) -> Tensor:
        """Flat [p]: sum over records of ``w[n]`` times the gradient."""
        raise NotImplementedError

    def take(self, records: Tensor) -> Form:
        """The same form for a subset of the records (indices [k])."""
        raise NotImplementedError

    def folded(self, k: int) -> Form:
        """The same gradients where each k rows in a row belong to one record: n·k records become n."""
        raise NotImplementedError

    def scaled(self, w: Tensor) -> Form:
        """Every record's gradient times its ``w[n]``."""
        raise NotImplementedError

    @property
    def n(self) -> int:
        raise NotImplementedError

    @property
    def narrow(self) -> bool:
        """Whether it was made of half-precision tensors."""
        return any(v.dtype in (torch.float16, torch.bfloat16) for v in vars(self).values() if isinstance(v, Tensor))


@dataclass(frozen=True)
class Dense(Form):
    """Per-sample gradients as they are: ``value`` [n, *shape]."""

    value: Tensor

    @property
    def n(self) -> int:
        return self.value.shape[0]

    def dense(self) -> Tensor:
        return wide(self.value)

    def _order(self) -> list[int]:
        """The dimensions of a gradient as they lie in memory, so that a permuted value need not be copied."""
        stride = self.value.stride()
        return sorted(range(1, self.value.ndim), key=lambda d: -stride[d])

    def _flat(self, order: list[int]) -> Tensor:
        v = wide(self.value)
        if v.ndim == 2:
            return v
        v = v.permute(0, *order)
        return v.reshape(self.n, v.shape[1:].numel())  # n may be 0, so -1 would say nothing

    def sq_norm(self) -> Tensor:
        return norms(self._flat(self._order())).square_()

    def weighted_sum(self, w: Tensor) -> Tensor:
        order = self._order()
        flat = self._flat(order)
        total = (w if w.dtype == flat.dtype else w.to(flat.dtype)) @ flat
        if order == sorted(order):
            return total
        back = [order.index(d) for d in range(1, self.value.ndim)]
        return total.view([self.value.shape[d] for d in order]).permute(back).flatten()

    def take(self, records: Tensor) -> Dense:
        return Dense(self.value[records])

    def folded(self, k: int) -> Dense:
        return Dense(wide(self.value).reshape(-1, k, *self.value.shape[1:]).sum(1))

    def scaled(self, w: Tensor) -> Dense:
        return Dense(times(w, wide(self.value)))


@dataclass(frozen=True)
class Outer(Form):
    """Sums of outer products: ``g`` [n, *m, t, o] and ``a`` [n, *m, t, i] give [n, *m, o, i]; without t, a product."""

    g: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.g.shape[:-1] != self.a.shape[:-1]:
            raise ValueError(
                f"Outer: g {list(self.g.shape)} and a {list(self.a.shape)} differ before the last dimension"
            )

    @property
    def n(self) -> int:
        return self.g.shape[0]

    def _wide(self) -> tuple[Tensor, Tensor]:
        # Under autocast the layer saw its input rounded to g's dtype: so does the gradient.
        return wide(self.g), wide(self.a if self.a.dtype == self.g.dtype else self.a.to(self.g.dtype))

    def summed(self) -> Outer:
        """The same with a dimension t."""
        return Outer(self.g.unsqueeze(1), self.a.unsqueeze(1)) if self.g.ndim == 2 else self

    def dense(self) -> Tensor:
        g, a = self.summed()._wide()
        if g.shape[-1] > a.shape[-1]:  # with the wider factor on the right, up to a quarter faster on a CPU
            return (a.transpose(-1, -2) @ g).transpose(-1, -2)
        return g.transpose(-1, -2) @ a

    @property
    def held(self) -> int:
        return self.a[0].numel() * self.a.element_size()

    def kind(self) -> str:
        *stack, t, o = self.g.shape[1:] if self.g.ndim > 2 else (1, self.g.shape[1])
        return f"Outer {[*stack, o, self.a.shape[-1]]} t≤{rounded(t)} {described(self.g)}"

    def ways(self) -> dict[str, Way]:
        if self.g.ndim == 2 or self.g.shape[-2] == 1:
            return {}
        *stack, t, o = self.g.shape[1:]
        i, m = self.a.shape[-1], math.prod(stack)
        product, kept = 2.0 * t * o * i, self.g[0].numel() * self.g.element_size() + self.held
        dense = m * o * i * max(4, self.g.element_size())
        return {
            "ghost": Way(lambda: self, m * (product + 1.5 * t * t * (o + i)), kept),
            "dense": Way(lambda: Dense(self.dense()), m * (product + 48.0 * o * i), dense),
        }

    def sq_norm(self) -> Tensor:
        g, a = self._wide()
        if g.ndim > 2 and g.shape[-2] > 1:
            return _gram(g, a)
        products = norms(g) * norms(a)
        squares = products.square_()
        return squares if squares.ndim == 1 else squares.flatten(1).sum(1)

    def lengths(self) -> Tensor:
        g, a = self._wide()
        products = norms(g) * norms(a)
        return products if products.ndim == 1 else products.flatten(1).sum(1)

    def weighted_sum(self, w: Tensor) -> Tensor:
        g, a = self._wide()
        g, a = (times(w, g), a) if g.shape[-1] <= a.shape[-1] else (g, times(w, a))
        if g.ndim == 2:
            return (g.T @ a).view(-1)
        if g.ndim == 3:
            return (g.flatten(0, 1).T @ a.flatten(0, 1)).view(-1)
        return torch.einsum("n...to,n...ti->...oi", g, a).flatten()

    def take(self, records: Tensor) -> Outer:
        return Outer(self.g[records], self.a[records])

    def folded(self, k: int) -> Form:
        if self.g.ndim > 3:
            return Dense(self.dense()).folded(k)
        t = 1 if self.g.ndim == 2 else self.g.shape[1]
        return Outer(
            self.g.reshape(-1, k * t, self.g.shape[-1]),
            self.a.reshape(-1, k * t, self.a.shape[-1]),
        )

    def scaled(self, w: Tensor) -> Outer:
        g, a = self._wide()
        return Outer(times(w, g), a)


def _gram(g: Tensor, a: Tensor) -> Tensor:
    """Squared norms of sum_t g_t ⊗ a_t without forming it: the sum over t, t' of (g_t·g_t')(a_t·a_t').

    The products are symmetric, so only blocks on and above the diagonal are taken, some records at a time.
    """
    n, members, t = len(g), g.shape[1:-2].numel(), g.shape[-2]
    g, a = g.flatten(0, -3), a.flatten(0, -3)
    block = t if t < 64 else -(-t // 2) if t < 128 else max(64, -(-t // 4))
    each = max(1, SCRATCH // (block * t))
    squares, lengths = g.new_empty(len(g)), g.new_zeros(len(g))
    for some in (slice(k, k + each) for k in range(0, len(g), each)):
        squares[some], lengths[some] = _symmetric(g[some], a[some], block)
    return not_below(squares.view(n, members).sum(1), lengths.view(n, members).sum(1).square())


def _symmetric(g: Tensor, a: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[n], [n]: the sum over t, t' of (g_t·g_t')(a_t·a_t') of [n, t, ·], and that over t of |g_t||a_t|."""
    norm, lengths = g.new_zeros(len(g)), g.new_zeros(len(g))
    for start in range(0, g.shape[1], block):
        rows = slice(start, start + block)
        gg = torch.bmm(g[:, rows], g[:, start:].transpose(1, 2))
        products = gg.mul_(torch.bmm(a[:, rows], a[:, start:].transpose(1, 2)))
        own = products[:, :, : products.shape[1]]
        norm += 2 * products.flatten(1).sum(1) - own.sum((1, 2))
        lengths += own.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().sum(1)
    return norm, lengths


SCRATCH = 1 << 18
"""Numbers (1 MiB in float32) that a norm may use at a time beyond what is kept anyway."""


def not_below(norm: Tensor, terms: Tensor) -> Tensor:
    """A squared norm that was added up from inner products, made safe against their cancelling.

    Rounding leaves an error that is small against ``terms``, the square of the summed lengths, and may be large against
    the norm. A norm reported too small would let a record exceed the clipping bound, so a bound on that error is added
    as soon as it exceeds the accuracy promised elsewhere (1e-5).
    """
    rounding = 4 * torch.finfo(norm.dtype).eps * terms
    return norm.clamp_min(0) + (rounding - 5e-6 * norm).clamp_min(0)


@dataclass(frozen=True)
class Rows(Form):
    """Gradients of a table [v, d] of which few rows are touched: ``index`` [n, t] (int), ``g`` [n, t, d]."""

    index: Tensor
    g: Tensor
    v: int

    @property
    def n(self) -> int:
        return self.index.shape[0]

    def dense(self) -> Tensor:
        g = wide(self.g)
        out = g.new_zeros(g.shape[0], self.v, g.shape[-1])
        return out.scatter_add_(1, self.index.unsqueeze(-1).expand_as(g), g)

    def _repeats(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where a record touches a row again: (positions in [n · t] that do [k], the number of the row among those that
        are touched again [k], the position that touches each of these rows first)."""
        t, device = self.index.shape[1], self.index.device
        bits = t.bit_length()
        kind = torch.int32 if self.v << bits <= 1 << 31 else torch.int64
        keys: Any = torch.arange(t, dtype=kind, device=device).add(self.index.to(kind), alpha=1 << bits)
        if device.type == "cpu":  # numpy sorts several times faster, and takes less for a call
            keys = keys.numpy()
            keys.sort(1)
        else:
            keys = keys.sort(1).values
        rows = keys >> bits  # a key is a row, then a position
        same = (rows[:, 1:] == rows[:, :-1]).ravel()  # [n · (t - 1)]
        pairs = same.nonzero()[0] if device.type == "cpu" else same.nonzero(as_tuple=True)[0]
        opens = (pairs % (t - 1) == 0) | ~same[pairs - 1] if len(pairs) else pairs > 0
        before = pairs + pairs // max(t - 1, 1)  # in the sorted order, one place before each that repeats
        keys = keys.ravel() & (1 << bits) - 1

        def position(place: Any) -> Tensor:
            return torch.as_tensor(place // t * t + keys[place])

        return position(before + 1), torch.as_tensor(opens.cumsum(0) - 1), position(before[opens])

    def sq_norm(self) -> Tensor:
        g = wide(self.g).flatten(0, 1)
        squares = norms(g).square_()
        again, row, first = self._repeats()
        if len(again):
            sums = g[first].index_add_(0, row, g[again])
            squares[first], squares[again] = norms(sums).square_(), 0.0
        return squares.view(self.index.shape).sum(1)

    def lengths(self) -> Tensor:
        return norms(wide(self.g)).sum(1)

    def weighted_sum(self, w: Tensor) -> Tensor:
        g = wide(self.g)
        if g.device.type == "cpu":
            return added_up(self.index.flatten(), w.to(g.dtype).repeat_interleave(g.shape[1]), g.flatten(0, 1), self.v)
        g = times(w, g).flatten(0, 1)
        return g.new_zeros(self.v, g.shape[-1]).index_add_(0, self.index.flatten(), g).flatten()

    def take(self, records: Tensor) -> Rows:
        return Rows(self.index[records], self.g[records], self.v)

    def folded(self, k: int) -> Rows:
        return Rows(
            self.index.reshape(-1, k * self.index.shape[1]),
            self.g.reshape(-1, k * self.g.shape[1], self.g.shape[2]),
            self.v,
        )

    def scaled(self, w: Tensor) -> Rows:
        return Rows(self.index, times(w, wide(self.g)), self.v)


def added_up(index: Tensor, w: Tensor, g: Tensor, v: int) -> Tensor:
    """[v · d]: the sum over k of ``w`` [k] times ``g`` [k, d] in row ``index`` [k] of a [v, d] table, on a CPU.

    scipy goes through the rows once, in their order; torch sorts them first, and needs them multiplied beforehand.
    """
    from scipy.sparse import csc_array  # here, not above: it takes long to import

    k = len(index)
    if k:
        low, high = torch.aminmax(index)
        if low < 0 or high >= v:  # scipy does not look
            raise IndexError(f"rows {int(low)} to {int(high)} of a table of {v}")
    each_a_column = csc_array((w.numpy(), index.numpy(), np.arange(k + 1)), shape=(v, k))
    return torch.from_numpy(each_a_column @ g.numpy()).flatten()


@dataclass(frozen=True)
class Routed(Form):
    """Outer products that go to one member each of a stack [m, o, i] (the experts that tokens are routed to).

    ``index`` [n, t] (int) names the member, ``g`` [n, t, o] and ``a`` [n, t, i] are the factors.
    """

    index: Tensor
    g: Tensor
    a: Tensor
    m: int

    @property
    def n(self) -> int:
        return self.index.shape[0]

    def _wide(self) -> tuple[Tensor, Tensor]:
        return wide(self.g), wide(self.a.to(self.g.dtype))

    def grouped(self) -> tuple[Tensor, Outer]:
        """The rows of one record at one member together: (keys [k] = n·m + member, ascending; `Outer` [k, t, ·])."""
        keys = (torch.arange(self.n, device=self.index.device).unsqueeze(1) * self.m + self.index).flatten()
        keys, where, counts = torch.unique(keys, return_inverse=True, return_counts=True)
        order = where.argsort(stable=True)
        start = torch.cumsum(counts, 0) - counts
        slot = torch.arange(len(order), device=order.device) - start[where[order]]
        most = int(counts.max()) if len(counts) else 1

        def padded(x: Tensor) -> Tensor:
            out = x.new_zeros(len(keys), most, x.shape[-1])
            out[where[order], slot] = x.flatten(0, 1)[order]
            return out

        g, a = self._wide()
        return keys, Outer(padded(g), padded(a))

    def dense(self) -> Tensor:
        keys, outer = self.grouped()
        out = outer.g.new_zeros(self.n * self.m, outer.g.shape[-1], outer.a.shape[-1])
        out[keys] = outer.dense()
        return out.view(self.n, self.m, *out.shape[1:])

    def sq_norm(self) -> Tensor:
        keys, outer = self.grouped()
        squares = outer.settled().sq_norm()
        return squares.new_zeros(self.n).index_add_(0, torch.div(keys, self.m, rounding_mode="floor"), squares)

    def lengths(self) -> Tensor:
        g, a = self._wide()
        products = norms(g) * norms(a)
        return products.sum(1)

    def weighted_sum(self, w: Tensor) -> Tensor:
        g, a = self._wide()
        g = times(w, g).flatten(0, 1)
        a, index = a.flatten(0, 1), self.index.flatten()
        out = g.new_zeros(self.m, g.shape[-1], a.shape[-1])
        for member in index.unique().tolist():
            rows = (index == member).nonzero().flatten()
            out[member] = g[rows].T @ a[rows]
        return out.flatten()

    def take(self, records: Tensor) -> Routed:
        return Routed(self.index[records], self.g[records], self.a[records], self.m)

    def folded(self, k: int) -> Routed:
        index, g, a = (x.reshape(-1, k * x.shape[1], *x.shape[2:]) for x in (self.index, self.g, self.a))
        return Routed(index, g, a, self.m)

    def scaled(self, w: Tensor) -> Routed:
        g, a = self._wide()
        return Routed(self.index, times(w, g), a, self.m)


@dataclass(frozen=True)
class Normed(Form):
    """A form whose squared norms [n] are known: gradients were formed to take them, and let go again."""

    form: Form
    squares: Tensor

    @property
    def n(self) -> int:
        return self.form.n

    @property
    def held(self) -> int:
        return self.form.held

    @property
    def bytes(self) -> int:
        return self.form.bytes

    @property
    def narrow(self) -> bool:
        return self.form.narrow

    def dense(self) -> Tensor:
        return self.form.dense()

    def sq_norm(self) -> Tensor:
        return self.squares

    def lengths(self) -> Tensor:
        return self.form.lengths()

    def weighted_sum(self, w: Tensor) -> Tensor:
        return self.form.weighted_sum(w)

    def take(self, records: Tensor) -> Normed:
        return Normed(self.form.take(records), self.squares[records])

    def folded(self, k: int) -> Form:
        return self.form.folded(k)

    def scaled(self, w: Tensor) -> Normed:
        return Normed(self.form.scaled(w), self.squares * w.to(self.squares).square())
