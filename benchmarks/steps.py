"""Milliseconds per training step and peak memory: ordinary training, dpkit, Opacus with hooks and with ghost clipping.

    python -m benchmarks.steps [--workloads mlp mnist-cnn ...] [--full] [--rounds 9] [--threads 1] [--bf16] [--compiled]
                               [--quick]

All contestants of a workload live in one process and take turns in every round, in a new order each time, so that what
else the machine does hits all of them alike. What is compared is the ratio to ordinary training within the round. See
README.md.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch

from . import contestants, plots
from .measure import Row, compare, summary, table
from .report import RESULTS, conditions, sentence, write
from .workloads import WORKLOADS


def markdown(about: dict[str, Any], rows: list[Row], title: str = "Training steps", workloads: Any = WORKLOADS) -> str:
    """The tables, with their conditions above them."""
    lines = [
        f"# {title}",
        "",
        sentence(about),
        f"Medians over {about['rounds']} rounds, quartiles in brackets. Ratio: to ordinary training in the same round.",
        "Peak memory: what one step allocates on top of what is held between steps, by torch's CPU allocator, Python "
        "and numpy.",
        "",
        *summary(rows),
        "",
        *table(rows),
        "",
        *(f"- **{name}**: {workloads[name].what}." for name in dict.fromkeys(row.workload for row in rows)),
    ]
    return "\n".join(lines) + "\n"


def quiet() -> None:
    """Opacus warns of what it always does."""
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", category=FutureWarning)


def main() -> None:
    """Runs the comparison and writes results/steps.json, steps.md and steps.png, anew after each workload."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--full", action="store_true", help="all batch sizes of the Opacus paper: hours, not minutes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="1 by default: a busy machine shows least")
    parser.add_argument("--bf16", action="store_true", help="forwards under bfloat16 autocast; writes steps-bf16")
    parser.add_argument("--compiled", action="store_true", help="ordinary training and dpkit compiled too")
    parser.add_argument("--quick", action="store_true", help="3 rounds, the smallest batch size; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    rounds = 3 if args.quick else args.rounds
    about = {**conditions("benchmarks.steps"), "rounds": rounds}
    contestants.AUTOCAST = args.bf16
    if args.compiled:  # else dpkit's model runs what was compiled for the ordinary one, without hooks (it refuses)
        import torch._dynamo.config as dynamo

        dynamo.skip_nnmodule_hook_guards = False
    taking = {**contestants.CONTESTANTS, **(contestants.COMPILED if args.compiled else {})}
    name = "steps" + "-full" * args.full + "-bf16" * args.bf16 + "-compiled" * args.compiled
    rows: list[Row] = []
    for key in args.workloads:
        workload = WORKLOADS[key]
        sizes = workload.all_sizes or workload.batch_sizes if args.full else workload.batch_sizes
        for n in sizes[:1] if args.quick else sizes:
            rows += compare(workload, n, rounds, taking)
        if not args.quick:
            write(name, about, rows, markdown(about, rows))
            plots.bars(rows, RESULTS / f"{name}.png")
    print(f"\n{markdown(about, rows)}")


if __name__ == "__main__":
    main()
