"""Adding or removing one record moves the real optimizer step by at most C, whatever the model, loss and data.

f(D) is what one noiseless step with SGD at learning rate 1 subtracts from the parameters, times the expected batch
size by which the engine divided. The models are drawn: widths, depths, kernels, lengths (equal to the number of records
on purpose), tied and stray parameters; so are the losses' scales: tiny, huge, not finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import models as m
from tests.cases import language_loss, squared
from tests.training import attach, drawing

WIDTH = st.integers(1, 5)
ACTIVATION = st.sampled_from([nn.Tanh, nn.GELU, nn.Sigmoid])


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


def squared_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return squared(model(x), y[:, 0].double())


def token_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return language_loss(model(x), y)


@st.composite
def mlps(draw: st.DrawFn) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Linear layers over 0 to 2 dimensions of positions, norms in between."""
    widths = draw(st.lists(WIDTH, min_size=2, max_size=4))
    bias, act = draw(st.booleans()), draw(ACTIVATION)
    norm = draw(st.sampled_from([nn.Identity, nn.LayerNorm, nn.RMSNorm, m.LayerScale, m.OnePlusRMSNorm]))
    first = draw(st.sampled_from([nn.Linear, m.EinsumLinear]))

    def build() -> nn.Module:
        layers: list[nn.Module] = [first(widths[0], widths[1])]
        for i, o in itertools.pairwise(widths[1:]):
            layers += [norm(i), act(), nn.Linear(i, o, bias=bias)]
        return nn.Sequential(*layers)

    return build, (*draw(st.sampled_from([(), (3,), (2, 3)])), widths[0])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Convolutions of 1 or 2 dimensions, with group or instance norm."""
    d, groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, stride, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    side, transposed, act = draw(st.integers(3, 6)), draw(st.booleans()), draw(ACTIVATION)
    conv = ((nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d))[d - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d)[d - 1]
    how = draw(st.sampled_from(["none", "group", "instance"]))

    def build() -> nn.Module:
        width = 2 * groups
        norms = {"none": nn.Identity(), "group": nn.GroupNorm(2, width), "instance": instance(width, affine=True)}
        first = conv(channels * groups, width, kernel, stride, padding, groups=groups)
        second = (nn.Conv1d, nn.Conv2d)[d - 1](width, 2, 1)
        return nn.Sequential(first, nn.Identity() if side < 5 else norms[how], act(), second)

    return build, (channels * groups, *[side] * d)


class TokenModel(nn.Module):
    """Tokens, learned positions (a table, an embedding or none), a class token, attention, a head that may be tied."""

    def __init__(
        self, vocab: int, width: int, length: int, positions: str, token: bool, tied: bool, bias: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width, padding_idx=0 if bias else None)
        self.table = nn.Parameter(torch.randn(length, width)) if positions == "table" else None
        self.embedded = nn.Embedding(length, width) if positions == "embedding" else None
        self.cls_token = nn.Parameter(torch.randn(1, 1, width)) if token else None
        self.attention = m.Attention(width, heads=1, causal=not bias, reach=length + token if bias else 0)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.table is not None:
            x = x + self.table
        if self.embedded is not None:
            x = x + self.embedded(torch.arange(tokens.shape[1]))
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.attention(x)
        return self.head(x if self.cls_token is None else x[:, 1:])


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


@st.composite
def problems(draw: st.DrawFn, least: int = 1, most: int = 6, wild: bool = True) -> Problem:
    """Any model with least to most records; `wild`: some records' losses are scaled by up to a million."""
    n, seed = draw(st.integers(least, most)), draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    kind = draw(st.sampled_from(["mlp", "convolution", "sequence", "shared"]))
    losses = squared_losses
    if kind == "sequence":
        length = draw(st.sampled_from([n, max(n - 1, 1), 2, 4]))  # T == B with and without the one record more
        vocab, width = draw(st.integers(2, 7)), draw(st.integers(1, 4))
        arguments = draw(
            st.tuples(st.sampled_from(["table", "embedding", "none"]), st.booleans(), st.booleans(), st.booleans())
        )
        build: Callable[[], nn.Module] = lambda: TokenModel(vocab, width, length, *arguments)  # noqa: E731
        inputs = torch.randint(0, vocab, (n, length), generator=generator)
        targets = inputs.roll(-1, 1).masked_fill(torch.rand(n, length, generator=generator) < 0.3, -100)
        losses = token_losses
    else:
        kinds = {"mlp": mlps(), "convolution": convolutions(), "shared": st.sampled_from(SHARED)}
        build, shape = draw(kinds[kind])
        inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        targets = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    sizes = st.sampled_from([1.0, 0.0, 1e-9, 1e-3, 1e3, 1e6, -1e6]) if wild else st.just(1.0)
    options = {
        "clipping": draw(st.sampled_from(["flat", "automatic", "per_layer"])),
        "loss_reduction": draw(st.sampled_from(["mean", "sum"])),
        "max_physical_batch_size": draw(st.sampled_from([None, None, 1, 2, 3])),
        "max_grad_norm": draw(st.sampled_from([1.0, 0.01, 30.0])),
    }
    scales = torch.tensor(draw(st.lists(sizes, min_size=n, max_size=n)), dtype=torch.float64)
    return Problem(build, inputs, targets, scales, losses, options, draw(st.booleans()), seed)


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
