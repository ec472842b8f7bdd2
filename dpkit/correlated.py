"""Noise that is correlated from step to step: what one step adds, the next ones take back in part.

The matrix mechanism: with x the clipped sums [t, p] and z independent noise, C⁻¹(C x + z) = x + C⁻¹z is released, for a
lower triangular C. Its noise is small in the sums over steps, which training moves along, while what it costs is what
C x + z costs: Gaussian noise on a query in which each participation of a record appears as a column of C.

Here C is a Toeplitz matrix: one column c₀, c₁, ..., shifted down by one from step to step, with Σ c² = 1. Then
e = C⁻¹z comes as a stream, eₜ = (zₜ − c₁ eₜ₋₁ − c₂ eₜ₋₂ − ...) / c₀, from a few buffers of the gradient's size.

Adaptive choice of x by what was released before costs nothing more (Denisov, McMahan, Rush, Smith and Thakurta 2022,
"Improved Differential Privacy for SGD via Optimal Private Linear Operators on Adaptive Streams").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from .checks import count
from .errors import ConfigurationError
from .noise import Source


class Correlation(Protocol):
    """The matrix C, by its first column, and how the noise of past steps is remembered.

    Attributes:
        first: c₀.
        weights: with which the buffers enter: Σ weights · buffers = c₁ eₜ₋₁ + c₂ eₜ₋₂ + ...
    """

    @property
    def first(self) -> float: ...

    @property
    def weights(self) -> tuple[float, ...]: ...

    def push(self, buffers: list[Tensor], e: Tensor) -> None: ...

    def inner(self, apart: int) -> float: ...


@dataclass(frozen=True)
class BandedNoise:
    """C with ``bands`` diagonals: a participation is felt in that many steps and no further.

    Source: Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization: A unified approach to private
    training".

    The column is the square root's of the matrix of all ones below the diagonal, cut off and normalised: c_k ∝ 1, 1/2,
    3/8, ... (Kalinin and Lampert 2024, "Banded Square Root Matrix Factorization for Differentially Private Model
    Training").

    With Poisson sampling the records are split at random into as many groups as there are bands, and the groups take
    turns (see `dpkit.paced.CyclicPoisson`): the costs are those of one Poisson step in ``bands`` steps, at a rate that
    is as many times higher. With fixed batches a pass costs what it costs with independent noise.

    Args:
        bands: b; the memory is b − 1 times the gradient. 1 is independent noise.
    """

    bands: int

    def __post_init__(self) -> None:
        count("bands", self.bands)

    @cached_property
    def column(self) -> tuple[float, ...]:
        """c₀, ..., c_{b−1}."""
        raw = [1.0]
        for k in range(1, self.bands):
            raw.append(raw[-1] * (1.0 - 0.5 / k))
        length = math.sqrt(math.fsum(c * c for c in raw))
        return tuple(c / length for c in raw)

    @property
    def first(self) -> float:
        return self.column[0]

    @property
    def weights(self) -> tuple[float, ...]:
        return self.column[1:]

    def push(self, buffers: list[Tensor], e: Tensor) -> None:
        """buffers[k] is the noise of k + 1 steps ago; the oldest is overwritten."""
        if buffers:
            buffers.insert(0, buffers.pop().copy_(e))

    def inner(self, apart: int) -> float:
        """The inner product of two columns that begin ``apart`` steps apart: zero from b on."""
        c = self.column
        return 1.0 if apart == 0 else math.fsum(a * b for a, b in zip(c, c[apart:], strict=False))


@dataclass(frozen=True)
class BufferedNoise:
    """C whose column is a sum of geometric series, c_t = Σ ω θᵗ: a buffered linear Toeplitz matrix, BLT (Dvijotham,
    McMahan, Pillutla, Steinke and Thakurta 2024, "Efficient and Near-Optimal Noise Generation for Streaming
    Differential Privacy").

    The series are nodes of a quadrature of (2/π) ∫ cos²ᵗ(y) dy over [0, π/2], the square root's column.

    For fixed batches in a fixed order only: no amplification by sampling is known for it.

    Args:
        buffers: how many series; the memory is that many times the gradient.
        horizon: the number of steps that the column is shaped for. More are no less private.
    """

    buffers: int = 6
    horizon: int = 10_000

    def __post_init__(self) -> None:
        count("buffers", self.buffers)
        count("horizon", self.horizon)

    @cached_property
    def series(self) -> tuple[tuple[float, float], ...]:
        """(ω, θ) of each."""
        low = min(0.5, 1.0 / math.sqrt(self.horizon))
        step = math.log(1.4 / low) / max(1, self.buffers - 1)
        angles = [1.4 * math.exp(-k * step) for k in range(self.buffers)]
        raw = [(y, math.cos(y) ** 2) for y in angles]
        square = math.fsum(w * v / (1.0 - s * t) for w, s in raw for v, t in raw)
        return tuple((w / math.sqrt(square), t) for w, t in raw)

    @property
    def first(self) -> float:
        return math.fsum(w for w, _ in self.series)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(w for w, _ in self.series)

    def push(self, buffers: list[Tensor], e: Tensor) -> None:
        """buffers[i] is Σ θᵢ^j e_{t−j} over j ≥ 1."""
        for buffer, (_, ratio) in zip(buffers, self.series, strict=True):
            buffer.add_(e).mul_(ratio)

    def inner(self, apart: int) -> float:
        """The inner product of two columns that begin ``apart`` steps apart, in an endless run."""
        return math.fsum(w * v * t**apart / (1.0 - s * t) for w, s in self.series for v, t in self.series)


class Correlated:
    """A `dpkit.noise.Source` that makes another one's noise correlated.

    Guarantee: what is added over the steps is C⁻¹z with z of the standard deviation that was asked for, each in units
    of its own step's; z is the source's, exactly rounded where the source is secure: the query C x is what it is added
    to. The deviation may change with C_clip from step to step, not σ.

    Args:
        correlation: C.
        source: where z comes from.
    """

    def __init__(self, correlation: Correlation, source: Source) -> None:
        self.correlation, self.source = correlation, source
        self._sizes: list[int] = []
        self._buffers: list[list[Tensor]] = []  # one list a tensor; in units of the standard deviation

    @property
    def seeded(self) -> bool:
        """Whether the source is."""
        return self.source.seeded

    @property
    def secure(self) -> bool:
        """Whether the source is."""
        return self.source.secure

    def describe(self) -> str:
        """One sentence more for the statement."""
        return f"{self.source.describe()} It is correlated from step to step by {self.correlation!r}."

    def restart(self) -> None:
        """Forget the past: from here on it is another mechanism, whose cost comes on top."""
        self._sizes, self._buffers = [], []

    def reseed(self) -> None:
        """Fresh streams, and another mechanism."""
        self.source.reseed()
        self.restart()

    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Nothing is drawn ahead: how many numbers a step asks for depends on the correlation."""

    def add_to(self, sums: Sequence[Tensor], std: float) -> None:
        """Add this step's correlated noise to flat float32 or float64 tensors, in place.

        Raises:
            ConfigurationError: the tensors' sizes are not those of the step before.
        """
        if std == 0.0:
            return
        sizes = [s.numel() for s in sums]
        if not self._sizes:
            self._sizes = sizes
            self._buffers = [[torch.zeros_like(s) for _ in self.correlation.weights] for s in sums]
        if sizes != self._sizes:
            raise ConfigurationError(
                "the trainable parameters changed under correlated noise",
                why="the noise of a step takes back that of the steps before, entry by entry.",
                cure="keep the trainable parameters the same, or use independent noise (noise=None).",
            )
        first, weights = self.correlation.first, self.correlation.weights
        queries = []
        for s, buffers in zip(sums, self._buffers, strict=True):
            buffers[:] = [b.to(s.device) for b in buffers]  # a checkpoint gives them back on the CPU
            query = s * first
            for weight, buffer in zip(weights, buffers, strict=True):
                query.sub_(buffer, alpha=std * weight)
            queries.append(query)
        self.source.add_to(queries, std)
        for s, query, buffers in zip(sums, queries, self._buffers, strict=True):
            released = query.div_(first)
            self.correlation.push(buffers, (released - s).div_(std))
            s.copy_(released)

    def state_dict(self) -> dict[str, Any]:
        """The source's state, and the noise that is still to be taken back: as confidential as the data."""
        return {
            "kind": "correlated",
            "source": self.source.state_dict(),
            "buffers": [[b.clone() for b in buffers] for buffers in self._buffers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigurationError: the state is of independent noise, or of another matrix.
        """
        held = state.get("buffers")
        if state["kind"] != "correlated" or any(len(b) != len(self.correlation.weights) for b in held or []):
            raise ConfigurationError(
                "the stored state is of another kind of noise than this engine's",
                why="the noise of the steps before would not be taken back.",
                cure="resume with the noise that the run was started with.",
            )
        self.source.load_state_dict(state["source"])
        self._buffers = [[b.clone() for b in buffers] for buffers in held or []]
        self._sizes = [buffers[0].numel() for buffers in self._buffers] if self.correlation.weights else []
