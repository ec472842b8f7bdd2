"""The durable ledger: on disk before anybody sees a release, never short of one, shared by all runs on a data set."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dpkit
from dpkit import __main__ as command
from dpkit import files
from dpkit import ledger as ledgers
from dpkit.accountants import Gaussian, PoissonSampled, RDPAccountant, epsilon
from dpkit.ledger import Ledger
from tests.lives import Life, begin
from tests.test_refusals import refused


def releases(path: Path) -> list[dict[str, Any]]:
    return [entry for line in path.read_text().splitlines() if "release" in (entry := json.loads(line))]


def count(life: Life) -> int:
    return sum(n for _, n in life.engine.accountant.ledger)


# --- what is written, and when ---


def test_every_release_is_a_line(tmp_path: Path) -> None:
    life = begin(ledger=tmp_path / "l", max_physical_batch_size=2).train()
    lines = releases(tmp_path / "l")
    assert [line["release"] for line in lines] == list(range(15))
    assert {line["run"] for line in lines} == {lines[0]["run"]}
    assert all(dpkit.accountants.Event.from_json(line["event"]) == PoissonSampled(0.2, Gaussian(1.0)) for line in lines)
    assert len({line["print"] for line in lines}) == 15
    held = Ledger(tmp_path / "l", None)
    assert held.totals() == life.engine.accountant.totals() == {PoissonSampled(0.2, Gaussian(1.0)): 15}
    assert (tmp_path / "l").stat().st_mode & 0o777 == 0o600


def test_fixed_batches_write_every_release_too(tmp_path: Path) -> None:
    """Those that the pass has paid for cost nothing, and are there all the same."""
    life = begin(ledger=tmp_path / "l", poisson_sampling=False).train()
    lines = releases(tmp_path / "l")
    assert len(lines) == 15
    assert sum(line["event"] is not None for line in lines) == 3 == count(life)


@pytest.mark.parametrize("batch_size", [4, 1])
def test_on_disk_before_it_is_handed_out(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When fsync returns for a release, no gradient has been set and no weight has moved; empty draws included."""
    life = begin(ledger=tmp_path / "l", batch_size=batch_size)
    before = life.weights()
    synced = []
    real = os.fsync

    def fsync(file: int) -> None:
        real(file)
        if os.fstat(file).st_ino == (tmp_path / "l").stat().st_ino:
            assert all(p.grad is None for p in life.model.parameters())
            assert torch.equal(life.weights(), before)
            synced.append(len(releases(tmp_path / "l")))

    def moved(*_: Any) -> None:
        nonlocal before
        assert not torch.equal(life.weights(), before)
        before = life.weights()
        assert synced[-1] == count(life)

    life.optimizer.register_step_post_hook(moved)
    monkeypatch.setattr(os, "fsync", fsync)
    life.train()
    assert synced[-1] == count(life) == len(life.loader) * 3


