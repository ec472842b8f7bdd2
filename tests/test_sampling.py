"""Who takes part in a step, how a batch is served, and what it costs: sampling, schedules and ledger hold together.

Statistical tests use fixed seeds; each states how often it would fail for a fresh seed with the right code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import dpkit
from dpkit.accountants import Gaussian, PoissonSampled, RDPAccountant, epsilon
from dpkit.randomness import BatchChance
from dpkit.sampling import PoissonSampling
from tests.training import Run, attach, data, drawing, mlp, squared_loss, train, weights, work

ALARM = 1e-6


def draws(records: int, batch_size: int, steps: int, seed: int = 0) -> Iterator[list[int]]:
    return PoissonSampling(records, batch_size, steps).draws(torch.Generator().manual_seed(seed))


def indexed(n: int = 8) -> TensorDataset:
    """Records that know their own index."""
    return TensorDataset(torch.arange(n), *data(n).tensors)


def served(run: Run) -> list[list[int]]:
    """One pass over the loader of `indexed` records, with a step on each batch."""
    seen = []
    for index, x, y in run.loader:
        seen.append(index.tolist())
        work(run, (x, y))
    return seen


def events(run: Run) -> list[tuple[Any, int]]:
    return list(run.engine.accountant.ledger)


# --- the draws ---


@pytest.fixture(params=["a number each", "a byte each first"])
def drawing_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few records, and as if they were many."""
    if request.param != "a number each":
        monkeypatch.setattr("dpkit.sampling._MANY", 0)


def test_many_records_are_drawn_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the tests below would not notice."""
    few = list(draws(500, 25, 5))
    monkeypatch.setattr("dpkit.sampling._MANY", 0)
    assert list(draws(500, 25, 5)) != few


@pytest.mark.usefixtures("drawing_way")
def test_batch_sizes_are_binomial() -> None:
    """Mean and variance of 2,000 draws of 500 records at q = 0.05 (fails for 2e-6 of the seeds)."""
    sizes = np.array([len(d) for d in draws(500, 25, 2000)])
    total = sizes.sum()
    assert stats.binom.ppf(ALARM / 2, 500 * 2000, 0.05) <= total <= stats.binom.isf(ALARM / 2, 500 * 2000, 0.05)
    spread = float(((sizes - 25) ** 2).sum()) / (500 * 0.05 * 0.95)
    assert stats.chi2.ppf(ALARM / 4, 2000) <= spread <= stats.chi2.isf(ALARM / 4, 2000)


@pytest.mark.usefixtures("drawing_way")
def test_every_record_is_drawn_alike() -> None:
    """Frequencies of 500 records in 2,000 draws (chi-square; fails for 1e-6 of the seeds)."""
    counts = np.bincount(np.concatenate([np.array(d, int) for d in draws(500, 25, 2000)]), minlength=500)
    assert len(counts) == 500
    assert float(((counts - 100) ** 2).sum()) / 95 <= stats.chi2.isf(ALARM, 500)


@pytest.mark.usefixtures("drawing_way")
def test_draws_are_independent() -> None:
    """Between successive steps and between neighbouring records: overlaps are chance's (fails for 3e-6)."""
    taken = np.zeros((2000, 200))
    for row, drawn in zip(taken, draws(200, 40, 2000), strict=True):
        row[drawn] = 1
    centred = (taken - 0.2) / 0.4
    for products in (centred[1:] * centred[:-1], centred[2:] * centred[:-2], centred[:, 1:] * centred[:, :-1]):
        z = products.sum() / np.sqrt(products.size)
        assert abs(z) <= stats.norm.isf(ALARM / 2)


def test_passes_differ_and_repeat_with_their_generator() -> None:
    """Another pass is another draw; the loader's generator repeats all of them."""

    def two_passes(seed: int) -> list[list[list[int]]]:
        run = attach(mlp(), indexed(64), 8, loader={"generator": torch.Generator().manual_seed(seed)})
        return [served(run), served(run)]

    first, second = two_passes(1)
    assert first != second
    assert two_passes(1) == [first, second]
    assert two_passes(2) != [first, second]


def test_tiny_rates_are_exact() -> None:
    """q = 2^-30 of 2^24 records: with float32 numbers, whose steps are 2^-24, 64 times as many would be drawn.

    20 draws hold 0.3 records on average, not 20 (fails for 1e-7 of the seeds with the right rate, 3e-4 with the wrong).
    """
    records = 1 << 24
    drawn = PoissonSampling(records, records * 2.0**-30, 20).draws(torch.Generator().manual_seed(0))
    assert sum(len(d) for d in drawn) < 7


