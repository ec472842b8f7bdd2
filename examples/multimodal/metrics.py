"""How good predictions are: accuracy and AUROC as in the Hateful Memes challenge, and whole confounder pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score
from torch import Tensor


@dataclass(frozen=True)
class Metrics:
    """Of a split.

    Attributes:
        accuracy: the share of rows that the most likely class is right on.
        auroc: of two classes, how well they are ranked; None for more classes.
        pairs: the share of confounder pairs of which all rows are right; None where there are no pairs.
        auroc_pm: half the width of a 95% bootstrap interval over pairs of rows (or units).
    """

    accuracy: float
    auroc: float | None = None
    pairs: float | None = None
    auroc_pm: float | None = None


def judge(logits: Tensor, labels: Sequence[int], pairs: Sequence[str] | None = None, resamples: int = 200) -> Metrics:
    """Metrics of logits [n, classes]; ``pairs`` names each row's pair."""
    y = np.asarray(labels)
    right = logits.argmax(1).numpy() == y
    accuracy = float(right.mean())
    consistent = pair_consistency(right, pairs) if pairs is not None else None
    if logits.shape[1] != 2:
        return Metrics(accuracy, pairs=consistent)
    score = (logits[:, 1] - logits[:, 0]).double().numpy()
    whose = np.asarray(pairs if pairs is not None else range(len(y)))
    return Metrics(accuracy, float(roc_auc_score(y, score)), consistent, _plus_minus(y, score, whose, resamples))


def pair_consistency(right: np.ndarray, pairs: Sequence[str]) -> float | None:
    """The share of pairs (of two rows or more) of which every row is right."""
    rows: dict[str, list[bool]] = {}
    for one, name in zip(right.tolist(), pairs, strict=True):
        rows.setdefault(name, []).append(one)
    whole = [all(of) for of in rows.values() if len(of) > 1]
    return float(np.mean(whole)) if whole else None


def _plus_minus(y: np.ndarray, score: np.ndarray, whose: np.ndarray, resamples: int) -> float:
    """Half a bootstrap interval; all rows of a pair are drawn together, or it would be too narrow."""
    _, inverse = np.unique(whose, return_inverse=True)
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    rng = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        index = np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))])
        if 0 < y[index].sum() < len(index):
            found.append(roc_auc_score(y[index], score[index]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(high - low) / 2
