"""The choice of methods: timed or modelled, within the memory bound, remembered; it changes rounding only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpkit
from dpkit import methods
from dpkit.convolved import Convolved
from dpkit.forms import Dense, Form, Normed, Outer
from dpkit.methods import MODES, Methods
from tests.training import attach, train, weights


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Timing that says what the test wants: dense takes 1 s a record, ghost 3 s; notes what it was asked for."""
    asked: list[str] = []

    def seconds(way: Any, form: Form, repeats: int = 3) -> float:
        taken = way.take()
        asked.append(type(taken).__name__)
        return form.n * (1.0 if isinstance(taken, Dense) else 2.0 if isinstance(taken, Normed) else 3.0)

    monkeypatch.setattr(methods, "_timed", seconds)
    return asked


def outer(n: int = 4, t: int = 8, o: int = 8, i: int = 8) -> Outer:
    """dense keeps o · i = 64 numbers a record, ghost t (o + i) = 128."""
    return Outer(torch.randn(n, t, o), torch.randn(n, t, i))


def named(*names: str) -> dict[nn.Parameter, str]:
    return {nn.Parameter(torch.zeros(8, 8)): name for name in names}


def test_the_faster_way_is_taken_and_timed_once(clock: list[str]) -> None:
    """Timing happens when a kind of form is first met; lengths up to the next power of two are of the same kind."""
    names = named("w")
    chosen, (w,) = Methods("measured", names), names
    for t in (8, 8, 6):
        chosen.begin()
        assert isinstance(chosen.settle(outer(t=t), w), Dense)
    assert sorted(clock) == ["Dense", "Outer"]
    chosen.settle(outer(t=9), w)
    assert len(clock) == 4


def test_the_model_times_nothing(clock: list[str]) -> None:
    """ "model" never; "auto" not where the model is clear."""
    names = named("w")
    (w,) = names
    assert isinstance(Methods("model", names).settle(outer(t=512), w), Dense)
    assert isinstance(Methods("auto", names).settle(outer(t=512), w), Dense)
    assert clock == []
    Methods("auto", names).settle(outer(), w)
    assert clock != []


@pytest.mark.parametrize(("activations", "dense"), [(1200.0, 0), (1300.0, 1), (1700.0, 2), (40_000.0, 2)])
def test_memory_is_spent_where_it_saves_time(clock: list[str], activations: float, dense: int) -> None:
    """A way that keeps more is taken from the second batch on, as long as the estimated peak has room.

    Each dense gradient [16, 16] keeps 1024 bytes a record; ghost keeps 4 · (16 + 16) numbers, 512 bytes.
    """
    names = named("a", "b")
    chosen = Methods("measured", names)
    chosen.activations = activations
    for batch in range(3):
        chosen.begin()
        taken = [chosen.settle(outer(t=4, o=16, i=16), p) for p in names]
        assert sum(isinstance(f, Dense) for f in taken) == (dense if batch else 0), batch


def test_the_peak_counts_activations_that_are_left() -> None:
    """What is kept late in the backward weighs less: by then the activations are gone."""
    names = named("a", "b")
    chosen = Methods("measured", names)
    early = [
        methods._Arrival("a", "k", "x", 1, 100, {"x": 500}, {}),
        methods._Arrival("b", "k", "x", 1, 100, {"x": 0}, {}),
    ]
    chosen.activations = 1000.0
    assert chosen._peak(early, ["x", "x"]) == 800 * 0.5 + 100 + 500 == 1000.0
    assert chosen._peak([methods._Arrival("b", "k", "x", 1, 100, {"x": 1500}, {})], ["x"]) == 1500.0


def test_the_peak_counts_what_is_left_where_it_is_known() -> None:
    """What the ordinary forward had kept when the layer was done, what the layer takes for a moment, and what is kept
    by then; the layer's own input once."""
    chosen = Methods("measured", named("a", "b"))
    chosen.left = {"a": 1000.0, "a.bias": 1000.0, "b": 300.0}
    own, other = {"itself": 250, "dense": 400}, {"only": 30}
    arrivals = [
        methods._Arrival("a", "k", "itself", 1, 100, own, {}, 50),
        methods._Arrival("a.bias", "k", "only", 1, 0, other, {}, 0),
        methods._Arrival("b", "k", "itself", 1, 100, own, {}, 2000),
    ]
    assert chosen._peak(arrivals[:1], ["itself"]) == 1000 + 50 + 250 - 100
    assert chosen._peak(arrivals[:1], ["dense"]) == 1000 + 50 + 400
    assert chosen._peak(arrivals[:2], ["itself", "only"]) == 1000 + 50 + 250 - 100  # the bias's own turn needs less
    assert chosen._peak(arrivals, ["itself", "only", "dense"]) == 300 + 2000 + 250 + 30 + 400


