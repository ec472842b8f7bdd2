"""The pitfalls by their numbers: ways in which the stated (ε, δ) of other libraries was false, or a cost not counted.

Each test fails when the guard against its pitfall is taken away. `test_gradients.py` has those that give wrong
gradients or crash.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, WeightedRandomSampler

import dpkit
from dpkit.accountants import Gaussian, PoissonSampled
from tests import models as m
from tests.hf_models import HF_CASES
from tests.oracle import clipped_sum, take
from tests.test_exact import assert_exact
from tests.training import attach, data, drawing, mlp, squared_loss, train, weights, work

Losses = Callable[[nn.Module, Any], Tensor]


def step(build: Callable[[], nn.Module], losses: Losses, batch: Any, rows: Sequence[int], **options: Any) -> Tensor:
    """What one noiseless step on these records of the batch subtracts at learning rate 1, times their number drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
    before = weights(model)
    loader = {"collate_fn": lambda drawn: take(batch, list(drawn))}
    run = attach(model, range(max(rows) + 1), loader=loader, **options)  # type: ignore[arg-type]
    with drawing(rows):
        for part in run.loader:
            losses(model, part)
            run.optimizer.step()
    return (before - weights(model)) * run.engine.expected_batch_size


def difference(build: Callable[[], nn.Module], losses: Losses, batch: Any, n: int, **options: Any) -> float:
    """‖f(D ∪ {x}) − f(D)‖ for the record x that is last."""
    with_x = step(build, losses, batch, range(n), **options)
    without = step(build, losses, batch, range(n - 1), **options) * (1 if n - 1 else 0)
    return float((with_x - without).norm())


def test_pitfall_01_losses_of_one_column() -> None:
    """[n, 1] losses are n losses: no [n, n] comes of them, and one record moves the sum by at most C."""
    x, y = (v.double() for v in data(6).tensors)
    run = attach(mlp().double(), TensorDataset(x, y), max_grad_norm=0.1)
    expected = clipped_sum(copy.deepcopy(run.model), lambda net, b: (net(b[0]) - b[1]).square().mean(1), (x, y), 6, 0.1)
    before = [p.detach().clone() for p in run.model.parameters()]
    for rows, targets in run.loader:
        losses = (run.model(rows) - targets).square()
        assert losses.shape == (6, 1)
        with pytest.raises(dpkit.ConfigurationError, match=r"shape \[6, 6\]"):
            run.engine.backward((run.model(rows) - targets.T).square())
        run.engine.backward(losses)
        run.optimizer.step()
    for (name, p), old in zip(run.model.named_parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old - expected[name] / 6)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_pitfall_02_a_schedule_reaches_clipping_noise_and_ledger(clipping: str) -> None:
    schedule(clipping)


def test_pitfall_03_a_schedule_with_per_layer_clipping() -> None:
    schedule("per_layer")


def schedule(clipping: str) -> None:
    """σ and C are changed: the step's bound, the noise's size and the ledger say the same."""
    run = attach(nn.Linear(40, 500), TensorDataset(torch.randn(4, 40)), clipping=clipping, loss_reduction="sum")
    for C, sigma in ((1.0, 0.5), (20.0, 2.0), (0.1, 1.0)):
        run.engine.max_grad_norm, run.engine.noise_multiplier = C, 0.0
        with drawing([1]):
            for (x,) in run.loader:
                before = weights(run.model)
                (run.model(x) * 1e6).sum().backward()
                run.optimizer.step()
        assert float((weights(run.model) - before).norm()) * 4 == pytest.approx(C, rel=1e-3)
        run.engine.noise_multiplier = sigma
        before = weights(run.model)
        with drawing([]):
            list(run.loader)
        assert float((weights(run.model) - before).std()) * 4 == pytest.approx(sigma * C, rel=0.05)
    assert [e.noise_multiplier for e, _ in run.engine.accountant.ledger] == [0.0, 0.5, 0.0, 2.0, 0.0, 1.0]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {}])
