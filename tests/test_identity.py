"""The user's objects stay the user's: same types, same keys, copies and checkpoints that know nothing of privacy."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, StepLR

import dpkit
from tests import models as m
from tests.oracle import clipped_sum
from tests.training import Run, attach, data, drawing, mlp, squared_loss, train, weights, work


def public_step(model: nn.Module, batch: Any) -> None:
    """One ordinary step with a fresh optimizer; fails unless every parameter got autograd's own gradient."""
    twin = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    output = torch.func.functional_call(model, dict(zip(names, twin, strict=True)), (batch[0],))
    expected = torch.autograd.grad((output - batch[1]).square().mean(), twin)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    squared_loss(model, batch).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    optimizer.step()


def saved(what: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(what, stream)
    stream.seek(0)
    return stream


def hooks(module: nn.Module) -> int:
    """How many hooks of any kind are on the module and its children."""
    kinds = [k for k in vars(nn.Module()) if k.endswith("_hooks")]
    assert len(kinds) >= 5
    return sum(len(getattr(sub, kind)) for sub in module.modules() for kind in kinds)


class Interrupted(nn.Module):
    """A position table, a token and layers; its forward stops half-way when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 5), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.ones(5))
        self.error: BaseException | None = None
        self.inside = Stop(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * self.embed(x)
        return self.head(self.inside(y))


class Stop(nn.Module):
    """Raises its owner's error, if there is one."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]  # a list: not a child
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.owner[0].error is not None:
            raise self.owner[0].error
        return x * self.gain


# --- the same objects ---


@pytest.mark.parametrize("when", ["attached", "in a batch", "after training", "detached"])
def test_same_objects(when: str) -> None:
    """Type, keys, parameters, attributes: as they were, at any time."""
    model, optimizer = m.VisionTransformer(), None
    before = (type(model), list(model.state_dict()), set(vars(model)), [id(p) for p in model.parameters()])
    attributes = [set(vars(p)) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    state = (type(optimizer), set(optimizer.state_dict()), set(vars(optimizer)))
    records = [(torch.randn(3, 8, 8), torch.randn(1)) for _ in range(4)]
    run = attach(model, records, optimizer=optimizer)
    assert run.model is model
    assert run.optimizer is optimizer

    def check() -> None:
        assert (type(model), list(model.state_dict()), set(vars(model)), [id(p) for p in model.parameters()]) == before
        assert [set(vars(p)) for p in model.parameters()] == attributes
        assert all(type(p) is nn.Parameter for p in model.parameters())
        assert (type(optimizer), set(optimizer.state_dict()), set(vars(optimizer))) == state
        assert "forward" not in vars(model)
        assert "step" not in vars(optimizer)
        assert isinstance(model, m.VisionTransformer)
        assert isinstance(optimizer, torch.optim.AdamW)

    if when == "in a batch":
        for x, _ in run.loader:
            loss = model(x).sum()
            check()
            loss.backward()
            check()
            optimizer.step()
            check()
    elif when != "attached":
        for x, _ in run.loader:
            model(x).square().mean().backward()
            optimizer.step()
        if when == "detached":
            run.engine.detach()
    check()


def test_detach_leaves_nothing() -> None:
    """No hook, on model, parameters or optimizer; ordinary training goes on, and may be made private anew."""
    model = m.BarePositions(4, 5, 3)
    optimizer = torch.optim.Adam(model.parameters())
    mine = optimizer.register_step_pre_hook(lambda *args: None)
    records = [(torch.randn(3, 4), torch.randn(1)) for _ in range(4)]
    run = attach(model, records, optimizer=optimizer)
    assert hooks(model) > 0
    for x, _ in run.loader:
        model(x).square().mean().backward()
        optimizer.step()
    run.engine.detach()
    assert hooks(model) == 0
    assert list(optimizer._optimizer_step_pre_hooks) == [mine.id]  # type: ignore[attr-defined]
    assert not optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]
    x = torch.stack([record[0] for record in records])
    public_step(model, (x, torch.zeros(4, 3, 3)))
    epsilon = run.engine.get_epsilon(1e-5)
    run.engine.detach()  # twice is once
    assert run.engine.get_epsilon(1e-5) == epsilon
    with pytest.raises(dpkit.SamplingError, match="detached"):
        next(iter(run.loader))
    with pytest.raises(dpkit.NotAttachedError, match="make_private"):
        _ = run.engine.noise_multiplier
    attach(model, records)


def test_detach_in_the_middle_of_a_batch() -> None:
    """What was not released stays so: no gradient is left behind."""
    run = attach(mlp(), max_physical_batch_size=3)
    batch = next(iter(run.loader))
    squared_loss(run.model, batch).backward()
    run.engine.detach()
    assert all(p.grad is None for p in run.model.parameters())
    public_step(run.model, batch)


# --- copies and checkpoints ---


@pytest.mark.parametrize("when", ["before a batch", "in a batch"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: torch.load(saved(model), weights_only=False)])
def test_copies_are_ordinary_models(how: Callable[[nn.Module], nn.Module], when: str) -> None:
    """A deep copy, or a model read back, trains by itself, and the private original goes on."""
    run = attach(mlp(), data(), 4)

    def copied() -> nn.Module:
        twin = how(run.model)
        assert type(twin) is type(run.model)
        for p in twin.parameters():
            p.grad = None
        before = weights(run.model)
        for size in (3, 4, 8):  # numbers of records that the private batch may have, too
            public_step(twin, (torch.randn(size, 4), torch.randn(size, 1)))
        assert torch.equal(weights(run.model), before)
        return twin

    if when == "before a batch":
        twin = copied()
    else:
        with drawing([0, 1, 2]):
            for batch in run.loader:
                squared_loss(run.model, batch).backward()
                twin = copied()
                run.optimizer.step()
    before = weights(run.model)
    train(run)
    assert not torch.equal(weights(run.model), before)
    other = attach(twin)  # the copy may be made private by an engine of its own
    train(other)
    assert other.engine.get_epsilon(1e-5) > 0


def test_copies_of_the_optimizer() -> None:
    """A copied optimizer steps like torch's own, and the original stays private."""
    run = attach(mlp(), optimizer=None, noise_multiplier=1.0)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    batch = next(iter(run.loader))
    before = [p.detach().clone() for p in model.parameters()]
    squared_loss(model, batch).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - gradient)
    assert run.engine.get_epsilon(1e-5) == 0.0
    work(run, batch)
    assert run.engine.get_epsilon(1e-5) > 0.0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_checkpoints(kind: Callable[..., torch.optim.Optimizer]) -> None:
    """State dicts are torch's own, load safely into ordinary objects, and training goes on as if nothing had been."""

    def start(model: nn.Module) -> Run:
        seed = torch.Generator().manual_seed(0)
        return attach(model, data(), optimizer=kind(model.parameters(), lr=0.1), noise_generator=seed)

    run = start(mlp())
    train(run, 2)
    state = torch.load(saved({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}))
    resumed = start(mlp(seed=1))
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    plain = kind(mlp().parameters(), lr=0.1)
    plain.load_state_dict(state["optimizer"])
    assert plain.state_dict()["state"].keys() == run.optimizer.state_dict()["state"].keys()
    train(run, 2)
    train(resumed, 2)
    assert torch.equal(weights(run.model), weights(resumed.model))


