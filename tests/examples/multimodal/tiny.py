"""Tiny random models and data in the place of the pre-trained ones."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from examples.multimodal.data import Row, Rows
from examples.multimodal.encoders import Texts
from examples.multimodal.mmbt import MMBT
from examples.multimodal.records import Batch, Records, Tables

WORDS, WIDTH, LAYERS, CHANNELS = 30, 16, 3, 6


def bert(layers: int = LAYERS, width: int = WIDTH, seed: int = 0) -> transformers.BertModel:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=24,
        type_vocab_size=2,
    )
    return transformers.BertModel(config).eval()


def image_encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1), nn.GroupNorm(2, CHANNELS), nn.ReLU())


def mmbt(outputs: int = 2, **options: Any) -> MMBT:
    """On pictures of 3 × 12 × 12 and token ids; with heads that are not zero, so that gradients reach everything."""
    options.setdefault("image_encoder", image_encoder())
    model = MMBT(bert(), CHANNELS, outputs, special=(1, 2), **options).eval()
    torch.manual_seed(1)
    for p in model.heads.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def batch(n: int = 6, t: int = 5, below: bool = False) -> Batch:
    """Rows of different lengths, some without a modality."""
    torch.manual_seed(2)
    mask = (torch.arange(t) < torch.randint(2, t + 1, (n, 1))).long()
    text = torch.randn(n, t, WIDTH) if below else torch.randint(3, WORDS, (n, t)) * mask
    present = torch.ones(n, 2, dtype=torch.bool)
    if n > 2:
        present[1, 0], present[2, 1] = False, False
    return Batch(torch.randn(n, 3, 12, 12), text, mask, present, torch.randint(2, (n,)))


def xor_records(rows: Rows, seed: int = 0) -> dict[str, Records]:
    """Records whose text states hold one bit and whose picture maps another one, with noise; the rows' texts and
    pictures say which. Nothing is loaded."""
    torch.manual_seed(seed)
    every = [row for split in rows.splits.values() for row in split]
    texts, pictures = sorted({row.text for row in every}), sorted({row.picture for row in every}, key=repr)
    axis = torch.randn(WIDTH)
    hidden = torch.stack([torch.randn(4, WIDTH) * 0.1 + axis * (1 if text[0] == "1" else -1) for text in texts])
    side = torch.randn(CHANNELS, 1, 1)
    maps = torch.stack([torch.randn(CHANNELS, 2, 2) * 0.1 + side * (1 if p.codes[0] == "1" else -1) for p in pictures])
    tables = Tables(
        maps,
        Texts(hidden, torch.ones(len(texts), 4, dtype=torch.long)),
        {picture: i for i, picture in enumerate(pictures)},
        {text: i for i, text in enumerate(texts)},
    )
    return {name: Records(split, tables) for name, split in rows.splits.items()}


def xor_rows(train: int = 200, test: int = 100) -> Rows:
    """Each text with both pictures: a unit and a pair of two rows."""
    from examples.multimodal.pictures import Picture

    def split(name: str, texts: int) -> list[Row]:
        return [
            Row(
                f"{i % 2} {name} {i}",
                Picture((str(j), str(i % 7))),
                int(i % 2 != j),
                name,
                f"{name} {i}",
                f"{name} {i}",
                "image",
            )
            for i in range(texts)
            for j in (0, 1)
        ]

    return Rows("xor", {"train": split("train", train // 2), "test": split("test", test // 2)})


def losses(model: nn.Module, rows: Any) -> Tensor:
    """For the oracle: one loss a row."""
    rows = Batch(*rows)
    return torch.nn.functional.cross_entropy(
        model(rows.image, rows.text, rows.mask, rows.present), rows.label, reduction="none"
    )
