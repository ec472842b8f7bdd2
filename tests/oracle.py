"""What private training is defined to compute: the loop over single records, and nothing clever.

Every record is a batch of one. Its gradient is what ``backward`` leaves in ``p.grad``; its norm is taken over all
trainable parameters, each counted once however many names it has. Slow, and short enough to be believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PyTree = Any
Losses = Callable[[nn.Module, PyTree], Tensor]
"""``losses(model, batch)``: one loss per record, shape [n]."""

AUTOMATIC_GAMMA = 0.01
"""The stabiliser of automatic clipping (Bu et al. 2022, "Automatic Clipping", section 3)."""


def take(batch: PyTree, index: int | list[int] | Tensor) -> PyTree:
    """The records at `index`, still with their leading dimension; an int gives a batch of one."""
    rows = torch.as_tensor([index] if isinstance(index, int) else index, dtype=torch.long)
    return pytree.tree_map_only(Tensor, lambda value: value[rows], batch)


def size(batch: PyTree) -> int:
    """The number of records in `batch`."""
    sizes = {value.shape[0] for value in pytree.tree_leaves(batch) if isinstance(value, Tensor)}
    if len(sizes) != 1:
        raise ValueError(f"the leaves of a batch must agree on the number of records, saw {sorted(sizes)}")
    return sizes.pop()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by their first name; a shared one appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def per_record_grads(model: nn.Module, losses: Losses, batch: PyTree, n: int) -> list[dict[str, Tensor]]:
    """Each record's own gradient, from a forward and a backward of that record alone."""
    grads = []
    for i in range(n):
        model.zero_grad(set_to_none=True)
        loss = losses(model, take(batch, i))
        assert loss.shape == (1,), f"one record must give one loss, saw shape {tuple(loss.shape)}"
        loss.sum().backward()
        grads.append({name: _dense_grad(parameter) for name, parameter in trainable(model).items()})
    model.zero_grad(set_to_none=True)
    return grads


def batched_vjp_grads(model: nn.Module, losses: Losses, batch: PyTree, n: int) -> dict[str, Tensor]:
    """All records' gradients at once, stacked [n, ...]: n vector-Jacobian products through one whole-batch forward.

    It knows nothing of layers either, and unlike the loop it runs the model on the whole batch: where the two agree,
    the model treats its records independently and the case is sound.
    """
    parameters = trainable(model)
    values = losses(model, batch)
    assert values.shape == (n,), f"{n} records must give {n} losses, saw shape {tuple(values.shape)}"
    grads = torch.autograd.grad(
        values, list(parameters.values()), torch.eye(n, dtype=values.dtype), is_grads_batched=True, allow_unused=True
    )
    return {
        name: torch.zeros(n, *parameter.shape, dtype=parameter.dtype) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }


def norm(grad: dict[str, Tensor]) -> Tensor:
    """The Euclidean norm over all parameters, in float64."""
    return torch.stack([value.double().square().sum() for value in grad.values()]).sum().sqrt()


def clip(grad: dict[str, Tensor], max_grad_norm: float, clipping: str = "flat") -> dict[str, Tensor]:
    """One record's gradient after clipping.

    "flat": g · min(1, C / ‖g‖). "automatic": g · C / (‖g‖ + 0.01). "per_layer": flat clipping of each of the K
    parameter tensors by itself at C / √K, so that the whole is still at most C.
    """
    if clipping == "per_layer":
        threshold = max_grad_norm / math.sqrt(len(grad))
        return {name: clip({name: value}, threshold)[name] for name, value in grad.items()}
    if clipping == "flat":
        weight = torch.clamp(max_grad_norm / norm(grad), max=1.0)
    elif clipping == "automatic":
        weight = max_grad_norm / (norm(grad) + AUTOMATIC_GAMMA)
    else:
        raise ValueError(f"unknown clipping {clipping!r}")
    return {name: value * weight.to(value.dtype) for name, value in grad.items()}


def clipped_sum(
    model: nn.Module, losses: Losses, batch: PyTree, n: int, max_grad_norm: float, clipping: str = "flat"
) -> dict[str, Tensor]:
    """The sum over records of each record's clipped gradient: what one step releases before noise."""
    clipped = [clip(grad, max_grad_norm, clipping) for grad in per_record_grads(model, losses, batch, n)]
    return {
        name: sum((grad[name] for grad in clipped), start=torch.zeros_like(parameter))
        for name, parameter in trainable(model).items()
    }


def _dense_grad(parameter: nn.Parameter) -> Tensor:
    """A copy of ``parameter.grad``; zeros if the backward did not reach it."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense().detach().clone()
