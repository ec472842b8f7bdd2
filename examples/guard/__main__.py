"""python -m examples.guard --size minilm | tiny | 135m [--epsilons 8 3 1]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from . import large, minilm, page, report, tiny

OUT = Path(__file__).parent / "out"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, judge, write the report; returns its figures."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.guard", description="A privately fine-tuned safety guard."
    )
    parser.add_argument("--size", choices=("minilm", "tiny", "135m"), default="minilm")
    parser.add_argument("--model", help="a folder or hub id: a BERT-like encoder (minilm), or a causal language model")
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 3.0, 1.0], help="one private run for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--train",
        choices=("full", "lora", "last", "bias"),
        help="what a language model trains; minilm with last: a further run without privacy that trains the last layer",
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--limit", type=int, help="about this many rows of each split: a quick try")
    parser.add_argument("--resamples", type=int, default=500, help="of the bootstrap (minilm)")
    parser.add_argument("--out", type=Path, default=OUT, help="where the report goes")
    parser.add_argument(
        "--cache", type=Path, default=OUT / "features", help="where the frozen layers' outputs are kept"
    )
    args = parser.parse_args(argv)
    if args.size == "minilm" and args.train not in (None, "last"):
        parser.error("--size minilm trains its linear layer; with --train last also the encoder's last layer")
    command = "python -m examples.guard " + " ".join(sys.argv[1:] if argv is None else argv)

    console = Console()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    changes = {"epochs": args.epochs, "batch_size": args.batch_size}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.size == "minilm":
        results = minilm.study(
            args.epsilons,
            seeds=args.seeds,
            model=args.model,
            recipe=replace(minilm.RECIPE, **changes),
            limit=args.limit,
            cache=args.cache,
            resamples=args.resamples,
            unfrozen=args.train == "last",
            told=console.print,
        )
        parts, figures = list(report.sections(results, command)), report.kept(results)
    elif args.size == "tiny":
        plan = tiny.Plan()
        plan = replace(plan, tune=replace(plan.tune, **changes), method=args.train or plan.method)
        if args.limit:
            plan = replace(plan, public=args.limit, private=args.limit, test=args.limit)
        results = tiny.study(plan, args.epsilons, seed=args.seeds[0], model=args.model, told=console.print)
        parts, figures = list(tiny.sections(results, command)), results
    else:
        large_plan = large.Plan(limit=args.limit, method=args.train or "lora")
        large_plan = replace(large_plan, tune=replace(large_plan.tune, **changes))
        results = large.study(
            large_plan,
            args.epsilons,
            seed=args.seeds[0],
            model=args.model or "135m",
            cache=args.cache,
            told=console.print,
        )
        parts, figures = list(large.sections(results, command)), results
    title, heads, rows = next(content for kind, content in parts if kind == "table")
    table = Table(*heads, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    paths = page.write(parts, figures | {"command": command}, args.out, f"guard_{args.size}")
    console.print(f"wrote {', '.join(map(str, paths))}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
