"""The moment generating function of the privacy loss, at any real order, by quadrature."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def loss_of_normal(y: Array, q: float, sigma: float) -> Array:
    """log(1 + q·(e^l − 1)) with l = y/σ − 1/(2σ²): the loss of a Poisson step at the noise value y·σ.

    Exact to a few ulp for every q in (0, 1] and every l: the small-q form where e^l is moderate, log-add-exp beyond.
    """
    lift = y / sigma - 0.5 / sigma**2
    if q == 1.0:
        return lift
    with np.errstate(over="ignore"):
        small = np.log1p(q * np.expm1(np.minimum(lift, 1.0)))
    large = np.logaddexp(math.log1p(-q), math.log(q) + lift)
    return np.where(lift < 1.0, small, large)


def _nodes(alpha: float, q: float, sigma: float) -> tuple[Array, float]:
    """Trapezoid nodes y and their spacing for the integral of φ(y)·R(y)^α over the real line.

    The integrand is analytic up to |Im y| = πσ, and on that strip |R(y + id)| ≤ R(y), so that the rule's error relative
    to the integral is at most 2·exp(d²/2 − 2πd/spacing) for every d ≤ πσ; the spacing makes that e^-40. The mass lies
    at the origin, at α/σ, and where R turns from flat to exponential; elsewhere the integrand is below e^-70 of it.
    """
    strip = min(math.pi * sigma, 4.0)
    spacing = min(0.5, 2.0 * math.pi * strip / (40.0 + 0.5 * strip**2))
    far = max(alpha, 0.0) / sigma
    kink = sigma * (math.log1p(-q) - math.log(q)) + 0.5 / sigma
    pieces = [(-12.0, 12.0), (kink - 40.0 * sigma, kink + 40.0 * sigma), (far - 12.0, far + 12.0)]
    pieces = sorted((max(a, -12.0), min(b, far + 12.0)) for a, b in pieces if a < far + 12.0 and b > -12.0)
    merged = [pieces[0]]
    for a, b in pieces[1:]:
        if a <= merged[-1][1] + spacing:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return np.concatenate(
        [np.arange(math.floor(a / spacing), math.ceil(b / spacing) + 1) for a, b in merged]
    ) * spacing, spacing


def gaussian_log_mgf(t: float, sigma: float) -> float:
    """log E_P[e^{tL}] of one Gaussian release at distance 1: t(t + 1)/(2σ²)."""
    return 0.5 * t * (t + 1.0) / sigma**2 if sigma > 0.0 else (0.0 if t == 0.0 else math.inf)


def poisson_gaussian_log_mgf(t: float, q: float, sigma: float) -> float:
    """log E_P[e^{tL}] = log E_Q[R^{1+t}] of a Poisson-sampled Gaussian, P with the record and Q without.

    ``t`` may be negative: −1 − t is the other direction's order. Relative error about 1e-12, also where the value is
    tiny: E_Q[R] = 1 is subtracted inside the integral.

    Order 2 in closed form:

    >>> round(poisson_gaussian_log_mgf(1.0, 0.5, 1.0) / math.log(1 + 0.25 * (math.e - 1)), 12)
    1.0
    """
    if q == 0.0 or t in (0.0, -1.0):
        return 0.0
    if sigma == 0.0:
        return math.inf
    if q == 1.0:
        return gaussian_log_mgf(t, sigma)
    alpha = 1.0 + t
    y, spacing = _nodes(alpha, q, sigma)
    loss = loss_of_normal(y, q, sigma)
    power, bell = alpha * loss, -0.5 * y * y
    height = power + bell
    top = float(height.max())
    scale = spacing / math.sqrt(2.0 * math.pi)
    value = top + math.log(scale * float(np.exp(height - top).sum()))
    if abs(value) > 1.0:
        return value
    # E_Q[R^α − 1 − α(R − 1)]: every term has one sign, so a tiny moment keeps its relative accuracy.
    near = np.abs(power) < 1.0
    safe_power, safe_lift = np.where(near, power, 0.0), np.where(near, loss, 0.0)
    close = (np.expm1(safe_power) - alpha * np.expm1(safe_lift)) * np.exp(bell)
    wide = np.exp(height) - np.exp(bell) * (1.0 - alpha) - alpha * np.exp(loss + bell)
    return math.log1p(scale * float(np.where(near, close, wide).sum()))
