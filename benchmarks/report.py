"""What every benchmark's result says about the run it is from."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def conditions(module: str) -> dict[str, Any]:
    """All that a reader needs to judge or to repeat the run of ``python -m <module>``."""
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **{package: version(package) for package in ("dpkit", "torch", "opacus", "transformers")},
        "python": platform.python_version(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
    }


def sentence(about: dict[str, Any]) -> str:
    """The conditions in one line of Markdown."""
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    return (
        f"`{about['command']}`, {about['date']}: {about['cpu']}, {threads}, torch {about['torch']}, "
        f"Opacus {about['opacus']}, transformers {about['transformers']}, dpkit {about['dpkit']}."
    )


def write(name: str, about: dict[str, Any], rows: list[Any], markdown: str) -> None:
    """results/<name>.json and results/<name>.md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(markdown)
    held = {"conditions": about, "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(held, indent=1) + "\n")
