"""Noise from a cryptographic generator, rounded as if it had been added in real arithmetic.

The release of a sum s is the nearest multiple, entry by entry, of a power of two g < std / 1000 to s + Z, where Z is
N(0, std²) *exactly*: an infinitely precise normal number, of which as many bits are drawn as the rounding asks for.

Guarantee: what leaves is a function (rounding) of what the ideal Gaussian mechanism s + Z gives, whatever s is. So the
event of the ideal mechanism is the event of this one, in any dimension, under any sampling, without a term for the
grid. Which floating-point numbers can occur, and their last bits, tell nothing (the attack of Mironov, "On Significance
of the Least Significant Bits for Differential Privacy", 2012): the grid is the same for all data.

It is proven as far as these hold:

- AES-256 in counter mode, with a key of the operating system's, cannot be told from random bits (the key of a release
  is forgotten after it);
- the machine's logarithm, root, sine and cosine are right to 40 of their 53 bits: where that would not decide the
  rounding (one entry in 2^19, the tails and the centre apart), it is decided in decimal arithmetic of any precision.

Not covered: the sensitivity of the sum s itself. Gradients, norms and sums are computed in floating point, and rounding
may let a record move s by a little more than C: the tests hold it to C (1 + 1e-5) for small batches, and for n records
whose gradients all point one way the rounding of a float32 sum alone is of the order of n · 2⁻²⁴ C.

Nor who is drawn: that is left to torch's generator, in a state drawn from the operating system, whose output nobody
sees. Nor how long a release takes, or what else a machine lets be seen: Jin et al. 2022, "Are We There Yet? Timing and
Floating-Point Attacks on Differential Privacy Systems".
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError
from .keystream import Keystream, room

_PAIRS = 1 << 13  # pairs of normal numbers drawn at a time: what is worked on stays in the processor's cache
_DOUBT = 2.0**-20  # in units of g; the error of the float64 value is below 2^-26, and 2^-20 leaves 6 bits for bad luck
_MARGIN = 2.0**-20  # nearer to 0 and 1, the logarithm loses too many bits


class SecureNoise:
    """Gaussian noise from AES-256 in counter mode, safe against attacks on floating point.

    Args:
        entropy: where keys come from, a function from a number of bytes to so many bytes. For tests; by default
            the operating system.

    Raises:
        ConfigurationError: the package ``cryptography`` is not installed.
    """

    seeded = False
    secure = True

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy, self._workspace = entropy, _Workspace()
        self._stream()  # raises where the cipher is missing

    def describe(self) -> str:
        """One sentence for the statement."""
        return (
            "Noise is drawn from AES-256 in counter mode with keys of the operating system, and rounded to a grid as "
            "if it had been added in exact arithmetic."
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing that tells the noise: a resumed run draws new keys."""
        return {"kind": "secure"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Checks that the state is of secure noise; there is nothing to restore."""
        if state.get("kind") != "secure":
            raise ConfigurationError(
                "the checkpoint is of a run without secure noise, and this engine has secure_mode=True",
                why="the steps before it were not drawn as the statement of this run would say.",
                cure="resume with PrivacyEngine(secure_mode=False), or start anew.",
            )

    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Nothing is drawn ahead: a release's key and noise exist while it is made."""

    def reseed(self) -> None:
        """Nothing to do: every release has a key of its own."""

    def add_to(self, sums: Sequence[Tensor], std: float) -> None:
        """Add independent N(0, std²) to every entry of flat float32 or float64 tensors, in place, rounded to the grid.

        Raises:
            ConfigurationError: a standard deviation that floating point cannot hold a grid for.
        """
        if std == 0.0:
            return
        if not 1e-30 < std < 1e30:
            raise ConfigurationError(
                f"noise of standard deviation {std:g} in secure mode",
                why="its grid would leave the range of float32.",
                cure="choose max_grad_norm · noise_multiplier between 1e-30 and 1e30.",
            )
        draw = self._stream()
        std = math.nextafter(std, math.inf)  # σ · C was itself rounded
        spacing = grid(std)
        small: list[Tensor] = []
        for s in sums:
            if s.numel() < _PAIRS:
                small.append(s.view(-1))
                continue
            for piece in s.view(-1).split(2 * _PAIRS):
                piece.copy_(self._workspace.release(piece, std, spacing, draw))
        if small:  # together: a release of few entries costs as much as one of a thousand
            joined = torch.cat([s.to("cpu", torch.float64) for s in small])
            for piece in joined.split(2 * _PAIRS):
                piece.copy_(self._workspace.release(piece, std, spacing, draw))
            for s, noisy in zip(small, joined.split([len(s) for s in small]), strict=True):
                s.copy_(noisy)

    def _stream(self) -> Callable[[int], bytearray]:
        """A fresh key's stream: from a number of bytes (of `keystream.MOST`) to a buffer that begins with so many."""
        stream = Keystream(self._entropy(32))

        def draw(n: int) -> bytearray:
            return stream.into(room(n), n)

        return draw


def grid(std: float) -> float:
    """The spacing of the grid: the power of two in (std / 2^11, std / 2^10]."""
    return 2.0 ** (math.frexp(std)[1] - 11)


class _Workspace:
    """Room for one piece, so that none has to be found for each: on a processor that costs as much as the noise."""

    def __init__(self) -> None:
        # out of step by 1 KiB: where addresses agree in their lowest 12 bits, a load waits for the store before it
        room = torch.empty(4, 2 * _PAIRS + 128, dtype=torch.float64)
        self.uniform, self.noise, self.where, self.cells = room[:, : 2 * _PAIRS]

    def release(self, s: Tensor, std: float, spacing: float, draw: Callable[[int], bytearray]) -> Tensor:
        """The multiples of ``spacing`` nearest to s + Z for a short flat tensor s [p]; Z is exactly N(0, std²).

        Normal numbers come in pairs (Box and Muller 1958): R cos θ and R sin θ with R² = −2 ln U and θ = 2π V.
        """
        p, half = len(s), (len(s) + 1) // 2
        scale = std / spacing  # exact: the spacing is a power of two
        words = torch.frombuffer(draw(16 * half), dtype=torch.int64, count=2 * half)
        uniform, noise = self.uniform[: 2 * half].copy_(words), self.noise[: 2 * half]
        theta = uniform[half:].mul_(2.0 * math.pi * 2.0**-64)
        u = uniform[:half].mul_(2.0**-64)
        unsure = torch.abs(u, out=noise[:half]) > 0.5 - _MARGIN
        radius = u.add_(0.5).clamp_(_MARGIN, 1.0 - _MARGIN).log_().mul_(-2.0 * scale * scale).sqrt_()
        torch.cos(theta, out=noise[:half]).mul_(radius)
        torch.sin(theta, out=noise[half:]).mul_(radius)
        where, cells = self.where[:p].copy_(s).mul_(1.0 / spacing), self.cells[:p]  # exact, as is what follows
        rest = where.sub_(torch.round(where, out=cells))
        noise[:p].add_(rest)
        moved = torch.round(noise, out=uniform)
        edge = noise.sub_(moved).abs_() > 0.5 - _DOUBT
        unsure.logical_or_(edge[:half]).logical_or_(edge[half:])
        for k in unsure.nonzero().flatten().tolist():
            offsets = [float(rest[j]) if j < p else 0.0 for j in (k, k + half)]
            moved[k], moved[k + half] = exact_pair(int(words[k]), int(words[k + half]), offsets, scale, draw)
        released: Tensor = cells.add_(moved[:p]).mul_(spacing)
        return released


def exact_pair(
    u: int, v: int, offsets: Sequence[float], scale: float, draw: Callable[[int], bytearray]
) -> tuple[int, int]:
    """The integers nearest to offset + scale · R cos θ and to offset + scale · R sin θ, decided without rounding error.

    Args:
        u, v: the first 64 bits of U − 1/2 and of V, as signed integers; the bits after them are drawn as needed.
    """
    a, b, bits, digits = u + (1 << 63), v, 64, 50
    while True:
        found = _nearest(a, b, bits, digits, offsets, scale) if a else None
        if found is not None:
            return found
        more = draw(16)
        a = a << 64 | int.from_bytes(more[:8], "little")
        b = b << 64 | int.from_bytes(more[8:16], "little")
        bits, digits = bits + 64, digits + 20


def _nearest(a: int, b: int, bits: int, digits: int, offsets: Sequence[float], scale: float) -> tuple[int, int] | None:
    """What `exact_pair` looks for, if it is the same for all U in [a, a + 1] / 2^bits and V in [b, b + 1] / 2^bits.

    Decimal's operations are right to their last digit (logarithm and root included); ``slack`` covers all of them.
    """
    with localcontext() as context:
        context.prec = digits
        unit, slack = Decimal(2) ** -bits, Decimal(10) ** (12 - digits)
        low = max(-2 * ((a + 1) * unit).ln() - slack, Decimal(0)).sqrt()
        high = (-2 * (a * unit).ln() + slack).sqrt()
        turn = 2 * _pi(digits)
        theta, width = turn * (Decimal(b) + Decimal("0.5")) * unit, turn * unit
        found = []
        for value, offset in zip(_cos_sin(theta, digits), offsets, strict=True):
            centre = Decimal(offset) + Decimal(scale) * (low + high) / 2 * value + Decimal("0.5")
            radius = Decimal(scale) * ((high - low) / 2 * abs(value) + high * width + slack)
            ends = {math.floor(centre - radius), math.floor(centre + radius)}
            if len(ends) > 1:
                return None
            found.append(ends.pop())
        return found[0], found[1]


def _cos_sin(x: Decimal, digits: int) -> tuple[Decimal, Decimal]:
    """cos x and sin x for |x| ≤ π by their series, in a context of so many digits."""
    sums, term, k = [Decimal(0), Decimal(0)], Decimal(1), 0
    while abs(term) > Decimal(10) ** -digits:
        sums[k % 2] += term if k % 4 < 2 else -term
        k += 1
        term = term * x / k
    return sums[0], sums[1]


@lru_cache
def _pi(digits: int) -> Decimal:
    """π to ``digits`` digits by Machin's formula, 16 arctan(1/5) − 4 arctan(1/239)."""
    one = 10 ** (digits + 10)

    def arctan(n: int) -> int:
        total, power, k, sign = 0, one // n, 1, 1
        while power:
            total += sign * (power // k)
            power, k, sign = power // (n * n), k + 2, -sign
        return total

    with localcontext() as context:
        context.prec = digits + 10
        pi: Decimal = Decimal(16 * arctan(5) - 4 * arctan(239)) / one
    return pi