@pytest.mark.parametrize("failing", ["write", "short write", "fsync"])
def test_what_cannot_be_written_is_not_released(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: an error, no step, no line; and once there is room, the run goes on."""
    life = begin(ledger=tmp_path / "l").train(lambda life: life.steps == 3)
    before, text = life.weights(), (tmp_path / "l").read_bytes()
    spent = life.engine.get_epsilon()
    real = os.write

    def fail(*arguments: Any) -> int:
        if failing == "short write":
            return real(arguments[0], arguments[1][:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing.split()[-1], fail)
        with refused(dpkit.LedgerError, "cannot be written"):
            life.train()
    assert torch.equal(life.weights(), before)
    assert all(p.grad is None for p in life.model.parameters())
    assert (tmp_path / "l").read_bytes() == text
    assert life.engine.get_epsilon() == spent
    life.train()
    assert len(releases(tmp_path / "l")) == 3 + 15


# --- interruptions ---


def test_resuming_from_the_latest_checkpoint(tmp_path: Path) -> None:
    whole = begin(ledger=tmp_path / "w").train()
    begin(ledger=tmp_path / "l").train(lambda life: life.steps == 6 and (life.save(tmp_path / "c") or True))
    life = begin(ledger=tmp_path / "l")
    life.load(tmp_path / "c")
    life.train()
    assert torch.equal(life.weights(), whole.weights())
    assert life.engine.get_epsilon() == whole.engine.get_epsilon()
    assert [r["print"] for r in releases(tmp_path / "l")] == [r["print"] for r in releases(tmp_path / "w")]


def interrupted(folder: Path, **options: Any) -> Life:
    """A run that was saved after 4 steps and went on to 9."""
    life = begin(ledger=folder / "l", **options)
    return life.train(lambda life: (life.steps == 4 and life.save(folder / "c")) or life.steps == 9)


def test_repeated_releases_count_once(tmp_path: Path) -> None:
    """An older checkpoint: what was released since stays counted; repeated bit for bit, it is no new release."""
    whole = begin().train()
    reached = interrupted(tmp_path)
    text = (tmp_path / "l").read_bytes()
    life = begin(ledger=tmp_path / "l")
    life.load(tmp_path / "c")
    assert life.engine.get_epsilon() == reached.engine.get_epsilon()  # nine, not four
    life.train(lambda life: life.steps == 9)
    assert (tmp_path / "l").read_bytes() == text
    assert torch.equal(life.weights(), reached.weights())
    life = begin(ledger=tmp_path / "l")
    life.load(tmp_path / "c")
    life.train()
    assert torch.equal(life.weights(), whole.weights())
    assert life.engine.get_epsilon() == whole.engine.get_epsilon()
    assert len(releases(tmp_path / "l")) == 15


@pytest.mark.parametrize("change", ["weights", "learning rate", "C", "sigma", "noise"])
def test_another_sum_with_the_same_noise_is_refused(change: str, tmp_path: Path) -> None:
    """Released twice with one noise, the difference of two sums would be released with none."""
    interrupted(tmp_path)
    text = (tmp_path / "l").read_bytes()
    life = begin(ledger=tmp_path / "l")
    life.load(tmp_path / "c")
    if change == "weights":
        with torch.no_grad():
            next(life.model.parameters())[0, 0] += 1e-6
    elif change == "learning rate":
        life.optimizer.param_groups[0]["lr"] *= 1.01  # the second release differs, the first does not
    elif change == "C":
        life.engine.max_grad_norm = 1.01
    elif change == "sigma":
        life.engine.noise_multiplier = 2.0
    else:
        life.engine._attached().noise.reseed()
    with refused(dpkit.ReplayError, "replay=False"):
        life.train()
    assert life.steps == (5 if change == "learning rate" else 4)
    assert (tmp_path / "l").read_bytes() == text
    assert all(p.grad is None for p in life.model.parameters())


def test_fresh_randomness_counts_everything(tmp_path: Path) -> None:
    """replay=False: nine releases were made, and eleven more are."""
    interrupted(tmp_path)
    life = begin(ledger=tmp_path / "l")
    life.load(tmp_path / "c", replay=False)
    assert count(life) == 9
    life.train()
    assert count(life) == 9 + 11 == len(releases(tmp_path / "l"))
    again = begin(ledger=tmp_path / "l")
    again.load(tmp_path / "c", replay=False)
    assert count(again) == 20


def test_secure_noise_cannot_be_repeated(tmp_path: Path) -> None:
    """Nobody keeps its keys: a batch that was released is not released again, others are drawn."""
    pytest.importorskip("cryptography")
    options: dict[str, Any] = {"secure": True, "seeds": False, "batch_size": 20, "ledger": tmp_path / "l"}
    begin(**options).train(lambda life: (life.steps == 1 and life.save(tmp_path / "c")) or life.steps == 2)
    life = begin(**options)
    with refused(dpkit.CheckpointError, "1 releases", "replay=False"):
        life.load(tmp_path / "c")
    life.load(tmp_path / "c", replay=False)
    life.train(lambda life: life.save(tmp_path / "c"))
    assert count(life) == 2 + 2
    life = begin(**options)
    life.load(tmp_path / "c")  # nothing was released since: the run goes on
    assert count(life) == 4


def test_a_checkpoint_from_the_repetition(tmp_path: Path) -> None:
    """Saved while releases are being repeated: what is still to be repeated is known from the ledger."""
    whole = begin().train()
    interrupted(tmp_path)
    for at in (6, 8, 9, 12):
        life = begin(ledger=tmp_path / "l")
        life.load(tmp_path / "c")
        life.train(lambda life, at=at: life.steps == at and (life.save(tmp_path / "c") or True))  # type: ignore[misc]
    life = begin(ledger=tmp_path / "l")
    life.load(tmp_path / "c")
    life.train()
    assert torch.equal(life.weights(), whole.weights())
    assert len(releases(tmp_path / "l")) == 15 == count(life)


def test_the_ledger_has_to_be_the_runs(tmp_path: Path) -> None:
    """None, another, a shorter one, one of another past: all errors, and nothing is loaded."""
    interrupted(tmp_path)
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    begin(ledger=tmp_path / "other").train(lambda life: life.steps == 9)
    (tmp_path / "short").write_bytes(b"".join(lines[:5]))
    (tmp_path / "none").write_bytes(lines[0])
    with refused(dpkit.CheckpointError, "keeps a ledger"):
        begin().load(tmp_path / "c")
    for name in ("other", "short", "none", "new"):
        life = begin(ledger=tmp_path / name)
        with refused(dpkit.LedgerError, "does not match"):
            life.load(tmp_path / "c")
        assert life.steps == count(life) == 0
    begin().train(lambda life: life.steps == 2 and (life.save(tmp_path / "without") or True))
    with refused(dpkit.LedgerError, "does not match"):
        begin(ledger=tmp_path / "l").load(tmp_path / "without")


def test_a_ledger_with_another_past(tmp_path: Path) -> None:
    """The same run and as many releases, but others: the file was put back, and the run went on differently."""
    interrupted(tmp_path)
    young = begin(ledger=tmp_path / "l")
    text = (tmp_path / "l").read_bytes()
    young.load(tmp_path / "c", replay=False)
    young.train(lambda life: life.steps == 7 and life.save(tmp_path / "later"))
    (tmp_path / "l").write_bytes(text)
    other = begin(ledger=tmp_path / "l")
    other.load(tmp_path / "c", replay=False)
    other.train()
    life = begin(ledger=tmp_path / "l")
    with refused(dpkit.LedgerError, "does not match"):
        life.load(tmp_path / "later")


def test_two_processes_with_one_run(tmp_path: Path) -> None:
    """The same checkpoint resumed twice at a time: the second to write is stopped before it releases."""
    interrupted(tmp_path)
    lives = [begin(ledger=tmp_path / "l") for _ in range(2)]
    for life in lives:
        life.load(tmp_path / "c")
        life.train(lambda life: life.steps == 9)
    for life in lives:
        life.load(tmp_path / "c")
    lives[0].train(lambda life: life.steps == 10)
    with refused(dpkit.LedgerError, "another process"):
        lives[1].train()


# --- several runs ---


def test_runs_share_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each keeps its own count; the ledger knows the whole, and `dpkit budget` tells it."""
    lives = [begin(ledger=tmp_path / "l", noise_multiplier=sigma) for sigma in (1.0, 2.0)]
    for life in lives:
        life.train(lambda life: life.steps % 2 == 0)
    for life in reversed(lives):
        life.train()
    assert [count(life) for life in lives] == [17, 17]
    both = (
        RDPAccountant().compose(PoissonSampled(0.2, Gaussian(1.0)), 17).compose(PoissonSampled(0.2, Gaussian(2.0)), 17)
    )
    for options in ([], ["--delta", "1e-5"]):
        assert command.main(["budget", str(tmp_path / "l"), "--json", "--accountant", "rdp", *options]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["epsilon"] == pytest.approx(both.epsilon(1e-5))
        assert [run["epsilon"] for run in told["runs"]] == [life.engine.get_epsilon() for life in lives]
        assert [run["releases"] for run in told["runs"]] == [17, 17]
    assert lives[0].engine.ledger is not None
    assert lives[0].engine.ledger.totals() == both.totals()


def test_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(ledger=tmp_path / "l").train()
    options = ["budget", str(tmp_path / "l"), "--max-epsilon", "8", "--delta", "1e-5"]
    assert command.main([*options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [(_, left)] = told["releases_left"].items()

    def spent(steps: int) -> float:
        return epsilon(noise_multiplier=1.0, sample_rate=0.2, steps=steps, delta=1e-5)

    assert told["epsilon"] == pytest.approx(spent(15), rel=1e-4)
    assert told["left"] == 8 - told["epsilon"]
    assert spent(15 + left) <= 8 < spent(16 + left)
    assert command.main(options) == 0
    text = capsys.readouterr().out
    assert f"{left} more releases" in text
    assert "15 releases" in text


def test_the_command_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(ledger=tmp_path / "l", target_delta=None).train(lambda life: life.steps == 1)
    (tmp_path / "junk").write_text("no ledger\n")
    (tmp_path / "empty").write_text("")
    for name, word in (("l", "--delta"), ("none", "cannot be opened"), ("junk", "damaged"), ("empty", "empty")):
        assert command.main(["budget", str(tmp_path / name)]) == 2
        assert word in capsys.readouterr().err
    assert command.main(["budget", str(tmp_path / "l"), "--json"]) == 2
    assert "error" in json.loads(capsys.readouterr().out)
    assert not (tmp_path / "none").exists()
    assert (tmp_path / "empty").read_text() == ""


def test_as_a_program(tmp_path: Path) -> None:
    begin(ledger=tmp_path / "l").train(lambda life: life.steps == 2)
    arguments = [sys.executable, "-m", "dpkit", "budget", str(tmp_path / "l"), "--accountant", "rdp"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 releases" in done.stdout
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dpkit = "dpkit.__main__:main"' in project


def _append(path: Path, name: str, times: int) -> None:
    held = Ledger(path, "add_or_remove_one")
    for k in range(times):
        held.append(name, Gaussian(1.0), f"{k:016x}", number=k, about={})


def test_processes_take_turns(tmp_path: Path) -> None:
    """Four processes write at once: every line is there, whole, in order."""
    context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "fork")
    workers = [context.Process(target=_append, args=(tmp_path / "l", str(k), 50)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    held = Ledger(tmp_path / "l", None)
    assert held.totals() == {Gaussian(1.0): 200}
    assert {name: len(run.releases) for name, run in held.runs.items()} == {str(k): 50 for k in range(4)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_waits_for_its_parent(tmp_path: Path) -> None:
    """The open file, and so the lock, was one for both: they wrote at once, and the file was damaged for good."""
    ledger = Ledger(tmp_path / "l", "add_or_remove_one")
    child = os.fork()
    try:
        for number in range(50):
            ledger.append("parent" if child else "child", Gaussian(1.0), "", number=number, about={})
    finally:
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
    assert {name: len(run.releases) for name, run in Ledger(tmp_path / "l", None).runs.items()} == {
        "parent": 50,
        "child": 50,
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_moved_before_a_forked_process_writes(tmp_path: Path) -> None:
    """The child opens no other file that lies there now."""
    ledger = Ledger(tmp_path / "l", "add_or_remove_one")
    (tmp_path / "l").rename(tmp_path / "elsewhere")
    Ledger(tmp_path / "l", "add_or_remove_one").close()
    child = os.fork()
    if not child:
        try:
            ledger.read()
        except dpkit.LedgerError as error:
            os._exit(7 if "moved" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# --- files that are not as they should be ---


def test_cut_or_replaced_while_in_use(tmp_path: Path) -> None:
    for how in ("cut", "moved", "deleted", "replaced"):
        path = tmp_path / how
        life = begin(ledger=path).train(lambda life: life.steps == 3)
        if how == "cut":
            os.truncate(path, path.stat().st_size - 10)
        elif how == "replaced":
            (tmp_path / "copy").write_bytes(path.read_bytes())
            (tmp_path / "copy").replace(path)
        else:
            path.rename(tmp_path / "elsewhere") if how == "moved" else path.unlink()
        before = life.weights()
        with refused(dpkit.LedgerError, "cut off" if how == "cut" else "moved or replaced"):
            life.train()
        assert torch.equal(life.weights(), before)


@pytest.mark.parametrize("how", ["drop", "swap", "double", "edit"])
def test_lines_that_were_tampered_with(how: str, tmp_path: Path) -> None:
    begin(ledger=tmp_path / "l").train(lambda life: life.steps == 5)
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    if how == "drop":
        del lines[3]
    elif how == "swap":
        lines[3], lines[4] = lines[4], lines[3]
    elif how == "double":
        lines.insert(3, lines[3])
    else:
        lines[3] = lines[3].replace(b'"noise_multiplier":1.0', b'"noise_multiplier":9.0')
    (tmp_path / "l").write_bytes(b"".join(lines))
    for adjacency in (None, "add_or_remove_one"):
        with refused(dpkit.LedgerError, "line " + ("5" if how == "double" else "4"), "damaged"):
            Ledger(tmp_path / "l", adjacency)
    assert (tmp_path / "l").read_bytes() == b"".join(lines)


def test_a_run_cannot_be_taken_out(tmp_path: Path) -> None:
    """All of its lines, so that every other run's numbers are right; the lines after it tell."""
    for _ in range(3):
        begin(ledger=tmp_path / "l").train(lambda life: life.steps == 2)
    lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
    taken = b"".join(lines[:4] + lines[7:])
    assert Ledger(tmp_path / "l", None).totals() == {PoissonSampled(0.2, Gaussian(1.0)): 6}
    (tmp_path / "l").write_bytes(taken)
    with refused(dpkit.LedgerError, "line 5", "damaged"):
        Ledger(tmp_path / "l", None)


def test_a_torn_line_is_of_a_release_that_nobody_saw(tmp_path: Path) -> None:
    """Cut within the last line: the rest counts, and the run goes on from its checkpoint and writes it again."""
    whole = begin().train()
    interrupted(tmp_path)
    text = (tmp_path / "l").read_bytes()
    last = text.splitlines(keepends=True)[-1]
    for cut in (1, 2, 20, 60, len(last) - 1):
        (tmp_path / "l").write_bytes(text[:-cut])
        held = Ledger(tmp_path / "l", None)
        assert held.torn == (cut > 20)
        assert len(held.runs[next(iter(held.runs))].releases) == (9 if cut <= 20 else 8)
        assert (tmp_path / "l").read_bytes() == text[:-cut]  # a reader changes nothing
        assert command.main(["budget", str(tmp_path / "l"), "--accountant", "rdp"]) == 0
    life = begin(ledger=tmp_path / "l")
    life.load(tmp_path / "c")
    life.train()
    assert torch.equal(life.weights(), whole.weights())
    assert len(releases(tmp_path / "l")) == 15


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    """A path given by mistake: whatever it holds stays."""
    for text in (b"a,b\n1,2\n", b"one line", b'{"run": 1}', b"\x00\xff\n", b"{}\n", b'{"dpkit_ledgers":1'):
        (tmp_path / "data").write_bytes(text)
        with refused(dpkit.LedgerError):
            dpkit.PrivacyEngine(ledger=tmp_path / "data")
        assert (tmp_path / "data").read_bytes() == text
    (tmp_path / "data").write_bytes(b'{"dpkit_led')  # a header that a crash tore
    assert dpkit.PrivacyEngine(ledger=tmp_path / "data").ledger is not None
    for path in (tmp_path, tmp_path / "none" / "l"):
        with refused(dpkit.LedgerError, "cannot be opened"):
            dpkit.PrivacyEngine(ledger=path)


def test_disks_that_keep_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has a stronger way to force a file down (macOS), that is the one used."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda file, what: asked.append((file, what)))
    files.sync(7)
    assert asked == [(7, 51)]


def test_another_adjacency(tmp_path: Path) -> None:
    dpkit.PrivacyEngine(ledger=tmp_path / "l")
    with refused(dpkit.LedgerError, "adjacency"):
        dpkit.PrivacyEngine(RDPAccountant("replace_one"), ledger=tmp_path / "l")


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system or the file system has no locks, that is said."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(ledgers.fcntl, "flock", fail)
        with refused(dpkit.LedgerError, "cannot be locked", "No locks available"):
            dpkit.PrivacyEngine(ledger=tmp_path / "l")
    monkeypatch.setattr(ledgers, "fcntl", None)
    with refused(dpkit.LedgerError, "no file locks"):
        dpkit.PrivacyEngine(ledger=tmp_path / "l")


def test_fingerprints_see_every_bit() -> None:
    """One bit, one exchange, one sign: another fingerprint; the same values, the same."""
    from dpkit.fingerprint import Fingerprint

    make = Fingerprint().of
    base = [torch.randn(70_000), torch.randn(3, 3, dtype=torch.float64), torch.randn(9).bfloat16(), torch.randn(0)]
    seen = {make(base)}
    assert make([t.clone() for t in base]) in seen
    assert make([t.contiguous() for t in base]) == Fingerprint().of(base)
    assert make([torch.ones(2, dtype=torch.complex128)]) != make([torch.zeros(2, dtype=torch.complex128)])
    for k, at in ((0, 0), (0, 69_999), (0, 65_536), (1, 4), (2, 8)):
        other = [t.clone() for t in base]
        bits = other[k].view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[other[k].element_size()])
        bits[at] ^= 1
        seen.add(make(other))
    swapped = [base[0].clone(), *base[1:]]
    swapped[0][[0, 1]] = swapped[0][[1, 0]]
    seen.add(make(swapped))
    seen.add(make([base[0], base[1].T.contiguous(), *base[2:]]))
    negative = [t.clone() for t in base]
    negative[0][5] = -negative[0][5]
    seen.add(make(negative))
    assert len(seen) == 9
