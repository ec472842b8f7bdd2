"""What was done to the data: frozen, hashable values that say nothing of how they are judged.

An event describes one use of private data. Events compose with ``+`` and repeat with ``*``; the accountants judge them.

>>> step = PoissonSampled(sample_rate=0.01, event=Gaussian(noise_multiplier=1.1))
>>> (step * 1000).flat()
[(PoissonSampled(sample_rate=0.01, event=Gaussian(noise_multiplier=1.1)), 1000)]
>>> Event.from_json((step * 3 + Laplace(2.0)).to_json()) == step * 3 + Laplace(2.0)
True

Units: every noise scale is relative to the largest contribution C of one record (``noise_multiplier = std / C``). Under
add-or-remove-one and zero-out adjacency one record moves a sum by at most C; under replace-one by at most 2C, and it is
the accountant, not the event, that knows which applies.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsIndex

from .errors import AccountingError

VERSION = 1


def _number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """``value`` as a float inside [low, high], or an error that names the field."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise AccountingError(
            f"{name} is {value!r}.", why="it must be a number.", cure=f"pass a float as {name}."
        ) from None
    inside = low < number if open_low else low <= number
    if not (math.isfinite(number) and inside and number <= high):
        left = "(" if open_low else "["
        raise AccountingError(
            f"{name} is {value!r}.",
            why=f"it must be a finite number in {left}{low:g}, {high:g}].",
            cure=f"pass a {name} in that range.",
        )
    return number


def _count(name: str, value: Any, low: int = 0) -> int:
    """``value`` as an int of at least ``low``, or an error that names the field."""
    try:
        number = operator.index(value)
    except TypeError:
        raise AccountingError(f"{name} is {value!r}.", why="it must be a whole number.", cure="pass an int.") from None
    if isinstance(value, bool) or number < low:
        raise AccountingError(
            f"{name} is {value!r}.", why=f"it must be an int of at least {low}.", cure="pass a larger int."
        )
    return number


@dataclass(frozen=True)
class Event:
    """Base of all events. ``event * k`` repeats it k times, ``a + b`` runs both on the same data."""

    _kinds: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Event._kinds[cls.__name__] = cls

    def __mul__(self, count: SupportsIndex) -> Event:
        return Repeated(self, _count("count", count))

    __rmul__ = __mul__

    def __add__(self, other: object) -> Event:
        if not isinstance(other, Event):
            return NotImplemented
        left = self.events if isinstance(self, Composed) else (self,)
        right = other.events if isinstance(other, Composed) else (other,)
        return Composed(left + right)

    def flat(self) -> list[tuple[Event, int]]:
        """The same release as (single event, count), neighbours merged, counts multiplied."""
        return [(self, 1)]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; `Event.from_json` gives back an equal event, floats bit for bit."""
        return {"version": VERSION, **self._fields_json()}

    def _fields_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"kind": type(self).__name__}
        for field in dataclasses.fields(self):
            out[field.name] = _value_to_json(getattr(self, field.name))
        return out

    @staticmethod
    def from_json(data: Any) -> Event:
        """The event that `to_json` wrote.

        Raises:
            AccountingError: another version, an unknown kind, missing or surplus fields.
        """
        if not isinstance(data, dict) or "kind" not in data:
            raise AccountingError(
                f"an event is stored as {data!r}.",
                why="a dict with a 'kind' was expected.",
                cure="pass Event.to_json().",
            )
        if data.get("version", VERSION) != VERSION:
            raise AccountingError(
                f"an event of format version {data['version']!r}.",
                why=f"this release reads version {VERSION} only; guessing could lose a release.",
                cure="load it with the dpkit release that wrote it.",
            )
        cls = Event._kinds.get(data["kind"])
        if cls is None:
            raise AccountingError(
                f"an event of kind {data['kind']!r}.",
                why="dropping an unknown release would understate epsilon.",
                cure=f"known kinds: {', '.join(sorted(Event._kinds))}.",
            )
        fields = {name: _value_from_json(value) for name, value in data.items() if name not in ("kind", "version")}
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != expected:
            raise AccountingError(
                f"a stored {data['kind']} with the fields {sorted(fields)}.",
                why=f"its fields are {sorted(expected)}.",
                cure="store events with Event.to_json().",
            )
        return cls(**fields)


def _value_to_json(value: Any) -> Any:
    if isinstance(value, Event):
        return value._fields_json()
    if isinstance(value, tuple):
        return [_value_to_json(item) for item in value]
    return value


def _value_from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return Event.from_json(value)
    if isinstance(value, list):
        return tuple(_value_from_json(item) for item in value)
    return value


def _check_event(name: str, value: object) -> Event:
    if not isinstance(value, Event):
        raise AccountingError(
            f"{name} is {value!r}.", why="it must be an event.", cure="pass e.g. Gaussian(noise_multiplier=1.0)."
        )
    return value


@dataclass(frozen=True)
class Repeated(Event):
    """``event`` released ``count`` times, adaptively, on the same data."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        _check_event("event", self.event)
        object.__setattr__(self, "count", _count("count", self.count))

    def flat(self) -> list[tuple[Event, int]]:
        return [(event, n * self.count) for event, n in self.event.flat() if self.count]


