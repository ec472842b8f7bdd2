"""Buffers: what the forward writes of the records into the ``state_dict`` is refused; what it writes of the weights is
not, and spectral norm's power iteration is exact in train mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from tests.cases import squared
from tests.oracle import batched_vjp_grads, clip, norm
from tests.stepping import private_step


class Keeps(nn.Module):
    """A layer that updates a buffer in the forward, in a way of its own."""

    def __init__(self, update: Callable[[nn.Module, Tensor], None], persistent: bool = True) -> None:
        super().__init__()
        self.linear, self.update = nn.Linear(4, 5), update
        self.register_buffer("kept", torch.zeros(5), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.linear(x))
        with torch.no_grad():
            self.update(self, y)
        return y


def in_place(module: Any, y: Tensor) -> None:
    module.kept.mul_(0.9).add_(0.1 * y.mean(0))


def replaced(module: Any, y: Tensor) -> None:
    module.kept = 0.9 * module.kept + 0.1 * y.mean(0)


def by_data(module: Any, y: Tensor) -> None:
    module.kept.data.copy_(y.mean(0))


def one_record(module: Any, y: Tensor) -> None:
    module.kept[0] = y[-1, 0]


def sign(module: Any, y: Tensor) -> None:
    module.kept.copy_(y[-1] > 0)


def number(module: Any, y: Tensor) -> None:
    module.kept += len(y)


def all_of_them(module: Any, y: Tensor) -> None:
    module.kept = y.detach()


def steps(module: Any, y: Tensor) -> None:
    module.kept += 1


def weights(module: Any, y: Tensor) -> None:
    module.kept.copy_(module.linear.weight.norm(dim=1))


def chance(module: Any, y: Tensor) -> None:
    module.kept = torch.rand(5)


def run(layer: nn.Module, n: int = 4) -> nn.Module:
    """Three private steps around the layer."""
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(n, 4), torch.randn(n, 1)), batch_size=n)
    engine = dpkit.PrivacyEngine()
    _, _, private = engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    for _ in range(3):
        for x, y in private:
            engine.backward((model(x) - y).square().sum(1))
            optimizer.step()
    return model


@pytest.mark.parametrize("update", [in_place, replaced, by_data, one_record, number, all_of_them])
@pytest.mark.parametrize("frozen", [False, True])
def test_records_in_a_buffer(update: Callable[..., None], frozen: bool) -> None:
    """Refused before the first update stays, whatever the weights do."""
    layer = Keeps(update).requires_grad_(not frozen)
    kept = layer.kept
    with pytest.raises(dpkit.UnsupportedModuleError, match=r"into the buffer 1\.kept") as refusal:
        run(layer)
    assert "state_dict" in refusal.value.why
    assert refusal.value.cure
    assert layer.kept is kept
    assert torch.equal(kept, torch.zeros(5))


@pytest.mark.parametrize("update", [in_place, replaced, sign])
def test_one_record_in_a_buffer(update: Callable[..., None]) -> None:
    """A batch of one record has nothing to compare with; where the values come from tells."""
    with pytest.raises(dpkit.UnsupportedModuleError, match=r"into the buffer 1\.kept"):
        run(Keeps(update), n=1)


@pytest.mark.parametrize("update", [steps, weights, chance])
def test_other_buffers(update: Callable[..., None]) -> None:
    """Counts of steps, statistics of the weights, and chance say nothing of the records."""
    model = run(Keeps(update))
    assert model[1].kept.abs().sum() > 0
    if update is steps:
        assert model[1].kept[0] == 3  # examined, and not counted


class Shifts(nn.Linear):
    """Changes its weight in the forward by what the records are, without gradient."""

    def __init__(self, how: str) -> None:
        super().__init__(4, 5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.how == "in place":
                self.weight.add_(1e-6 * x.mean())
            else:
                torch.add(self.weight, 1e-6 * x.mean(), out=self.weight)
        return super().forward(x)


@pytest.mark.parametrize("how", ["in place", "out"])
def test_records_in_a_parameter(how: str) -> None:
    """A weight that the forward itself changes is refused, without gradient too; nothing of it stays."""
    layer = Shifts(how)
    before = layer.weight.detach().clone()
    with pytest.raises(dpkit.UncoveredParameterError, match=r"1\.weight"):
        run(layer)
    assert torch.equal(layer.weight, before)


def test_buffers_that_are_not_released() -> None:
    """What is not in the ``state_dict`` is the user's own."""
    run(Keeps(in_place, persistent=False))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """In train mode: the step, and the vectors of the power iteration after it, are those of ordinary training."""
    model = nn.Sequential(wrap(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)).double()
    batch = (torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return squared(model(batch[0]), batch[1])

    twin = copy.deepcopy(model)
    grads = batched_vjp_grads(twin, losses, batch, 4)
    clipped = [clip({k: v[i] for k, v in grads.items()}, 0.3) for i in range(4)]
    total = {k: torch.stack([c[k] for c in clipped]).sum(0) for k in grads}
    step = private_step(model, losses, batch, 0.3)
    assert norm({k: step[k] + total[k] / 4 for k in total}) <= 1e-10 * norm(total) / 4
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[k], v) for k, v in twin.named_buffers())
    assert all(type(v) is Tensor for v in buffers.values())
