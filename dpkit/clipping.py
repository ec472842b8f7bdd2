"""Clippings: from the norms of each record's gradient to the weight with which it enters the sum.

A clipping is a frozen value with ``weights(norms, max_grad_norm)`` and ``sensitivity(max_grad_norm)``. ``norms`` is
[n, k]: one column a trainable parameter tensor. It returns [n] (one weight a record) or [n, k] (one for each tensor).

A clipping that learns C (`Learning`) also asks one bounded question of each record, ``observed``. The answers' sum is
released with noise of its own, once a logical batch, and ``learned`` makes the next C of it. It keeps no state: C's
home is the engine. (A clipping with ``state_dict()`` and ``load_state_dict(state)``, plain values in and out, is held
by the engine's checkpoints.)

Guarantee: adding or removing one record moves the weighted sum by at most ``sensitivity`` in Euclidean norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from dpkit.accountants import adaptive_clipping_gradient_noise

from .checks import choice, number
from .errors import ConfigurationError


class Clipping(Protocol):
    """What the engine asks of a clipping."""

    def weights(self, norms: Tensor, max_grad_norm: float) -> Tensor: ...

    def sensitivity(self, max_grad_norm: float) -> float: ...


class Learning(Clipping, Protocol):
    """A clipping that learns C from a noisy sum of one answer a record, each within ±1/2."""

    def observed(self, norms: Tensor, max_grad_norm: float) -> Tensor: ...

    def noises(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]: ...

    def learned(self, max_grad_norm: float, observed: float, expected_batch_size: float) -> float: ...


def learns(clipping: Clipping) -> TypeGuard[Learning]:
    """Whether a clipping is one that learns C."""
    return all(hasattr(clipping, name) for name in ("observed", "noises", "learned"))


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


@dataclass(frozen=True)
class AdaptiveClipping(FlatClipping):
    """Flat clipping whose C follows a quantile of the norms (Andrew, Thakkar, McMahan and Ramaswamy 2021,
    "Differentially Private Learning with Adaptive Clipping").

    Once a logical batch, from the very records that its sum is of, the fraction b̃ of unclipped ones is released with
    noise, and C is multiplied by exp(−η (b̃ − γ)). A record moves the count by 1/2: each adds +1/2 or −1/2 to it.

    Guarantee: sum and count together cost one Gaussian of the noise multiplier z that was asked for. The sum's own is
    (z⁻² − (2 s)⁻²)^(−1/2), a little more, with s the count's standard deviation.

    Args:
        quantile: γ, the fraction of records that shall be left unclipped.
        learning_rate: η; a large one follows quickly, and follows the noise.
        count_noise: s; by default the larger of a twentieth of the expected batch size and five times z, at which the
            sum's noise is at most half a percent above z.

    Raises:
        ConfigurationError: an argument out of range.
        AccountingError: (with the first σ) ``count_noise`` so small that the counts alone spend more than z allows.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        number("quantile", self.quantile, low=0.0, high=1.0)
        number("learning_rate", self.learning_rate, low=0.0)
        if self.count_noise is not None:
            number("count_noise", self.count_noise, low=0.0)

    def observed(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        """[n]: 1/2 for a record that is not clipped, −1/2 for one that is."""
        return (_total(norms) <= max_grad_norm).double() - 0.5

    def noises(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """(the noise multiplier of the sum, the standard deviation of the count's noise) that amount to σ."""
        if noise_multiplier == 0.0:
            return 0.0, 0.0
        count = self.count_noise
        if count is None:
            count = max(expected_batch_size / 20.0, 5.0 * noise_multiplier)
        return math.nextafter(adaptive_clipping_gradient_noise(noise_multiplier, count), math.inf), count

    def learned(self, max_grad_norm: float, observed: float, expected_batch_size: float) -> float:
        """The next C, from the noisy sum of the answers."""
        unclipped = observed / expected_batch_size + 0.5
        moved = max_grad_norm * math.exp(max(-10.0, min(10.0, -self.learning_rate * (unclipped - self.quantile))))
        return max(1e-12, min(1e12, moved))


def noises_of(clipping: Clipping, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
    """What σ is split into: the noise multiplier of the sum, and the standard deviation of the count beside it."""
    if learns(clipping):
        return clipping.noises(noise_multiplier, expected_batch_size)
    return noise_multiplier, 0.0


def _total(norms: Tensor) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(norms, dim=1)
    return total


def _capped(norms: Tensor, bound: float) -> Tensor:
    return (bound / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)


_BY_NAME = {
    "flat": FlatClipping,
    "automatic": AutomaticClipping,
    "per_layer": PerLayerClipping,
    "adaptive": AdaptiveClipping,
}


def clipping_of(what: str | Clipping) -> Clipping:
    """A clipping from its name ("flat", "automatic", "per_layer", "adaptive"), or the object itself."""
    if isinstance(what, str):
        made: Clipping = _BY_NAME[choice("clipping", what, tuple(_BY_NAME))]()
        return made
    if not (callable(getattr(what, "weights", None)) and callable(getattr(what, "sensitivity", None))):
        raise ConfigurationError(
            f"clipping = {what!r}",
            why="a clipping has weights(norms, max_grad_norm) and sensitivity(max_grad_norm).",
            cure='use "flat", "automatic", "per_layer", "adaptive" or an object with these two methods.',
        )
    return what
