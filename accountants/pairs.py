"""Dominating pairs as laws of the privacy loss: exact atoms inside any cells one asks for.

A release under one neighbouring direction is a pair (P, Q); its loss is L = log dP/dQ under P. `Pair.atoms` hands out
the law of L restricted to given cells as weighted points, so that sums over the points are integrals over the cells to
within rounding. Everything that follows (grids, composition, trade-off curves) only ever sees these points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .numeric import dot, normal_reach

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
U = 2.0**-53
_GAUSS = {n: np.polynomial.legendre.leggauss(n) for n in (4, 8)}
_LOG_2PI = math.log(2.0 * math.pi)


class Atoms(NamedTuple):
    """Weighted points of a loss law: P-mass, loss, the cell each point lies in, and bounds on the rounding of both."""

    mass: Array
    loss: Array
    cell: Ints
    mass_error: Array
    """Relative."""
    loss_error: Array
    """Absolute."""


class Pair(ABC):
    """One direction of a dominating pair."""

    infinite: float = 0.0
    """P(L = ∞)."""

    def conserves(self) -> bool:
        """Whether P and Q lie on finite losses wholly, without an upper end: then far losses may be summed apart."""
        return False

    def supremum(self) -> float:
        """The largest finite loss, rounded up; infinity where there is none."""
        return math.inf

    @abstractmethod
    def span(self, head: float, tail: float) -> tuple[float, float]:
        """(lo, hi) with P(L < lo) ≤ e^head and P(hi < L < ∞) ≤ e^tail. Either may be the end of the support."""

    @abstractmethod
    def atoms(self, edges: Array) -> Atoms:
        """The law of L on [edges[0], edges[-1]]; every atom lies in its cell [edges[c], edges[c + 1]]."""

    def distance(self) -> float:
        """The total variation between P and Q, rounded up."""
        low, high = self.span(-745.0, -745.0)
        if high <= 0.0:
            return self.infinite
        atoms = self.atoms(np.array([max(0.0, low), max(high, low, 1e-300)]))
        loss = np.maximum(atoms.loss, 0.0) + atoms.loss_error
        return float(dot(atoms.mass * (1.0 + atoms.mass_error), -np.expm1(-loss))) * (1.0 + 1e-9) + self.infinite

    def breaks(self) -> list[float]:
        """Losses at which the law has true atoms or jumps; grids do well to have edges there."""
        return []

    def spacing(self) -> float:
        """The distance of which all differences of breaks are multiples; 0 if there is none."""
        return 0.0


@dataclass(frozen=True)
class SmoothPair(Pair):
    """A pair whose loss is a smooth, increasing function of a real noise value y with density q(y) under Q.

    With ``flipped`` the roles of P and Q are exchanged: the loss is then −log R and its law is taken under Q.

    Quadrature. A cell of losses is a cell of y, cut until it is no wider than 0.75 / slope(y), where slope bounds the
    logarithmic derivative of both densities at distance ≤ 3 / slope in the complex plane (there both are analytic and
    at most e^3.5 times their value on the cell). On the Bernstein ellipse with half-axis 3 / slope, rho ≥ 16, so the
    n = 8 Gauss rule errs by at most (64/15) e^4 rho^-16 / (1 − rho^-2) < 2e-17 of the cell's mass; cells 16 times
    narrower have rho ≥ 256 and need only n = 4. Both lie below one rounding.
    """

    flipped: bool = False

    @abstractmethod
    def log_ratio(self, y: Array) -> Array:
        """log R(y) = log dP/dQ, increasing."""

    @abstractmethod
    def ratio_error(self, y: Array, loss: Array) -> Array:
        """A bound on the rounding error of `log_ratio`."""

    @abstractmethod
    def inverse(self, loss: Array) -> Array:
        """The y at which log R(y) = loss; ∓inf outside the range."""

    @abstractmethod
    def y_span(self, head: float, tail: float) -> tuple[float, float]:
        """The range of y in use: see `span`; head and tail are meant for this direction's P."""

    def log_base(self, y: Array) -> Array:
        """log of Q's density at y."""
        return -0.5 * (y * y + _LOG_2PI)

    @abstractmethod
    def slope(self, y: Array) -> Array: ...

    def span(self, head: float, tail: float) -> tuple[float, float]:
        ends = self.log_ratio(np.array(self.y_span(head, tail)))
        lo, hi = float(ends[0]), float(ends[1])
        return (-hi, -lo) if self.flipped else (lo, hi)

    def _cuts(self, a: float, b: float) -> Array:
        """Points from a to b no further apart than 0.75 / slope."""
        points = [a]
        y = a
        while y < b:
            # the slope grows at most by |dy|: take the larger end's
            step = 0.75 / float(self.slope(np.array([y]))[0])
            step = 0.75 / max(float(self.slope(np.array([y]))[0]), float(self.slope(np.array([y + step]))[0]))
            y += step
            points.append(min(y, b))
        return np.array(points)

    def atoms(self, edges: Array) -> Atoms:
        forward = -edges[::-1] if self.flipped else edges
        y_edges = self.inverse(forward)
        # near the ends of the support many y share one float: the outer edges take them all
        ends = self.inverse(
            np.array([forward[0] - 8.0 * U * abs(forward[0]), forward[-1] + 8.0 * U * abs(forward[-1])])
        )
        y_edges[0], y_edges[-1] = min(y_edges[0], float(ends[0])), max(y_edges[-1], float(ends[1]))
        low, high = self._clip(y_edges)
        y_edges = np.clip(y_edges, low, high)
        cuts = np.union1d(y_edges, self._cached_cuts(low, high))
        left, right = cuts[:-1], cuts[1:]
        cell = np.searchsorted(y_edges, left, side="right") - 1
        cell = np.clip(cell, 0, len(edges) - 2)
        width = right - left
        narrow = width * np.maximum(self.slope(left), self.slope(right)) <= 0.75 / 16.0
        ys, ws, cs = [], [], []
        for n, pick in ((4, narrow), (8, ~narrow)):
            nodes, weights = _GAUSS[n]
            half = 0.5 * width[pick]
            ys.append((left[pick] + half)[:, None] + half[:, None] * nodes)
            ws.append(half[:, None] * weights)
            cs.append(np.repeat(cell[pick], n))
        y = np.concatenate([part.ravel() for part in ys])
        weight = np.concatenate([part.ravel() for part in ws])
        where = np.concatenate(cs)
        ratio = self.log_ratio(y)
        exponent = self.log_base(y) + (0.0 if self.flipped else ratio)
        error = self.ratio_error(y, ratio)
        mass = weight * np.exp(exponent)
        mass_error = 8.0 * U * (2.0 + np.abs(exponent) + 0.5 * y * y) + (0.0 if self.flipped else error)
        if self.flipped:
            return Atoms(mass, -ratio, len(edges) - 2 - where, mass_error, error)
        return Atoms(mass, ratio, where, mass_error, error)

    def _clip(self, y_edges: Array) -> tuple[float, float]:
        """The finite range of y that the cells cover; beyond it the law has no mass worth a float."""
        low, high = self.y_span(-745.0, -745.0)
        return max(low, float(y_edges[0])), min(high, float(y_edges[-1]))

    def _cached_cuts(self, low: float, high: float) -> Array:
        key = (self, low, high)
        if key not in _CUTS:
            if len(_CUTS) > 256:
                _CUTS.clear()
            _CUTS[key] = self._cuts(low, high)
        return _CUTS[key]


