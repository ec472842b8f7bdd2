"""Pairs of Gaussian mixtures, pairs put together from two directions, and mixtures of pairs.

Which mixtures are the worst ones. Sampling a Gaussian sum gives P = Σ_i w_i N(u_i, σ²I) against Q = Σ_j v_j N(t_j, σ²I)
with vectors u_i, t_j made of the records' contributions, each of norm at most C. For a ≥ 0, under N(0, σ²I),

    E(P − aQ)+ = E(Σ_i w_i S_i − a Σ_j v_j T_j)+,   S_i = e^{⟨u_i, y⟩/σ² − |u_i|²/(2σ²)}, T_j likewise,

a function f(S, T) of jointly log-normal variables of mean 1. By Price's theorem the derivative with respect to the
covariance of two exponents is E[S_i S_k ∂²f/∂S_i∂S_k], and f, a convex function of one linear form, has ∂² ≥ 0 between
terms of equal sign and ≤ 0 between terms of opposite sign. So the value grows as terms of opposite sign get less, and
terms of equal sign more, correlated, and with every variance: the worst contributions lie on one line, those of
opposite sign at opposite ends. Everything that follows is that line in units of C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .morepairs import _cells
from .numeric import normal_reach
from .pairs import _LOG_2PI, Array, Atoms, Pair, SmoothPair, U

Mixture = tuple[tuple[float, float], ...]
"""(weight, mean) of the components, all of the same standard deviation."""
_NEWTON = 12
_AT_A_TIME = 1 << 20  # terms


def _log_sum(terms: Array) -> Array:
    """log Σ e^terms over the last axis."""
    top = terms.max(axis=-1)
    out: Array = top + np.log(np.exp(terms - top[..., None]).sum(axis=-1))
    return out


def _pieces(points: Array, components: int) -> list[Array]:
    """The points in pieces of so many that a term for each component fits in little memory: groups have many."""
    return np.array_split(points, max(1, -(-points.size * components // _AT_A_TIME)))


@dataclass(frozen=True)
class GaussianMixturePair(SmoothPair):
    """P = Σ w N(m, σ²) over ``with_record`` against Q, the same over ``without``; y = x/σ.

    The likelihood ratio must rise with y. Where it only does so above 1, ``start`` is the y from which on it does, and
    only losses of one sign are ever asked for.
    """

    with_record: Mixture = ()
    without: Mixture = ()
    sigma: float = 1.0
    start: float = -math.inf

    def _terms(self, mixture: Mixture, y: Array) -> Array:
        weight, mean = np.array(mixture).T
        out: Array = np.log(weight) + mean * (y[..., None] / self.sigma) - 0.5 * (mean / self.sigma) ** 2
        return out

    def _log_density(self, mixture: Mixture, y: Array) -> Array:
        """log of the mixture's density at y over that of N(0, 1)."""
        out: Array = np.concatenate([_log_sum(self._terms(mixture, piece)) for piece in _pieces(y, len(mixture))])
        return out

    def log_ratio(self, y: Array) -> Array:
        return self._log_density(self.with_record, y) - self._log_density(self.without, y)

    def log_base(self, y: Array) -> Array:
        out: Array = self._log_density(self.without, y) - 0.5 * (y * y + _LOG_2PI)
        return out

    def _means(self) -> tuple[float, float]:
        means = [m for _, m in self.with_record + self.without]
        return min(means), max(means)

    def ratio_error(self, y: Array, loss: Array) -> Array:
        low, high = self._means()
        far = max(-low, high) / self.sigma
        count = len(self.with_record) + len(self.without)
        return 16.0 * U * (2.0 + count + np.abs(y) * far + 0.5 * far * far)

    def inverse(self, loss: Array) -> Array:
        low, high = self.y_span(-745.0, -745.0)
        ys = np.linspace(low - 1.0 if self.start == -math.inf else low, high + 1.0, 1024)
        ratios = np.maximum.accumulate(self.log_ratio(ys))
        pieces = _pieces(loss, max(len(self.with_record), len(self.without)))
        return np.concatenate([self._between(ys, ratios, piece) for piece in pieces])

    def _between(self, ys: Array, ratios: Array, loss: Array) -> Array:
        """The inverse, given the ratios at some y."""
        place = np.clip(np.searchsorted(ratios, loss), 1, len(ys) - 1)
        a, b = ys[place - 1], ys[place]
        y = 0.5 * (a + b)
        for _ in range(_NEWTON):
            up, down = self._terms(self.with_record, y), self._terms(self.without, y)
            above, below = _log_sum(up), _log_sum(down)
            miss = above - below - loss
            rise = np.exp(up - above[..., None]) @ np.array([m for _, m in self.with_record])
            rise -= np.exp(down - below[..., None]) @ np.array([m for _, m in self.without])
            a, b = np.where(miss < 0.0, y, a), np.where(miss < 0.0, b, y)
            step = y - miss / np.maximum(rise / self.sigma, 1e-300)
            y = np.where((step > a) & (step < b), step, 0.5 * (a + b))
        out: Array = np.where(loss > ratios[-1], math.inf, np.where(loss < ratios[0], -math.inf, y))
        return np.maximum(out, self.start)

    def y_span(self, head: float, tail: float) -> tuple[float, float]:
        mixture = self.without if self.flipped else self.with_record
        means = [m for _, m in mixture]
        if self.flipped:
            head, tail = tail, head
        low = max(self.start, min(means) / self.sigma - normal_reach(head))
        return low, max(low, max(means) / self.sigma + normal_reach(tail))

    def slope(self, y: Array) -> Array:
        low, high = self._means()
        return 3.0 + np.abs(y) + max(-low, high) / self.sigma

    def supremum(self) -> float:
        # the side towards which the loss rises: the outermost components decide
        end = min if self.flipped else max
        (w, m), (v, t) = (end(mixture, key=lambda part: part[1]) for mixture in (self.with_record, self.without))
        if m != t or self.start > -math.inf:
            return math.inf
        return abs(math.log(w / v)) * (1.0 + 8.0 * U) + 8.0 * U


