"""Generators that nobody can foretell."""

from __future__ import annotations

import os
import secrets

import torch

_WORDS, _OFFSET, _SIZE = 624, 24, 5056  # of a CPU generator's state: the twister's words, each in 8 bytes


def unforeseeable(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of torch in a state drawn from the operating system."""
    return scramble(torch.Generator(device))


def scramble(generator: torch.Generator) -> torch.Generator:
    """Put a generator into a state drawn from the operating system, in place.

    ``manual_seed`` of a CPU generator keeps the seed's lowest 32 bits only: the streams that it can start are so few
    that all of them can be tried. Here the whole state of the Mersenne twister is drawn. That is not a cryptographic
    generator either (see `dpkit.secure`): who sees a few thousand of its draws bit for bit can tell the next ones.
    """
    generator.manual_seed(secrets.randbits(63))
    state = generator.get_state()
    if generator.device.type == "cpu" and state.numel() == _SIZE:
        words = torch.frombuffer(bytearray(os.urandom(4 * _WORDS)), dtype=torch.uint8).view(_WORDS, 4)
        state[_OFFSET : _OFFSET + 8 * _WORDS].view(_WORDS, 8)[:, :4] = words
        generator.set_state(state)
    return generator
