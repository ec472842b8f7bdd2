"""Milliseconds per training step and peak memory: ordinary training, dpkit, Opacus with hooks and with ghost clipping.

    python -m benchmarks.steps [--workloads mlp mnist-cnn transformer] [--rounds 15] [--threads 1] [--quick]

All contestants live in one process and take turns in every round, in a new order each time, so that what else the
machine does hits all of them alike. What is compared is the ratio to ordinary training within the round. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.report import RESULTS, conditions, sentence
from benchmarks.workloads import WORKLOADS, Workload

NOISE_MULTIPLIER, MAX_GRAD_NORM, LEARNING_RATE = 1.0, 1.0, 0.01
SECONDS_PER_TURN = 0.2
"""A turn repeats the step until about this long has passed, so that the clock's grain does not matter."""

Batch = tuple[Tensor, Tensor]


@dataclass
class Runner:
    """A contestant set up on a workload: an endless stream of batches and the step to take on each."""

    batches: Iterator[Batch]
    step: Callable[[Batch], None]

    def seconds(self, repeats: int) -> float:
        """The mean time of a step (forward, backward, noise, update, zero_grad); fetching the batch is not counted."""
        total = 0.0
        for _ in range(repeats):
            batch = next(self.batches)
            start = time.perf_counter()
            self.step(batch)
            total += time.perf_counter() - start
        return total / repeats


# --- the contestants ---


def forever(batch: Batch) -> Iterator[Batch]:
    """The same pre-made batch again and again."""
    while True:
        yield batch


def train_step(model: nn.Module, optimizer: Any, criterion: Callable[..., Any]) -> Callable[[Batch], None]:
    """The training step that every contestant takes."""

    def step(batch: Batch) -> None:
        inputs, labels = batch
        criterion(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ordinary(workload: Workload, n: int) -> Runner:
    """Training without privacy."""
    model = workload.model()
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    return Runner(forever(workload.batch(n)), train_step(model, optimizer, nn.CrossEntropyLoss()))


def dpkit(workload: Workload, n: int) -> Runner:
    """dpkit; n records at sample rate 1, so that every Poisson draw is the same whole batch."""
    import dpkit as library

    model, batch = workload.model(), workload.batch(n)
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    model, optimizer, loader = library.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(range(n), batch_size=n, collate_fn=lambda rows: batch),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
    )

    def epochs() -> Iterator[Batch]:
        while True:
            yield from loader

    return Runner(epochs(), train_step(model, optimizer, nn.CrossEntropyLoss()))


def opacus(mode: str) -> Callable[[Workload, int], Runner]:
    """Opacus in `mode`, "hooks" or "ghost"; fed the batch directly, since it does not check where batches come from."""

    def prepare(workload: Workload, n: int) -> Runner:
        from opacus import PrivacyEngine

        model, batch = workload.model(), workload.batch(n)
        parts = PrivacyEngine().make_private(
            module=model,
            optimizer=SGD(model.parameters(), lr=LEARNING_RATE),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(TensorDataset(*batch), batch_size=n),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        criterion = parts[2] if mode == "ghost" else nn.CrossEntropyLoss()
        return Runner(forever(batch), train_step(parts[0], parts[1], criterion))

    return prepare


CONTESTANTS: dict[str, Callable[[Workload, int], Runner]] = {
    "ordinary": ordinary,
    "dpkit": dpkit,
    "Opacus hooks": opacus("hooks"),
    "Opacus ghost": opacus("ghost"),
}

# --- measuring ---


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Without what the profiler writes past Python's ``sys.stderr``."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_bytes(runner: Runner, attempts: int = 5) -> int:
    """The most that one step allocates on top of what is held between steps, as torch's CPU allocator sees it."""
    for _ in range(attempts):  # on a busy machine the profiler now and then comes back with nothing
        batch = next(runner.batches)
        with silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runner.step(batch)
        held = peak = 0
        for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]  # in order of time
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        if peak:
            return peak
    raise RuntimeError(f"the profiler saw no allocation in {attempts} steps")


@dataclass
class Row:
    """One contestant on one workload at one batch size; times in ms, ratios to ordinary training, quartiles beside."""

    workload: str
    batch_size: int
    contestant: str
    ms: float
    ms_quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]
    peak_mib: float


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare(workload: Workload, n: int, rounds: int) -> list[Row]:
    """All contestants on one workload, taking turns."""
    runners = {name: prepare(workload, n) for name, prepare in CONTESTANTS.items()}
    repeats = {}
    for name, runner in runners.items():
        runner.seconds(3)  # warm-up; dpkit's checks of the first batch fall here
        repeats[name] = max(1, round(SECONDS_PER_TURN / runner.seconds(2)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name in random.sample(list(runners), len(runners)):
            times[name].append(runners[name].seconds(repeats[name]))
    rows = []
    for name, runner in runners.items():
        milliseconds = [1e3 * seconds for seconds in times[name]]
        ratios = [own / base for own, base in zip(times[name], times["ordinary"], strict=True)]
        rows.append(
            Row(
                workload.name, n, name,
                statistics.median(milliseconds), quartiles(milliseconds),
                statistics.median(ratios), quartiles(ratios),
                peak_bytes(runner) / 2**20,
            )
        )  # fmt: skip
        print(f"{workload.name:12} {n:4}  {name:13} {rows[-1].ms:8.2f} ms  ×{rows[-1].ratio:.2f}", flush=True)
    return rows


# --- reporting ---


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """The table, with its conditions above it."""
    lines = [
        "# Training steps",
        "",
        sentence(about),
        f"Medians over {about['rounds']} rounds, quartiles in brackets. Ratio: to ordinary training in the same round.",
        "Peak memory: what one step allocates on top of what is held between steps (torch's CPU allocator).",
        "",
        "| workload | batch | contestant | ms per step | ratio | peak MiB |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.workload} | {row.batch_size} | {row.contestant} "
            f"| {row.ms:.2f} [{row.ms_quartiles[0]:.2f}, {row.ms_quartiles[1]:.2f}] "
            f"| {row.ratio:.2f} [{row.ratio_quartiles[0]:.2f}, {row.ratio_quartiles[1]:.2f}] | {row.peak_mib:.1f} |"
        )
    lines += ["", *(f"- **{name}**: {WORKLOADS[name].what}." for name in dict.fromkeys(row.workload for row in rows))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the comparison and writes results/steps.json and results/steps.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="1 by default: a busy machine shows least")
    parser.add_argument("--quick", action="store_true", help="3 rounds, the smallest batch size; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    rounds = 3 if args.quick else args.rounds
    rows = []
    for name in args.workloads:
        workload = WORKLOADS[name]
        for n in workload.batch_sizes[:1] if args.quick else workload.batch_sizes:
            rows += compare(workload, n, rounds)
    about = {**conditions("benchmarks.steps"), "rounds": rounds}
    table = markdown(about, rows)
    print(f"\n{table}")
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "steps.md").write_text(table)
        (RESULTS / "steps.json").write_text(
            json.dumps({"conditions": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
