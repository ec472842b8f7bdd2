"""EmbeddingBag equals torch's for every option; its exactness through the engine is in tests/cases.py (bag-*)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpkit.layers import EmbeddingBag


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["sum", "mean", "max"]),
    padding=st.sampled_from([None, 0, -1]),
    last=st.booleans(),
    weighted=st.booleans(),
    sizes=st.one_of(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_equals_torch(
    mode: str, padding: int | None, last: bool, weighted: bool, sizes: list[int] | int, seed: int
) -> None:
    """Outputs and gradients: bags as rows or by offsets, empty ones, duplicates, padding, weights."""
    torch.manual_seed(seed)
    theirs, ours = (
        kind(5, 3, mode=mode, padding_idx=padding, include_last_offset=last, dtype=torch.float64)
        for kind in (nn.EmbeddingBag, EmbeddingBag)
    )
    ours.load_state_dict(theirs.state_dict())
    if isinstance(sizes, int):
        entries, offsets = torch.randint(0, 5, (3, sizes)), None
    else:
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        entries, offsets = torch.randint(0, 5, (int(bounds[-1]),)), bounds if last else bounds[:-1]
    weights = None
    if weighted and mode == "sum":
        weights = torch.randn(entries.shape, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        if weights is not None:
            weights.grad = None
        y = module(entries, offsets, weights)
        y.cos().sum().backward()
        results.append([y, module.weight.grad, *([weights.grad] if weights is not None else [])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_refusals(option: dict[str, object]) -> None:
    """What couples records is refused."""
    with pytest.raises(ValueError, match="Leave them out"):
        EmbeddingBag(5, 3, **option)(torch.zeros(2, 2, dtype=torch.long))
