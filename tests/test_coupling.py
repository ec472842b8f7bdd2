"""Records that meet where one look does not show it: by chance, in train mode alone, in outputs of other kinds, in what
a module remembers; and everyday models that only look as if they did.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpkit
from tests.oracle import clipped_sum
from tests.test_loops import C, N, error, moved
from tests.training import attach, drawing, train, work


class Mixes(nn.Module):
    """A network whose hidden layer goes through ``mix(y, training)``."""

    def __init__(self, mix: Any) -> None:
        super().__init__()
        self.first, self.head, self.mix = nn.Linear(4, 5), nn.Linear(5, 1), mix

    def forward(self, x: Tensor) -> Any:
        return self.head(self.mix(torch.tanh(self.first(x)), self.training))


# --- chance ---


def mixup(y: Tensor, training: bool) -> Tensor:
    return 0.7 * y + 0.3 * y[torch.randperm(len(y))] if training else y


def mixup_at_times(y: Tensor, training: bool) -> Tensor:
    return mixup(y, training and bool(torch.rand(()) < 0.7))


def standardised_and_dropped(y: Tensor, training: bool) -> Tensor:
    """A batch normalisation of one's own, and dropout that is no module."""
    if training:
        y = (y - y.mean(0).detach()) / (y.std(0).detach() + 0.1)
    return F.dropout(y, 0.3, training)


@pytest.mark.parametrize("mix", [mixup, mixup_at_times, standardised_and_dropped])
@pytest.mark.parametrize("seed", range(3))
def test_coupling_by_chance(mix: Any, seed: int) -> None:
    """Without chance, in eval mode, nothing mixes: chance is no reason to look there alone."""
    torch.manual_seed(seed)
    with pytest.raises(dpkit.CoupledRecordsError, match="replaced"):
        train(attach(Mixes(mix)))


def noise_for_each(y: Tensor, training: bool) -> Tensor:
    return y + 0.1 * torch.randn_like(y)


def noise_for_all(y: Tensor, training: bool) -> Tensor:
    return y * torch.rand(y.shape[1])


def layer_at_times(y: Tensor, training: bool) -> Tensor:
    return y if training and bool(torch.rand(()) < 0.5) else torch.tanh(y)


def as_much_as_the_data_say(y: Tensor, training: bool) -> Tensor:
    """As rejection sampling does: another record, and the next ones' numbers are others."""
    return y * torch.rand(1 + int(1e4 * y.detach().abs().sum()))[-1]


@pytest.mark.parametrize("mix", [noise_for_each, noise_for_all, layer_at_times])
@pytest.mark.parametrize("seed", range(3))
def test_chance_is_no_coupling(mix: Any, seed: int) -> None:
    """Noise that is drawn in eval mode, too (a variational autoencoder, diffusion)."""
    torch.manual_seed(seed)
    train(attach(Mixes(mix)), 2)


def test_chance_of_which_nothing_can_be_told() -> None:
    with pytest.raises(dpkit.CoupledRecordsError, match="how many is for the records to say"):
        train(attach(Mixes(as_much_as_the_data_say)))


