"""`convert` keeps objects and functions, `validate` finds what stands in the way; both on models of torch's layers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit import layers
from dpkit.layers import convert, problems, validate


class Reader(nn.Module):
    """Words in a bag, attention over a sequence, and what recurrent layers and cells make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 8, mode="mean", padding_idx=0)
        self.table = nn.Embedding(9, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.ModuleList([nn.LSTM(8, 4, batch_first=True), nn.GRU(8, 4, 2, batch_first=True), nn.RNN(8, 4)])
        self.cells = nn.ModuleDict({"lstm": nn.LSTMCell(8, 4), "gru": nn.GRUCell(8, 4), "rnn": nn.RNNCell(8, 4)})
        self.head = nn.Linear(8 + 6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(self.table(x))
        y = self.attention(y, y, y)[0]
        last = y[:, -1]
        found = [
            self.bag(x),
            self.layers[0](y)[0][:, -1],
            self.layers[1](y)[0][:, -1],
            self.layers[2](y.transpose(0, 1))[0][-1],
            self.cells["lstm"](last)[0],
            self.cells["gru"](last),
            self.cells["rnn"](last),
        ]
        return self.head(torch.cat(found, 1))


def words(n: int = 6) -> Tensor:
    return torch.randint(0, 9, (n, 5))


def test_convert() -> None:
    """Every drop-in takes its place; objects, names, results and the optimizer's hold stay; a second time: nothing."""
    model, x = Reader(), words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    modules, y = dict(model.named_modules()), model(x)
    done = convert(model)
    kinds = {c.path: (c.before, c.after) for c in done.changed}
    assert kinds == {
        "bag": ("EmbeddingBag", "dpkit.layers.EmbeddingBag"),
        **dict.fromkeys(
            ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "attention"),
            ("MultiheadAttention", "dpkit.layers.MultiheadAttention"),
        ),
        **{f"layers.{k}": (kind, f"dpkit.layers.{kind}") for k, kind in enumerate(("LSTM", "GRU", "RNN"))},
        **{f"cells.{k}": (f"{k.upper()}Cell", f"dpkit.layers.{k.upper()}Cell") for k in ("lstm", "gru", "rnn")},
    }
    assert done.left == ()
    assert done.problems == ()
    assert all(c.why in str(done) and c.path in repr(done) for c in done.changed)
    assert dict(model.named_modules()) == modules
    assert dict(model.named_parameters()) == {name: p for name, (p, _) in before.items()}
    torch.testing.assert_close(model(x), y)
    model(x).square().sum().backward()
    optimizer.step()
    assert all(torch.allclose(p, was - 0.1 * p.grad) for p, was in before.values())
    assert any(not torch.equal(p, was) for p, was in before.values())
    assert type(model.layers[0]) is layers.LSTM
    assert convert(model).changed == ()


def test_convert_train_and_back() -> None:
    """Converted, trained privately, loaded into torch's own model, and the other way: the same outputs, strictly."""
    torchs, x = Reader(), words(8)
    ours = copy.deepcopy(torchs)
    convert(ours)
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.01)
    engine = dpkit.PrivacyEngine(accountant="rdp")
    data = DataLoader(TensorDataset(x, torch.randn(8, 3)), batch_size=4)
    _, _, loader = engine.make_private(ours, optimizer, data, noise_multiplier=0.5, max_grad_norm=1.0)
    for _ in range(2):
        for tokens, target in loader:
            engine.backward((ours(tokens) - target).square().sum(1))
            optimizer.step()
            optimizer.zero_grad()
    engine.detach()
    assert all(not torch.equal(p, start[name]) for name, p in ours.named_parameters())
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(torchs(x), ours(x))
    fresh = Reader()
    convert(fresh)
    fresh.load_state_dict(torchs.state_dict(), strict=True)
    torch.testing.assert_close(fresh.eval()(x), torchs.eval()(x))
    buffer = io.BytesIO()
    torch.save(fresh, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fresh), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x), fresh(x))


class MyLSTM(nn.LSTM):
    """Of the same arithmetic."""

    def __init__(self) -> None:
        super().__init__(3, 4)


class Doubled(nn.LSTM):
    """Of another one."""

    def forward(self, *args: Any) -> Any:
        y, last = super().forward(*args)
        return 2 * y, last


def test_what_may_compute_something_else_is_left() -> None:
    """Overridden, patched and parametrised layers are left alone, with the reason; a mere name is not."""
    model = nn.ModuleDict(
        {"mine": MyLSTM(), "doubled": Doubled(3, 4), "patched": nn.GRU(3, 4), "weighed": nn.GRU(3, 4)}
    )
    model["patched"].forward = lambda *args: args
    nn.utils.parametrizations.weight_norm(model["weighed"], "weight_hh_l0")
    done = convert(model)
    assert [c.path for c in done.changed] == ["mine"]
    assert type(model["mine"]) is layers.LSTM
    assert dict(done.left).keys() == {"doubled", "patched", "weighed"}
    assert "forward" in dict(done.left)["doubled"]
    assert "left alone 3" in repr(done)


def network() -> nn.Module:
    """Convolutions with BatchNorm, one of which has two places."""
    shared = nn.BatchNorm2d(4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Sequential(shared), nn.Flatten(),
        nn.Linear(36, 6), nn.BatchNorm1d(6, affine=False),
    )  # fmt: skip


