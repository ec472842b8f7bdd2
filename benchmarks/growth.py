"""How time and memory of a step grow with batch size, sequence length, width and vocabulary.

    python -m benchmarks.growth [--rounds 5] [--all] [--quick]

A text classifier (2 blocks) of which one size is changed at a time; ordinary training, dpkit and, with --all, Opacus.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from . import models, plots
from .contestants import CONTESTANTS
from .measure import Row, compare
from .report import RESULTS, conditions, write
from .steps import markdown, quiet
from .workloads import Workload, tokens

BASE = {"batch": 16, "length": 128, "width": 128, "vocabulary": 4096}
GROWTH = {
    "batch": (8, 16, 32, 64),
    "length": (32, 64, 128, 256, 512),
    "width": (64, 128, 256, 512),
    "vocabulary": (1024, 4096, 16384, 65536),
}


def workload(what: str, size: int) -> Workload:
    """The classifier with one size changed."""
    sizes = {**BASE, what: size}
    vocab, width, length = sizes["vocabulary"], sizes["width"], sizes["length"]
    build = partial(models.TextClassifier, vocab, width, length, depth=2)
    text = f"encoder, 2 layers, width {width}, T {length}, vocabulary {vocab}"
    return Workload(f"{what} {size}", text, build, tokens(vocab, length), (sizes["batch"],))


def main() -> None:
    """Runs the comparison and writes results/growth.json, growth.md and growth.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--all", action="store_true", help="Opacus too")
    parser.add_argument("--quick", action="store_true", help="2 rounds, two sizes; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    rounds = 2 if args.quick else args.rounds
    about = {**conditions("benchmarks.growth"), "rounds": rounds}
    contestants = CONTESTANTS if args.all else {k: CONTESTANTS[k] for k in ("ordinary", "dpkit")}
    rows: list[Row] = []
    groups: dict[str, list[tuple[int, Row]]] = {}
    named: dict[str, Workload] = {}
    for what, sizes in GROWTH.items():
        for size in sizes[:2] if args.quick else sizes:
            one = workload(what, size)
            named[one.name] = one
            found = compare(one, one.batch_sizes[0], rounds, contestants)
            rows += found
            groups.setdefault(what, []).extend((size, row) for row in found)
        if not args.quick:
            write("growth", about, rows, markdown(about, rows, "Growth of a training step", named))
            plots.curves(groups, RESULTS / "growth.png")
    print(f"\n{markdown(about, rows, 'Growth of a training step', named)}")


if __name__ == "__main__":
    main()
