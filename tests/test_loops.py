"""Loops of real training: loss scaling, half precision, checkpointed activations, adversarial games; each step against
the loop over single records.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.scaler import LossScale
from tests import models as m
from tests.oracle import PyTree, clipped_sum, norm
from tests.training import attach, data, drawing, mlp, squared_loss, weights

N, C = 12, 0.5


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))


def records() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)


def losses(model: nn.Module, batch: PyTree) -> Tensor:
    return F.cross_entropy(model(batch[0].to(next(model.parameters()).dtype)).float(), batch[1], reduction="none")


def moved(
    model: nn.Module, loop: Callable[[Any, Any, Any], None], batch: tuple[Tensor, ...] | None = None, **options: Any
) -> dict[str, Tensor]:
    """−(change) · N of the noiseless pass that ``loop(engine, optimizer, loader)`` takes at learning rate 1."""
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = dpkit.PrivacyEngine(accountant="rdp")
    given = DataLoader(TensorDataset(*(batch or records())), batch_size=N)
    _, _, loader = engine.make_private(model, optimizer, given, noise_multiplier=0.0, max_grad_norm=C, **options)
    loop(engine, optimizer, loader)
    engine.detach()
    return {k: (before[k].float() - p.detach().float()) * N for k, p in model.named_parameters()}


def error(step: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    gap = {k: step[k] - expected[k].float() for k in step}
    return float(norm(gap) / norm({k: v.float() for k, v in expected.items()}))


# --- GradScaler (pitfall 23) ---


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("physical", [None, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("factor", [2.0**16, 2.0**-10])
def test_grad_scaler(factor: float, unscale: bool, reduction: str, physical: int | None, strict: bool) -> None:
    """The factor does not count against the bound; unscale_, clip_grad_norm_, step and update are the usual ones."""
    scaler = torch.amp.GradScaler("cpu", init_scale=factor, growth_interval=1)
    model = net()

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                values = losses(model, batch)
                if strict:
                    engine.backward(scaler.scale(values))
                else:
                    scaler.scale(values.mean() if reduction == "mean" else values.sum()).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                scaler.step(optimizer)
                scaler.update()
        assert scaler.get_scale() == factor
        assert engine.nonfinite_records == 0

    options = {"loss_reduction": reduction, "max_physical_batch_size": physical}
    step = moved(model, loop, grad_scaler=scaler, **options)
    assert scaler.get_growth_interval() == 1  # as it was
    plain = net()

    def ordinary(engine: Any, optimizer: Any, loader: Any) -> None:
        for _ in range(2):
            for batch in loader:
                values = losses(plain, batch)
                (values.mean() if reduction == "mean" else values.sum()).backward()
                optimizer.step()

    assert error(step, moved(plain, ordinary, **options)) < 1e-6


def test_grad_scaler_against_the_oracle() -> None:
    """One step of fp16 autocast with a factor of 2^10, against single records in float32."""
    expected = clipped_sum(net(), losses, records(), N, C)
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        for batch in loader:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = losses(model, batch).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    assert error(moved(model, loop, grad_scaler=scaler), expected) < 5e-3


def test_an_overflow_is_left_out_and_the_step_is_taken() -> None:
    """A record that overflows is none of the sum; neither the step nor the factor tells that there was one."""
    x, y = records()
    x[3] *= 1e6
    model, scaler = nn.Sequential(nn.Linear(6, 3)), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        for batch in loader:
            values = (model(batch[0]) * torch.where(batch[0].abs().amax(1) > 1e4, torch.inf, 1.0)[:, None]).sum(1)
            scaler.scale(values.mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert engine.nonfinite_records == 1
        assert engine.accountant.ledger[0][1] == 1
        assert scaler.get_scale() == 2.0**10

    step = moved(model, loop, (x, y), grad_scaler=scaler)
    assert all(torch.isfinite(v).all() and v.any() for v in step.values())


def test_a_scaler_that_the_engine_was_not_told_of_is_no_silent_mistake() -> None:
    """torch's own assertion: there is no gradient to inspect. Nothing is released."""
    run = attach(mlp(), noise_multiplier=1.0)
    scaler, before = torch.amp.GradScaler("cpu"), weights(run.model)
    batch = next(iter(run.loader))
    scaler.scale(squared_loss(run.model, batch)).backward()
    with pytest.raises(AssertionError, match="inf checks"):
        scaler.step(run.optimizer)
    assert torch.equal(weights(run.model), before)
    assert run.engine.get_epsilon(1e-5) == 0.0


