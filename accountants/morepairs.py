"""Pairs beyond the Poisson Gaussian: Laplace, sampled versions of any pair, sampling without replacement, groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .numeric import normal_reach
from .pairs import _GAUSS, Array, Atoms, DiscretePair, GaussianPair, Ints, Pair, SmoothPair, U


def _cells(edges: Array, loss: Array) -> Ints:
    return np.clip(np.searchsorted(edges, loss, side="right") - 1, 0, len(edges) - 2).astype(np.int64)


@dataclass(frozen=True)
class LaplacePair(Pair):
    """Laplace noise at distance ``shift`` scales: atoms at ±shift and density e^{−(shift − L)/2}/4 between;
    symmetric."""

    shift: float

    def span(self, head: float, tail: float) -> tuple[float, float]:
        return -self.shift, self.shift

    def supremum(self) -> float:
        return self.shift * (1.0 + 4.0 * U)

    def breaks(self) -> list[float]:
        return [self.shift, -self.shift]

    def spacing(self) -> float:
        return 2.0 * self.shift

    def atoms(self, edges: Array) -> Atoms:
        low, high = max(-self.shift, float(edges[0])), min(self.shift, float(edges[-1]))
        inner = np.linspace(low, high, max(2, math.ceil(2.0 * (high - low)) + 1))
        cuts = np.union1d(np.clip(edges, low, high), inner)
        nodes, weights = _GAUSS[8]  # e^{L/2} on cells of at most 1/2: error far below one rounding
        half = 0.5 * np.diff(cuts)
        loss = ((cuts[:-1] + half)[:, None] + half[:, None] * nodes).ravel()
        mass = (half[:, None] * weights).ravel() * 0.25 * np.exp(-0.5 * (self.shift - loss))
        ends = [x for x in (-self.shift, self.shift) if edges[0] <= x <= edges[-1]]
        loss = np.concatenate([loss, ends])
        mass = np.concatenate([mass, [0.5 if x > 0 else 0.5 * math.exp(-self.shift) for x in ends]])
        error = 8.0 * U * (1.0 + 0.5 * (self.shift - loss))
        return Atoms(mass, loss, _cells(edges, loss), error, 4.0 * U * (1.0 + np.abs(loss)) * self.shift)


@dataclass(frozen=True)
class SampledPair(Pair):
    """Poisson sampling of any pair (P, Q): (1 − q)Q + qP against Q, or, ``flipped``, Q against that.

    The base's loss l becomes log(1 + q(e^l − 1)); where the base's P has no mass it becomes log(1 − q).
    """

    base: Pair
    q: float
    flipped: bool = False

    def __post_init__(self) -> None:
        infinite = 0.0 if self.flipped else self.q * self.base.infinite
        object.__setattr__(self, "infinite", infinite)

    def _outside(self) -> float:
        """Q-mass where the base's P has none."""
        return self.base.outside if isinstance(self.base, DiscretePair) else 0.0

    def _map(self, loss: Array) -> Array:
        small = np.log1p(self.q * np.expm1(np.minimum(loss, 1.0)))
        large = np.logaddexp(math.log1p(-self.q), math.log(self.q) + loss)
        out: Array = np.where(loss < 1.0, small, large)
        return out

    def _unmap(self, loss: Array) -> Array:
        with np.errstate(divide="ignore", over="ignore"):
            inner = np.maximum(np.expm1(np.minimum(loss, 700.0)) / self.q, -1.0)
            return np.log1p(inner)

    def span(self, head: float, tail: float) -> tuple[float, float]:
        base = self.base.span(min(head, tail), min(head, tail))
        low, high = (float(x) for x in self._map(np.array(base)))
        if self._outside() > 0.0:
            low = math.log1p(-self.q)
        return (-high, -low) if self.flipped else (low, high)

    def supremum(self) -> float:
        if self.flipped:
            return -math.log1p(-self.q) * (1.0 + 8.0 * U)
        top = self.base.supremum()
        return math.inf if math.isinf(top) else float(self._map(np.array([top]))[0]) * (1.0 + 8.0 * U)

    def breaks(self) -> list[float]:
        out = [float(x) for x in self._map(np.array(self.base.breaks(), dtype=float))]
        if self._outside() > 0.0:
            out.append(math.log1p(-self.q))
        return [-x for x in out] if self.flipped else out

    def atoms(self, edges: Array) -> Atoms:
        forward = -edges[::-1] if self.flipped else edges
        inner = self._unmap(forward)
        low, high = self.base.span(-745.0, -745.0)
        inner = np.unique(np.clip(inner, low, high))
        if len(inner) < 2:
            inner = np.array([low, high])
        base = self.base.atoms(inner)
        q_mass = base.mass * np.exp(-base.loss)
        loss = self._map(base.loss)
        mass = q_mass if self.flipped else (1.0 - self.q) * q_mass + self.q * base.mass
        mass_error = base.mass_error + base.loss_error + 8.0 * U * (2.0 + np.abs(base.loss))
        loss_error = base.loss_error + 8.0 * U * (np.abs(loss) + self.q)
        outside = self._outside()
        if outside > 0.0:
            loss = np.append(loss, math.log1p(-self.q))
            mass = np.append(mass, outside if self.flipped else (1.0 - self.q) * outside)
            mass_error, loss_error = np.append(mass_error, 8.0 * U), np.append(loss_error, 8.0 * U)
        if self.flipped:
            loss = -loss
        return Atoms(mass, loss, _cells(edges, loss), mass_error, loss_error)


