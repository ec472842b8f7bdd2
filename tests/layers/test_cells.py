"""Recurrent cells equal torch's for every option, and their per-record gradients are exact through the engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpkit import layers
from tests.cases import squared
from tests.oracle import clipped_sum, norm
from tests.stepping import median_norm, private_step

KINDS = ["LSTMCell", "GRUCell", "RNNCell"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    n=st.integers(1, 4),
    bias=st.booleans(),
    initial=st.booleans(),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    seed=st.integers(0, 99),
)
def test_equals_torch(
    dtype: torch.dtype,
    tolerance: float,
    kind: str,
    sizes: tuple[int, int],
    n: int,
    bias: bool,
    initial: bool,
    nonlinearity: str,
    seed: int,
) -> None:
    """Two steps: states, and the gradients of weights, inputs and initial states."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"bias": bias, "dtype": dtype}
    if kind == "RNNCell":
        options["nonlinearity"] = nonlinearity
    theirs, ours = (getattr(home, kind)(*sizes, **options) for home in (nn, layers))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, n, sizes[0], dtype=dtype, requires_grad=True)
    states = [torch.randn(n, sizes[1], dtype=dtype, requires_grad=True) for _ in range(1 + (kind == "LSTMCell"))]
    results = []
    for module in (theirs, ours):
        leaves = [x, *(states if initial else []), *module.parameters()]
        for leaf in leaves:
            leaf.grad = None
        state: Any = (tuple(states) if kind == "LSTMCell" else states[0]) if initial else None
        state = module(x[1], module(x[0], state))
        state = state if isinstance(state, tuple) else (state,)
        torch.stack([(k + 2) * v.cos().sum() for k, v in enumerate(state)]).sum().backward()
        results.append([*state, *(leaf.grad for leaf in leaves)])
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        scale = 1.0 if k < len(states) else 10 * max(1.0, float(one.abs().max()))
        torch.testing.assert_close(other, one, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_refusals(kind: str) -> None:
    """Input without records, and a state of another number of records."""
    cell = getattr(layers, kind)(2, 3)
    with pytest.raises(ValueError, match="without a dimension of records"):
        cell(torch.randn(2))
    state = torch.zeros(1, 3)
    with pytest.raises(RuntimeError, match="for 4 records"):
        cell(torch.randn(4, 2), (state, state) if kind == "LSTMCell" else state)


class Loop(nn.Module):
    """A cell over time, from a learned initial state or from zeros, fed its own output in the second half."""

    def __init__(self, cell: nn.RNNCellBase, learned: bool) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 3)
        self.initial = nn.Parameter(torch.randn(1, cell.hidden_size)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        state: Any = None
        if self.initial is not None:
            state = self.initial.expand(n, -1)
            state = (state, state.tanh()) if isinstance(self.cell, nn.LSTMCell) else state
        out, outputs = x[:, 0], []
        for k in range(t):
            state = self.cell(x[:, k] if k < t // 2 else out, state)
            out = self.head(state[0] if isinstance(state, tuple) else state)
            outputs.append(out)
        return torch.stack(outputs, 1)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    home=st.sampled_from([nn, layers]),
    learned=st.booleans(),
    bias=st.booleans(),
    n=st.sampled_from([1, 2, 3, 4, 5]),
)
def test_private_step_is_exact(kind: str, home: Any, learned: bool, bias: bool, n: int) -> None:
    """torch's own cell and ours, in loops, whatever n coincides with."""
    torch.manual_seed(0)
    model = Loop(getattr(home, kind)(3, 4, bias=bias), learned).double()
    batch = (torch.randn(n, 5, 3, dtype=torch.float64), torch.randn(n, dtype=torch.float64))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return squared(model(batch[0]), batch[1])

    twin = copy.deepcopy(model)
    bound = median_norm(twin, losses, batch)
    total = clipped_sum(twin, losses, batch, n, bound)
    step = private_step(model, losses, batch, bound)
    assert norm({k: step[k] + total[k] / n for k in total}) <= 1e-10 * norm(total) / n


def test_no_copies_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a private loop over plain ``nn.LSTMCell`` no weight is copied for each record."""
    from dpkit import live

    copied: list[tuple[int, ...]] = []
    spread = live.Spread.apply

    def spy(anchor: Tensor, parameter: Tensor, *rest: Any) -> Tensor:
        copied.append(tuple(parameter.shape))
        return spread(anchor, parameter, *rest)

    monkeypatch.setattr(live.Spread, "apply", spy)
    for kind in KINDS:
        model = Loop(getattr(nn, kind)(3, 4), learned=False)
        private_step(model, lambda m, b: squared(m(b[0]), b[1]), (torch.randn(4, 5, 3), torch.randn(4)), 1.0)
    assert copied == []
