"""Clippings: from the norms of each record's gradient to the weight with which it enters the sum.

A clipping is a frozen value with ``weights(norms, max_grad_norm)`` and ``sensitivity(max_grad_norm)``. ``norms`` is
[n, k]: one column a trainable parameter tensor. It returns [n] (one weight a record) or [n, k] (one for each tensor).

A clipping that learns (adaptive quantiles) also has ``state_dict()`` and ``load_state_dict(state)``, plain values in
and out (tensors, numbers, strings, lists, dicts); the engine's checkpoints then hold it.

Guarantee: adding or removing one record moves the weighted sum by at most ``sensitivity`` in Euclidean norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .checks import choice, number
from .errors import ConfigurationError


class Clipping(Protocol):
    """What the engine asks of a clipping."""

    def weights(self, norms: Tensor, max_grad_norm: float) -> Tensor: ...

    def sensitivity(self, max_grad_norm: float) -> float: ...


@dataclass(frozen=True)
class FlatClipping:
    """min(1, C / ‖g‖) over all parameters together (Abadi et al. 2016, "Deep Learning with Differential Privacy")."""

    def weights(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        return _capped(_total(norms), max_grad_norm)

    def sensitivity(self, max_grad_norm: float) -> float:
        return max_grad_norm


@dataclass(frozen=True)
class AutomaticClipping:
    """C / (‖g‖ + γ): every gradient is normalised (Bu et al., "Automatic Clipping", 2022).

    Args:
        gamma: γ, the stabiliser; at ‖g‖ → 0 the weight is C / γ, and the contribution stays below C.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        number("gamma", self.gamma, low=0.0)

    def weights(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        return max_grad_norm / (_total(norms) + self.gamma)

    def sensitivity(self, max_grad_norm: float) -> float:
        return max_grad_norm


@dataclass(frozen=True)
class PerLayerClipping:
    """Each of the k trainable parameter tensors is clipped to C / √k by itself; together they stay within C."""

    def weights(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        return _capped(norms, max_grad_norm / math.sqrt(max(norms.shape[1], 1)))

    def sensitivity(self, max_grad_norm: float) -> float:
        return max_grad_norm


def _total(norms: Tensor) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(norms, dim=1)
    return total


def _capped(norms: Tensor, bound: float) -> Tensor:
    return (bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)


_BY_NAME = {"flat": FlatClipping, "automatic": AutomaticClipping, "per_layer": PerLayerClipping}


def clipping_of(what: str | Clipping) -> Clipping:
    """A clipping from its name ("flat", "automatic", "per_layer"), or the object itself."""
    if isinstance(what, str):
        made: Clipping = _BY_NAME[choice("clipping", what, tuple(_BY_NAME))]()
        return made
    if not (callable(getattr(what, "weights", None)) and callable(getattr(what, "sensitivity", None))):
        raise ConfigurationError(
            f"clipping = {what!r}",
            why="a clipping has weights(norms, max_grad_norm) and sensitivity(max_grad_norm).",
            cure='use "flat", "automatic", "per_layer" or an object with these two methods.',
        )
    return what
