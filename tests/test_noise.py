"""Noise: once a logical batch, of the right size, independent, in float32 or wider, and nobody's to foretell.

Every statistical test has a false-alarm rate of 1e-6 where the noise is right.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpkit
from dpkit.noise import NoiseSource
from tests.training import attach, data, drawing, mlp, squared_loss, train, weights, work

ALARM = 1e-6
SIGMA, C = 0.7, 3.0


def released(
    draws: Sequence[Sequence[int]],
    *,
    model: nn.Module | None = None,
    empty_gradient: bool = True,
    records: int = 40,
    batch_size: int = 8,
    **options: object,
) -> list[Tensor]:
    """The gradient that each optimizer step sees, all parameters in one vector, times the expected batch size."""
    model = nn.Linear(48, 64) if model is None else model
    dtype = next(model.parameters()).dtype
    x = torch.randn(records, 48, dtype=dtype)
    run = attach(
        model,
        TensorDataset(x, torch.zeros(records, 1)),
        batch_size,
        **{"noise_multiplier": SIGMA, "max_grad_norm": C, **options},
    )
    seen: list[Tensor] = []
    run.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None] or [torch.empty(0)])
        )
    )
    with drawing(*draws):
        for batch in run.loader:
            loss = model(batch[0]).square().mean()
            (loss * 0 if empty_gradient else loss).backward()
            run.optimizer.step()
    run.engine.detach()
    return [g.detach().clone() * batch_size for g in seen if g.numel()]


def assert_normal(noise: Tensor, std: float) -> None:
    """Fails unless the entries are plausibly independent N(0, std²): size (chi-square), mean, shape (Kolmogorov)."""
    z = noise.double().flatten() / std
    m = z.numel()
    low, high = stats.chi2.ppf([ALARM / 6, 1 - ALARM / 6], m)
    assert low <= float(z.square().sum()) <= high, f"standard deviation {float(z.std()) * std:.4g}, expected {std:.4g}"
    assert abs(float(z.sum())) / m**0.5 <= stats.norm.isf(ALARM / 6)
    assert stats.kstest(z.numpy(), "norm").pvalue >= ALARM / 3


@pytest.mark.parametrize("physical", [None, 2, 5])
def test_once_a_logical_batch(physical: int | None) -> None:
    """σ C / expected batch size, whether the batch is served whole or in parts, small, large or empty."""
    draws = [range(8), [], [0], range(20), [], []]
    seen = released(draws, max_physical_batch_size=physical)
    assert len(seen) == len(draws)
    for noise in seen:
        assert_normal(noise, SIGMA * C)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_every_clipping(clipping: str) -> None:
    """The noise follows the clipping's own sensitivity."""
    assert_normal(torch.cat(released([range(8)] * 3, clipping=clipping)), SIGMA * C)


def test_sensitivity_travels_with_the_clipping() -> None:
    """A clipping that promises less gets more noise."""

    class Loose(dpkit.FlatClipping):
        def sensitivity(self, max_grad_norm: float) -> float:
            return 5 * max_grad_norm

    assert_normal(torch.cat(released([range(8)] * 3, clipping=Loose())), 5 * SIGMA * C)


def test_added_to_the_clipped_sum() -> None:
    """With the signal in it, what exceeds the noiseless step is the noise."""
    model = nn.Linear(48, 64)
    draws = [range(4, 20)]
    torch.manual_seed(5)
    noisy = released(draws, model=model, empty_gradient=False, lr=0.0)
    torch.manual_seed(5)
    clean = released(draws, model=model, empty_gradient=False, lr=0.0, noise_multiplier=0.0)
    assert clean[0].norm() > 0
    assert_normal(noisy[0] - clean[0], SIGMA * C)