class Denoises(nn.Module):
    """Diffusion as many write it: noise and times are drawn in the forward, which returns the loss alone."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.net, self.coupled = nn.Linear(5, 4), coupled

    def forward(self, x: Tensor) -> Tensor:
        time, noise = torch.rand(len(x), 1), torch.randn_like(x)
        guess = self.net(torch.cat([(1 - time) * x + time * noise, time], 1))
        losses = (guess - noise).square().mean(1)
        weights = x[:, 0].abs()
        return (losses * weights).sum() / weights.sum() if self.coupled else losses.mean()


def test_a_loss_with_noise_in_it() -> None:
    run = attach(Denoises(False))
    for x, _ in run.loader:
        run.model(x).backward()
        run.optimizer.step()
    run = attach(Denoises(True))
    for x, _ in run.loader:
        with pytest.raises(dpkit.CoupledRecordsError, match="neither the mean nor the sum"):
            run.model(x).backward()


class OwnChance(nn.Module):
    """Draws from a generator of its own, and counts its steps; a mean over the batch, if asked for, is hidden in it."""

    def __init__(self, generator: Any, coupled: bool = False) -> None:
        super().__init__()
        self.net, self.generator, self.coupled, self.calls, self.warmth = nn.Linear(4, 1), generator, coupled, 0, 0.5

    def drawn(self, n: int) -> Tensor:
        if isinstance(self.generator, torch.Generator):
            return torch.randn(n, 1, generator=self.generator)
        if isinstance(self.generator, random.Random):
            return torch.tensor([[self.generator.random()] for _ in range(n)])
        return torch.from_numpy(self.generator.normal(size=(n, 1))).float()

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.warmth = self.calls + 1, 0.9 * self.warmth
        y = self.net(x) * (1 + self.warmth)
        return y + 0.1 * self.drawn(len(x)) - (y.mean(0).detach() if self.coupled else 0.0)


GENERATORS: list[Callable[[], Any]] = [
    lambda: torch.Generator().manual_seed(3),
    lambda: random.Random(3),
    lambda: np.random.default_rng(3),
    lambda: np.random.Generator(np.random.MT19937(3)),
]


@pytest.mark.parametrize("build", GENERATORS)
def test_generators_and_counters_of_the_models_own(build: Callable[[], Any]) -> None:
    """They are no coupling, and the examination neither draws nor counts; nor do they hide one."""
    model, generator = OwnChance(build()), build()
    train(attach(model), 3)
    assert (model.calls, model.warmth) == (3, pytest.approx(0.5 * 0.9**3))
    twin = OwnChance(generator)
    for _ in range(3):
        twin.drawn(8)
    assert torch.equal(model.drawn(8), twin.drawn(8))
    with pytest.raises(dpkit.CoupledRecordsError, match="replaced"):
        train(attach(OwnChance(build(), coupled=True)))


def test_forward_called_directly() -> None:
    """What it does between its layers would not be looked at."""
    run = attach(Mixes(standardised))
    x, _ = next(iter(run.loader))
    with pytest.raises(dpkit.ConfigurationError, match=r"Mixes\.forward was called") as refusal:
        run.model.forward(x)
    assert "model(x)" in refusal.value.cure


class LossAlone(Mixes):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x).square().mean()


@pytest.mark.parametrize("seed", range(3))
def test_coupling_by_chance_of_which_the_loss_alone_tells(seed: int) -> None:
    torch.manual_seed(seed)
    for mix, mixes in ((noise_for_each, False), (layer_at_times, False), (mixup, True)):
        run = attach(LossAlone(mix))
        for x, _ in run.loader:
            with pytest.raises(dpkit.CoupledRecordsError) if mixes else contextlib.nullcontext():
                run.model(x).backward()
            run.optimizer.step() if not mixes else None


class Weighted(nn.Module):
    """Its loss is divided by the batch's class weights: a mean, where all records are of one class."""

    def __init__(self, drops: bool) -> None:
        super().__init__()
        self.net, self.drops = nn.Linear(4, 2), drops

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = F.dropout(self.net(x), 0.2, self.training and self.drops)
        weights = torch.tensor([1.0, 10.0])[y]
        return (weights * F.cross_entropy(scores, y, reduction="none")).sum() / weights.sum()


@pytest.mark.parametrize("drops", [False, True])
def test_a_loss_that_is_no_mean_on_a_later_batch(drops: bool) -> None:
    x, y = torch.randn(12, 4), torch.tensor([0] * 8 + [1] * 4)
    run = attach(Weighted(drops), TensorDataset(x, y))
    steps = 0

    def fit() -> None:
        nonlocal steps
        for part in run.loader:
            run.model(*part).backward()
            run.optimizer.step()
            steps += 1

    alike, mixed = list(range(8)), [0, 1, 2, 9, 10]
    with drawing(alike, alike, alike, mixed), pytest.raises(dpkit.CoupledRecordsError, match="neither the mean"):
        fit()
    assert steps == 3


