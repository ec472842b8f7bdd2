"""A linear map whose result is known already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function


def known_linear(x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor) -> Tensor:
    """``F.linear(x, weight, bias)`` of x [..., i] without computing it: ``value`` [..., o] is returned for it.

    For a map that a loop has applied piece by piece: its gradients, and those of each record, are products over all
    pieces at once. Nobody checks the value; where only the sum of several maps is used, any will do for each.
    """
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(known_linear, (x, weight, bias), x, weight, bias, value)
    return _Known.apply(x, weight, bias, value)  # type: ignore[no-any-return]


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            _product(rows, weight).view(*grad.shape[:-1], weight.shape[1]) if to_x else None,
            torch.mm(rows.T, x.flatten(0, -2)) if to_weight else None,
            rows.sum(0) if to_bias else None,
            None,
        )


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight``; on a CPU some rows at a time, which for many of them is up to a quarter faster."""
    if rows.device.type != "cpu":
        return torch.mm(rows, weight)
    out = rows.new_empty(len(rows), weight.shape[1])
    for some, found in zip(rows.split(_TOGETHER), out.split(_TOGETHER), strict=True):
        torch.mm(some, weight, out=found)
    return out


_TOGETHER = 1024
