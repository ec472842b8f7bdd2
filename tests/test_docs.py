"""What the pages in docs/ show can be run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

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
