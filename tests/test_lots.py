"""Noise in lots: which numbers a step gets depends on no thread, none comes twice, a state goes on with the next."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkit import lots, noise
from dpkit.keystream import Keystream, available
from dpkit.lots import LOT, STEPS, Lots, size_for
from dpkit.noise import NoiseSource
from dpkit.normals import PIECE, Encrypted, Generated, Normals
from tests.test_noise import assert_normal
from tests.training import attach, data, mlp, train

SIZES = (3, 20_000, 9_000, 70_000, 1, 8_191, 8_192, 40_000)
ENCRYPTED = available()


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lots, "_PROCESSORS", 2)


@pytest.fixture(autouse=True, params=["encrypted", "generated"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the package that AES comes from."""
    if request.param == "encrypted":
        pytest.importorskip("cryptography")
    monkeypatch.setattr(sys.modules[__name__], "ENCRYPTED", request.param == "encrypted")
    monkeypatch.setattr(noise, "available", lambda: request.param == "encrypted")


def parameters(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [torch.zeros(size, dtype=dtype) for size in sizes]


def stream(seed: int = 3, together: int = 1) -> Normals:
    if ENCRYPTED:
        return Encrypted(Keystream(bytes([seed] * 32)), together)
    return Generated(torch.Generator().manual_seed(seed))


def release(source: NoiseSource, sizes: tuple[int, ...] = SIZES, std: float = 1.0) -> Tensor:
    """What one step adds."""
    sums = parameters(sizes=sizes)
    source.prepare(sums)
    source.add_to(sums, std)
    return torch.cat(sums)


def drawing(source: NoiseSource) -> bool:
    """Whether a lot is drawn for it, or lies ready."""
    return source._lots is not None and source._lots._next is not None


@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("size", [100, PIECE, 3 * PIECE + 17])
def test_the_streams_numbers_in_order(size: int, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once; what does not suffice at the end of a lot is left out. A thread changes nothing, nor do calls for many
    pieces."""
    monkeypatch.setattr(lots, "_PROCESSORS", processors)
    known = stream()
    expected = [known.fill(torch.empty(size)) for _ in range(4)]
    found = Lots(stream(together=16), size)
    for count, lot, at in (
        (size // 2, 0, 0),
        (size // 4, 0, size // 2),
        (size // 2, 1, 0),  # a quarter of the first is left
        (size, 2, 0),
        (1, 3, 0),
        (size // 3, 3, 1),
    ):
        if count % 2:
            found.prepare()
        assert torch.equal(found.take(count), expected[lot][at : at + count])


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_state_goes_on_with_the_next_number(size: int) -> None:
    """Wherever in a lot it is taken, while the next is drawn or not."""
    made = Lots(stream(), size)
    for count in (size // 3, size // 3, size // 2, size // 2, size // 5, size, size, 1):
        states = [made.state()]
        made.prepare()
        states.append(made.state())
        if made._next is not None:
            made._next.wait()
            states.append(made.state())
        expected = made.take(count).clone()
        for state in states:
            again = NoiseSource()
            again.load_state_dict({"kind": "plain", "given": None, "own": {}, "lots": state})
            assert again._lots is not None
            assert torch.equal(again._lots.take(count), expected)


def test_it_is_standard_normal_and_independent() -> None:
    """Over lots and steps, and no number twice."""
    sizes = (300_000, 17)
    releases = [release(NoiseSource(), sizes)]
    source = NoiseSource()
    releases += [release(source, sizes, 2.0) / 2.0 for _ in range(7)]  # three steps a lot
    z = torch.cat(releases)
    assert_normal(z, 1.0)
    assert z.unique().numel() > 0.9 * len(z)
    for k, a in enumerate(releases):
        for b in releases[k + 1 :]:
            assert abs(float(a.double() @ b.double())) < 6 * math.sqrt(len(a))


def test_sizes() -> None:
    """Of at most STEPS steps, and about LOT; what is as large as that has a lot of its own, if a thread draws it."""
    assert size_for(10) == STEPS * 10
    assert size_for(LOT // 3) == 3 * (LOT // 3)
    assert size_for(LOT // 2 + 1) == LOT // 2 + 1
    assert size_for(5 * LOT) == 5 * LOT


def test_one_processor_draws_a_large_models_noise_when_it_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of the model's size would gain nothing."""
    monkeypatch.setattr(lots, "_PROCESSORS", 1)
    source = NoiseSource()
    noisy = release(source, (LOT,))
    assert source._lots is None
    assert_normal(noisy, 1.0)
    release(source, (LOT // 4,))
    assert source._lots is not None


def test_a_large_models_lot_is_not_held() -> None:
    """Its memory is the step's."""
    source = NoiseSource()
    release(source, (LOT, 5))
    assert source._lots is not None
    assert source._lots._lot is None
    assert source._lots._spare is None
    assert not drawing(source)
    release(source, (100,))
    assert source._lots.size == STEPS * 100


@pytest.mark.parametrize(("dtype", "sizes"), [(torch.float64, SIZES), (torch.float32, (STEPS * sum(SIZES),))])
def test_other_parameters_than_prepared_for(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """They get noise of another stream."""
    source, sums = NoiseSource(), parameters(dtype, sizes)
    source.prepare(parameters())
    source.add_to(sums, 3.0)
    assert_normal(torch.cat(sums), 3.0)
    assert_normal(release(source), 1.0)


def test_a_count_beside_the_sums_does_not_cost_a_lot() -> None:
    """What a release adds to after its sums was not prepared for."""
    for sizes in (SIZES, (LOT,)):
        source, count = NoiseSource(), torch.zeros(1)
        release(source, sizes)
        assert source._lots is not None
        state = str(source._lots.state())
        source.add_to([count], 0.0)
        assert not count.any()
        source.add_to([count], 1.0)
        assert count.any()
        assert str(source._lots.state()) == state


def test_more_parameters_and_fewer() -> None:
    """Lots of another size go on in the stream; no number comes twice."""
    source = NoiseSource()
    counts = (50, 5_000, 50, LOT, 7, 2 * LOT, LOT // 3, 2_000)
    released = torch.cat([release(source, (count,)) for count in counts for _ in range(2)])
    assert_normal(released, 1.0)
    assert released.unique().numel() > 0.85 * len(released)


def test_loading_and_reseeding_forget_what_lies_ready() -> None:
    """After a load the run goes on as the saved one; after reseeding with what nobody has seen."""
    source, other = NoiseSource(), NoiseSource()
    release(source)
    release(other)
    state = source.state_dict()
    other.prepare(parameters())
    other.load_state_dict(state)
    assert torch.equal(release(source), release(other))
    other.load_state_dict(state)
    other.reseed()
    assert other._lots is None
    assert not torch.equal(release(source), release(other))


def test_loaded_with_a_batch_in_hand() -> None:
    """A batch is fetched before a state is loaded (Trainer): the numbers are those that the saved run goes on with."""
    source, other = NoiseSource(), NoiseSource()
    release(source)
    state = source.state_dict()
    other.prepare(parameters())
    other.load_state_dict(state)
    sums = parameters()
    other.add_to(sums, 1.0)
    assert torch.equal(torch.cat(sums), release(source))


@pytest.mark.parametrize("before", [0, 1])
def test_what_begins_later_is_the_same_after_a_load(before: int) -> None:
    """Saved when there were numbers of one kind only, prepared ones or (in an empty batch) others."""
    source, other = NoiseSource(), NoiseSource()
    if before:
        release(source)
    else:
        source.add_to(parameters(), 1.0)
    other.load_state_dict(source.state_dict())
    for some in ([source, other], [other, source]):
        sums = [parameters(), parameters()]
        for each, found in zip(some, sums, strict=True):
            each.add_to(found, 1.0)
        assert torch.equal(torch.cat(sums[0]), torch.cat(sums[1]))
        assert torch.equal(release(some[0]), release(some[1]))


def test_nothing_to_add_to() -> None:
    """Everything was frozen before the step."""
    source = NoiseSource()
    source.prepare(parameters())
    source.add_to([], 1.0)


def test_never_from_the_users_generator() -> None:
    """What else is drawn from it must not depend on a thread."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    source = NoiseSource(generator)
    source.prepare(parameters())
    assert source._lots is None
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("processors", [1, 2])
def test_an_error_in_the_thread_is_raised(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not swallowed: a release without noise would be a disaster. And what follows is not what was released before."""
    monkeypatch.setattr(lots, "_PROCESSORS", processors)
    source = NoiseSource()
    sizes = (LOT // 4 + 1,)  # three steps
    released = [release(source, sizes) for _ in range(3)]

    def fails(self: object, flat: Tensor) -> Tensor:
        raise MemoryError("no room")

    assert source._lots is not None
    if (drawn := source._lots._next) is not None:
        drawn.wait()
    source._lots._next = None
    with monkeypatch.context() as broken:
        broken.setattr(Encrypted, "fill", fails)
        broken.setattr(Generated, "fill", fails)
        sums = parameters(sizes=sizes)
        source.prepare(sums)
        with pytest.raises(MemoryError, match="no room"):
            source.add_to(sums, 1.0)
    again = NoiseSource()
    again.load_state_dict(source.state_dict())
    for later in (release(again, sizes), release(source, sizes)):
        assert not any(torch.equal(later, before) for before in released)


@pytest.mark.parametrize("size", [200_000, LOT])
def test_interrupted_while_it_waits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and the run goes on: the thread that still draws is waited for, and no other one is begun beside it."""
    known = stream()
    expected = [known.fill(torch.empty(size)) for _ in range(3)]
    found = Lots(stream(together=16), size)
    assert torch.equal(found.take(size), expected[0])
    begun, wait = [], lots._Drawing.wait

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    start = lots._Drawing.__init__

    def counted(self: lots._Drawing, *given: Any) -> None:
        begun.append(self)
        start(self, *given)

    monkeypatch.setattr(lots._Drawing, "__init__", counted)
    monkeypatch.setattr(lots._Drawing, "wait", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            found.take(size)
    state = found.state()
    monkeypatch.setattr(lots._Drawing, "wait", wait)
    assert len(begun) == 1
    assert torch.equal(found.take(size), expected[1])
    again = NoiseSource()
    again.load_state_dict({"kind": "plain", "given": None, "own": {}, "lots": state})
    assert again._lots is not None
    assert torch.equal(again._lots.take(size), expected[1])


def test_interrupted_before_it_draws() -> None:
    """Ctrl-C where nobody draws beside: the lot is somebody's already. It is drawn when it is waited for again."""
    known = stream()
    expected = known.fill(torch.empty(100))
    found = Lots(stream(), 100)
    found.prepare()
    drawing = found._next
    assert drawing is not None
    claim = drawing._claim

    class Interrupted:
        def acquire(self, blocking: bool = True) -> bool:
            claim.acquire(blocking=blocking)
            raise KeyboardInterrupt

    class Never(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert self.is_set(), "it would wait for ever"
            return True

    drawing._done = Never()
    drawing._claim = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        found.take(10)
    drawing._claim = claim
    assert torch.equal(found.take(10), expected[:10])
    assert not found._next


@pytest.mark.parametrize(("size", "processors", "begun"), [(200_000, 2, 1), (200_000, 1, 0), (1000, 2, 0)])
def test_a_thread_is_begun_where_it_pays(
    size: int, processors: int, begun: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(lots, "_PROCESSORS", processors)
    monkeypatch.setattr(lots._thread, "start_new_thread", lambda draw, given: started.append(draw))
    found = Lots(stream(), size)
    found.prepare()
    found.prepare()
    assert len(started) == begun
    assert torch.equal(found.take(size), stream().fill(torch.empty(size)))  # drawn here, if no thread came to it


@pytest.mark.parametrize("width", [40, 4000, 30_000])
def test_in_training(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unseeded run draws ahead where it pays, and the weights move by noise of the right size."""
    threads: list[int] = []
    fill = (Encrypted if ENCRYPTED else Generated).fill

    def seen(self: object, flat: Tensor) -> Tensor:
        threads.append(threading.get_ident())
        return fill(self, flat)  # type: ignore[arg-type]

    monkeypatch.setattr(Encrypted if ENCRYPTED else Generated, "fill", seen)
    model = mlp(width=width)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    run = attach(model, data(8), noise_multiplier=50.0, max_grad_norm=1.0)
    train(run, 3)
    run.engine.detach()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    expected = 50.0 / 8 * math.sqrt(3)
    assert moved.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * len(moved)))
    assert width > 1000 or set(threads) == {threading.get_ident()}  # few numbers: no thread is worth it
