"""Histories of other libraries as events. Nothing of theirs is imported: attributes and shapes are enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .errors import AccountingError
from .events import (
    Composed,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    Gaussian,
    Laplace,
    PoissonSampled,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    dpsgd,
)


def from_opacus(history: Iterable[Sequence[float]]) -> Event:
    """Opacus's ``accountant.history`` (or ``state_dict()["history"]``): (noise_multiplier, sample_rate, steps) triples.

    >>> from_opacus([(1.1, 0.01, 100), (1.0, 0.01, 50)]).flat()[1][1]
    50
    """
    if isinstance(history, dict):
        history = history["history"]
    out = []
    for entry in history:
        if len(entry) != 3:
            raise AccountingError(
                f"a history entry {entry!r}.",
                why="(noise_multiplier, sample_rate, steps) was expected.",
                cure="pass accountant.history.",
            )
        sigma, rate, steps = entry
        out.append(dpsgd(sigma, rate, int(steps)))
    return Composed(tuple(out))


def from_dp_accounting(event: Any) -> Event:
    """An event of Google's dp_accounting; counts of self-composition are kept whatever is repeated.

    Raises:
        AccountingError: an event that has no counterpart here; dropping it would understate epsilon.
    """
    kind = type(event).__name__
    if kind == "NoOpDpEvent":
        return Composed(())
    if kind == "GaussianDpEvent":
        return Gaussian(event.noise_multiplier)
    if kind == "LaplaceDpEvent":
        return Laplace(event.noise_multiplier)
    if kind == "DiscreteGaussianDpEvent":
        return DiscreteGaussian(event.sigma, int(event.sensitivity))
    if kind == "DiscreteLaplaceDpEvent":
        return DiscreteLaplace(1.0 / event.noise_parameter, int(event.sensitivity))
    if kind == "RandomizedResponseDpEvent":
        return RandomizedResponse(event.noise_parameter, int(event.num_buckets))
    if kind == "PoissonSampledDpEvent":
        return PoissonSampled(event.sampling_probability, from_dp_accounting(event.event))
    if kind == "SampledWithoutReplacementDpEvent":
        return SampledWithoutReplacement(
            int(event.sample_size), int(event.source_dataset_size), from_dp_accounting(event.event)
        )
    if kind == "SelfComposedDpEvent":
        return Repeated(from_dp_accounting(event.event), int(event.count))
    if kind == "ComposedDpEvent":
        return Composed(tuple(from_dp_accounting(part) for part in event.events))
    raise AccountingError(
        f"a dp_accounting event of kind {kind}.",
        why="it has no counterpart here, and leaving it out would understate epsilon.",
        cure="build the events by hand.",
    )
