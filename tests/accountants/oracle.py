"""An independent judge: delta by a contour integral, without any grid of losses.

delta(ε) = (1/π) ∫_0^∞ Re[e^{K(z) − zε} / (z (z + 1))] ds on z = θ + is, K(z) = Σ T log E_P e^{zL}, for any θ > 0.
Both the inner expectation and the outer integral are trapezoid sums of analytic functions; each is done twice, with
another spacing, and the two must agree. Where that does not converge: one step in closed form, importance sampling, or
the error rates of a simple test.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_ndtr, logsumexp


class NoAnswerError(Exception):
    """The integral does not converge fast enough here (an expected number of hits far below one)."""


def _log_mgf(z: np.ndarray, q: float, sigma: float, spacing: float) -> np.ndarray:
    theta = float(z[0].real)
    x = np.arange(-13.0, (1.0 + theta) / sigma + 13.0, spacing)
    log_r = _loss(x, q, sigma)
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


def _variance(theta: float, q: float, sigma: float, spacing: float) -> float:
    """K''(θ) of one step: the variance of its tilted loss."""
    y = np.arange(-13.0, (1.0 + theta) / sigma + 13.0, spacing)
    loss = _loss(y, q, sigma)
    height = (1.0 + theta) * loss - 0.5 * y * y
    weight = np.exp(height - height.max())
    weight /= weight.sum()
    return float(np.dot(weight, (loss - np.dot(weight, loss)) ** 2))


def contour_deltas(steps: list[tuple[float, float, int]], epsilons: list[float], *, log_delta: float) -> list[float]:
    """delta of removing a record from ``steps`` = [(sigma, q, count)] at each epsilon; log_delta is a rough guess."""
    spacing = min(0.2, min(2.0 * math.pi * min(math.pi * s, 4.0) / 50.0 for s, _, _ in steps))
    at = np.array(epsilons)

    def k(z: np.ndarray, width: float) -> np.ndarray:
        return sum(n * _log_mgf(z, q, s, width) for s, q, n in steps)  # type: ignore[return-value]

    def chernoff(log_t: float) -> float:
        t = np.array([math.exp(log_t) + 0j])
        value = float(k(t, spacing)[0].real) - math.exp(log_t) * epsilons[0]
        return value if abs(value) < 1e100 else 1e100

    def by_delta(log_t: float) -> float:
        t = np.array([math.exp(log_t) + 0j])
        value = float((k(t, spacing)[0].real - log_delta) / t[0].real)
        return value if abs(value) < 1e100 else 1e100

    last = min(20.0, math.log(3e3 * min(s for s, _, _ in steps)))  # keeps the range of x short
    saddle = minimize_scalar(chernoff if epsilons[0] > 0.0 else by_delta, bounds=(-8.0, last), method="bounded")
    theta = math.exp(float(saddle.x))
    here = np.array([theta + 0j])
    curvature = sum(n * _variance(theta, q, s, spacing) for s, q, n in steps)
    scale = float(k(here, spacing)[0].real) - theta * at

    def integrals(points_per_deviation: float, width: float) -> np.ndarray:
        ds = 1.0 / (points_per_deviation * math.sqrt(curvature))
        total, start = np.zeros(len(at)), 0
        while True:
            s = ds * np.arange(start, start + 256)
            z = theta + 1j * s
            value = np.exp(k(z, width)[:, None] - np.outer(z, at) - scale) / (z * (z + 1.0))[:, None]
            if start == 0:
                value[0] *= 0.5
            total += value.real.sum(0)
            start += 256
            if np.all(np.abs(value[-8:]).max(0) < 1e-15 * np.maximum(np.abs(total), 1e-300)):
                return np.asarray(total * ds / math.pi)
            if start > 6_000:
                raise NoAnswerError

    first, second = integrals(4.0, spacing), integrals(6.5, 0.71 * spacing)
    if np.any(np.abs(first - second) > 1e-7 * np.abs(second)):
        raise NoAnswerError
    return [float(x) for x in second * np.exp(scale)]


def contour_delta(steps: list[tuple[float, float, int]], epsilon: float, *, log_delta: float) -> float:
    """delta at one epsilon."""
    return contour_deltas(steps, [epsilon], log_delta=log_delta)[0]


def one_step_log_delta(q: float, sigma: float, epsilon: float) -> float:
    """log delta of one Poisson step in closed form: q times the Gaussian's at log(1 + (e^ε − 1)/q)."""
    inner = math.log1p(math.expm1(epsilon) / q) if epsilon < 30.0 else epsilon - math.log(q)
    a = float(log_ndtr(0.5 / sigma - inner * sigma))
    b = float(log_ndtr(-0.5 / sigma - inner * sigma))
    return math.log(q) + a + math.log(-math.expm1(min(-1e-300, inner + b - a)))


