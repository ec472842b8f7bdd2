"""f-DP: what an attacker who tests for one record can achieve, with bounds on both sides.

By duality (Dong, Roth, Su 2022) the largest true-positive rate at false-positive rate α is the least of
e^x α + delta(x) over all real x. Here delta is the larger direction's, and delta(−x) = 1 − e^−x + e^−x delta(x) takes
that for both roles of the data sets, so the curve is that of the tightest f: the largest convex one below both
directions, symmetric. Any x with an upper bound on delta gives an upper bound on the rate, of delta's relative
accuracy, at any α.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

from . import gaussian
from .accountant import Accountant
from .errors import AccountingError
from .events import Event
from .numeric import root
from .pld import PLDAccountant

_NORMAL = NormalDist()
Curve = Callable[[float], float]


class TradeOff:
    """The trade-off curve of everything in an accountant's ledger.

    >>> from dpkit.accountants import Gaussian
    >>> round(tradeoff(Gaussian(1.0)).tpr(1e-9) / 2.8992986e-7, 6)
    1.0
    """

    def __init__(self, accountant: Accountant) -> None:
        if accountant.is_estimate:
            raise AccountingError(
                f"a trade-off curve of {accountant!r}.", why="an estimate bounds nothing.", cure="use PLDAccountant."
            )
        self._accountant = accountant
        self.delta = lru_cache(maxsize=8192)(accountant.delta)
        self._lower: Curve = lru_cache(maxsize=8192)(self._lower_delta)
        self._mu: float | None = None
        self._spacing = 0.0

    def _lower_delta(self, epsilon: float) -> float:
        if isinstance(self._accountant, PLDAccountant):
            return self._accountant.delta_bounds(epsilon)[0]
        return 0.0

    def _check(self, fpr: float) -> None:
        if not 0.0 <= fpr <= 1.0:
            raise AccountingError(f"fpr is {fpr!r}.", why="it is a probability.", cure="pass a number in [0, 1].")

    def _best(self, fpr: float) -> tuple[float, float, float]:
        """(x, e^x fpr + delta(x), one minus that) at about its minimum; any x is sound. The rate and its complement
        each keep their relative accuracy."""

        def ahead(x: float) -> float:
            return math.exp(x) * fpr + self.delta(x)

        def left(y: float) -> float:  # 1 minus the same at −y
            return math.exp(-y) * (1.0 - fpr - self.delta(y))

        if 1.0 - left(self._node(1)) < ahead(0.0) - 1e-12:
            y, value = self._lowest(lambda y: -left(y))
            return -y, 1.0 + value, -value
        x, value = self._lowest(ahead)
        return x, value, 1.0 - value

    def _node(self, i: int) -> float:
        """Points shared by all questions, so that delta is asked once at each."""
        if self._spacing == 0.0:
            usual = self._accountant.epsilon(1e-5)
            self._spacing = max(1e-6, (usual if math.isfinite(usual) else 1.0) / 16.0)
        return self._spacing * (i if i <= 32 else 32.0 * 1.1 ** (i - 32))

    def _lowest(self, f: Curve) -> tuple[float, float]:
        """(x, f(x)) about the minimum over x ≥ 0 of a function with one valley: a walk, then parabolas."""
        i, here, before = 0, f(0.0), math.inf
        while i < 120 and (there := f(self._node(i + 1))) <= here:
            before, here, i = here, there, i + 1
        best = here, self._node(i)
        if i == 0 or not math.isfinite(before):
            a, b, c = 0.0, 0.5 * self._node(1), self._node(1)
        else:
            a, b, c = self._node(i - 1), self._node(i), self._node(i + 1)
        fa, fb, fc = f(a), f(b), f(c)
        for _ in range(24):
            best = min(best, (fa, a), (fb, b), (fc, c))
            bend = (b - a) * (fb - fc) - (b - c) * (fb - fa)
            x = b - 0.5 * ((b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)) / bend if bend else b
            if c - a < 1e-6 * (1.0 + b):
                break
            if not a < x < c or abs(x - b) < 1e-3 * (c - a):
                x = 0.5 * (a + b) if b - a > c - b else 0.5 * (b + c)
            fx = f(x)
            best = min(best, (fx, x))
            if max(fa, fc) - best[0] < 1e-5 * abs(best[0]):
                break
            guess = _parabola(x, (a, fa), (b, fb), (c, fc))
            if abs(fx - guess) < 1e-6 * abs(fx):
                break  # as smooth as it looks: nothing is left to gain
            left, right = min((fx, x), (fb, b)), max((fx, x), (fb, b))
            if right[1] > left[1]:
                c, fc, b, fb = right[1], right[0], left[1], left[0]
            else:
                a, fa, b, fb = right[1], right[0], left[1], left[0]
        return best[1], best[0]

    def tpr(self, fpr: float) -> float:
        """Upper bound on the true-positive rate of any membership test with this false-positive rate."""
        self._check(fpr)
        if fpr in (0.0, 1.0):
            return 1.0 if fpr else self.delta(1e6)
        return min(1.0, self._best(fpr)[1])

    def fnr(self, fpr: float) -> float:
        """Lower bound on the false-negative rate at this false-positive rate, the function f of f-DP."""
        self._check(fpr)
        if fpr in (0.0, 1.0):
            return 0.0 if fpr else 1.0 - self.delta(1e6)
        return max(0.0, self._best(fpr)[2])

    def tpr_bounds(self, fpr: float) -> tuple[float, float]:
        """(lower, upper) for the true curve at this false-positive rate, within about 1e-3 of each other.

        The lower bound is a rate that some test reaches, or, where the two directions cross, a mixture of one for each.
        """
        self._check(fpr)
        upper = self.tpr(fpr)
        if fpr in (0.0, 1.0):
            return fpr, upper
        x = self._best(fpr)[0]

        def both(point: float) -> tuple[float, float]:
            values = (d(abs(point)) for d in (self._lower, self.delta))
            low, high = (v if point >= 0.0 else -math.expm1(point) + math.exp(point) * v for v in values)
            return math.exp(point) * fpr + low, math.exp(point) * fpr + high

        best = fpr
        for wide in (0.01, 0.03, 0.1, 0.3, 1.0, 3e-3, 1e-3, 1e-4):  # each is sound
            points = [x + wide * i for i in (-2, -1, 0, 1, 2)]
            lower = _least_of_convex([math.exp(p) for p in points], [both(p) for p in points])
            best = max(best, lower or 0.0)
            if best >= upper * (1.0 - 1e-3):
                break
        return min(upper, best), upper

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

    @property
    def gdp_mu(self) -> float:
        """The least μ such that μ-GDP covers this curve wherever delta ≥ 1e-10, see `mu_gdp`."""
        if self._mu is None:
            self._mu = self.mu_gdp()
        return self._mu

    def mu_gdp(self, floor: float = 1e-10) -> float:
        """The least μ, to about 1e-3, such that μ-GDP covers this curve wherever delta ≥ ``floor``.

        Guarantee: delta is convex in e^ε, so between two points it lies below their chord, and μ is taken large enough
        for the whole chord.
        """
        end = self._accountant.epsilon(floor)
        if math.isinf(end):
            return math.inf
        grid = [max(end, 1e-6) * i / 48 for i in range(49)]
        best = max(_gaussian_mu(x, self.delta(x)) for x in grid)
        bound = best
        todo = list(itertools.pairwise(grid))
        for spent in range(400):
            if not todo:
                break
            a, b = todo.pop()
            mu = self._chord_mu(a, b, best)
            if mu <= best * (1.0 + 1e-3) or spent > 390 - len(todo):
                bound = max(bound, mu)
                continue
            middle = 0.5 * (a + b)
            best = max(best, _gaussian_mu(middle, self.delta(middle)))
            todo += [(a, middle), (middle, b)]
        for a, b in todo:
            bound = max(bound, self._chord_mu(a, b, best))
        return max(bound, best)

    def _chord_mu(self, left: float, right: float, known: float) -> float:
        """The least μ ≥ ``known`` whose Gaussian delta lies above the chord of delta from ``left`` to ``right``."""
        a, b = math.exp(left), math.exp(right)
        da, db = self.delta(left), self.delta(right)
        fall = (da - db) / (b - a)
        if not 0.0 < fall < 1.0 or known <= 0.0:
            return max(known, _gaussian_mu(right, da))
        point = _NORMAL.inv_cdf(fall)

        def over(mu: float) -> float:
            """Gaussian delta minus the chord where they are nearest, relative."""
            x = min(max(-mu * (point + 0.5 * mu), left), right)
            chord = da - fall * (math.exp(x) - a)
            return math.exp(gaussian.log_delta(x, mu)) - chord if chord > 0.0 else 1.0

        high = known
        while over(high) < 0.0:
            high *= 1.0 + 1e-3
        if high == known:
            return known
        return root(over, high / (1.0 + 1e-3), high, xtol=1e-7 * high) * (1.0 + 1e-6)

    def gdp_regret(self, mu: float | None = None, rates: int = 40) -> float:
        """The largest amount by which μ-GDP's TPR exceeds this curve's, over a grid of false-positive rates."""
        mu = self.gdp_mu if mu is None else mu
        if math.isinf(mu):
            return 1.0 - min(self.tpr(i / rates) for i in range(1, rates))
        points = (i / rates for i in range(1, rates))
        return max(0.0, *(_NORMAL.cdf(_NORMAL.inv_cdf(fpr) + mu) - self.tpr(fpr) for fpr in points))


def _parabola(x: float, *points: tuple[float, float]) -> float:
    (a, fa), (b, fb), (c, fc) = points
    return (
        fa * (x - b) * (x - c) / ((a - b) * (a - c))
        + fb * (x - a) * (x - c) / ((b - a) * (b - c))
        + fc * (x - a) * (x - b) / ((c - a) * (c - b))
    )


def _least_of_convex(a: list[float], bounds: list[tuple[float, float]]) -> float | None:
    """A lower bound on the minimum of a convex function, from bounds on it at five points; None if they do not show
    that it lies among them. Beyond a chord the function is above the chord's line."""
    (_, up0), (low1, up1), (low2, up2), (low3, up3), (_, up4) = bounds
    if low1 < up2 or low3 < up2:
        return None
    lines = [
        # (interval, value and slope at the left end of each line)
        (a[1], a[2], (low1, (low1 - up0) / (a[1] - a[0])), (low2, (up3 - low2) / (a[3] - a[2]))),
        (a[2], a[3], (low2, (low2 - up1) / (a[2] - a[1])), (low3, (up4 - low3) / (a[4] - a[3]))),
    ]
    least = math.inf
    for left, right, (v, s), (w, t) in lines:
        # v + s (x − left) and w − t (right − x)
        def higher(x: float, left=left, right=right, v=v, s=s, w=w, t=t) -> float:  # type: ignore[no-untyped-def]
            return float(max(v + s * (x - left), w - t * (right - x)))

        corners = [left, right]
        if s != t:
            corners.append(min(max((w - t * right - v + s * left) / (s - t), left), right))
        least = min(least, *(higher(x) for x in corners))
    return least * (1.0 - 1e-12) if least > 0.0 else None


def _gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ with Gaussian delta(epsilon) = delta, rounded up."""
    if delta <= 0.0:
        return 0.0
    if delta >= 1.0:
        return math.inf
    target = math.log(delta)
    high = 1.0
    while gaussian.log_delta(epsilon, high) < target:
        high *= 2.0
    low = high
    while low > 1e-12 and gaussian.log_delta(epsilon, low) > target:
        low *= 0.5
    return root(lambda m: max(gaussian.log_delta(epsilon, m), -1e5) - target, low, high, xtol=1e-12 * high) * (
        1.0 + 1e-9
    )


def tradeoff(event: Event, adjacency: str = "add_or_remove_one") -> TradeOff:
    """The trade-off curve of one event (which may be a whole training run)."""
    return TradeOff(PLDAccountant(adjacency).compose(event))
