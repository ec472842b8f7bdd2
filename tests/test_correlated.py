"""Correlated noise against the dense matrix, its cost against brute force over participations, and its samplings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.linalg import toeplitz
from torch import Tensor
from torch.utils.data import DataLoader

import dpkit
from dpkit.accountants import Gaussian, PoissonSampled, banded_matrix, make_accountant
from dpkit.correlated import BandedNoise, BufferedNoise, Correlated
from dpkit.noise import NoiseSource
from dpkit.paced import CyclicPoisson, RepeatedOrder
from dpkit.secure import SecureNoise
from dpkit.sums import ClippedSum
from tests.training import attach, data, mlp, squared_loss, train, weights, work

N, B = 24, 4


def dense(correlation: BandedNoise | BufferedNoise, steps: int) -> np.ndarray[Any, Any]:
    """C [t, t] from the definition of its column."""
    if isinstance(correlation, BandedNoise):
        column = [math.comb(2 * k, k) / 4.0**k if k < correlation.bands else 0.0 for k in range(steps)]
        whole = [math.comb(2 * k, k) / 4.0**k for k in range(correlation.bands)]
        length = math.sqrt(sum(c * c for c in whole))
    else:
        column = [sum(w * r**k for w, r in correlation.series) for k in range(steps)]
        length = 1.0
    return np.tril(toeplitz(np.array(column) / length))


class Given:
    """A source that adds noise that is known beforehand: z [t, p], a row for each release."""

    seeded = secure = False

    def __init__(self, z: np.ndarray[Any, Any]) -> None:
        self.z, self.calls = z, 0
        self.queries: list[Tensor] = []

    def describe(self) -> str:
        return "Given."

    def add_to(self, sums: Sequence[Tensor], std: float) -> None:
        row, start = torch.from_numpy(self.z[self.calls]), 0
        self.queries.append(torch.cat([s.clone() for s in sums]))
        for s in sums:
            s.add_(row[start : start + len(s)].to(s), alpha=std)
            start += len(s)
        self.calls += 1

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "given"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def reseed(self) -> None: ...


correlations = st.one_of(
    st.builds(BandedNoise, st.integers(1, 8)), st.builds(BufferedNoise, st.integers(1, 6), st.sampled_from([10, 10**4]))
)


# --- the noise ---


@given(correlation=correlations, steps=st.integers(1, 14), seed=st.integers(0, 99), data=st.data())
def test_the_stream_is_the_dense_matrix(correlation: Any, steps: int, seed: int, data: Any) -> None:
    """x + C⁻¹z, in float64 to 1e-10: also where C_clip, and so the deviation, is another in every step; and what the
    source sees is C x + z, in units of the deviation, so that secure rounding is a rounding of that query."""
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    x, z = rng.normal(size=(steps, sum(sizes))), rng.normal(size=(steps, sum(sizes)))
    stds = np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=steps, max_size=steps)))
    c = dense(correlation, steps)
    expected = x + stds[:, None] * np.linalg.solve(c, z)
    source = Given(z)
    noise = Correlated(correlation, source)
    for t in range(steps):
        sums = list(torch.from_numpy(x[t].copy()).split(sizes))
        noise.add_to(sums, stds[t])
        np.testing.assert_allclose(torch.cat(sums).numpy(), expected[t], rtol=1e-9, atol=1e-9)
    released = np.stack([q.numpy() for q in source.queries]) / stds[:, None] + z
    past = np.linalg.solve(c, z)
    np.testing.assert_allclose(released, c[0, 0] * (x / stds[:, None] + past), rtol=1e-8, atol=1e-8)


def test_one_band_is_independent_noise() -> None:
    """Bit for bit."""
    plain, banded = (torch.arange(5.0) for _ in range(2))
    for _ in range(3):
        NoiseSource(torch.Generator().manual_seed(1)).add_to([plain], 1.3)
        Correlated(BandedNoise(1), NoiseSource(torch.Generator().manual_seed(1))).add_to([banded], 1.3)
    assert torch.equal(plain, banded)


@pytest.mark.parametrize(
    "correlation", [BandedNoise(1), BandedNoise(5), BandedNoise(40), BufferedNoise(), BufferedNoise(1)]
)
def test_columns(correlation: Any) -> None:
    """Of length one; nowhere negative; inner products as the dense matrix has them."""
    steps = 60 if isinstance(correlation, BandedNoise) else 60_000
    column = np.array(dense(correlation, 60)[:, 0])
    assert (column >= 0).all()
    assert (np.diff(column) <= 0).all()
    if isinstance(correlation, BufferedNoise):
        w, r = np.array(correlation.series).T
        column = (w[:, None] * np.exp(np.arange(steps) * np.log(r)[:, None])).sum(0)
    assert correlation.inner(0) == pytest.approx(1.0, abs=1e-9)
    for apart in (0, 1, 4, 5, 39, 40, 50):
        expected = float(column[: steps - apart] @ column[apart:])
        assert correlation.inner(apart) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_it_is_worth_it() -> None:
    """The noise in the sums over steps, at the same cost: in one pass of 256 steps, each record once."""
    steps = 256
    sums = np.tril(np.ones((steps, steps)))

    def error(c: np.ndarray[Any, Any]) -> float:
        return float(np.sqrt((np.linalg.solve(c.T, sums.T) ** 2).sum() / steps))

    independent = error(np.eye(steps))
    assert error(dense(BandedNoise(64), steps)) < 0.45 * independent
    assert error(dense(BandedNoise(8), steps)) < 0.8 * independent
    assert error(dense(BufferedNoise(6, steps), steps)) < 0.35 * independent


# --- what it costs ---


def patterns(steps: int, apart: int) -> list[tuple[int, ...]]:
    """Every set of steps at least so far apart."""
    found: list[tuple[int, ...]] = [()]
    for k in range(1, 2 + steps // apart):
        for pattern in itertools.combinations(range(steps), k):
            if all(b - a >= apart for a, b in itertools.pairwise(pattern)):
                found.append(pattern)
    return found


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
def test_banded_sensitivity_by_brute_force(bands: int) -> None:
    """Over all participations b apart, and directions of the record's gradients: ‖C u‖² ≤ ⌈T / b⌉, what is charged."""
    rng, steps = np.random.default_rng(0), 11
    c = dense(BandedNoise(bands), steps)
    worst = 0.0
    for pattern in patterns(steps, bands):
        for _ in range(3):
            u = np.zeros((steps, 3))
            u[list(pattern)] = rng.normal(size=(len(pattern), 3))
            u /= np.maximum(np.linalg.norm(u, axis=1, keepdims=True), 1e-12)
            squared = float(np.linalg.norm(c @ u) ** 2)
            assert squared <= len(pattern) * (1 + 1e-9)
            worst = max(worst, squared)
    charged = banded_matrix(1.0, bands, 1.0, steps).flat()[0][1]
    assert worst <= charged
    assert len(max(patterns(steps, bands), key=len)) == charged


