"""What README.md and the pages in docs/ show can be run as it stands there."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dpkit
from dpkit.__main__ import main
from tests.lives import begin

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"custom_layers.md", "long_runs.md"}  # tests/test_testing.py, and below

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
"""For pages of scripts that run under torchrun: one process."""


def blocks(page: str) -> list[str]:
    """The Python code of a page of docs/, or of README.md."""
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))


def test_pages_are_found() -> None:
    """The page that is run elsewhere is there, and most pages have code."""
    assert set(PAGES) >= ELSEWHERE
    assert sum(bool(blocks(page)) for page in PAGES) >= 7


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and blocks(page)])
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, in one namespace, from an empty folder; the line numbers are the page's."""
    monkeypatch.chdir(tmp_path)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    if "import opacus" in text:
        pytest.importorskip("opacus")
        warnings.simplefilter("ignore")  # Opacus's own; pytest puts the filters back
    if "import PrivateTrainer" in text:  # the Trainer pins memory wherever it runs
        warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
    if "import peft" in text:  # peft 0.21 asks transformers 5.24 by an older name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if "import pytorch_lightning" in text:
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
    names: dict[str, Any] = {"__name__": "__main__"}
    for found in re.finditer(r"```python\n(.*?)```", text, re.S):
        before = text[: found.start(1)].count("\n")
        exec(compile("\n" * before + found[1], page, "exec"), names)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class People(Dataset[dict[str, Any]]):
    """100 rows of 50 users."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, k: int) -> dict[str, Any]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(k))
        return {"x": x, "y": k % 2, "user_id": k // 2}


class Readme(dict[str, Any]):
    """The names that README's one-line examples take for granted, made anew for each."""

    def make_private(self, **given: Any) -> dpkit.PrivacyEngine:
        """An engine attached to a small model, with a batch in hand and its losses, one a record."""
        engine = dpkit.PrivacyEngine()
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"max_grad_norm": 1.0, "noise_multiplier": 1.1, "target_delta": 1e-5, **given}
        _, _, loader = engine.make_private(model, optimizer, DataLoader(People(), batch_size=5), **options)
        self["batches"] = iter(loader)
        batch = next(self["batches"])
        self["losses"] = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return engine


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first block is run by tests/test_newcomer.py; here every line of the overview by itself, then the others."""
    monkeypatch.chdir(tmp_path)
    first, overview, *others = blocks("README.md")
    assert "engine.make_private(\n" in first
    names = Readme(dpkit=dpkit, torch=torch, nn=nn)
    lines = [line for line in overview.splitlines() if line.strip()]
    assert len(lines) > 10
    for line in lines:
        if "engine.make_private(..., " in line:
            names["engine"] = eval(
                line.replace("engine.make_private(..., ", "make(", 1), {**names, "make": names.make_private}
            )
            continue
        if "engine.backward" not in line and "engine." in line and not line.startswith("engine ="):
            names["engine"] = names.make_private()
        exec(line, names)
    for block in others:
        if "Scale" in block:
            names["Scale"] = type("Scale", (nn.Module,), {})
        exec(block, names)
    dpkit.unregister_rule(names["Scale"])


def test_long_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of docs/long_runs.md, stopped in the middle and started again, from the same file."""
    monkeypatch.chdir(tmp_path)
    script = "\n".join(blocks("long_runs.md"))
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
