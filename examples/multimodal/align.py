"""Public preparation of the image side: pictures of the emoji catalogue, told in the text encoder's own terms.

Unicode's list of emoji, with names and tags, is public. A ridge regression from an emoji's picture to what MiniLM makes
of its name and tags lets an image token arrive as if the words had been read. It is solved in closed form, before any
private data is touched, so it costs no ε; and noise is not spent on learning what a happy face is called.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoders import ImageEncoder, encode_pictures, encode_texts, kept
from .mmbt import BELOW, IMAGE, MMBT, TEXT, Product
from .pictures import SIZE, STYLES, Picture, catalogue


@torch.no_grad()
def align(
    model: MMBT,
    images: ImageEncoder,
    tokenizer: Any,
    *,
    without: Collection[str] = (),
    ridge: float = 0.3,
    size: int = SIZE,
    max_tokens: int = 32,
) -> float:
    """Set ``model``'s image projection and its centre; returns the share of the variance that is explained (R²).

    The centre is the mean of what the heads see of the catalogue's pictures and names: all pictures have much in
    common, and what does not tell them apart would drown what does. Taken from public data, it costs no ε either. Nor
    does what a head that multiplies reads in a text at first: the principal axes of the catalogue's names.

    Args:
        without: hexcodes that are not looked at (emoji that a test wants unseen).
        ridge: the penalty, as a share of the features' mean variance.
    """
    names = [f"{entry['label']}, {', '.join(entry['tags'])}" for entry in catalogue()]
    texts = encode_texts(model.bert, tokenizer, names, max_tokens, model.below, model.lower)
    states = texts.hidden[..., : model.centre.shape[1]]  # above ``below`` layers
    inner = texts.mask.bool().clone()
    inner[:, 0] = False  # [CLS]
    inner[torch.arange(len(inner)), texts.mask.sum(1) - 1] = False  # [SEP]
    meant = (states * inner[..., None]).sum(1) / inner.sum(1, keepdim=True).clamp(min=1)
    norm = model.image_embeddings.norm
    meant = (meant - norm.bias) / norm.weight  # what the norm, which comes after the projection, makes this of
    meant = (meant - meant.mean(1, keepdim=True)) / meant.std(1, keepdim=True)
    seen = torch.tensor([entry["hexcode"] not in without for entry in catalogue()]).repeat(len(STYLES))
    features, meant = catalogue_features(images, size)[seen], meant.repeat(len(STYLES), 1)[seen]
    weight, bias, explained = ridge_regression(features, meant, ridge)
    model.image_embeddings.project.weight.copy_(weight)
    model.image_embeddings.project.bias.copy_(bias)
    model.map_mean.copy_(features.mean(0))
    model.map_scale.copy_(features.std(0).clamp(min=0.05))
    if model.readout != "cls":
        model.centre.zero_()
        maps, mask = features[: len(texts.mask), :, None, None], texts.mask[seen[: len(names)]]
        hidden = texts.hidden[seen[: len(names)]]
        chunks = torch.arange(len(mask)).split(256)
        each = torch.cat([model.features(maps[i], hidden[i], mask[i], apart(len(i))) for i in chunks])
        alone = torch.cat([model.features(maps[i], hidden[i], mask[i], apart(len(i), 1)) for i in chunks])
        width = model.centre.shape[1]
        model.centre[IMAGE] = each[:, :width].mean(0) / width**0.5
        model.centre[TEXT] = alone[:, width : 2 * width].mean(0) / width**0.5
        if model.skip:
            model.centre[BELOW] = alone[:, -width:].mean(0) / width**0.5
        said = [_towards(alone[:, width : 2 * width], model.centre[TEXT])]
        said += [_towards(alone[:, -width:], model.centre[BELOW])] if model.skip else []
        for head in model.heads.values():
            if isinstance(head, Product):
                head.read(components(torch.cat(said, dim=1), len(head.text.weight))[1])
    return explained


def _towards(seen: Tensor, centre: Tensor) -> Tensor:
    """What heads see [n, d], made without a centre, as it is with one."""
    return F.normalize(seen / seen.shape[-1] ** 0.5 - centre, dim=-1) * seen.shape[-1] ** 0.5


def apart(n: int, which: int = IMAGE) -> Tensor:
    """[n, 2]: one modality alone is present."""
    return torch.arange(2).eq(which).expand(n, 2)


def catalogue_features(images: ImageEncoder, size: int = SIZE) -> Tensor:
    """The features of all public emoji [styles * emoji, 1280]: the whole catalogue in one style, then in the next."""
    shown = [Picture((entry["hexcode"],), style) for style in STYLES for entry in catalogue()]
    return kept(
        "catalogue", [str(size), *map(repr, shown)], lambda: pooled(images, encode_pictures(images, shown, size))
    )


@torch.no_grad()
def pooled(images: ImageEncoder, maps: Tensor) -> Tensor:
    """The trunk's maps as one vector a picture [n, 1280]."""
    return torch.cat([images.top(chunk).mean((2, 3)) for chunk in maps.split(16)])


def ridge_regression(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Weight [out, in], bias [out] and R² of the penalised least-squares map from x [n, in] to y [n, out]."""
    centre_x, centre_y = x.mean(0), y.mean(0)
    x, y = (x - centre_x).double(), (y - centre_y).double()
    penalty = ridge * x.square().sum() / x.shape[1]
    solved = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    explained = 1 - float((y - x @ solved).square().sum() / y.square().sum())
    weight = solved.T.float()
    return weight, centre_y - weight @ centre_x, explained


def components(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean [d] and the first k principal axes [d, k] of x [n, d], scaled so that x comes out with variance 1."""
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((x - mean).T))
    return mean, vectors[:, -k:] / values[-k:].clamp(min=1e-9).sqrt()
