"""Each rank's share of a logical batch: all ranks know the whole of it, and so how every other rank cuts its share.

The units that were drawn go round: the k-th to rank k modulo W. Every rank serves as many physical batches as the one
that needs most, so that loops, schedulers and the user's own collectives stay in step; a rank with fewer units than
that serves some that are another rank's, and what they bring does not enter the sum (a `void` part).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import chain

import torch

from .ranks import Ranks
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
