"""Random allocation: every record goes to one of t batches, drawn uniformly (balls and bins; 1-out-of-t).

With the record, P = (1/t) Σ_i (the mechanism's P in round i, its Q in the others); without it, Q everywhere. So the
likelihood ratio is R = (X_1 + … + X_t)/t with X_i = dP/dQ of round i, independent under Q and of mean 1.

Both directions are convex in R, delta_remove(ε) = E_Q[(R − e^ε)+] and delta_add(ε) = E_Q[(1 − e^ε R)+]. Hence a law of
the X_i that is larger in convex order gives an upper bound, one that is smaller a lower bound, and so they do again in
every further composition. Larger: each atom is split on two neighbouring points, keeping mass and mean. Smaller: the
atoms between two neighbouring points are merged into their mean. Both are second order in the distance of the points.
The law of the sum is built by doubling, by sums over pairs of positive terms, so that every tail keeps its relative
accuracy and nothing cancels.

Adaptive rounds. Let R_i be the ratio of round i given the earlier answers. As the base pair dominates the round, R_i is
below X_i in convex order, whatever those answers were. For convex φ, E[φ(c + R_t/t)] ≤ E[φ(c + X_t/t)], which is again
convex in c; so, from the last round to the first, every R_i may be replaced by an independent X_i.

k out of t. A uniform choice of k rounds is: cut the rounds at random into k blocks, choose one round in each. Given the
cut (it is independent of the data, and delta is convex), R is the product of the blocks' ratios, affine in each single
R_i, so the same argument replaces them all, and the release is dominated by the composition of its blocks (Feldman and
Shenfeld 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .pairs import Array, Atoms, Ints, Pair, U

POINTS = 760
_LEVELS: Array = np.array([0.5 * math.erfc(-0.25 * i / math.sqrt(2.0)) for i in range(-28, 29)])
_LOWER, _UPPER = 24, 32  # one standard deviation around the middle of _LEVELS
_TEMPER = 0.3  # power of the tail mass whose fall is followed evenly
_HIGHEST = 600.0  # losses beyond are taken as infinite


@dataclass(frozen=True, eq=False)
class AtomsPair(Pair):
    """A pair given by arrays: P-masses at losses. Not hashed by value: build it once and keep it."""

    loss: Array
    mass: Array
    mass_error: float
    """Relative."""
    loss_error: float
    """Absolute."""
    infinite: float = 0.0
    outside: float = 0.0
    """Q-mass where P has none."""

    def span(self, head: float, tail: float) -> tuple[float, float]:
        below, above = np.cumsum(self.mass), np.cumsum(self.mass[::-1])
        first = int(np.searchsorted(below, 0.9 * math.exp(max(head, -700.0))))
        last = len(self.mass) - 1 - int(np.searchsorted(above, 0.9 * math.exp(max(tail, -700.0))))
        first, last = min(first, len(self.mass) - 1), max(last, 0)
        return float(self.loss[min(first, last)]), float(self.loss[max(first, last)])

    def atoms(self, edges: Array) -> Atoms:
        low, high = edges[0], edges[-1]
        inside = (self.loss >= low) & (self.loss <= high)
        loss, mass = self.loss[inside], self.mass[inside]
        cell = np.clip(np.searchsorted(edges, loss, side="right") - 1, 0, len(edges) - 2)
        return Atoms(mass, loss, cell, np.full(len(mass), self.mass_error), np.full(len(mass), self.loss_error))

    def flip(self) -> AtomsPair:
        """The other direction."""
        mass = self.mass * np.exp(-self.loss)
        error = self.mass_error + self.loss_error + 4.0 * U * (1.0 + float(np.abs(self.loss).max(initial=0.0)))
        return AtomsPair(-self.loss[::-1], mass[::-1], error, self.loss_error, self.outside, self.infinite)


Rest = tuple[float, float]
"""What is still to be added: its mean, and a value it is seldom below."""


class _Law(NamedTuple):
    """Q-masses ``q`` at increasing values ``x``."""

    x: Array
    q: Array


def _grid(values: Array, mass: Array, rest: Rest, low: float, high: float, points: int) -> Array:
    """Points from ``low`` to ``high``, dense where the law of (value + rest) has its mass, and its tail falls.

    Any points are sound. In u = log(value + a tenth of the rest) a cell of width w adds about w²/12 of its mass, so w
    grows like the density to the power −1/3; the density is the larger of Q's, of P's, and of a power of P's tail.
    """
    mean, seldom = rest
    shift = 0.1 * min(mean, seldom)
    order = np.argsort(values)
    u = np.log(np.maximum(values[order] + shift, 1e-300))
    size = np.log(values[order] + mean + 1e-300)
    with np.errstate(divide="ignore"):
        weight = np.log(mass[order])
    first, last = math.log(max(low + shift, 1e-300)), math.log(high + shift)
    shares, marks, finest = [], [np.linspace(first, last, 60)], 0.02 * (last - first)
    for theta in (0.0, 1.0):
        exponent = weight + theta * size
        each = np.exp(exponent - exponent.max())
        shares.append(np.cumsum(each) / each.sum())
    tail = np.cumsum(each[::-1])[::-1] / each.sum()
    shares.append(1.0 - np.append(tail[1:], 0.0) ** _TEMPER)
    for share in shares:
        share /= share[-1]
        spots = np.interp(_LEVELS, share, u)
        finest = min(finest, max(0.02 * float(spots[_UPPER] - spots[_LOWER]), 1e-7 * (last - first)))
        marks.append(np.clip(spots, first, last))
    together = np.unique(np.rint((np.concatenate(marks) - first) / finest)) * finest + first
    together[-1] = max(together[-1], last)
    width = np.diff(together)
    density = np.zeros(len(width))
    for share in shares:
        density = np.maximum(density, np.diff(np.interp(together, u, share)) / width)
    density = np.maximum(density, np.maximum(np.roll(density, 1), np.roll(density, -1)))
    root = np.cbrt(density)
    want = root / float(np.dot(root, width)) + 0.05 / (last - first)
    count = np.concatenate([[0.0], np.cumsum(want * width)])
    inner = np.exp(np.interp(np.linspace(0.0, count[-1], points), count, together)) - shift
    inner = np.unique(inner[(inner > low) & (inner < high)])
    inner = inner[np.diff(inner, prepend=low, append=high)[1:] > 1e-9 * inner]
    inner = inner[np.diff(inner, prepend=low) > 1e-9 * inner]
    return np.concatenate([[low], inner, [high]])


def _split(x: Array, q: Array, grid: Array) -> _Law:
    """Every atom on the two points around it: a larger law in convex order, rounding of the shares included."""
    cell = np.minimum(np.searchsorted(grid, x, side="right"), len(grid) - 1) - 1
    width = np.diff(grid)
    share = np.clip((x - grid[cell]) / width[cell], 0.0, 1.0)
    n = len(width)
    total = np.bincount(cell, weights=q, minlength=n)
    up = np.bincount(cell, weights=q * share, minlength=n)
    terms = float(np.bincount(cell, minlength=1).max()) + 8.0
    slip = total * (terms * U + 4.0 * U * grid[1:] / width)
    out = np.zeros(n + 1)
    out[:-1] += np.maximum(total - up, 0.0) + slip
    out[1:] += up + slip
    return _Law(grid, out)


def _merge(x: Array, q: Array, grid: Array) -> _Law:
    """The atoms between two points as one atom at their mean: a smaller law in convex order."""
    cell = np.minimum(np.searchsorted(grid, x, side="right"), len(grid) - 1) - 1
    n = len(grid) - 1
    total = np.bincount(cell, weights=q, minlength=n)
    first = np.bincount(cell, weights=q * x, minlength=n)
    keep = total > 0.0
    mass: Array = (total[keep] * (1.0 - 2.0 * (len(x) + 8.0) * U)).astype(np.float64)
    return _Law(first[keep] / total[keep], mass)


def _coarse(law: _Law, groups: int) -> _Law:
    start = np.unique(np.linspace(0, len(law.x) - 1, groups).astype(int))
    q = np.add.reduceat(law.q, start)
    return _Law(np.add.reduceat(law.q * law.x, start) / np.maximum(q, 1e-320), q)


def _convolve(a: _Law, b: _Law, rest: Rest, points: int, upper: bool) -> _Law:
    """The law of the sum of two independent values, on about ``points`` points; ``rest`` is still to be added."""
    small, other = _coarse(a, 90), _coarse(b, 90)
    pilot = np.add.outer(small.x, other.x).ravel(), np.multiply.outer(small.q, other.q).ravel()
    if a is b:
        i, j, times = _triangle(len(a.x))
        x, q = a.x.take(i) + a.x.take(j), a.q.take(i) * a.q.take(j) * times
    else:
        x, q = np.add.outer(a.x, b.x).ravel(), np.multiply.outer(a.q, b.q).ravel()
    grid = _grid(*pilot, rest, float(a.x[0] + b.x[0]), float(a.x[-1] + b.x[-1]), points)
    return _split(x, q, grid) if upper else _merge(x, q, grid)


@lru_cache(maxsize=4)
def _triangle(n: int) -> tuple[Ints, Ints, Array]:
    """Unordered pairs (i, j), and how many ordered ones each stands for."""
    i, j = np.triu_indices(n)
    return i, j, np.where(i == j, 1.0, 2.0)


def _single(base: Pair, rounds: int, points: int, upper: bool) -> tuple[_Law, float, float, Callable[[int], Rest]]:
    """X of one round on few points; P-mass taken as infinite; the largest relative error of a value; the `Rest`s."""
    low, high = base.span(-745.0, -745.0)
    cut = min(high, _HIGHEST)
    low = max(low, -_HIGHEST)
    edges = np.linspace(low - 1e-9 * (1.0 + abs(low)), cut + 1e-9 * (1.0 + abs(cut)), 2 * points)
    atoms = base.atoms(edges)
    keep = (atoms.loss <= edges[-1]) & (atoms.loss >= edges[0])
    loss, mass, off = atoms.loss[keep], atoms.mass[keep], atoms.mass_error[keep] + atoms.loss_error[keep]
    off = off + 8.0 * U * (1.0 + np.abs(loss))
    x, q = np.exp(loss), mass * np.exp(-loss) * (1.0 + off if upper else 1.0 - off)
    outside = getattr(base, "outside", 0.0)
    if outside > 0.0:
        x, q = np.append(x, 0.0), np.append(q, outside * (1.0 + 8.0 * U if upper else 1.0 - 8.0 * U))
    infinite = base.infinite
    if cut < high:
        infinite = max(0.0, 1.0 - float((mass * (1.0 - off)).sum()))
    live = q > 0.0
    x, q, error = x[live], q[live], float(off.max())
    order = np.argsort(x)
    x, q = x[order], q[order]
    share = np.cumsum(q) / q.sum()

    def rest(done: int) -> Rest:
        # the largest of n values is below their F^-1(1e-10^(1/n)) with probability 1e-10, and so is their sum
        n = rounds - done
        seldom = float(x[np.searchsorted(share, min(1e-10 ** (1.0 / n), share[-1]))]) if n else 0.0
        return float(n), seldom

    if len(x) <= points:
        distinct, where = np.unique(x, return_inverse=True)
        return _Law(distinct, np.bincount(where, weights=q).astype(np.float64)), infinite, error, rest
    grid = _grid(x, q, rest(1), float(x[0]), float(x[-1]), points)
    return (_split if upper else _merge)(x, q, grid), infinite, error, rest


def one_of(base: Pair, rounds: int, *, upper: bool, points: int = POINTS) -> AtomsPair:
    """The pair of removing the record: 1 of ``rounds`` runs of ``base`` sees it.

    Guarantee: dominates the release if ``upper``, else is dominated by it.
    """
    return _one_of(base, rounds, upper, points)


def _sum(base: Pair, rounds: int, upper: bool, points: int) -> tuple[_Law, float, float]:
    """The law of X_1 + … + X_t by doubling; infinite P-mass; relative error of the values of one round."""
    single, infinite, error, rest = _single(base, rounds, points, upper)
    small = single if rounds < 16 else _single(base, rounds, points // 4, upper)[0]
    done, total = 1, single
    for bit in bin(rounds)[3:]:
        done *= 2
        total = _convolve(total, total, rest(done), points, upper)
        if bit == "1":
            done += 1
            one = single if done <= 8 else small  # one of many need not be as fine as they are together
            total = _convolve(total, one, rest(done), points, upper)
    return total, infinite, error


@lru_cache(maxsize=64)
def _one_of(base: Pair, rounds: int, upper: bool, points: int) -> AtomsPair:
    (x, q), infinite, error = _sum(base, rounds, upper, points)
    levels = 2.0 * rounds.bit_length() + 2.0
    outside = float(q[x <= 0.0].sum())
    positive = x > 0.0
    x, q = x[positive], q[positive]
    loss = np.log(x) - math.log(rounds)
    # values: a sum, a mean over at most `points`² terms a level, and the logarithm
    slip = error + levels * (8.0 + (0.0 if upper else 2.0 * points * points)) * U + 8.0 * U * (1.0 + np.abs(loss).max())
    mass = q * (x / rounds)
    return AtomsPair(loss, mass, 2.0 * slip + 16.0 * levels * U, float(slip), infinite, outside)


def blocks(rounds: int, chosen: int) -> Sequence[tuple[int, int]]:
    """(size, how many) of the blocks into which k-out-of-t is cut."""
    small, larger = divmod(rounds, chosen)
    return [(size, n) for size, n in ((small, chosen - larger), (small + 1, larger)) if n]
