"""The ledger, the state, and what every accountant has in common."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from dpkit.accountants import (
    Accountant,
    AccountingError,
    Event,
    Gaussian,
    GDPAccountant,
    PLDAccountant,
    PoissonSampled,
    RDPAccountant,
    dpsgd,
)

STEP = PoissonSampled(0.01, Gaussian(1.1))
ACCOUNTANTS: list[type[Accountant]] = [RDPAccountant, PLDAccountant, GDPAccountant]


@pytest.fixture(params=ACCOUNTANTS, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[Accountant]:
    kind: type[Accountant] = request.param
    return kind


def test_empty_is_zero(cls: type[Accountant]) -> None:
    assert cls().epsilon(1e-6) == 0.0
    assert cls().delta(0.5) == 0.0
    assert cls().compose(STEP, 0).ledger == ()


def test_compose_returns_self_and_merges_neighbours(cls: type[Accountant]) -> None:
    acc = cls()
    assert acc.compose(STEP) is acc
    acc.compose(STEP, 4).compose(Gaussian(2.0)).compose(STEP)
    assert acc.ledger == ((STEP, 5), (Gaussian(2.0), 1), (STEP, 1))
    assert acc.totals() == {STEP: 6, Gaussian(2.0): 1}


def test_no_noise_is_infinite_and_no_sampling_is_zero(cls: type[Accountant]) -> None:
    assert cls().compose(PoissonSampled(0.01, Gaussian(0.0))).epsilon(1e-9) == math.inf
    assert cls().compose(PoissonSampled(0.0, Gaussian(0.0))).epsilon(1e-9) == 0.0
    assert cls().compose(PoissonSampled(0.0, Gaussian(1.0)), 10).epsilon(1e-9) == 0.0


def test_replace_one_doubles_the_reach_of_a_gaussian(cls: type[Accountant]) -> None:
    near = cls(adjacency="add_or_remove_one").compose(Gaussian(1.0), 3).epsilon(1e-5)
    assert cls(adjacency="zero_out").compose(Gaussian(1.0), 3).epsilon(1e-5) == near
    assert cls(adjacency="replace_one").compose(Gaussian(2.0), 3).epsilon(1e-5) == pytest.approx(near, rel=1e-9)


def test_state_round_trip_is_exact(cls: type[Accountant]) -> None:
    acc = cls(adjacency="zero_out").compose(STEP, 123).compose(Gaussian(0.1 + 0.2), 2)
    fresh = cls(adjacency="zero_out")
    fresh.compose(Gaussian(9.0))
    assert fresh.epsilon(1e-5) >= 0.0
    fresh.load_state_dict(json.loads(json.dumps(acc.state_dict())))
    assert fresh.ledger == acc.ledger
    assert fresh.epsilon(1e-5) == acc.epsilon(1e-5)
    assert fresh.compose(STEP).epsilon(1e-5) == acc.compose(STEP).epsilon(1e-5)


def test_foreign_state_is_refused_and_changes_nothing(cls: type[Accountant]) -> None:
    acc = cls().compose(STEP)
    good = acc.state_dict()
    for bad in ({}, {**good, "version": 0}, {**good, "adjacency": "replace_one"}, {**good, "ledger": [["x", 1]]}):
        with pytest.raises(AccountingError, match="Cure:"):
            acc.load_state_dict(bad)
    assert acc.ledger == ((STEP, 1),)


def test_bad_questions_are_refused(cls: type[Accountant]) -> None:
    acc = cls().compose(STEP)
    for delta in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(AccountingError, match="delta"):
            acc.epsilon(delta)
    for epsilon in (-1.0, float("nan")):
        with pytest.raises(AccountingError, match="epsilon"):
            acc.delta(epsilon)
    with pytest.raises(AccountingError, match="adjacency"):
        cls(adjacency="nearby")
    with pytest.raises(AccountingError, match="event"):
        acc.compose("Gaussian")  # type: ignore[arg-type]


def test_unknown_events_are_refused_and_leave_the_ledger(cls: type[Accountant]) -> None:
    class Mystery(Event):
        pass

    acc = cls().compose(STEP)
    try:
        with pytest.raises(AccountingError, match="Mystery"):
            acc.compose(STEP + Mystery())
        assert acc.ledger == ((STEP, 1),)
    finally:
        del Event._kinds["Mystery"]


def test_large_delta_gives_zero_never_negative(cls: type[Accountant]) -> None:
    acc = cls().compose(dpsgd(10.0, 0.001, 10))
    assert acc.epsilon(0.5) == 0.0
    assert 0.0 <= acc.delta(0.0) < 0.01
    assert acc.delta(math.inf) == 0.0


def test_a_first_answer_needs_no_scipy() -> None:
    # importing it takes longer than the answer
    code = (
        "import sys; from dpkit.accountants import epsilon;"
        "epsilon(noise_multiplier=1.1, sample_rate=0.01, steps=100, delta=1e-5);"
        "sys.exit('scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
