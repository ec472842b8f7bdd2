"""What the pages in docs/ show can be run as it stands there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkit.__main__ import main
from tests.lives import begin

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)
    assert found
    return found


def test_long_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of docs/long_runs.md, stopped in the middle and started again, from the same file."""
    monkeypatch.chdir(tmp_path)
    [script] = blocks("long_runs.md")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    with pytest.raises(KeyboardInterrupt):
        exec(script.replace("step += 1", "step += 1\n        if step == 23: raise KeyboardInterrupt"), names)
    names["engine"].detach()
    torch.manual_seed(0)
    again: dict[str, Any] = {}
    exec(script, again)
    assert again["step"] >= 30
    assert sum(n for _, n in again["engine"].accountant.ledger) == 40
    assert again["engine"].get_epsilon() <= 3.0


def test_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/statement.md from top to bottom; the files it writes are what it says."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for block in blocks("statement.md"):
            exec(block, names)
    assert "differentially private for data sets that differ by adding or removing one record" in said.getvalue()
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("---\ntags:\n- differential-privacy\n")
    for figure in ("epsilon.png", "tradeoff.png", "utility.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of docs/command_line.md, and what it answers where the page shows that."""
    pytest.importorskip("matplotlib")
    life = begin(ledger=tmp_path / "run.ledger")
    life.train(lambda life: life.steps == 2)
    life.save(tmp_path / "run.checkpoint")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    commands = "".join(re.findall(r"```console\n(.*?)```", page, re.S)).split("$ ")[1:]
    assert len(commands) == 10
    for shown in commands:
        command, _, expected = shown.partition("\n")
        code = main(shlex.split(command)[1:])
        out, err = capsys.readouterr()
        assert code == (2 if expected.startswith("error") else 0), command
        if expected:
            assert parts(out + err) == pytest.approx(parts(expected), rel=2e-3), command
            assert re.sub(NUMBER, "#", out + err) == re.sub(NUMBER, "#", expected)


NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"


def parts(text: str) -> list[float]:
    """The numbers in a text."""
    return [float(number) for number in re.findall(NUMBER, text)]