def test_a_stray_gradient_under_a_scaler_is_refused() -> None:
    """The zeros that the scaler inspects hide nothing: a penalty on the smallest weight, first batch and later."""
    for warm in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        run = attach(mlp(), grad_scaler=scaler)
        if warm:
            for batch in run.loader:
                scaler.scale(squared_loss(run.model, batch)).backward()
                scaler.step(run.optimizer)
                scaler.update()
        for batch in run.loader:
            loss = squared_loss(run.model, batch) + run.model[2].bias.square().sum()
            scaler.scale(loss).backward()
            with pytest.raises((dpkit.NonPrivateGradientError, dpkit.GradientMismatchError)):
                scaler.step(run.optimizer)
            break


def test_disabled_scaler_and_empty_draws() -> None:
    scaler, off = torch.amp.GradScaler("cpu", init_scale=8.0), torch.amp.GradScaler("cpu", enabled=False)
    finals = []
    for used in (scaler, off):
        run = attach(mlp(), data(), 4, grad_scaler=used)
        with drawing([], [0, 1, 2], [], [5]):
            for batch in run.loader:
                used.scale(squared_loss(run.model, batch)).backward()
                used.step(run.optimizer)
                used.update()
        assert run.engine.accountant.ledger[0][1] == 4
        finals.append(weights(run.model))
    torch.testing.assert_close(*finals)


def test_what_is_no_scaler() -> None:
    with pytest.raises(dpkit.ConfigurationError, match="GradScaler"):
        attach(mlp(), grad_scaler="fp16")
    broken = torch.amp.GradScaler("cpu", init_scale=0.0)
    with pytest.raises(dpkit.ConfigurationError, match="factor"):
        LossScale(broken).current()


# --- activation checkpointing, half precision, accumulation ---


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("physical", [None, 5])
def test_activation_checkpointing(reentrant: bool, precision: str, physical: int | None) -> None:
    """Both kinds, on several steps (the first is proven, later ones are not), in parts, in half precision."""
    x = torch.randn(N, 4, 6, generator=torch.Generator().manual_seed(1))
    y = records()[1] % 2

    def build(kind: bool) -> nn.Module:
        torch.manual_seed(0)
        model = m.Checkpointed(reentrant=kind)
        return model.bfloat16() if precision == "bfloat16" else model

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()

    def values(model: nn.Module, batch: PyTree) -> Tensor:
        with autocast():
            return losses(model, batch)

    model, twin = build(reentrant), build(False)
    expected = {k: torch.zeros_like(p, dtype=torch.float32) for k, p in twin.named_parameters()}

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        for _ in range(3):
            twin.load_state_dict(model.state_dict())
            total = clipped_sum(twin, values, (x, y), N, C)
            for k in expected:
                expected[k] += total[k].float()
            for batch in loader:
                values(model, batch).mean().backward()
                optimizer.step()

    step = moved(model, loop, (x, y), max_physical_batch_size=physical)
    # pure bfloat16: the weights themselves hold 8 bits, and each update is rounded to them
    assert error(step, expected) < {"float32": 1e-5, "autocast": 0.05, "bfloat16": 0.3}[precision]


def test_gradient_accumulation() -> None:
    """The accumulating loop (step and zero_grad on the last part only) takes the step of the whole logical batch."""
    whole, parts = net(), net()

    def one(engine: Any, optimizer: Any, loader: Any) -> None:
        for batch in loader:
            losses(whole, batch).mean().backward()
            optimizer.step()

    def accumulating(engine: Any, optimizer: Any, loader: Any) -> None:
        served = 0
        for batch in loader:
            served += len(batch[0])
            losses(parts, batch).mean().backward()
            if served == N:
                optimizer.step()
                optimizer.zero_grad()

    assert error(moved(parts, accumulating, max_physical_batch_size=5), moved(whole, one)) < 1e-6