def binomial(size: int, rate: float, scale: float = 1.0) -> Mixture:
    """Bin(size, rate) records, each contributing ``scale``."""
    choose = (math.lgamma(size + 1.0) - math.lgamma(i + 1.0) - math.lgamma(size - i + 1.0) for i in range(size + 1))
    weights = (math.exp(c + i * math.log(rate) + (size - i) * math.log1p(-rate)) for i, c in enumerate(choose))
    return tuple((w, scale * i) for i, w in enumerate(weights) if w > 1e-300)


def group_pair(size: int, rate: float, sigma: float, *, flipped: bool = False) -> GaussianMixturePair:
    """``size`` records that come and go together, each Poisson-sampled (Ganesh 2024)."""
    return GaussianMixturePair(flipped, binomial(size, rate), ((1.0, 0.0),), sigma)


def exchange_pair(size: int, rate: float, sigma: float) -> GaussianMixturePair:
    """``size`` Poisson-sampled records exchanged for others, at worst from C to −C; symmetric.

    For one record: (1 − q)N(0) + qN(1) against (1 − q)N(0) + qN(−1).
    """
    return GaussianMixturePair(False, binomial(size, rate), binomial(size, rate, -1.0), sigma)


def zeroed_pair(rate: float, sigma: float, *, flipped: bool = False) -> GaussianMixturePair:
    """Losses above 0 of a record nulled in a batch of fixed size: (1−q)N(−1) + qN(1) against (1−q)N(−1) + qN(0)."""
    rest = (1.0 - rate, -1.0)
    return GaussianMixturePair(flipped, (rest, (rate, 1.0)), (rest, (rate, 0.0)), sigma, 0.5 / sigma)


