"""Each rank's share of a logical batch: all ranks know the whole of it, and so how every other rank cuts its share.

The units that were drawn go round: the k-th to rank k modulo W. Every rank serves as many physical batches as the one
that needs most, so that loops, schedulers and the user's own collectives stay in step; a rank with fewer units than
that serves some that are another rank's, and what they bring does not enter the sum (a `void` part).
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import randomness
from .ranks import Ranks
from .sharded import holds_rows
from .trees import leaves
from .units import packed

Part = list[list[int]]  # the rows of each unit of a physical batch


def shared(drawn: Sequence[list[int]], limit: int | None, ranks: Ranks) -> tuple[list[Part], int]:
    """This rank's physical batches of a logical batch, and how many of them count; the rest, at the end, are void.

    Args:
        drawn: the rows of every unit that was drawn, by whichever rank they will be worked on.
        limit: the most rows of a physical batch; no unit is split.
    """
    if ranks.size == 1 or not drawn:
        parts = packed(drawn, limit)
        return parts, len(parts)
    every = [packed(drawn[r :: ranks.size], limit) for r in range(ranks.size)]
    most = max(len(parts) for parts in every)
    mine = [part for part in every[ranks.rank] if part]
    while len(mine) < most and any(len(part) > 1 for part in mine):
        k = max(range(len(mine)), key=lambda j: len(mine[j]))
        half = len(mine[k]) // 2
        mine[k : k + 1] = [mine[k][:half], mine[k][half:]]
    void = [drawn[ranks.rank % len(drawn)]]
    return [*mine, *[void] * (most - len(mine))], len(mine)


def mark_of(drawn: Sequence[list[int]]) -> int:
    """32 bits that tell one logical batch from another."""
    return zlib.crc32(torch.tensor(list(chain(*drawn)), dtype=torch.int64).numpy().tobytes())


def same_weights(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the parameters and buffers of rank 0, as torch's DistributedDataParallel does."""
    with torch.no_grad():
        held = [t for t in (*model.parameters(), *model.buffers()) if t.numel() and not holds_rows(t)]
        copies = [t.detach().contiguous() for t in held]
        ranks.hand_out(copies)
        for t, copy in zip(held, copies, strict=True):
            if copy.data_ptr() != t.data_ptr():
                t.copy_(copy)


def refuse_other_data(dataset: Any, ranks: Ranks) -> None:
    """Raise unless the ranks hold the same data, in the same order, as far as some rows tell.

    Who is drawn is a position in the data set. Where two ranks have different orders (a random_split without a seed),
    a record could be drawn under two positions, and enter a step twice. Rows that are not the same when they are read
    twice from the same chance are not compared.
    """
    if ranks.size == 1:
        return
    n = len(dataset)
    some = sorted({round(j * (n - 1) / (_LOOKED_AT - 1)) for j in range(_LOOKED_AT)})
    chance = randomness.capture()
    try:
        once, twice = ([_mark(_row(dataset, k)) for k in some] for _ in range(2))
    finally:
        randomness.restore(chance)
    marks = {f"row {k}": a if a == b else "chance" for k, a, b in zip(some, once, twice, strict=True)}
    ranks.agree("the data set", rows=n, **marks)
    ranks.done()


_LOOKED_AT = 16


def _row(dataset: Any, k: int) -> Any:
    """Row k, read with chance that is the same on every rank."""
    torch.manual_seed(k)
    random.seed(k)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(k)
    return dataset[k]


def _mark(row: Any) -> int:
    mark = 0
    for leaf in leaves(row):
        if isinstance(leaf, Tensor):
            raw = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(leaf, bool | int | float | str | bytes):
            raw = repr(leaf).encode()
        else:  # arrays and pictures have bytes; of other objects the kind alone is compared
            tobytes = getattr(leaf, "tobytes", None)
            raw = tobytes() if callable(tobytes) else type(leaf).__name__.encode()
        mark = zlib.crc32(raw, mark)
    return mark
