"""What it costs that a run survives anything: the ledger's share of a step, and the time of a checkpoint.

    python -m benchmarks.durable [--workloads mlp mnist-cnn transformer] [--rounds 15] [--folder .]

The same step without a ledger, with one on the disk of ``--folder`` and with one in memory (/dev/shm: what is left
without waiting for the disk) take turns in one process. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader

import dpkit
from benchmarks.contestants import Batch, Runner, train_step
from benchmarks.measure import quartiles
from benchmarks.report import RESULTS, conditions, sentence
from benchmarks.workloads import WORKLOADS, Workload
from dpkit import randomness
from dpkit.fingerprint import Fingerprint


def private(workload: Workload, n: int, ledger: Path | None) -> tuple[Runner, dpkit.PrivacyEngine]:
    """dpkit with Adam on n records at sample rate 1."""
    model, batch = workload.model(), workload.batch(n)
    optimizer = Adam(model.parameters(), lr=1e-3)
    engine = dpkit.PrivacyEngine(accountant="rdp", ledger=ledger)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(range(n), batch_size=n, collate_fn=lambda rows: batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    def epochs() -> Iterator[Batch]:
        while True:
            yield from loader

    return Runner(epochs(), train_step(model, optimizer, nn.CrossEntropyLoss())), engine


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of several calls."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def compare(workload: Workload, rounds: int, disk: Path, memory: Path) -> dict[str, Any]:
    """One workload at its smallest batch size."""
    n = workload.batch_sizes[0]
    made = {
        "none": private(workload, n, None),
        "disk": private(workload, n, disk / workload.name),
        "memory": private(workload, n, memory / workload.name),
    }
    times: dict[str, list[float]] = {name: [] for name in made}
    for runner, _ in made.values():
        runner.seconds(3)
    for _ in range(rounds):
        for name in random.sample(list(made), len(made)):
            times[name].append(made[name][0].seconds(5))
    ratios = {name: [a / b for a, b in zip(own, times["none"], strict=True)] for name, own in times.items()}
    runner, engine = made["none"]
    path = disk / f"{workload.name}.checkpoint"
    parameters = [p.detach() for p in engine._attached().model.parameters()]
    mark = Fingerprint()
    return {
        "workload": workload.name,
        "batch_size": n,
        "parameters": sum(p.numel() for p in parameters),
        "ms": 1e3 * statistics.median(times["none"]),
        **{f"ratio_{name}": [statistics.median(ratios[name]), *quartiles(ratios[name])] for name in ("disk", "memory")},
        "fingerprint_ms": milliseconds(lambda: mark.of(parameters), rounds),
        "chance_ms": milliseconds(randomness.capture, rounds),
        "save_ms": milliseconds(lambda: engine.save_checkpoint(path), rounds),
        "load_ms": milliseconds(lambda: engine.load_checkpoint(path), rounds),
        "mib": path.stat().st_size / 2**20,
    }


def synced(folder: Path, rounds: int) -> float:
    """Milliseconds that the disk takes for one line."""
    file = os.open(folder / "probe", os.O_RDWR | os.O_APPEND | os.O_CREAT)

    def append() -> None:
        os.write(file, b"x" * 200)
        os.fsync(file)

    value = milliseconds(append, 20 * rounds)
    os.close(file)
    return value


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The tables, with their conditions above them."""

    def spread(values: list[float]) -> str:
        return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    lines = [
        "# Durable runs",
        "",
        sentence(about),
        f"Medians over {about['rounds']} rounds, quartiles in brackets. Ratio: to dpkit's step without a ledger in the "
        f"same round. One line forced to this disk: {about['sync_ms']:.2f} ms.",
        "",
        "| workload | batch | parameters | ms per step | ratio, on disk | ratio, in memory | fingerprint, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['workload']} | {row['batch_size']} | {row['parameters']:,} | {row['ms']:.2f} "
            f"| {spread(row['ratio_disk'])} | {spread(row['ratio_memory'])} | {row['fingerprint_ms']:.2f} |"
            for row in rows
        ),
        "",
        "Every batch, ledger or not, the states of the global generators are noted: "
        f"{1e3 * statistics.median(row['chance_ms'] for row in rows):.0f} µs.",
        "",
        "| workload | checkpoint, MiB | save, ms | load, ms |",
        "|---|---:|---:|---:|",
        *(f"| {row['workload']} | {row['mib']:.1f} | {row['save_ms']:.0f} | {row['load_ms']:.0f} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the comparison and writes results/durable.json and results/durable.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["mlp", "mnist-cnn", "transformer"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to be measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=args.folder) as disk, tempfile.TemporaryDirectory(dir=shared) as memory:
        rows = [compare(WORKLOADS[name], args.rounds, Path(disk), Path(memory)) for name in args.workloads]
        about = {
            **conditions("benchmarks.durable"), "rounds": args.rounds, "sync_ms": synced(Path(disk), args.rounds)
        }  # fmt: skip
    table = markdown(about, rows)
    print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "durable.md").write_text(table)
    (RESULTS / "durable.json").write_text(json.dumps({"conditions": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
