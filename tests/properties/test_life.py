"""An engine's life, as Hypothesis imagines it: whatever the loop does, ledger, bound and the user's objects hold.

A machine drives one model through loaders, forwards, backwards, steps, interruptions, freezing, public passes,
detaching and checkpoints, in any order. It knows what should have been released (the oracle's loop over single
records at σ = 0) and compares after every rule:

- the ledger has one entry for each step taken on a drawn batch, and none else;
- weights move in a release by exactly the oracle's step, and otherwise in public passes only;
- while a batch is in hand no gradient lies in ``p.grad``, and between forwards every parameter is its own again.

Where a batch was disturbed half-way (frozen in between, an error in the backward), the step has no definition; there
the bound is held: the sum of n records' contributions is at most n C long.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.sampling import PoissonSampling
from tests.oracle import clip
from tests.training import weights

N, EXPECTED = 5, 2
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DRAWS = st.lists(st.lists(st.integers(0, N - 1), unique=True, max_size=4), max_size=4)
SCALES = st.sampled_from([1.0, 1e-3, 1e4])
HOWS = st.sampled_from(["plain", "strict", "twice on one graph", "two forwards"])


class Stop(Exception):
    """What the user's own code raises."""


class Small(nn.Module):
    """Layers with a rule, a parameter without one, a layer that joins later; stops half-way when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.late = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.stop: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) * self.scale
        if self.stop is not None:
            raise self.stop
        return self.last(y + self.late(y)).squeeze(-1)


@dataclass
class Expected:
    """A logical batch as it should be: Σ of clipped gradients of the parts that are closed, and the part in hand."""

    total: Tensor | None = None
    records: int = 0
    bound: float = 1.0
    disturbed: bool = False
    rows: list[int] = field(default_factory=list)  # in hand
    grads: list[dict[str, Tensor]] | None = None  # of the part in hand


class Life(RuleBasedStateMachine):
    rules_run = 0

    @initialize(
        physical=st.sampled_from([None, 1, 2]), seed=st.integers(0, 3), reduction=st.sampled_from(["mean", "sum"])
    )
    def attach(self, physical: int | None, seed: int, reduction: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = Small().double()
        self.model.late.requires_grad_(False)
        self.mine = dict(self.model.named_parameters())
        early = [p for name, p in self.mine.items() if not name.startswith("late")]
        self.optimizer = torch.optim.SGD(early, lr=1.0)
        self.engine = dpkit.PrivacyEngine(accountant="rdp")
        self.physical, self.reduction = physical, reduction
        self.draws: list[list[int]] = []
        machine = self

        def chosen(sampling: PoissonSampling, generator: torch.Generator) -> Iterator[list[int]]:
            return iter([list(drawn) for drawn in machine.draws])

        self.patch = mock.patch.object(PoissonSampling, "draws", chosen)
        self.patch.start()
        self.releases = 0
        self.saved: dict[str, Any] | None = None
        self.late_joined = False
        self._make_private()
        self.now = weights(self.model)

    def _make_private(self) -> None:
        loader = DataLoader(TensorDataset(torch.arange(N)), batch_size=EXPECTED)
        _, _, self.loader = self.engine.make_private(
            self.model,
            self.optimizer,
            loader,
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            loss_reduction=self.reduction,
            max_physical_batch_size=self.physical,
        )
        self.iterator: Iterator[Any] | None = None
        self.begun = False
        self.resumed: tuple[list[list[int]], int] | None = None
        self.abandoned: list[Iterator[Any]] = []
        self.parts: list[tuple[list[int], bool]] = []
        self.in_hand: tuple[list[int], bool] | None = None
        self.worked = False  # whether the part in hand was back-propagated
        self.expected: Expected | None = None
        self.grads_left = False  # public gradients lie in p.grad

    def teardown(self) -> None:
        if hasattr(self, "patch"):
            self.patch.stop()

    # ---- the loader

    def _schedule(self, draws: list[list[int]], logical: int = 0, part: int = 0) -> None:
        size = self.physical or N
        self.parts = []
        for k, drawn in enumerate(draws):
            pieces = [drawn[i : i + size] for i in range(0, len(drawn), size)] or [[]]
            for j, rows in enumerate(pieces):
                if (k, j) >= (logical, part):
                    self.parts.append((rows, j == len(pieces) - 1))

    @rule(draws=DRAWS)
    def begin_a_pass(self, draws: list[list[int]]) -> None:
        """And leave the one that was under way, wherever it was; its batch is in hand until this one's first."""
        if self.iterator is not None and self.begun:
            self.abandoned.append(self.iterator)
        if self.resumed is None:
            self.draws = draws
            self._schedule(draws)
        else:  # what comes after `restore` is the rest of the pass that was saved
            self.draws = self.resumed[0]
            self._schedule(*self.resumed)
        self.iterator, self.begun = iter(self.loader), False

    @precondition(lambda self: self.iterator is not None)
    @rule()
    def next_batch(self) -> None:
        assert self.iterator is not None
        if not self.begun:  # a generator: nothing has happened before its first batch is asked for
            self.begun, self.resumed = True, None
            self.in_hand, self.worked, self.expected = None, False, None
        held = self.in_hand
        if held is not None and held[1] and self.worked:
            with pytest.raises(dpkit.UnfinishedStepError):
                next(self.iterator)
            self._end_of_pass()
            return
        if held is not None:
            self._close_part()
            if held[1]:
                self.expected = None
        self.in_hand = None
        while self.parts and not self.parts[0][0]:  # nobody drawn: a step of its own
            self.parts.pop(0)
            self.releases += 1
            self.expected = None
        if not self.parts:
            with pytest.raises(StopIteration):
                next(self.iterator)
            self._end_of_pass()
            self.grads_left = False
            return
        rows, last = self.parts.pop(0)
        (index,) = next(self.iterator)
        assert index.tolist() == rows
        self.in_hand, self.worked, self.grads_left = (rows, last), False, False
        if self.expected is None:
            self.expected = Expected(bound=self.engine.max_grad_norm)
        self.expected.rows, self.expected.grads = rows, None

    def _end_of_pass(self) -> None:
        self.iterator, self.in_hand, self.expected, self.worked = None, None, None, False

    @precondition(lambda self: self.abandoned and self.iterator is not None and self.begun)
    @rule()
    def resume_an_abandoned_pass(self) -> None:
        """It ends, or is refused; nobody gets a batch of it."""
        with pytest.raises((dpkit.SamplingError, StopIteration)):
            next(self.abandoned.pop())

    # ---- forward and backward

    def _losses(self, rows: list[int], scale: float) -> Tensor:
        return (self.model(X[rows]) - Y[rows]).square() * scale

    def _oracle(self, rows: list[int], scale: float) -> list[dict[str, Tensor]]:
        """Each record's gradient of the trainable parameters, by plain autograd on a copy."""
        twin = Small().double()
        twin.load_state_dict(self.model.state_dict())
        names = [name for name, p in self.mine.items() if p.requires_grad]
        found = []
        for k in rows:
            loss = (twin(X[[k]]) - Y[[k]]).square().sum() * scale
            grads = torch.autograd.grad(loss, [twin.get_parameter(n) for n in names], allow_unused=True)
            found.append(
                {n: torch.zeros_like(self.mine[n]) if g is None else g for n, g in zip(names, grads, strict=True)}
            )
        return found

    @precondition(lambda self: self.in_hand is not None and any(p.requires_grad for p in self.mine.values()))
    @rule(
        scale=SCALES,
        how=HOWS,
    )
    def work(self, scale: float, how: str) -> None:
        assert self.in_hand is not None
        assert self.expected is not None
        rows = self.in_hand[0]
        reduce = torch.mean if self.reduction == "mean" else torch.sum
        times = 1
        losses = self._losses(rows, scale)
        if how == "strict":
            self.engine.backward(losses)
        elif how == "twice on one graph":
            times = 2
            reduce(losses).backward(retain_graph=True)
            reduce(losses).backward()
        elif how == "two forwards":
            times = 2
            reduce(losses + self._losses(rows, scale)).backward()
        else:
            reduce(losses).backward()
        self.worked = True
        grads = [{k: times * g for k, g in grad.items()} for grad in self._oracle(rows, scale)]
        held = self.expected.grads
        if held is not None and [g.keys() for g in held] == [g.keys() for g in grads]:
            grads = [{k: a[k] + b[k] for k in a} for a, b in zip(held, grads, strict=True)]
        elif held is not None:
            self.expected.disturbed = True
        self.expected.grads = grads

    def _close_part(self) -> None:
        """What the part in hand brings joins the logical batch."""
        e = self.expected
        if e is None or self.in_hand is None:
            return
        if e.grads is not None or e.disturbed:
            e.records += len(e.rows)
        if e.grads is not None:
            if any(self.mine[k].requires_grad is False for k in e.grads[0]):
                e.disturbed = True
            zero = {k: torch.zeros_like(p) for k, p in self.mine.items()}
            for grad in e.grads:
                vector = torch.cat([v.flatten() for v in {**zero, **clip(grad, e.bound)}.values()])
                e.total = vector if e.total is None else e.total + vector
        e.grads = None

    @rule(error=st.sampled_from([Stop, KeyboardInterrupt]))
    def error_in_the_forward(self, error: type[BaseException]) -> None:
        self.model.stop = error
        try:
            with pytest.raises(error):
                self.model(X[self.in_hand[0]] if self.in_hand is not None else X)
        finally:
            self.model.stop = None
        if error is KeyboardInterrupt:  # torch does not call the hooks that clean up; the next call of any kind does
            with torch.no_grad():
                self.model(X[:1])

    @precondition(lambda self: self.in_hand is not None and any(p.requires_grad for p in self.mine.values()))
    @rule()
    def error_in_the_backward(self) -> None:
        """After the last layer's gradient, before the first one's."""
        assert self.in_hand is not None
        assert self.expected is not None
        inner: list[Tensor] = []
        handle = self.model.first.register_forward_hook(lambda layer, args, out: inner.append(out))
        try:
            losses = self._losses(self.in_hand[0], 1.0)
        finally:
            handle.remove()

        def stop(grad: Tensor) -> None:
            raise Stop

        if inner[0].requires_grad:
            inner[0].register_hook(stop)
            with pytest.raises(Stop):
                losses.mean().backward()
        self.expected.disturbed = True
        assert self.engine._step is not None
        assert self.engine._step.tape.batch is not None
        self.worked = bool(self.engine._step.tape.batch.forms)

    @rule(
        rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=6),
        how=st.sampled_from(["no_grad", "inference", "eval"]),
    )
    def evaluate(self, rows: list[int], how: str) -> None:
        twin = Small().double()
        twin.load_state_dict(self.model.state_dict())
        with torch.inference_mode() if how == "inference" else torch.no_grad():
            if how == "eval":
                self.model.eval()
            torch.testing.assert_close(self.model(X[rows]).clone(), twin(X[rows]).detach())
            self.model.train()

    @rule(rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=6))
    def idle_forward(self, rows: list[int]) -> None:
        self.model(X[rows])

    @precondition(lambda self: self.in_hand is None and any(p.requires_grad for p in self.mine.values()))
    @rule()
    def public_gradients(self) -> None:
        """Between the steps: they are the user's own, and no step takes them."""
        self.optimizer.zero_grad()
        self._losses([0, 1, 2], 1.0).sum().backward()
        held = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.grads_left = bool(held)

    @rule()
    def public_step(self) -> None:
        """Inside `paused`, everything is ordinary."""
        with self.engine.paused():
            kept = {k: p.grad for k, p in self.mine.items()}
            self.optimizer.zero_grad()
            if any(p.requires_grad for p in self.mine.values()):
                (self._losses([0, 1], 1.0).sum() * 1e-3).backward()
            self.optimizer.step()
            for k, p in self.mine.items():
                p.grad = kept[k]
        self.now = weights(self.model)

    # ---- the step

    @rule()
    def step(self) -> None:
        before = weights(self.model)
        if self.in_hand is None:
            if self.grads_left:
                with pytest.raises(dpkit.DoubleUseError):
                    self.optimizer.step()
            else:
                self.optimizer.zero_grad()
                self.optimizer.step()
            assert torch.equal(weights(self.model), before)
            return
        e, last = self.expected, self.in_hand[1]
        assert e is not None
        self._close_part()
        try:
            self.optimizer.step()
        except dpkit.PrivacyError:
            if not e.disturbed:  # a backward that broke off proves nothing
                raise
            self.in_hand, self.expected, self.worked = None, None, False
            return
        self.in_hand, self.worked = None, False
        if not last:
            assert torch.equal(weights(self.model), before)
            assert all(p.grad is None for p in self.mine.values())
            return
        self.releases += 1
        moved = (before - weights(self.model)) * EXPECTED
        total = torch.zeros_like(moved) if e.total is None else e.total
        if e.disturbed:
            assert float(moved.norm()) <= max(e.records, len(e.rows)) * e.bound * (1 + 1e-5)
        else:
            frozen = torch.cat([torch.full((p.numel(),), not p.requires_grad) for p in self.mine.values()])
            # lives may diverge: a step is read off as the difference of two weights, which are rounded to their size
            rounding = 4 * EXPECTED * torch.finfo(before.dtype).eps * float(before.norm())
            assert float((moved - total).norm()) <= 1e-7 * max(1.0, float(total.norm())) + rounding
            assert not bool((moved[frozen] != 0).any())
        self.expected, self.now = None, weights(self.model)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)
        if to_none:
            self.grads_left = False

    @rule(draws=DRAWS, hows=st.lists(st.tuples(SCALES, HOWS, st.booleans()), min_size=1, max_size=6))
    def train(self, draws: list[list[int]], hows: list[tuple[float, str, bool]]) -> None:
        """A stretch of an ordinary loop, in which a forward or a step may be left out."""
        for scale, how, skips in hows:
            if self.iterator is None:
                self.begin_a_pass(draws)
            self.next_batch()
            if self.in_hand is not None:
                if not skips and any(p.requires_grad for p in self.mine.values()):
                    self.work(scale, how)
                if not skips or how == "plain":
                    self.step()

    # ---- what changes

    @rule(C=st.sampled_from([0.1, 1.0, 10.0]))
    def clip_otherwise(self, C: float) -> None:
        self.engine.max_grad_norm = C

    @rule(name=st.sampled_from(["first", "last", "scale"]), trains=st.booleans())
    def freeze(self, name: str, trains: bool) -> None:
        changed = False
        for key, p in self.mine.items():
            if key.startswith(name):
                changed |= p.requires_grad != trains
                p.requires_grad_(trains)
        if (
            changed
            and self.expected is not None
            and (self.expected.total is not None or self.expected.grads is not None)
        ):
            self.expected.disturbed = True

    @precondition(lambda self: not self.late_joined)
    @rule()
    def add_param_group(self) -> None:
        self.model.late.requires_grad_(True)
        self.optimizer.add_param_group({"params": list(self.model.late.parameters())})
        self.late_joined = True
        if self.expected is not None and (self.expected.total is not None or self.expected.grads is not None):
            self.expected.disturbed = True

    @rule()
    def detach_and_attach(self) -> None:
        self.engine.detach()
        assert all(not module._forward_pre_hooks and not module._forward_hooks for module in self.model.modules())
        self.optimizer.zero_grad()
        self._make_private()
        self.saved = None

    @rule()
    def checkpoint(self) -> None:
        self.saved = {
            "state": copy.deepcopy(self.engine.state_dict()),
            "weights": weights(self.model),
            "draws": self.draws,
            "groups": len(self.optimizer.param_groups),
        }

    @precondition(lambda self: self.saved is not None)
    @rule()
    def restore(self) -> None:
        """Back to the checkpoint with fresh draws and noise: what was released since stays counted."""
        assert self.saved is not None
        if self.saved["groups"] != len(self.optimizer.param_groups):
            with pytest.raises(dpkit.CheckpointError):
                self.engine.load_state_dict(self.saved["state"], replay=False)
            return
        self.engine.load_state_dict(self.saved["state"], replay=False)
        assert torch.equal(weights(self.model), self.saved["weights"])
        self.now = weights(self.model)
        inside = self.saved["state"]["loader"]["inside"]
        place = self.saved["state"]["loader"]["place"]
        if self.iterator is not None and self.begun:
            self.abandoned.append(self.iterator)
        self._end_of_pass()
        self.optimizer.zero_grad()
        self.grads_left = False
        self.resumed = (self.saved["draws"], place[0]) if inside else None
        self.begin_a_pass([])

    # ---- what always holds

    @invariant()
    def the_ledger_counts_every_release(self) -> None:
        type(self).rules_run += 1
        if hasattr(self, "engine"):
            assert sum(n for _, n in self.engine.accountant.ledger) == self.releases

    @invariant()
    def nothing_moved_unnoticed(self) -> None:
        if hasattr(self, "now"):
            assert torch.equal(weights(self.model), self.now)

    @invariant()
    def no_gradient_lies_about(self) -> None:
        if hasattr(self, "now") and self.in_hand is not None:
            assert all(p.grad is None for p in self.mine.values())

    @invariant()
    def the_model_is_its_own(self) -> None:
        if hasattr(self, "now"):
            assert all(self.model.get_parameter(k) is p for k, p in self.mine.items())
            assert self.engine._step is not None
            assert self.engine._step.tape.stack == []


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def live(lives: int, rules: int) -> int:
    """Run the machine; returns how many rules it went through."""
    Life.rules_run = 0
    run_state_machine_as_test(
        Life,
        settings=settings(max_examples=lives, stateful_step_count=rules, deadline=None, suppress_health_check=QUIET),
    )
    return Life.rules_run


def test_a_life() -> None:
    """A few hundred steps of it in every run of the suite."""
    assert live(40, 40) >= 500


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_lives() -> None:
    """At least 10,000 (`make stress`)."""
    assert live(400, 60) >= 10_000
