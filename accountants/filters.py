"""Budgets for schedules that depend on the answers so far: filters, which stop in time, and odometers, which report.

A PLD answer is for a schedule fixed in advance. When σ, q or the number of steps are chosen in view of earlier
releases, sum Rényi divergences (Feldman and Zrnic 2021) or squared Gaussian distances (Koskela, Tobaben, Honkela 2023)
instead: as long as the running sum stays within a budget fixed beforehand, the whole is as private as that budget says.
Nothing here needs a fixed schedule, ``needs_fixed_schedule`` is False; it is True for every accountant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, SupportsIndex

from . import gaussian
from .accountant import check_delta, check_epsilon
from .errors import AccountingError
from .events import Event, _count
from .mechanisms import judge
from .rdp import log_mgf


class BudgetSpentError(AccountingError):
    """The next release would exceed the budget; it must not be run."""


def best_order(event: Event, delta: float, adjacency: str = "add_or_remove_one") -> float:
    """The Rényi order at which ``event`` (an expected schedule) converts to the least epsilon: one for `RDPFilter`.

    >>> from dpkit.accountants import Gaussian
    >>> round(best_order(Gaussian(10.0), 1e-5), 1)
    40.8
    """
    log_delta = math.log(check_delta(delta))
    parts = event.flat()

    def bound(t: float) -> float:
        moment = sum(n * log_mgf(part, t, adjacency) for part, n in parts)
        return (moment - log_delta - math.log1p(t)) / t + math.log(t / (1.0 + t))

    grid = [10.0 ** (0.05 * i - 2.0) for i in range(121)]
    best: float = min(grid, key=bound)
    return 1.0 + best


class RDPFilter:
    """Admits adaptively chosen events as long as the total stays (ε, δ)-DP.

    Guarantee: everything admitted, however it was chosen, is (``epsilon``, ``delta``)-DP together. Each order 1 + t has
    a budget b, the sum of log moments at which it alone converts to (ε, δ/k), k the number of orders; events are
    admitted as long as one order's sum is within its budget. Proof: stopped where its budget would be exceeded,
    e^{tL − sum} is a supermartingale, so E[e^{tL}; the sum stayed within b] ≤ e^b. As (1 − e^{ε−L})+ ≤ c e^{t(L−ε)},
    the runs that end within that order's budget add at most δ/k to delta, and every run ends within one.

    Args:
        order: the Rényi order, > 1, or several of them; `best_order` finds one for an expected schedule. One order that
            fits is tightest, several are safer where the schedule is unknown.

    >>> from dpkit.accountants import Gaussian
    >>> f = RDPFilter(epsilon=1.0, delta=1e-5, order=30.0)
    >>> f.admits(Gaussian(1.0)), f.admits(Gaussian(10.0))
    (False, True)
    """

    needs_fixed_schedule: ClassVar[bool] = False

    def __init__(
        self,
        epsilon: float,
        delta: float,
        *,
        order: float | Sequence[float] = 20.0,
        adjacency: str = "add_or_remove_one",
    ) -> None:
        check_delta(delta)
        check_epsilon(epsilon)
        orders = [float(order)] if isinstance(order, int | float) else [float(x) for x in order]
        if not orders or not all(x > 1.0 for x in orders):
            raise AccountingError(f"order is {order!r}.", why="a Rényi order is above 1.", cure="pass e.g. 20.")
        self.adjacency = adjacency
        share = math.log(delta) - math.log(len(orders))
        self._levels: list[tuple[float, float, float]] = []  # t, budget, spent
        for t in (x - 1.0 for x in orders):
            # the conversion of RDPAccountant, solved for the log moment
            budget = t * (epsilon - math.log(t / (1.0 + t))) + share + math.log1p(t)
            if budget > 0.0:
                self._levels.append((t, budget, 0.0))
        if not self._levels:
            raise AccountingError(
                f"({epsilon:g}, {delta:g}) leaves nothing at order {order}.",
                why="the conversion alone spends the budget.",
                cure="raise the order, or epsilon, or delta.",
            )

    def _after(self, event: Event, count: SupportsIndex) -> list[tuple[float, float, float]]:
        """The orders that would still be within their budget, with what they would have spent."""
        runs = _count("count", count)
        kept = []
        for t, budget, spent in self._levels:
            cost = sum(runs * n * log_mgf(part, t, self.adjacency) for part, n in event.flat() if runs)
            total = spent + cost * (1.0 + 1e-11)
            if total <= budget:
                kept.append((t, budget, total))
        return kept

    def admits(self, event: Event, count: SupportsIndex = 1) -> bool:
        """Whether these runs fit into what is left. Asking spends nothing."""
        return bool(self._after(event, count))

    def spend(self, event: Event, count: SupportsIndex = 1) -> None:
        """Take these runs out of the budget; call it before running them.

        Raises:
            BudgetSpentError: they do not fit; nothing was spent.
        """
        kept = self._after(event, count)
        if not kept:
            raise BudgetSpentError(
                f"{event!r} × {_count('count', count)} exceeds what is left, {self.left:.4g} of the budget.",
                why="running it would break the stated (epsilon, delta).",
                cure="stop, add noise, or lower the sample rate.",
            )
        self._levels = kept

    @property
    def left(self) -> float:
        """The share of the budget that is left at the order that has most, in [0, 1]."""
        return max(0.0, *(1.0 - spent / budget for _, budget, spent in self._levels))


class GDPFilter:
    """Admits adaptively chosen full-batch Gaussian events as long as the total stays μ-GDP: Σ 1/σ² ≤ μ².

    Guarantee: everything admitted is μ-GDP together; tight, no price for adaptivity.
    """

    needs_fixed_schedule: ClassVar[bool] = False

    def __init__(self, mu: float, *, adjacency: str = "add_or_remove_one") -> None:
        if not mu > 0.0:
            raise AccountingError(f"mu is {mu!r}.", why="it must be positive.", cure="pass e.g. 1.0.")
        self.mu, self.adjacency, self._spent = float(mu), adjacency, 0.0

    def _cost(self, event: Event, count: SupportsIndex) -> float:
        total = 0.0
        for part, n in event.flat():
            term = judge(part, self.adjacency)
            if term.terms:
                raise AccountingError(
                    f"{part!r} is no Gaussian.",
                    why="only Gaussians add up as squared distances.",
                    cure="use RDPFilter.",
                )
            total += n * term.mu_squared
        return total * _count("count", count)

    def admits(self, event: Event, count: SupportsIndex = 1) -> bool:
        """Whether these runs fit into what is left."""
        return self._spent + self._cost(event, count) <= self.mu**2 * (1.0 + 1e-12)

    def spend(self, event: Event, count: SupportsIndex = 1) -> None:
        """Take these runs out of the budget.

        Raises:
            BudgetSpentError: they do not fit; nothing was spent.
        """
        if not self.admits(event, count):
            raise BudgetSpentError(
                f"{event!r} exceeds mu = {self.mu:g}.", why="the whole would not be mu-GDP.", cure="stop or add noise."
            )
        self._spent += self._cost(event, count)

    def epsilon(self, delta: float) -> float:
        """Epsilon of the whole budget at ``delta``."""
        return gaussian.epsilon(math.log(check_delta(delta)), self.mu)


class RDPOdometer:
    """Reports, at any time of a fully adaptive schedule, an epsilon that holds at all stopping times at once.

    Guarantee: with probability at least 1 − delta the privacy loss never exceeds the epsilon reported. Level j holds
    the budget ε_j = first·2^j at one order 1 + t: e^{tL − Σ costs} is a supermartingale, so by Ville's inequality L
    exceeds ε_j while Σ costs ≤ t·ε_j − log(1/δ_j) with probability at most δ_j; the δ_j add up to less than delta. What
    is reported is the lowest level whose budget still holds.
    """

    needs_fixed_schedule: ClassVar[bool] = False

    def __init__(
        self, delta: float, *, first: float = 0.25, levels: int = 14, adjacency: str = "add_or_remove_one"
    ) -> None:
        check_delta(delta)
        self.delta, self.adjacency = float(delta), adjacency
        self._levels: list[tuple[float, float, float, float]] = []  # epsilon, t, budget, spent
        for j in range(levels):
            epsilon = first * 2.0**j
            log_share = math.log(2.0 * (j + 1) ** 2 / delta)
            t = 2.0 * log_share / epsilon  # half of t·epsilon pays for δ_j
            self._levels.append((epsilon, t, t * epsilon - log_share, 0.0))

    def spend(self, event: Event, count: SupportsIndex = 1) -> None:
        """Note these runs."""
        runs = _count("count", count)
        kept = []
        for epsilon, t, budget, spent in self._levels:
            cost = sum(runs * n * log_mgf(part, t, self.adjacency) for part, n in event.flat()) * (1.0 + 1e-11)
            if spent + cost <= budget:
                kept.append((epsilon, t, budget, spent + cost))
        self._levels = kept

    @property
    def epsilon(self) -> float:
        """Epsilon spent so far, at the odometer's delta; infinite beyond the last level."""
        return self._levels[0][0] if self._levels else math.inf