@settings(deadline=None, max_examples=40)
@given(correlation=correlations, steps=st.integers(1, 6), passes=st.integers(1, 4), seed=st.integers(0, 99))
def test_repeated_passes_by_brute_force(correlation: Any, steps: int, passes: int, seed: int) -> None:
    """Fixed order: what the ledger holds after k passes covers every record's k columns, whatever its directions, and
    is reached in the limit of a long run (to a hundredth, for bands; parallel gradients)."""
    rng, sigma = np.random.default_rng(seed), 1.3
    loader = DataLoader(data(steps), batch_size=1)
    sampling = RepeatedOrder(loader.batch_sampler, 1.0, steps, correlation)  # type: ignore[arg-type]
    charged = 0.0
    for _ in range(passes):
        assert not sampling.begin_pass()
        for k in range(steps):
            event = sampling.event(Gaussian(sigma), first=k == 0)
            assert (event is None) == (k > 0)
            if event is not None:
                charged += event.noise_multiplier**-2  # type: ignore[attr-defined]
            sampling.advance()
    planned = sum(event.noise_multiplier**-2 * n for event, n in sampling.planned(sigma, steps * passes).flat())  # type: ignore[attr-defined]
    assert planned == pytest.approx(charged, rel=1e-12)
    tail = correlation.bands if isinstance(correlation, BandedNoise) else 0
    c = dense(correlation, steps * passes + tail)
    for start in range(steps):
        columns = c[:, [start + j * steps for j in range(passes)]]
        for u in (rng.normal(size=(passes, 3)), np.ones((passes, 1))):
            unit = u / np.linalg.norm(u, axis=1, keepdims=True)
            assert np.linalg.norm(columns @ unit) ** 2 / sigma**2 <= charged * (1 + 1e-9)
    if isinstance(correlation, BandedNoise):
        assert np.linalg.norm(c[:, ::steps][:, :passes].sum(1)) ** 2 / sigma**2 == pytest.approx(charged, rel=1e-9)


