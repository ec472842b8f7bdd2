"""How several ranks begin: asked for the same, with the same data, with rank 0's weights; it keeps the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import ConfigurationError
from .fingerprint import marks_of
from .ranks import Ranks
from .sharded import Shards, holds_rows
from .spending import Spending


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
    ranks.agree("the data set", rows=len(dataset), **marks_of(dataset))
    ranks.done()
