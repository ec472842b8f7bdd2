"""From rows to batches: every text and every picture is encoded once, a batch looks its rows' up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .data import Row, Rows
from .encoders import ImageEncoder, Texts, encode_pictures, encode_texts
from .mmbt import SHAPES
from .pictures import SIZE

Item = tuple[int, int, int]


class Batch(NamedTuple):
    """What a model takes (all but the label): see `MMBT.forward`."""

    image: Tensor
    text: Tensor
    mask: Tensor
    present: Tensor
    label: Tensor


@dataclass
class Tables:
    """What the frozen parts made of all texts and pictures of a data set."""

    maps: Tensor
    texts: Texts
    picture_of: dict[Any, int]
    text_of: dict[str, int]

    def gather(self, pictures: Tensor, texts: Tensor, labels: Tensor, present: Tensor) -> Batch:
        """The batch of rows given by indices; texts no wider than the longest of the whole data set."""
        return Batch(self.maps[pictures], self.texts.hidden[texts], self.texts.mask[texts], present, labels)


class Records(Dataset[Item]):
    """A split: item k is (picture's index, text's index, label)."""

    def __init__(self, rows: Sequence[Row], tables: Tables) -> None:
        self.rows, self.tables = list(rows), tables
        self.pictures = torch.tensor([tables.picture_of[row.picture] for row in rows])
        self.texts = torch.tensor([tables.text_of[row.text] for row in rows])
        self.labels = torch.tensor([row.label for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Item:
        return int(self.pictures[k]), int(self.texts[k]), int(self.labels[k])

    def batch(self, index: Sequence[int] | Tensor) -> Batch:
        """The rows at ``index``, both modalities present."""
        index = torch.as_tensor(index)
        there = torch.ones(len(index), 2, dtype=torch.bool)
        return self.tables.gather(self.pictures[index], self.texts[index], self.labels[index], there)

    @property
    def units(self) -> list[str]:
        """Whose row each one is."""
        return [row.unit for row in self.rows]

    @property
    def pairs(self) -> list[str]:
        """Which confounder pair each row is of."""
        return [row.pair for row in self.rows]


@dataclass
class Collate:
    """Items to a batch; with ``dropout``, a modality is missing from that share of the rows.

    Which one it is, and from which rows, is drawn without regard to what they hold (modality dropout): it costs no ε.
    """

    tables: Tables
    dropout: float = 0.0
    generator: torch.Generator | None = None

    def __call__(self, items: list[Item]) -> Batch:
        pictures, texts, labels = torch.tensor(items).reshape(-1, 3).T
        present = torch.ones(len(items), 2, dtype=torch.bool)
        if self.dropout:
            draw = torch.rand(len(items), generator=self.generator)
            present[draw < self.dropout / 2, 0] = False
            present[(draw >= self.dropout / 2) & (draw < self.dropout), 1] = False
        return self.tables.gather(pictures, texts, labels, present)


@torch.no_grad()
def prepare(
    rows: Rows,
    images: ImageEncoder,
    bert: Any,
    tokenizer: Any,
    *,
    below: int,
    max_tokens: int,
    lower: int | None = None,
    tokens: int = 1,
    train_images: bool = False,
    size: int = SIZE,
) -> dict[str, Records]:
    """The splits of ``rows``, run through what is frozen.

    Pictures come as maps [n, 1280, h, w], pooled to the shape of ``tokens`` image tokens; with ``train_images`` as the
    trunk's, [n, 320, s / 32, s / 32], for a model whose ``image_encoder`` is ``images.top``. Texts come as after
    ``below`` layers and, if asked for, after ``lower`` ones: see `encoders.Texts`.
    """
    every = [row for split in rows.splits.values() for row in split]
    pictures = sorted({row.picture for row in every}, key=repr)
    texts = sorted({row.text for row in every})
    maps = encode_pictures(images, pictures, size)
    if not train_images:
        maps = torch.cat([F.adaptive_avg_pool2d(images.top(chunk), SHAPES[tokens]) for chunk in maps.split(16)])
    tables = Tables(
        maps,
        encode_texts(bert, tokenizer, texts, max_tokens, below, lower),
        {picture: i for i, picture in enumerate(pictures)},
        {text: i for i, text in enumerate(texts)},
    )
    return {name: Records(split, tables) for name, split in rows.splits.items()}
