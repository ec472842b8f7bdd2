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
    """Normal numbers from a `Keystream`, on a CPU; about half of the time that torch's generator takes."""

    def __init__(self, stream: Keystream) -> None:
        self._stream = stream
        self._rooms: dict[torch.dtype, _Room] = {}

    def fill(self, flat: Tensor) -> Tensor:
        if flat.dtype not in self._rooms:
            self._rooms[flat.dtype] = _Room(flat.dtype)
        room, numbers = self._rooms[flat.dtype], flat.numpy()
        for start in range(0, len(numbers), PIECE):
            room.fill(numbers[start : start + PIECE], self._stream)
        return flat

    def state(self) -> dict[str, Any]:
        return self._stream.state()


class _Room:
    """Where the numbers of one dtype (float32 or float64) are worked on, a piece at a time."""

    def __init__(self, dtype: torch.dtype) -> None:
        kind = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self.bits = 8 * kind.itemsize
        self.bytes = room(PIECE * kind.itemsize)
        self.signed: NDArray[Any] = np.frombuffer(self.bytes, f"i{kind.itemsize}", PIECE)
        self.unsigned: NDArray[Any] = np.frombuffer(self.bytes, f"u{kind.itemsize}", PIECE)
        self.radius, self.angle = np.empty(PIECE // 2, kind), np.empty(PIECE // 2, kind)

    def fill(self, out: NDArray[Any], stream: Keystream) -> None:
        """Overwrite a piece: the cosines first, then the sines."""
        p, half = len(out), (len(out) + 1) // 2
        stream.into(self.bytes, 2 * half * self.signed.itemsize)
        radius, angle = self.radius[:half], self.angle[:half]
        np.copyto(radius, self.unsigned[:half], casting="unsafe")
        np.copyto(angle, self.signed[half : 2 * half], casting="unsafe")
        radius *= 2.0**-self.bits
        radius += 2.0 ** -(self.bits + 1)  # U in the middle of its cell, so never 0
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle *= math.pi * 2.0 ** (1 - self.bits)
        np.multiply(np.cos(angle, out=out[:half]), radius, out=out[:half])
        last = out[half:]
        np.multiply(np.sin(angle[: p - half], out=last), radius[: p - half], out=last)