@dataclass(frozen=True)
class WithoutReplacementPair(Pair):
    """Fixed-size sampling at rate q of a Gaussian at distance 1, when one record is exchanged or nulled; symmetric.

    For e^ε ≥ 1 its delta is that of (1 − q)N(0) + qN(1) against N(0), below by symmetry (Zhu, Dong, Wang 2022, after
    Balle, Barthe, Gaboardi 2018): the positive losses of removing, the negative ones of adding, the rest at 0.
    Composing
    the one direction alone would be wrong: its negative losses pay for positive ones that the other direction keeps.
    """

    q: float
    sigma: float

    def _halves(self) -> tuple[GaussianPair, GaussianPair]:
        return GaussianPair(q=self.q, sigma=self.sigma), GaussianPair(q=self.q, sigma=self.sigma, flipped=True)

    def span(self, head: float, tail: float) -> tuple[float, float]:
        remove, add = self._halves()
        return min(0.0, add.span(head, tail)[0]), max(0.0, remove.span(head, tail)[1])

    def breaks(self) -> list[float]:
        return [0.0]

    def atoms(self, edges: Array) -> Atoms:
        remove, add = self._halves()
        parts: list[Atoms] = []
        if edges[-1] > 0.0:
            parts.append(remove.atoms(np.concatenate([[0.0], edges[edges > 0.0]])))
        if edges[0] < 0.0:
            parts.append(add.atoms(np.concatenate([edges[edges < 0.0], [0.0]])))
        a = 0.5 / self.sigma
        rest = (1.0 - self.q) * math.erf(a / math.sqrt(2.0))
        loss = np.concatenate([*(p.loss for p in parts), [0.0]])
        mass = np.concatenate([*(p.mass for p in parts), [rest]])
        return Atoms(
            mass,
            loss,
            _cells(edges, loss),
            np.concatenate(
                [*(p.mass_error for p in parts), [64.0 * U * (1.0 + 1.0 / max(a, 1e-12)) if a < 1 else 64.0 * U]]
            ),
            np.concatenate([*(p.loss_error for p in parts), [0.0]]),
        )


