"""The hard budget: the last step that fits is taken, the next one is not, whoever else spends beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dpkit
from dpkit.accountants import Gaussian, PoissonSampled, epsilon, make_accountant
from dpkit.budget import Budget
from tests.lives import EPOCHS, Life, begin
from tests.test_refusals import refused
from tests.training import drawing

STEP = PoissonSampled(0.2, Gaussian(1.0))


def count(life: Life) -> int:
    return sum(n for _, n in life.engine.accountant.ledger)


def spent(steps: int, kind: str = "rdp") -> float:
    return epsilon(noise_multiplier=1.0, sample_rate=0.2, steps=steps, delta=1e-5, accountant=kind)


@pytest.mark.parametrize("kind", ["rdp", "pld"])
@pytest.mark.parametrize("fits", [1, 7, 12])
def test_the_loop_ends_in_time(fits: int, kind: str) -> None:
    """No error: the loader serves the steps that fit, and not one more, in this pass or any later."""
    limit = 0.5 * (spent(fits, kind) + spent(fits + 1, kind))
    life = begin(max_epsilon=limit, accountant=kind)
    assert not life.engine.budget_spent
    life.train()
    assert count(life) == life.steps == fits
    assert life.engine.budget_spent
    assert spent(fits, kind) * (1 - 1e-4) <= life.engine.get_epsilon() <= limit
    before = life.weights()
    assert list(life.loader) == []
    life.loss(torch.randn(3, 4), torch.randn(3, 1))
    life.optimizer.zero_grad()
    life.optimizer.step()  # a loop that steps anyway: there is no gradient
    assert torch.equal(life.weights(), before)
    assert count(life) == fits
    assert life.engine.completed_passes == fits // 5 < EPOCHS


def test_exactly_the_budget() -> None:
    """A limit that is met to the last digit is not exceeded."""
    assert count(begin(max_epsilon=spent(6)).train()) == 6
    assert count(begin(max_epsilon=spent(6) * (1 - 1e-9)).train()) == 5
    life = begin(max_epsilon=spent(6, "pld"), accountant="pld")
    life.train(lambda life: life.engine.get_epsilon() > spent(6, "pld"))  # asked at every step
    assert count(life) == 6


def test_parts_and_empty_draws() -> None:
    """A logical batch that was begun is finished; nobody drawn is a step like any other."""
    life = begin(max_epsilon=spent(2), max_physical_batch_size=1)
    with drawing([0, 1, 2], [3, 4], [5, 6, 7]):
        life.train()
    assert (count(life), life.steps) == (2, 5)
    for draws, steps in (([[], [], [], [1]], 0), ([[1], [], [], []], 1), ([[1], [2], [], [3]], 2)):
        life = begin(max_epsilon=spent(2))
        with drawing(*draws):
            life.train()
        assert (count(life), life.steps) == (2, steps)


def test_fixed_batches_pay_by_the_pass() -> None:
    """A pass that was paid for is finished; the next one is not begun."""
    limit = make_accountant("rdp").compose(Gaussian(1.0), 2).epsilon(1e-5)
    life = begin(max_epsilon=limit, poisson_sampling=False).train()
    assert (count(life), life.steps) == (2, 10)


def test_a_schedule_follows() -> None:
    """Each question is about the noise of the step that would come."""
    life = begin(max_epsilon=spent(8))

    def quieter(life: Life) -> None:
        life.engine.noise_multiplier = 1.0 if life.steps < 3 else 0.8

    life.train(quieter)
    judge = make_accountant("rdp").compose(STEP, 3)
    cheap = PoissonSampled(0.2, Gaussian(0.8))
    steps = 0
    while judge.compose(cheap).epsilon(1e-5) <= spent(8):
        steps += 1
    assert count(life) == 3 + steps < 8


def test_a_louder_step_is_asked_about_at_once() -> None:
    """What was found for one σ says nothing of the next."""
    life = begin(max_epsilon=spent(8))

    def change(life: Life) -> None:
        if life.steps == 2:
            life.engine.noise_multiplier = 0.3

    assert make_accountant("rdp").compose(STEP, 2).compose(PoissonSampled(0.2, Gaussian(0.3))).epsilon(1e-5) > spent(8)
    assert life.train(change).steps == 2
    life.engine.noise_multiplier = 1.0
    assert not life.engine.budget_spent
    assert life.train().steps == 8


def test_other_noise_beside(tmp_path: Path) -> None:
    """What another run releases with another σ counts as soon as it is in the ledger."""
    first = begin(ledger=tmp_path / "l", max_epsilon=spent(8))
    second = begin(ledger=tmp_path / "l", noise_multiplier=0.3)
    first.train(lambda life: life.steps == 2)
    second.train(lambda life: life.steps == 1)
    assert first.engine.budget_spent
    assert first.train().steps == 2


@pytest.mark.parametrize("stop", [0, 2, 3])
def test_runs_share_a_budget(stop: int, tmp_path: Path) -> None:
    """The limit is on everything in the ledger, before and beside."""
    begin(ledger=tmp_path / "l").train(lambda life: life.steps == 3)
    first = begin(ledger=tmp_path / "l", max_epsilon=spent(9))
    if stop:
        first.train(lambda life: life.steps == stop)
    second = begin(ledger=tmp_path / "l", max_epsilon=spent(9)).train()
    assert count(second) == 6 - stop
    assert first.engine.budget_spent
    first.train()
    assert count(first) == stop
    assert first.engine.get_epsilon() == pytest.approx(spent(stop) if stop else 0.0)


def test_two_runs_at_the_last_step(tmp_path: Path) -> None:
    """Both were given a batch, one step is left: the second one's step is refused, and nothing of it is released."""
    lives = [begin(ledger=tmp_path / "l", max_epsilon=spent(1)) for _ in range(2)]
    for life in lives:
        x, y = next(iter(life.loader))
        life.loss(x, y).backward()
    lives[0].optimizer.step()
    before = lives[1].weights()
    with refused(dpkit.BudgetExhaustedError, "epsilon"):
        lives[1].optimizer.step()
    assert torch.equal(lives[1].weights(), before)
    assert [count(life) for life in lives] == [1, 0]
    assert lives[1].train().steps == 0


