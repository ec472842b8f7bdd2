"""f-DP: what an attacker who tests for one record can achieve, with bounds on both sides.

By duality the largest true-positive rate at false-positive rate α is min over ε of e^ε α + delta(ε), where delta is the
larger direction's. Any ε with an upper bound on delta therefore gives a rigorous upper bound on the rate, and it
keeps the
relative accuracy of delta, at any α; with the lower law's delta the same minimum is a rate that some test does reach.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

from . import gaussian
from .accountant import Accountant
from .errors import AccountingError
from .events import Event
from .pld import PLDAccountant


class TradeOff:
    """The trade-off curve of everything in an accountant's ledger.

    >>> from dpkit.accountants import Gaussian
    >>> round(tradeoff(Gaussian(1.0)).tpr(1e-9) / 2.8992986e-7, 6)
    1.0
    """

    def __init__(self, accountant: Accountant) -> None:
        self._accountant = accountant
        self.delta = lru_cache(maxsize=4096)(accountant.delta)

    def _check(self, fpr: float) -> None:
        if not 0.0 <= fpr <= 1.0:
            raise AccountingError(f"fpr is {fpr!r}.", why="it is a probability.", cure="pass a number in [0, 1].")

    def _least(self, delta: Callable[[float], float], fpr: float) -> float:
        """min over ε ≥ 0 of e^ε fpr + delta(ε), and of the mirrored 1 − e^−ε (1 − fpr − delta(ε)) for ε < 0.

        The adjacency is symmetric, so delta(−ε) = 1 − e^−ε + e^−ε delta(ε).
        """
        from scipy.optimize import minimize_scalar  # here, not above: it doubles the import time

        best = fpr + delta(0.0)

        def ahead(x: float) -> float:
            return math.exp(x) * fpr + delta(x)

        def mirrored(x: float) -> float:
            return 1.0 - math.exp(-x) * (1.0 - fpr - delta(x))

        if fpr > 0.0:
            reach = max(1e-6, min(-math.log(fpr), self._accountant.epsilon(max(1e-3 * fpr, 1e-100))))
            # convex in e^ε: a coarse look, then the valley
            grid = [reach * i / 14 for i in range(15)]
            values = [ahead(x) for x in grid]
            i = min(range(15), key=values.__getitem__)
            found = minimize_scalar(
                ahead,
                bounds=(grid[max(i - 1, 0)], grid[min(i + 1, 14)]),
                method="bounded",
                options={"xatol": 1e-5 * reach},
            )
            best = min(best, values[i], float(found.fun))
        if fpr > 0.2:
            far = min(30.0, self._accountant.epsilon(1e-9))
            found = minimize_scalar(mirrored, bounds=(0.0, max(far, 1e-6)), method="bounded", options={"xatol": 1e-4})
            best = min(best, float(found.fun))
        return min(1.0, best)

    def tpr(self, fpr: float) -> float:
        """Upper bound on the true-positive rate of any membership test with this false-positive rate."""
        self._check(fpr)
        if fpr == 0.0:
            return self.delta(1e6)
        return self._least(self.delta, fpr)

    def tpr_bounds(self, fpr: float) -> tuple[float, float]:
        """(a rate some test reaches, a rate no test exceeds)."""
        upper = self.tpr(fpr)
        if not isinstance(self._accountant, PLDAccountant) or fpr == 0.0:
            return fpr, upper
        accountant = self._accountant
        lower = self._least(lru_cache(maxsize=4096)(lambda x: accountant.delta_bounds(x)[0]), fpr)
        # the search may stop a little above the minimum
        return min(upper, max(fpr, lower * (1.0 - 1e-4))), upper

    @property
    def advantage(self) -> float:
        """Upper bound on TPR − FPR of any membership test: the total variation distance, delta(0)."""
        return self.delta(0.0)

    def bayes_success(self, prior: float = 0.5) -> float:
        """Upper bound on the probability that an attacker who holds this prior for membership decides rightly.

        prior·TPR + (1 − prior)(1 − FPR) at best, that is (1 − prior) + prior·delta(log((1 − prior)/prior)).
        """
        if not 0.0 < prior < 1.0:
            raise AccountingError(f"prior is {prior!r}.", why="it is a probability.", cure="pass a number in (0, 1).")
        p = min(prior, 1.0 - prior)
        return min(1.0, (1.0 - p) + p * self.delta(math.log((1.0 - p) / p)))

    def gdp_mu(self, floor: float = 1e-10, points: int = 60) -> float:
        """The least μ such that μ-GDP covers this curve wherever delta ≥ ``floor``.

        Guarantee: between the points delta is taken at the left end and the Gaussian at the right one.
        """
        event_end = self._accountant.epsilon(floor)
        if math.isinf(event_end):
            return math.inf
        if event_end == 0.0:
            event_end = 1e-6
        grid = [event_end * i / points for i in range(points + 1)]
        best = 0.0
        for left, right in itertools.pairwise(grid):
            value = self.delta(left)
            if value <= 0.0:
                break
            best = max(best, _gaussian_mu(right, value))
        return best

    def gdp_regret(self, mu: float, rates: int = 40) -> float:
        """The largest amount by which μ-GDP's TPR exceeds this curve's, over a grid of false-positive rates."""
        from scipy.special import ndtr, ndtri  # here, not above: it triples the import time

        worst = 0.0
        for i in range(1, rates):
            fpr = i / rates
            worst = max(worst, float(ndtr(ndtri(fpr) + mu)) - self.tpr(fpr))
        return worst


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ with Gaussian delta(epsilon) = delta."""
    from scipy.optimize import brentq

    if delta >= 1.0:
        return math.inf
    target = math.log(delta)
    high = 1.0
    while gaussian.log_delta(epsilon, high) < target:
        high *= 2.0
    low = high
    while low > 1e-12 and gaussian.log_delta(epsilon, low) > target:
        low *= 0.5
    return float(brentq(lambda m: gaussian.log_delta(epsilon, m) - target, low, high, rtol=1e-12)) * (1.0 + 1e-9)


def tradeoff(event: Event, adjacency: str = "add_or_remove_one") -> TradeOff:
    """The trade-off curve of one event (which may be a whole training run)."""
    return TradeOff(PLDAccountant(adjacency).compose(event))
