"""A linear map whose result is known has the gradients of one that is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkit.layers import known_linear
from tests.oracle import clipped_sum
from tests.training import attach


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 4, 5, 3)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("wanted", ["all", "x", "weights"])
def test_gradients(shape: tuple[int, ...], biased: bool, wanted: str) -> None:
    """Those of F.linear, for whichever of its arguments want one; the value is returned as it is given."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=wanted != "weights")
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=wanted != "x")
    bias = torch.randn(4, dtype=torch.float64, requires_grad=wanted != "x") if biased else None
    among = [v for v in (x, weight, bias) if v is not None and v.requires_grad]
    computed = F.linear(x, weight, bias)
    grad = torch.randn_like(computed)
    expected = torch.autograd.grad(computed, among, grad)
    value = torch.full_like(computed.detach(), 7.0)
    found = known_linear(x, weight, bias, value)
    assert torch.equal(found, value)
    for one, other in zip(torch.autograd.grad(found, among, grad), expected, strict=True):
        torch.testing.assert_close(one, other)


class Squared(nn.Module):
    """(x W' + b)² where x W' + b was computed without gradient; W may be a function of a parameter."""

    def __init__(self, derived: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.derived = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2)), derived

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.tanh() if self.derived else self.weight
        value = F.linear(x, weight.detach(), self.bias.detach())
        return known_linear(x, weight, self.bias, value).square()


@pytest.mark.parametrize("derived", [False, True])
def test_of_each_record(derived: bool) -> None:
    """The engine reads each record's gradient off it: from its form, and from the records' copies."""
    torch.manual_seed(0)
    model = Squared(derived)
    x = torch.randn(6, 4, 3)
    expected = clipped_sum(model, lambda m, rows: m(rows).sum((1, 2)), x, 6, 1.0)
    run = attach(model, torch.utils.data.TensorDataset(x, torch.zeros(6)), 6, max_grad_norm=1.0, lr=0.0)
    for batch in run.loader:
        run.model(batch[0]).sum((1, 2)).mean().backward()
        run.optimizer.step()
    assert not run.engine._attached().tape.apiece  # no module ran on one record at a time instead
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(6 * p.grad, expected[name])
