"""The private pieces that are easily forgotten: label counts, validation, and the choice between candidates.

Each returns what it released together with the event that it cost; the events are judged by `dpkit.accountants`,
together with those of the training. Neighbours differ by one unit: nothing here counts a unit more than once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpkit.accountants import ApproximateDP, Event, Gaussian, calibrate, dpsgd, make_accountant


def class_weights(
    labels: Sequence[int], units: Sequence[str], classes: int, noise_multiplier: float, rng: np.random.Generator
) -> tuple[np.ndarray, Event]:
    """Weights for the classes, rare ones larger, from noisy counts; their mean over the noisy counts is 1.

    A unit's contribution is the mean of its rows' one-hot labels, of length at most 1, however many rows it has. The
    counts get Gaussian noise of that standard deviation; what follows from them costs nothing more.

    Raises:
        ValueError: no noise, which would not be private.
    """
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier is {noise_multiplier}: exact counts are not private")
    noisy = _class_mass(labels, units, classes) + rng.normal(0.0, noise_multiplier, classes)
    counts = np.maximum(noisy, 1.0)
    return counts.sum() / (classes * counts), Gaussian(noise_multiplier)


def _class_mass(labels: Sequence[int], units: Sequence[str], classes: int) -> np.ndarray:
    """The sum over units of the mean of each one's one-hot labels [classes]."""
    _, whose = np.unique(np.asarray(units), return_inverse=True)
    rows = np.zeros((whose.max() + 1, classes))
    np.add.at(rows, (whose, np.asarray(labels)), 1.0)
    return (rows / rows.sum(1, keepdims=True)).sum(0)


def right_units(right: np.ndarray, units: Sequence[str]) -> float:
    """How many units are right, a unit counting for the share of its rows that are: it moves the sum by at most 1."""
    shares: dict[str, list[float]] = defaultdict(list)
    for one, unit in zip(right.tolist(), units, strict=True):
        shares[unit].append(float(one))
    return float(sum(np.mean(of) for of in shares.values()))


def validation(
    right: np.ndarray, units: Sequence[str], noise_multiplier: float, rng: np.random.Generator
) -> tuple[float, Event]:
    """The accuracy on private validation data, with noise; the number of units is taken to be public."""
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier is {noise_multiplier}: an exact accuracy is not private")
    noisy = right_units(right, units) + rng.normal(0.0, noise_multiplier)
    return float(np.clip(noisy / len(set(units)), 0.0, 1.0)), Gaussian(noise_multiplier)


def report_noisy_max(scores: Sequence[float], epsilon: float, rng: np.random.Generator) -> tuple[int, Event]:
    """The index of the best score, (ε, 0)-privately; of the scores, nothing else is released.

    Each score moves by at most 1 when a unit comes or goes, and all of them in the same direction (they are counts of
    right units). Report-noisy-max with Gumbel noise of scale 1 / ε is then the exponential mechanism, and ε-private;
    without the common direction it would need twice the noise. (McSherry and Talwar 2007; Dwork and Roth 2014,
    section 3.)
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: the best score itself is not private")
    noisy = np.asarray(scores, dtype=float) + rng.gumbel(0.0, 1.0 / epsilon, len(scores))
    return int(noisy.argmax()), ApproximateDP(epsilon)


def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int, beside: Event | None = None) -> float:
    """The training's σ that keeps it, together with what is released ``beside`` it, within (ε, δ)."""

    def build(sigma: float, rate: float, count: int) -> Event:
        event = dpsgd(sigma, rate, count)
        return event if beside is None else event + beside

    return float(calibrate(target_epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps, build=build))


@dataclass(frozen=True)
class Cost:
    """What a search cost, part by part.

    Attributes:
        on_train: releases from the training units: (what, event).
        on_validation: releases from the validation units, which are others.
    """

    on_train: tuple[tuple[str, Event], ...]
    on_validation: tuple[tuple[str, Event], ...]
    delta: float

    @property
    def epsilon(self) -> float:
        """ε of everything: a unit is either a training or a validation unit, so the larger of the two counts.

        (Parallel composition. It needs a split that does not depend on the data: a unit's side is a hash of its name.)
        """
        return max(self.total(self.on_train), self.total(self.on_validation))

    def total(self, parts: Sequence[tuple[str, Event]]) -> float:
        """ε of releases from the same units, composed."""
        accountant = make_accountant("pld")
        for _, event in parts:
            accountant.compose(event)
        return accountant.epsilon(self.delta) if parts else 0.0

    def lines(self) -> list[str]:
        """The account, to be printed."""
        sides = (("training units", self.on_train), ("validation units", self.on_validation))
        lines = [
            f"{where}: {what}: ε = {self.total([(what, event)]):.3f}" for where, parts in sides for what, event in parts
        ]
        lines += [f"{where}, together: ε = {self.total(parts):.3f}" for where, parts in sides if len(parts) > 1]
        lines.append(f"the search, in all: ε = {self.epsilon:.3f} at δ = {self.delta:.2g} (the larger side)")
        return lines


def sampled_steps(noise_multiplier: float, sample_rate: float, steps: int) -> Event:
    """The event of ``steps`` private training steps."""
    return dpsgd(noise_multiplier, sample_rate, steps)


def least_units(epsilon: float, candidates: int, failure: float = 0.05) -> float:
    """By how many right units the best candidate must lead so that it is chosen with probability 1 - ``failure``."""
    return math.log((candidates - 1) * (1 - failure) / failure) / epsilon
