"""The few numerical routines that every first answer needs, without scipy, whose import costs more than the answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_ROOT2 = math.sqrt(2.0)
_LOG_ROOT_2PI = 0.5 * math.log(2.0 * math.pi)


def dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Σ a b by pairwise summation; BLAS would start threads for it, which costs more than the sum."""
    return float((a * b).sum())


def log_ndtr(x: float) -> float:
    """log Φ(x), to a few roundings of 1 + |log Φ(x)| + x².

    >>> log_ndtr(0.0) == math.log(0.5), round(log_ndtr(-40.0), 9)
    (True, -804.608442014)
    """
    if x > 0.0:
        return math.log1p(-0.5 * math.erfc(x / _ROOT2))
    if x > -36.0:
        return math.log(0.5 * math.erfc(-x / _ROOT2))
    # the asymptotic series alternates: the error is below its next term, 2e6 x^-16 < 1e-18
    v = 1.0 / (x * x)
    series = v * (-1.0 + v * (3.0 + v * (-15.0 + v * (105.0 + v * (-945.0 + v * (10395.0 - v * 135135.0))))))
    return -0.5 * x * x - _LOG_ROOT_2PI - math.log(-x) + math.log1p(series)


def normal_reach(log_tail: float) -> float:
    """z ≥ 0 with Φ(−z) ≤ e^log_tail, at most 1e-9 too large.

    >>> round(normal_reach(math.log(0.025)), 6)
    1.959964
    """
    target = min(log_tail, -0.7)
    z = math.sqrt(-2.0 * target)  # Φ(−z) ≤ e^{−z²/2}: from here Newton's steps on the concave log Φ(−z) stay above
    for _ in range(60):
        value = log_ndtr(-z)
        slope = -math.exp(-0.5 * z * z - _LOG_ROOT_2PI - value)
        step = (value - target) / slope
        z = max(0.0, z - step)
        if abs(step) <= 1e-12 * (1.0 + z):
            break
    return z * (1.0 + 1e-11) + 1e-11


def smooth_length(n: int) -> int:
    """The least whole number of at least ``n`` without prime factors above 5.

    >>> smooth_length(10_001)
    10125
    """
    best = 1 << max(0, (n - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(0, (-(-n // three) - 1).bit_length())
            best = min(best, two)
            three *= 3
        five *= 5
    return best


def root(f: Callable[[float], float], low: float, high: float, *, xtol: float, rtol: float = 0.0) -> float:
    """A zero of ``f`` between ``low`` and ``high``, where it changes sign (Chandrupatla 1997)."""
    a, b = high, low
    fa, fb = f(a), f(b)
    c, fc = a, fa
    t = 0.5
    for _ in range(200):
        x = a + t * (b - a)
        fx = f(x)
        if (fx > 0.0) == (fa > 0.0):
            c, fc = a, fa
        else:
            c, b, fc, fb = b, a, fb, fa
        a, fa = x, fx
        best, value = (a, fa) if abs(fa) < abs(fb) else (b, fb)
        tolerance = (xtol + rtol * abs(best)) / max(abs(b - a), 1e-300)
        if value == 0.0 or tolerance >= 1.0:
            return best
        t = 0.5
        if fa != fb and fb != fc and fa != fc:
            ratio, share = (a - b) / (c - b), (fa - fb) / (fc - fb)
            if share * share < ratio and (1.0 - share) ** 2 < 1.0 - ratio:
                t = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        t = min(max(t, 0.5 * tolerance), 1.0 - 0.5 * tolerance)
    return best
