"""The rules: from (layer, input, gradient at the output) to the per-sample gradients of the layer's parameters.

A rule is a function that yields ``(parameter, form)``. The engine verifies every rule on the first batch against
autograd's own gradient, on the user's model, so a wrong rule cannot stay unnoticed.

Letters: n record, t positions (all dimensions between record and features), i in, o out, c channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dpkit.layers import FrozenBatchNorm

from .convolved import Convolved
from .forms import Dense, Form, Outer, Rows

Yields = Iterator[tuple[Tensor | None, Form]]
RuleFunction = Callable[[Any, Any, Tensor], Iterable[tuple[Tensor | None, Form]]]


@dataclass(frozen=True)
class Rule:
    """A rule function, the class it was written for, and what it needs of the layer's call.

    Attributes:
        input_for: the parameters whose form needs the layer's input; None: all of them.
        all_inputs: whether it takes all tensors that the layer was called with, not the first alone.
    """

    function: RuleFunction
    kind: type[nn.Module]
    input_for: frozenset[str] | None
    all_inputs: bool = False

    @property
    def built_in(self) -> bool:
        """Whether it is one of dpkit's own."""
        return self.function.__module__.startswith("dpkit.")

    def needs_input(self, parameters: Mapping[str, nn.Parameter | None]) -> bool:
        """Whether the layer's input has to be kept, given its parameters by name."""
        names = self.input_for
        return any(trains(p) and (names is None or k in names) for k, p in parameters.items())


_RULES: dict[type[nn.Module], Rule] = {}
_BOOKKEEPING = {
    "__init__",
    "extra_repr",
    "reset_parameters",
    "_load_from_state_dict",
    "__setstate__",
    "_fill_padding_idx_with_zero",
}