def test_pitfall_04_batch_norm_frozen_or_not_affine(options: dict[str, bool]) -> None:
    """In train mode it is refused, frozen or not; and when train mode comes back later."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, **options).requires_grad_(False), nn.Linear(3, 1))
    with pytest.raises(dpkit.UnsupportedModuleError, match="BatchNorm1d"):
        attach(model)
    if options.get("track_running_stats", True):
        run = attach(model.eval())
        model.train()
        with pytest.raises(dpkit.UnsupportedModuleError, match="BatchNorm1d"):
            train(run)


def test_pitfall_05_unfrozen_after_set_up() -> None:
    """What joins the step joins the norm: the whole of it stays within C."""
    model = mlp()
    model[0].requires_grad_(False)
    run = attach(model, loss_reduction="sum", optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    train(run)
    model[0].requires_grad_(True)
    before = weights(model)
    with drawing([2]):
        for x, _ in run.loader:
            (model(x) * 1e4).sum().backward()
            run.optimizer.step()
    moved = (weights(model) - before) * 8
    assert float(moved[:25].norm()) > 0.1
    assert float(moved.norm()) <= 1.0 + 1e-4


def test_pitfall_06_loss_averaged_over_tokens() -> None:
    """The model's own `.loss` is refused; one loss a record keeps the bound."""
    case = next(c for c in HF_CASES if c.name == "gpt2")
    batch = case.records(4, dtype=torch.float64)

    def own(model: nn.Module, part: Any) -> None:
        model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], labels=part["labels"]).loss.backward()

    with pytest.raises(dpkit.CoupledRecordsError, match="tokens"):
        step(case.model, own, batch, range(4))

    def each(model: nn.Module, part: Any) -> None:
        case.losses(model, part).mean().backward()

    assert difference(case.model, each, batch, 4, max_grad_norm=3.0) <= 3.0 * (1 + 1e-5)


@pytest.mark.parametrize("name", ["bare-positions-T-equals-n", "relative-bias-T-equals-n", "lm-tied-T-equals-n"])
def test_pitfall_07_positions_as_many_as_records(name: str) -> None:
    """A position table is no batch, whatever its length."""
    assert_exact(next(c for c in dpkit_cases() if c.name == name), torch.float64)


def dpkit_cases() -> Sequence[Any]:
    from tests.cases import CASES

    return CASES


def test_pitfall_08_tokens_as_records() -> None:
    """[n·t, d] rows are refused as records; where the model folds them itself, each record is still clipped as one."""
    run = attach(mlp(), TensorDataset(torch.randn(6, 5, 4), torch.randn(6, 1)))
    batch = next(iter(run.loader))
    run.model(batch[0].flatten(0, 1)).mean().backward()
    with pytest.raises(dpkit.NonPrivateGradientError, match=r"\[30\].* 6 records"):
        run.optimizer.step()

    class Folds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.flatten(0, 1)).view(len(x), -1).mean(1)

    tokens = torch.randn(3, 5, 4, dtype=torch.float64)
    moved = difference(Folds, lambda net, x: (1e3 * net(x)).mean().backward(), tokens, 3)
    assert 0.5 < moved <= 1.0 + 1e-5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin = Folds().double()
    total = clipped_sum(twin, lambda net, b: 1e3 * net(b), tokens, 3, 1.0)
    whole = step(Folds, lambda net, x: (1e3 * net(x)).mean().backward(), tokens, range(3))
    torch.testing.assert_close(whole, torch.cat([v.flatten() for v in total.values()]))


def test_pitfall_09_fixed_batches_are_not_poisson() -> None:
    """Poisson is accounted where Poisson is drawn; shuffled batches cost a whole Gaussian a pass."""
    poisson = attach(mlp(), data(64), 8, noise_multiplier=1.0, loader={"shuffle": True})
    sizes = {len(batch[0]) for batch in poisson.loader if work(poisson, batch) is None}
    assert len(sizes) > 1
    assert poisson.engine.accountant.ledger == ((PoissonSampled(0.125, Gaussian(1.0)), 8),)
    fixed = attach(mlp(), data(64), 8, noise_multiplier=1.0, loader={"shuffle": True}, poisson_sampling=False)
    train(fixed)
    assert fixed.engine.accountant.ledger == ((Gaussian(1.0), 1),)


def test_pitfall_10_weighted_sampling() -> None:
    """It is neither replaced nor accounted as what it is not: it is refused."""
    sampler = WeightedRandomSampler([1.0] * 7 + [9.0], 8)
    for poisson in (True, False):
        with pytest.raises(dpkit.SamplingError, match="WeightedRandomSampler"):
            make_private(DataLoader(data(), 4, sampler=sampler), poisson_sampling=poisson)


