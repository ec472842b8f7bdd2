"""The data: conversations with what each violates; who is whose (the unit of privacy); and what is kept for judging.

Content warning: the texts are offensive or ask for harmful help. They are read, and shown only shortened
(../data/ATTRIBUTION.md).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prompt import Conversation
from .taxonomy import Taxonomy, built_in

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Record:
    """A conversation as it was labelled.

    Attributes:
        unit: whose presence ε hides: all answers to one prompt are one unit.
        unsafe: whether the last message is.
        category: the name of what it violates, if anybody said so; of a safe DiaSafety row, of what it was judged by.
        violates: the names of all violated categories.
    """

    conversation: Conversation
    unit: str
    unsafe: bool
    category: str | None = None
    violates: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """What is judged."""
        return self.conversation.turns[-1].text


@dataclass(frozen=True)
class Source:
    """One data set: its split "train", "val" and "test" where it has them, and the taxonomy its categories are of."""

    splits: dict[str, list[Record]]
    taxonomy: Taxonomy


def prompts() -> Source:
    """6,643 prompts, safe or unsafe, with an MLCommons hazard on about 1,700: prompt classification."""
    taxonomy, rows = built_in("mlcommons"), _rows("guard_prompts.jsonl.gz")

    def record(row: dict[str, Any]) -> Record:
        name = taxonomy.coded(row["hazard"]).name if row["hazard"] else None
        unsafe = row["label"] == "unsafe"
        return Record(Conversation.of(row["prompt"]), row["id"], unsafe, name, (name,) if name else ())

    return Source({s: [record(r) for r in rows if r["split"] == s] for s in ("train", "val", "test")}, taxonomy)


def responses() -> Source:
    """11,209 chatbot answers, safe or unsafe, in five categories; the split keeps prompts apart."""
    taxonomy, rows = built_in("diasafety"), _rows("guard_responses_diasafety.jsonl.gz")

    def record(row: dict[str, Any]) -> Record:
        name, unsafe = taxonomy.named(row["category"]).name, row["label"] == "unsafe"
        unit = "diasafety: " + row["prompt"]
        violated = (name,) if unsafe else ()
        return Record(Conversation.of(row["prompt"], row["response"]), unit, unsafe, name, violated)

    return Source({s: [record(r) for r in rows if r["split_prompt"] == s] for s in ("train", "val", "test")}, taxonomy)


def xstest() -> Source:
    """450 prompts in matched style, 200 of them unsafe: does the guard refuse what only sounds unsafe?"""
    rows = _rows("xstest_prompts.jsonl.gz")
    test = [Record(Conversation.of(r["prompt"]), r["id"], r["label"] == "unsafe", r["type"]) for r in rows]
    return Source({"test": test}, built_in("mlcommons"))


def openai_moderation() -> Source:
    """1,557 texts of OpenAI's evaluation set, 399 unsafe; rows on minors left out: not comparable with others."""
    rows = _rows("eval_openai_moderation.jsonl.gz")
    test = [
        Record(Conversation.of(r["prompt"]), r["id"], r["label"] == "unsafe", violates=tuple(r["categories"]))
        for r in rows
    ]
    return Source({"test": test}, built_in("openai_moderation"))


def thinned(records: Sequence[Record], limit: int | None) -> list[Record]:
    """About ``limit`` of them, evenly spread: for a quick try.

    Their places decide, so ε is about the data set that is left, not about the one that it is taken from.
    """
    return list(records[:: max(1, len(records) // limit)] if limit else records)


def _rows(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
