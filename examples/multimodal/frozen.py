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


class Supernet(HeadOnly):
    """The head of an MMBT that may be fused at any layer: what comes as image are features [n, layers, 2d]."""

    def __init__(self, model: MMBT) -> None:
        super().__init__(model)
        self.fusion = model.fusion

    def forward(self, image: Tensor, text: Tensor, mask: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits [n, outputs], as fused at ``fusion``."""
        return self.model.classify(image[:, self.fusion - self.model.below], present)


@torch.no_grad()
def featured(model: MMBT, records: Records) -> Records:
    """The same rows, each with its features in the place of its picture, and no text."""
    model.eval()

    def compute() -> Tensor:
        pairs = torch.stack([records.pictures, records.texts], 1)
        _, whose = pairs.unique(dim=0, return_inverse=True)  # a text with a picture, however many rows it is
        first = torch.empty(int(whose.max()) + 1, dtype=torch.long)
        first[whose] = torch.arange(len(whose))
        batches = map(records.batch, first.split(256))
        return torch.cat([model.features(b.image, b.text, b.mask, b.present) for b in batches])[whose]

    weights = [float(p.double().sum()) for p in (model.image_embeddings.project.weight, model.centre, model.map_scale)]
    made_by = [
        model.below,
        model.lower,
        model.fusion,
        model.stride,
        model.readout,
        model.skip,
        records.tables.texts.mask.shape[1],
    ]
    features = kept(
        "features", map(repr, [weights, made_by, *((row.text, row.picture) for row in records.rows)]), compute
    )
    nothing = Texts(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.long))
    made = Records([], Tables(features, nothing, {}, {}))
    made.rows, made.labels = records.rows, records.labels
    made.pictures, made.texts = torch.arange(len(records)), torch.zeros(len(records), dtype=torch.long)
    return made


def at_each_layer(model: MMBT, records: Records) -> Records:
    """`featured` rows with features [n, layers, 2d]: those that the model has if fused at the lowest layer, and on."""
    made = []
    for layer in range(model.below, model.bert.config.num_hidden_layers + 1):
        model.fusion = layer
        made.append(featured(model, records))
    made[0].tables.maps = torch.stack([each.tables.maps for each in made], dim=1)
    return made[0]


def alone(records: Records, which: int, width: int) -> Records:
    """Featured rows of which what one modality says is kept, and the other is zero: missing.

    Features are [image d, text d, the image's map, the text below d], with d = ``width``.
    """
    of_text = torch.zeros(records.tables.maps.shape[1], dtype=torch.bool)
    of_text[width : 2 * width] = of_text[-width:] = True
    features = records.tables.maps * (of_text if which == TEXT else ~of_text)
    made = Records([], replace(records.tables, maps=features))
    made.rows, made.labels, made.pictures, made.texts = records.rows, records.labels, records.pictures, records.texts
    return made
