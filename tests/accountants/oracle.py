"""An independent judge: delta by a contour integral, without any grid of losses.

delta(ε) = (1/π) ∫_0^∞ Re[e^{K(z) − zε} / (z (z + 1))] ds on z = θ + is, K(z) = Σ T log E_P e^{zL}, for any θ > 0.
Both the
inner expectation and the outer integral are trapezoid sums of analytic functions; each is done twice, with half the
spacing, and the two must agree.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar


class NoAnswerError(Exception):
    """The integral does not converge fast enough here (an expected number of hits far below one)."""


def _log_mgf(z: np.ndarray, q: float, sigma: float, spacing: float) -> np.ndarray:
    theta = float(z[0].real)
    far = (1.0 + theta) / sigma
    x = np.arange(-13.0, far + 13.0, spacing)
    lift = x / sigma - 0.5 / sigma**2
    if q == 1.0:
        log_r = lift
    else:
        large = np.logaddexp(math.log1p(-q), math.log(q) + lift)
        log_r = np.where(lift > 1.0, large, np.log1p(q * np.expm1(np.minimum(lift, 1.0))))
    height = (1.0 + theta) * log_r - 0.5 * x * x
    top = float(height.max())
    weight = np.exp(height - top)
    base = float(weight.sum())
    weight /= base
    mean = float(np.dot(weight, log_r))
    out = np.empty(len(z), dtype=complex)
    for part in range(0, len(z), 256):
        s = z[part : part + 256].imag
        phase = np.exp(1j * np.outer(s, log_r - mean))
        out[part : part + 256] = np.log(phase @ weight) + 1j * s * mean
    return out + top + math.log(base * spacing / math.sqrt(2.0 * math.pi))


def contour_delta(steps: list[tuple[float, float, int]], epsilon: float, *, log_delta: float) -> float:
    """delta of removing a record from ``steps`` = [(sigma, q, count)] at ``epsilon``; log_delta is a rough guess."""
    spacing = min(0.2, min(2.0 * math.pi * min(math.pi * s, 4.0) / 50.0 for s, _, _ in steps))

    def k(z: np.ndarray, width: float) -> np.ndarray:
        return sum(n * _log_mgf(z, q, s, width) for s, q, n in steps)  # type: ignore[return-value]

    def chernoff(log_t: float) -> float:
        t = np.array([math.exp(log_t) + 0j])
        return float((k(t, spacing)[0].real - log_delta) / t[0].real)

    theta = 0.9 * math.exp(float(minimize_scalar(chernoff, bounds=(-6.0, 12.0), method="bounded").x))
    here = np.array([theta + 0j])
    d = 1e-4 * theta
    near = [float(k(here + shift, spacing)[0].real) for shift in (-d, 0.0, d)]
    curvature = max((near[0] - 2.0 * near[1] + near[2]) / d**2, 1e-12)
    scale = near[1] - theta * epsilon

    def integral(points_per_deviation: float, width: float) -> float:
        ds = 1.0 / (points_per_deviation * math.sqrt(curvature))
        total, start = 0.0, 0
        while True:
            s = ds * np.arange(start, start + 256)
            z = theta + 1j * s
            value = np.exp(k(z, width) - z * epsilon - scale) / (z * (z + 1.0))
            if start == 0:
                value[0] *= 0.5
            total += float(value.real.sum())
            start += 256
            if float(np.abs(value[-8:]).max()) < 1e-15 * max(abs(total), 1e-300):
                return total * ds / math.pi
            if start > 6_000:
                raise NoAnswerError

    first = integral(4.0, spacing)
    second = integral(6.5, 0.71 * spacing)
    if abs(first - second) > 1e-7 * abs(second):
        raise NoAnswerError
    return second * math.exp(scale)
