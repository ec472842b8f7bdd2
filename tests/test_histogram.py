"""The histogram of norms: private, as a part of the release that σ pays for; and an open look without privacy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dpkit
from dpkit.accountants import AccountingError, Gaussian, PoissonSampled
from dpkit.clipping import HistogramClipping, NormHistogram
from tests.lives import begin
from tests.oracle import norm, per_record_grads
from tests.test_adaptive import DRAWS, B, N, losses, noises_seen, private
from tests.test_refusals import refused
from tests.training import attach, data, drawing, mlp, train, weights, work

EDGES = (0.5, 1.0, 1.5)


def counting(**options: Any) -> Any:
    return private(**{"clipping": HistogramClipping(EDGES), **options})


def single(model: Any, records: list[int]) -> list[float]:
    """The loop over single records: each one's norm."""
    x, y = (v.double() for v in data(N).tensors)
    return [float(norm(g)) for g in per_record_grads(model, losses, (x[records], y[records]), len(records))]


def by_definition(values: list[float]) -> list[int]:
    """How many values are in each (edge before, edge]."""
    below = [sum(v <= edge for v in values) for edge in EDGES]
    return [b - a for a, b in zip([0, *below], [*below, len(values)], strict=True)]


def ask(run: Any, records: list[int]) -> Tensor:
    x, y = (v.double() for v in data(N).tensors)
    norms: Tensor = run.engine.norms_of(losses, (x[records], y[records]))
    return norms


# --- the private histogram ---


