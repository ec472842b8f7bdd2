"""Histories of other libraries as events. Nothing of theirs is imported: attributes and shapes are enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import AccountingError
from .events import (
    ApproximateDP,
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
    TruncatedPoissonSampled,
    dpsgd,
)


def from_opacus(history: Iterable[Sequence[float]] | Mapping[str, Any]) -> Event:
    """Opacus's ``accountant.history`` (or ``state_dict()["history"]``): (noise_multiplier, sample_rate, steps) triples.

    >>> from_opacus([(1.1, 0.01, 100), (1.0, 0.01, 50)]).flat()[1][1]
    50
    """
    if isinstance(history, Mapping):
        if "history" not in history:
            raise AccountingError(
                f"a state with the keys {sorted(map(str, history))}.",
                why="what was released is under 'history'.",
                cure="pass accountant.history or accountant.state_dict().",
            )
        history = history["history"]
    out = []
    for entry in history:
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 3:
            raise AccountingError(
                f"a history entry {entry!r}.",
                why="(noise_multiplier, sample_rate, steps) was expected.",
                cure="pass accountant.history.",
            )
        sigma, rate, steps = entry
        out.append(dpsgd(sigma, rate, _whole("steps", steps)))
    return Composed(tuple(out))


def _whole(name: str, value: Any) -> int:
    """``value`` as an int; 3.0 is one, 2.5 is refused, as cutting it would lose part of a release."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0 or number != value:
        raise AccountingError(f"{name} is {value!r}.", why="a whole number was expected.", cure=f"correct {name}.")
    return number


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
        return DiscreteGaussian(event.sigma, _whole("sensitivity", event.sensitivity))
    if kind == "DiscreteLaplaceDpEvent":
        return DiscreteLaplace(1.0 / event.noise_parameter, _whole("sensitivity", event.sensitivity))
    if kind == "RandomizedResponseDpEvent":
        return RandomizedResponse(event.noise_parameter, _whole("num_buckets", event.num_buckets))
    if kind == "EpsilonDeltaDpEvent":
        return ApproximateDP(event.epsilon, event.delta)
    if kind == "PoissonSampledDpEvent":
        return PoissonSampled(event.sampling_probability, from_dp_accounting(event.event))
    if kind == "TruncatedSubsampledGaussianDpEvent":
        return TruncatedPoissonSampled(
            event.sampling_probability,
            _whole("dataset_size", event.dataset_size),
            _whole("truncated_batch_size", event.truncated_batch_size),
            Gaussian(event.noise_multiplier),
        )
    if kind == "SampledWithoutReplacementDpEvent":
        return SampledWithoutReplacement(
            _whole("sample_size", event.sample_size),
            _whole("source_dataset_size", event.source_dataset_size),
            from_dp_accounting(event.event),
        )
    if kind == "SelfComposedDpEvent":
        return Repeated(from_dp_accounting(event.event), _whole("count", event.count))
    if kind == "ComposedDpEvent":
        return Composed(tuple(from_dp_accounting(part) for part in event.events))
    raise AccountingError(
        f"a dp_accounting event of kind {kind}.",
        why="it has no counterpart here, and leaving it out would understate epsilon.",
        cure="build the events by hand.",
    )