_CUTS: dict[tuple[SmoothPair, float, float], Array] = {}


@dataclass(frozen=True)
class GaussianPair(SmoothPair):
    """Poisson-sampled Gaussian at distance 1: P = (1 − q) N(0, σ²) + q N(1, σ²), Q = N(0, σ²); y = x/σ.

    ``q`` = 1 is the plain Gaussian. The loss is log(1 + q (e^{y/σ − 1/(2σ²)} − 1)), bounded below by log(1 − q).
    """

    q: float = 1.0
    sigma: float = 1.0

    def log_ratio(self, y: Array) -> Array:
        lift = y / self.sigma - 0.5 / self.sigma**2
        if self.q == 1.0:
            return lift
        small = np.log1p(self.q * np.expm1(np.minimum(lift, 1.0)))
        large = np.logaddexp(math.log1p(-self.q), math.log(self.q) + lift)
        out: Array = np.where(lift < 1.0, small, large)
        return out

    def ratio_error(self, y: Array, loss: Array) -> Array:
        # the lift's own rounding, carried on by dL/dl = q e^l / R ≤ 1, and the few roundings after it
        lift_error = 4.0 * U * (np.abs(y) / self.sigma + 0.5 / self.sigma**2)
        if self.q == 1.0:
            return lift_error
        lift = y / self.sigma - 0.5 / self.sigma**2
        carried = np.exp(np.minimum(0.0, math.log(self.q) + lift - loss))
        out: Array = lift_error * carried + 8.0 * U * (np.abs(loss) + carried + np.where(lift < 1.0, 0.0, 2.0))
        return out

    def inverse(self, loss: Array) -> Array:
        if self.q == 1.0:
            return loss * self.sigma + 0.5 / self.sigma
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            near = np.log1p(np.maximum(np.expm1(np.minimum(loss, 30.0)) / self.q, -1.0))
            far = loss + np.log1p(-(1.0 - self.q) * np.exp(-np.maximum(loss, 0.5))) - math.log(self.q)
            return self.sigma * np.where(loss < 1.0, near, far) + 0.5 / self.sigma

    def conserves(self) -> bool:
        return math.isinf(self.supremum())

    def supremum(self) -> float:
        return -math.log1p(-self.q) * (1.0 + 8.0 * U) if self.flipped and self.q < 1.0 else math.inf

    def y_span(self, head: float, tail: float) -> tuple[float, float]:
        if self.flipped:  # P is N(0): the loss falls with y
            return -normal_reach(tail), normal_reach(head)
        return -normal_reach(head), 1.0 / self.sigma + normal_reach(tail)

    def slope(self, y: Array) -> Array:
        return 3.0 + np.abs(y) + 1.0 / self.sigma

    def _cuts(self, a: float, b: float) -> Array:
        # y' = 0.75 / (c + |y|) in closed form: y (c + |y|/2) is linear in the count; the factor pays for the change of
        # slope across a cell
        c = 3.0 + 1.0 / self.sigma

        def count(y: float) -> float:
            return y * (c + 0.5 * abs(y)) / 0.68

        n = max(2, math.ceil(count(b) - count(a)) + 1)
        level = np.linspace(count(a), count(b), n) * 0.68
        size = np.abs(level)
        y: Array = np.sign(level) * (2.0 * size / (c + np.sqrt(c * c + 2.0 * size)))
        y[0], y[-1] = a, b
        return y