@dataclass(frozen=True)
class Composed(Event):
    """All of ``events``, adaptively, on the same data. ``Composed(())`` is no release at all."""

    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))
        for event in self.events:
            _check_event("an entry of events", event)

    def flat(self) -> list[tuple[Event, int]]:
        out: list[tuple[Event, int]] = []
        for part in self.events:
            for event, n in part.flat():
                if out and out[-1][0] == event:
                    out[-1] = (event, out[-1][1] + n)
                else:
                    out.append((event, n))
        return out


@dataclass(frozen=True)
class Gaussian(Event):
    """A sum released with Gaussian noise of standard deviation ``noise_multiplier`` · C; 0 means no noise."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _number("noise_multiplier", self.noise_multiplier, 0.0))


@dataclass(frozen=True)
class Laplace(Event):
    """A number released with Laplace noise of scale ``noise_multiplier`` · C (standard deviation √2 times that)."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_multiplier", _number("noise_multiplier", self.noise_multiplier, 0.0))


@dataclass(frozen=True)
class PoissonSampled(Event):
    """``event`` on a batch in which every record is, independently, with probability ``sample_rate``."""

    sample_rate: float
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", _number("sample_rate", self.sample_rate, 0.0, 1.0))
        _check_event("event", self.event)


@dataclass(frozen=True)
class DiscreteGaussian(Event):
    """An integer released with discrete Gaussian noise of parameter ``sigma`` (Canonne, Kamath, Steinke 2020).

    ``sensitivity`` is the most, a whole number, that adding or removing one record moves the integer.
    """

    sigma: float
    sensitivity: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", _number("sigma", self.sigma, 0.0, 1e4, open_low=True))
        object.__setattr__(self, "sensitivity", _count("sensitivity", self.sensitivity, 1))


@dataclass(frozen=True)
class DiscreteLaplace(Event):
    """An integer released with two-sided geometric noise, P(k) ∝ e^{−|k|/scale}."""

    scale: float
    sensitivity: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _number("scale", self.scale, 0.0, 1e6, open_low=True))
        object.__setattr__(self, "sensitivity", _count("sensitivity", self.sensitivity, 1))


@dataclass(frozen=True)
class RandomizedResponse(Event):
    """One person's report of one of ``categories`` values, replaced by a uniform one with ``noise_probability``.

    The report is always made: under add-or-remove-one and zero-out, an absent person's is taken as of some fixed value.
    """

    noise_probability: float
    categories: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise_probability", _number("noise_probability", self.noise_probability, 0.0, 1.0))
        object.__setattr__(self, "categories", _count("categories", self.categories, 2))


@dataclass(frozen=True)
class ApproximateDP(Event):
    """Any mechanism of which only (``epsilon``, ``delta``)-DP is known, under the accountant's adjacency."""

    epsilon: float
    delta: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _number("epsilon", self.epsilon, 0.0, 700.0))
        object.__setattr__(self, "delta", _number("delta", self.delta, 0.0, 1.0))


@dataclass(frozen=True)
class SampledWithoutReplacement(Event):
    """``event`` on a uniform batch of exactly ``batch_size`` of ``dataset_size`` records.

    ``dataset_size`` is public: under add-or-remove-one it counts the larger of the two data sets. A record's place in
    the batch goes to another one where it is not drawn, so that it is an exchange of records, at distance 2C, that is
    sampled (not under zero-out, where it may be nulled in its place).
    """

    batch_size: int
    dataset_size: int
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", _count("batch_size", self.batch_size))
        object.__setattr__(self, "dataset_size", _count("dataset_size", self.dataset_size, 1))
        _check_event("event", self.event)
        if self.batch_size > self.dataset_size:
            raise AccountingError(
                f"batch_size {self.batch_size} of {self.dataset_size} records.",
                why="a batch without replacement is at most the data set.",
                cure="lower batch_size.",
            )


@dataclass(frozen=True)
class TruncatedPoissonSampled(Event):
    """`PoissonSampled`, but a batch of more than ``max_batch_size`` of ``dataset_size`` records is cut to that size.

    What is kept is a uniform choice, independent of the data. ``dataset_size`` is public: under add-or-remove-one it
    counts the larger of the two data sets.
    """

    sample_rate: float
    dataset_size: int
    max_batch_size: int
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_rate", _number("sample_rate", self.sample_rate, 0.0, 1.0))
        object.__setattr__(self, "dataset_size", _count("dataset_size", self.dataset_size, 1))
        object.__setattr__(self, "max_batch_size", _count("max_batch_size", self.max_batch_size))
        _check_event("event", self.event)


