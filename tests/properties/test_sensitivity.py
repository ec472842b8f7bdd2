"""Adding or removing one record moves the real optimizer step by at most C, whatever the model, loss and data.

f(D) is what one noiseless step with SGD at learning rate 1 subtracts from the parameters, times the expected batch
size by which the engine divided. The models are drawn: widths, depths, kernels, lengths (equal to the number of records
on purpose), tied and stray parameters; so are the losses' scales: tiny, huge, not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpkit.testing import ModuleCase, clipping_cases, modules
from tests import models as m
from tests.training import attach, drawing


@dataclass(frozen=True)
class Problem:
    """A model, records [n, ...], one loss a record, and how to train on them."""

    build: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    scales: Tensor
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]
    options: dict[str, Any]
    strict: bool
    seed: int

    @property
    def n(self) -> int:
        return len(self.inputs)

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.build().to(torch.float64)

    def f(self, records: Sequence[int], owners: Sequence[int] | None = None, **options: Any) -> tuple[Tensor, int]:
        """f(D) for the data set of these records, and how many (of the ``owners`` they are of) were not finite."""
        model = self.model()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        dataset = list(records) or [0]  # nobody: a data set of one, who is not drawn

        def collate(rows: list[int]) -> tuple[Tensor, ...]:
            return tuple(v[rows] for v in (self.inputs, self.targets, self.scales))

        units = len(records)
        if owners is not None and records:
            options["privacy_unit"] = [owners[k] for k in records]
            units = len(set(options["privacy_unit"]))
        options = {**self.options, **options}
        run = attach(model, dataset, units or 1, loader={"collate_fn": collate}, **options)
        assert run.engine.sample_rate == 1.0
        with drawing(range(units)):
            for x, y, s in run.loader:
                run.optimizer.zero_grad()
                losses = self.losses(model, x, y) * s
                if self.strict:
                    run.engine.backward(losses)
                else:
                    (losses.mean() if self.options["loss_reduction"] == "mean" else losses.sum()).backward()
                run.optimizer.step()
        assert sum(count for _, count in run.engine.accountant.ledger) == 1
        moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
        return moved * run.engine.expected_batch_size, run.engine.nonfinite_records


SHARED: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (m.TwoNames, (5,)),
    (m.TwoNames, (4, 5)),
    (m.CalledTwice, (6, 5)),
    (m.SharedWeight, (3, 4)),
    (m.TiedAutoencoder, (6,)),
    (m.VisionTransformer, (3, 8, 8)),
    (m.PermutedBlock, (5, 3, 4)),
    (m.LearnedQueries, (3, 4)),
    (m.Unused, (4,)),
]


SHARED_CASES = st.sampled_from(SHARED).map(
    lambda pair: ModuleCase(
        pair[0], lambda n, generator: torch.randn(n, *pair[1], generator=generator, dtype=torch.float64)
    )
)


@st.composite
def problems(draw: st.DrawFn, least: int = 1, most: int = 6, wild: bool = True) -> Problem:
    """Any model with least to most records; `wild`: some records' losses are scaled by up to a million."""
    case = draw(clipping_cases(modules=st.one_of(modules(), SHARED_CASES), least=least, most=most, wild=wild))
    given = case.module
    return Problem(
        given.build, case.inputs, case.targets, case.scales, given.losses, case.options, case.strict, case.seed
    )


relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(problem=problems(), data=st.data())
def test_one_record_moves_the_step_by_at_most_C(problem: Problem, data: st.DataObject) -> None:
    """‖f(D ∪ {x}) − f(D)‖ ≤ C (1 + 1e-5); D may be empty."""
    x = data.draw(st.integers(0, problem.n - 1), label="the record that is removed")
    others = [k for k in range(problem.n) if k != x]
    gap = float((problem.f(range(problem.n))[0] - problem.f(others)[0]).norm())
    assert gap <= problem.options["max_grad_norm"] * (1 + 1e-5)