class NoisyNet(nn.Module):
    """Its weights are noisy in train mode, for all records alike: another operation than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.width = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.full((1, 4), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.width * torch.randn(1, 4) if self.training else self.weight)


def test_operations_of_train_mode_alone() -> None:
    train(attach(NoisyNet()), 2)


class LayerDrop(nn.Module):
    """Drops activations and layers in train mode, so that two runs are hard to compare: in eval mode they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scale = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, None] * torch.tensor([0.5, 1.0, 2.0])[:, None]
        for layer in self.layers:
            if not self.training or torch.rand(()) < 0.5:
                rows = F.dropout(y, 0.5, self.training).reshape(-1, 4)
                y = y + self.scale * torch.tanh(layer(rows)).view(y.shape)
        return self.head(y.mean(1))


@pytest.mark.parametrize("seed", range(4))
def test_layers_that_are_left_out_by_chance(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(seed)
    train(attach(LayerDrop()), 3)
    assert not caplog.text


# --- modes ---


def standardised(y: Tensor, training: bool) -> Tensor:
    return y - y.mean(0) if training else y


@pytest.mark.parametrize("part", [False, True])
def test_coupling_in_train_mode_alone(part: bool) -> None:
    """A model that was examined in eval mode is another one in train mode, of a part of it, too."""
    model = Mixes(lambda y, training: y)
    model.first.register_forward_hook(lambda module, args, y: standardised(y, module.training))
    run = attach(model.eval())
    train(run, 2)
    (model.first if part else model).train()
    with pytest.raises(dpkit.CoupledRecordsError, match="left out"):
        train(run)


class Reversed(nn.Module):
    """Runs its middle on the records in reverse order: their gradients are the others'."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        y = self.head(torch.tanh(self.middle(y.flip(0))).flip(0))
        return y.flatten() if self.flat else y


def test_what_is_unfrozen_later_is_attributed_then() -> None:
    """No record's share of a frozen layer is looked at; when it trains, it is."""

    def values(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().sum(1)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Reversed()

    x = torch.randn(N, 6) * torch.logspace(-1, 1, N)[:, None]
    model, twin, start = build(), build(), build().state_dict()

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        model.middle.requires_grad_(False)
        for trains in (False, True):
            model.middle.requires_grad_(trains)
            model.load_state_dict(start)
            for batch in loader:
                values(model, batch).mean().backward()
                optimizer.step()

    assert error(moved(model, loop, (x,)), clipped_sum(twin, values, (x,), N, C)) < 1e-5


def test_what_is_returned_flat_is_attributed() -> None:
    """Rows of outputs [n·k] are a record's, too, and their gradients are compared."""

    def values(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).view(-1, 2).square().sum(1)

    model = Reversed(flat=True)
    x = torch.randn(N, 6) * torch.logspace(-1, 1, N)[:, None]
    expected = clipped_sum(copy.deepcopy(model), values, (x,), N, C)

    def loop(engine: Any, optimizer: Any, loader: Any) -> None:
        for batch in loader:
            values(model, batch).mean().backward()
            optimizer.step()

    assert error(moved(model, loop, (x,)), expected) < 1e-5


def test_two_records_of_which_one_is_squeezed() -> None:
    """``squeeze()`` leaves no dimension of records where there is one: the next batch is examined, too."""

    def fit(mix: Any) -> None:
        run = attach(Wraps(mix, Tensor.squeeze))
        with drawing([0, 1], [0, 1, 2]):
            for x, y in run.loader:
                (run.model(x) - y.squeeze()).square().mean().backward()
                run.optimizer.step()

    fit(lambda y, training: y)
    with pytest.raises(dpkit.CoupledRecordsError, match="left out"):
        fit(standardised)


# --- outputs ---


class Box:
    """An object of a kind that nobody knows."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def in_a_distribution(y: Tensor) -> Any:
    return torch.distributions.Independent(torch.distributions.Normal(y, 1.0), 1)


class Wraps(Mixes):
    def __init__(self, mix: Any, kind: Any) -> None:
        super().__init__(mix)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(super().forward(x))


def value(out: Any) -> Tensor:
    return out.mean if isinstance(out, torch.distributions.Distribution) else out.logits


@pytest.mark.parametrize("kind", [Box, in_a_distribution])
def test_records_that_meet_in_objects(kind: Any) -> None:
    """A policy returns a distribution; what is in it is looked at as anything else."""

    def fit(mix: Any) -> None:
        run = attach(Wraps(mix, kind))
        for x, y in run.loader:
            (value(run.model(x)) - y).square().mean().backward()
            run.optimizer.step()

    fit(lambda y, training: y)
    with pytest.raises(dpkit.CoupledRecordsError, match="left out"):
        fit(standardised)


def test_outputs_that_nobody_can_look_into() -> None:
    run = attach(Wraps(lambda y, training: y, Slots))
    x, _ = next(iter(run.loader))
    with pytest.raises(dpkit.UncoveredParameterError, match="returns a Slots"):
        run.model(x)


class Reduces(nn.Module):
    """Returns beside its prediction what it has reduced over the records."""

    def __init__(self, reduce: Any) -> None:
        super().__init__()
        self.first, self.head, self.reduce = nn.Linear(4, 5), nn.Linear(5, 1), reduce

    def forward(self, x: Tensor) -> Any:
        y = torch.tanh(self.first(x))
        return self.head(y), self.reduce(y)


@pytest.mark.parametrize("reduce", [lambda y: y.mean(0), lambda y: y.T @ y, lambda y: (y.sum() / y.abs().sum())[None]])
def test_losses_on_what_was_reduced_over_the_records(reduce: Any) -> None:
    """A centre, a correlation matrix: to return them is harmless, a loss on them is not."""
    run = attach(Reduces(reduce))
    for x, y in run.loader:
        out, _ = run.model(x)
        (out - y).square().mean().backward()
        run.optimizer.step()
    for x, y in run.loader:
        out, centre = run.model(x)
        with pytest.raises(dpkit.CoupledRecordsError, match=r"no row for each record|neither the mean nor the sum"):
            ((out - y).square().mean() + centre.square().sum()).backward()


def test_a_mean_loss_in_a_row_of_one() -> None:
    """As models give it that were written for DataParallel."""
    run = attach(Wraps(lambda y, training: y, lambda y: y.square().mean()[None]))
    for x, _ in run.loader:
        run.model(x).sum().backward()
        run.optimizer.step()


# --- the backward ---


class Factor(torch.autograd.Function):
    """Identity whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(y)
        ctx.how = how
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.how(*ctx.saved_tensors), None


class Scaled(nn.Module):
    """A factor ``how(hidden)`` in the backward, by one of three ways."""

    def __init__(self, how: Callable[[Tensor], Tensor], way: str) -> None:
        super().__init__()
        self.first, self.second, self.how, self.way = nn.Linear(4, 6), nn.Linear(6, 1), how, way

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.way == "function":
            y = Factor.apply(y, self.how)
        elif self.way == "detach":
            y = y.detach() + self.how(y.detach()) * (y - y.detach())
        elif y.requires_grad:
            factor = self.how(y.detach())
            y.register_hook(lambda grad: grad * factor)
        z: Tensor = self.second(y)
        return z


OF_THE_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda y: torch.tensor(y.numel() ** -0.5),
    "mean": lambda y: y.abs().mean(),
    "largest": lambda y: y.abs().amax(0),
}


@pytest.mark.parametrize("way", ["function", "detach", "hook"])
@pytest.mark.parametrize("what", OF_THE_BATCH)
def test_acting_through_the_backward_alone(what: str, way: str) -> None:
    """No output tells: a record scales the others' gradients. LSQ, which quantises, scales by the tensor's size."""
    with pytest.raises(dpkit.CoupledRecordsError, match=r"first.weight: a record's gradient changed"):
        train(attach(Scaled(OF_THE_BATCH[what], way)))


@pytest.mark.parametrize("way", ["function", "detach", "hook"])
def test_factors_of_a_records_own(way: str) -> None:
    """They are the record's own affair."""
    train(attach(Scaled(lambda y: 0.3 + y.abs().amax(1, keepdim=True), way)))


# --- memory ---


class Remembers(nn.Module):
    """Shifts by a mean of earlier batches, which is not saved; or only keeps it."""

    def __init__(self, use: bool, where: str = "buffer", slow: float = 0.9) -> None:
        super().__init__()
        self.layer, self.use, self.where, self.slow = nn.Linear(4, 1), use, where, slow
        self.steps = 0
        if where == "buffer":
            self.register_buffer("mean", torch.zeros(4), persistent=False)
        elif where == "attribute":
            self.mean = torch.zeros(4)
        elif where == "number":
            self.mean = 0.0
        elif where == "later":
            self.mean = None
        else:
            self.means = deque([torch.zeros(4)], 2) if where == "deque" else [torch.zeros(4)]

    def forward(self, x: Tensor) -> Tensor:
        many = self.where in ("list", "deque")
        mean = self.means[-1] if many else self.mean if self.mean is not None else torch.zeros(4)
        y = self.layer(x - mean if self.use else x) * (1 + self.steps)
        self.steps += 1  # a schedule is no memory of records
        mean = self.slow * mean + (1 - self.slow) * (float(x.mean()) if self.where == "number" else x.mean(0))
        if many:
            self.means.append(mean)
        else:
            self.mean = mean
        return y


@pytest.mark.parametrize("slow", [0.9, 0.9999])
@pytest.mark.parametrize("where", ["buffer", "attribute", "later", "number", "list", "deque"])
def test_what_is_remembered_from_batch_to_batch(where: str, slow: float) -> None:
    """A record acts in later steps then, wherever it is kept, and however little it does; that it is not saved changes
    nothing. What is kept and not used is nobody's business, and is as it was before the model was examined."""
    model = Remembers(False, where, slow)
    run = attach(model)
    work(run, next(iter(run.loader)))
    assert model.steps == 1
    assert where not in ("list", "deque") or len(model.means) == 2
    train(run, 2)
    with pytest.raises(dpkit.UnsupportedModuleError, match=r"into means?, and uses it"):
        train(attach(Remembers(True, where, slow)))


class Carries(nn.Module):
    """A recurrent layer that takes a state and gives one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, last = self.layer(x, state)
        return y, last


@pytest.mark.parametrize("carry", [lambda h: h, lambda h: h.detach(), lambda h: h.data, lambda h: h.detach()[:, :]])
def test_states_that_are_carried_over(carry: Callable[[Tensor], Tensor]) -> None:
    """Within a batch it is the records' own; from batch to batch it is others'."""
    run = attach(Carries(), TensorDataset(torch.randn(6, 5, 4)))
    for _ in range(2):
        (x,) = next(iter(run.loader))
        y, state = run.model(x)
        z, state = run.model(x, state.detach())
        (y + z).square().mean().backward()
        run.optimizer.step()
    (x,) = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError, match="carried over"):
        run.model(x, carry(state))


class Switched(nn.Module):
    """Another function with another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.mix = nn.Linear(4, 4), nn.Linear(4, 1), None

    def forward(self, x: Tensor, mix: Any = None, other: Tensor | None = None, also: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        if mix in (True, "mix", 1, 0.5) or also is not None or self.mix in (True, "mix", 1, 0.5):
            y = y + y.mean(0)
        z: Tensor = self.head(y)
        return z


@pytest.mark.parametrize(
    ("before", "then"),
    [
        ({"mix": False}, {"mix": True}),
        ({"mix": "no"}, {"mix": "mix"}),
        ({"mix": 0}, {"mix": 1}),
        ({"mix": 0.0}, {"mix": 0.5}),
        ({"other": torch.ones(4)}, {"also": torch.ones(4)}),
    ],
    ids=str,
)
def test_coupling_that_an_argument_switches_on(before: dict[str, Any], then: dict[str, Any]) -> None:
    """With other flags, and other names of what is given, a model is examined anew."""
    run = attach(Switched())
    for x, _ in run.loader:
        run.model(x, **before).square().mean().backward()
        run.optimizer.step()
    x, _ = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError, match="left out"):
        run.model(x, **then)


@pytest.mark.parametrize(("before", "then"), [(False, True), ("no", "mix"), (0, 1), (0.0, 0.5)])
def test_coupling_that_an_attribute_switches_on(before: Any, then: Any) -> None:
    """As a schedule does that begins with nothing."""
    model = Switched()
    model.mix = before
    run = attach(model)
    train(run, 2)
    model.mix = then
    with pytest.raises(dpkit.CoupledRecordsError, match="left out"):
        train(run)