def make_private(loader: DataLoader[Any], **options: Any) -> dpkit.PrivacyEngine:
    model, engine = mlp(), dpkit.PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    engine.make_private(model, optimizer, loader, **options)
    return engine


def test_pitfall_11_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that come later are refused (see also test_ranks); equal seeds give no equal draws."""
    loader = DataLoader(data(), 4)
    with pytest.raises(dpkit.SamplingError, match="DistributedSampler"):
        make_private(DataLoader(data(), 4, sampler=DistributedSampler(data(), num_replicas=2, rank=0)))
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        engine = make_private(DataLoader(data(200), 50))
        draws.append(list(engine._loader.batch_sampler))  # type: ignore[arg-type]
    assert draws[0] != draws[1]
    engine = make_private(loader)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(dpkit.ConfigurationError, match="2 processes now"):
        next(iter(engine._loader))
    monkeypatch.undo()
    next(iter(engine._loader))


@pytest.mark.parametrize("physical", [None, 1, 2])
def test_pitfall_12_adaptive_clipping_in_parts_and_on_nobody(physical: int | None) -> None:
    """C moves once an accounted step, however it is served, and a step on nobody is one."""
    clipping = dpkit.AdaptiveClipping(learning_rate=0.1)
    run = attach(mlp(), data(8), 4, clipping=clipping, max_physical_batch_size=physical, noise_multiplier=0.5)
    bounds = [run.engine.max_grad_norm]
    run.optimizer.register_step_post_hook(lambda *args: bounds.append(run.engine.max_grad_norm))
    with drawing([0, 1, 2, 3, 4], [], [5, 6], []):
        train(run)
    assert sum(a != b for a, b in itertools.pairwise(bounds)) == 4
    assert run.engine.accountant.ledger == ((PoissonSampled(0.5, Gaussian(0.5)), 4),)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pitfall_13_a_record_that_is_not_finite(bad: float) -> None:
    """It is left out and counted; weights stay finite, and the others' step is what it would be without it."""
    x, y = (v.double() for v in data(4).tensors)
    x[3] = bad
    losses: Losses = lambda net, b: squared_loss(net, b).backward()  # noqa: E731
    torch.testing.assert_close(step(mlp, losses, (x, y), range(4)), step(mlp, losses, (x, y), [0, 1, 2]))
    run = attach(mlp().double(), TensorDataset(x, y))
    train(run)
    assert run.engine.nonfinite_records == 1
    assert torch.isfinite(weights(run.model)).all()


