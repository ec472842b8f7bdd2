"""Files that were cut or changed: a clear error, or everything that was counted; never less, never another state."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dpkit
from dpkit import checkpoint as files
from dpkit.ledger import Ledger
from tests.lives import begin

Damage = Iterator[tuple[str, bytes]]


def cuts(data: bytes, some: int | None) -> Damage:
    """Truncated at every byte, or at some."""
    every = range(len(data))
    for k in every if some is None else random.Random(0).sample(every, some):
        yield "cut", data[:k]


def flips(data: bytes, some: int) -> Damage:
    """Random single bits changed."""
    for bit in random.Random(1).sample(range(8 * len(data)), min(some, 8 * len(data))):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield "bit flip", bytes(changed)


def strikes(data: bytes, some: int) -> Damage:
    """Random blocks zeroed or overwritten, or put in twice."""
    chance = random.Random(2)
    for _ in range(some):
        start, size = chance.randrange(len(data)), chance.randrange(1, 600)
        block = data[start : start + size]
        yield "block zeroed", data[:start] + bytes(len(block)) + data[start + size :]
        yield "block overwritten", data[:start] + chance.randbytes(len(block)) + data[start + size :]
        yield "block doubled", data[:start] + block + data[start:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The checkpoint and the ledger of a run of seven releases, saved after the fifth."""
    folder = tmp_path_factory.mktemp("written")
    begin(ledger=folder / "l").train(lambda life: (life.steps == 5 and life.save(folder / "c")) or life.steps == 7)
    return (folder / "c").read_bytes(), (folder / "l").read_bytes()


def checkpoints(data: bytes, damage: Damage, path: Path) -> Counter[tuple[str, str]]:
    told: Counter[tuple[str, str]] = Counter()
    for kind, damaged in damage:
        if damaged == data:
            continue
        path.write_bytes(damaged)
        try:
            files.load(path)
            told[kind, "read as something else"] += 1
        except dpkit.CheckpointError as error:
            told[kind, "refused" if error.why and error.cure else "refused without a word"] += 1
        assert path.read_bytes() == damaged
    return told


def ledgers(data: bytes, damage: Damage, path: Path) -> Counter[tuple[str, str]]:
    """Readers and writers; what a cut leaves is counted to the last whole line."""
    told: Counter[tuple[str, str]] = Counter()
    for kind, damaged in damage:
        if damaged == data:
            continue
        whole = sum(b'"release"' in line and b'"check":"' in line for line in damaged.split(b"\n"))
        for adjacency in (None, "add_or_remove_one"):
            path.write_bytes(damaged)
            try:
                held = Ledger(path, adjacency)
                found = sum(len(run.releases) for run in held.runs.values())
                if found == 7:
                    told[kind, "read, all seven counted"] += 1
                else:
                    # a cut is a crash's: what is whole is counted; anything else must have been noticed
                    right = found == whole and data.startswith(damaged)
                    told[kind, "read up to the cut" if right else "undercounted"] += 1
                held.close()
            except dpkit.LedgerError as error:
                told[kind, "refused" if error.why and error.cure else "refused without a word"] += 1
                assert path.read_bytes() == damaged  # nothing is lost
    return told


def sound(told: Counter[tuple[str, str]]) -> bool:
    good = ("refused", "read, all seven counted", "read up to the cut")
    return sum(told.values()) > 0 and all(outcome in good for _, outcome in told)


def test_damaged_checkpoints(written: tuple[bytes, bytes], tmp_path: Path) -> None:
    data, _ = written
    for damage in (cuts(data, 200), cuts(data[:200], None), flips(data, 200), strikes(data, 30)):
        assert sound(checkpoints(data, damage, tmp_path / "c"))


def test_a_damaged_checkpoint_changes_nothing(written: tuple[bytes, bytes], tmp_path: Path) -> None:
    """Refused as a whole: the engine, the model and the generators are as they were."""
    data, ledger = written
    (tmp_path / "l").write_bytes(ledger)
    life = begin(ledger=tmp_path / "l")
    before, chance = life.weights(), torch.get_rng_state()
    for _, damaged in (*cuts(data, 5), *flips(data, 5)):
        (tmp_path / "c").write_bytes(damaged)
        with pytest.raises(dpkit.CheckpointError):
            life.load(tmp_path / "c")
    assert torch.equal(life.weights(), before)
    assert torch.equal(torch.get_rng_state(), chance)
    (tmp_path / "c").write_bytes(data)
    life.load(tmp_path / "c")
    assert life.steps == 5


def test_damaged_ledgers(written: tuple[bytes, bytes], tmp_path: Path) -> None:
    _, data = written
    for damage in (cuts(data, 200), flips(data, 300), strikes(data, 30)):
        assert sound(ledgers(data, damage, tmp_path / "l"))


def test_a_ledger_that_lost_lines_does_not_match(written: tuple[bytes, bytes], tmp_path: Path) -> None:
    """A cut at a line's end looks like a younger ledger: the checkpoint, which knows of five releases, tells."""
    data, ledger = written
    lines = ledger.splitlines(keepends=True)
    (tmp_path / "c").write_bytes(data)
    for keep in range(len(lines) + 1):
        (tmp_path / "l").write_bytes(b"".join(lines[:keep]))
        life = begin(ledger=tmp_path / "l")
        if keep < 7:  # a header, the run, five releases
            with pytest.raises(dpkit.LedgerError):
                life.load(tmp_path / "c")
        else:
            life.load(tmp_path / "c")
            assert sum(n for _, n in life.engine.accountant.ledger) == keep - 2


@pytest.mark.slow
def test_every_damage(written: tuple[bytes, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both files cut at every byte, every bit of the ledger and 20,000 of the checkpoint flipped, blocks struck."""
    checkpoint, ledger = written
    tables = {"checkpoint": Counter[tuple[str, str]](), "ledger": Counter[tuple[str, str]]()}
    for damage in (cuts(checkpoint, None), flips(checkpoint, 20_000), strikes(checkpoint, 500)):
        tables["checkpoint"] += checkpoints(checkpoint, damage, tmp_path / "c")
    for damage in (cuts(ledger, None), flips(ledger, 8 * len(ledger)), strikes(ledger, 500)):
        tables["ledger"] += ledgers(ledger, damage, tmp_path / "l")
    with capsys.disabled():
        print("\n| file | damage | outcome | times |\n|---|---|---|---|")
        for file, told in tables.items():
            for (kind, outcome), times in sorted(told.items()):
                print(f"| {file} | {kind} | {outcome} | {times:,} |")
    assert all(sound(told) for told in tables.values())