def test_two_backwards_add_up() -> None:
    """Two losses back-propagated one after the other, over one forward or two: a record's gradient is their sum."""
    x, y = records()

    def both(model: nn.Module, batch: PyTree) -> Tensor:
        return losses(model, batch) + 0.3 * model(batch[0] * 2).square().sum(1)

    expected = clipped_sum(net(), both, (x, y), N, C)
    for retained in (False, True):
        model = net()

        def loop(engine: Any, optimizer: Any, loader: Any, model: nn.Module = model, kept: bool = retained) -> None:
            for batch in loader:
                if kept:
                    out, other = model(batch[0]), model(batch[0] * 2)
                    F.cross_entropy(out, batch[1]).backward(retain_graph=True)
                    (0.3 * other.square().sum(1).mean()).backward()
                else:
                    losses(model, batch).mean().backward()
                    (0.3 * model(batch[0] * 2).square().sum(1).mean()).backward()
                optimizer.step()

        assert error(moved(model, loop), expected) < 1e-5


# --- games ---


def test_a_game_of_two() -> None:
    """GAN: the discriminator's pass over real and generated data is private; the generator learns through it from
    public noise, inside paused(). Both take the steps of a loop that clips record by record."""
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
    critic = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    x, noise = records()[0], torch.randn(3, N, 3)
    other_generator, other_critic = copy.deepcopy(generator), copy.deepcopy(critic)

    def critic_losses(model: nn.Module, batch: PyTree) -> Tensor:
        real, fake = batch
        return (F.softplus(-model(real)) + F.softplus(model(fake))).flatten()

    # the definition
    for z in noise:
        fake = other_generator(z).detach()
        total = clipped_sum(other_critic, critic_losses, (x, fake), N, C)
        with torch.no_grad():
            for k, p in other_critic.named_parameters():
                p -= 0.5 * total[k] / N
        gradients = torch.autograd.grad(
            F.softplus(-other_critic(other_generator(z))).mean(), list(other_generator.parameters())
        )
        with torch.no_grad():
            for p, g in zip(other_generator.parameters(), gradients, strict=True):
                p -= 0.5 * g

    # the loop
    run = attach(critic, TensorDataset(x), optimizer=torch.optim.SGD(critic.parameters(), lr=0.5), max_grad_norm=C)
    public = torch.optim.SGD(generator.parameters(), lr=0.5)
    for z in noise:
        for (real,) in run.loader:
            run.optimizer.zero_grad()
            critic_losses(critic, (real, generator(z).detach())).mean().backward()
            run.optimizer.step()
        with run.engine.paused():
            public.zero_grad()
            F.softplus(-critic(generator(z))).mean().backward()
            public.step()
    torch.testing.assert_close(weights(critic), weights(other_critic), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(generator), weights(other_generator), rtol=1e-4, atol=1e-6)
    assert run.engine.accountant.ledger[0][1] == 3


def test_the_generators_pass_within_the_critics_batch() -> None:
    """paused() between the critic's backward and its step: what the public pass leaves is not the critic's."""
    critic, generator = nn.Linear(6, 1), nn.Linear(3, 6)
    twin = copy.deepcopy(critic)
    x, z = records()[0], torch.randn(N, 3)
    total = clipped_sum(twin, lambda net, b: net(b).square().flatten(), x, N, C)
    run = attach(critic, TensorDataset(x), max_grad_norm=C)
    for (real,) in run.loader:
        critic(real).square().mean().backward()
        with run.engine.paused():
            critic(generator(z)).mean().backward()
        for p in critic.parameters():
            p.grad = None
        run.optimizer.step()
    for (k, p), old in zip(critic.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - total[k] / N)


# --- gradients of inputs ---


@pytest.mark.parametrize("how", ["grad", "inputs"])
def test_adversarial_examples(how: str) -> None:
    """The gradient with respect to the input, taken inside the batch, is no use of the parameters' gradients; the step
    is that of the perturbed records, on the first batch and later."""
    x, y = records()

    def perturbed(model: nn.Module, batch: PyTree) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        loss = losses(model, (inputs, batch[1])).sum()
        if how == "grad":
            (gradient,) = torch.autograd.grad(loss, inputs)
        else:
            loss.backward(inputs=[inputs])
            assert inputs.grad is not None
            gradient = inputs.grad
        return losses(model, (batch[0] + 0.1 * gradient.sign(), batch[1]))

    model, twin = net(), net()
    expected = {k: torch.zeros_like(p) for k, p in twin.named_parameters()}

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        for _ in range(3):
            twin.load_state_dict(model.state_dict())
            total = clipped_sum(twin, perturbed, (x, y), N, C)
            for k in expected:
                expected[k] += total[k]
            for batch in loader:
                perturbed(model, batch).mean().backward()
                optimizer.step()

    assert error(moved(model, loop), expected) < 1e-5