def _loss(y: np.ndarray, q: float, sigma: float) -> np.ndarray:
    lift = y / sigma - 0.5 / sigma**2
    if q == 1.0:
        return lift
    small = np.log1p(q * np.expm1(np.minimum(lift, 1.0)))
    return np.where(lift > 1.0, np.logaddexp(math.log1p(-q), math.log(q) + lift), small)


def jump_samples(q: float, sigma: float, steps: int, epsilons: list[float], seed: int) -> list[tuple[float, float]]:
    """(delta, its standard error) at each epsilon by importance sampling: E_Q (ΠR − e^ε)+, y_i ~ N(0, 1) under Q.

    The samples come from a mixture over k = 1, 2, 4, ... steps that are moved up, on average, each to where k of them
    reach ε together: one large loss, or many small ones, or anything between.
    """
    rng = np.random.default_rng(seed)
    sizes = sorted({min(steps, 2**j) for j in range(steps.bit_length() + 1)})
    parts = []
    for k in sizes:
        level = epsilons[0] / k
        lift = math.log1p(math.expm1(level) / q) if level < 30.0 else level - math.log(q)
        parts.append((k / steps, sigma * lift + 0.5 / sigma))
    rows = max(1, 1_500_000 // (steps * len(parts) * 10))
    sums, n = np.zeros((len(epsilons), 2)), 0
    for _ in range(10):
        for share, m in parts:
            y = rng.standard_normal((rows, steps))
            y += m * (rng.random((rows, steps)) < share)
            densities = []
            for r, c in parts:
                moved = c * y - 0.5 * c * c
                densities.append(
                    (np.log((1.0 - r) + r * np.exp(np.minimum(moved, 600.0))) if r < 1.0 else moved).sum(1)
                )
            log_weight = math.log(len(parts)) - logsumexp(densities, axis=0)
            total = _loss(y, q, sigma).sum(1)
            for i, epsilon in enumerate(epsilons):
                gain = np.where(total > epsilon, -np.expm1(np.minimum(epsilon - total, 0.0)), 0.0)
                value = np.exp(total + log_weight) * gain
                sums[i] += value.sum(), (value**2).sum()
            n += rows
    means = sums[:, 0] / n
    return [(float(a), float(math.sqrt(max(b / n - a * a, 0.0) / n))) for a, b in zip(means, sums[:, 1], strict=True)]


def simple_test_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    """A rigorous lower bound on epsilon: that of the test "is any step's value above m?", at the best m."""
    best = 0.0
    for m in np.concatenate([np.linspace(-3.0, 14.0, 171), 1.0 / sigma + np.linspace(-8.0, 8.0, 161)]):
        high, moved = float(log_ndtr(-m)), float(log_ndtr(1.0 / sigma - m))
        p = (1.0 - q) * math.exp(high) + q * math.exp(moved)
        caught = -math.expm1(steps * math.log1p(-min(p, 1.0 - 1e-16)))
        false = steps * math.exp(high) if high < -30.0 else -math.expm1(steps * math.log1p(-math.exp(high)))
        if caught > delta and false > 0.0:
            best = max(best, math.log(caught - delta) - math.log(false))
    return best


def two_steps_delta(q: float, sigma: float, epsilon: float, spacing: float = 1e-4) -> float:
    """delta of two Poisson steps: the closed form of one step, averaged over the loss of the other."""
    y = np.arange(-12.0, max(14.0, 2.0 / sigma + 30.0), spacing)
    loss = _loss(y, q, sigma)
    left = epsilon - loss
    inner = np.log1p(np.maximum(np.expm1(np.minimum(left, 30.0)) / q, -1.0 + 1e-15))
    inner = np.where(left > 30.0, left - math.log(q), inner)
    a, b = log_ndtr(0.5 / sigma - inner * sigma), inner + log_ndtr(-0.5 / sigma - inner * sigma)
    one = np.where(left <= math.log1p(-q), -np.expm1(left), q * np.exp(a) * -np.expm1(np.minimum(b - a, 0.0)))
    return float(np.sum(np.exp(loss - 0.5 * y * y) * one)) * spacing / math.sqrt(2.0 * math.pi)