@dataclass(frozen=True)
class DiscretePair(Pair):
    """A pair with finitely many losses: P-masses ``masses`` at ``losses``, and P(L = ∞) = ``infinite``.

    Q-masses are masses·e^-loss, and ``outside`` where P has none.
    """

    losses: tuple[float, ...]
    masses: tuple[float, ...]
    infinite: float = 0.0
    outside: float = 0.0

    def span(self, head: float, tail: float) -> tuple[float, float]:
        return (min(self.losses, default=0.0), max(self.losses, default=0.0))

    def atoms(self, edges: Array) -> Atoms:
        loss, mass = np.array(self.losses), np.array(self.masses)
        cell = np.clip(np.searchsorted(edges, loss, side="right") - 1, 0, len(edges) - 2)
        # masses are given to a few roundings, losses are logs of their ratios
        return Atoms(mass, loss, cell, np.full(len(mass), 8.0 * U), 8.0 * U * (1.0 + np.abs(loss)))

    def breaks(self) -> list[float]:
        return list(self.losses)

    def spacing(self) -> float:
        points = np.unique(np.array(self.losses))
        if len(points) < 2:
            return 1.0
        gaps = np.diff(points)
        gap = float(gaps.min())
        if gap < 1e-9 or float(np.abs(gaps / gap - np.rint(gaps / gap)).max()) > 1e-9:
            return 0.0
        return float(points[-1] - points[0]) / float(np.rint((points[-1] - points[0]) / gap))

    def supremum(self) -> float:
        return max(self.losses, default=0.0) * (1.0 + 8.0 * U)

    def flip(self) -> DiscretePair:
        """The other direction."""
        masses = tuple(m * math.exp(-x) for m, x in zip(self.masses, self.losses, strict=True))
        return DiscretePair(tuple(-x for x in self.losses), masses, self.outside, self.infinite)
