"""When only the heads are trained, what they see never changes: it is computed once a row, and training is quick.

Under privacy that is more than speed. Noise falls on every trained parameter, and a head has a tenth of a layer's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .encoders import Texts, kept
from .mmbt import MMBT, TEXT
from .records import Records, Tables


class HeadOnly(nn.Module):
    """An MMBT of which the heads alone are run: what comes as image are the features [n, 2d] of whole rows."""

    def __init__(self, model: MMBT) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor, mask: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits [n, outputs]."""
        return self.model.classify(image, present)

    def trained(self, what: str) -> list[nn.Parameter]:
        """The parameters of "heads"; nothing else is run."""
        if what != "heads":
            raise ValueError(f"{what} cannot be trained on what it made before")
        return self.model.trained(what)


@torch.no_grad()
def featured(model: MMBT, records: Records) -> Records:
    """The same rows, each with its features in the place of its picture, and no text."""
    model.eval()

    def compute() -> Tensor:
        batches = map(records.batch, torch.arange(len(records)).split(256))
        return torch.cat([model.features(b.image, b.text, b.mask, b.present) for b in batches])

    weights = [float(p.double().sum()) for p in (model.image_embeddings.project.weight, model.centre, model.map_scale)]
    made_by = [model.below, model.fusion, model.stride, model.readout, model.skip, records.tables.texts.mask.shape[1]]
    features = kept(
        "features", map(repr, [weights, made_by, *((row.text, row.picture) for row in records.rows)]), compute
    )
    nothing = Texts(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.long))
    made = Records([], Tables(features, nothing, {}, {}))
    made.rows, made.labels = records.rows, records.labels
    made.pictures, made.texts = torch.arange(len(records)), torch.zeros(len(records), dtype=torch.long)
    return made


def alone(records: Records, which: int, width: int) -> Records:
    """Featured rows of which what one modality says is kept, and the other is zero: missing.

    Features are [image d, text d, the image's map], with d = ``width``.
    """
    features = records.tables.maps.clone()
    text = slice(width, 2 * width)
    kept = features[:, text].clone()
    if which == TEXT:
        features.zero_()
    features[:, text] = kept if which == TEXT else 0.0
    made = Records([], replace(records.tables, maps=features))
    made.rows, made.labels, made.pictures, made.texts = records.rows, records.labels, records.pictures, records.texts
    return made
