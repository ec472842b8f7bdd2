"""The Gaussian mechanism in closed form: no grid, no composition error."""

from __future__ import annotations

import math

from .numeric import log_ndtr, root

# 64 roundings: log_ndtr and the few operations around it
_ROUNDING = 64.0 * 2.0**-53


def log_delta(epsilon: float, mu: float) -> float:
    """log of Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), the exact delta of N(μ, 1) against N(0, 1) (Balle and Wang 2018).

    >>> round(math.exp(log_delta(1.0, 1.0)), 12)
    0.126936737507
    """
    if mu == 0.0:
        return -math.inf
    if math.isinf(mu):
        return 0.0
    if math.isinf(epsilon):
        return -math.inf
    a = log_ndtr(0.5 * mu - epsilon / mu)
    b = log_ndtr(-0.5 * mu - epsilon / mu)
    gap = epsilon + b - a
    return a + math.log(-math.expm1(gap)) if gap < 0.0 else -math.inf


def epsilon(log_d: float, mu: float, *, upper: bool = True) -> float:
    """Epsilon at log delta ``log_d``, rounded up (or down) by more than the rounding of its parts."""
    if mu == 0.0 or log_delta(0.0, mu) <= log_d:
        return 0.0
    if math.isinf(mu):
        return math.inf
    high = mu * (0.5 * mu + math.sqrt(-2.0 * log_d) + 1.0)
    while log_delta(high, mu) > log_d:
        high *= 2.0
    at = root(lambda x: log_delta(x, mu) - log_d, 0.0, high, xtol=1e-15 * high, rtol=1e-14)
    la, lb = log_ndtr(0.5 * mu - at / mu), log_ndtr(-0.5 * mu - at / mu)
    # an absolute error eta of log delta moves epsilon by eta / slope
    eta = _ROUNDING * (1.0 + at + abs(la) + abs(lb)) / min(1.0, max(la - lb - at, 1e-300))
    slope = math.exp(at + lb - log_delta(at, mu))
    margin = eta / slope + _ROUNDING * at
    return at + margin if upper else max(0.0, at - margin)
