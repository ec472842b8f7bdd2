"""Tables whose parameters are only ever looked up.

Letters: n record (bag), t entry of a bag, v row of the table, d width.

`embedding_bag` looks every entry up once and reduces the rows, so its per-sample gradient is the list of rows that were
touched, [n, t, d], and never [n, v, d]; equal entries of one record add up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """What ``torch.nn.functional.embedding_bag`` computes: [n, t] or [Σt] with ``offsets`` [n], to [n, d].

    Raises:
        ValueError: ``max_norm`` (it changes the table by what the records are) or ``scale_grad_by_freq`` (it divides a
            record's gradient by a count over all records).
    """
    _refuse("embedding_bag", max_norm, scale_grad_by_freq)
    if mode not in ("sum", "mean", "max") or (per_sample_weights is not None and mode != "sum"):
        raise ValueError(f'mode {mode!r}: use "sum", "mean" or "max"; per_sample_weights go with "sum" only')
    if input.dim() == 2:
        if offsets is not None:
            raise ValueError("2-D input [n, t] has its bags as rows; leave offsets out")
        there = torch.ones_like(input, dtype=torch.bool)
    else:
        if offsets is None or (len(offsets) and int(offsets[0]) != 0):
            raise ValueError("1-D input needs offsets [n]: where each bag begins, the first one at 0")
        input, there, per_sample_weights = _rows(input, offsets, include_last_offset, per_sample_weights)
    if padding_idx is not None:
        there = there & (input != padding_idx % weight.shape[0])
    rows = F.embedding(input, weight, sparse=sparse)  # [n, t, d]
    if mode == "max":
        if input.shape[1] == 0:
            return rows.sum(1)
        top = rows.masked_fill(~there[..., None], float("-inf"))
        first = top.detach().max(1, keepdim=True).indices  # ties: the first entry alone, as torch does
        return top.gather(1, first).squeeze(1).masked_fill(~there.any(1, keepdim=True), 0.0)
    share = there.to(rows.dtype) if per_sample_weights is None else per_sample_weights * there
    if mode == "mean":
        share = share / there.sum(1, keepdim=True).clamp(min=1)
    return (share[:, None] @ rows).squeeze(1)


def _rows(input: Tensor, offsets: Tensor, last: bool, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bags laid end to end as rows [n, t], which entries are there, and their weights.

    t is even, so that it never changes from n to n - 1 when a record is left out: who looks for the dimension of the
    records by leaving one out finds one only.
    """
    end = torch.full_like(offsets[:1], len(input))
    bounds = offsets if last else torch.cat([offsets, end])
    start, size = bounds[:-1, None], bounds.diff()[:, None]
    longest = int(size.max()) if len(size) else 0
    t = torch.arange(longest + longest % 2, device=input.device)
    there = t < size
    where = torch.where(there, start + t, 0)
    return input[where], there, None if weights is None else weights[where]


def _refuse(what: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None or scale_grad_by_freq:
        raise ValueError(
            f"{what} with max_norm={max_norm}, scale_grad_by_freq={scale_grad_by_freq}: the first changes the "
            "table by what the records are, the second couples records by their counts. Leave them out."
        )


class Embedding(nn.Embedding):
    """``torch.nn.Embedding``: same constructor, parameters and results, without the two options that couple records.

    Raises:
        ValueError: ``max_norm`` or ``scale_grad_by_freq``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse("Embedding", self.max_norm, self.scale_grad_by_freq)


class EmbeddingBag(nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag``: same constructor, parameters and results, by `embedding_bag`; without the two options
    that couple records.

    Raises:
        ValueError: ``max_norm`` or ``scale_grad_by_freq``.

    >>> bag = EmbeddingBag(6, 4, mode="sum")
    >>> list(bag(torch.tensor([[0, 0, 5], [1, 2, 3]])).shape)
    [2, 4]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse("EmbeddingBag", self.max_norm, self.scale_grad_by_freq)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """See ``torch.nn.EmbeddingBag.forward``."""
        how: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("max_norm", "scale_grad_by_freq", "mode", "sparse", "include_last_offset", "padding_idx")
        }
        return embedding_bag(input, self.weight, offsets, per_sample_weights=per_sample_weights, **how)
