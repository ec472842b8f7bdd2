"""Runs that are killed, really: SIGKILL at random moments, resumed, and at the end the same as the run that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def killed(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """What `tests.lives` tells of so many kills, in a process of its own."""
    command = [sys.executable, "-m", "tests.lives", str(folder), str(kills), str(seed)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, int] = json.loads(done.stdout)
    assert not told["crashed"], done.stderr
    assert not told["unequal"], "resumed runs ended with other weights or another epsilon"
    assert not told["uncounted"], "weights were handed out with releases that the ledger lacks"
    assert told["kills"] == kills
    return told


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Weights and ε are bitwise the uninterrupted run's; the ledger was never short of a release."""
    assert killed(tmp_path, 5, seed=0)["runs"] >= 1


@pytest.mark.slow
def test_killed_often(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same sixty times; a good part of it inside the writing of a checkpoint."""
    told = killed(tmp_path, 60, seed=1)
    with capsys.disabled():
        print("\nSIGKILL at random moments:", ", ".join(f"{name} {n}" for name, n in told.items()))
    assert told["in a save"] > 5
