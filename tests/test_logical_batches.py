"""A loop over logical batches counts optimizer steps, whoever was drawn; model and optimizer may be saved by others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import dpkit
from tests.lives import EPOCHS, Life, begin
from tests.test_checkpoint import assert_same
from tests.test_refusals import refused
from tests.training import Run, attach, data, drawing, mlp, squared_loss, train, weights

DRAWS: tuple[list[int], ...] = ([], [0, 1, 2, 3, 4], [], [], [5], [6, 7, 0], [])


def attached(**options: Any) -> Run:
    return attach(mlp(), data(), 4, noise_multiplier=0.8, noise_generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("size", [None, 2])
def test_one_item_a_step(size: int | None) -> None:
    """Weights and ε are those of the plain loop; each draw is one item, its parts inside, none where nobody was."""
    plain, logical = attached(max_physical_batch_size=size), attached(max_physical_batch_size=size)
    with drawing(*DRAWS):
        train(plain)
        shapes = []
        for parts in logical.loader.logical_batches():
            shapes.append([])
            for batch in parts:
                shapes[-1].append(len(batch[0]))
                logical.engine.backward((logical.model(batch[0]) - batch[1]).square())
            logical.optimizer.step()
    assert shapes == ([[], [5], [], [], [1], [3], []] if size is None else [[], [2, 2, 1], [], [], [1], [2, 1], []])
    assert torch.equal(weights(plain.model), weights(logical.model))
    assert plain.engine.get_epsilon(1e-5) == logical.engine.get_epsilon(1e-5) > 0
    assert plain.engine.completed_passes == logical.engine.completed_passes == 1


def test_parts_left_behind() -> None:
    run = attached(max_physical_batch_size=2)
    with drawing([0, 1, 2]), refused(dpkit.UnfinishedStepError, "before all parts", "go through all parts"):
        for parts in run.loader.logical_batches():
            next(parts)
            run.optimizer.step()
    assert run.engine.get_epsilon(1e-5) == 0.0


def test_ends_with_the_budget() -> None:
    run = attached(max_epsilon=20.0, target_delta=1e-5)
    steps = 0
    for _ in range(40):
        for parts in run.loader.logical_batches():
            for batch in parts:
                squared_loss(run.model, batch).backward()
            run.optimizer.step()
            steps += 1
    assert run.engine.budget_spent
    assert 0 < run.engine.get_epsilon() <= 20.0
    assert sum(n for _, n in run.engine.accountant.ledger) == steps < 80


def walk(life: Life, folder: Path | None = None) -> Life:
    """Training by logical batches, with chance used and everything saved between the steps."""
    for _ in range(life.engine.completed_passes, EPOCHS):
        for parts in life.loader.logical_batches():
            for x, y in parts:
                life.optimizer.zero_grad()
                life.loss(x, y).backward()
            life.optimizer.step()
            life.scheduler.step()
            life.steps += 1
            torch.rand(3)  # an evaluation, say
            if folder is not None:
                life.save(folder / str(life.steps))
    return life


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4, "max_physical_batch_size": 2}])
def test_resumed_after_any_step(options: dict[str, Any], tmp_path: Path) -> None:
    """Also after a draw of nobody, when the next batch has been fetched already."""
    whole = walk(begin(**options), tmp_path)
    assert whole.steps == EPOCHS * 20 // options["batch_size"]
    for at in range(1, whole.steps, 2 if options["batch_size"] == 1 else 1):
        life = begin(**options)
        life.load(tmp_path / str(at))
        assert_same(walk(life), whole)


def test_state_without_weights() -> None:
    """What others have saved of model and optimizer is compared; then the run goes on bit for bit."""
    whole = begin()

    def keep(life: Life) -> None:
        if life.steps == 4:
            held.update(engine=life.engine.state_dict(weights=False), scheduler=life.scheduler.state_dict())
            held.update(model=life.model.state_dict(), optimizer=life.optimizer.state_dict())
            held.update(copy.deepcopy(held))

    held: dict[str, Any] = {}
    whole.train(keep)
    assert {"model", "optimizer"}.isdisjoint(held["engine"])
    life = begin()
    with refused(dpkit.CheckpointError, "model and optimizer", "load them first"):
        life.engine.load_state_dict(held["engine"])
    life.model.load_state_dict(held["model"])
    with refused(dpkit.CheckpointError, "model and optimizer", "load them first"):
        life.engine.load_state_dict(held["engine"])
    assert life.engine.get_epsilon() == 0.0
    life.optimizer.load_state_dict(held["optimizer"])
    life.engine.load_state_dict(held["engine"])
    life.scheduler.load_state_dict(held["scheduler"])
    life.steps = 4
    assert_same(life.train(), whole)
