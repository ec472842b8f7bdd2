"""The data sets: each row a text and a picture, with its label, its split, and whose it is.

Some of the texts are hateful: they were published for research on hate speech (../data/ATTRIBUTION.md). Programs read
them; what is shown of them is masked (`masked`).
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pictures import DATA, STYLES, Picture, catalogue


@dataclass(frozen=True)
class Row:
    """One text with one picture.

    Attributes:
        unit: whose row it is: all rows of a unit come and go together (the unit of privacy).
        pair: confounders that belong together share it: only a model that sees both modalities gets all of them right.
        kind: what a confounder changes ("image", "text"), or which part of a mix the row is of.
    """

    text: str
    picture: Picture
    label: int
    split: str
    unit: str
    pair: str
    kind: str = ""


@dataclass(frozen=True)
class Rows:
    """A data set: its rows by split."""

    name: str
    splits: dict[str, list[Row]]
    classes: tuple[str, ...] = ("0", "1")

    def __getitem__(self, split: str) -> list[Row]:
        return self.splits[split]

    @property
    def units(self) -> int:
        """How many units the training rows are of."""
        return len({row.unit for row in self["train"]})


def confounders(limit: int | None = None) -> Rows:
    """20,444 pairs of a sentence and an emoji; the label says whether their sentiments differ.

    Every text comes with a happy and a sad emoji, every emoji with happy and sad texts, equally often: one modality
    alone is a coin toss. The unit is the document from which the sentence is. "test_unseen_image" has emoji that the
    training rows do not have.
    """
    rows = [
        Row(
            row["text"],
            Picture((row["emoji"],), row["style"], row["bg"]),
            int(row["label"]),
            row["split"],
            row["unit"],
            row["text_id"],
        )
        for row in _lines("emoji_confounders.jsonl.gz")
    ]
    return Rows("confounders", _by_split(_some(rows, limit)), ("agree", "differ"))


def hatemoji(limit: int | None = None) -> Rows:
    """9,842 sentences with emoji as pictures, hateful or not, labelled by people; in pairs written together.

    Of a pair, one is hateful and the other not, in most by changing the emoji alone ("image") or the text alone
    ("text"). The unit is the pair. The split keeps pairs whole (the official one does not, and leaks). "check" is
    HatemojiCheck, a test suite by the same authors.
    """
    rows = [
        Row(
            row["text"],
            Picture(tuple(row["emoji"])),
            int(row["label"]),
            row["split_pair"],
            f"build {row['pair']}",
            f"build {row['pair']}",
            row["confounder"] or "",
        )
        for row in _lines("hatemoji_build.jsonl.gz")
    ]
    check = [
        Row(
            row["text"],
            Picture(tuple(row["emoji"])),
            int(row["label"]),
            "check",
            f"check {row['group']}",
            f"check {row['group']}",
            row["set"],
        )
        for row in _lines("hatemoji_check.jsonl.gz")
    ]
    return Rows("hatemoji", _by_split(_some(rows, limit) + _some(check, limit)), ("harmless", "hateful"))


def groups(limit: int | None = None) -> Rows:
    """Emoji and their tags, in nine groups: either modality alone tells much (redundant modalities).

    The unit is the emoji, with the pictures of both styles.
    """
    names = tuple(sorted({row["group"] for row in catalogue()}))
    rows = [
        Row(
            ", ".join(entry["tags"]),
            Picture((entry["hexcode"],), style),
            names.index(entry["group"]),
            entry["split"],
            entry["hexcode"],
            entry["hexcode"],
        )
        for entry in catalogue()
        for style in STYLES
    ]
    return Rows("groups", _by_split(_some(rows, limit)), names)


def hateful_memes(folder: Path | str) -> Rows:
    """A folder in the format of the Hateful Memes challenge: ``train.jsonl`` and others beside it, ``img/``.

    A line is ``{"id": 42953, "img": "img/42953.png", "label": 0, "text": "..."}``. Rows without a label (the hidden
    test set) are left out. A text that occurs several times is one unit: benign confounders share it.

    Raises:
        FileNotFoundError: there is no train.jsonl, or a picture is missing.
        ValueError: a line lacks a field, or its label is neither 0 nor 1.
    """
    folder = Path(folder)
    splits: dict[str, list[Row]] = {"train": _memes(folder / "train.jsonl", "train")}
    for path in sorted(folder.glob("*.jsonl")):
        if path.stem != "train":
            splits[path.stem] = _memes(path, path.stem)
    return Rows("hateful memes", {name: rows for name, rows in splits.items() if rows}, ("benign", "hateful"))


def _memes(path: Path, split: str) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        entry = json.loads(line)
        missing = {"id", "img", "text"} - set(entry)
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(sorted(missing))}")
        if "label" not in entry:
            continue
        if entry["label"] not in (0, 1):
            raise ValueError(f"{path}, line {number}: the label is {entry['label']!r}, not 0 or 1")
        image = path.parent / entry["img"]
        if not image.is_file():
            raise FileNotFoundError(f"{path}, line {number}: {image} is not there")
        text = entry["text"]
        rows.append(Row(text, Picture(path=str(image)), entry["label"], split, text.casefold(), text.casefold()))
    return rows


def shares(rows: Iterable[Row]) -> dict[str, float]:
    """The share of each kind of row."""
    counts = Counter(row.kind for row in rows)
    return {kind: count / sum(counts.values()) for kind, count in sorted(counts.items())}


def masked(text: str, keep: int = 2) -> str:
    """A text of which only the outline can be read: the first ``keep`` letters of each word."""
    return re.sub(r"\w+", lambda word: word[0][:keep] + "·" * (len(word[0]) - keep), text)


def _lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _by_split(rows: Sequence[Row]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {}
    for row in rows:
        splits.setdefault(row.split, []).append(row)
    return splits


def _some(rows: list[Row], limit: int | None) -> list[Row]:
    """About ``limit`` rows of each split, whole units, drawn without regard to what they hold."""
    if limit is None:
        return rows
    kept: list[Row] = []
    for split in sorted({row.split for row in rows}):
        units: dict[str, list[Row]] = {}
        for row in rows:
            if row.split == split:
                units.setdefault(row.unit, []).append(row)
        names = sorted(units)
        random.Random(0).shuffle(names)
        taken = 0
        for name in names:
            if taken >= limit:
                break
            kept += units[name]
            taken += len(units[name])
    return kept
