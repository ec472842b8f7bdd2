"""Secure noise: the law of an ideal normal number, rounded; the cryptographic stream and no other; never a stray bit.

Keys are fixed, so these tests give the same answer every time.
"""

from __future__ import annotations

import builtins
import hashlib
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import dpkit
from dpkit import noise as noise_module
from dpkit import secure
from dpkit.noise import NoiseSource
from dpkit.normals import Generated
from dpkit.secure import SecureNoise, exact_pair, grid
from dpkit.seeds import scramble, unforeseeable
from tests.test_noise import assert_normal
from tests.training import attach, data, mlp, squared_loss, weights

mpmath = pytest.importorskip("mpmath")
pytest.importorskip("cryptography")


def keys(seed: int) -> Callable[[int], bytes]:
    """A key schedule for tests: another key at each call, the same for each seed."""
    calls = iter(range(1 << 30))
    return lambda n: hashlib.sha256(f"{seed} {next(calls)}".encode()).digest()[:n]


def noise(seed: int, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    s = torch.zeros(*shape, dtype=dtype)
    SecureNoise(keys(seed)).add_to([s], std)
    return s


def oracle(u: int, v: int, offsets: list[float], scale: float, more: bytes = b"") -> tuple[int, int]:
    """What `exact_pair` is defined to be, from the same bits, by another library."""
    a, b, bits = u + 2**63, v, 64
    for k in range(0, len(more), 16):
        a = a << 64 | int.from_bytes(more[k : k + 8], "little")
        b, bits = b << 64 | int.from_bytes(more[k + 8 : k + 16], "little"), bits + 64
    with mpmath.workprec(500):
        radius = mpmath.sqrt(-2 * mpmath.log((mpmath.mpf(a) + 0.5) / mpmath.mpf(2) ** bits))
        angle = 2 * mpmath.pi * (mpmath.mpf(b) + 0.5) / mpmath.mpf(2) ** bits
        turned = [mpmath.cos(angle), mpmath.sin(angle)]
        values = [mpmath.floor(o + scale * radius * t + 0.5) for o, t in zip(offsets, turned, strict=True)]
    return int(values[0]), int(values[1])


class Bits:
    """A stream of bits from a seed, which notes what it gave."""

    def __init__(self, seed: int) -> None:
        self.inner, self.given = SecureNoise(keys(seed))._stream(), b""

    def __call__(self, n: int) -> bytearray:
        out = self.inner(n)
        self.given += bytes(out[:n])
        return out

    def continued(self) -> bytes:
        """What was given, and some of what would have followed: a decision holds however the bits go on."""
        return self.given + bytes(self.inner(48)[:48])


# --- the law ---


@pytest.mark.parametrize("std", [1.0, 0.7, 3e-4, 1e5])
def test_normal(std: float) -> None:
    """Size, mean and shape (chi-square, Kolmogorov); the grid is too fine for them to see."""
    assert_normal(noise(1, 300_000, std=std), std)


def test_tails_and_centre() -> None:
    """Beyond 4σ and in the few cells about zero there is as much mass as there should be."""
    z = noise(2, 4_000_000).abs()
    g = grid(1.0)
    for low, high in [(4.0 - g / 2, math.inf), (4.8 - g / 2, math.inf), (0.0, 2.5 * g), (0.0, 0.5 * g)]:
        expected = len(z) * 2 * (stats.norm.sf(low) - stats.norm.sf(high))
        seen = float(((z >= low) & (z < high)).sum())
        assert abs(seen - expected) <= 5 * math.sqrt(expected) + 1


def test_the_cells_have_the_normal_law() -> None:
    """On the grid itself: the counts of single cells against the exact mass between their edges, also off centre."""
    std, offset = 1.0, 0.3
    g = grid(std)
    s = torch.full((2_000_000,), offset * g, dtype=torch.float64)
    SecureNoise(keys(3)).add_to([s], std)
    cells = (s / g).round().long()
    assert torch.equal(cells * g, s)
    edges = (np.arange(-40, 41) - 0.5 - offset) * g / std
    mass = np.diff(stats.norm.cdf(edges))
    counts = np.array([int((cells == k).sum()) for k in range(-40, 40)])
    expected = len(s) * mass
    assert stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), 80) > 1e-6


