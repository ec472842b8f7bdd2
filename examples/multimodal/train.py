"""One training run: an ordinary loop, and the lines that make it private.

Without privacy the same loop runs on the same recipe; the parts of the model are unfrozen while it trains, and the
engine follows: what is trained is clipped together, what is not gets no noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import dpkit
from dpkit.accountants import Event

from .metrics import Metrics, judge
from .mmbt import IMAGE, MMBT, TEXT
from .private import noise_for
from .records import Batch, Collate, Records


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        batch_size: units (documents, pairs) a step; all of a unit's rows come with it, up to ``max_rows_per_unit``.
        epochs: passes over the units.
        lr: of the parts of the model, by their names (see `MMBT.trained`).
        unfreeze: after which share of the steps a part starts to train; from the first one where it is not named.
        dropout: from which share of the rows a modality is taken while training.
        weight_decay: of the heads (AdamW's: a step takes lr × this from a weight).
        tasks: whether each row is also classified from each modality alone, by heads of their own.
    """

    batch_size: int = 64
    epochs: int = 3
    lr: dict[str, float] = field(default_factory=lambda: {"heads": 2e-3, "project": 1e-3, "text": 2e-4})
    unfreeze: dict[str, float] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    clipping: str = "flat"
    max_rows_per_unit: int = 4
    weight_decay: float = 0.0
    warmup: float = 0.1
    dropout: float = 0.0
    tasks: bool = False

    def but(self, **changes: object) -> Recipe:
        """The same recipe with some of it changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass
class Run:
    """What a training run left behind.

    Attributes:
        epsilon: ε spent, with what was released ``beside`` the training; infinite without privacy.
        seconds: of processor time.
        curve: ε after each step.
        statement: the engine's own words about it.
    """

    name: str
    seed: int
    epsilon: float = math.inf
    delta: float | None = None
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    steps: int = 0
    seconds: float = 0.0
    curve: list[float] = field(default_factory=list)
    statement: str = ""
    metrics: dict[str, Metrics] = field(default_factory=dict)


def losses(model: MMBT, batch: Batch, tasks: bool = False, weights: Tensor | None = None) -> Tensor:
    """One loss a row [n]: cross entropy (of several labels: binary, summed); with ``tasks``, the mean over three."""
    if not tasks:
        return _loss(model(batch.image, batch.text, batch.mask, batch.present), batch.label, weights)
    total = 0.0
    for alone in (None, IMAGE, TEXT):
        present = batch.present.clone()
        if alone is not None:
            present[:, 1 - alone] = False
        total = total + _loss(model(batch.image, batch.text, batch.mask, present), batch.label, weights)
    return total / 3


def _loss(logits: Tensor, label: Tensor, weights: Tensor | None) -> Tensor:
    if label.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, label.float(), pos_weight=weights, reduction="none").sum(1)
    return F.cross_entropy(logits, label, weight=weights, reduction="none")


def train(
    model: MMBT,
    records: Records,
    recipe: Recipe,
    *,
    name: str = "",
    epsilon: float | None = None,
    seed: int = 0,
    by_unit: bool = True,
    beside: Event | None = None,
    weights: Tensor | None = None,
    before_step: Callable[[int], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Run:
    """Train ``model`` in place; with ``epsilon`` None, by the same loop without privacy.

    Args:
        by_unit: whether ε is about units (a document, a pair, an emoji) or about single rows.
        beside: what else was released from the same units (noisy class counts): it is inside ``epsilon``.
        weights: of the classes.
        before_step: called with the step's number; it may not look at the data.
        on_step: called with the step's number and ε so far.
    """
    drawing, noise, dropping = seeds_of(seed)
    parts = {part: model.trained(part) for part in recipe.lr}
    model.requires_grad_(False)
    decay = {"heads": recipe.weight_decay}
    groups = [{"params": p, "lr": recipe.lr[part], "weight_decay": decay.get(part, 0.0)} for part, p in parts.items()]
    optimizer = torch.optim.AdamW(groups)
    collate = Collate(records.tables, recipe.dropout, torch.Generator().manual_seed(dropping))
    loader = DataLoader(
        records,
        recipe.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(drawing),
        collate_fn=collate,
    )
    run, engine = Run(name, seed), None
    if epsilon is not None:
        count = len(set(records.units)) if by_unit else len(records)
        run.delta = 1 / (10 * count)
        run.steps = recipe.epochs * math.ceil(count / recipe.batch_size)
        run.sample_rate = recipe.batch_size / count
        run.noise_multiplier = noise_for(epsilon, run.delta, run.sample_rate, run.steps, beside)
        engine = dpkit.PrivacyEngine()
        if beside is not None:
            engine.accountant.compose(beside)
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=run.noise_multiplier,
            max_grad_norm=recipe.max_grad_norm,
            clipping=recipe.clipping,
            privacy_unit=records.units if by_unit else None,
            max_rows_per_unit=recipe.max_rows_per_unit if by_unit else None,
            noise_generator=torch.Generator().manual_seed(noise),  # known noise: give no generator to release a model
        )
    run.steps = recipe.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, run.steps, recipe.warmup))
    start, step = time.process_time(), 0
    for _ in range(recipe.epochs):
        for batch in loader:
            for part, params in parts.items():
                for p in params:
                    p.requires_grad_(step >= recipe.unfreeze.get(part, 0.0) * run.steps)
            if before_step is not None:
                before_step(step)
            each = losses(model, batch, recipe.tasks, weights)
            engine.backward(each) if engine is not None else each.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if engine is not None:
                run.curve.append(engine.get_epsilon(run.delta))
            if on_step is not None:
                on_step(step, run.curve[-1] if run.curve else math.inf)
    run.seconds = time.process_time() - start
    if engine is not None:
        run.epsilon, run.statement = engine.get_epsilon(run.delta), str(engine.statement(run.delta))
        engine.detach()
    return run


def _rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate's factor: up, then down to zero, both straight."""
    return min((step + 1) / max(1.0, warmup * steps), (steps - step) / ((1 - warmup) * steps))


def seeds_of(seed: int) -> tuple[int, int, int]:
    """Seeds for the draw, the noise and the modality dropout: unrelated streams, in each run anew."""
    drawing, noise, dropping = np.random.SeedSequence(seed).generate_state(3, np.uint32)
    return int(drawing), int(noise), int(dropping)


@torch.no_grad()
def predict(model: MMBT, records: Records, present: Tensor | None = None) -> Tensor:
    """Logits of every row [n, outputs]; ``present`` [n, 2] takes modalities away."""
    model.eval()
    chunks = []
    for index in torch.arange(len(records)).split(256):
        batch = records.batch(index)
        there = batch.present if present is None else present[index]
        chunks.append(model(batch.image, batch.text, batch.mask, there))
    return torch.cat(chunks)


def evaluate(model: MMBT, records: Records) -> Metrics:
    """Metrics on a split."""
    return judge(predict(model, records), records.labels.tolist(), records.pairs)