# --- cyclic Poisson sampling ---


def cyclic(records: int, size: float, bands: int, steps: int = 6, seed: int = 0) -> CyclicPoisson:
    groups = torch.randint(bands, (records,), generator=torch.Generator().manual_seed(seed))
    return CyclicPoisson(records, size, steps, bands, groups)


@settings(deadline=None)
@given(bands=st.integers(1, 5), seed=st.integers(0, 99), left=st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_participations_are_b_apart(bands: int, seed: int, left: list[int]) -> None:
    """Whatever passes are left half-way: counted in releases, a record takes part at most once in b; and the events
    are as many as its participations can be."""
    sampling = cyclic(20, 4.0, bands, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    releases: list[list[int]] = []
    events = 0
    for taken in left:
        sampling.begin_pass()
        for drawn in itertools.islice(sampling.draws(generator), taken):
            events += sampling.event(Gaussian(1.0), first=False) is not None
            releases.append(drawn)
            sampling.advance()
    for record in range(20):
        times = [t for t, drawn in enumerate(releases) if record in drawn]
        assert all(b - a >= bands for a, b in itertools.pairwise(times))
        assert len(times) <= events
    assert events == math.ceil(len(releases) / bands)


def test_the_rate_within_the_group() -> None:
    """B b / N in its own step, never in another's; records are drawn independently of each other."""
    sampling = cyclic(12, 3.0, 3, steps=30_000)
    drawn = torch.zeros(30_000, 12, dtype=torch.bool)
    for k, rows in enumerate(sampling.draws(torch.Generator().manual_seed(0))):
        drawn[k, rows] = True
    q = sampling.sample_rate
    assert q == 0.75
    for record in range(12):
        turn = int(sampling.groups[record])
        mine = drawn[turn::3, record]
        assert not drawn[torch.arange(30_000) % 3 != turn, record].any()
        low, high = stats.binom.ppf([1e-7, 1 - 1e-7], len(mine), q)
        assert low <= int(mine.sum()) <= high
    for a, b in itertools.combinations(range(12), 2):
        if sampling.groups[a] == sampling.groups[b]:
            rows = drawn[int(sampling.groups[a]) :: 3]
            assert abs(float((rows[:, a] & rows[:, b]).float().mean()) - q * q) < 0.03
    for record in range(4):  # and of themselves a turn before
        rows = drawn[int(sampling.groups[record]) :: 3, record].float()
        assert abs(float((rows[1:] * rows[:-1]).mean()) - q * q) < 0.03


def test_groups_are_drawn_record_by_record() -> None:
    """Uniform, and not by position: one record more or less would otherwise move the others to other groups."""
    counts = torch.zeros(4)
    for seed in range(60):
        run = private(BandedNoise(4), loader={"generator": torch.Generator().manual_seed(seed)})
        groups = run.engine._step.sampling.groups
        counts += torch.bincount(groups, minlength=4)
        run.engine.detach()
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6
    first, second = (private(BandedNoise(4)).engine._step.sampling.groups for _ in range(2))
    assert not torch.equal(first, second)


# --- in the engine ---


def private(noise: Any, **options: Any) -> Any:
    options.setdefault("noise_multiplier", 0.9)
    return attach(options.pop("model", None) or mlp(), data(N), B, noise=noise, lr=0.1, **options)


FIXED = [(BandedNoise(3), True), (BandedNoise(3), False), (BandedNoise(9), False), (BufferedNoise(4), False)]


@pytest.mark.parametrize(("correlation", "poisson"), FIXED)
def test_what_the_optimizer_sees(correlation: Any, poisson: bool) -> None:
    """Three passes without a gradient: the release is σ C (C⁻¹z), z the very stream of the seed; C_clip changes."""
    run = private(correlation, noise_generator=torch.Generator().manual_seed(3), poisson_sampling=poisson)
    seen: list[Tensor] = []
    run.optimizer.register_step_pre_hook(
        lambda *args: seen.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).double() * B)
    )
    bounds = [1.0, 2.5, 0.3]
    for bound in bounds:
        run.engine.max_grad_norm = bound
        for batch in run.loader:
            (run.model(batch[0]) * 0).mean().backward()
            run.optimizer.step()
    sizes = [p.numel() for p in run.model.parameters()]
    twin, z = NoiseSource(torch.Generator().manual_seed(3)), []
    for _ in seen:
        parts = [torch.zeros(k) for k in sizes]
        twin.add_to(parts, 1.0)
        z.append(torch.cat(parts).double().numpy())
    scale = 0.9 * np.repeat(bounds, 6)[:, None]
    expected = scale * np.linalg.solve(dense(correlation, 18), np.stack(z))
    np.testing.assert_allclose(torch.stack(seen).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_ledger_of_bands() -> None:
    """After t steps ⌈t / b⌉ Poisson steps at rate B b / N, ε as the accountant's own event has it."""
    run = private(BandedNoise(3))
    assert run.engine.sample_rate == B * 3 / N
    steps: list[None] = []  # empty draws, which the loop does not see, are steps too
    run.optimizer.register_step_post_hook(lambda *_: steps.append(None))
    for _ in range(3):
        for batch in run.loader:
            work(run, batch)
            assert run.engine.accountant.ledger == ((PoissonSampled(0.5, Gaussian(0.9)), math.ceil(len(steps) / 3)),)
    expected = make_accountant("rdp").compose(banded_matrix(0.9, 3, 0.5, len(steps))).epsilon(1e-5)
    assert run.engine.get_epsilon(1e-5) == expected


@pytest.mark.parametrize(("correlation", "poisson"), FIXED)
def test_targets_are_met(correlation: Any, poisson: bool) -> None:
    """The least σ for the planned epochs; after them the target is not exceeded, and nearly reached."""
    target = {"noise_multiplier": None, "target_epsilon": 2.0, "target_delta": 1e-5, "epochs": 3}
    run = private(correlation, poisson_sampling=poisson, **target)
    train(run, 3)
    assert 1.9 < run.engine.get_epsilon() <= 2.0


@pytest.mark.parametrize(("correlation", "poisson"), FIXED)
@pytest.mark.parametrize("stop", [1, 4, 6, 8, 13])
def test_an_interrupted_run_goes_on(correlation: Any, poisson: bool, stop: int) -> None:
    """Bit for bit the same weights and ledger: buffers, groups, turns and passes are in the state."""

    def start() -> Any:
        order = {"generator": torch.Generator().manual_seed(2)}
        noise = torch.Generator().manual_seed(1)
        return private(correlation, poisson_sampling=poisson, noise_generator=noise, loader=order)

    whole, run = start(), start()
    train(whole, 3)
    saved, taken = None, 0
    for _ in range(3):
        for batch in run.loader:
            work(run, batch)
            taken = sum(1 for _ in [batch]) + taken
            if taken == stop:
                saved = run.engine.state_dict()
                break
        if saved is not None:
            break
    assert saved is not None
    resumed = private(
        correlation,
        poisson_sampling=poisson,
        noise_generator=torch.Generator().manual_seed(8),
        loader={"generator": torch.Generator().manual_seed(9)},
    )
    resumed.engine.load_state_dict(saved)
    train(resumed, 3 - resumed.engine.completed_passes)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.engine.accountant.ledger == whole.engine.accountant.ledger


def test_states_of_another_noise_are_refused() -> None:
    one, other, plain = (
        Correlated(BandedNoise(3), NoiseSource()),
        Correlated(BandedNoise(2), NoiseSource()),
        NoiseSource(),
    )
    one.add_to([torch.zeros(4)], 1.0)
    for where, state in ((other, one), (plain, one), (one, plain)):
        with pytest.raises(dpkit.ConfigurationError, match="another kind"):
            where.load_state_dict(state.state_dict())  # type: ignore[attr-defined]


@pytest.mark.parametrize("correlation", [BandedNoise(3), BufferedNoise(2)])
def test_a_state_from_a_file_goes_on_where_the_model_is(correlation: Any) -> None:
    """Checkpoints are read on the CPU; "meta" stands for an accelerator."""
    noise = Correlated(correlation, Given(np.zeros((2, 4))))
    noise.add_to([torch.zeros(4)], 1.0)
    there = torch.zeros(4, device="meta")
    with mock.patch.object(Given, "add_to"):
        other = Correlated(correlation, Given(np.zeros((2, 4))))
        other.load_state_dict(noise.state_dict())
        other.add_to([there], 1.0)
    assert {b.device.type for buffers in other._buffers for b in buffers} == {"meta"}


@pytest.mark.parametrize("correlation", [BandedNoise(4), BufferedNoise(3)])
def test_a_pass_after_one_that_was_left_is_another_mechanism(correlation: Any) -> None:
    """Fixed order: a record of the pass's beginning comes back too soon; its noise starts afresh and costs afresh."""
    run = private(correlation, poisson_sampling=False, noise_generator=torch.Generator().manual_seed(0))
    train(run)
    for batch in run.loader:
        work(run, batch)
        break
    before = run.engine.accountant.ledger
    buffers = run.engine.noise._buffers
    assert any(b.any() for held in buffers for b in held)
    restarts: list[None] = []
    restart = Correlated.restart

    def spy(self: Correlated) -> None:
        restarts.append(None)
        restart(self)

    with mock.patch.object(Correlated, "restart", spy):
        train(run)
        assert len(restarts) == 1
        train(run)  # it came to its end: no other mechanism
        assert len(restarts) == 1
    costs = [1 / event.noise_multiplier**2 for event, n in run.engine.accountant.ledger for _ in range(n)]
    assert len(before) >= 1
    assert costs[2] == pytest.approx(costs[0])
    assert costs[3] == pytest.approx(costs[1])


def test_secure_and_correlated() -> None:
    """The source sees the whole query, C x and the past, and rounds its noisy value to the grid."""
    source = SecureNoise()
    noise = Correlated(BandedNoise(3), source)
    assert noise.secure
    assert not noise.seeded
    seen: list[Tensor] = []
    add_to = SecureNoise.add_to

    def spy(self: SecureNoise, sums: Sequence[Tensor], std: float) -> None:
        add_to(self, sums, std)
        seen.extend(s.clone() for s in sums)

    with mock.patch.object(SecureNoise, "add_to", spy):
        for _ in range(4):
            s = torch.randn(50, dtype=torch.float64)
            noise.add_to([s], 1.0)
            torch.testing.assert_close(s, seen[-1] / noise.correlation.first)
    cells = torch.stack(seen) * 2**10
    assert torch.equal(cells, cells.round())
    assert "AES-256" in noise.describe()
    assert "BandedNoise(bands=3)" in noise.describe()


def test_budget_stops_in_time() -> None:
    """Within a block that is paid for, steps go on; at its end the loader stops."""
    free = private(BandedNoise(3))
    train(free)
    limit = free.engine.get_epsilon(1e-5)
    run = private(BandedNoise(3), max_epsilon=limit * 1.0001, target_delta=1e-5)
    train(run, 2)
    assert sum(n for _, n in run.engine.accountant.ledger) == 2
    assert run.engine._step.spending.released == 6
    assert run.engine.get_epsilon(1e-5) <= limit * 1.0001


# --- refusals ---


def test_samplings_without_a_guarantee() -> None:
    with pytest.raises(dpkit.SamplingError, match="BufferedNoise with Poisson"):
        private(BufferedNoise())
    with pytest.raises(dpkit.SamplingError, match="at most 6 bands"):
        private(BandedNoise(7))
    with pytest.raises(dpkit.SamplingError, match="shuffled anew"):
        private(BandedNoise(3), poisson_sampling=False, loader={"shuffle": True})
    for bad in (lambda: BandedNoise(0), lambda: BufferedNoise(0), lambda: BufferedNoise(4, 0)):
        with pytest.raises(dpkit.ConfigurationError):
            bad()


def test_another_sigma_is_refused() -> None:
    run = private(BandedNoise(3))
    train(run)
    run.engine.noise_multiplier = 1.0
    with pytest.raises(dpkit.ConfigurationError, match="correlated"):
        train(run)


def test_adaptive_clipping_is_refused() -> None:
    with pytest.raises(dpkit.ConfigurationError, match="adaptive"):
        private(BandedNoise(3), clipping="adaptive")


@pytest.mark.parametrize(("correlation", "poisson"), FIXED)
def test_a_batch_without_a_step_is_refused(correlation: Any, poisson: bool) -> None:
    """It would shift draws against releases: a record could then come back too soon."""
    run = private(correlation, poisson_sampling=poisson)
    with pytest.raises(dpkit.UnfinishedStepError, match="no step"):
        for _ in run.loader:
            pass
    other = private(None, poisson_sampling=poisson)
    for _ in other.loader:  # independent noise does not mind
        pass


@pytest.mark.parametrize(("correlation", "poisson"), FIXED)
@pytest.mark.parametrize("saved", [False, True])
def test_no_step_follows_one_that_failed(correlation: Any, poisson: bool, saved: bool, tmp_path: Path) -> None:
    """The records of later batches would come back too soon; another pass is counted from where the releases are."""
    run = private(correlation, poisson_sampling=poisson)
    batches = iter(run.loader)
    work(run, next(batches))
    squared_loss(run.model, next(batches)).backward()
    with mock.patch.object(ClippedSum, "take", side_effect=MemoryError), pytest.raises(MemoryError):
        run.optimizer.step()
    if saved:
        run.engine.save_checkpoint(tmp_path / "run")
        run.engine.load_checkpoint(tmp_path / "run")
        batches = iter(run.loader)
    with pytest.raises(dpkit.UnfinishedStepError, match="not released"):
        work(run, next(batches))
    train(run)


def test_other_parameters_are_refused() -> None:
    run = private(BandedNoise(3))
    train(run)
    run.model[0].requires_grad_(False)
    with pytest.raises(dpkit.ConfigurationError, match="trainable parameters changed"):
        train(run)


def test_empty_draws_are_steps() -> None:
    run = private(BandedNoise(2))
    with mock.patch.object(CyclicPoisson, "draws", return_value=iter([[], [0, 1], []])):
        for batch in run.loader:
            squared_loss(run.model, batch).backward()
            run.optimizer.step()
    assert sum(n for _, n in run.engine.accountant.ledger) == 2


def test_group_privacy_of_records_that_take_turns_is_refused() -> None:
    """Of fixed batches it is one Gaussian, of k times the sensitivity."""
    run = private(BandedNoise(3))
    train(run)
    run.engine.detach()
    assert run.engine.get_epsilon(1e-5) > 0
    with pytest.raises(dpkit.ConfigurationError, match="took turns"):
        run.engine.get_epsilon(1e-5, group_size=2)
    fixed = private(BandedNoise(3), poisson_sampling=False)
    train(fixed)
    assert fixed.engine.get_epsilon(1e-5, group_size=2) > fixed.engine.get_epsilon(1e-5)


@pytest.mark.parametrize(("correlation", "poisson"), FIXED)
def test_fresh_noise_after_a_restore_is_another_mechanism(correlation: Any, poisson: bool) -> None:
    """replay=False: the noise to be taken back is no longer known to be unseen; a new block or pass is paid for."""
    run = private(correlation, poisson_sampling=poisson)
    saved = None
    for k, batch in enumerate(run.loader):
        work(run, batch)
        if k == 1:
            saved = run.engine.state_dict()
            break
    assert saved is not None
    other = private(correlation, poisson_sampling=poisson)
    other.engine.load_state_dict(saved, replay=False)
    assert not other.engine.noise._buffers
    paid = sum(n for _, n in other.engine.accountant.ledger)
    for batch in other.loader:
        work(other, batch)
        break
    assert sum(n for _, n in other.engine.accountant.ledger) == paid + 1
