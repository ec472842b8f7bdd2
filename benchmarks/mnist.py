"""Opacus's MNIST example with dpkit: accuracy beside Opacus's published figures, and ε of the same run by four judges.

    python -m benchmarks.mnist            # some 15 minutes; writes results/mnist.json and results/mnist.md
    python -m benchmarks.mnist --opacus   # some 5 minutes; adds one run with the Opacus that is installed

The settings and the published figures are those of Opacus's examples/mnist_README.md. Its three ε are what the RDP
accountant of that time says of 250 steps an epoch: the conversion of Mironov 2017, "Renyi differential privacy",
proposition 3, at the orders below. `published` computes them again; a test compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from dpkit.accountants import PLDAccountant, dpsgd
from examples import mnist

from .report import RESULTS, conditions, sentence, write

DELTA = 1e-5
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))


@dataclass(frozen=True)
class Setting:
    """One published run: its arguments, and its accuracy (mean of 10 runs ± as given) and ε as printed."""

    epochs: int
    lr: float
    sigma: float | None
    clip: float | None
    accuracy: float
    plus_minus: float
    epsilon: float | None

    def arguments(self) -> list[str]:
        """For `examples.mnist`."""
        common = ["--epochs", str(self.epochs), "--lr", str(self.lr)]
        if self.sigma is None:
            return [*common, "--disable-dp"]
        return [*common, "--sigma", str(self.sigma), "--clip", str(self.clip)]


SETTINGS = (
    Setting(20, 0.1, None, None, 98.94, 0.32, None),
    Setting(15, 0.25, 1.3, 1.5, 94.63, 0.34, 1.16),
    Setting(60, 0.15, 1.1, 1.0, 96.78, 0.21, 2.91),
    Setting(45, 0.25, 0.7, 1.5, 97.09, 0.17, 6.86),
)


@dataclass(frozen=True)
class Epsilons:
    """ε of one run (σ, q, T, δ): dpkit's upper and lower bound, and what Opacus computes today."""

    dpkit: float
    dpkit_lower: float
    opacus_rdp: float
    opacus_prv: float


@dataclass(frozen=True)
class Row:
    """One setting: what was run, what came out, and Opacus's figures."""

    setting: Setting
    accuracy: float
    half_width: float
    steps: int
    spent: float | None
    epsilons: Epsilons | None
    opacus_today: float | None = None