def test_a_gradient_is_formed_twice_where_its_memory_matters(clock: list[str]) -> None:
    """A convolution whose gradients are larger than its input: kept where there is room, else formed for the norm."""
    torch.manual_seed(0)
    weight, x, grad = nn.Parameter(torch.zeros(32, 8, 3, 3)), torch.randn(4, 8, 6, 6), torch.randn(4, 32, 4, 4)
    form = Convolved(x, grad, tuple(weight.shape), (1, 1), (0, 0), (1, 1), 1)
    for activations, expected in ((100_000.0, Dense), (1000.0, Normed)):
        chosen = Methods("measured", {weight: "w"})
        chosen.activations = activations
        for _ in range(2):
            chosen.begin()
            taken = chosen.settle(form, weight)
        assert type(taken) is expected
        torch.testing.assert_close(taken.sq_norm(), form.dense().flatten(1).square().sum(1), rtol=1e-5, atol=0)
        w = torch.rand(4)
        torch.testing.assert_close(taken.weighted_sum(w), w @ form.dense().flatten(1), rtol=1e-4, atol=1e-4)


def test_state(clock: list[str]) -> None:
    """A loaded state chooses as the saved one did, without timing."""
    names = named("w")
    (w,) = names
    first = Methods("measured", names)
    first.activations = 10_000.0
    first.settle(outer(t=4, o=16, i=16), w)  # not planned for yet: saving plans
    state = copy.deepcopy(first.state_dict())
    clock.clear()
    second = Methods("auto", names)
    second.load_state_dict(state)
    assert isinstance(second.settle(outer(t=4, o=16, i=16), w), Dense)
    first.begin()
    assert isinstance(first.settle(outer(t=4, o=16, i=16), w), Dense)
    assert clock == []
    assert second.state_dict() == state
    with pytest.raises(dpkit.ConfigurationError, match="cannot be read"):
        second.load_state_dict({"mode": "auto"})


def sequences(n: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 2, 8, 8, generator=generator), torch.randn(n, 1, generator=generator))


def network() -> nn.Module:
    """A convolution of which all three ways are possible, a linear layer over positions, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 16, 3), nn.Flatten(2), nn.Linear(16, 4), nn.Tanh(), nn.Flatten(),
        nn.Linear(64, 1),
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_train_alike(mode: str) -> None:
    """Three steps with each, the second and third planned: the same weights but for rounding."""
    expected: Tensor | None = None
    for method in ("model", mode):
        run = attach(network(), sequences(), method=method, lr=0.1)
        train(run, 3)
        expected = weights(run.model) if expected is None else expected
    assert expected is not None
    torch.testing.assert_close(weights(run.model), expected, rtol=0, atol=1e-6)


def forms_of(model: nn.Module, rows: TensorDataset) -> list[Form]:
    """The forms of one batch, as the layers give them."""
    seen: list[Form] = []
    settle = Methods.settle

    def noted(self: Methods, form: Form, parameter: Tensor) -> Form:
        seen.append(form)
        return settle(self, form, parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Methods, "settle", noted)
        train(attach(model, rows, method="model", lr=0.0))
    return seen


@pytest.mark.parametrize("way", ["ghost", "grouped", "patches", "grouped twice", "patches twice", "dense"])
def test_each_way_is_exact_in_training(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced through the real step: as the other ways, to rounding."""
    reference = attach(network(), sequences(), method="model", lr=0.1)
    train(reference, 2)

    def forced(self: Methods, form: Form, parameter: Tensor) -> Form:
        ways = form.ways()
        return ways[way].take() if way in ways else form

    met = [way in form.ways() for form in forms_of(network(), sequences())]
    assert any(met)
    monkeypatch.setattr(Methods, "settle", forced)
    run = attach(network(), sequences(), lr=0.1)
    train(run, 2)
    torch.testing.assert_close(weights(run.model), weights(reference.model), rtol=0, atol=1e-6)


