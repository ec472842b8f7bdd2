"""Rules for layers of optional packages, registered when a model that uses them (and has imported them) comes along."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import Outer, Routed, Rows
from .rules import Yields, has_rule, positions, register_rule, summed, trains


def register_optional(module: nn.Module) -> None:
    """Register rules for the classes of optional packages that occur in ``module``."""
    for layer in module.modules():
        kind = type(layer)
        if has_rule(kind):
            continue
        if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            register_rule(kind, input_for=["weight"])(transposed_linear)
        elif all(hasattr(layer, name) for name in _EXPERTS) and not layer.has_post_expert_norm:
            register_rule(kind, all_inputs=True)(experts)


def transposed_linear(layer: Any, x: Tensor, grad: Tensor) -> Yields:
    """y = x W + b with W [i, o] (transformers' Conv1D, in GPT-2)."""
    g = positions(grad)
    if trains(layer.weight):
        yield layer.weight, Outer(positions(x), g)
    if trains(layer.bias):
        yield layer.bias, summed(g)


_EXPERTS = (
    *("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate"),
    *("_is_expert_parallel", "down_proj"),
)
"""What transformers gives to every class that it decorates with ``use_experts_implementation``."""


def experts(layer: Any, inputs: tuple[Tensor, ...], grad: Tensor) -> Yields:
    """Mixtures of experts of transformers 5: Mixtral, Qwen-MoE, gpt-oss, DeepSeek, OLMoE and their like.

    Each token s goes through its k experts, y[s] = sum_k weight[s, k] · down_e(gate(up_e(x[s]))) with e = index[s, k].
    Whichever implementation the forward uses (a loop over experts, grouped or batched products), the gradient of expert
    e is a sum over the tokens that chose it. They are recomputed here, one expert at a time, from
    inputs = (x [s, d], index [s, k], weight [s, k]).
    """
    x, index, weight = inputs
    first = "gate_up_proj" if layer.has_gate else "up_proj"
    up, down = getattr(layer, first), layer.down_proj
    up_bias = getattr(layer, f"{first}_bias", None) if layer.has_bias else None
    down_bias = layer.down_proj_bias if layer.has_bias else None
    (s, k), m = index.shape, layer.num_experts
    x = x.to(grad.dtype)
    width, inner = (up.shape[2], down.shape[1]) if layer.is_transposed else (up.shape[1], down.shape[2])
    g_up, g_down = grad.new_zeros(s, k, width), grad.new_zeros(s, k, grad.shape[-1])
    hidden = grad.new_zeros(s, k, inner)
    for e in index.unique().tolist():
        rows, choice = (index == e).nonzero(as_tuple=True)
        one, two = (w[e].detach().to(grad.dtype) for w in (up, down))
        if layer.is_transposed:
            one, two = one.T, two.T
        u = F.linear(x[rows], one, None if up_bias is None else up_bias[e].detach().to(grad.dtype))
        g = grad[rows] * weight[rows, choice].unsqueeze(-1).to(grad.dtype)
        with torch.enable_grad():
            u.requires_grad_()
            h = layer._apply_gate(u) if layer.has_gate else layer.act_fn(u)
            (gu,) = torch.autograd.grad(h, u, g @ two)
        g_up[rows, choice], g_down[rows, choice], hidden[rows, choice] = gu, g, h.detach()
    inner_x = x.unsqueeze(1).expand(s, k, -1)
    for w, b, g, a in ((up, up_bias, g_up, inner_x), (down, down_bias, g_down, hidden)):
        if trains(w):
            yield w, Routed(index, a, g, m) if layer.is_transposed else Routed(index, g, a, m)
        if trains(b):
            yield b, Rows(index, g, m)
