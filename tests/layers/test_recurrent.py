"""Recurrent layers equal torch's for every option, and their per-record gradients are exact through the engine."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

import dpkit
from dpkit import layers
from tests.cases import squared
from tests.oracle import clipped_sum, norm
from tests.stepping import median_norm, private_step

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
KINDS = ["LSTM", "GRU", "RNN"]
recurrent = sys.modules[layers.LSTM.__module__]


@st.composite
def options(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A kind of layer and its constructor arguments."""
    kind = draw(st.sampled_from(KINDS))
    depth = draw(st.integers(1, 3))
    make: dict[str, Any] = {
        "input_size": draw(st.integers(1, 4)),
        "hidden_size": draw(st.integers(2, 4)),
        "num_layers": depth,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.3])) if depth > 1 else 0.0,
        "bidirectional": draw(st.booleans()),
    }
    if kind == "LSTM":
        make["proj_size"] = draw(st.sampled_from([0, 1]))
    if kind == "RNN":
        make["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    return kind, make


def lengths_of(n: int, t: int, how: str) -> Tensor:
    """Lengths from 1 to t, the longest among them; in falling order if how is "sorted"."""
    lengths = torch.randint(1, t + 1, (n,))
    lengths[torch.randint(0, n, ())] = t
    return lengths.sort(descending=True).values if how == "sorted" else lengths


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@settings(max_examples=100, deadline=None)
@given(
    option=options(),
    n=st.integers(1, 4),
    t=st.integers(1, 5),
    initial=st.booleans(),
    how=st.sampled_from(["padded", "sorted", "unsorted"]),
    looped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_torch(
    dtype: torch.dtype,
    tolerance: float,
    option: tuple[str, dict[str, Any]],
    n: int,
    t: int,
    initial: bool,
    how: str,
    looped: bool,
    seed: int,
) -> None:
    """Outputs, last states (dropout drawn alike), and the gradients of weights, input and initial states: where a loop
    is the fastest way (on a CPU), and where the fused kernel runs first."""
    kind, make = option
    torch.manual_seed(seed)
    theirs, ours = (getattr(home, kind)(**make, dtype=dtype) for home in (nn, layers))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    shape = (n, t) if make["batch_first"] else (t, n)
    x = torch.randn(*shape, make["input_size"], dtype=dtype, requires_grad=True)
    depth = make["num_layers"] * (1 + make["bidirectional"])
    widths = [make.get("proj_size") or make["hidden_size"], make["hidden_size"]][: 1 + (kind == "LSTM")]
    states = [torch.randn(depth, n, width, dtype=dtype, requires_grad=True) for width in widths]
    lengths = lengths_of(n, t, how)
    results = []
    for module in (theirs, ours):
        leaves = [x, *(states if initial else []), *module.parameters()]
        for leaf in leaves:
            leaf.grad = None
        data: Any = x
        if how != "padded":
            data = pack_padded_sequence(x, lengths, make["batch_first"], enforce_sorted=how == "sorted")
        torch.manual_seed(seed)
        with mock.patch.object(recurrent, "_loops", return_value=looped):
            y, last = module(data, (tuple(states) if kind == "LSTM" else states[0]) if initial else None)
        if isinstance(y, PackedSequence):
            assert isinstance(data, PackedSequence)
            assert torch.equal(y.batch_sizes, data.batch_sizes)
            y = y.data
        last = last if isinstance(last, tuple) else (last,)
        loss = y.cos().sum() + torch.stack([(k + 2) * v.sin().sum() for k, v in enumerate(last)]).sum()
        loss.backward()
        results.append([y, *last, *(leaf.grad for leaf in leaves)])
    assert len(results[0]) == len(results[1])
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        scale = 1.0 if k <= len(widths) else 10 * max(1.0, float(one.abs().max()))
        torch.testing.assert_close(other, one, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both_ways", [False, True])
def test_gradcheck(kind: str, both_ways: bool) -> None:
    """The hand-written backward against finite differences."""
    layer = getattr(layers, kind)(2, 3, 2, bidirectional=both_ways, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Any:
        y, last = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        return (y, *last) if isinstance(last, tuple) else (y, last)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [16, 17, 39])
def test_long_sequences(kind: str, t: int) -> None:
    """The backward runs in blocks of positions: whole ones, and a rest."""
    theirs, ours = (getattr(home, kind)(3, 4, dtype=torch.float64) for home in (nn, layers))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(t, 2, 3, dtype=torch.float64, requires_grad=True)
    grads = []
    for layer in (theirs, ours):
        y, last = layer(x)
        last = last if isinstance(last, tuple) else (last,)
        total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + last[-1].cos().sum()
        grads.append(torch.autograd.grad(total, [x, *layer.parameters()]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_dimension_of_records_is_refused(kind: str) -> None:
    """A 2-D input has no records."""
    with pytest.raises(ValueError, match="without a dimension of records"):
        getattr(layers, kind)(2, 3)(torch.randn(4, 2))


class Reads(nn.Module):
    """A recurrent layer on (packed) sequences, from a learned initial state, with a head on outputs and last states."""

    def __init__(self, layer: nn.RNNBase, how: str, learned: bool) -> None:
        super().__init__()
        self.layer, self.how = layer, how
        width = layer.hidden_size * (1 + layer.bidirectional)
        self.head = nn.Linear(width, 2)
        depth = layer.num_layers * (1 + layer.bidirectional)
        self.initial = nn.Parameter(torch.randn(depth, 1, layer.hidden_size)) if learned else None

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        n, t, _ = x.shape
        hx: Any = None
        if self.initial is not None:
            hx = self.initial.expand(-1, n, -1)
            hx = (hx, hx.tanh()) if isinstance(self.layer, nn.LSTM) else hx
        if self.how == "padded":
            y, last = self.layer(x, hx)
        else:
            packed = pack_padded_sequence(x, lengths, True, enforce_sorted=self.how == "sorted")
            y, last = self.layer(packed, hx)
            y = pad_packed_sequence(y, True, total_length=t)[0]
        last = last if isinstance(last, tuple) else (last,)
        tail = torch.stack([v.transpose(0, 1).flatten(1).sum(1) for v in last]).sum(0)
        return self.head(y) + tail[:, None, None]


def compare(layer: nn.RNNBase, how: str, learned: bool, n: int, lengths: Tensor) -> None:
    """Fails unless the engine's step on the model around `layer` is the definition's."""
    check(Reads(layer, how, learned), n, lengths)


def check(model: nn.Module, n: int, lengths: Tensor) -> None:
    """Fails unless the engine's step on the model is the definition's."""
    model = model.double()
    batch = (torch.randn(n, 5, 3, dtype=torch.float64), lengths, torch.randn(n, dtype=torch.float64))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return squared(model(*batch[:-1]), batch[-1])

    twin = copy.deepcopy(model)
    bound = median_norm(twin, losses, batch)
    total = clipped_sum(twin, losses, batch, n, bound)
    step = private_step(model, losses, batch, bound)
    assert norm({k: step[k] + total[k] / n for k in total}) <= 1e-10 * norm(total) / n


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    home=st.sampled_from([nn, layers]),
    depth=st.integers(1, 2),
    both_ways=st.booleans(),
    learned=st.booleans(),
    n=st.sampled_from([1, 2, 4, 6]),
)
def test_private_step_is_exact(kind: str, home: Any, depth: int, both_ways: bool, learned: bool, n: int) -> None:
    """torch's own layer and ours, from zero and from learned initial states."""
    torch.manual_seed(0)
    layer = getattr(home, kind)(3, 4, depth, batch_first=True, bidirectional=both_ways)
    compare(layer, "padded", learned, n, torch.full((n,), 5))


@pytest.mark.parametrize("home", [nn, layers], ids=["torch", "ours"])
@pytest.mark.parametrize("how", ["sorted", "unsorted"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_private_step_is_exact(kind: str, learned: bool, how: str, home: Any) -> None:
    """Packed sequences; the longest record last, in the middle, or first, or as long as there are records."""
    torch.manual_seed(0)
    for lengths in ([5, 4, 2, 1], [2, 5, 1, 4], [1, 2, 4, 5], [2, 1, 3, 4]):
        if how == "sorted":
            lengths = sorted(lengths, reverse=True)
        layer = getattr(home, kind)(3, 4, 2, batch_first=True, bidirectional=True)
        compare(layer, how, learned, 4, torch.tensor(lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_not_run_one_by_one(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Torch's packing moves records and brings them back; that is known, and needs no slow way."""
    for how, lengths in (("sorted", [5, 4, 2, 1]), ("unsorted", [2, 5, 1, 4])):
        compare(getattr(nn, kind)(3, 4, batch_first=True), how, False, 4, torch.tensor(lengths))
    assert caplog.records == []


class Forgets(nn.Module):
    """Packs in the order of the lengths, and unpacks without it: the rows are then other records' than their places."""

    def __init__(self, where: str, home: Any) -> None:
        super().__init__()
        self.layer, self.head, self.where = home.LSTM(3, 4, batch_first=True), nn.Linear(4, 2), where

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        if self.where != "after":
            y, (h, _) = self.layer(PackedSequence(packed.data, packed.batch_sizes))
            if self.where == "states":
                return self.head(h[-1])[packed.unsorted_indices]
        else:
            y, _ = self.layer(packed)
            y = PackedSequence(y.data, y.batch_sizes)
        return self.head(pad_packed_sequence(y, True, total_length=x.shape[1])[0])[packed.unsorted_indices]


class Direct(nn.Module):
    """Called on the packed sequence itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: PackedSequence) -> Tensor:
        return self.layer(x)[1][0][-1]


def test_a_packed_sequence_as_argument_is_refused() -> None:
    """Nothing can be left out of it; the error says to pack inside."""
    model, rows = Direct(), [torch.randn(k, 3) for k in (3, 1, 4)]
    loader = DataLoader(rows, batch_size=3, collate_fn=lambda batch: pack_sequence(batch, enforce_sorted=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dpkit.PrivacyEngine()
    _, _, private = engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(dpkit.FoldedBatchError, match="Direct is given a PackedSequence") as refusal:
        model(next(iter(private)))
    assert "call pack_padded_sequence in its forward" in refusal.value.cure


class Packs(nn.GRU):
    """A subclass that packs inside: the order does not come in from outside."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        y, _ = super().forward(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
        return pad_packed_sequence(y, True, total_length=x.shape[1])[0]


class PacksInside(nn.Module):
    """Around it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Packs(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.layer(x, lengths))


@pytest.mark.parametrize("lengths", [[5, 4, 2, 1], [2, 5, 1, 4]])
def test_packed_inside_a_subclass(lengths: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Its order is not known, so it runs on one record at a time, also where this batch's order is the records' own."""
    check(PacksInside(), 4, torch.tensor(lengths))
    assert "layer: run on one record at a time" in caplog.text


@pytest.mark.parametrize("where", ["before", "after", "states"])
@pytest.mark.parametrize("lengths", [[5, 4, 2, 1], [2, 5, 1, 4]])
@pytest.mark.parametrize("home", [nn, layers], ids=["torch", "ours"])
def test_forgotten_order(where: str, lengths: list[int], home: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The layers between see the rows in another order than the records': noticed whatever this batch's order is."""
    check(Forgets(where, home), 4, torch.tensor(lengths))
    assert "one record at a time" in caplog.text


class Generates(nn.Module):
    """A recurrent layer whose inputs are learned, the same for all records; what is theirs comes by the initial state,
    or by nothing but the output."""

    def __init__(self, layer: nn.RNNBase, from_state: bool) -> None:
        super().__init__()
        self.layer, self.from_state = layer, from_state
        self.inputs, self.read = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 4)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        h = self.read(x[:, 0]).tanh()[None]
        state = (h, h.cos()) if isinstance(self.layer, nn.LSTM) else h
        y, _ = self.layer(self.inputs.expand(len(x), -1, -1), state if self.from_state else None)
        return y * x.sum(2, keepdim=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_state", [True, False])
@pytest.mark.parametrize("n", [4, 5])
def test_learned_inputs(kind: str, from_state: bool, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient of an input that is a parameter is lost in the hand-written backward; where a state is the records'
    own, the fused kernel still runs."""
    if from_state:
        monkeypatch.delattr("dpkit.layers.recurrent._stepwise")
    check(Generates(getattr(nn, kind)(3, 4, batch_first=True), from_state), n, torch.full((n,), 5))


def test_torchs_own_layer_stays_itself() -> None:
    """After private steps the module is of its class, and copies, pickles and trains as before."""
    model = Reads(nn.LSTM(3, 4, batch_first=True), "padded", True)
    names = list(model.state_dict())
    batch = (torch.randn(4, 5, 3), torch.full((4,), 5), torch.randn(4))
    private_step(model, lambda m, b: squared(m(*b[:-1]), b[-1]), batch, 1.0)
    assert type(model.layer) is nn.LSTM
    assert list(model.state_dict()) == names
    y = model(*batch[:-1])
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(*batch[:-1]), y)
    fresh = Reads(layers.LSTM(3, 4, batch_first=True), "padded", True)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(*batch[:-1]), y)


def test_no_copies_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a private step of plain ``nn.LSTM`` no weight is copied for each record."""
    from dpkit import live

    copied: list[tuple[int, ...]] = []
    spread = live.Spread.apply

    def spy(anchor: Tensor, parameter: Tensor, *rest: Any) -> Tensor:
        copied.append(tuple(parameter.shape))
        return spread(anchor, parameter, *rest)

    monkeypatch.setattr(live.Spread, "apply", spy)
    batch = (torch.randn(4, 5, 3), torch.full((4,), 5), torch.randn(4))
    for kind in KINDS:
        model = Reads(getattr(nn, kind)(3, 4, batch_first=True), "padded", False)
        private_step(model, lambda m, b: squared(m(*b[:-1]), b[-1]), batch, 1.0)
    assert copied == []
    for kind in KINDS:  # where inputs are learned, only they are
        model = Generates(getattr(nn, kind)(3, 4, batch_first=True), from_state=True)
        private_step(model, lambda m, b: squared(m(*b[:-1]), b[-1]), batch, 1.0)
    assert set(copied) == {(5, 3)}