def test_profile() -> None:
    """A line for each parameter that got a gradient; printed, a table; before the first batch it is empty."""
    run = attach(network(), sequences(), method="measured")
    assert run.engine.profile().lines == ()
    train(run, 2)
    profile = run.engine.profile()
    assert {line.parameter for line in profile.lines} == {name for name, _ in run.model.named_parameters()}
    weight = next(line for line in profile.lines if line.parameter == "2.weight")
    assert weight.method in ("ghost", "grouped", "patches", "grouped twice", "patches twice")
    assert weight.measured
    assert weight.milliseconds is not None
    assert weight.milliseconds > 0
    assert weight.bytes > 0
    assert "2.weight" in str(profile)
    assert str(profile).splitlines()[0].split() == ["parameter", "form", "method", "chosen", "by", "ms", "MiB"]


def test_seeded_runs_follow_the_model(clock: list[str]) -> None:
    """With a generator for the noise nothing depends on a clock, unless that is asked for."""
    for method, timed in (("auto", False), ("measured", True)):
        clock.clear()
        generator = torch.Generator().manual_seed(0)
        train(attach(network(), sequences(), method=method, noise_multiplier=1.0, noise_generator=generator))
        assert bool(clock) == timed


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(dpkit.ConfigurationError, match="method"):
        attach(network(), sequences(), method="fastest")


def test_activations_are_counted() -> None:
    """What the ordinary forward keeps for one record, the parameters aside."""
    run = attach(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    train(run)
    found = run.engine._attached().tape.methods
    assert found.activations == pytest.approx(4 * (4 + 5), abs=1)  # input, tanh
    assert found.left == {"0.weight": 16.0, "0.bias": 16.0, "2.weight": 36.0, "2.bias": 36.0}


def served(run: Any, passes: int = 1) -> list[list[int]]:
    """The sizes of the physical batches of each pass; the ordinary loop is run on them."""
    sizes = []
    for _ in range(passes):
        sizes.append([])
        for batch in run.loader:
            sizes[-1].append(len(batch[0]))
            (run.model(batch[0]) - batch[1]).square().mean().backward()
            run.optimizer.step()
    return sizes


@pytest.mark.parametrize("budget", [20_000, 60_000, 10_000_000])
def test_automatic_physical_batches_fit_the_budget(budget: int) -> None:
    """Small parts first; then as many records as the estimate allows, and the same training in any case."""
    run = attach(network(), sequences(40), max_physical_batch_size="auto", memory_budget=budget, lr=0.1, method="model")
    first, second = served(run, 2)
    assert first == [8] * 5
    chosen = run.engine._attached().tape.methods
    most = chosen.most_records(budget)
    parameters = sum(p.numel() for p in run.model.parameters())
    assert second == [min(most, 40)] * (40 // min(most, 40)) + [40 % most] * (most < 40 and 40 % most > 0)
    assert most == 1 or 8 * parameters + 1.2 * most * chosen._estimate <= budget
    assert 8 * parameters + 1.2 * (most + 1) * chosen._estimate > budget
    assert chosen._estimate >= chosen.activations
    whole = attach(network(), sequences(40), lr=0.1, method="model")
    served(whole, 2)
    torch.testing.assert_close(weights(run.model), weights(whole.model), rtol=0, atol=1e-6)


def test_automatic_physical_batches_go_on_where_they_stopped() -> None:
    """A run resumed in the midst of a logical batch cuts it as it was cut, and the next ones by what was learned."""

    def fresh() -> Any:
        generator = torch.Generator().manual_seed(5)
        options = {"max_physical_batch_size": "auto", "memory_budget": 120_000, "lr": 0.1, "method": "model"}
        return attach(network(), sequences(40), loader={"generator": generator}, **options)

    one = fresh()
    sizes, state = [], {}
    for k, batch in enumerate(batch for _ in range(2) for batch in one.loader):
        sizes.append(len(batch[0]))
        (one.model(batch[0]) - batch[1]).square().mean().backward()
        one.optimizer.step()
        if k == 2:
            state = copy.deepcopy(one.engine.state_dict())
    other = fresh()
    other.engine.load_state_dict(state)
    rest = [size for found in served(other, 2) for size in found]
    assert rest == sizes[3:]
    assert sizes[5] > 8
    torch.testing.assert_close(weights(other.model), weights(one.model), rtol=0, atol=0)


def test_a_budget_needs_automatic_batches() -> None:
    for options in ({"memory_budget": 100}, {"max_physical_batch_size": "big"}, {"max_physical_batch_size": 0}):
        with pytest.raises(dpkit.ConfigurationError):
            attach(network(), sequences(), **options)