def test_batch_norm_to_group_norm() -> None:
    """Asked for only; weights are the same objects, in all places; hooks and flags stay; then it trains privately."""
    model = network()
    assert convert(model).changed == ()
    assert [p.path for p in convert(model).problems] == ["1", "7"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight, calls = model[1].weight, []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    model[7].eval()
    done = convert(model, batch_norm="group", groups=2)
    assert [(c.path, c.before, c.after) for c in done.changed] == [
        ("1", "BatchNorm2d", "GroupNorm"), ("7", "BatchNorm1d", "GroupNorm"),
    ]  # fmt: skip
    assert "2 groups of 2 channels" in repr(done)
    assert done.problems == ()
    assert model[1] is model[4][0]
    assert model[1].weight is weight
    assert (model[1].num_groups, model[1].training, model[7].training, model[7].affine) == (2, True, False, False)
    images = TensorDataset(torch.randn(6, 3, 5, 5), torch.randn(6, 6))
    engine = dpkit.PrivacyEngine()
    _, _, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(images, batch_size=3), noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    before = weight.detach().clone()
    for x, y in loader:
        engine.backward((model(x) - y).square().sum(1))
        optimizer.step()
    assert not torch.equal(weight, before)
    assert calls


def test_batch_norm_frozen() -> None:
    """The function of eval mode, in both modes; where there are no statistics it is left, with the reason."""
    model, x = network(), torch.randn(5, 3, 5, 5)
    model(x)
    names = list(model.state_dict())
    y = model.eval()(x)
    model.append(nn.BatchNorm1d(6, track_running_stats=False))
    done = convert(model, batch_norm="frozen")
    assert [(c.path, c.after) for c in done.changed] == [("1", "FrozenBatchNorm"), ("7", "FrozenBatchNorm")]
    assert [path for path, _ in done.left] == ["8"] == [p.path for p in done.problems]
    del model[8]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model.train()(x), y)
    network().load_state_dict(model.state_dict(), strict=True)


class Fused(nn.BatchNorm2d):
    """Normalises and does more, as timm's does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_batch_norms_that_are_left() -> None:
    """Subclasses with arithmetic of their own and those without a shape; the model itself cannot be replaced."""
    model = nn.Sequential(Fused(3), nn.LazyBatchNorm2d())
    done = convert(model, batch_norm="group")
    assert done.changed == ()
    assert [path for path, _ in done.left] == ["0", "1"]
    with pytest.raises(ValueError, match="itself is a BatchNorm"):
        convert(nn.BatchNorm2d(3), batch_norm="group")
    with pytest.raises(ValueError, match='"group", "frozen"'):
        convert(model, batch_norm="layer")


PROBLEMS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "batch norm": (lambda: nn.BatchNorm2d(3), "statistics of the batch", "dpkit.layers.convert"),
    "without parameters": (lambda: nn.BatchNorm1d(3, affine=False), "statistics of the batch", "eval mode"),
    "frozen": (lambda: nn.BatchNorm3d(3).requires_grad_(False), "keeps running ones", "GroupNorm"),
    "synchronised": (lambda: nn.SyncBatchNorm(3), "statistics of the batch", "dpkit.layers.convert"),
    "no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False).eval(), "of the batch", "GroupNorm"),
    "fused": (lambda: Fused(3), "statistics of the batch", "GroupNorm"),
    "instance norm": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), "running", "track_running_stats=False"),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm=1.0", "max_norm=None"),
    "frozen max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0).requires_grad_(False).eval(), "max_norm", "None"),
    "bag's max_norm": (lambda: nn.EmbeddingBag(3, 2, max_norm=1.0), "max_norm=1.0", "max_norm=None"),
    "frequencies": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq", "=False"),
    "bag's frequencies": (lambda: nn.EmbeddingBag(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq", "=False"),
    "lazy": (lambda: nn.LazyLinear(3), "no shape yet (weight, bias)", "made-up input"),
}

NO_PROBLEMS: dict[str, Callable[[], nn.Module]] = {
    "eval batch norm": lambda: nn.BatchNorm2d(3).eval(),
    "frozen batch norm": lambda: layers.FrozenBatchNorm(3),
    "instance norm": lambda: nn.InstanceNorm2d(3, affine=True),
    "eval instance norm": lambda: nn.InstanceNorm2d(3, track_running_stats=True).eval(),
    "frozen frequencies": lambda: nn.Embedding(3, 2, scale_grad_by_freq=True).requires_grad_(False),
    "embedding": lambda: nn.Embedding(3, 2, padding_idx=0),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str) -> None:
    """Each is found, where it is, with what was seen and a cure; and the engine refuses it in the same words."""
    make, seen, cure = PROBLEMS[name]
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(make()), nn.Linear(3, 1))
    [problem] = validate(model)
    assert problem.path == "1.0"
    assert problem.seen.startswith(f"1.0 ({type(model[1][0]).__name__})")
    assert seen in problem.seen
    assert cure in problem.cure
    assert problem.why
    assert str(problem).count("\n") == 2
    if name == "lazy":
        return  # torch's optimizers refuse it first
    with pytest.raises(dpkit.UnsupportedModuleError) as refusal:
        dpkit.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    assert (refusal.value.seen, refusal.value.why, refusal.value.cure) == (problem.seen, problem.why, problem.cure)


@pytest.mark.parametrize("name", NO_PROBLEMS)
def test_no_problems(name: str) -> None:
    """What only looks like one."""
    assert validate(nn.Sequential(NO_PROBLEMS[name]())) == []


def test_all_are_listed() -> None:
    """In the order of the modules, each module once; the engine's error names the others."""
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.InstanceNorm1d(3, track_running_stats=True)})
    assert [p.path for p in validate(model)] == ["a", "c"]
    assert list(problems(shared, "a", training=False)) == []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(4, 3)), batch_size=2)
    with pytest.raises(dpkit.UnsupportedModuleError, match="Likewise c"):
        dpkit.PrivacyEngine().make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
