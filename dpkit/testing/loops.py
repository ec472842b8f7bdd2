"""A whole training loop: does adding or removing one record move its step by at most C?"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from dpkit.engine import PrivacyEngine

Loop = Callable[[PrivacyEngine, nn.Module, torch.optim.Optimizer, DataLoader[Any]], object]
"""A training loop over one pass of the loader, on what `PrivacyEngine.make_private` returned."""


def released(
    model: nn.Module,
    dataset: Dataset[Any],
    loop: Loop,
    *,
    max_grad_norm: float = 1.0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Any,
) -> Tensor:
    """f(D): what one pass of ``loop`` over all records releases before noise, as one flat float64 vector [p].

    Every record of ``dataset`` takes part (the sampling rate is 1), the noise is 0, and the optimizer is plain SGD, so
    what the parameters move by, times the expected batch size, is the sum of clipped gradients.

    Args:
        model: is copied.
        loop: called as ``loop(engine, model, optimizer, loader)``; makes one pass over the loader.
        options: more arguments of `PrivacyEngine.make_private`.

    Raises:
        AssertionError: the loop took another number of steps than one.
    """
    model = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = (
        1.0 if all(p.dtype == torch.float64 for p in trained) else 2.0**14
    )  # so that rounding p - rate · g hides little
    optimizer = torch.optim.SGD(trained, lr=rate)
    size = len(dataset)  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=size, collate_fn=collate_fn)
    engine = PrivacyEngine(accountant="rdp")
    before = torch.cat([p.detach().double().flatten() for p in trained])
    _, _, private = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        **options,
    )
    try:
        loop(engine, model, optimizer, private)
        steps = sum(count for _, count in engine.accountant.ledger)
        if steps != 1:
            raise AssertionError(f"the loop took {steps} steps on a loader that serves one logical batch")
        after = torch.cat([p.detach().double().flatten() for p in trained])
        return (before - after) / rate * engine.expected_batch_size
    finally:
        engine.detach()


def check_loop(
    model: nn.Module,
    dataset: Dataset[Any],
    loop: Loop,
    *,
    max_grad_norm: float = 1.0,
    records: Iterable[int] | None = None,
    **options: Any,
) -> float:
    """Leave out one record after the other: ‖f(D ∪ {x}) − f(D)‖ ≤ C, on the real optimizer step.

    It needs no knowledge of the model or the loss, and sees what the loop does between the loader and the step: a loss
    that is averaged over the batch's tokens, a label smoothed with the batch's mean, records that are repeated.

    Args:
        model, dataset, loop, options: as in `released`; the data set has at least two records.
        records: the records to leave out, by number; all by default.

    Returns:
        The largest ‖f(D ∪ {x}) − f(D)‖ / C that was seen.

    Raises:
        AssertionError: a record moves the step by more than C, or the loop takes more than one step.

    >>> data = torch.utils.data.TensorDataset(torch.randn(6, 4), torch.randn(6, 1))
    >>> def loop(engine, model, optimizer, loader):
    ...     for x, y in loader:
    ...         optimizer.zero_grad()
    ...         (model(x) - y).square().mean().backward()
    ...         optimizer.step()
    >>> check_loop(nn.Linear(4, 1), data, loop, max_grad_norm=0.1) <= 1.001
    True
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size < 2:
        raise ValueError("check_loop leaves records out: it needs at least two")
    whole = released(model, dataset, loop, max_grad_norm=max_grad_norm, **options)
    slack = 1e-5 if next(model.parameters()).dtype == torch.float64 else 1e-3
    worst = 0.0
    for x in range(size) if records is None else records:
        rest: Dataset[Any] = Subset(dataset, list(itertools.chain(range(x), range(x + 1, size))))
        gap = float((whole - released(model, rest, loop, max_grad_norm=max_grad_norm, **options)).norm())
        if not gap <= max_grad_norm * (1 + slack):
            raise AssertionError(
                f"record {x} moves the step by {gap:.4g}, more than max_grad_norm = {max_grad_norm:g}: clipping its "
                "own gradient does not bound its influence. Look for what mixes records between loader and step."
            )
        worst = max(worst, gap / max_grad_norm)
    return worst
