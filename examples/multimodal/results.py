"""What the example found, as values: written to JSON and Markdown here, and to a page by `page`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .pictures import Picture
from .train import Run

WORDS = {"auroc": "AUROC", "accuracy": "accuracy", "pairs": "whole pairs"}
"""What the measures are called."""


@dataclass
class Table:
    """Models on one data set.

    Attributes:
        splits: the judged splits, by name, with a title each.
        goals: what was hoped for: (what, reached or missed, as measured).
    """

    key: str
    title: str
    about: str
    splits: dict[str, str]
    runs: list[Run] = field(default_factory=list)
    goals: list[tuple[str, bool, str]] = field(default_factory=list)

    @property
    def heads(self) -> list[str]:
        """The columns' titles."""
        measured = [f"{title}: {WORDS[what]}" for split, title in self.splits.items() for what in self._measures(split)]
        return ["model", "ε spent", *measured, "steps", "CPU s"]

    def cells(self) -> list[list[str]]:
        """The table's cells, as text."""
        return [
            [
                run.name,
                f"{run.epsilon:.2f}" if math.isfinite(run.epsilon) else "∞",
                *(self._cell(run, split, what) for split in self.splits for what in self._measures(split)),
                str(run.steps),
                f"{run.seconds:.0f}",
            ]
            for run in self.runs
        ]

    def _measures(self, split: str) -> list[str]:
        first = next((run.metrics[split] for run in self.runs if split in run.metrics), None)
        present = ("auroc", "accuracy", "pairs")
        return [what for what in present if first is not None and getattr(first, what) is not None]

    @staticmethod
    def _cell(run: Run, split: str, what: str) -> str:
        metrics = run.metrics.get(split)
        value = getattr(metrics, what, None)
        if value is None:
            return "–"
        if what == "auroc" and metrics is not None and metrics.auroc_pm is not None:
            return f"{value:.3f} ± {metrics.auroc_pm:.3f}"
        return f"{value:.3f}"


@dataclass
class Curve:
    """Metrics against how often a modality is there, for one data set, fusion layer and share of modality dropout."""

    data: str
    missing: str
    fusion: int
    dropout: float
    epsilon: float
    values: dict[float, float]
    measure: str = "accuracy"
    tasks: bool = False


@dataclass
class Shown:
    """A test row, for the page: text (masked where it may be hateful), picture, label and what models said."""

    data: str
    text: str
    picture: Picture
    label: str
    said: dict[str, tuple[str, float]]  # model: (class, its probability)


@dataclass
class Results:
    """Everything."""

    command: str
    seed: int
    machine: str
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    searches: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    statement: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self, key: str) -> Table:
        """The table of that key."""
        return next(table for table in self.tables if table.key == key)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the texts and pictures."""
        found = asdict(self)
        del found["shown"]
        return found

    def write(self, folder: Path, stem: str = "multimodal") -> None:
        """JSON and Markdown."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(self.as_dict()), indent=1, ensure_ascii=False)
        (folder / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
        (folder / f"{stem}.md").write_text(self.as_markdown(), encoding="utf-8")

    def as_markdown(self) -> str:
        """Tables, curves, the search's account, the notes."""
        parts = [
            f"# Image and text together, privately\n\nBy `{self.command}` (seed {self.seed}); {self.machine}; "
            f"{self.seconds / 60:.0f} minutes of processor time in all. The page: [multimodal.html](multimodal.html)."
        ]
        for table in self.tables:
            parts += [f"## {table.title}", table.about, _markdown(table.heads, table.cells())]
            parts += ["\n".join(f"- {'reached' if ok else 'MISSED'}: {what}: {how}" for what, ok, how in table.goals)]
        if self.curves:
            parts += ["## A modality is missing", _markdown(*self.curve_table())]
        for found in self.searches:
            parts += [
                f"## The search for the fusion layer: {found['data']}",
                "\n".join(f"- {x}" for x in found["lines"]),
            ]
        if self.pieces:
            parts += ["## Private pieces", "\n".join(f"- {x}" for x in self.pieces)]
        parts += ["## To know before believing", "\n".join(f"- {note}" for note in self.notes)]
        parts += ["## The engine's statement", f"```\n{self.statement}\n```"]
        return "\n\n".join(part for part in parts if part) + "\n"

    def curve_table(self) -> tuple[list[str], list[list[str]]]:
        """Heads and cells of all curves."""
        ratios = list(self.curves[0].values)
        heads = ["data", "missing", "fused at", "modality dropout", "ε", *(f"{ratio:.0%}" for ratio in ratios)]
        cells = [
            [
                c.data,
                c.missing,
                str(c.fusion),
                f"{c.dropout:.0%}" + (", task heads" if c.tasks else ""),
                "∞" if math.isinf(c.epsilon) else f"{c.epsilon:.1f}",
                *(f"{value:.3f}" for value in c.values.values()),
            ]
            for c in self.curves
        ]
        return heads, cells


def _markdown(heads: list[str], cells: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> Any:
    """JSON has no infinity: it is written as null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return round(value, 5) if isinstance(value, float) else value