@relaxed
@given(problem=problems(), data=st.data())
def test_one_unit_moves_the_step_by_at_most_C(problem: Problem, data: st.DataObject) -> None:
    """The same for a unit of several records, however many, averaged or summed, whole or in physical batches."""
    owners = data.draw(st.lists(st.integers(0, 2), min_size=problem.n, max_size=problem.n), label="owners")
    options: dict[str, Any] = {"unit_reduction": data.draw(st.sampled_from(["mean", "sum"]))}
    options["max_physical_batch_size"] = data.draw(st.sampled_from([None, problem.n]))
    others = [k for k in range(problem.n) if owners[k] != owners[0]]
    gap = float((problem.f(range(problem.n), owners, **options)[0] - problem.f(others, owners, **options)[0]).norm())
    assert gap <= problem.options["max_grad_norm"] * (1 + 1e-5)


@relaxed
@given(problem=problems(least=2))
def test_a_step_is_the_sum_of_single_records(problem: Problem) -> None:
    """f(D) is the sum over its records of f({x}): nothing else enters, and none twice."""
    whole = problem.f(range(problem.n))[0]
    parts = torch.stack([problem.f([k])[0] for k in range(problem.n)]).sum(0)
    assert (whole - parts).norm() <= 1e-7 * problem.n * problem.options["max_grad_norm"]


@relaxed
@given(problem=problems(least=2), data=st.data())
def test_order_does_not_matter(problem: Problem, data: st.DataObject) -> None:
    """Records in another order give the same step."""
    order = data.draw(st.permutations(range(problem.n)))
    gap = (problem.f(range(problem.n))[0] - problem.f(order)[0]).norm()
    assert gap <= 1e-7 * problem.n * problem.options["max_grad_norm"]


@relaxed
@given(problem=problems(least=2), size=st.integers(1, 6))
def test_physical_batches_do_not_matter(problem: Problem, size: int) -> None:
    """However a logical batch is served, the step is the same."""
    whole = problem.f(range(problem.n), max_physical_batch_size=None)[0]
    split = problem.f(range(problem.n), max_physical_batch_size=size)[0]
    assert (whole - split).norm() <= 1e-7 * problem.n * problem.options["max_grad_norm"]


@relaxed
@given(problem=problems(wild=False), data=st.data())
def test_records_that_are_not_finite_are_zeroed_and_counted(problem: Problem, data: st.DataObject) -> None:
    """NaN and infinite gradients: the step is that of the other records, and the engine says how many there were."""
    bad = data.draw(st.lists(st.sampled_from([1.0, math.nan, math.inf]), min_size=problem.n, max_size=problem.n))
    good = [k for k in range(problem.n) if math.isfinite(bad[k])]
    expected = problem.f(good)[0]
    spoilt = torch.tensor(bad, dtype=torch.float64)
    problem.scales.mul_(spoilt)
    if problem.inputs.is_floating_point() and data.draw(st.booleans(), label="the inputs too"):
        problem.inputs[torch.isnan(spoilt)] = math.nan
    moved, count = problem.f(range(problem.n))
    zero_anyway = count < problem.n - len(good) and _without_gradient(problem, bad)
    assert count == problem.n - len(good) or zero_anyway
    assert torch.isfinite(moved).all()
    assert (moved - expected).norm() <= 1e-7 * problem.n * problem.options["max_grad_norm"]


def _without_gradient(problem: Problem, bad: Sequence[float]) -> bool:
    """Whether a spoilt record has no counted token, so that its loss has no gradient at all."""
    return any(not math.isfinite(b) and bool((t == -100).all()) for b, t in zip(bad, problem.targets, strict=True))


def test_overflow_in_float32() -> None:
    """Gradients whose squares overflow are not finite either, in every form; they do not spoil the others' sum."""
    for model, shape in (
        (nn.Linear(4, 3), (4,)),
        (nn.Linear(4, 3), (50, 4)),
        (nn.Conv2d(4, 3, 2), (4, 3, 3)),
        (m.LayerScale(4), (3, 4)),
    ):
        dataset = [(torch.ones(shape), s) for s in (1.0, 1e30, 1.0)]
        run = attach(model, dataset, loss_reduction="sum")
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        for x, scale in run.loader:
            (model(x).flatten(1).sum(1) * scale).sum().backward()
            run.optimizer.step()
        moved = (nn.utils.parameters_to_vector(model.parameters()).detach() - before).norm() * 3
        assert run.engine.nonfinite_records == 1
        torch.testing.assert_close(moved, torch.tensor(2.0))
