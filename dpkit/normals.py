"""Standard normal numbers, many at a time: from AES-256 where its package is there, else from torch's generator.

A pair of independent normal numbers is R cos θ, R sin θ with R² = −2 ln U and θ = 2π V (Box and Muller 1958, "A Note on
the Generation of Random Normal Deviates"). U and V have 32 random bits each for float32, 64 for float64; no bit is used
twice. Rounded to the bits of a float, as every such generator's, the law has an end: |z| ≤ √(2 · 33 ln 2) = 6.76 in
float32 (torch's own: 5.77), 9.49 in float64. `dpkit.secure` has the law without an end.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .keystream import Keystream, room

PIECE = 1 << 16
"""Numbers that are drawn at a time on a CPU: what is worked on stays in its cache."""


class Normals(Protocol):
    """A stream of standard normal numbers."""

    def fill(self, flat: Tensor) -> Tensor:
        """Overwrite a flat tensor with the next numbers; returns it."""
        ...

    def state(self) -> Any:
        """Where it stands, in plain values."""
        ...


class Generated:
    """Normal numbers from a torch.Generator.

    Args:
        generator: one's own or the user's; it is advanced.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def fill(self, flat: Tensor) -> Tensor:
        for piece in flat.split(PIECE if flat.device.type == "cpu" else max(len(flat), 1)):
            piece.normal_(generator=self.generator)
        return flat

    def state(self) -> Tensor:
        return self.generator.get_state()


class Encrypted:
    """Normal numbers from a `Keystream`, on a CPU; about half of the time that torch's generator takes.

    Args:
        together: pieces in one call. It changes no number: one is best for the cache, some are for a thread that is to
            disturb the others seldom (every call into numpy asks for the interpreter's lock again).
    """

    def __init__(self, stream: Keystream, together: int = 1) -> None:
        self._stream, self._together = stream, together
        self._rooms: dict[torch.dtype, _Room] = {}

    def fill(self, flat: Tensor) -> Tensor:
        if flat.dtype not in self._rooms:
            self._rooms[flat.dtype] = _Room(flat.dtype, self._together)
        room, numbers = self._rooms[flat.dtype], flat.numpy()
        whole = len(numbers) // PIECE * PIECE
        for start in range(0, whole, self._together * PIECE):
            end = min(start + self._together * PIECE, whole)
            room.fill(numbers[start:end].reshape(-1, PIECE), self._stream)
        if whole < len(numbers):
            room.fill(numbers[None, whole:], self._stream)
        return flat

    def state(self) -> dict[str, Any]:
        return self._stream.state()


class _Room:
    """Where the numbers of one dtype (float32 or float64) are worked on, at most so many pieces at a time."""

    def __init__(self, dtype: torch.dtype, pieces: int) -> None:
        kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        most = pieces * PIECE
        self.bits = 8 * kind.itemsize
        self.bytes = room(most * kind.itemsize)
        self.signed: NDArray[Any] = np.frombuffer(self.bytes, f"i{kind.itemsize}", most)
        self.unsigned: NDArray[Any] = np.frombuffer(self.bytes, f"u{kind.itemsize}", most)
        self.radius, self.angle = np.empty(most // 2, kind), np.empty(most // 2, kind)

    def fill(self, out: NDArray[Any], stream: Keystream) -> None:
        """Overwrite pieces [b, p]; of each the cosines come first, then the sines."""
        (b, p), half = out.shape, (out.shape[1] + 1) // 2
        words = 2 * half * b
        stream.into(self.bytes, words * self.signed.itemsize)
        radius, angle = self.radius[: half * b].reshape(b, half), self.angle[: half * b].reshape(b, half)
        np.copyto(radius, self.unsigned[:words].reshape(b, -1)[:, :half], casting="unsafe")
        np.copyto(angle, self.signed[:words].reshape(b, -1)[:, half:], casting="unsafe")
        radius *= 2.0**-self.bits
        radius += 2.0 ** -(self.bits + 1)  # U in the middle of its cell, so never 0
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle *= math.pi * 2.0 ** (1 - self.bits)
        first, last = out[:, :half], out[:, half:]
        np.multiply(np.cos(angle, out=first), radius, out=first)
        np.multiply(np.sin(angle[:, : p - half], out=last), radius[:, : p - half], out=last)
