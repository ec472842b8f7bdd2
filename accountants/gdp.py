"""The central-limit Gaussian approximation: quick, and only ever an estimate."""

from __future__ import annotations

import math
from typing import ClassVar

from . import gaussian
from .accountant import Accountant
from .errors import UnsupportedEventError
from .events import Event, Gaussian, PoissonSampled
from .mechanisms import reach


class GDPAccountant(Accountant):
    """An ESTIMATE of epsilon by the central limit theorem for Gaussian DP (Bu, Dong, Long, Su 2020).

    Not a bound: for ordinary settings it lies below the truth, by up to a factor of twenty. `is_estimate` is True, its
    kind and its repr say so, and neither the engine nor `calibrate` nor `tradeoff` takes it. Runs of plain Gaussians
    alone are exact.

    >>> GDPAccountant.is_estimate, GDPAccountant()
    (True, GDPAccountant(ESTIMATE, adjacency='add_or_remove_one', releases=0))
    """

    kind: ClassVar[str] = "gdp_estimate"
    is_estimate: ClassVar[bool] = True

    def _mu_squared(self, event: Event) -> float:
        if isinstance(event, Gaussian):
            return (reach(self.adjacency) / event.noise_multiplier) ** 2 if event.noise_multiplier > 0.0 else math.inf
        if isinstance(event, PoissonSampled) and isinstance(event.event, Gaussian):
            q, sigma = event.sample_rate, event.event.noise_multiplier
            if q == 0.0:
                return 0.0
            if q == 1.0:
                return self._mu_squared(event.event)
            if self.adjacency != "replace_one":
                return q * q * math.expm1(min(1.0 / sigma**2, 700.0)) if sigma > 0.0 else math.inf
        raise UnsupportedEventError(
            f"{event!r} under {self.adjacency} adjacency.",
            why="the central limit is worked out here for Poisson-sampled Gaussians only.",
            cure="use PLDAccountant.",
        )

    def _check(self, event: Event) -> None:
        self._mu_squared(event)

    @property
    def mu(self) -> float:
        """The estimated μ."""
        return math.sqrt(sum(n * self._mu_squared(event) for event, n in self._ledger))

    def _epsilon(self, delta: float) -> float:
        return gaussian.epsilon(math.log(delta), self.mu)

    def _delta(self, epsilon: float) -> float:
        return math.exp(gaussian.log_delta(epsilon, self.mu))

    def __repr__(self) -> str:
        return super().__repr__().replace("(", "(ESTIMATE, ", 1)
