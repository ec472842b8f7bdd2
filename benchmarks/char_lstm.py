"""Opacus's character-level LSTM example with dpkit: accuracy with and without privacy, and ε by four judges.

    python -m benchmarks.char_lstm        # some 10 minutes; writes results/char_lstm.json and results/char_lstm.md

The settings are those of Opacus's examples/char-lstm_README.md. Its names (a zip of another project) are not ours to
ship, so the data are other surnames, and accuracies do not compare; ε does, and so does what privacy costs.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from examples import char_lstm

from .mnist import Epsilons, epsilons
from .report import RESULTS, conditions, sentence, write

DELTA, SIGMA, RATE, STEPS = 8e-5, 1.0, 0.05, 1000
PUBLISHED = {"no privacy": (0.760716, math.inf), "private": (0.739542, 11.83)}  # Opacus's accuracy and ε, on its names


@dataclass(frozen=True)
class Row:
    """One run: its accuracy, the half width of a 95% interval, what was spent; ``epsilons``: of Opacus's own run."""

    name: str
    accuracy: float
    half_width: float
    steps: int
    spent: float | None
    epsilons: Epsilons | None


def run(name: str, epochs: int, seed: int) -> Row:
    """Train by the example."""
    private = name == "private"
    options = ["--sigma", str(SIGMA)] if private else ["--disable-dp", "--lr", "0.5"]
    result = char_lstm.main(["--epochs", str(epochs), "--seed", str(seed), *options])
    p = result.accuracy
    half = 1.96 * math.sqrt(p * (1 - p) / len(char_lstm.load("test")))
    judged = epsilons(SIGMA, RATE, STEPS, DELTA) if private else None
    return Row(name, p, half, result.steps, result.epsilon, judged)


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """The tables, with their conditions above them."""
    lines = [
        "# Opacus's character-level LSTM example with dpkit",
        "",
        sentence(about),
        "",
        "Surnames by language: 14,931 to train, 3,812 to test, 16 languages; σ = 1, C = 1.5, δ = 8·10⁻⁵, q = 0.05, "
        f"{rows[0].steps // 20} epochs, one",
        "run each (± is a 95% interval for the choice of test names). Opacus's figures: 50 epochs, and other names.",
        "",
        "| | accuracy, dpkit | ε, dpkit | accuracy, Opacus (published, its own names) | ε, Opacus (published) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        theirs, epsilon = PUBLISHED[row.name]
        spent = "∞" if row.spent is None else f"**{row.spent:.3f}**"
        published = "∞" if math.isinf(epsilon) else f"{epsilon}"
        lines.append(
            f"| {row.name} | {100 * row.accuracy:.2f}% ± {100 * row.half_width:.2f} | {spent} | {100 * theirs:.2f}% "
            f"| {published} |"
        )
    for judged in (row.epsilons for row in rows if row.epsilons is not None):
        lines += [
            "",
            f"ε of the published run (σ = {SIGMA:g}, q = {RATE:g}, {STEPS} steps): dpkit **{judged.dpkit:.3f}** "
            f"[lower bound {judged.dpkit_lower:.3f}], published {PUBLISHED['private'][1]}, Opacus RDP today "
            f"{judged.opacus_rdp:.3f}, Opacus PRV today {judged.opacus_prv:.3f}.",
        ]
    return "\n".join(lines) + "\n"


def stored() -> tuple[dict[str, Any], list[Row]]:
    """The conditions and the rows of results/char_lstm.json."""
    held = json.loads((RESULTS / "char_lstm.json").read_text(encoding="utf-8"))
    for row in held["rows"]:
        row["epsilons"] = None if row["epsilons"] is None else Epsilons(**row["epsilons"])
    return held["conditions"], [Row(**row) for row in held["rows"]]


def main() -> None:
    """Runs both and writes results/char_lstm.json and results/char_lstm.md, anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--only", choices=list(PUBLISHED), help="one of the two runs, into the results that are there")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about, rows = conditions("benchmarks.char_lstm"), []
    if args.only:
        new = run(args.only, args.epochs, args.seed)
        held, rows = stored()
        rows = sorted([*(row for row in rows if row.name != new.name), new], key=lambda row: row.spent is None)
        about = {**held, "command": f"{held['command']}; {about['command']}"}
        write("char_lstm", about, rows, markdown(about, rows))
        return
    for name in ("private", "no privacy"):
        rows.append(run(name, args.epochs, args.seed))
        write("char_lstm", about, rows, markdown(about, rows))


if __name__ == "__main__":
    main()