@dataclass(frozen=True)
class TwoSidedPair(Pair):
    """The positive losses of one pair, the negative ones of another, the rest at 0.

    This is how a dominating pair looks when delta(ε) is one pair's for ε ≥ 0 and another's below: composing either
    alone would be wrong, for its negative losses pay for positive ones that the other keeps.
    """

    positive: Pair
    negative: Pair

    def __post_init__(self) -> None:
        object.__setattr__(self, "infinite", self.positive.infinite)

    def span(self, head: float, tail: float) -> tuple[float, float]:
        return min(0.0, self.negative.span(head, tail)[0]), max(0.0, self.positive.span(head, tail)[1])

    def supremum(self) -> float:
        return max(0.0, self.positive.supremum())

    def breaks(self) -> list[float]:
        return [0.0, *(x for x in self.positive.breaks() if x > 0.0), *(x for x in self.negative.breaks() if x < 0.0)]

    def atoms(self, edges: Array) -> Atoms:
        parts: list[Atoms] = []
        if edges[-1] > 0.0:
            parts.append(_signed(self.positive, np.concatenate([[0.0], edges[edges > 0.0]]), 1.0))
        if edges[0] < 0.0:
            parts.append(_signed(self.negative, np.concatenate([edges[edges < 0.0], [0.0]]), -1.0))
        rest, slip = _rest(self)
        loss = np.concatenate([*(p.loss for p in parts), [0.0]])
        return Atoms(
            np.concatenate([*(p.mass for p in parts), [rest]]),
            loss,
            _cells(edges, loss),
            np.concatenate([*(p.mass_error for p in parts), [slip]]),
            np.concatenate([*(p.loss_error for p in parts), [0.0]]),
        )


def _signed(pair: Pair, edges: Array, sign: float) -> Atoms:
    """The atoms strictly on one side of 0."""
    atoms = pair.atoms(edges)
    keep = sign * atoms.loss > 0.0
    return Atoms(atoms.mass[keep], atoms.loss[keep], atoms.cell[keep], atoms.mass_error[keep], atoms.loss_error[keep])


@lru_cache(maxsize=1024)
def _rest(pair: TwoSidedPair) -> tuple[float, float]:
    """P-mass at loss 0 and a bound on its relative error."""
    total, slip = pair.infinite, 0.0
    for part, sign in ((pair.positive, 1.0), (pair.negative, -1.0)):
        low, high = part.span(-745.0, -745.0)
        if sign * (high if sign > 0.0 else low) > 0.0:
            atoms = _signed(part, np.array([0.0, high] if sign > 0.0 else [low, 0.0]), sign)
            total += math.fsum(atoms.mass)
            slip += float(np.dot(atoms.mass, atoms.mass_error))
    rest = max(1.0 - total, 1e-300)
    return rest, min(1.0, (slip + 8.0 * U) / rest)


@dataclass(frozen=True)
class MixedPair(Pair):
    """One of several pairs, drawn with the given probabilities and told: the law of its loss is the mixture of theirs.

    delta is jointly convex, so this dominates any release that draws among them and does not tell.
    """

    parts: tuple[tuple[float, Pair], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "infinite", sum(w * pair.infinite for w, pair in self.parts))

    def span(self, head: float, tail: float) -> tuple[float, float]:
        each = []
        for w, pair in self.parts:
            more = -math.log(w * len(self.parts))
            each.append(pair.span(min(head + more, -1.0), min(tail + more, -1.0)))
        return min(low for low, _ in each), max(high for _, high in each)

    def supremum(self) -> float:
        return max(pair.supremum() for _, pair in self.parts)

    def breaks(self) -> list[float]:
        return sorted({x for _, pair in self.parts for x in pair.breaks()})

    def atoms(self, edges: Array) -> Atoms:
        spans = [pair.span(-745.0, -745.0) for _, pair in self.parts]
        met = [
            part for part, (low, high) in zip(self.parts, spans, strict=True) if low <= edges[-1] and high > edges[0]
        ]
        if not met:
            return Atoms(np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))
        each = [pair.atoms(edges) for _, pair in met]
        weighted = [w * atoms.mass for (w, _), atoms in zip(met, each, strict=True)]
        return Atoms(
            np.concatenate(weighted),
            np.concatenate([atoms.loss for atoms in each]),
            np.concatenate([atoms.cell for atoms in each]),
            np.concatenate([atoms.mass_error + 16.0 * U for atoms in each]),
            np.concatenate([atoms.loss_error for atoms in each]),
        )
