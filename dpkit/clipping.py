"""Clippings: from the norms of each record's gradient to the weight with which it enters the sum.

A clipping is a frozen value with ``weights(norms, max_grad_norm)`` and ``sensitivity(max_grad_norm)``. ``norms`` is
[n, k]: one column a trainable parameter tensor. It returns [n] (one weight a record) or [n, k] (one for each tensor).

A clipping that learns (`Learning`) also asks a bounded question of each record, ``observed``. The answers' sum is
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
    """A clipping that learns from a noisy sum of one answer a record: a number, or several, [n] or [n, m]."""

    def observed(self, norms: Tensor, max_grad_norm: float) -> Tensor: ...

    def noises(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]: ...

    def learned(self, max_grad_norm: float, observed: Tensor, expected_batch_size: float) -> float: ...


def learns(clipping: Clipping) -> TypeGuard[Learning]:
    """Whether a clipping is one that learns."""
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

    def learned(self, max_grad_norm: float, observed: Tensor, expected_batch_size: float) -> float:
        """The next C, from the noisy sum of the answers [1]."""
        unclipped = float(observed) / expected_batch_size + 0.5
        moved = max_grad_norm * math.exp(max(-10.0, min(10.0, -self.learning_rate * (unclipped - self.quantile))))
        return max(1e-12, min(1e12, moved))


@dataclass(frozen=True)
class HistogramClipping(FlatClipping):
    """Flat clipping that releases, beside each sum, a noisy histogram of the norms of the very records in it.

    It is what `dpkit.plots.gradient_norms` can show without telling of single records: see
    `dpkit.PrivacyEngine.norm_histogram`.

    Guarantee: sum and histogram together cost one Gaussian of the noise multiplier z that was asked for: a record adds
    1 to one count, so the sum's own noise is (z⁻² − s⁻²)^(−1/2), a little more, with s the standard deviation of each
    count's noise.

    Args:
        edges: where the counts are divided, in units of C; 1 is among them, so that the clipped ones are told apart.
        count_noise: s; by default the larger of a twentieth of the expected batch size and ten times z, at which the
            sum's noise is at most some half a percent above z.

    Raises:
        ConfigurationError: an argument out of range.
        AccountingError: (with the first σ) ``count_noise`` so small that the counts alone spend more than z allows.
    """

    edges: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    count_noise: float | None = None

    def __post_init__(self) -> None:
        edges = tuple(number("an edge", edge, low=0.0) for edge in self.edges)
        object.__setattr__(self, "edges", edges)
        if list(edges) != sorted(set(edges)) or 1.0 not in edges:
            raise ConfigurationError(
                f"edges = {edges!r}",
                why="they are multiples of C, and 1 divides the clipped records from the others.",
                cure="pass rising positive numbers with 1.0 among them.",
            )
        if self.count_noise is not None:
            number("count_noise", self.count_noise, low=0.0)

    def observed(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        """[n, m]: a one where the record's norm is; each bin holds its upper edge."""
        total = _total(norms)
        edges = torch.tensor(self.edges, dtype=torch.float64, device=total.device) * max_grad_norm
        return torch.nn.functional.one_hot(torch.bucketize(total.double(), edges), len(edges) + 1).double()

    def noises(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """(the noise multiplier of the sum, the standard deviation of each count's noise) that amount to σ."""
        if noise_multiplier == 0.0:
            return 0.0, 0.0
        count = self.count_noise
        if count is None:
            count = max(expected_batch_size / 20.0, 10.0 * noise_multiplier)
        # the adaptive count's answers are half as large, and so is the noise that costs as much
        return math.nextafter(adaptive_clipping_gradient_noise(noise_multiplier, 0.5 * count), math.inf), count

    def learned(self, max_grad_norm: float, observed: Tensor, expected_batch_size: float) -> float:
        """C stays."""
        return max_grad_norm

    def nothing(self) -> NormHistogram:
        """What was counted before the first release."""
        return NormHistogram(self.edges, (0.0,) * (len(self.edges) + 1), 0.0, 0, 0.0)


@dataclass(frozen=True)
class NormHistogram:
    """The noisy counts that `HistogramClipping` released, added up over the steps: how large gradients are beside C.

    Guarantee: covered by the run's ε, as long as ``std`` is above 0.

    Attributes:
        edges: where the counts are divided, in units of the C of their step; each bin holds its upper edge.
        counts: one more than edges; the noise may take some below 0.
        std: the standard deviation of each count's noise; 0 if any step had none.
        steps: how many releases were added up.
        expected: how many records (units) took part in them, by expectation.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    std: float
    steps: int
    expected: float

    def plus(self, counts: Tensor, std: float, expected: float) -> NormHistogram:
        """With one more release, [m] counts with noise of ``std`` each, of ``expected`` records by expectation."""
        noisy = std > 0.0 and (self.private or not self.steps)
        return NormHistogram(
            self.edges,
            tuple(a + b for a, b in zip(self.counts, counts.tolist(), strict=True)),
            math.hypot(self.std, std) if noisy else 0.0,
            self.steps + 1,
            self.expected + expected,
        )

    @property
    def private(self) -> bool:
        """Whether there is noise in all of the counts."""
        return self.std > 0.0

    @property
    def fraction_clipped(self) -> float:
        """The share of records whose gradient was longer than C, as the noisy counts have it."""
        over = math.fsum(self.counts[self.edges.index(1.0) + 1 :])
        return min(1.0, max(0.0, over / self.expected)) if self.expected else 0.0


def noises_of(clipping: Clipping, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
    """What σ is split into: the noise multiplier of the sum, and the standard deviation of what is beside it."""
    if learns(clipping):
        return clipping.noises(noise_multiplier, expected_batch_size)
    return noise_multiplier, 0.0


def refuse_excess(weights: Tensor, norms: Tensor, sensitivity: float) -> None:
    """Raise if a clipping of the user's lets a record contribute more than it says."""
    if weights.shape not in (norms.shape, norms.shape[:1]):
        raise ConfigurationError(
            f"clipping.weights gives {list(weights.shape)} for norms {list(norms.shape)}",
            why="it is not known which record has which weight.",
            cure="return one weight for each record [n], or for each record and parameter [n, k].",
        )
    lengths = _total(norms * (weights if weights.ndim == 2 else weights[:, None]))
    if not bool((lengths <= (1.0 + 1e-4) * sensitivity).all()):
        raise ConfigurationError(
            f"clipping.weights lets a record contribute {float(lengths.max()):.4g}, while sensitivity is "
            f"{sensitivity:.4g}",
            why="the noise is made for the sensitivity: a record could be told by what exceeds it.",
            cure="return weights at most sensitivity / norm, over all parameters together.",
        )


def _total(norms: Tensor) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(norms, dim=1)
    return total


def _capped(norms: Tensor, bound: float) -> Tensor:
    return (norms / bound).reciprocal_().clamp_(max=1.0)  # 1/0 is inf, and becomes 1


_BY_NAME = {
    "flat": FlatClipping,
    "automatic": AutomaticClipping,
    "per_layer": PerLayerClipping,
    "adaptive": AdaptiveClipping,
    "histogram": HistogramClipping,
}


def clipping_of(what: str | Clipping) -> Clipping:
    """A clipping from its name ("flat", "automatic", "per_layer", "adaptive", "histogram"), or the object itself."""
    if isinstance(what, str):
        made: Clipping = _BY_NAME[choice("clipping", what, tuple(_BY_NAME))]()
        return made
    if not (callable(getattr(what, "weights", None)) and callable(getattr(what, "sensitivity", None))):
        raise ConfigurationError(
            f"clipping = {what!r}",
            why="a clipping has weights(norms, max_grad_norm) and sensitivity(max_grad_norm).",
            cure=f"use one of {', '.join(_BY_NAME)}, or an object with these two methods.",
        )
    return what