def test_pitfall_14_noise_in_half_precision() -> None:
    """bfloat16 parameters get noise that was drawn in float32 and added to a float32 sum; secure mode is there."""
    seen: list[torch.dtype] = []
    run = attach(nn.Linear(4, 1).bfloat16(), TensorDataset(torch.randn(4, 4).bfloat16()), noise_multiplier=1.0)
    add_to = run.engine.noise.add_to

    class Watched(type(run.engine.noise)):  # type: ignore[misc]
        def add_to(self, sums: Sequence[Tensor], std: float) -> None:
            seen.extend(s.dtype for s in sums)
            add_to(sums, std)

    run.engine.noise.__class__ = Watched
    for (x,) in run.loader:
        run.model(x).mean().backward()
        run.optimizer.step()
    assert seen == [torch.float32] * 2
    engine = dpkit.PrivacyEngine(secure_mode=True)
    model = nn.Linear(4, 1)
    engine.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        DataLoader(data(), 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert engine.noise.secure
    for batch in engine._loader:
        squared_loss(model, batch).backward()
        engine._step.optimizer.step()  # type: ignore[union-attr]
    assert torch.isfinite(weights(model)).all()


def test_pitfall_28_a_layer_that_also_runs_on_one_row() -> None:
    """DeBERTa's projection of a batch-1 table: its share belongs to every record, not to record 0."""
    x = torch.randn(4, 6, 4, dtype=torch.float64)

    def losses(model: nn.Module, part: Tensor) -> None:
        (1e3 * model(part).flatten(1).mean(1)).mean().backward()

    assert difference(m.SharedRow, losses, x, 4) <= 1.0 + 1e-5
    alone = [step(m.SharedRow, losses, x, [k]) for k in range(4)]
    together = step(m.SharedRow, losses, x, range(4))
    torch.testing.assert_close(together, torch.stack(alone).sum(0))


def test_pitfall_29_tied_weights_and_forwards_in_between() -> None:
    """Tied weights stay within C; nothing is dropped; a no_grad forward, and another order, change nothing."""
    ids = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(0))

    def losses(model: nn.Module, part: Tensor, evaluate: bool = False) -> None:
        logits = model(part)
        if evaluate:
            with torch.no_grad():
                model(part.flip(1))
        (1e3 * F.cross_entropy(logits.transpose(1, 2), part, reduction="none").mean(1)).mean().backward()

    def tied() -> nn.Module:
        return m.LanguageModel(tied=True)

    assert 0.5 < difference(tied, losses, ids, 3) <= 1.0 + 1e-5
    assert_exact(next(c for c in dpkit_cases() if c.name == "lm-tied"), torch.float64)
    plain = step(tied, losses, ids, range(3))
    assert torch.equal(step(tied, lambda net, part: losses(net, part, True), ids, range(3)), plain)
    assert bool((plain != 0).any())

    class Backwards(nn.Module):
        """Registered in another order than it runs in, with a layer of a kind that nobody knows."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.unknown, self.first = nn.Linear(5, 1), m.EinsumLinear(5, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.unknown(torch.tanh(self.first(x)))))

    x, y = (v.double() for v in data(4).tensors)
    moved = step(Backwards, lambda net, b: squared_loss(net, b).backward(), (x, y), range(4), max_grad_norm=1e6)
    model = Backwards().double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Backwards().double()
    squared_loss(model, (x, y)).backward()
    torch.testing.assert_close(moved, 4 * torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]


def test_pitfall_30_several_rows_are_one_unit() -> None:
    """Chunks and views of a record are refused as records, and clipped together where `privacy_unit` says whose."""
    x = torch.randn(8, 4, dtype=torch.float64)
    y = torch.randn(8, 1, dtype=torch.float64)

    def doubled(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return torch.cat([x[list(rows)]] * 2), torch.cat([y[list(rows)]] * 2)

    run = attach(mlp().double(), range(8), loader={"collate_fn": doubled})  # type: ignore[arg-type]
    squared_loss(run.model, next(iter(run.loader))).backward()
    with pytest.raises(dpkit.NonPrivateGradientError, match=r"\[16\].* 8 records"):
        run.optimizer.step()
    run.engine.detach()

    def released(units: int) -> Tensor:
        model = mlp().double()
        before = weights(model)
        run = attach(model, range(8), 2, privacy_unit=[0] * 5 + [1] * 3, loader={"collate_fn": doubled_not(x, y)})  # type: ignore[arg-type]
        with drawing(range(units)):
            for rows, _ in run.loader:
                (1e4 * model(rows)).mean().backward()
                run.optimizer.step()
        return (before - weights(model)) * 2

    assert float((released(2) - released(1)).norm()) == pytest.approx(1.0)
    assert float(released(1).norm()) == pytest.approx(1.0)


def doubled_not(x: Tensor, y: Tensor) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    return lambda rows: (x[list(rows)], y[list(rows)])


def test_pitfall_31_what_is_not_counted_is_said() -> None:
    """dpkit keeps no statistics of the data; those of the user's own making are named where the promise is made."""
    page = (Path(__file__).parents[2] / "docs" / "guarantee.md").read_text(encoding="utf-8").lower()
    for uncounted in (
        "hyper-parameter", "early stopping", "label counts", "class weights", "vocabular", "normalisation statistics",
        "nonfinite_records", "number of records",
    ):  # fmt: skip
        assert uncounted in page, uncounted
    assert "do not publish" in (dpkit.PrivacyEngine.nonfinite_records.__doc__ or "")

    class Centred(nn.Module):
        """Keeps a running mean of its input, as a normalisation of the data would."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean += 0.1 * (x.mean(0) - self.mean)
            return self.layer(x)

    with pytest.raises(dpkit.UnsupportedModuleError, match="mean"):
        train(attach(Centred()))
