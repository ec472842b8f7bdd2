"""Accelerate: `prepare` before or after `make_private` leads to the plain loop's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpkit
from dpkit.accountants import epsilon
from tests.integrations.stacks import flat, train_plainly
from tests.test_refusals import refused
from tests.training import data, mlp

accelerate = pytest.importorskip("accelerate")

RECORDS, DELTA = 20, 1e-3


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square()


def prepared(when: str, *, accelerator: Any = None, batch_size: int = 4, **options: Any) -> tuple[Any, ...]:
    """Accelerator, engine, model, optimizer, scheduler and private loader."""
    accelerator = accelerate.Accelerator(cpu=True) if accelerator is None else accelerator
    model = mlp()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 40)
    loader: Any = DataLoader(data(RECORDS), batch_size, shuffle=True, generator=torch.Generator().manual_seed(3))
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, "target_delta": DELTA, **options}
    engine = dpkit.PrivacyEngine()
    if when == "before":
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model, optimizer, loader = engine.make_private(model, optimizer, loader, **options)
    if when == "after":
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    return accelerator, engine, model, optimizer, scheduler, loader


def train(parts: tuple[Any, ...], epochs: int = 3, *, strict: bool = False) -> None:
    accelerator, engine, model, optimizer, scheduler, loader = parts
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            losses = squared(model, batch)
            if strict:
                engine.backward(losses)
            else:
                accelerator.backward(losses.mean())
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_is_the_plain_loop(when: str, strict: bool) -> None:
    parts = prepared(when)
    train(parts, strict=strict)
    other = mlp()
    engine = train_plainly(
        other, data(RECORDS), squared, steps=15, batch_size=4, lr=lambda k: 0.5 * (1 - k / 40),
        noise_multiplier=0.0, max_grad_norm=0.5,
    )  # fmt: skip
    assert float((flat(parts[2]) - flat(mlp())).abs().max()) > 1e-2
    torch.testing.assert_close(flat(parts[2]), flat(other), rtol=1e-6, atol=1e-7)
    assert parts[1].accountant.ledger == engine.accountant.ledger


@pytest.mark.parametrize("when", ["before", "after"])
def test_epsilon(when: str) -> None:
    parts = prepared(when, noise_multiplier=1.1)
    train(parts)
    expected = epsilon(noise_multiplier=1.1, sample_rate=4 / RECORDS, steps=15, delta=DELTA)
    assert parts[1].get_epsilon() == pytest.approx(expected, rel=1e-4)


def test_batches_come_to_the_device() -> None:
    """Of a loader that was prepared before."""
    accelerator = accelerate.Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(data(RECORDS), 4))
    loader.device = torch.device("meta")
    model = mlp()
    engine = dpkit.PrivacyEngine()
    options: dict[str, Any] = {"noise_multiplier": 0.0, "max_grad_norm": 1.0}
    _, _, private = engine.make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), loader, **options)
    assert {v.device.type for v in next(iter(private))} == {"meta"}


def test_accumulation_of_its_own() -> None:
    """`accumulate` would put several draws into one step; the engine's physical batches are meant for that."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    _, engine, model, optimizer, _, loader = prepared("after", accelerator=accelerator)
    with refused(dpkit.UnfinishedStepError, "max_physical_batch_size"):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(squared(model, batch).mean())
                optimizer.step()
    assert engine.get_epsilon() == 0.0


def test_physical_batches() -> None:
    """`logical_batches` passes through `prepare`."""
    parts = prepared("after", max_physical_batch_size=2)
    accelerator, _, model, optimizer, scheduler, loader = parts
    for _ in range(3):
        for logical in loader.logical_batches():
            for batch in logical:
                accelerator.backward(squared(model, batch).mean())
            optimizer.step()
            scheduler.step()
    whole = prepared("before")
    train(whole)
    torch.testing.assert_close(flat(model), flat(whole[2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_saved_and_resumed(when: str, tmp_path: Path) -> None:
    """`register_for_checkpointing(engine)`: `save_state` and `load_state` carry the run, bit for bit."""
    options: dict[str, Any] = {"noise_multiplier": 1.0, "noise_generator": torch.Generator().manual_seed(5)}
    whole = prepared(when, **options)
    whole[0].register_for_checkpointing(whole[1])
    steps = 0
    accelerator, engine, model, optimizer, scheduler, loader = whole
    for _ in range(3):
        for batch in loader:
            accelerator.backward(squared(model, batch).mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps += 1
            if steps == 7:
                accelerator.save_state(str(tmp_path / "state"))
    _fresh_state()
    again = prepared(when, **{**options, "noise_generator": torch.Generator().manual_seed(6)})
    again[0].register_for_checkpointing(again[1])
    again[0].load_state(str(tmp_path / "state"))
    train(again, 3 - again[1].completed_passes)
    assert torch.equal(flat(again[2]), flat(model))
    assert again[1].accountant.ledger == engine.accountant.ledger


def _fresh_state() -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