def test_without_a_ledger_too() -> None:
    """What user code adds to the accountant between batch and step counts."""
    life = begin(max_epsilon=spent(2))
    x, y = next(iter(life.loader))
    life.loss(x, y).backward()
    life.engine.accountant.compose(STEP, 2)
    with refused(dpkit.BudgetExhaustedError):
        life.optimizer.step()


@pytest.mark.parametrize("kind", ["rdp", "pld"])
def test_a_resumed_run_stops_at_the_same_step(kind: str, tmp_path: Path) -> None:
    """Before and after its end; releases that are only repeated cost nothing more."""
    options: dict[str, Any] = {"max_epsilon": spent(8, kind), "accountant": kind}
    whole = begin(**options).train()
    for at in (4, 8):
        path = tmp_path / f"{at}"
        begin(ledger=path, **options).train(lambda life, at=at: life.steps == at and life.save(tmp_path / "c"))  # type: ignore[misc]
        life = begin(ledger=path, **options)
        life.load(tmp_path / "c")
        life.train()
        assert count(life) == 8
        assert torch.equal(life.weights(), whole.weights())
        assert life.engine.get_epsilon() <= spent(8, kind)


def test_what_makes_no_sense_is_refused() -> None:
    for options, word in (
        ({"max_epsilon": 1.0, "target_delta": None}, "target_delta"),
        ({"max_epsilon": 0.0}, "max_epsilon"),
        ({"max_epsilon": float("nan")}, "max_epsilon"),
        ({"max_epsilon": 5.0, "noise_multiplier": 0.0}, "first step"),
        ({"max_epsilon": spent(1) * 0.99}, "first step"),
    ):
        with refused(dpkit.ConfigurationError, word):
            begin(**options)  # type: ignore[arg-type]


def test_few_questions() -> None:
    """The accountant is asked once for many steps, not once a step."""
    budget = Budget(spent(1000), 1e-5, kind="rdp", adjacency="add_or_remove_one", expected=100)
    asked = 0
    real = budget._fits

    def fits(*arguments: Any) -> bool:
        nonlocal asked
        asked += 1
        return real(*arguments)

    budget._fits = fits  # type: ignore[method-assign]
    steps = 0
    while budget.admits({STEP: steps}, STEP):
        steps += 1
    assert steps == 1000
    assert asked < 30
    assert budget.most({}, STEP) == 1000
    assert budget.most({STEP: 999}, STEP) == 1
    assert budget.most({STEP: 1000}, STEP) == 0


def test_other_events_in_the_same_number() -> None:
    """What was spent on others is compared event by event."""
    budget = Budget(3.0, 1e-5, kind="rdp", adjacency="add_or_remove_one", expected=5)
    cheap, dear = Gaussian(1000.0), Gaussian(0.5)
    assert budget.admits({cheap: 1}, STEP)
    assert not budget.admits({dear: 1}, STEP)