@pytest.mark.parametrize("rate", [1.0, 0.999, 255 / 256, 0.5, 0.3, 0.0045, 1 / 256, 1 / 257, 1e-3, 1e-5])
def test_rates_of_many_records(rate: float) -> None:
    """Where a byte decides alone, where it decides nothing, and in between (fails for 1e-6 of the seeds)."""
    records = (1 << 17) + 3
    drawn = [len(d) for d in PoissonSampling(records, records * rate, 20).draws(torch.Generator().manual_seed(0))]
    n = 20 * records
    assert stats.binom.ppf(ALARM / 2, n, rate) <= sum(drawn) <= stats.binom.isf(ALARM / 2, n, rate)


def test_sampling_rate_and_length() -> None:
    """q = B / N; a pass has as many steps as the loader had batches; all sizes are the engine's to tell."""
    for drop_last, steps in ((False, 4), (True, 3)):
        run = attach(mlp(), data(10), 3, loader={"drop_last": drop_last, "shuffle": True})
        assert len(run.loader) == steps
        assert run.engine.sample_rate == pytest.approx(0.3)
        assert run.engine.expected_batch_size == 3
        train(run)
        assert sum(n for _, n in events(run)) == steps
        run.engine.detach()


def test_subset() -> None:
    """A Subset is a data set like any other: rate and draws are those of the part."""
    run = attach(mlp(), Subset(indexed(100), [3, 50, 97]), 3)
    assert served(run) == [[3, 50, 97]]


# --- the loader's manners ---


@dataclass
class Record:
    """A user's own kind of batch."""

    x: Tensor
    y: Tensor


