"""Noise that is drawn ahead is the noise that would be drawn later, and nothing else can tell the difference."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from dpkit import noise
from dpkit.keystream import Keystream, available
from dpkit.noise import Ahead, NoiseSource
from dpkit.normals import Encrypted, Generated, Normals
from tests.training import attach, data, mlp, train

SIZES = (3, 20_000, 9_000, 70_000, 1, 8_191, 8_192, 40_000)


ENCRYPTED = available()


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_PROCESSORS", 2)


@pytest.fixture(autouse=True, params=["encrypted", "generated"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the package that AES comes from."""
    if request.param == "encrypted":
        pytest.importorskip("cryptography")
    monkeypatch.setattr(sys.modules[__name__], "ENCRYPTED", request.param == "encrypted")
    monkeypatch.setattr(noise, "available", lambda: request.param == "encrypted")


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(size, dtype=dtype) for size in SIZES]


def own(seed: int = 3) -> NoiseSource:
    """A source without a user's generator, in a known state."""
    source = NoiseSource()
    stream = Encrypted(Keystream(bytes([seed] * 32))) if ENCRYPTED else Generated(torch.Generator().manual_seed(seed))
    source._own[torch.device("cpu")] = stream
    return source


def test_the_same_numbers() -> None:
    """Two releases, drawn ahead or not."""
    now, ahead = own(), own()
    for _ in range(2):
        expected, found = parameters(), parameters()
        now.add_to(expected, 2.0)
        ahead.prepare(found)
        assert ahead._ahead is not None
        ahead.add_to(found, 2.0)
        assert ahead._ahead is None
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_it_is_standard_normal_and_independent() -> None:
    """Mean, variance, fourth moment, and no number twice between tensors and releases."""
    source, releases = own(), []
    for _ in range(2):
        sums = parameters()
        source.prepare(sums)
        source.add_to(sums, 1.0)
        releases.append(torch.cat(sums).double())
    z = torch.cat(releases)
    n = len(z)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(z.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((releases[0] * releases[1]).mean()) < 5 / math.sqrt(n / 2)
    assert z.unique().numel() > 0.95 * n


def test_other_parameters_than_prepared_for() -> None:
    """What was drawn is discarded, and the stream is where it was."""
    for sums in ([torch.zeros(150_000)], parameters(torch.float64)):
        expected = [torch.zeros_like(s) for s in sums]
        own().add_to(expected, 1.0)
        source = own()
        source.prepare(parameters())
        source.add_to(sums, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(expected, sums, strict=True))


def test_the_state_is_that_before() -> None:
    """Saved while numbers lie ready, the stream begins with them; loading and reseeding forget them."""
    source = own()
    before = source.state_dict()
    source.prepare(parameters())
    assert source._ahead is not None
    source._ahead.take()
    state = source.state_dict()
    assert str(state["own"]["cpu"]) == str(before["own"]["cpu"])
    expected, found = parameters(), parameters()
    source.add_to(expected, 1.0)
    other = own(99)
    other.prepare(found)
    other.load_state_dict(state)
    other.add_to(found, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    other.prepare(found)
    other.reseed()
    assert other._ahead is None


def test_never_from_the_users_generator() -> None:
    """What else is drawn from it must not depend on a thread."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    source = NoiseSource(generator)
    source.prepare(parameters())
    assert source._ahead is None
    assert torch.equal(generator.get_state(), state)
    few = own()
    few.prepare([torch.zeros(10)])
    assert few._ahead is None


def test_an_error_in_the_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not swallowed: a release without noise would be a disaster."""

    def fails(self: object, flat: Tensor) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(Encrypted, "fill", fails)
    monkeypatch.setattr(Generated, "fill", fails)
    source, sums = own(), parameters()
    source.prepare(sums)
    with pytest.raises(MemoryError, match="no room"):
        source.add_to(sums, 1.0)


def test_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of an unseeded run draws ahead, and the weights move by noise of the right size."""
    monkeypatch.setattr(noise, "_MANY", 1)
    made: list[Ahead] = []
    begin = Ahead.__init__

    def counted(self: Ahead, stream: Normals, sizes: list[int]) -> None:
        made.append(self)
        begin(self, stream, sizes)

    monkeypatch.setattr(Ahead, "__init__", counted)
    model = mlp(width=4000)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    run = attach(model, data(8), noise_multiplier=50.0, max_grad_norm=1.0)
    train(run, 3)
    assert len(made) == 3
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.std().item() == pytest.approx(50.0 / 8 * math.sqrt(3), rel=0.03)
