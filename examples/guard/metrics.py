"""How good scores are: overall, for each category, at a threshold; always with the prevalence, which a guess reaches.

The three ways of judging many categories are those of Llama Guard (Inan et al., 2023): *max-all* asks whether anything
is violated, *one-vs-all* whether this category is, and *one-vs-benign* the same with the other categories' violations
left out, which is easier, since those are the ones that look alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """Binary decisions on n records.

    Attributes:
        prevalence: the share of positives, which is the AUPRC of a guess.
        auprc, auroc: NaN where there are no positives (or no negatives).
        auprc_low, auprc_high: a 95% bootstrap interval over the records.
        precision, recall, f1, fpr: of the decision score ≥ threshold; precision and F1 are 0 where nothing is flagged.
        ece: expected calibration error, in ten bins of equal width.
    """

    n: int
    prevalence: float
    auprc: float
    auprc_low: float
    auprc_high: float
    auroc: float
    threshold: float
    precision: float
    recall: float
    f1: float
    fpr: float
    ece: float


def judge(labels: ArrayLike, scores: ArrayLike, threshold: float = 0.5, resamples: int = 500) -> Metrics:
    """Metrics of ``scores`` [n] (P(unsafe)) against ``labels`` [n] (1 is unsafe)."""
    y, p = np.asarray(labels).astype(int), np.asarray(scores, dtype=float)
    if y.shape != p.shape or y.ndim != 1 or not len(y):
        raise ValueError(f"labels {y.shape} and scores {p.shape}: expected two equally long, non-empty lists.")
    if not np.isfinite(p).all():
        raise ValueError("a score is not finite; no metric of it would mean anything.")
    positives = int(y.sum())
    flagged = p >= threshold
    hits = int((flagged & (y == 1)).sum())
    precision = hits / max(1, int(flagged.sum()))
    recall = hits / positives if positives else float("nan")
    low, high = bootstrap(y, p, resamples)
    return Metrics(
        n=len(y),
        prevalence=positives / len(y),
        auprc=_auprc(y, p),
        auprc_low=low,
        auprc_high=high,
        auroc=float(roc_auc_score(y, p)) if 0 < positives < len(y) else float("nan"),
        threshold=threshold,
        precision=precision,
        recall=recall,
        f1=2 * hits / max(1, int(flagged.sum()) + positives),
        fpr=float(flagged[y == 0].mean()) if positives < len(y) else float("nan"),
        ece=calibration_error(y, p),
    )


def _auprc(y: NDArray[np.int_], p: Array) -> float:
    return float(average_precision_score(y, p)) if y.any() else float("nan")


def bootstrap(labels: ArrayLike, scores: ArrayLike, resamples: int = 500, level: float = 0.95) -> tuple[float, float]:
    """An interval for AUPRC: quantiles over records drawn again, with replacement; draws without positives left out."""
    y, p = np.asarray(labels).astype(int), np.asarray(scores, dtype=float)
    draws = np.random.default_rng(0).integers(len(y), size=(resamples, len(y)))
    found = [_auprc(y[i], p[i]) for i in draws if y[i].any()]
    if not found:
        return float("nan"), float("nan")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def calibration_error(labels: ArrayLike, scores: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: |share of positives - mean score|, averaged over bins by their records."""
    y, p = np.asarray(labels, dtype=float), np.asarray(scores, dtype=float)
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = [abs(y[place == b].sum() - p[place == b].sum()) for b in np.unique(place)]
    return float(sum(gaps) / len(y))


# ------------------------------------------------------------------------------------------- many categories


def max_all(violated: ArrayLike, scores: ArrayLike, threshold: float = 0.5) -> Metrics:
    """Whether anything is violated: the largest of a record's scores [n, c] against any of its labels [n, c]."""
    return judge(np.asarray(violated).any(1), np.asarray(scores).max(1), threshold)


def one_vs_all(
    violated: ArrayLike, scores: ArrayLike, names: Sequence[str], threshold: float = 0.5, resamples: int = 500
) -> dict[str, Metrics]:
    """For each category, its own scores against its own labels; everything else is negative."""
    v, s = _both(violated, scores, names)
    return {name: judge(v[:, k], s[:, k], threshold, resamples) for k, name in enumerate(names)}


def one_vs_benign(
    violated: ArrayLike,
    scores: ArrayLike,
    names: Sequence[str],
    benign: ArrayLike | None = None,
    threshold: float = 0.5,
    resamples: int = 500,
) -> dict[str, Metrics]:
    """For each category, its violations against the records that violate nothing; the others' are left out.

    Args:
        benign: [n], which records violate nothing, where ``violated`` does not tell (unsafe, of unknown category).
    """
    v, s = _both(violated, scores, names)
    nothing = ~v.any(1) if benign is None else np.asarray(benign, dtype=bool)
    kept = {name: nothing | v[:, k] for k, name in enumerate(names)}
    return {
        name: judge(v[kept[name], k], s[kept[name], k], threshold, resamples)
        for k, name in enumerate(names)
        if kept[name].any()
    }


def _both(violated: ArrayLike, scores: ArrayLike, names: Sequence[str]) -> tuple[NDArray[np.bool_], Array]:
    v, s = np.asarray(violated, dtype=bool), np.asarray(scores, dtype=float)
    if v.shape != s.shape or v.ndim != 2 or v.shape[1] != len(names):
        raise ValueError(f"labels {v.shape}, scores {s.shape}, {len(names)} names: expected [n, c], [n, c] and c.")
    return v, s


# ------------------------------------------------------------------------------------------------ thresholds


def threshold_at_fpr(labels: ArrayLike, scores: ArrayLike, fpr: float) -> float:
    """The lowest threshold whose false positive rate on these records is at most ``fpr``.

    Choose it on records that are not private (or account for it): a threshold is a number learned from data.
    """
    rates, _, thresholds = roc_curve(np.asarray(labels).astype(int), np.asarray(scores, float), drop_intermediate=False)
    return float(thresholds[np.flatnonzero(rates <= fpr)[-1]])


def threshold_for_f1(labels: ArrayLike, scores: ArrayLike) -> float:
    """The threshold with the best F1 on these records."""
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[np.argmax(f1[:-1])])


def within(private: Mapping[str, float], free: Mapping[str, float], share: float = 0.05) -> dict[str, bool]:
    """Whether each private figure is within ``share`` of its counterpart without privacy."""
    return {name: private[name] >= (1 - share) * free[name] for name in free}
