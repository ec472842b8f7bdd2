"""The real optimizer step of a private run, as a number that can be compared with the oracle."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpkit
from tests.oracle import Losses, PyTree, norm, per_record_grads, size, take, trainable

LEARNING_RATE = {torch.float32: 2.0**14, torch.float64: 1.0}
"""A large power of two in float32, so that rounding `p - lr · g` to p's precision does not hide what is compared."""


def median_norm(model: nn.Module, losses: Losses, batch: PyTree) -> float:
    """A threshold that clips about half of the records."""
    return float(torch.stack([norm(grad) for grad in per_record_grads(model, losses, batch, size(batch))]).median())


def private_step(
    model: nn.Module,
    losses: Losses,
    batch: PyTree,
    max_grad_norm: float,
    *,
    clipping: str = "flat",
    loss_reduction: str = "mean",
    batch_first: bool = True,
    max_physical_batch_size: int | None = None,
    strict: bool = False,
) -> dict[str, Tensor]:
    """What one noiseless private step adds to each trainable parameter at learning rate 1.

    The data set is `batch` and the sample rate 1, so that every Poisson draw is the whole of it.
    """
    n = size(batch)
    parameters = trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    rate = LEARNING_RATE[next(iter(before.values())).dtype]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    loader = DataLoader(range(n), batch_size=n, collate_fn=lambda rows: take(batch, list(rows)))
    engine = dpkit.PrivacyEngine()
    private_model, private_optimizer, private_loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        loss_reduction=loss_reduction,
        batch_first=batch_first,
        max_physical_batch_size=max_physical_batch_size,
    )
    assert private_model is model
    assert private_optimizer is optimizer
    for part in private_loader:
        optimizer.zero_grad()
        values = losses(model, part)
        if strict:
            engine.backward(values)
        else:
            (values.mean() if loss_reduction == "mean" else values.sum()).backward()
        optimizer.step()
    engine.detach()
    return {name: (parameter.detach() - before[name]) / rate for name, parameter in parameters.items()}
