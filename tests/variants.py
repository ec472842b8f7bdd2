"""What else an architecture meets in use: dropout, padding on the other side, as many records as positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.cases import ModelCase
from tests.oracle import Losses, PyTree

__all__ = ["VARIANTS", "Variant", "variants"]

VARIANTS = ("plain", "dropout", "padding left", "B = T")
"""plain: dropout 0, texts padded on the right, 4 records. A model of which a part runs on one record at a time draws
its dropout in another order there, so that no same draw can be compared."""

RATE = 0.2
POSITIONS = {"whisper": 10, "wav2vec2": 19, "swin": 16, "convnext": 8, "flava": 5, "clip": 5, "siglip": 4, "vilt": 12}
"""Lengths inside models that do not read texts: frames, windows, channels, patches."""


@dataclass(frozen=True)
class Variant:
    """A model, records and one loss a record."""

    name: str
    model: nn.Module
    batch: PyTree
    losses: Losses
    n: int


def variants(
    case: ModelCase, dtype: torch.dtype = torch.float64, names: tuple[str, ...] = VARIANTS
) -> Iterator[Variant]:
    """The case in each variant that applies to it, in train mode."""

    def plain(n: int) -> Variant:
        return Variant("plain", case.model(dtype, train=True), case.records(n, dtype=dtype), case.losses, n)

    base = plain(case.n)
    if "plain" in names:
        yield base
    if "dropout" in names:
        model = case.model(dtype, train=True)
        if "apiece" not in case.tags and _with_dropout(model) and not _same(model, case.losses, base.batch):
            yield Variant("dropout", model, base.batch, _same_draw(case.losses), case.n)
    if "padding left" in names and isinstance(base.batch, dict) and "attention_mask" in base.batch:
        yield Variant("padding left", case.model(dtype, train=True), _left(base.batch), case.losses, case.n)
    if "B = T" in names:
        texts = isinstance(base.batch, dict) and "input_ids" in base.batch
        n = POSITIONS.get(case.name, base.batch["input_ids"].shape[1] if texts else 5)
        yield Variant("B = T", case.model(dtype, train=True), case.records(n, dtype=dtype), case.losses, n)


def _with_dropout(model: nn.Module) -> bool:
    """Turn on every dropout, whether it is a module or a rate that the forward reads."""
    found = False
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p, found = RATE, True
        for name, value in list(vars(module).items()):
            if "drop" in name and "layer" not in name and isinstance(value, float) and value == 0.0:
                setattr(module, name, RATE)
                found = True
    return found


def _same_draw(losses: Losses) -> Losses:
    """The losses, with the same draw of dropout in every call."""

    def seeded(model: nn.Module, batch: PyTree) -> Tensor:
        torch.manual_seed(7)
        return losses(model, batch)

    return seeded


def _same(model: nn.Module, losses: Losses, batch: PyTree) -> bool:
    """Whether two calls give the same: then there is no dropout in this path."""
    with torch.no_grad():
        return torch.equal(losses(model, batch), losses(model, batch))


def _left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Right-padded texts, and the labels of their tokens, with the padding on the left."""
    mask = batch["attention_mask"]
    shift = (mask.shape[1] - mask.sum(1))[:, None]
    source = (torch.arange(mask.shape[1]) - shift) % mask.shape[1]
    names = ["input_ids", "attention_mask", "token_type_ids"]
    names += ["labels"] if "decoder_input_ids" not in batch and batch["labels"].ndim == 2 else []
    return {k: v.gather(1, source) if k in names else v for k, v in batch.items()}
