"""What a model may be given, and do in its forward: exact, or refused by what it was, not by a crash."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import dpkit
from tests.oracle import clipped_sum, norm
from tests.stepping import private_step

N = 5


def squared(y: Tensor) -> Tensor:
    return y.flatten(1).square().mean(1)


def assert_exact(model: nn.Module, losses: Callable[[nn.Module, Any], Tensor], batch: Any, bound: float = 0.05) -> None:
    expected = clipped_sum(copy.deepcopy(model), losses, batch, N, bound)
    step = private_step(model, losses, batch, bound)
    assert norm({k: step[k] * N + v for k, v in expected.items()}) <= 1e-5 * norm(expected)


class Recurrent(nn.Module):
    """Given its first state, or its records' lengths."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4, layers, batch_first=True)

    def forward(self, x: Tensor, state: Tensor | None = None, lengths: Any = None) -> Tensor:
        packed = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        last: Tensor = self.layer(packed, state)[1][-1]
        return last


@pytest.mark.parametrize("layers", [1, 2, N])
def test_states_with_the_records_in_the_second_dimension(layers: int) -> None:
    """As recurrent layers take them, [layers, n, h], though records lead elsewhere; as many layers as records, too."""
    batch = (torch.randn(N, 6, 3),)
    assert_exact(Recurrent(layers), lambda m, b: squared(m(b[0], torch.ones(layers, len(b[0]), 4))), batch)


def test_lengths_in_a_list() -> None:
    """Of a list no record can be left out; a tensor of them is what it takes."""
    batch = (torch.randn(N, 6, 3), torch.tensor([3, 6, 1, 2, 6]))
    assert_exact(Recurrent(), lambda m, b: squared(m(b[0], lengths=b[1])), batch)
    with pytest.raises(dpkit.UncoveredParameterError, match="a list of 5 values") as refusal:
        private_step(Recurrent(), lambda m, b: squared(m(b[0], lengths=b[1].tolist())), batch, 1.0)
    assert "lengths.tolist()" in refusal.value.cure


class Masked(nn.Module):
    """A table of positions, left as it is where nothing is masked, as transformers' T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        table = self.table[None].expand(len(x), -1, -1)
        if not mask.all():
            table = torch.where(mask[:, :, None], table, torch.tensor(-1.0))
        out: Tensor = self.layer(torch.tanh(x[:, None] * table)).mean(1)
        return out


def test_the_only_record_with_padding_is_the_last(caplog: pytest.LogCaptureFixture) -> None:
    """Without it the others go another way; so without the first one it is seen where the records are."""
    mask = torch.ones(N, 3, dtype=torch.bool)
    mask[-1, -1] = False
    assert_exact(Masked(), lambda m, b: squared(m(*b)), (torch.randn(N, 4), mask))
    assert not caplog.records  # not on one record at a time


@pytest.mark.parametrize("around", ["forward", "loop"])
def test_cached_parametrisations(around: str) -> None:
    """What was computed for one forward is not there for the next."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        with parametrize.cached():
            return squared(model(batch[0]))

    batch = (torch.randn(N, 3),)
    if around == "forward":
        assert_exact(model, losses, batch)
        return
    expected = clipped_sum(copy.deepcopy(model), losses, batch, N, 0.05)
    with parametrize.cached():
        step = private_step(model, losses, batch, 0.05)
    assert norm({k: step[k] * N + v for k, v in expected.items()}) <= 1e-5 * norm(expected)


class Checkpointed(nn.Module):
    """A function that uses parameters by itself, or calls a module."""

    def __init__(self, by_itself: bool, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), middle or nn.Linear(4, 4), nn.Linear(4, 2)
        self.by_itself = by_itself

    def inside(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.middle.weight, self.middle.bias) if self.by_itself else self.middle(x)
        return torch.tanh(y)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(checkpoint(self.inside, self.first(x), use_reentrant=False))
        return y


def test_checkpointed_functions() -> None:
    batch = (torch.randn(N, 3),)
    assert_exact(Checkpointed(False), lambda m, b: squared(m(b[0])), batch)
    with pytest.raises(dpkit.UncoveredParameterError, match="a function is checkpointed") as refusal:
        private_step(Checkpointed(True), lambda m, b: squared(m(b[0])), batch, 1.0)
    assert "checkpoint a module" in refusal.value.cure


class Scale(nn.Module):
    """Each row times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_what_is_checkpointed_is_attributed() -> None:
    """A rule that credits the next record's gradient is found out there, too: sums would not tell."""

    @dpkit.register_rule(Scale)
    def wrong(layer: Scale, x: Tensor, grad: Tensor) -> Any:
        yield layer.weight, dpkit.Dense((grad * x).roll(1, 0))

    try:
        with pytest.raises(dpkit.GradientMismatchError, match=r"middle\.weight"):
            private_step(Checkpointed(False, Scale()), lambda m, b: squared(m(b[0])), (torch.randn(N, 3),), 1.0)
    finally:
        dpkit.unregister_rule(Scale)


def test_functions_that_map_over_records() -> None:
    """Of what holds parameters; the rest is the user's."""
    batch = (torch.randn(N, 3),)

    class Maps(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.layer, self.whole = nn.Linear(3, 2), whole

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.vmap(self.layer)(x) if self.whole else torch.vmap(torch.tanh)(self.layer(x))
            return y

    assert_exact(Maps(False), lambda m, b: squared(m(b[0])), batch)
    with pytest.raises(dpkit.UncoveredParameterError, match=r"torch\.func"):
        private_step(Maps(True), lambda m, b: squared(m(b[0])), batch, 1.0)