def test_independent() -> None:
    """The two of a pair, neighbours, tensors, releases: correlations of values and of squares are those of chance."""
    source = SecureNoise(keys(4))
    parts = []
    for _ in range(2):
        sums = [torch.zeros(50_000), torch.zeros(70_000), torch.zeros(500)]
        source.add_to(sums, 1.0)
        parts += [s.double() for s in sums]
    n = 30_000
    streams = [parts[0][:n], parts[0][1 : n + 1], parts[1][:n], parts[3][:n], parts[4][:n]]
    pairs = 2 * secure._PAIRS  # a piece; its halves are the cosines and the sines of the same draws
    apart = [(a, b) for i, a in enumerate(streams) for b in streams[i + 1 :]]
    apart.append((parts[1][: pairs // 2], parts[1][pairs // 2 : pairs]))
    for a, b in apart:
        for f in (lambda x: x, lambda x: (x.square() - 1) / math.sqrt(2)):
            assert abs(float(f(a) @ f(b))) / math.sqrt(len(a)) < 6


def test_every_entry_of_every_tensor() -> None:
    """Odd lengths, single entries, more than a piece, other dtypes and shapes: all get noise of their own."""
    source = SecureNoise(keys(5))
    sizes = [1, 2, 3, 2 * secure._PAIRS - 1, 2 * secure._PAIRS, 2 * secure._PAIRS + 1, 5]
    sums = [torch.zeros(k, dtype=t) for k in sizes for t in (torch.float32, torch.float64)]
    source.add_to(sums, 2.0)
    everything = torch.cat([s.double() for s in sums])
    assert_normal(everything, 2.0)
    assert int((everything == 0).sum()) < 0.005 * len(everything)
    assert all(s.any() for s in sums if len(s) > 1)
    pieces = [s.double()[:1000] for s in sums if len(s) > 1000]
    assert not any(torch.equal(a, b) for k, a in enumerate(pieces) for b in pieces[k + 1 :])
    before = [s.clone() for s in sums]
    source.add_to(sums, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(sums, before, strict=True))


# --- exactness ---


word = st.integers(-(2**63), 2**63 - 1)
shift = st.floats(-0.5, 0.5)


ends = st.builds(lambda low, near: -(2**63) + near if low else 2**63 - 1 - near, st.booleans(), st.integers(0, 2**44))


@given(u=word | ends, v=word, a=shift, b=shift, scale=st.floats(1024, 2048), seed=st.integers(0, 2**20))
def test_exact_pair(u: int, v: int, a: float, b: float, scale: float, seed: int) -> None:
    """Decimal intervals against mpmath, in the middle, far out in the tails and where the radius is next to nothing."""
    bits = Bits(seed)
    found = exact_pair(u, v, [a, b], scale, bits)
    assert found == oracle(u, v, [a, b], scale, bits.continued())


def test_more_bits_are_drawn_where_they_are_needed() -> None:
    """U of 64 zero bits: beyond nine standard deviations, how far the next bits say."""
    bits = Bits(0)
    found = exact_pair(-(2**63), 1, [0.0, 0.0], 1024.0, bits)
    assert len(bits.given) == 16
    assert found == oracle(-(2**63), 1, [0.0, 0.0], 1024.0, bits.continued())
    assert found[0] > 9 * 1024


@pytest.mark.parametrize(
    ("u", "v"),
    [(12345678901234567, 1 << 61), (-(2**63) + 2**20, 0), (1234567, 1 << 62)],
    ids=["both", "the radius", "the angle"],
)
def test_bits_that_come_later_decide(u: int, v: int) -> None:
    """A sum that puts an entry on an edge as far as 64 bits tell: the bits that follow decide, one way or the other;
    bits of the radius, of the angle, or of both."""
    scale = 1024.0
    with mpmath.workprec(300):
        radius = mpmath.sqrt(-2 * mpmath.log((mpmath.mpf(u) + 2**63 + 0.5) / 2**64))
        z = scale * radius * mpmath.cos(2 * mpmath.pi * (mpmath.mpf(v) + 0.5) / 2**64)
        offset = float(mpmath.floor(z) + 0.5 - z)
    seen, asked = set(), 0
    for seed in range(40):
        bits = Bits(seed)
        found = exact_pair(u, v, [offset, 0.0], scale, bits)
        assert found == oracle(u, v, [offset, 0.0], scale, bits.continued())
        seen.add(found[0])
        asked += len(bits.given)
    assert len(seen) == 2
    assert asked > 0


def test_as_many_bits_as_it_takes() -> None:
    """V begins with 640 zero bits, and whether the entry is above the edge is told by those after them."""
    calls = iter(range(20))
    found = exact_pair(3**39, 0, [0.2, 0.5], 1024.0, lambda n: bytearray([0 if next(calls) < 9 else 255] * n))
    assert found[1] == 1
    assert next(calls) <= 12


def test_fast_and_exact_agree() -> None:
    """Where every entry is decided in decimal, the release is bit for bit the one that floating point decides."""
    s = torch.randn(600, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    fast, slow = s.clone(), s.clone()
    SecureNoise(keys(6)).add_to([fast], 1.7)
    with mock.patch.object(secure, "_DOUBT", 1.0):
        SecureNoise(keys(6)).add_to([slow], 1.7)
    assert torch.equal(fast, slow)


def release(words: Tensor, s: Tensor, std: float) -> Tensor:
    """One release from these words [2h] in place of the cipher's."""
    buffer = bytearray(words.numpy().tobytes())
    given = iter([buffer])
    out: Tensor = secure._Workspace().release(s, std, grid(std), lambda n: next(given, None) or bytearray(n))
    return out


def test_an_entry_on_the_edge_is_decided_exactly() -> None:
    """Sums that put s + Z within 1e-9 of an edge between cells, and far nearer than float64 can tell."""
    generator = torch.Generator().manual_seed(1)
    h, std = 200, 1.3
    words = torch.randint(-(2**62), 2**62, (2 * h,), generator=generator) * 2
    scale = std / grid(std)
    with mpmath.workprec(300):
        exact = []
        for j in range(2 * h):
            u, v = int(words[j % h]), int(words[h + j % h])
            radius = mpmath.sqrt(-2 * mpmath.log((mpmath.mpf(u) + 2**63 + 0.5) / 2**64))
            turn = mpmath.cos if j < h else mpmath.sin
            exact.append(scale * radius * turn(2 * mpmath.pi * (mpmath.mpf(v) + 0.5) / 2**64))
        rest = [float(mpmath.floor(z) + 0.5 - z) for z in exact]  # puts the entry on an edge, to 53 bits
        offsets = [r + (1e-9 if j % 3 == 0 else 1e-14) * (-1) ** j for j, r in enumerate(rest)]
        for j in range(0, h, 2):  # of some pairs only the one or only the other entry
            offsets[j + h * (j % 4 == 0)] = 0.25
        expected = [float(mpmath.floor(o + z + 0.5)) for o, z in zip(offsets, exact, strict=True)]
    s = torch.tensor(offsets, dtype=torch.float64) * grid(std)
    released = release(words, s, std) / grid(std)
    gap = released - torch.tensor(expected, dtype=torch.float64)
    near = torch.tensor([j % 3 == 0 for j in range(2 * h)])
    assert (gap[near] == 0).all()  # 64 bits and 1e-9 decide
    assert int((gap[~near] != 0).sum()) <= 2 * h // 100  # 1e-14: now and then only the bits after the 64 could tell


def test_words_at_the_ends_go_to_decimal() -> None:
    """U next to 0 and next to 1, where float64 has no good logarithm, by the same words."""
    tops = [2**63 - 1, 2**63 - 2**20, 2**63 - 2**43, 2**62]
    lows = [-(2**63) + 1, -(2**63) + 2**12, -(2**63) + 2**42, -(2**62)]
    us = tops + lows
    words = torch.tensor([*us, *(3**39 - k for k in range(8))], dtype=torch.int64)
    released = release(words, torch.zeros(16, dtype=torch.float64), 1.0) / grid(1.0)
    for j, u in enumerate(us):
        expected = oracle(u, int(words[8 + j]), [0.0, 0.0], 1.0 / grid(1.0))
        slack = 0 if abs(u) < 2**63 - 2**30 else 300  # the bits to come matter far out in the tail
        assert abs(released[j] - expected[0]) <= slack
        assert abs(released[8 + j] - expected[1]) <= slack
    assert released[tops.index(2**63 - 2**20)].abs() < 1e-3 / grid(1.0)


def test_the_machine_is_right_to_40_bits() -> None:
    """The assumption of the fast path: torch's float64 functions, against mpmath, wherever they are used."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(1500, generator=generator, dtype=torch.float64).mul_(1 - 2.0**-19).add_(2.0**-20)
    u[:500] = torch.exp2(-20 * torch.rand(500, generator=generator, dtype=torch.float64)).clamp_(max=1 - 2.0**-20)
    x = (u - 0.5) * 2 * math.pi
    with mpmath.workprec(120):
        for torch_function, exact, at in [
            (torch.log, mpmath.log, u),
            (torch.sqrt, mpmath.sqrt, u * 50),
        ]:
            for value, argument in zip(torch_function(at).tolist(), at.tolist(), strict=True):
                assert abs(value - exact(argument)) <= 2.0**-45 * abs(exact(argument))
        for torch_function, exact in [(torch.sin, mpmath.sin), (torch.cos, mpmath.cos)]:
            for value, argument in zip(torch_function(x).tolist(), x.tolist(), strict=True):
                assert abs(value - exact(argument)) <= 2.0**-45


# --- the floating-point attack ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_grid_is_the_same_whatever_the_sum(dtype: torch.dtype) -> None:
    """Mironov 2012: the floating-point numbers that a + noise can be are not those that b + noise can be. Here they
    are; with plain noise in the same place they are not, so this test can tell."""
    values = [0.0, 1.0, 1e-9, math.pi, -12345.678, 2.0**20 + 1 / 3]

    def on_grid(source: Any, value: float) -> float:
        s = torch.full((2000,), value, dtype=dtype)
        source.add_to([s], 1.0)
        cells = s.double() / grid(1.0)
        return float((cells == cells.round()).double().mean())

    for value in values:
        assert on_grid(SecureNoise(keys(7)), value) == 1.0
    assert on_grid(NoiseSource(), math.pi) < 1.0


def test_the_sum_is_not_rounded_before_the_noise() -> None:
    """Two sums that differ by a hundredth of a cell give releases that differ as often as they should: one in 100."""
    g, n = grid(1.0), 200_000
    a, b = torch.zeros(n, dtype=torch.float64), torch.full((n,), 0.01 * g, dtype=torch.float64)
    SecureNoise(keys(8)).add_to([a], 1.0)
    SecureNoise(keys(8)).add_to([b], 1.0)
    moved = (b - a) / g
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert abs(float(moved.sum()) - 0.01 * n) < 6 * math.sqrt(0.01 * n)


@pytest.mark.parametrize("std", [0.013, 1.0, 1.999, 2.0, 777.0])
def test_grid(std: float) -> None:
    """A power of two, a thousandth of the noise."""
    g = grid(std)
    assert math.frexp(g)[0] == 0.5
    assert 2**10 <= std / g < 2**11


def test_the_deviation_is_never_rounded_down() -> None:
    seen = []
    with mock.patch.object(secure._Workspace, "release", lambda self, s, std, *rest: seen.append(std) or s):
        SecureNoise(keys(0)).add_to([torch.zeros(3)], 1.1 * 3.3)
    assert seen[0] > 1.1 * 3.3


@pytest.mark.parametrize("std", [1e-40, 1e31, math.inf, math.nan])
def test_deviations_without_a_grid_are_refused(std: float) -> None:
    with pytest.raises(dpkit.ConfigurationError, match="secure mode"):
        SecureNoise(keys(0)).add_to([torch.zeros(3)], std)


# --- the stream ---


def test_a_key_of_its_own_for_every_release() -> None:
    """32 bytes from the operating system; nothing that was drawn is drawn again, and no state tells it."""
    asked: list[int] = []

    def entropy(n: int) -> bytes:
        asked.append(n)
        return keys(len(asked))(n)

    source = SecureNoise(entropy)
    first, second = torch.zeros(50), torch.zeros(50)
    source.add_to([first], 1.0)
    source.add_to([second], 1.0)
    assert len(asked) >= 3
    assert set(asked) == {32}
    assert not torch.equal(first, second)
    assert source.state_dict() == {"kind": "secure"}
    again = SecureNoise(keys(1))
    again.load_state_dict(source.state_dict())
    with pytest.raises(dpkit.ConfigurationError, match="without secure"):
        again.load_state_dict(NoiseSource().state_dict())
    with pytest.raises(dpkit.ConfigurationError, match="another kind"):
        NoiseSource().load_state_dict(source.state_dict())


def test_the_stream_is_aes() -> None:
    """FIPS 197's example: a zero counter block under the key 00 01 … 1f, and the bytes go on without repeating."""
    draw = SecureNoise(lambda n: bytes(range(n)))._stream()
    first, second = bytes(draw(32)[:32]), bytes(draw(32)[:32])
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    block = Cipher(algorithms.AES(bytes(range(32))), modes.ECB()).encryptor()
    assert first + second == b"".join(block.update(k.to_bytes(16, "big")) for k in range(4))


def secure_run(**options: Any) -> Any:
    engine = dpkit.PrivacyEngine(accountant="rdp", secure_mode=True)
    model = mlp()
    loader = torch.utils.data.DataLoader(data(), batch_size=4, **options.pop("loader", {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, **options)
    return engine, model, optimizer, engine._loader


def test_secure_mode_uses_none_of_torchs_generators() -> None:
    """No call of torch's normal sampler, no step of its global generator, no generator made for the noise."""
    engine, model, optimizer, loader = secure_run()
    assert engine.noise.secure
    assert not engine.noise.seeded
    before = weights(model)
    refuse = mock.Mock(side_effect=AssertionError("a generator of torch"))
    for batch in loader:
        squared_loss(model, batch).backward()
        state = torch.get_rng_state()
        with (
            mock.patch.object(torch.Tensor, "normal_", refuse),
            mock.patch.object(torch, "randn", refuse),
            mock.patch.object(torch, "Generator", refuse),
            mock.patch.object(torch.Tensor, "uniform_", refuse),
        ):
            optimizer.step()
        assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(before, weights(model))
    assert engine.get_epsilon(1e-5) > 0


def test_secure_training_releases_multiples_of_the_grid() -> None:
    """What reaches ``p.grad`` is on the grid, before it is divided by the batch size (a power of two here)."""
    _, model, optimizer, loader = secure_run()
    for batch in loader:
        squared_loss(model, batch).backward()
        optimizer.step()
        g = torch.cat([p.grad.flatten() for p in model.parameters()]).double() * 4
        cells = g / grid(1.0)
        assert torch.equal(cells, cells.round())
        assert len(cells.unique()) > 10


def test_a_seed_and_secure_mode_exclude_each_other() -> None:
    with pytest.raises(dpkit.ConfigurationError, match="noise_generator"):
        secure_run(noise_generator=torch.Generator().manual_seed(1))
    with pytest.raises(dpkit.ConfigurationError, match="generator of its own"):
        secure_run(loader={"generator": torch.Generator().manual_seed(1)})


def test_without_the_package() -> None:
    """The refusal names the extra, when the engine is made."""
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with (
        mock.patch.object(builtins, "__import__", missing),
        pytest.raises(dpkit.ConfigurationError, match=r"dpkit\[secure\]"),
    ):
        dpkit.PrivacyEngine(secure_mode=True)


# --- what the engine says about its noise, and plain noise's own seed ---


def test_a_run_says_how_its_noise_was_drawn() -> None:
    """seeded and secure are there to be read, and the sentence for the statement follows them."""
    plain = attach(mlp(), noise_multiplier=1.0).engine
    seeded = attach(mlp(), noise_multiplier=1.0, noise_generator=torch.Generator().manual_seed(0)).engine
    said = {}
    for name, engine in {"plain": plain, "seeded": seeded, "secure": secure_run()[0]}.items():
        assert (engine.noise.seeded, engine.noise.secure) == (name == "seeded", name == "secure")
        said[name] = engine.noise.describe()
    assert "seeded by hand" in said["seeded"]
    assert "in floating point" in said["plain"]
    assert "AES-256" in said["secure"]


def test_plain_noise_starts_from_more_than_32_bits() -> None:
    """torch keeps 32 bits of a CPU seed: a state that some seed gives could be found by trying them all."""

    def reachable(generator: torch.Generator) -> bool:
        words = generator.get_state()[24 : 24 + 16].view(torch.int64).tolist()
        x = words[0]
        return words[1] == (1812433253 * (x ^ (x >> 30)) + 1) % 2**32

    assert reachable(torch.Generator().manual_seed(7))  # the layout is what is thought
    assert torch.equal(
        torch.Generator().manual_seed(5).get_state()[24:], torch.Generator().manual_seed(5 + 2**32).get_state()[24:]
    )
    assert not reachable(unforeseeable())
    assert not reachable(scramble(torch.Generator().manual_seed(7)))
    with mock.patch.object(noise_module, "available", return_value=False):
        stream = NoiseSource().stream(torch.device("cpu"))
    assert isinstance(stream, Generated)
    assert not reachable(stream.generator)
    run = attach(mlp(), data(), 4)
    assert not reachable(run.loader.batch_sampler.generator)
    sample = torch.rand(200_000, generator=unforeseeable(), dtype=torch.float64)
    assert stats.kstest(sample.numpy(), "uniform").pvalue > 1e-6


def test_secure_runs_differ() -> None:
    finals = []
    for _ in range(2):
        torch.manual_seed(0)
        _, model, optimizer, loader = secure_run()
        for batch in loader:
            squared_loss(model, batch).backward()
            optimizer.step()
        finals.append(weights(model))
    assert not torch.equal(*finals)
