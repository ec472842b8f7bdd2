"""What is frozen costs nothing: no tap, no input kept, no gradient computed. Counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkit.taps import Tap
from tests.training import Run, attach, data, squared_loss, train

WIDTH, DEPTH = 16, 3


class LoRA(nn.Module):
    """A frozen linear layer and a trained update of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora() -> nn.Module:
    return nn.Sequential(*(LoRA() for _ in range(DEPTH)), nn.Linear(WIDTH, 1).requires_grad_(False))


def bitfit() -> nn.Module:
    """Biases alone are trained."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)), nn.Linear(WIDTH, 1))
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


def last_layer() -> nn.Module:
    """The head alone is trained."""
    body = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).requires_grad_(False) for _ in range(DEPTH)]
    return nn.Sequential(*body, nn.Linear(WIDTH, 1))


MODELS = {"lora": (lora, 2 * DEPTH), "bitfit": (bitfit, DEPTH + 1), "last-layer": (last_layer, 1)}
every_model = pytest.mark.parametrize("kind", list(MODELS))


class Counter:
    """Counts taps, and the bytes that autograd keeps (unique, the parameters aside)."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taps = self.kept_by_taps = self.bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        apply = Tap.apply

        def counted(y: Tensor, anchor: Tensor, emit: Any, batch: Any, there: Any, held: Any, *inputs: Tensor) -> Any:
            self.taps += 1
            self.kept_by_taps += len(inputs)
            return apply(y, anchor, emit, batch, there, held, *inputs)

        monkeypatch.setattr(Tap, "apply", counted)

    def pack(self, x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in self._seen and x.numel() > 1:
            self._seen.add(x.untyped_storage().data_ptr())
            self.bytes += x.untyped_storage().nbytes()
        return x


def records() -> Any:
    return data(8, WIDTH)


def counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """The second batch's forward, backward and step; the first one's proof is behind it."""
    train(run)
    counter = Counter(run.model, monkeypatch)
    for batch in run.loader:
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda x: x):
            loss = squared_loss(run.model, batch)
        loss.backward()
        run.optimizer.step()
    return counter


@every_model
def test_taps_are_on_trained_layers_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a layer of which only the bias trains keeps no input for its weight."""
    build, trained = MODELS[kind]
    counter = counted(attach(build(), records()), monkeypatch)
    assert counter.taps == trained
    assert counter.kept_by_taps == (0 if kind == "bitfit" else trained)


@every_model
def test_nothing_more_is_kept_than_in_ordinary_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes, over the whole forward."""
    build, _ = MODELS[kind]
    model = build()
    ordinary = Counter(model, monkeypatch)
    batch = next(iter(torch.utils.data.DataLoader(records(), 8)))
    with torch.autograd.graph.saved_tensors_hooks(ordinary.pack, lambda x: x):
        squared_loss(model, batch)
    assert counted(attach(build(), records()), monkeypatch).bytes <= ordinary.bytes


@every_model
def test_forms_are_of_trained_parameters_only(kind: str) -> None:
    """The profile, hence norms and sums, has what trains."""
    build, _ = MODELS[kind]
    run = attach(build(), records())
    train(run, 2)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert {line.parameter for line in run.engine.profile().lines} == trained


def test_below_the_first_trained_layer_there_is_no_backward() -> None:
    """Last-layer training ends its backward at the head."""
    run = attach(last_layer(), records())
    train(run)
    reached: list[str] = []
    for name, module in run.model.named_modules():
        if isinstance(module, nn.Tanh):
            module.register_full_backward_hook(lambda m, gi, go, name=name: reached.append(name))
    train(run)
    assert reached == []
