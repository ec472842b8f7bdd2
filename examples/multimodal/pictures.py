"""Pictures: an emoji in one of two drawing styles, a montage of several, or a file; as bytes for an image encoder."""

from __future__ import annotations

import functools
import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
STYLES = ("noto", "twemoji")
MISSING = 128
"""The grey of an image that is not there."""
SIZE = 224
"""The side of a picture as it is read, in pixels: that of the images EfficientNet-Lite0 was trained on."""


@dataclass(frozen=True)
class Picture:
    """What is shown: emoji by their hexcodes (up to nine, in a square), or the file at ``path``; neither is grey."""

    codes: tuple[str, ...] = ()
    style: str = "noto"
    background: str = "#ffffff"
    path: str | None = None

    def draw(self, size: int) -> Image.Image:
        """The picture, ``size`` pixels square."""
        if self.path is not None:
            with Image.open(self.path) as image:
                return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        if not self.codes:
            return Image.new("RGB", (size, size), (MISSING,) * 3)
        side = math.ceil(math.sqrt(min(len(self.codes), 9)))
        cell = size // side
        square = Image.new("RGB", (size, size), self.background)
        for i, code in enumerate(self.codes[:9]):
            square.paste(_emoji(code, self.style, self.background, cell), (i % side * cell, i // side * cell))
        return square


def pixels(pictures: Sequence[Picture], size: int) -> Tensor:
    """The pictures as bytes [n, 3, size, size]."""
    stacked = np.stack([np.asarray(picture.draw(size)) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


@functools.cache
def catalogue() -> list[dict[str, Any]]:
    """The emoji of Unicode that have a picture: hexcode, label, tags, group, split."""
    return [json.loads(line) for line in _archive().read("index.jsonl").decode("utf-8").splitlines()]


@functools.cache
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(DATA / "emoji_mm_64.zip")


@functools.lru_cache(maxsize=4096)
def _transparent(code: str, style: str) -> Image.Image:
    return Image.open(io.BytesIO(_archive().read(f"{style}/{code}.webp"))).convert("RGBA")


def _emoji(code: str, style: str, background: str, size: int) -> Image.Image:
    image = _transparent(code, style)
    base = Image.new("RGBA", image.size, background)
    base.alpha_composite(image)
    return base.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
