"""One run of one pair: its delta is a sum over its atoms, without grid or composition."""

from __future__ import annotations

import math

import numpy as np

from .numeric import root
from .pairs import Pair


def log_delta(pair: Pair, epsilon: float, *, upper: bool) -> float:
    """log of delta(``epsilon``), rounded up or down. Cells end at ε, so the quadrature never crosses the kink."""
    low, high = pair.span(-745.0, -745.0)
    total, lost = 0.0, pair.infinite
    if epsilon < high:
        atoms = pair.atoms(np.array([max(low, epsilon), high]) if epsilon > low else np.array([low, high]))
        if upper:
            mass, loss = atoms.mass * (1.0 + atoms.mass_error), atoms.loss + atoms.loss_error
        else:
            mass, loss = atoms.mass * (1.0 - atoms.mass_error), atoms.loss - atoms.loss_error
        total = float(np.sum(mass * np.maximum(0.0, -np.expm1(np.minimum(epsilon - loss, 1.0)))))
    value = (total + lost) * (1.0 + 1e-13 if upper else 1.0 - 1e-13) + (1e-300 if upper else 0.0)
    return min(0.0, math.log(value)) if value > 0.0 else -math.inf


def epsilon(pair: Pair, log_d: float, *, upper: bool) -> float:
    """The bound on epsilon at log delta ``log_d``; 0 or infinity where there is none."""

    def rising(x: float) -> float:
        return log_d - max(log_delta(pair, x, upper=upper), -1e4)

    if rising(0.0) >= 0.0:
        return 0.0
    high = max(pair.span(-745.0, min(log_d - 1.0, -1.0))[1], 1e-9)
    while rising(high) < 0.0:
        high *= 2.0
        if high > 1e9:
            return math.inf
    found = root(rising, 0.0, high, xtol=1e-13 * high)
    side = 1.0 if upper else -1.0
    for nudge in range(60):
        x = found * (1.0 + side * 1e-12 * 2.0**nudge) + side * 1e-15 * 2.0**nudge
        if x <= 0.0:
            return 0.0
        if side * rising(x) >= 0.0:
            return x
    return high if upper else 0.0