@pytest.mark.parametrize("physical", [None, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_counts_are_those_of_single_records(physical: int | None, reduction: str) -> None:
    """Without noise, against the definition: each logical batch by its own C, however it is served."""
    run = counting(max_physical_batch_size=physical, loss_reduction=reduction, lr=0.0, max_grad_norm=2.8)
    expected, bound = torch.zeros(4), 2.8
    for drawn in DRAWS:
        expected += torch.tensor(by_definition([v / bound for v in single(mlp().double(), drawn)])) if drawn else 0
        if physical is None and drawn:
            bound *= 1.5
    with drawing(*DRAWS):
        for batch in run.loader:
            values = losses(run.model, batch)
            (values.mean() if reduction == "mean" else values.sum()).backward()
            run.optimizer.step()
            if physical is None:
                run.engine.max_grad_norm *= 1.5
    told = run.engine.norm_histogram
    assert list(told.counts) == expected.tolist()
    assert (told.steps, told.expected, told.std) == (len(DRAWS), B * len(DRAWS), 0.0)
    assert not told.private
    assert told.fraction_clipped == min(1.0, float(expected[2:].sum()) / (B * len(DRAWS)))
    assert min(expected) > 0


def test_clipping_is_flat() -> None:
    """The step is that of flat clipping: what is counted beside it changes nothing but its noise."""
    ends = []
    for clipping in ("flat", "histogram"):
        run = private(clipping=clipping)
        with drawing(*DRAWS):
            train(run)
        ends.append(weights(run.model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("count_noise", [None, 2.9])
def test_sum_and_histogram_cost_what_was_asked_for(count_noise: float | None) -> None:
    """The noises that are really drawn, in every batch, amount to σ; so says the ledger."""
    sigma = 1.2
    run = counting(noise_multiplier=sigma, clipping=HistogramClipping(EDGES, count_noise))
    seen = noises_seen(run, DRAWS)
    size = sum(p.numel() for p in run.model.parameters())
    assert [n for n, _ in seen] == [size, len(EDGES) + 1] * len(DRAWS)
    for (_, std), (_, count) in zip(seen[::2], seen[1::2], strict=True):
        assert count == (count_noise or 10 * sigma)
        joint = ((std / 0.5) ** -2 + count**-2) ** -0.5  # one record: C in the sum, 1 in one count
        assert sigma <= joint * (1 + 1e-15)
        assert joint == pytest.approx(sigma, rel=1e-12)
    assert run.engine.accountant.ledger == ((PoissonSampled(B / N, Gaussian(sigma)), len(DRAWS)),)
    told = run.engine.norm_histogram
    assert told.private
    assert told.std == pytest.approx((count_noise or 10 * sigma) * math.sqrt(len(DRAWS)))


@given(
    norms=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    bound=st.floats(0.1, 5),
    sigma=st.floats(0.3, 5),
    noise=st.none() | st.floats(5.1, 50),
    data=st.data(),
)
def test_one_record_moves_sum_and_histogram_by_one(
    norms: list[float], bound: float, sigma: float, noise: float | None, data: Any
) -> None:
    """In units of their own noises, sum and counts together move by at most 1/σ, whoever is added or removed."""
    clipping = HistogramClipping(count_noise=noise)
    z, s = clipping.noises(sigma, 4.0)
    values = torch.tensor(norms, dtype=torch.float64)[:, None]
    others = values[torch.arange(len(norms)) != data.draw(st.integers(0, len(norms) - 1))]

    def query(of: Tensor) -> Tensor:
        total = (clipping.weights(of, bound) * of[:, 0]).sum() if len(of) else torch.tensor(0.0).double()
        return torch.cat([total[None] / (z * bound), clipping.observed(of, bound).sum(0) / s])

    assert float((query(values) - query(others)).norm()) <= (1 + 1e-9) / sigma


def test_a_record_on_the_bound_is_not_clipped() -> None:
    """Counted as the clipping has it: norms of C and less are left alone; float32 norms, too."""
    clipping = HistogramClipping((1.0,))
    for bound in (0.1, 1.0, 1 / 3):
        norms = torch.tensor([[bound], [bound * (1 + 1e-6)]])
        observed = clipping.observed(norms, float(norms[0, 0]))
        assert observed.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_the_noise_is_on_the_counts() -> None:
    """Repeated, they vary as is said, about the truth."""
    run = counting(noise_multiplier=1.0, lr=0.0, max_grad_norm=2.8, noise_generator=torch.Generator().manual_seed(0))
    steps = 400
    truth = torch.tensor(by_definition([v / 2.8 for v in single(run.model, list(range(N)))])).double()
    seen, before = [], torch.zeros(4).double()
    with drawing(*[list(range(N))] * steps):
        for batch in run.loader:
            work(run, batch)
            now = torch.tensor(run.engine.norm_histogram.counts).double()
            seen.append(now - before)
            before = now
    noise = torch.stack(seen) - truth
    assert float(noise.std()) == pytest.approx(10.0, rel=0.08)
    assert float(noise.mean().abs()) < 4 * 10.0 / math.sqrt(4 * steps)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    options: dict[str, Any] = {"clipping": HistogramClipping(count_noise=30.0), "ledger": tmp_path / "l"}
    whole = begin(clipping=options["clipping"]).train()
    life = begin(**options)
    life.train(lambda life: life.steps == 4 and (life.save(tmp_path / "c") is None))
    life.engine.detach()
    again = begin(**options)
    again.load(tmp_path / "c")
    again.train()
    assert again.engine.norm_histogram == whole.engine.norm_histogram
    assert whole.engine.norm_histogram.steps == 15


def test_one_step_without_noise_is_not_private() -> None:
    nothing = HistogramClipping((1.0,)).nothing()
    counts = torch.tensor([3.0, 1.0])
    assert nothing.plus(counts, 2.0, 4.0).plus(counts, 2.0, 4.0).private
    for stds in ((0.0, 2.0), (2.0, 0.0), (2.0, 0.0, 2.0)):
        told = nothing
        for std in stds:
            told = told.plus(counts, std, 4.0)
        assert not told.private
    assert NormHistogram((1.0,), (5.0, -3.0), 1.0, 1, 4.0).fraction_clipped == 0.0
    assert nothing.fraction_clipped == 0.0


def test_what_is_refused() -> None:
    for edges in ((0.5, 2.0), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0), ()):
        with pytest.raises(dpkit.ConfigurationError):
            HistogramClipping(edges)
    with pytest.raises(dpkit.ConfigurationError, match="count_noise"):
        HistogramClipping(count_noise=-1.0)
    with pytest.raises(AccountingError, match="spend the whole budget"):
        counting(noise_multiplier=2.0, clipping=HistogramClipping(count_noise=2.0))
    with refused(dpkit.ConfigurationError, "correlated noise"):
        counting(noise_multiplier=1.0, noise=dpkit.BandedNoise(2))
    with refused(dpkit.ConfigurationError, "releases no histogram", "norms_of"):
        _ = attach(mlp()).engine.norm_histogram


# --- a look without privacy ---


@pytest.mark.parametrize("before", [False, True])
def test_norms_are_those_of_single_records(before: bool) -> None:
    """Before and after training began, in the midst of it, and inside a public pass."""
    run = private(clipping="flat", noise_multiplier=1.0)
    if not before:
        with drawing(*DRAWS):
            train(run)
    expected = single(run.model, [3, 1, 6])
    assert ask(run, [3, 1, 6]).tolist() == pytest.approx(expected, rel=1e-9)
    with run.engine.paused(), torch.no_grad():
        assert ask(run, [3, 1, 6]).tolist() == pytest.approx(expected, rel=1e-9)
        assert run.engine._attached().tape.paused


def test_a_look_changes_nothing() -> None:
    """Weights, gradients at hand, ledger, draws and noise go on as if nobody had looked."""
    ends = []
    for look in (False, True):
        run = private(
            clipping="flat",
            noise_multiplier=1.0,
            noise_generator=torch.Generator().manual_seed(0),
            loader={"generator": torch.Generator().manual_seed(1)},
            max_physical_batch_size=2,
        )
        if look:
            ask(run, [0, 1])
        for batch in run.loader:
            work(run, batch)
            grads = [p.grad for p in run.model.parameters()]
            if look:
                ask(run, [0, 5, 2])
            assert all(a is b for a, b in zip(grads, (p.grad for p in run.model.parameters()), strict=True))
        ends.append((weights(run.model), run.engine.accountant.ledger))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_looks_that_are_refused() -> None:
    run = private(clipping="flat")
    x, y = (v.double() for v in data(N).tensors)
    for bad in (lambda m, b: losses(m, b).mean(), lambda m, b: 3.0, lambda m, b: (m(b[0]) - b[1][:, 0]).square()):
        with refused(dpkit.ConfigurationError, "for 8 records"):
            run.engine.norms_of(bad, (x, y))
        assert run.engine._attached().tape.batch is None
    with refused(dpkit.ConfigurationError, "without tensors", "records="):
        run.engine.norms_of(lambda m, b: losses(m, (x, y)), "batch")
    assert len(run.engine.norms_of(lambda m, b: losses(m, (x, y)), "batch", records=8)) == 8
    with drawing([0, 1]):
        for batch in run.loader:
            with refused(dpkit.UnfinishedStepError, "in hand"):
                run.engine.norms_of(losses, (x, y))
            work(run, batch)
            run.engine.norms_of(losses, (x, y))
    with (
        mock.patch.object(run.engine._attached(), "shards", object()),
        refused(dpkit.ConfigurationError, "sharded over the ranks"),
    ):
        run.engine.norms_of(losses, (x, y))
    run.engine.detach()
    with pytest.raises(dpkit.NotAttachedError):
        run.engine.norms_of(losses, (x, y))
