"""The training loop, the same with privacy and without; the two added lines are marked.

How many units there are is taken to be public: the sampling rate and the number of steps follow from it.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dpkit


@dataclass(frozen=True)
class Recipe:
    """What all runs share: no run chooses anything from the data."""

    epochs: int
    batch_size: int  # large: the noise is added once a batch, whatever its size
    lr: float
    optimizer: str = "sgd"  # with momentum 0.9, or "adam"
    max_grad_norm: float = 1.0
    average: bool = False  # end with the mean of the weights after the second half of the steps: it costs no ε


@dataclass(frozen=True)
class Privacy:
    """The budget, and whose presence it hides."""

    epsilon: float
    delta: float
    units: Sequence[Any] | None = None  # one id for each row


@dataclass
class Run:
    """What one training run left behind."""

    name: str
    epsilon: float = math.inf  # spent at the end
    delta: float | None = None
    noise_multiplier: float | None = None
    epsilons: list[float] = field(default_factory=list)  # spent after each step; empty without privacy
    statement: str = ""
    steps: int = 0
    seconds_per_step: float = 0.0  # of the processor, all of the loop
    peak_mib: float = 0.0  # the process's largest resident memory until then


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    losses_of: Callable[..., Tensor],
    recipe: Recipe,
    privacy: Privacy | None = None,
    *,
    seeds: tuple[int, int],
    collate: Callable[[Any], Any] | None = None,
) -> Run:
    """Train ``model`` in place, by ``losses_of(model, *batch)`` [n]; without ``privacy``, by the same loop."""
    drawing, noise = (torch.Generator().manual_seed(seed) for seed in seeds)
    trained = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, lr=recipe.lr)
    else:
        optimizer = torch.optim.SGD(trained, lr=recipe.lr, momentum=0.9)
    loader = DataLoader(dataset, recipe.batch_size, shuffle=True, generator=drawing, collate_fn=collate)
    run, engine = Run("no privacy"), None
    if privacy is not None:
        engine = dpkit.PrivacyEngine()  # ← the first added line, and the second:
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=privacy.epsilon,
            target_delta=privacy.delta,
            epochs=recipe.epochs,
            max_grad_norm=recipe.max_grad_norm,
            privacy_unit=privacy.units,  # all rows of a unit together count as one
            noise_generator=noise,  # a known seed is known noise: give no generators to release a model
        )
        run = Run(f"ε = {privacy.epsilon:g}", delta=privacy.delta, noise_multiplier=engine.noise_multiplier)
    steps = recipe.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    means = [p.detach().clone() for p in trained] if recipe.average else []
    start = time.process_time()
    for _ in range(recipe.epochs):
        for batch in loader:
            loss = losses_of(model, *batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            run.steps += 1
            late = run.steps - steps // 2
            for mean, p in zip(means if late > 0 else [], trained, strict=False):
                mean.lerp_(p.detach(), 1 / late)
            if engine is not None:
                run.epsilons.append(engine.get_epsilon())
    run.seconds_per_step = (time.process_time() - start) / max(1, run.steps)
    run.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if engine is not None:
        run.epsilon, run.statement = engine.get_epsilon(), str(engine.statement())
        engine.detach()
    with torch.no_grad():
        for p, mean in zip(trained, means, strict=False):
            p.copy_(mean)
    return run


def seeds_of(seed: int, run: int) -> tuple[int, int]:
    """Seeds for who is drawn and for the noise: unrelated streams, in each run anew, or ε would not hold."""
    drawing, noise = np.random.SeedSequence((seed, run)).generate_state(2, np.uint32)
    return int(drawing), int(noise)
