"""Adaptive clipping: C moves once a logical batch, by the noisy fraction of its own records; sum and count are one
Gaussian of the σ that was asked for. And schedules set by hand, counted as they were taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import TensorDataset

import dpkit
from dpkit.accountants import AccountingError, Gaussian, PoissonSampled, adaptive_clipping
from dpkit.clipping import AdaptiveClipping, learns, noises_of
from dpkit.noise import NoiseSource
from dpkit.secure import SecureNoise
from tests.oracle import clipped_sum, norm, per_record_grads
from tests.training import attach, data, drawing, mlp, squared_loss, train, weights, work

N, B = 8, 4


def losses(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def private(**options: Any) -> Any:
    options.setdefault("clipping", AdaptiveClipping(quantile=0.7, learning_rate=0.3))
    dataset = TensorDataset(*(v.double() for v in data(N).tensors))
    return attach(mlp().double(), dataset, B, **{"max_grad_norm": 0.5, **options})


DRAWS: list[list[int]] = [[0, 1, 2, 3, 4], [], [5], [0, 2, 4, 6, 7, 1], [3, 3 + 1], []]


@pytest.mark.parametrize("physical", [None, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_C_follows_the_definition(physical: int | None, reduction: str) -> None:
    """Without noise: C against the loop over single records, once a logical batch however it is served, empty ones
    included; and each step is clipped to the C it began with."""
    run = private(max_physical_batch_size=physical, loss_reduction=reduction)
    x, y = (v.double() for v in data(N).tensors)
    twin, bound, seen = mlp().double(), 0.5, [0.5]
    with torch.no_grad():
        expected = [p.clone() for p in twin.parameters()]
    for drawn in DRAWS:
        with torch.no_grad():
            for p, value in zip(twin.parameters(), expected, strict=True):
                p.copy_(value)
        batch = (x[drawn], y[drawn])
        norms = [float(norm(g)) for g in per_record_grads(twin, losses, batch, len(drawn))]
        total = clipped_sum(twin, losses, batch, len(drawn), bound)
        expected = [p.detach() - total[k] / B for k, p in twin.named_parameters()]
        count = sum(0.5 if size <= bound else -0.5 for size in norms)
        bound *= math.exp(-0.3 * (count / B + 0.5 - 0.7))
        seen.append(bound)
    taken: list[float] = []
    run.optimizer.register_step_post_hook(lambda *args: taken.append(run.engine.max_grad_norm))
    with drawing(*DRAWS):
        for batch in run.loader:
            values = losses(run.model, batch)
            (values.mean() if reduction == "mean" else values.sum()).backward()
            run.optimizer.step()
    moved = [c for k, c in enumerate(taken) if c != ([0.5, *taken])[k]]  # parts that take no step leave C alone
    assert moved == pytest.approx(seen[1:], rel=1e-12)
    assert run.engine.max_grad_norm == pytest.approx(bound, rel=1e-12)
    for p, value in zip(run.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value)


def noises_seen(run: Any, draws: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """(entries, standard deviation) of every noise that was added."""
    seen: list[tuple[int, float]] = []
    add_to = NoiseSource.add_to

    def spy(self: NoiseSource, sums: Sequence[Tensor], std: float) -> None:
        if sums:
            seen.append((sum(s.numel() for s in sums), std))
        add_to(self, sums, std)

    with mock.patch.object(NoiseSource, "add_to", spy), drawing(*draws):
        train(run)
    return seen


@pytest.mark.parametrize("count_noise", [None, 1.7])
def test_sum_and_count_cost_what_was_asked_for(count_noise: float | None) -> None:
    """The two noises that are really drawn, in every batch, amount to σ; so says the ledger."""
    sigma = 1.2
    run = private(noise_multiplier=sigma, clipping=AdaptiveClipping(count_noise=count_noise))
    bounds = [0.5]
    run.optimizer.register_step_post_hook(lambda *args: bounds.append(run.engine.max_grad_norm))
    seen = noises_seen(run, DRAWS)
    size = sum(p.numel() for p in run.model.parameters())
    assert [n for n, _ in seen] == [size, 1] * len(DRAWS)
    for (_, std), (_, count), bound in zip(seen[::2], seen[1::2], bounds, strict=False):
        assert count == (count_noise or 5 * sigma)
        joint = adaptive_clipping(std / bound, count).noise_multiplier
        assert sigma <= joint * (1 + 1e-15)
        assert joint == pytest.approx(sigma, rel=1e-12)
    assert len(set(bounds)) == len(DRAWS) + 1
    assert run.engine.accountant.ledger == ((PoissonSampled(B / N, Gaussian(sigma)), len(DRAWS)),)


@given(
    norms=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    bound=st.floats(0.1, 5),
    sigma=st.floats(0.3, 5),
    data=st.data(),
)
def test_one_record_moves_sum_and_count_by_one(norms: list[float], bound: float, sigma: float, data: Any) -> None:
    """In units of their own noises, sum and count together move by at most 1/σ, whoever is added or removed."""
    clipping = AdaptiveClipping()
    z, s = clipping.noises(sigma, 4.0)
    values = torch.tensor(norms, dtype=torch.float64)[:, None]
    others = values[torch.arange(len(norms)) != data.draw(st.integers(0, len(norms) - 1))]

    def query(of: Tensor) -> Tensor:
        total = (clipping.weights(of, bound) * of[:, 0]).sum() if len(of) else torch.tensor(0.0).double()
        return torch.stack([total / (z * bound), clipping.observed(of, bound).sum() / s])

    assert float((query(values) - query(others)).norm()) <= (1 + 1e-9) / sigma


def test_C_finds_the_quantile() -> None:
    """On fixed gradients, with noise: the fraction of unclipped records becomes the one that was asked for."""
    torch.manual_seed(0)
    scales = torch.rand(400, 1) * 3 + 0.5
    model = torch.nn.Linear(1, 1, bias=False)
    run = attach(
        model,
        TensorDataset(scales),
        100,
        lr=0.0,
        clipping=AdaptiveClipping(quantile=0.8),
        max_grad_norm=0.01,
        noise_multiplier=0.8,
        noise_generator=torch.Generator().manual_seed(0),
        loader={"generator": torch.Generator().manual_seed(1)},
    )
    for _ in range(25):
        for (x,) in run.loader:
            model(x).mean().backward()  # a record's gradient is its x
            run.optimizer.step()
    assert abs(float((scales <= run.engine.max_grad_norm).float().mean()) - 0.8) < 0.1


def test_empty_batches_move_C_by_noise_alone() -> None:
    run = private()
    with drawing([], [], []):
        train(run)
    assert run.engine.max_grad_norm == pytest.approx(0.5 * math.exp(-0.3 * 3 * (0.5 - 0.7)))
    noisy = private(noise_multiplier=1.0)
    with drawing([]):
        train(noisy)
    assert math.isfinite(noisy.engine.max_grad_norm)
    assert noisy.engine.max_grad_norm != pytest.approx(0.5 * math.exp(-0.3 * (0.5 - 0.7)), rel=1e-9)


def test_C_stays_positive_and_finite() -> None:
    clipping = AdaptiveClipping(learning_rate=100.0)
    bound = 1.0
    for observed in [1e30] * 50:
        bound = clipping.learned(bound, observed, 4.0)
    assert bound == 1e-12
    for observed in [-1e30] * 50:
        bound = clipping.learned(bound, observed, 4.0)
    assert bound == 1e12


def test_records_that_are_not_finite_are_not_counted() -> None:
    """They are none of the sum, and none of the count: C moves as by the others."""
    bounds = []
    for drawn in ([0, 1, 2], [0, 1, 2, 3]):
        run = private()
        with drawing(drawn):
            for x, y in run.loader:
                scale = torch.tensor([1.0, 1.0, 1.0, math.inf][: len(x)], dtype=torch.float64)
                (losses(run.model, (x, y)) * scale).mean().backward()
                run.optimizer.step()
        bounds.append(run.engine.max_grad_norm)
    assert run.engine.nonfinite_records == 1
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-12)


def test_C_set_by_hand_within_a_batch_stays() -> None:
    run = private()
    with drawing([0, 1], [2, 3]):
        for batch in run.loader:
            run.engine.max_grad_norm = 2.0
            work(run, batch)
            break
    assert run.engine.max_grad_norm == 2.0


@pytest.mark.parametrize("stop", range(1, 8))
def test_an_interrupted_run_goes_on_with_its_C(stop: int) -> None:
    """State in the middle of a pass and of a logical batch: C and the count so far are in it."""

    def start() -> Any:
        return private(
            noise_multiplier=0.7,
            max_physical_batch_size=2,
            noise_generator=torch.Generator().manual_seed(1),
            loader={"generator": torch.Generator().manual_seed(2)},
        )

    with drawing([0, 1, 2, 3, 4], [], [5, 6, 7], [0, 1, 6], [2]):
        whole = start()
        train(whole)
        run = start()
        saved = None
        for k, batch in enumerate(run.loader, 1):
            squared_loss(run.model, batch).backward()
            run.optimizer.step()
            if k == stop:
                saved = run.engine.state_dict()
                break
        assert saved is not None
        resumed = start()
        resumed.engine.load_state_dict(saved)
        train(resumed)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.engine.max_grad_norm == whole.engine.max_grad_norm


def test_with_secure_noise() -> None:
    engine = dpkit.PrivacyEngine(accountant="rdp", secure_mode=True)
    model = mlp()
    loader = torch.utils.data.DataLoader(data(), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[int] = []
    add_to = SecureNoise.add_to

    def spy(self: SecureNoise, sums: Sequence[Tensor], std: float) -> None:
        seen.append(len(sums))
        add_to(self, sums, std)

    engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, clipping="adaptive")
    with mock.patch.object(SecureNoise, "add_to", spy):
        for batch in engine._loader:
            squared_loss(model, batch).backward()
            optimizer.step()
    assert seen == [4, 1] * 2
    assert engine.max_grad_norm != 1.0


def test_what_is_refused() -> None:
    for bad in ({"quantile": 0.0}, {"quantile": 1.0}, {"learning_rate": 0.0}, {"count_noise": 0.0}):
        with pytest.raises(dpkit.ConfigurationError):
            AdaptiveClipping(**bad)  # type: ignore[arg-type]
    with pytest.raises(AccountingError, match="count_noise"):
        private(noise_multiplier=2.0, clipping=AdaptiveClipping(count_noise=0.9))
    run = private(noise_multiplier=1.0, clipping=AdaptiveClipping(count_noise=0.9))
    run.engine.noise_multiplier = 2.0
    before = weights(run.model)
    with pytest.raises(AccountingError, match="count_noise"):
        train(run)
    assert torch.equal(weights(run.model), before)


def test_the_count_is_part_of_the_release() -> None:
    """What is recorded before anybody sees it holds the noisy count too, so that a repeated run must repeat it."""
    run = private(noise_multiplier=1.0)
    sizes: list[list[int]] = []
    spending = run.engine._step.spending
    with (
        mock.patch.object(spending, "record", lambda event, release: sizes.append([r.numel() for r in release])),
        drawing([0, 1]),
    ):
        train(run)
    assert sizes == [[*(p.numel() for p in run.model.parameters()), 1]]


def test_others_do_not_learn() -> None:
    """Flat, automatic and per-layer clipping see no second noise and keep C."""
    for name in ("flat", "automatic", "per_layer"):
        run = private(clipping=name, noise_multiplier=1.0)
        assert not learns(run.engine._step.clipping)
        seen = noises_seen(run, DRAWS)
        assert len(seen) == len(DRAWS)
        assert run.engine.max_grad_norm == 0.5
        assert noises_of(run.engine._step.clipping, 1.0, 4.0) == (1.0, 0.0)


@settings(max_examples=25, deadline=None)
@given(
    schedule=st.lists(
        st.tuples(st.floats(0.1, 4), st.floats(0.1, 4), st.lists(st.integers(0, N - 1), unique=True)),
        min_size=1,
        max_size=5,
    ),
    clipping=st.sampled_from(["flat", "per_layer", "automatic", "adaptive"]),
    physical=st.sampled_from([None, 2]),
)
def test_schedules_are_counted_as_they_were_taken(schedule: Any, clipping: str, physical: int | None) -> None:
    """σ and C set before each logical batch, by hand: the noise has σ C of its own batch, the ledger its σ; what is
    set within a batch waits for the next."""
    run = private(clipping=clipping, max_physical_batch_size=physical, noise_multiplier=9.0)
    seen: list[tuple[int, float]] = []
    add_to = NoiseSource.add_to

    def spy(self: NoiseSource, sums: Sequence[Tensor], std: float) -> None:
        if sums:
            seen.append((sum(s.numel() for s in sums), std))
        add_to(self, sums, std)

    with mock.patch.object(NoiseSource, "add_to", spy):
        for sigma, bound, drawn in schedule:
            run.engine.noise_multiplier, run.engine.max_grad_norm = sigma, bound
            with drawing(drawn):
                for batch in run.loader:
                    run.engine.noise_multiplier, run.engine.max_grad_norm = 7.0, 8.0
                    work(run, batch)
    sums = [std for n, std in seen if n > 1]
    learning = clipping == "adaptive"
    expected = [(AdaptiveClipping().noises(sigma, B)[0] if learning else sigma) * bound for sigma, bound, _ in schedule]
    assert sums == pytest.approx(expected)
    flat = [event for event, n in run.engine.accountant.ledger for _ in range(n)]
    assert flat == [PoissonSampled(B / N, Gaussian(sigma)) for sigma, _, _ in schedule]
