"""The data: prompts labelled safe or unsafe, as hidden states of the frozen layers.

The prompts are offensive or ask for harmful help: they are read, never printed (../data/ATTRIBUTION.md).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import TensorDataset

from .guard import Guard

DATA = Path(__file__).parents[1] / "data"


class Prompts(NamedTuple):
    """Prompts and their labels: 1 is unsafe, 0 is safe."""

    texts: list[str]
    labels: list[int]

    @property
    def prevalence(self) -> float:
        """The share of unsafe prompts: the AUPRC of a guess."""
        return sum(self.labels) / len(self.labels)


def load(limit: int | None = None) -> dict[str, Prompts]:
    """The splits "train" and "test" of the guard prompts, and "xstest"; the first ``limit`` of each, evenly spread."""
    guard, xstest = _rows("guard_prompts.jsonl.gz"), _rows("xstest_prompts.jsonl.gz")
    splits = {name: [row for row in guard if row["split"] == name] for name in ("train", "test")} | {"xstest": xstest}
    return {name: _prompts(rows[:: max(1, len(rows) // limit)] if limit else rows) for name, rows in splits.items()}


def cache(guard: Guard, tokenizer: Any, prompts: Prompts, max_tokens: int) -> TensorDataset:
    """One record a prompt: its hidden states [t, d] below the trained layers, its mask [t] and its label.

    Prompts are cut to ``max_tokens``. Sorted by length, a chunk is no wider than its own longest prompt.
    """
    batch = tokenizer(prompts.texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    hidden = torch.zeros(*tokens.shape, guard.encoder.config.hidden_size)
    for chunk in mask.sum(1).argsort().split(64):
        width = int(mask[chunk].sum(1).max())
        hidden[chunk, :width] = guard.lower(tokens[chunk, :width], mask[chunk, :width])
    return TensorDataset(hidden, mask, torch.tensor(prompts.labels))


def _rows(name: str) -> list[dict[str, str]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _prompts(rows: list[dict[str, str]]) -> Prompts:
    return Prompts([row["prompt"] for row in rows], [int(row["label"] == "unsafe") for row in rows])
