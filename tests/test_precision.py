"""Half precision, compiled models, and loops that touch gradients between backward and step."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import dpkit
from tests import models as m
from tests.oracle import clipped_sum, norm
from tests.training import attach

N = 24


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))


def records() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)


def losses(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(net(x.to(next(net.parameters()).dtype)).float(), y, reduction="none")


def one_step(net: nn.Module, *, autocast: bool = False, meddle: str = "") -> dict[str, Tensor]:
    """−(change) · B of a noiseless step over all records at learning rate 1."""
    before = {k: p.detach().clone().float() for k, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    engine = dpkit.PrivacyEngine()
    loader = DataLoader(TensorDataset(*records()), batch_size=N)
    engine.make_private(net, optimizer, loader, noise_multiplier=0.0, max_grad_norm=0.5)
    for batch in engine._loader:
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = losses(net, batch).mean()
        loss.backward()
        if meddle == "clip":
            nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        if meddle == "zero":
            optimizer.zero_grad()
        optimizer.step()
    engine.detach()
    return {k: (before[k] - p.detach().float()) * N for k, p in net.named_parameters()}


def error(step: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    gap = {k: step[k] - expected[k].float() for k in step}
    return float(norm(gap) / norm({k: v.float() for k, v in expected.items()}))


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
def test_half_precision_is_exact_to_its_own_rounding(kind: str) -> None:
    expected = clipped_sum(model(), losses, records(), N, 0.5)
    net = model() if kind == "autocast" else model().bfloat16()
    step = one_step(net, autocast=kind == "autocast")
    # bfloat16 weights of size ~1 cannot hold the update itself more finely than 2^-8
    assert error(step, expected) < (0.03 if kind == "autocast" else 0.3)


def test_half_precision_norms_are_in_float32() -> None:
    """The sensitivity bound holds for bfloat16 gradients: their norm is not rounded to 8 bits."""
    form = dpkit.Dense(torch.full((1, 1000), 1.0, dtype=torch.bfloat16) + torch.rand(1, 1000).bfloat16())
    assert form.sq_norm().dtype == torch.float32
    torch.testing.assert_close(form.sq_norm(), form.value.double().square().sum(1).float())


@pytest.mark.parametrize("seed", range(4))
def test_gradients_that_are_rounding_alone(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """An attention key's bias changes nothing: in half precision its gradient is what rounding leaves of nothing."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 6), m.Block(6), nn.Flatten(), nn.Linear(24, 2))
    run = attach(model, TensorDataset(torch.randn(11, 4, 6), torch.arange(11) % 2))
    for x, y in run.loader:
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(model(x), y).backward()
        run.optimizer.step()
    assert not caplog.records


@pytest.mark.parametrize("meddle", ["clip", "zero"])
def test_what_happens_to_p_grad_between_backward_and_step_does_not_matter(meddle: str) -> None:
    """Trainers clip by default; in the first batch, too, there is nothing in ``p.grad`` for them to clip."""
    plain, meddled = one_step(model()), one_step(model(), meddle=meddle)
    for name, step in plain.items():
        torch.testing.assert_close(meddled[name], step, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_takes_the_same_step() -> None:
    compiled = torch.compile(model(), backend="eager")
    step = {k.removeprefix("_orig_mod."): v for k, v in one_step(compiled).items()}  # type: ignore[arg-type]
    assert error(step, one_step(model())) < 1e-5


def private(**options: object) -> dpkit.PrivacyEngine:
    engine, net = dpkit.PrivacyEngine(), model()
    dataset = options.pop("dataset", TensorDataset(*records()))
    loader = DataLoader(dataset, batch_size=8, generator=options.pop("generator", None))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    engine.make_private(net, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, **options)  # type: ignore[arg-type]
    return engine


def test_one_stream_for_draw_and_noise_is_refused() -> None:
    generator = torch.Generator().manual_seed(3)
    for noise in (generator, copy.deepcopy(torch.Generator().manual_seed(3))):
        with pytest.raises(dpkit.ConfigurationError, match="same stream"):
            private(generator=generator, noise_generator=noise)
    private(generator=generator, noise_generator=torch.Generator().manual_seed(4))


def test_a_subset_that_repeats_a_record_is_refused() -> None:
    whole = TensorDataset(*records())
    n = len(whole)
    first, rest = Subset(whole, range(3)), Subset(whole, range(3, n))
    for repeated in (
        Subset(whole, [0, 1, 1, 2, 3, 4, 5, 6, 7]),
        Subset(whole, [0, -n, 1, 2, 3, 4, 5, 6, 7]),
        ConcatDataset([whole, whole]),
        ConcatDataset([whole, first]),
        Subset(ConcatDataset([first, whole]), range(n)),
    ):
        with pytest.raises(dpkit.SamplingError, match="several times"):
            private(dataset=repeated)
    private(dataset=ConcatDataset([rest, ConcatDataset([first])]))


def test_the_draw_is_not_told_by_the_global_seed() -> None:
    def draws() -> list[list[int]]:
        torch.manual_seed(0)
        engine = private()
        return list(engine._loader.batch_sampler)  # type: ignore[arg-type]

    assert draws() != draws()