@dataclass(frozen=True)
class GroupPair(SmoothPair):
    """A group of k records, each Poisson-sampled at rate q: Σ Bin(k, q)(i) N(i, σ²) against N(0, σ²); y = x/σ."""

    q: float = 1.0
    sigma: float = 1.0
    size: int = 1

    def _log_weights(self) -> tuple[Array, Array]:
        return _binomial(self.size, self.q)

    def log_ratio(self, y: Array) -> Array:
        from scipy.special import logsumexp  # here, not above: it triples the import time

        i, w = self._log_weights()
        out: Array = logsumexp(w + i * (y[..., None] / self.sigma) - 0.5 * (i / self.sigma) ** 2, axis=-1)
        return out

    def ratio_error(self, y: Array, loss: Array) -> Array:
        size = np.abs(y) * self.size / self.sigma + 0.5 * (self.size / self.sigma) ** 2
        return 16.0 * U * (1.0 + self.size + size)

    def inverse(self, loss: Array) -> Array:
        low, high = self.y_span(-745.0, -745.0)
        a, b = np.full(len(loss), low - 1.0), np.full(len(loss), high + 1.0)
        for _ in range(64):
            middle = 0.5 * (a + b)
            below = self.log_ratio(middle) < loss
            a, b = np.where(below, middle, a), np.where(below, b, middle)
        out: Array = 0.5 * (a + b)
        return out

    def y_span(self, head: float, tail: float) -> tuple[float, float]:
        if self.flipped:
            return -normal_reach(tail), normal_reach(head)
        return -normal_reach(head), self.size / self.sigma + normal_reach(tail)

    def slope(self, y: Array) -> Array:
        return 3.0 + np.abs(y) + self.size / self.sigma

    def supremum(self) -> float:
        return -self.size * math.log1p(-self.q) * (1.0 + 8.0 * U) if self.flipped and self.q < 1.0 else math.inf


@lru_cache(maxsize=64)
def _binomial(size: int, q: float) -> tuple[Array, Array]:
    from scipy.special import gammaln  # here, not above: it triples the import time

    i = np.arange(size + 1.0)
    choose = gammaln(size + 1.0) - gammaln(i + 1.0) - gammaln(size - i + 1.0)
    log_weights: Array = choose + i * math.log(q) + (size - i) * math.log1p(-q)
    return i, log_weights


def discrete_gaussian(sigma: float, shift: int) -> DiscretePair:
    """N_Z(shift, σ²) against N_Z(0, σ²)."""
    reach = math.ceil(38.0 * sigma) + shift
    x = np.arange(-reach, reach + 1.0)
    log_p = -0.5 * ((x - shift) / sigma) ** 2
    total = float(np.exp(-0.5 * (np.arange(-reach - shift, reach + shift + 1.0) / sigma) ** 2).sum())
    keep = log_p > -700.0
    loss = shift * (x - 0.5 * shift) / sigma**2
    mass = np.exp(log_p) / total
    return DiscretePair(tuple(map(float, loss[keep])), tuple(map(float, mass[keep])), 1e-290, 1e-290)


def discrete_laplace(scale: float, shift: int) -> DiscretePair:
    """Two-sided geometric noise around ``shift`` against around 0."""
    decay = math.exp(-1.0 / scale)
    centre = (1.0 - decay) / (1.0 + decay)
    losses = [shift / scale, -shift / scale]
    masses = [1.0 / (1.0 + decay), decay**shift / (1.0 + decay)]
    for x in range(1, shift):
        losses.append((2 * x - shift) / scale)
        masses.append(centre * decay ** (shift - x))
    return DiscretePair(tuple(losses), tuple(masses))


def randomized_response(noise: float, categories: int) -> DiscretePair:
    """A report when the truth is one value against when it is another."""
    other = noise / categories
    truth = 1.0 - noise + other
    if other == 0.0:
        return DiscretePair((), (), 1.0, 1.0)
    loss = math.log(truth / other)
    losses, masses = [loss, -loss], [truth, other]
    if categories > 2:
        losses.append(0.0)
        masses.append((categories - 2) * other)
    return DiscretePair(tuple(losses), tuple(masses))


def approximate(epsilon: float, delta: float) -> DiscretePair:
    """The pair that dominates every (ε, δ)-DP mechanism."""
    if delta >= 1.0:
        return DiscretePair((), (), 1.0, 1.0)
    high = (1.0 - delta) / (1.0 + math.exp(-epsilon))
    low = (1.0 - delta) * math.exp(-epsilon) / (1.0 + math.exp(-epsilon))
    return DiscretePair((epsilon, -epsilon), (high, low), delta, delta)