def register_rule(
    *kinds: type[nn.Module], input_for: Iterable[str] | None = None, all_inputs: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for module classes; a duplicate raises.

    Args:
        kinds: the classes. A subclass is covered as long as it does not override the arithmetic.
        input_for: names of the parameters whose form needs the layer's input; where only others train, the engine
            keeps no input. All by default (the rule may rely on ``x``).
        all_inputs: the layer takes several tensors, and the rule gets them all.

    The rule is called as ``rule(layer, x, grad)`` with the layer's first input ``x`` [n, ...] and the gradient at its
    output ``grad`` [n, ...], and yields ``(parameter, form)`` for each of its parameters (None parameters are skipped).
    With ``all_inputs`` it is ``rule(layer, inputs, grad)``, where ``inputs`` is the tuple of the tensors in the order
    of the call, keywords last; one without records (a mask [t, t]) comes as it is.

    Where the layer sees rows, [n·t, ...], the rule gets them as if each were a record, and the engine puts the forms of
    one record's rows together. `dpkit.testing.check_rule` tests a rule by itself.

    >>> @register_rule(Scale)                                   # y = weight * x            # doctest: +SKIP
    ... def scale(layer, x, grad):
    ...     yield layer.weight, Dense((grad * x).flatten(1, -2).sum(1))
    """

    def register(function: RuleFunction) -> RuleFunction:
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise TypeError(f"register_rule takes nn.Module classes, not {kind!r}")
            if kind in _RULES:
                raise ValueError(f"{kind.__qualname__} already has a rule: {_RULES[kind].function.__qualname__}")
        for kind in kinds:
            _RULES[kind] = Rule(function, kind, None if input_for is None else frozenset(input_for), all_inputs)
        return function

    return register


def unregister_rule(kind: type[nn.Module]) -> None:
    """Forget the rule of a class (for tests and notebooks)."""
    del _RULES[kind]


def has_rule(kind: type[nn.Module]) -> bool:
    """Whether a rule is registered for exactly this class."""
    return kind in _RULES


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule that describes ``layer``'s arithmetic, or None.

    A subclass inherits its base's rule only if it overrides none of the base's methods; a patched ``forward`` or a
    parametrised weight has no rule.
    """
    if "forward" in vars(layer) or parametrize.is_parametrized(layer) or "weight" in vars(layer):
        return None  # patched, parametrised, or a weight that a hook computes (torch.nn.utils.weight_norm)
    for base in type(layer).__mro__:
        rule = _RULES.get(base)
        if rule is not None:
            defined = (vars(cls).items() for cls in base.__mro__ if cls not in (nn.Module, object))
            own = {k for items in defined for k, v in items if callable(v) and k not in _BOOKKEEPING}
            same = all(getattr(type(layer), k) is getattr(base, k) for k in own)
            return rule if same and _describes(rule, layer) else None
    return None


def _describes(rule: Rule, layer: nn.Module) -> bool:
    """Options that change the arithmetic beyond what a built-in rule says."""
    if getattr(layer, "_is_expert_parallel", False):
        return False  # some of the experts that tokens are routed to are elsewhere
    # With running statistics in use, instance norm is no longer a function of the record alone.
    return not (isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats)


def trains(p: Tensor | None) -> bool:
    return p is not None and p.requires_grad


# ---------------------------------------------------------------- linear


def positions(x: Tensor) -> Tensor:
    """[n, ..., d] as [n, t, d]; [n, d] stays, as t = 1."""
    return x if x.ndim == 2 else x.flatten(1, -2)


@register_rule(nn.Linear, input_for=["weight"])
def linear(layer: nn.Linear, x: Tensor, grad: Tensor) -> Yields:
    """y = x W' + b, any number of dimensions."""
    g = positions(grad)
    if trains(layer.weight):
        yield layer.weight, Outer(g, positions(x))
    if trains(layer.bias):
        yield layer.bias, summed(g)


def summed(g: Tensor) -> Dense:
    """[n, t, d] summed over t in float32 or wider."""
    if g.ndim == 2:
        return Dense(g)
    narrow = g.dtype in (torch.float16, torch.bfloat16)
    return Dense(g.sum(1, dtype=torch.float32 if narrow else None))


# ---------------------------------------------------------------- convolutions


def _channels_last(x: Tensor) -> Tensor:
    """[n, c, ...] as [n, t, c]; [n, c] stays."""
    return x.flatten(2).transpose(1, 2) if x.ndim > 2 else x


def _padded(layer: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with its padding made explicit where convolution_backward cannot express it, and the rest."""
    if layer.padding_mode != "zeros":
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0,) * len(layer.kernel_size)
    if isinstance(layer.padding, str):
        return F.pad(x, layer._reversed_padding_repeated_twice), (0,) * len(layer.kernel_size)
    return x, layer.padding


def _convolved(layer: Any, x: Tensor, grad: Tensor, padding: Any) -> Convolved:
    return Convolved(x, grad, tuple(layer.weight.shape), layer.stride, padding, layer.dilation, layer.groups)


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, input_for=["weight"])
def convolution(layer: nn.Conv2d, x: Tensor, grad: Tensor) -> Yields:
    """Convolutions of 1 to 3 dimensions: stride, dilation, groups, `same`, every padding mode, any memory format."""
    if trains(layer.weight):
        x, padding = _padded(layer, x)
        yield layer.weight, _convolved(layer, x, grad, padding)
    if trains(layer.bias):
        yield layer.bias, summed(_channels_last(grad))


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, input_for=["weight"])
def transposed_convolution(layer: nn.ConvTranspose2d, x: Tensor, grad: Tensor) -> Yields:
    """A transposed convolution is the convolution with input and output exchanged, and so is its weight gradient."""
    if trains(layer.weight):
        yield layer.weight, _convolved(layer, grad, x, layer.padding)
    if trains(layer.bias):
        yield layer.bias, summed(_channels_last(grad))


# ---------------------------------------------------------------- embedding


@register_rule(nn.Embedding)
def embedding(layer: nn.Embedding, x: Tensor, grad: Tensor) -> Yields:
    """Table look-up; the row ``padding_idx`` gets no gradient."""
    yield layer.weight, looked_up(x, grad, layer.num_embeddings, layer.padding_idx)


def looked_up(index: Tensor, grad: Tensor, v: int, padding_idx: int | None) -> Rows:
    """`Rows` for indices [n, ...] and the gradient [n, ..., d] of the rows they picked."""
    rows = index.reshape(index.shape[0], -1).long()
    g = grad.reshape(*rows.shape, grad.shape[-1])
    if padding_idx is not None:
        g = g.masked_fill((rows == padding_idx % v).unsqueeze(-1), 0)
    return Rows(rows, g, v)


# ---------------------------------------------------------------- normalisations


Normalised = Callable[[Tensor], Tensor]


def _products(normalised: Normalised, x: Tensor, grad: Tensor, total: Callable[[Tensor], Dense]) -> Dense:
    """The sums of ``grad`` times the normalised input over all positions, some records at a time: what is in between
    stays in the processor's cache."""
    n = len(x)
    each = max(1, _CACHED // max(1, grad[:1].numel())) if grad.device.type == "cpu" else max(1, n)
    found = []
    for k in range(0, max(1, n), each):
        y, g = normalised(x[k : k + each]), grad[k : k + each]
        found.append(total(y.mul_(g) if y.dtype == g.dtype else y * g).value)
    return Dense(found[0] if len(found) == 1 else torch.cat(found))


_CACHED = 1 << 17
"""Numbers (512 KiB in float32) that are normalised again at a time on a CPU."""


def _affine_last(layer: Any, normalised: Normalised, x: Tensor, grad: Tensor) -> Yields:
    """y = normalised * weight + bias over the last dimensions ``normalized_shape``."""
    size = math.prod(layer.normalized_shape)

    def total(v: Tensor) -> Dense:
        return summed(v.reshape(v.shape[0], v[:1].numel() // size, size))

    if trains(layer.weight):
        yield layer.weight, _products(normalised, x, grad, total)
    bias: Tensor | None = getattr(layer, "bias", None)
    if bias is not None and bias.requires_grad:
        yield bias, total(grad)


@register_rule(nn.LayerNorm, input_for=["weight"])
def layer_norm(layer: nn.LayerNorm, x: Tensor, grad: Tensor) -> Yields:
    """Layer normalisation, with or without bias."""
    yield from _affine_last(layer, lambda v: F.layer_norm(v, layer.normalized_shape, eps=layer.eps), x, grad)


@register_rule(nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, x: Tensor, grad: Tensor) -> Yields:
    """Root-mean-square normalisation (torch's own; subclasses and look-alikes go their own way)."""
    yield from _affine_last(layer, lambda v: F.rms_norm(v, layer.normalized_shape, eps=layer.eps), x, grad)


def _affine_channels(layer: Any, normalised: Normalised, x: Tensor, grad: Tensor) -> Yields:
    """y = normalised * weight + bias with one weight a channel: [n, c, ...]."""

    def total(v: Tensor) -> Dense:
        return summed(_channels_last(v))

    if trains(layer.weight):
        yield layer.weight, _products(normalised, x, grad, total)
    if trains(layer.bias):
        yield layer.bias, total(grad)


@register_rule(nn.GroupNorm, input_for=["weight"])
def group_norm(layer: nn.GroupNorm, x: Tensor, grad: Tensor) -> Yields:
    """Group normalisation: [n, c, ...]."""
    yield from _affine_channels(layer, lambda v: F.group_norm(v, layer.num_groups, eps=layer.eps), x, grad)


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, input_for=["weight"])
def instance_norm(layer: nn.InstanceNorm2d, x: Tensor, grad: Tensor) -> Yields:
    """Instance normalisation without running statistics: [n, c, ...]."""
    yield from _affine_channels(layer, lambda v: F.instance_norm(v, eps=layer.eps), x, grad)


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, input_for=["weight"])
def batch_norm_in_eval_mode(layer: nn.BatchNorm2d, x: Tensor, grad: Tensor) -> Yields:
    """Normalisation by constant statistics (in train mode no forward is let through): [n, c, ...]."""
    mean, var, eps = layer.running_mean, layer.running_var, layer.eps
    yield from _affine_channels(layer, lambda v: F.batch_norm(v, mean, var, eps=eps), x, grad)


@register_rule(FrozenBatchNorm, input_for=["weight"])
def frozen_batch_norm(layer: FrozenBatchNorm, x: Tensor, grad: Tensor) -> Yields:
    """Normalisation by constant statistics: [n, c, ...]."""
    yield from _affine_channels(layer, layer.normalised, x, grad)
