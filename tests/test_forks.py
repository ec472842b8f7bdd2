"""A forked process draws noise and records of its own: with its parent's, the difference of two releases is exact."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkit import noise
from dpkit.noise import NoiseSource
from tests.training import attach, data, mlp

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


def in_child(run: Callable[[], Any]) -> Any:
    """What ``run`` returns in a child process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(write, "wb") as out:
                pickle.dump(run(), out)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as found:
        result = pickle.load(found)
    os.waitpid(child, 0)
    return result


def drawn(source: NoiseSource, size: int = 50) -> Tensor:
    sums = torch.zeros(size)
    source.add_to([sums], 1.0)
    return sums


@pytest.mark.parametrize("encrypted", [True, False])
def test_noise_is_the_childs_own(encrypted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After numbers have been drawn, with and without AES; two children differ from each other, too."""
    if encrypted:
        pytest.importorskip("cryptography")
    monkeypatch.setattr(noise, "available", lambda: encrypted)
    source = NoiseSource()
    drawn(source)
    found = [torch.tensor(in_child(lambda: drawn(source).tolist())) for _ in range(2)] + [drawn(source)]
    for k in range(3):
        assert found[k].std() > 0.5
        assert not torch.isclose(found[k], found[k - 1]).any()


def test_noise_drawn_ahead_is_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that draws it does not live in the child, so what it had not drawn by then would be missing there."""
    monkeypatch.setattr(noise, "_PROCESSORS", 2)
    monkeypatch.setattr(noise, "_MANY", 1)
    source, size = NoiseSource(), 3_000_000
    source.prepare([torch.zeros(size)])
    child = in_child(lambda: [float(v) for v in drawn(source, size)[-5:]])
    parent = drawn(source, size)
    assert 0.99 < parent.std() < 1.01
    assert 0.0 not in child
    assert child != parent[-5:].tolist()


def test_a_seed_given_by_hand_repeats() -> None:
    """Who asked for a run that repeats has it in a child as well."""
    source = NoiseSource(torch.Generator().manual_seed(1))
    assert in_child(lambda: drawn(source).tolist()) == drawn(source).tolist()


@pytest.mark.parametrize("seeded", [True, False])
def test_who_is_drawn(seeded: bool) -> None:
    """Amplification is by a draw that no other release shares; inside a pass, too."""
    own = {"generator": torch.Generator().manual_seed(3)} if seeded else {}
    run = attach(mlp(), data(64), batch_size=8, loader=own)
    rows = iter(run.loader)
    next(rows)

    def rest() -> list[list[float]]:
        return [batch[0].flatten().tolist() for batch in rows]

    def whole() -> list[list[float]]:
        return [batch[0].flatten().tolist() for batch in run.loader]

    for served in (rest, whole):
        assert (in_child(served) == served()) == seeded