def test_independent() -> None:
    """Between parameters, between steps, between engines: correlations are those of chance."""
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    noise = released([range(8), [], range(8)], model=model) + released([range(8)], model=nn.Linear(48, 2 * 49))
    parts = [v for g in noise for v in g.split(48 * 48 + 48)]
    assert len(parts) >= 8
    pairs = [(a, b) for k, a in enumerate(parts) for b in parts[k + 1 :] if len(a) == len(b)]
    for a, b in pairs:
        correlation = float(a.double() @ b.double()) / (SIGMA * C) ** 2 / len(a) ** 0.5
        assert abs(correlation) <= stats.norm.isf(ALARM / 2 / len(pairs)) * 1.1  # the product's tails are heavier


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_drawn_in_float32_or_wider(dtype: torch.dtype) -> None:
    """bfloat16 has 8 bits: noise drawn in it would take few thousand values, and tell the sum's last bits."""
    kept: list[Tensor] = []
    add_to = NoiseSource.add_to

    def spy(self: NoiseSource, sums: Sequence[Tensor], std: float) -> None:
        add_to(self, sums, std)
        kept.extend(s.clone() for s in sums)

    model = nn.Linear(48, 4000, bias=False).to(dtype)
    with mock.patch.object(NoiseSource, "add_to", spy):
        [gradient] = released([[]], model=model)
    [noise] = kept
    assert noise.dtype == torch.promote_types(dtype, torch.float32)
    assert len(noise.unique()) > 0.95 * noise.numel()
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient / 8, (noise / 8).to(dtype), rtol=0, atol=0)


def final(seed: int | None, global_seed: int = 0) -> Tensor:
    """The weights after a short noisy training."""
    model = mlp()
    torch.manual_seed(global_seed)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    sampler = {"generator": torch.Generator().manual_seed(0)}
    train(attach(model, data(), 4, noise_multiplier=1.0, noise_generator=generator, loader=sampler))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_a_given_generator_repeats() -> None:
    """`noise_generator` makes a run repeat exactly, whatever torch's global seed; another seed is another run."""
    assert torch.equal(final(1, 0), final(1, 7))
    assert not torch.equal(final(1), final(2))


def test_nobody_knows_the_default_seed() -> None:
    """torch.manual_seed, which experiments publish, does not repeat the noise; nor does noise advance its generator."""
    assert not torch.equal(final(None), final(None))
    run = attach(mlp(), noise_multiplier=1.0)
    for batch in run.loader:
        squared_loss(run.model, batch).backward()
        before = torch.get_rng_state()
        run.optimizer.step()
        assert torch.equal(before, torch.get_rng_state())


def test_parameters_that_no_forward_used_get_noise_too() -> None:
    """Whether a parameter was used may depend on the data; a step without noise on it would tell."""
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "unused": nn.Linear(40, 40)})
    run = attach(model, noise_multiplier=SIGMA, max_grad_norm=C)
    for x, y in run.loader:
        (model["used"](x) - y).square().mean().backward()
        run.optimizer.step()
    noise = torch.cat([p.grad.flatten() for p in model["unused"].parameters() if p.grad is not None])
    assert_normal(noise * run.engine.expected_batch_size, SIGMA * C)


def test_no_noise_where_none_was_asked_for() -> None:
    """σ = 0 adds nothing at all, and is accounted as no protection."""
    run = attach(mlp())
    with drawing([]):
        assert list(run.loader) == []
    assert all(p.grad is not None and not p.grad.any() for p in run.model.parameters())
    assert run.engine.get_epsilon(1e-5) == float("inf")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_forked_processes_have_noise_and_draws_of_their_own(inside: bool) -> None:
    """The difference of what two of them release has noise, too; a pass that both would go on with is refused."""
    run = attach(nn.Linear(4, 1), data(64), 8, noise_multiplier=1.0)
    if inside:
        batches = iter(run.loader)
        work(run, next(batches))
    else:
        train(run)
        batches = None
    before = weights(run.model)
    reader, writer = os.pipe()
    child = os.fork()
    sizes, refused = [], False
    try:
        for batch in batches or run.loader:
            sizes.append(len(batch[0]))
            work(run, batch)
    except dpkit.UnfinishedStepError:
        refused = True
    moved = weights(run.model) - before
    if child == 0:
        os.write(writer, pickle.dumps((moved, sizes, refused)))
        os._exit(0)
    os.waitpid(child, 0)
    others, other_sizes, other_refused = pickle.loads(os.read(reader, 1 << 20))
    os.close(reader)
    os.close(writer)
    assert not refused
    assert other_refused == inside
    assert not (moved == others).any()
    assert sizes != other_sizes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_seeded_noise_does_not_go_on_in_a_forked_process() -> None:
    """Nobody but the engine knows that the other process adds the same noise, to a sum of other records."""
    run = attach(mlp(), data(64), 8, noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(0))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            train(run)
        except dpkit.PrivacyError as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    train(run)  # the process that made it goes on
    os.waitpid(child, 0)
    said = os.read(reader, 1 << 16).decode()
    os.close(reader)
    os.close(writer)
    assert said.startswith("ConfigurationError: this process was forked")
    assert "noise_generator" in said