def test_loading_into_the_private_model() -> None:
    """load_state_dict, into model and optimizer, between steps."""
    run = attach(mlp())
    state = copy.deepcopy(run.model.state_dict())
    train(run)
    run.model.load_state_dict(state)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    train(run)
    assert run.engine.accountant.ledger[0][1] == 2


# --- schedulers, hooks, groups ---


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", [lambda o: StepLR(o, 1, 0.5), lambda o: LambdaLR(o, lambda k: 0.5**k)])
def test_scheduler(kind: Callable[[Any], Any], before: bool) -> None:
    """A scheduler made before or after sets the private step's learning rate."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = kind(optimizer) if before else None
    run = attach(model, optimizer=optimizer)
    scheduler = scheduler or kind(optimizer)
    for k in range(3):
        old = weights(model)
        train(run)
        moved, gradient = weights(model) - old, torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        torch.testing.assert_close(moved, -(0.5**k) * gradient.double(), rtol=1e-4, atol=1e-6)
        scheduler.step()


def test_step_hooks() -> None:
    """A post hook runs once an optimizer.step(); pre hooks that were registered before and after both run."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("first"))
    run = attach(model, optimizer=optimizer)
    optimizer.register_step_pre_hook(lambda *args: calls.append("second"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    train(run, 2)
    assert calls == ["first", "second", "after"] * 2


class Halved(torch.optim.SGD):
    """An optimizer of one's own, made of another one: both classes' ``step`` run the hooks."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(0.5)
        return super().step(closure)


@pytest.mark.parametrize("by_closure", [False, True])
def test_optimizers_derived_from_others(by_closure: bool) -> None:
    """One step is taken and counted, on the gradient that the derived class has made of the released one."""
    moved = []
    for kind, lr in ((torch.optim.SGD, 0.5), (Halved, 1.0)):
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # torch patches a class when one of it is made
        model = mlp()
        run = attach(model, optimizer=kind(model.parameters(), lr=lr))
        before = weights(model)
        for _ in range(2):
            for batch in run.loader:
                run.optimizer.zero_grad()

                def closure(batch: Any = batch, run: Any = run) -> Tensor:
                    loss = squared_loss(run.model, batch)
                    loss.backward()
                    return loss

                if by_closure:
                    run.optimizer.step(closure)
                else:
                    closure()
                    run.optimizer.step()
                with pytest.raises(dpkit.DoubleUseError):
                    run.optimizer.step()
        assert run.engine.releases == 2
        moved.append(weights(model) - before)
    assert moved[0].any()
    torch.testing.assert_close(moved[1], moved[0])


def test_two_groups() -> None:
    """Parameter groups keep their own learning rates; the norm is over all of them."""
    model, twin = mlp().double(), mlp().double()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters()}], lr=0)
    x, y = (v.double() for v in data().tensors)
    run = attach(model, torch.utils.data.TensorDataset(x, y), optimizer=optimizer, max_grad_norm=0.1)
    total = clipped_sum(twin, lambda net, b: (net(b[0]) - b[1]).square().mean(1), (x, y), 8, 0.1)
    train(run)
    for (name, p), old in zip(model.named_parameters(), twin.parameters(), strict=True):
        rate = 1.0 if name.startswith("0") else 0.0
        torch.testing.assert_close(p.detach(), old.detach() - rate * total[name] / 8)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_add_param_group(clipping: str) -> None:
    """A part that is unfrozen and added to the optimizer between steps joins step, norm and noise."""
    model = mlp().double()
    x, y = (v.double() for v in data().tensors)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=1.0)
    options: dict[str, Any] = {"optimizer": optimizer, "max_grad_norm": 0.1, "clipping": clipping}
    run = attach(model, torch.utils.data.TensorDataset(x, y), **options)
    train(run)
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), mlp().double()[0].parameters(), strict=True))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 1.0})
    for _ in range(2):
        twin = copy.deepcopy(model)
        total = clipped_sum(twin, lambda net, b: (net(b[0]) - b[1]).square().mean(1), (x, y), 8, 0.1, clipping)
        train(run)
        for (name, p), old in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), old.detach() - total[name] / 8)


def test_freezing_between_steps() -> None:
    """What is frozen leaves step and norm at once; thawed, it comes back."""
    model = mlp().double()
    x, y = (v.double() for v in data().tensors)
    run = attach(model, torch.utils.data.TensorDataset(x, y), max_grad_norm=0.1)
    for frozen in ([], [0], [2], [], [0], []):
        for layer in (0, 2):
            model[layer].requires_grad_(layer not in frozen)
        twin = copy.deepcopy(model)
        total = clipped_sum(twin, lambda net, b: (net(b[0]) - b[1]).square().mean(1), (x, y), 8, 0.1)
        train(run)
        for (name, p), old in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), old.detach() - total.get(name, torch.zeros(())) / 8)


def test_freezing_before_the_step() -> None:
    """What is frozen after the backward pass takes no part in the step any more."""
    run = attach(mlp())
    train(run)
    before = [p.detach().clone() for p in run.model.parameters()]
    for batch in run.loader:
        squared_loss(run.model, batch).backward()
        run.model[0].requires_grad_(False)
        run.optimizer.step()
    kept = [torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True)]
    assert kept == [True, True, False, False]


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_freezing_everything_before_the_step(noise_multiplier: float) -> None:
    """A step of nothing is taken, and counted: that it was due was decided by the draw."""
    run = attach(mlp(), noise_multiplier=noise_multiplier)
    before = [p.detach().clone() for p in run.model.parameters()]
    for batch in run.loader:
        squared_loss(run.model, batch).backward()
        run.model.requires_grad_(False)
        run.optimizer.step()
        run.model.requires_grad_(True)
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))
    assert sum(n for _, n in run.engine.accountant.ledger) == len(run.loader)


# --- other uses of the model in between ---


def test_evaluation_in_between() -> None:
    """eval(), no_grad, inference_mode, gradients on, other batch sizes: right outputs, and nothing enters the step."""
    run, reference = attach(mlp()), attach(mlp())
    train(reference, 2)
    for _ in range(2):
        for batch in run.loader:
            for rows in (1, 3, 8, 30):
                x = torch.randn(rows, 4)
                expected = torch.tanh(x @ run.model[0].weight.T + run.model[0].bias) @ run.model[2].weight.T
                expected = (expected + run.model[2].bias).detach()
                with torch.no_grad():
                    torch.testing.assert_close(run.model.eval()(x), expected)
                with torch.inference_mode():
                    torch.testing.assert_close(run.model(x).clone(), expected)
                torch.testing.assert_close(run.model.train()(x).detach(), expected)
                with run.engine.paused():
                    torch.testing.assert_close(run.model(x).detach(), expected)
            work(run, batch)
            run.model(torch.randn(5, 4))
            run.model(batch[0])
    assert torch.equal(weights(run.model), weights(reference.model))


def test_gradients_between_steps_are_the_users_own() -> None:
    """After the step, before the next batch: a saliency map, say; the next step knows nothing of it."""
    run, reference = attach(mlp()), attach(mlp())
    train(reference, 2)
    for _ in range(2):
        train(run)
        x = torch.randn(8, 4, requires_grad=True)
        run.model(x).sum().backward()
        assert x.grad is not None
    assert torch.equal(weights(run.model), weights(reference.model))


def test_paused_training_is_public() -> None:
    """Inside paused(): ordinary gradients, ordinary steps, no accounting; afterwards private again."""
    run = attach(mlp(), noise_multiplier=1.0)
    with run.engine.paused():
        public_step(run.model, data().tensors)
        squared_loss(run.model, data().tensors).backward()
        run.optimizer.step()
    assert run.engine.get_epsilon(1e-5) == 0.0
    train(run)
    assert run.engine.get_epsilon(1e-5) > 0.0


# --- interruptions ---


@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("error", [ValueError("user"), RuntimeError("user"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("first", [True, False])
def test_exception_in_the_forward(error: BaseException, first: bool, physical: int | None) -> None:
    """Whatever leaves the forward, on the first batch or a later one: the parameters stay, training goes on."""
    model = Interrupted()
    mine = list(model.parameters())
    keys = list(model.state_dict())
    run = attach(model, max_physical_batch_size=physical)
    if not first:
        train(run)
    before = weights(model)
    model.error = error
    with pytest.raises(type(error)):
        train(run)
    state = model.state_dict()
    assert list(state) == keys
    assert torch.equal(torch.cat([v.double().flatten() for v in state.values()]), before)
    assert all(type(v) is Tensor for v in state.values())
    if isinstance(error, Exception):  # torch calls the hooks that clean up for these alone
        assert all(p is q for p, q in zip(model.parameters(), mine, strict=True))
    model.error = None
    train(run)
    assert all(p is q for p, q in zip(model.parameters(), mine, strict=True))
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.engine.detach(),
        lambda run: next(iter(run.loader)),
        lambda run: run.optimizer.step(),
        lambda run: run.model(torch.randn(3, 4)),
        lambda run: run.model.eval()(torch.randn(8, 4)),
    ],
    ids=["detach", "next batch", "step", "forward", "evaluation"],
)
def test_interrupt_is_cleaned_up_by_the_next_call(call: Callable[[Run], Any]) -> None:
    """KeyboardInterrupt in the forward: the next call of any kind puts the parameters back."""
    model = Interrupted()
    mine = list(model.parameters())
    run = attach(model)
    train(run)
    batch = next(iter(run.loader))
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(batch[0])
    model.error = None
    call(run)
    assert all(p is q for p, q in zip(model.parameters(), mine, strict=True))


def test_an_abandoned_batch_is_no_release() -> None:
    """A forward that raised, and a loop that was left: no step, no cost."""
    model = Interrupted()
    run = attach(model, noise_multiplier=1.0)
    model.error = ValueError()
    with pytest.raises(ValueError):
        train(run)
    assert run.engine.get_epsilon(1e-5) == 0.0
    with drawing([0], [1]):
        model.error = None
        train(run)
    assert run.engine.accountant.ledger[0][1] == 2


def test_clip_grad_norm() -> None:
    """A loop that clips the averaged gradient, as many do: there is none yet, and no reason to refuse."""
    run, plain = attach(mlp()), attach(mlp())
    train(plain, 2)
    for _ in range(2):
        for batch in run.loader:
            squared_loss(run.model, batch).backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.01)
            run.optimizer.step()
    assert torch.equal(weights(run.model), weights(plain.model))


# --- ordinary loops that do not run yet ---


@pytest.mark.parametrize("kind", ["positions", "mask"])
def test_argument_as_long_as_the_batch(kind: str) -> None:
    """Positions [t] or a mask [t, t] given to the forward while t == n: no records in them."""

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 1)
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            y = self.layer(x, src_mask=extra) if kind == "mask" else self.layer(x + self.table(extra))
            return self.head(y).mean(1)

    model = Takes()
    run = attach(model, torch.utils.data.TensorDataset(torch.randn(6, 6, 4), torch.randn(6, 1)))
    extra = torch.arange(6) if kind == "positions" else torch.full((6, 6), float("-inf")).triu(1)
    for x, y in run.loader:
        (model(x, extra) - y).square().mean().backward()
        run.optimizer.step()
