"""Events are values: they compose, repeat, compare, hash and survive JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dpkit.accountants import (
    AccountingError,
    ApproximateDP,
    Composed,
    DeterministicBatches,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    Gaussian,
    GroupOf,
    Laplace,
    PoissonSampled,
    RandomAllocation,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
    dpsgd,
)

STEP = PoissonSampled(0.01, Gaussian(1.1))


def test_repetition_multiplies_through_nesting() -> None:
    assert ((STEP * 10) * 7).flat() == [(STEP, 70)]
    assert (3 * (STEP + Laplace(1.0) * 2)).flat() == [(STEP, 3), (Laplace(1.0), 6)]
    assert (STEP + STEP * 4 + STEP).flat() == [(STEP, 6)]
    assert (STEP * 0).flat() == []
    assert Composed(()).flat() == []


def test_events_are_hashable_values() -> None:
    assert hash(dpsgd(1.1, 0.01, 5)) == hash(STEP * 5)
    assert {STEP: 1}[PoissonSampled(np.float64(0.01), Gaussian(np.float32(1.1).item() * 0 + 1.1))] == 1
    with pytest.raises(AttributeError):
        STEP.sample_rate = 0.5  # type: ignore[misc]


EVENTS: list[Event] = [
    STEP,
    STEP * 3 + Laplace(0.1 + 0.2) * 2,
    Composed(()),
    Repeated(Gaussian(0.0), 4),
    RandomAllocation(10, Gaussian(0.1 + 0.2), 2) * 3,
    SampledWithoutReplacement(3, 10, Laplace(1.0)),
    TruncatedPoissonSampled(0.1, 10, 3, Gaussian(1.0)),
    DeterministicBatches(Gaussian(1.0)),
    GroupOf(3, STEP),
    PoissonSampled(0.1, Gaussian(1.0) + Gaussian(2.0)),
    DiscreteGaussian(1.5, 2) + DiscreteLaplace(2.5) + RandomizedResponse(0.3, 5) + ApproximateDP(0.3, 1e-9),
]


def test_every_kind_is_tried() -> None:
    kinds = {type(part) for event in EVENTS for part, _ in event.flat()} | {Composed, Repeated}
    assert kinds == set(Event._kinds.values())


def test_groups_and_batches_see_every_release() -> None:
    assert GroupOf(2, STEP * 3 + Laplace(1.0)).flat() == [(GroupOf(2, STEP), 3), (GroupOf(2, Laplace(1.0)), 1)]
    assert DeterministicBatches(Gaussian(1.0) * 2).flat() == [(DeterministicBatches(Gaussian(1.0)), 2)]


@pytest.mark.parametrize("event", EVENTS, ids=repr)
def test_repr_is_code(event: Event) -> None:
    assert eval(repr(event)) == event


@pytest.mark.parametrize("event", EVENTS, ids=repr)
def test_json_round_trip_is_exact(event: Event) -> None:
    assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "Teapot"},
        {"kind": "Gaussian"},
        {"kind": "Gaussian", "noise_multiplier": 1.0, "extra": 1},
        {"kind": "Gaussian", "noise_multiplier": 1.0, "version": 99},
        "Gaussian",
    ],
)
def test_json_that_is_not_understood_is_refused(data: object) -> None:
    with pytest.raises(AccountingError, match="Cure:"):
        Event.from_json(data)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "x", None])
def test_bad_numbers_are_refused(bad: object) -> None:
    with pytest.raises(AccountingError, match="noise_multiplier"):
        Gaussian(bad)  # type: ignore[arg-type]
    with pytest.raises(AccountingError, match="sample_rate"):
        PoissonSampled(1.5, Gaussian(1.0))


@pytest.mark.parametrize("bad", [-1, 2.5, True, "3"])
def test_bad_counts_are_refused(bad: object) -> None:
    with pytest.raises(AccountingError, match="count"):
        STEP * bad  # type: ignore[operator]