def as_dict(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    index, x, y = (torch.stack(v) for v in zip(*rows, strict=True))
    return {"index": index, "x": x, "y": y}


def as_dataclass(rows: list[tuple[Tensor, ...]]) -> Record:
    batch = as_dict(rows)
    return Record(batch["x"], batch["y"])


def as_encoding(rows: list[tuple[Tensor, ...]]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(as_dict(rows))


class TakesAnything(nn.Module):
    """A model that is called on the whole batch object."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, batch: Any) -> Tensor:
        x = batch[1] if isinstance(batch, list | tuple) else batch.x if isinstance(batch, Record) else batch["x"]
        return self.body(x)


@pytest.mark.parametrize("physical", [None, 3])
@pytest.mark.parametrize("collate", [None, as_dict, as_dataclass, as_encoding])
def test_kinds_of_batches(collate: Any, physical: int | None) -> None:
    """Tuples, dicts, dataclasses, BatchEncoding: served by the user's collate_fn, and taken by the model whole."""
    model = TakesAnything()
    run = attach(model, indexed(), loader={"collate_fn": collate}, max_physical_batch_size=physical)
    expected = attach(mlp(), max_physical_batch_size=physical)
    for batch in run.loader:
        y = batch[2] if collate is None else batch.y if isinstance(batch, Record) else batch["y"]
        (model(batch) - y).square().mean().backward()
        run.optimizer.step()
    train(expected)
    torch.testing.assert_close(weights(model), weights(expected.model))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers(workers: int) -> None:
    """Workers run ahead of the user: empty draws and physical parts still come in their order."""
    loader = {"num_workers": workers, "prefetch_factor": 4, "persistent_workers": True} if workers else {}
    run = attach(mlp(), indexed(), 4, loader=loader, max_physical_batch_size=3, noise_multiplier=1.0)
    with drawing([], [0, 1, 2, 3, 4], [], [], [5], [6, 7], []):
        for k in (1, 2):  # persistent workers serve a second pass, too
            assert served(run) == [[0, 1, 2], [3, 4], [5], [6, 7]]
            assert events(run) == [(PoissonSampled(0.5, Gaussian(1.0)), 7 * k)]


def test_loader_options_are_kept() -> None:
    """What the user chose for the loader stays chosen."""
    generator = torch.Generator()
    options: dict[str, Any] = {"num_workers": 2, "timeout": 7, "prefetch_factor": 3, "worker_init_fn": print}
    given = DataLoader(data(), 4, collate_fn=as_dict, generator=generator, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, _, loader = dpkit.PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=given, noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert isinstance(loader, DataLoader)
    for name in ("dataset", "num_workers", "timeout", "prefetch_factor"):
        assert getattr(loader, name) is getattr(given, name), name
    assert isinstance(loader.collate_fn, BatchChance)  # the workers' chance is the batch's own; what they do is kept
    assert (loader.collate_fn.collate.collate, loader.collate_fn.init) == (as_dict, print)
    assert loader.batch_sampler.generator is generator  # type: ignore[union-attr]


# --- empty draws ---


def test_empty_draws_are_steps() -> None:
    """Nobody drawn: user code is not called, weights move by noise, hooks run, the ledger counts it."""
    run = attach(mlp(), indexed(), 4, noise_multiplier=1.0)
    moved: list[bool] = []
    before = weights(run.model)

    def note(*_: Any) -> None:
        nonlocal before
        moved.append(not torch.equal(weights(run.model), before))
        before = weights(run.model)

    run.optimizer.register_step_post_hook(note)
    with drawing([], [], [1, 2], []):
        assert served(run) == [[1, 2]]
    assert moved == [True] * 4
    assert events(run) == [(PoissonSampled(0.5, Gaussian(1.0)), 4)]


def test_nothing_but_empty_draws() -> None:
    run = attach(mlp(), indexed(), 4, noise_multiplier=1.0)
    with drawing([], []):
        assert served(run) == []
    assert events(run) == [(PoissonSampled(0.5, Gaussian(1.0)), 2)]


def test_empty_draws_never_reach_the_user() -> None:
    """At q = 1/50, a third of the draws are empty; none is served, all are accounted."""
    run = attach(mlp(), indexed(50), 1, noise_multiplier=1.0, loader={"generator": torch.Generator().manual_seed(0)})
    batches = served(run)
    assert all(batches)
    assert len(batches) < 45
    assert events(run) == [(PoissonSampled(0.02, Gaussian(1.0)), 50)]


@pytest.mark.parametrize("rows", [6, 10])
@pytest.mark.parametrize("poisson", [True, False])
def test_a_data_set_that_changed_its_length(poisson: bool, rows: int) -> None:
    """Who is drawn was settled with the length that it had: the next pass is refused, and costs nothing."""
    rows_now = list(data(8))
    run = attach(mlp(), rows_now, 4, poisson_sampling=poisson, noise_multiplier=1.0)  # type: ignore[arg-type]
    train(run)
    spent = events(run)
    rows_now[:] = list(data(rows))
    with pytest.raises(dpkit.SamplingError, match=f"{rows} rows now, and had 8"):
        train(run)
    assert events(run) == spent


# --- leaving the loop ---


@pytest.mark.parametrize("stepped", [True, False])
def test_break_in_a_logical_batch(stepped: bool) -> None:
    """Its parts are dropped, unreleased; the next pass is as if they had never been, and skips no step."""
    run, fresh = (attach(mlp(), indexed(), 4, max_physical_batch_size=2) for _ in range(2))
    with drawing([0, 1, 2, 3, 4], [5]):
        for _, x, y in run.loader:
            squared_loss(run.model, (x, y)).backward()
            if stepped:
                run.optimizer.step()
            break
        assert events(run) == []
        assert torch.equal(weights(run.model), weights(fresh.model))
        assert served(run) == served(fresh) == [[0, 1], [2, 3], [4], [5]]
    assert events(run) == events(fresh) != []
    assert torch.equal(weights(run.model), weights(fresh.model))


def test_only_the_last_part_steps() -> None:
    """After every other part, optimizer.step() moves nothing, momentum and weight decay included."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    run = attach(model, indexed(), 4, optimizer=optimizer, max_physical_batch_size=2, noise_multiplier=1.0)
    moved = []
    with drawing([0, 1, 2, 3, 4], [5, 6]):
        for _, x, y in run.loader:
            before = weights(model)
            work(run, (x, y))
            moved.append(not torch.equal(weights(model), before))
    assert moved == [False, False, True, True]
    assert sum(n for _, n in events(run)) == 2


def test_one_batch_at_a_time() -> None:
    """next(iter(loader)): each begins a pass, each step is accounted, none is skipped."""
    run = attach(mlp(), noise_multiplier=1.0)
    for k in range(1, 4):
        before = weights(run.model)
        work(run, next(iter(run.loader)))
        assert not torch.equal(weights(run.model), before)
        assert sum(n for _, n in events(run)) == k


def test_a_skipped_batch_releases_nothing() -> None:
    """`continue` without forward: no step and no cost; what follows is unharmed."""
    run = attach(mlp(), indexed(), 4)
    with drawing([0, 1], [2, 3], [4]):
        for k, (_, x, y) in enumerate(run.loader):
            if k != 1:
                work(run, (x, y))
    assert sum(n for _, n in events(run)) == 2


def test_a_step_without_a_forward_is_a_release() -> None:
    """optimizer.step() on a batch that was not used: noise alone, and accounted."""
    run = attach(mlp(), indexed(), 4, noise_multiplier=1.0)
    before = weights(run.model)
    with drawing([0, 1]):
        for _ in run.loader:
            run.optimizer.step()
    assert not torch.equal(weights(run.model), before)
    assert sum(n for _, n in events(run)) == 1


# --- fixed batches ---


@pytest.mark.parametrize("shuffle", [True, False])
def test_fixed_batches_claim_no_amplification(shuffle: bool) -> None:
    """One pass is one full-batch Gaussian, however many steps; not a step of Poisson sampling."""
    run = attach(mlp(), indexed(), 3, loader={"shuffle": shuffle}, poisson_sampling=False, noise_multiplier=1.0)
    for k in (1, 2):
        seen = served(run)
        assert [len(batch) for batch in seen] == [3, 3, 2]
        assert sorted(k for batch in seen for k in batch) == list(range(8))
        assert events(run) == [(Gaussian(1.0), k)]
    assert run.engine.get_epsilon(1e-5) >= RDPAccountant().compose(Gaussian(1.0), 2).epsilon(1e-5) * (1 - 1e-9)


def test_fixed_batches_left_early() -> None:
    """A pass that was begun is paid for; passes of one batch each pay for one pass each."""
    run = attach(mlp(), indexed(), 4, poisson_sampling=False, noise_multiplier=1.0)
    for _ in range(3):
        _, x, y = next(iter(run.loader))
        work(run, (x, y))
    assert events(run) == [(Gaussian(1.0), 3)]


def test_fixed_batches_with_a_schedule() -> None:
    """A pass costs at least what its least noise costs, wherever in the pass that was."""
    for schedule in ((2.0, 1.0, 2.0), (1.0, 2.0, 2.0), (2.0, 2.0, 1.0)):
        run = attach(mlp(), indexed(), 3, poisson_sampling=False, noise_multiplier=2.0)
        sigmas = iter(schedule)
        run.engine.noise_multiplier = next(sigmas)
        for _, x, y in run.loader:
            work(run, (x, y))
            run.engine.noise_multiplier = next(sigmas, 2.0)
        spent = {event.noise_multiplier for event, _ in events(run)}
        assert min(spent) == 1.0
        run.engine.detach()


# --- schedules ---


def steps_of(run: Run) -> list[tuple[float, Tensor]]:
    """For each step of a pass: the weights' change times the expected batch size, and its length."""
    out = []
    for _, x, _ in run.loader:
        before = weights(run.model)
        (run.model(x) * 1e6).sum().backward()
        run.optimizer.step()
        change = (weights(run.model) - before) * run.engine.expected_batch_size
        out.append((float(change.norm()), change))
    return out


def test_a_schedule_of_C() -> None:
    """max_grad_norm: clipping and noise follow together; the noise multiplier in the ledger stays."""
    run = attach(mlp(), indexed(), loss_reduction="sum")
    for C in (1.0, 0.25, 7.0):
        run.engine.max_grad_norm = C
        with drawing([3]):
            [(length, _)] = steps_of(run)
        assert length == pytest.approx(C, rel=1e-4)
    noisy = attach(nn.Linear(4, 2000), indexed(), noise_multiplier=0.5)
    for C in (1.0, 100.0):
        noisy.engine.max_grad_norm = C
        with drawing([]):
            assert served(noisy) == []
        noise = torch.cat([p.grad.flatten() for p in noisy.model.parameters() if p.grad is not None])
        assert float(noise.std()) * 8 == pytest.approx(0.5 * C, rel=0.06)  # 8 standard errors
    assert events(noisy) == [(Gaussian(0.5), 2)]


def test_a_schedule_of_sigma() -> None:
    """noise_multiplier: the noise follows, and the ledger keeps every value that was used, in order."""
    run = attach(nn.Linear(4, 2000), indexed(), 4, noise_multiplier=1.0)
    for sigma in (1.0, 3.0, 3.0, 0.5):
        run.engine.noise_multiplier = sigma
        with drawing([]):
            assert served(run) == []
        noise = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
        assert float(noise.std()) * 4 == pytest.approx(sigma, rel=0.06)
    assert events(run) == [(PoissonSampled(0.5, Gaussian(s)), n) for s, n in ((1.0, 1), (3.0, 2), (0.5, 1))]


@pytest.mark.parametrize("moment", ["before forward", "before step", "after part"])
def test_changes_in_a_batch_wait_for_the_next(moment: str) -> None:
    """σ and C of a logical batch are fixed when it is handed out: clipping, noise and ledger cannot disagree."""
    run = attach(nn.Linear(4, 1), indexed(), 4, loss_reduction="sum", max_physical_batch_size=1)
    run.engine.noise_multiplier = 1e-6
    lengths = []

    def change(now: str) -> None:
        if now == moment:
            run.engine.max_grad_norm, run.engine.noise_multiplier = 5.0, 2e-6

    with drawing([0, 1], [2]):
        total = torch.zeros(5, dtype=torch.float64)
        for _, x, _ in run.loader:
            before = weights(run.model)
            change("before forward")
            (run.model(x) * 1e6).sum().backward()
            change("before step")
            run.optimizer.step()
            change("after part")
            total += weights(run.model) - before
            lengths.append(float((weights(run.model) - before).norm()) * 4)
    x = torch.cat([indexed()[:3][1], torch.ones(3, 1)], 1).double()
    expected = torch.nn.functional.normalize(x, dim=1)
    assert lengths[0] == 0.0
    assert lengths[1] == pytest.approx(float((expected[0] + expected[1]).norm()), rel=1e-3)
    assert lengths[2] == pytest.approx(5.0, rel=1e-3)
    assert [event.event.noise_multiplier for event, _ in events(run)] == [1e-6, 2e-6]


# --- what it costs ---


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_epsilon(accountant: str) -> None:
    """0.0 before the first step, then growing, and equal to what the accountants say of the same run."""
    run = attach(mlp(), data(100), 10, noise_multiplier=1.2, accountant=accountant, target_delta=1e-5)
    assert run.engine.get_epsilon(1e-5) == 0.0
    reported = [0.0]
    for _ in range(2):
        train(run)
        reported.append(run.engine.get_epsilon(1e-5))
    assert reported == sorted(set(reported))
    for k, value in enumerate(reported[1:], 1):
        options = {"noise_multiplier": 1.2, "sample_rate": 0.1, "steps": 10 * k, "delta": 1e-5}
        precision = 1e-9 if accountant == "rdp" else 3e-5  # PLD answers are upper bounds to their own tolerance
        assert value == pytest.approx(epsilon(accountant=accountant, **options), rel=precision)  # type: ignore[arg-type]
    assert run.engine.get_epsilon() == reported[-1]
    assert run.engine.get_epsilon(1e-3) < reported[-1]
    run.engine.detach()
    assert run.engine.get_epsilon() == reported[-1]


def test_epsilon_without_delta() -> None:
    with pytest.raises(dpkit.ConfigurationError, match="delta"):
        attach(mlp(), noise_multiplier=1.0).engine.get_epsilon()


def test_full_batches_are_not_amplified() -> None:
    """At q = 1 a step is the plain Gaussian mechanism."""
    run = attach(mlp(), noise_multiplier=3.0)
    train(run, 2)
    assert events(run) == [(Gaussian(3.0), 2)]


def test_runs_add_up_on_one_engine() -> None:
    """Detach and attach again: the ledger goes on."""
    run = attach(mlp(), noise_multiplier=3.0)
    train(run)
    run.engine.detach()
    model = mlp(seed=1)
    run.engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data(), 8),
        noise_multiplier=2.0,
        max_grad_norm=1.0,
    )
    with drawing([]):
        list(run.engine._loader)
    assert events(run) == [(Gaussian(3.0), 1), (Gaussian(2.0), 1)]


def test_another_engine_on_the_same_model_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Its epsilon does not hold what the first one has spent."""
    run = attach(mlp(), noise_multiplier=3.0)
    run.engine.detach()
    again = attach(run.model, noise_multiplier=3.0)  # nothing was released yet
    train(again)
    again.engine.detach()
    assert not caplog.text
    attach(again.model, noise_multiplier=2.0)
    assert "another engine" in caplog.text


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("name", ["make_private", "make_private_with_epsilon"])
@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 14}])
def test_targets_are_met(length: dict[str, int], name: str, poisson: bool) -> None:
    """After the planned training ε is the target at most, and close to it: the noise is the least that will do."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dpkit.PrivacyEngine()
    made = getattr(engine, name)(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data(100), 20),
        target_epsilon=3.0,
        target_delta=1e-5,
        max_grad_norm=1.0,
        poisson_sampling=poisson,
        **length,
    )
    run = Run(engine, *made)
    assert run.model is model
    assert run.optimizer is optimizer
    left = length.get("steps", 5 * length.get("epochs", 0))
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    optimizer.register_step_post_hook(count)
    while steps < left:
        for batch in run.loader:
            work(run, batch)
            if steps >= left:
                break
    assert steps == left
    assert 3.0 * (1 - 1e-3) <= engine.get_epsilon() <= 3.0
