"""Pairs beyond the Poisson Gaussian: Laplace, discrete mechanisms, Poisson-sampled versions of any pair."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .pairs import _GAUSS, Array, Atoms, DiscretePair, Ints, Pair, U


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