def epsilons(sigma: float, rate: float, steps: int, delta: float = DELTA) -> Epsilons:
    """The four answers for T Poisson steps at rate q."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    ours = PLDAccountant().compose(dpsgd(sigma, rate, steps))
    lower, upper = ours.epsilon_bounds(delta)
    theirs = []
    for judge in (RDPAccountant(), PRVAccountant()):
        judge.history = [(sigma, rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the best order is the largest of its list
            theirs.append(float(judge.get_epsilon(delta)))
    return Epsilons(upper, lower, *theirs)


def published(sigma: float, rate: float, steps: int, delta: float = DELTA) -> float:
    """The RDP accountant's ε of Opacus's early releases: the least RDP(α) + log(1/δ) / (α - 1)."""
    from opacus.accountants.analysis.rdp import compute_rdp

    rdp = compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=ORDERS)
    return min(float(r) - math.log(delta) / (order - 1) for r, order in zip(rdp, ORDERS, strict=True))


def run(setting: Setting, seed: int) -> Row:
    """Train by the example, and judge the run."""
    result = mnist.main([*setting.arguments(), "--seed", str(seed)])
    p, n = result.accuracy, 3000
    judged = None if setting.sigma is None else epsilons(setting.sigma, 240 / 60_000, result.steps)
    return Row(setting, 100 * p, 100 * 1.96 * math.sqrt(p * (1 - p) / n), result.steps, result.epsilon, judged)


def opacus_today(setting: Setting, seed: int) -> float:
    """The same training with the Opacus that is installed: its accuracy in percent, on the same test images."""
    import opacus

    torch.manual_seed(seed)
    train, test = mnist.load("train"), mnist.load("test")
    model = mnist.ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped, optimizer, loader = opacus.PrivacyEngine(accountant="rdp").make_private(
            module=model, optimizer=optimizer, data_loader=DataLoader(train, batch_size=240, shuffle=True),
            noise_multiplier=setting.sigma, max_grad_norm=setting.clip,
        )  # fmt: skip
        for epoch in range(1, setting.epochs + 1):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(wrapped(x), y).backward()
                optimizer.step()
            print(f"epoch {epoch:2d}: test accuracy {mnist.accuracy(model, test):.4f}, Opacus", flush=True)
    return 100 * mnist.accuracy(model, test)


def stored() -> list[Row]:
    """The rows of results/mnist.json."""
    held = json.loads((RESULTS / "mnist.json").read_text(encoding="utf-8"))["rows"]
    for row in held:
        row["setting"] = Setting(**row["setting"])
        row["epsilons"] = None if row["epsilons"] is None else Epsilons(**row["epsilons"])
    return [Row(**row) for row in held]


ABOUT = """\
60,000 training images, q = 0.004, δ = 10⁻⁵; one run each, tested on the first 3,000 of MNIST's 10,000 test images (± is
a 95% interval for the choice of test images). Opacus's published accuracies are means of 10 runs, tested on all 10,000;
its published ε are those of its accountant of that time. All ε in a row are of one and the same run (σ, q, steps): the
lower, the tighter the accounting. dpkit's is an upper bound; the truth is between it and the lower bound beside it.
Accuracies "today" are one run with the Opacus that is installed, same settings, same test images, where there was one.
"""


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """The table, with its conditions above it."""
    lines = [
        "# Opacus's MNIST example with dpkit",
        "",
        sentence(about),
        "",
        ABOUT,
        "| epochs, σ, C, learning rate | accuracy, dpkit | accuracy, Opacus today "
        "| accuracy, Opacus (published) | ε, dpkit [lower bound] "
        "| ε, Opacus (published) | Opacus RDP today | Opacus PRV today |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    done = {row.setting: row for row in rows}
    for s in SETTINGS:
        row = done.get(s)
        what, spent = f"{s.epochs}, no privacy, {s.lr}", "∞ | ∞ | ∞ | ∞"
        if s.sigma is not None:
            e = epsilons(s.sigma, 240 / 60_000, 250 * s.epochs) if row is None else row.epsilons
            assert e is not None
            what = f"{s.epochs}, {s.sigma}, {s.clip}, {s.lr}"
            ours = f"**{e.dpkit:.4f}** [{e.dpkit_lower:.4f}]"
            spent = f"{ours} | {s.epsilon} | {e.opacus_rdp:.3f} | {e.opacus_prv:.3f}"
        accuracy = "not run" if row is None else f"{row.accuracy:.2f}% ± {row.half_width:.2f}"
        today = "" if row is None or row.opacus_today is None else f"{row.opacus_today:.2f}%"
        lines.append(f"| {what} | {accuracy} | {today} | {s.accuracy}% ± {s.plus_minus} | {spent} |")
    if len(done) < len(SETTINGS):
        lines += ["", "The run was stopped before its last settings; `--only EPOCHS` adds one of them."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the settings and writes results/mnist.json and results/mnist.md, anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument(
        "--only", type=int, metavar="EPOCHS", help="the setting of so many epochs alone, into the results"
    )
    parser.add_argument("--opacus", action="store_true", help="run Opacus on the first private setting, nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = conditions("benchmarks.mnist")
    if args.opacus or args.only:
        [new] = [run(s, args.seed) for s in SETTINGS if s.epochs == args.only] or [None]
        today = opacus_today(SETTINGS[1], args.seed) if args.opacus else None
        held = json.loads((RESULTS / "mnist.json").read_text(encoding="utf-8"))["conditions"]
        rows = [row for row in stored() if new is None or row.setting != new.setting] + ([] if new is None else [new])
        rows.sort(key=lambda row: SETTINGS.index(row.setting))
        if today is not None:
            rows[1] = dataclasses.replace(rows[1], opacus_today=today)
        about = {**held, "command": f"{held['command']}; {about['command']}"}
        write("mnist", about, rows, markdown(about, rows))
        return
    rows = []
    for setting in SETTINGS:
        rows.append(run(setting, args.seed))
        write("mnist", about, rows, markdown(about, rows))


if __name__ == "__main__":
    main()
