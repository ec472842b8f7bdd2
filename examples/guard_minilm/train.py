"""Fine-tune the guard without privacy, then under each ε, with one recipe; compare.

An ordinary loop and the two lines are in `train`; the rest is the command line:

    python -m examples.guard_minilm [--epsilons 8 3] [--seed 0] [--model PATH_OR_HUB_ID]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

import dpkit

from . import data, report
from .guard import Guard, find_weights, load_tokenizer
from .report import Bar, Report


@dataclass(frozen=True)
class Recipe:
    """What every run shares. It was fixed while this example was written; no run chooses anything from the data."""

    layers: int = 1
    max_tokens: int = 32
    batch_size: int = 512  # large: the noise is added once a batch, whatever its size
    epochs: int = 2
    lr_layers: float = 1e-3
    lr_head: float = 1e-1
    max_grad_norm: float = 1.0


@dataclass
class Run:
    """What one training run left behind."""

    name: str
    target_epsilon: float | None
    delta: float | None
    epsilons: list[float] = field(default_factory=list)  # ε spent after each step; empty without privacy
    noise_multiplier: float | None = None
    seconds: float = 0.0


def train(
    guard: Guard,
    records: TensorDataset,
    recipe: Recipe,
    *,
    epsilon: float | None,
    delta: float,
    seeds: tuple[int, int],
    bar: Bar,
) -> Run:
    """Train ``guard`` in place; with ``epsilon`` None, by the same loop without privacy."""
    drawing, noise = (torch.Generator().manual_seed(seed) for seed in seeds)
    optimizer = torch.optim.Adam(
        [
            {"params": guard.top.parameters(), "lr": recipe.lr_layers},
            {"params": guard.head.parameters(), "lr": recipe.lr_head},
        ]
    )
    loader = DataLoader(records, recipe.batch_size, shuffle=True, generator=drawing)
    engine = None
    if epsilon is not None:
        engine = dpkit.PrivacyEngine()
        guard, optimizer, loader = engine.make_private(
            module=guard,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=epsilon,
            target_delta=delta,
            epochs=recipe.epochs,
            max_grad_norm=recipe.max_grad_norm,
            noise_generator=noise,  # a known seed is known noise: give no generators to release a model
        )

    run = Run("no privacy" if epsilon is None else f"ε = {epsilon:g}", epsilon, epsilon and delta)
    steps = recipe.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    bar.begin(run.name, steps)
    start = time.perf_counter()
    for _ in range(recipe.epochs):
        for hidden, mask, label in loader:
            loss = F.cross_entropy(guard(hidden, mask), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if engine is not None:
                run.epsilons.append(engine.get_epsilon(delta=delta))
            bar.count(loss.item(), run.epsilons[-1] if engine else math.inf)
    run.seconds = time.perf_counter() - start
    if engine is not None:
        run.noise_multiplier = engine.noise_multiplier
        engine.detach()
    return run


def seeds_of(seed: int, run: int) -> tuple[int, int]:
    """Seeds for who is drawn and for the noise: unrelated streams, in each run anew, or ε would not hold."""
    drawing, noise = np.random.SeedSequence((seed, run)).generate_state(2, np.uint32)
    return int(drawing), int(noise)


@torch.no_grad()
def scores(guard: Guard, records: TensorDataset) -> list[float]:
    """P(unsafe) of each record."""
    guard.eval()
    chunks = [guard(hidden, mask).softmax(1)[:, 1] for hidden, mask, _ in DataLoader(records, 256)]
    return torch.cat(chunks).tolist()


def main(argv: Sequence[str] | None = None) -> Report:
    """Cache, train each run, judge, print the table and write the files."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m examples.guard_minilm", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or hub id of a BERT-like encoder (default: the installed MiniLM)")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 3.0], help="one private run for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--batch-size", type=int, default=recipe.batch_size)
    parser.add_argument("--max-tokens", type=int, default=recipe.max_tokens)
    parser.add_argument("--limit", type=int, help="about this many prompts of each split: a quick try")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    recipe = Recipe(epochs=args.epochs, batch_size=args.batch_size, max_tokens=args.max_tokens)

    console = Console()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    weights = find_weights(args.model)
    prompts = data.load(args.limit)
    delta = 1 / (10 * len(prompts["train"].labels))

    with console.status("running the frozen layers once over all prompts"):
        guard, tokenizer = Guard.from_pretrained(weights, recipe.layers), load_tokenizer(weights)
        records = {name: data.cache(guard, tokenizer, split, recipe.max_tokens) for name, split in prompts.items()}

    results = Report(prompts, delta, recipe, args.seed)
    with Bar(console) as bar:
        for i, epsilon in enumerate((None, *args.epsilons)):
            guard, seeds = Guard.from_pretrained(weights, recipe.layers), seeds_of(args.seed, i)
            run = train(guard, records["train"], recipe, epsilon=epsilon, delta=delta, seeds=seeds, bar=bar)
            results.add(run, {name: scores(guard, records[name]) for name in report.JUDGED})
    results.print(console)
    results.write(args.out)
    console.print(f"wrote {', '.join(report.FILES)} to {args.out}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
