"""What several ranks send each other in a step, counted at the collectives, beside what it should be on paper.

    python -m benchmarks.ranks [--ranks 2 3] [--steps 5]

Each number of ranks is a run of torchrun on this machine with gloo. Counted are the bytes that a call hands to
torch.distributed on one rank (what a rank puts in or takes out), whatever a backend makes of them. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from benchmarks.report import RESULTS, conditions, sentence

MODELS: dict[str, tuple[int, int]] = {"0.4M": (256, 6), "3.2M": (1024, 3)}  # width, layers
CALLS = ("reduce", "broadcast", "all_gather", "all_gather_single", "reduce_scatter_single", "all_reduce")
ON_PAPER = {  # bytes a parameter in a step of k physical batches; float32
    False: {"reduce": "4", "broadcast": "4"},
    True: {"all_gather_single": "8 k", "reduce_scatter_single": "4 k"},
}


def build(name: str) -> nn.Module:
    """A stack of linear layers."""
    width, layers = MODELS[name]
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))


def bytes_of(name: str, args: tuple[Any, ...]) -> int:
    """The larger of what a call takes in and gives out: of tensors [P] the whole, not a rank's part of it."""
    one = args[0] if isinstance(args[0], list) else [args[0]]
    other = [args[1]] if len(args) > 1 and isinstance(args[1], torch.Tensor) else []
    return max(sum(t.numel() * t.element_size() for t in side) for side in (one, other))


def counting(count: Counter[str]) -> list[Any]:
    """Patches that count a call's bytes, the messages of a few kilobytes apart."""

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [v for v in kwargs.values() if isinstance(v, torch.Tensor)]
            size = bytes_of(name, (*args, *tensors))
            count[name if size > 1 << 12 else "words"] += size
            return call(*args, **kwargs)

        return counted

    return [mock.patch.object(dist, name, wrapped(name, getattr(dist, name))) for name in CALLS]


def measure(name: str, steps: int, sharded: bool) -> dict[str, Any]:
    """One model's bytes a step, on this rank; its first step, with set-up and proofs, apart."""
    model = build(name)
    parameters = sum(p.numel() for p in model.parameters())
    if sharded:
        for block in [*model, model]:
            fully_shard(block)
    width = MODELS[name][0]
    data = TensorDataset(torch.randn(48, width, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dpkit.PrivacyEngine(accountant="rdp")
    count: Counter[str] = Counter()
    patches = counting(count)
    for patch in patches:
        patch.start()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        max_physical_batch_size=4,
    )
    setup: dict[str, int] = {}
    taken = [0]

    def stepped(*_: Any) -> None:
        if engine.accountant.ledger and sum(n for _, n in engine.accountant.ledger) > taken[0]:
            taken[0] += 1
            if taken[0] == 1:
                setup.update(count)
                count.clear()

    optimizer.register_step_post_hook(stepped)
    turns = 0
    while taken[0] <= steps:
        for (x,) in loader:
            turns += taken[0] > 0
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if taken[0] > steps:
                break
    engine.detach()
    for patch in patches:
        patch.stop()
    step = {k: v / steps for k, v in count.items()}
    held = sum((p.to_local() if sharded else p).numel() for p in model.parameters())
    about = {"model": name, "sharded": sharded, "P": parameters, "held": held, "parts": turns / steps}
    return {**about, "first": setup, "step": step}


def worker(folder: Path, steps: int) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [measure(name, steps, sharded) for sharded in (False, True) for name in MODELS]
    if dist.get_rank() == 1:
        (folder / f"{dist.get_world_size()}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, steps: int) -> list[dict[str, Any]]:
    """What rank 1 of so many counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += ["-m", "benchmarks.ranks", "--worker", folder, "--steps", str(steps)]
        subprocess.run(command, check=True, env=environment)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / f"{world}.json").read_text())
        return [{"ranks": world, **row} for row in rows]


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table, with its conditions above it."""
    lines = [
        "# What ranks send in a step",
        "",
        sentence(about),
        f"Bytes that rank 1 hands to torch.distributed in a step, for each of the P parameters (float32): mean of "
        f"{about['steps']} steps after the first, of logical batches of 16 expected records in k parts of at most 4 "
        "records a rank. Words are all messages of up to 4 KiB, with each pass's beginning.",
    ]
    for sharded, title in (
        (False, "Every rank has the whole model"),
        (True, "Sharded (`fully_shard`, block by block)"),
    ):
        paper = ON_PAPER[sharded]
        lines += ["", f"## {title}", "", "| ranks | model | P | held by rank 1 | k | "]
        lines[-1] += "".join(f"{name}: bytes / P | on paper | " for name in paper) + "words, bytes |"
        lines.append("|---:|---|---:|---:|---:|" + "---:|---:|" * len(paper) + "---:|")
        for r in (r for r in rows if r["sharded"] == sharded):
            cells = [r["ranks"], r["model"], f"{r['P']:,}", f"{r['held'] / r['P']:.3f} P", f"{r['parts']:.1f}"]
            for name, factor in paper.items():
                value = int(factor.split()[0]) * (r["parts"] if "k" in factor else 1)
                cells += [f"{r['step'].get(name, 0) / r['P']:.3f}", f"{factor} = {value:.1f}"]
            lines.append("| " + " | ".join(map(str, [*cells, f"{r['step'].get('words', 0):,.0f}"])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the counts and writes results/ranks.json and results/ranks.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.steps)
        return
    rows = [row for world in args.ranks for row in run(world, args.steps)]
    about = {**conditions("benchmarks.ranks"), "threads": 1, "steps": args.steps}
    table = markdown(about, rows)
    print(table)
    (RESULTS / "ranks.md").write_text(table)
    (RESULTS / "ranks.json").write_text(json.dumps({"conditions": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