class Critic(nn.Module):
    """A ReLU critic; its first layer is one with a rule, or a bare matrix."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.first = m.EinsumLinear(6, 8) if bare else nn.Linear(6, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x))).flatten()


def penalty(critic: nn.Module, x: Tensor) -> Tensor:
    """(‖∇ₓ critic(x)‖ − 1)², one for each record (Gulrajani et al. 2017)."""
    inputs = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(inputs).sum(), inputs, create_graph=True)
    return (gradient.norm(dim=1) - 1).square()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_gradient_penalties_are_refused(bare: bool, warm: bool) -> None:
    """WGAN-GP: what a ReLU critic's penalty owes to its weights would be missing without a word."""
    critic = Critic(bare)
    run = attach(critic, TensorDataset(records()[0]), lr=0.1)
    if warm:
        for (x,) in run.loader:
            critic(x).mean().backward()
            run.optimizer.step()
    before = weights(critic)
    for (x,) in run.loader:
        with pytest.raises(dpkit.UncoveredParameterError, match="create_graph"):
            (critic(x) + penalty(critic, x)).mean().backward()
        with run.engine.paused():  # public: as torch has it
            penalty(critic, x).mean().backward()
            assert all(p.grad is not None and p.grad.any() for p in critic.parameters() if p.ndim > 1)
        break
    assert torch.equal(weights(critic), before)


def test_gradient_penalties_on_bare_parameters_alone_are_exact() -> None:
    """Where parameters are followed by copies, so are their second derivatives."""
    x, y = torch.randn(N, 6), torch.zeros(N)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(m.LayerScale(6), nn.Tanh(), m.LayerScale(6)).double()

    def values(model: nn.Module, batch: PyTree) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        out = model(inputs)
        (gradient,) = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        return out.square().sum(1) + (gradient.norm(dim=1) - 1).square()

    model, twin = build(), build()
    total = clipped_sum(twin, values, (x.double(), y), N, C)
    run = attach(model, TensorDataset(x.double(), y), max_grad_norm=C)
    for batch in run.loader:
        values(model, batch).mean().backward()
        run.optimizer.step()
    for (k, p), old in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - total[k] / N)


def test_second_order_backward_is_refused() -> None:
    run = attach(mlp())
    for batch in run.loader:
        with pytest.raises(dpkit.UncoveredParameterError, match="create_graph"):
            squared_loss(run.model, batch).backward(create_graph=True)
        break


@pytest.mark.parametrize("seed", range(5))
def test_gradient_that_is_rounding_alone(seed: int) -> None:
    """Only a key's bias trains, which shifts all scores alike: its gradient is zero but for rounding, no mismatch."""
    torch.manual_seed(seed)
    key = nn.Linear(3, 1)
    key.weight.requires_grad_(False)
    before = key.bias.detach().clone()
    run = attach(key, TensorDataset(torch.randn(8, 5, 3), torch.randn(8, 1)), 8, noise_multiplier=0.0)
    for inputs, _ in run.loader:
        run.optimizer.zero_grad()
        scores = torch.softmax(run.model(inputs).squeeze(-1), 1)
        (scores * inputs[..., 0]).sum(1).mean().backward()
        run.optimizer.step()
    torch.testing.assert_close(key.bias.detach(), before, rtol=0, atol=1e-6)


# --- policies ---


class Policy(nn.Module):
    """Actions are normal, with one width for all states: in a distribution, or in its two parts."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.mean, self.log_width, self.apart = nn.Linear(6, 2), nn.Parameter(torch.zeros(2)), apart

    def forward(self, x: Tensor) -> Any:
        parts = self.mean(x), self.log_width.exp()
        return parts if self.apart else torch.distributions.Normal(*parts)


@pytest.mark.parametrize("apart", [False, True])
def test_policies(apart: bool) -> None:
    """REINFORCE: the width meets the records in the user's loss, in an operation with two results."""
    batch = records()[0], torch.randn(N, 2), torch.randn(N)

    def values(model: nn.Module, batch: PyTree) -> Tensor:
        states, actions, advantages = batch
        chances = torch.distributions.Normal(*model(states)) if apart else model(states)
        return -advantages * chances.log_prob(actions).sum(1) - 0.01 * chances.entropy().sum(1)

    model = Policy(apart)
    expected = clipped_sum(copy.deepcopy(model), values, batch, N, C)

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        for part in loader:
            values(model, part).mean().backward()
            optimizer.step()

    assert error(moved(model, loop, batch), expected) < 1e-5
