"""Bits that nobody can foretell: AES-256 in counter mode, with a key of the operating system's."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from .errors import ConfigurationError

MOST = 1 << 22
"""So many bytes can be asked for at a time."""
_ZEROS = bytes(MOST)
_BLOCK = 16


@cache
def available() -> bool:
    """Whether the package ``cryptography`` is installed."""
    return find_spec("cryptography") is not None


class Keystream:
    """A stream of bytes from a key, in blocks of 16; it can go on from any of them.

    Args:
        key: 32 bytes, by default from the operating system.
        block: the number of the next block.

    Raises:
        ConfigurationError: the package ``cryptography`` is not installed.
    """

    def __init__(self, key: bytes | None = None, block: int = 0) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise ConfigurationError(
                "noise from AES-256, and the package cryptography is not installed",
                why="the noise has to come from a cryptographic generator.",
                cure="pip install 'dpkit[secure]'.",
            ) from error
        self._key, self._block = os.urandom(32) if key is None else key, block
        counter = modes.CTR(block.to_bytes(_BLOCK, "big"))
        self._encryptor: Any = Cipher(algorithms.AES(self._key), counter).encryptor()

    def into(self, buffer: bytearray, size: int) -> bytearray:
        """Put ``size`` bytes at the buffer's beginning; it needs `room` for them. Returns it.

        What remains of the last block is thrown away.

        Raises:
            ValueError: more than `MOST` bytes.
        """
        if size > MOST:  # else the buffer's rest would keep what it held
            raise ValueError(f"{size} bytes of a stream at a time; at most {MOST}")
        blocks = -(-size // _BLOCK)
        self._block += blocks  # first: where the cipher is interrupted, a state may pass over bytes, never repeat them
        self._encryptor.update_into(memoryview(_ZEROS)[: blocks * _BLOCK], buffer)
        return buffer

    def state(self) -> dict[str, Any]:
        """Key and place, as plain values: whoever knows them can repeat all that follows and came before."""
        return {"key": torch.frombuffer(bytearray(self._key), dtype=torch.uint8), "block": self._block}

    @classmethod
    def at(cls, state: dict[str, Any]) -> Keystream:
        """The stream that goes on where ``state()`` was taken."""
        return cls(bytes(state["key"].tolist()), int(state["block"]))


def room(size: int) -> bytearray:
    """A buffer for so many bytes of a stream."""
    return bytearray(size + 2 * _BLOCK)  # the cipher asks for a block more than it fills
