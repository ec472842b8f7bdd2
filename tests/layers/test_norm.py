"""What takes BatchNorm's place: the arithmetic that the docstrings state, and the same parameter objects."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpkit.layers import FrozenBatchNorm, group_norm, groups_for
from tests.cases import squared
from tests.oracle import clipped_sum, norm
from tests.stepping import median_norm, private_step

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def shaken(module: nn.Module) -> nn.Module:
    """With parameters and statistics of no special value."""
    with torch.no_grad():
        for v in module.state_dict().values():
            if v.is_floating_point():
                v.copy_(0.5 + torch.rand_like(v))
    return module


@given(channels=st.integers(1, 300), at_most=st.integers(1, 40))
def test_groups(channels: int, at_most: int) -> None:
    """A divisor within the bound that leaves two channels a group, and no larger one does."""
    fitting = [g for g in range(1, at_most + 1) if channels % g == 0 and (channels // g >= 2 or channels == 1)]
    assert groups_for(channels, at_most) == max(fitting)


def test_groups_out_of_range() -> None:
    with pytest.raises(ValueError, match="at least one group"):
        groups_for(4, 0)


def by_definition(x: Tensor, norm: nn.BatchNorm2d, groups: int) -> Tensor:
    """A loop over records, groups and channels."""
    y = torch.empty_like(x)
    wide = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            part = x[n, g * wide : (g + 1) * wide]
            spread = ((part - part.mean()).square().mean() + norm.eps).sqrt()
            for c in range(g * wide, (g + 1) * wide):
                y[n, c] = (x[n, c] - part.mean()) / spread
                if norm.affine:
                    y[n, c] = y[n, c] * norm.weight[c] + norm.bias[c]
    return y


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from(sorted(KINDS)),
    channels=st.integers(1, 8),
    affine=st.booleans(),
    at_most=st.integers(1, 4),
    eps=st.sampled_from([1e-5, 0.1]),
)
def test_group_norm(dims: int, channels: int, affine: bool, at_most: int, eps: float) -> None:
    """The stated arithmetic, on the BatchNorm's own weight and bias."""
    norm = shaken(KINDS[dims](channels, eps=eps, affine=affine).double()).eval()
    new = group_norm(norm, at_most)
    assert new.weight is norm.weight
    assert new.bias is norm.bias
    assert not new.training
    x = torch.randn((3, channels, 4, 2, 3)[:dims], dtype=torch.float64)
    torch.testing.assert_close(new(x), by_definition(x, norm, groups_for(channels, at_most)))
    if channels > 1:
        assert (new(x) - new(0 * x)).abs().max() > 0.1  # a group of one value would always give 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@settings(max_examples=40, deadline=None)
@given(dims=st.sampled_from(sorted(KINDS)), channels=st.integers(1, 5), affine=st.booleans(), train=st.booleans())
def test_frozen(dtype: torch.dtype, tolerance: float, dims: int, channels: int, affine: bool, train: bool) -> None:
    """BatchNorm's function in eval mode, in either mode, to the gradients; `state_dict` both ways."""
    norm = shaken(KINDS[dims](channels, affine=affine, dtype=dtype)).eval()
    frozen = FrozenBatchNorm(channels, affine=affine, dtype=dtype)
    frozen.load_state_dict(norm.state_dict())
    norm.load_state_dict(frozen.state_dict())
    frozen.train(train)
    x = torch.randn((3, channels, 4, 2, 3)[:dims], dtype=dtype, requires_grad=True)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    results = []
    for module in (norm, frozen):
        x.grad = None
        module.zero_grad()
        y = module(x)
        y.cos().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=10 * tolerance, atol=10 * tolerance)
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    same = FrozenBatchNorm.of(norm)
    assert all(same.state_dict(keep_vars=True)[k] is v for k, v in norm.state_dict(keep_vars=True).items())
    torch.testing.assert_close(same(x), results[1][0])


def test_nothing_to_freeze_at() -> None:
    with pytest.raises(ValueError, match="without running statistics"):
        FrozenBatchNorm.of(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FrozenBatchNorm])
@pytest.mark.parametrize("trains", ["both", "weight", "bias"])
def test_private_step_is_exact(kind: type[nn.Module], trains: str, caplog: pytest.LogCaptureFixture) -> None:
    """BatchNorm in eval mode and frozen: weight and bias train, statistics stay; by a rule, not one by one."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), shaken(kind(4)), nn.Tanh()).double().eval()
    model[1].weight.requires_grad_(trains != "bias")
    model[1].bias.requires_grad_(trains != "weight")
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    batch = (torch.randn(4, 2, 4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return squared(model(batch[0]), batch[1])

    twin = copy.deepcopy(model)
    bound = median_norm(twin, losses, batch)
    total = clipped_sum(twin, losses, batch, 4, bound)
    step = private_step(model, losses, batch, bound)
    assert norm({k: step[k] + total[k] / 4 for k in total}) <= 1e-10 * norm(total) / 4
    assert all(torch.equal(v, statistics[k]) for k, v in model.named_buffers())
    assert caplog.records == []