@dataclass(frozen=True)
class RandomAllocation(Event):
    """``steps`` runs of ``event``, of which every record takes part in ``selected``, drawn uniformly: one epoch.

    With ``selected`` = 1 this is balls-and-bins sampling: each record goes to one of ``steps`` batches, independently
    of all others, anew in every epoch (``RandomAllocation(steps, event) * epochs``). It is not shuffling into batches
    of equal size, for which see `DeterministicBatches`.
    """

    steps: int
    event: Event
    selected: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _count("steps", self.steps, 1))
        object.__setattr__(self, "selected", _count("selected", self.selected))
        _check_event("event", self.event)
        if self.selected > self.steps:
            raise AccountingError(
                f"selected {self.selected} of {self.steps} steps.",
                why="a record takes part in each step at most once.",
                cure="lower selected, or use DeterministicBatches.",
            )


@dataclass(frozen=True)
class DeterministicBatches(Event):
    """One epoch over fixed, data-independent batches (shuffled or not): every record is in exactly one.

    Judged as one full-participation run of ``event`` (parallel composition). That is the safe number for shuffling: its
    amplification has no proven tight bound, and accounting it as Poisson sampling understates epsilon.
    """

    event: Event

    def __post_init__(self) -> None:
        _check_event("event", self.event)

    def flat(self) -> list[tuple[Event, int]]:
        return [(DeterministicBatches(event), n) for event, n in self.event.flat()]


@dataclass(frozen=True)
class GroupOf(Event):
    """``event`` as seen by a group of ``size`` records that come and go together."""

    size: int
    event: Event

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _count("size", self.size, 1))
        _check_event("event", self.event)

    def flat(self) -> list[tuple[Event, int]]:
        return [(GroupOf(self.size, event), n) for event, n in self.event.flat()]


def adaptive_clipping(noise_multiplier: float, count_noise: float, groups: int = 1) -> Gaussian:
    """A gradient sum and the clipped-fraction count of adaptive clipping, released from one batch, as one Gaussian.

    Args:
        noise_multiplier: noise of the gradient sum, std / C.
        count_noise: standard deviation of each count's noise; a record moves its count by 1/2 (Andrew et al. 2021).
        groups: how many counts there are, one a parameter group.

    >>> round(adaptive_clipping(1.0, 5.0).noise_multiplier, 6)
    0.995037
    """
    z = _number("noise_multiplier", noise_multiplier, 0.0, open_low=True)
    s = _number("count_noise", count_noise, 0.0, open_low=True)
    return Gaussian((z**-2 + _count("groups", groups) / (4.0 * s * s)) ** -0.5)


def adaptive_clipping_gradient_noise(noise_multiplier: float, count_noise: float, groups: int = 1) -> float:
    """The gradient noise multiplier that, with the counts, amounts to one Gaussian of ``noise_multiplier``.

    Raises:
        AccountingError: the counts alone reveal more than that.
    """
    z = _number("noise_multiplier", noise_multiplier, 0.0, open_low=True)
    s = _number("count_noise", count_noise, 0.0, open_low=True)
    rest = z**-2 - _count("groups", groups) / (4.0 * s * s)
    if rest <= 0.0:
        raise AccountingError(
            f"noise_multiplier {z:g} with count_noise {s:g} and {groups} group(s).",
            why="the counts alone spend the whole budget; no gradient noise is enough.",
            cure=f"raise count_noise above {0.5 * z * math.sqrt(groups):g}.",
        )
    return float(rest**-0.5)


def banded_matrix(noise_multiplier: float, bands: int, sample_rate: float, steps: int) -> Event:
    """A ``bands``-banded matrix mechanism with cyclic Poisson sampling: ceil(steps / bands) Poisson steps.

    Args:
        noise_multiplier: noise std over C times the largest column norm of the banded matrix.
        sample_rate: the rate within the one of ``bands`` groups whose turn it is (Choquette-Choo et al. 2023).
    """
    count = _count("bands", bands, 1)
    return dpsgd(noise_multiplier, sample_rate, -(-_count("steps", steps) // count))


def dpsgd(noise_multiplier: float, sample_rate: float, steps: int) -> Event:
    """DP-SGD: ``steps`` noisy sums over Poisson batches.

    >>> dpsgd(noise_multiplier=1.0, sample_rate=0.5, steps=2).flat()
    [(PoissonSampled(sample_rate=0.5, event=Gaussian(noise_multiplier=1.0)), 2)]
    """
    return PoissonSampled(sample_rate, Gaussian(noise_multiplier)) * _count("steps", steps)
