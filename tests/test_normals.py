"""Normal numbers from AES-256: the cipher's own bytes, turned by Box and Muller's formula, each used once.

Keys are fixed, so these tests give the same answer every time.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dpkit import noise
from dpkit.keystream import MOST, Keystream, room
from dpkit.noise import NoiseSource
from dpkit.normals import PIECE, Encrypted, Generated
from tests.test_noise import ALARM, assert_normal

pytest.importorskip("cryptography")

DTYPES = [torch.float32, torch.float64]


def key(seed: int) -> bytes:
    return hashlib.sha256(str(seed).encode()).digest()


def drawn(seed: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return Encrypted(Keystream(key(seed))).fill(torch.empty(size, dtype=dtype))


def oracle(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """The first numbers for sizes up to a piece, in float64, from bytes that AES in another mode gives."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key(seed)), modes.ECB()).encryptor()
    half, bits = (size + 1) // 2, 64 if dtype == torch.float64 else 32
    blocks = b"".join(cipher.update(k.to_bytes(16, "big")) for k in range(-(-half * bits // 64)))
    words = np.frombuffer(blocks, f"u{bits // 8}")[: 2 * half].astype(np.float64)
    radius = np.sqrt(-2 * np.log((words[:half] + 0.5) / 2.0**bits))
    angle = 2 * math.pi * words[half:] / 2.0**bits
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, PIECE - 1, PIECE])
def test_the_formula(size: int, dtype: torch.dtype) -> None:
    """Every number, from the same bits, to its own rounding (and that of U near 1, where R is next to 0)."""
    found = drawn(5, size, dtype).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, oracle(5, size, dtype), rtol=0, atol=math.sqrt(2 * eps) if size > 1000 else 2e-5)
    assert (found - oracle(5, size, dtype)).abs().quantile(0.99) < 8 * eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_law(dtype: torch.dtype) -> None:
    """Size, mean and shape of the whole; the two of a pair, neighbours, and what lies a piece apart go together no
    more than by chance; and so their squares."""
    z = drawn(1, 6 * PIECE + 10_001, dtype)
    assert_normal(z, 1.0)
    for apart in (1, 2, PIECE // 2, PIECE):
        a, b = z[:-apart].double(), z[apart:].double()
        for x, y in ((a, b), (a.square() - 1, b.square() - 1)):
            correlation = float((x * y).mean() / (x.square().mean() * y.square().mean()).sqrt()) * len(x) ** 0.5
            assert abs(correlation) <= stats.norm.isf(ALARM / 16)


def test_the_tail() -> None:
    """As many large numbers as there should be, at four and at five standard deviations, and equally on both sides."""
    z = drawn(2, 1 << 24)
    for bound in (4.0, 5.0):
        expected = len(z) * stats.norm.sf(bound)
        for side in (z, -z):
            assert stats.poisson.ppf(ALARM, expected) <= int((side > bound).sum()) <= stats.poisson.isf(ALARM, expected)


def test_extreme_bits() -> None:
    """No word gives anything but a finite number, and none exceeds what the module says."""
    for bits, dtype, most in ((32, torch.float32, 6.77), (64, torch.float64, 9.5)):
        for word in (0, 1, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1):

            class Constant(Keystream):
                repeated = word.to_bytes(bits // 8, "little")

                def into(self, buffer: bytearray, size: int) -> bytearray:
                    buffer[:size] = self.repeated * (size // len(self.repeated))
                    return buffer

            z = Encrypted(Constant(key(0))).fill(torch.empty(10, dtype=dtype))
            assert bool(torch.isfinite(z).all())
            assert float(z.abs().max()) < most


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_goes_on(dtype: torch.dtype) -> None:
    """From a state, from bit to bit; and never over bits that were used."""
    stream = Encrypted(Keystream(key(3)))
    sizes = [1, 5, PIECE + 3, 100]
    parts, states = [], []
    for size in sizes:
        states.append(stream.state())
        parts.append(stream.fill(torch.empty(size, dtype=dtype)))
    for state, part in zip(states, parts, strict=True):
        again = Encrypted(Keystream.at(state)).fill(torch.empty(len(part), dtype=dtype))
        assert torch.equal(again, part)
    together = torch.cat(parts)
    assert len(together.unique()) > 0.98 * len(together)
    assert [state["block"] for state in states] == sorted({state["block"] for state in states})


def test_a_stream_at_any_block() -> None:
    """Its bytes are AES of the block's number, also where the number passes 64 bits; parts of blocks are not used."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    cipher = Cipher(algorithms.AES(key(4)), modes.ECB()).encryptor()
    for first in (0, 7, 2**64 - 2):
        stream, at = Keystream(key(4), first), first
        for size in (16, 5, 100, 64):
            found = bytes(stream.into(room(size), size)[:size])
            blocks = -(-size // 16)
            assert found == b"".join(cipher.update(k.to_bytes(16, "big")) for k in range(at, at + blocks))[:size]
            at += blocks
            assert stream.state()["block"] == at
    with pytest.raises(ValueError, match="at most"):
        Keystream().into(room(MOST + 1), MOST + 1)
    assert Keystream().state()["key"].tolist() != Keystream().state()["key"].tolist()
    assert len(Keystream().state()["key"]) == 32


@pytest.mark.parametrize("encrypted", [False, True])
def test_interrupted_in_the_cipher(encrypted: bool) -> None:
    """Ctrl-C as the cipher is called or returns, and the run goes on: a state taken later repeats nothing."""
    stream = Keystream(key(5))
    normals, cipher = Encrypted(stream), stream._encryptor

    def interrupted(*given: Any) -> None:
        if encrypted:
            cipher.update_into(*given)
        raise KeyboardInterrupt

    stream._encryptor = mock.Mock(update_into=interrupted)
    with pytest.raises(KeyboardInterrupt):
        normals.fill(torch.empty(1000))
    stream._encryptor = cipher
    released = normals.fill(torch.empty(1000))
    again = Encrypted(Keystream.at(normals.state())).fill(torch.empty(1000))
    assert not set(released.tolist()) & set(again.tolist())


def test_what_plain_noise_is_drawn_from() -> None:
    """AES on a CPU; a seeded run, or one without the package, from a generator of torch. Each goes on from its state,
    and a state says of itself which it is."""
    cpu = torch.device("cpu")
    assert isinstance(NoiseSource().stream(cpu), Encrypted)
    assert isinstance(NoiseSource(torch.Generator().manual_seed(1)).stream(cpu), Generated)
    with mock.patch.object(noise, "available", return_value=False):
        without = NoiseSource()
        assert isinstance(without.stream(cpu), Generated)
        assert "not a cryptographic" in without.describe()
        assert "AES" not in without.describe()
    for source in (NoiseSource(), without):
        source.add_to([torch.zeros(10)], 1.0)
        state, other = source.state_dict(), NoiseSource()
        found, again = torch.zeros(100), torch.zeros(100)
        source.add_to([found], 2.0)
        other.load_state_dict(state)
        other.add_to([again], 2.0)
        assert torch.equal(found, again)
        assert type(other.stream(cpu)) is type(source.stream(cpu))
