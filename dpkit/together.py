"""How several ranks begin: asked for the same, with the same data, with rank 0's weights; it keeps the ledger."""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import randomness
from .errors import ConfigurationError
from .ranks import Ranks
from .sharded import Shards, holds_rows
from .spending import Spending
from .trees import leaves


def begin_together(
    ranks: Ranks, model: nn.Module, dataset: Any, spending: Spending, configuration: Mapping[str, Any]
) -> None:
    """Raise on all ranks unless all were asked for the same; else give all of them what rank 0 has."""
    budget = spending.budget
    limit = None if budget is None else [budget.max_epsilon, budget.delta]
    ranks.agree("make_private", **configuration, max_epsilon=limit)
    ranks.done()
    refuse_other_data(dataset, ranks)
    if not ranks.first:
        spending.leave_ledger()
    spending.mirror(ranks.decide(spending.state_dict))
    same_weights(model, ranks)


def refuse_own_sizes(shards: Shards | None, auto: bool) -> None:
    """Raise where ranks would find sizes of physical batches of their own, and parameters are sharded."""
    if shards is not None and auto:
        raise ConfigurationError(
            'max_physical_batch_size="auto" with parameters that are sharded (fully_shard)',
            why="every rank finds a size of its own, and ranks that run forwards differently often wait for each other "
            "for ever.",
            cure="give a number.",
        )


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
