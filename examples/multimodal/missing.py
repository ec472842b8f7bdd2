"""What is left when a modality is missing: curves over how often it is there, for each fusion layer.

The protocol is that of Ma et al. (2022): train with both, test with the text (or the image) in a share of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .metrics import Metrics, judge
from .mmbt import IMAGE, MMBT, TEXT
from .records import Records
from .train import predict

RATIOS = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0)


def presence(n: int, ratio: float, missing: str, seed: int = 0) -> Tensor:
    """[n, 2]: both modalities, but ``missing`` ("text" or "image") in the share ``ratio`` of the rows only.

    Who lacks it is one order for all ratios: those who have it at 30% are among those who have it at 50%.
    """
    present = torch.ones(n, 2, dtype=torch.bool)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    present[order[round(ratio * n) :], {"image": IMAGE, "text": TEXT}[missing]] = False
    return present


def curve(
    model: MMBT, records: Records, missing: str = "text", ratios: Sequence[float] = RATIOS
) -> dict[float, Metrics]:
    """Metrics at each available ratio. Every row is judged once with both modalities and once without the one."""
    whole = predict(model, records)
    alone = predict(model, records, presence(len(records), 0.0, missing))
    found = {}
    for ratio in ratios:
        has = presence(len(records), ratio, missing).all(1)
        logits = torch.where(has[:, None], whole, alone)
        found[ratio] = judge(logits, records.labels.tolist(), records.pairs, resamples=2)
    return found
