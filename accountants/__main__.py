"""Privacy accounting on the command line: ``python -m dpkit.accountants epsilon|calibrate|tradeoff``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from . import calibration
from .errors import AccountingError
from .events import dpsgd
from .pld import PLDAccountant
from .tradeoff import TradeOff


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dpkit.accountants", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--noise-multiplier", type=float, help="noise standard deviation over the clipping norm")
    shared.add_argument("--sample-rate", type=float, help="probability of a record to be in a batch")
    shared.add_argument("--steps", type=int, help="number of noisy steps")
    shared.add_argument("--adjacency", default="add_or_remove_one")
    shared.add_argument("--json", action="store_true", help="print one JSON object")
    shared.add_argument("--plot", metavar="FILE", help="write a figure (needs matplotlib)")
    eps = commands.add_parser("epsilon", parents=[shared], help="bounds on epsilon at a delta")
    eps.add_argument("--delta", type=float, required=True)
    cal = commands.add_parser("calibrate", parents=[shared], help="the one missing number for a target")
    cal.add_argument("--target-epsilon", type=float)
    cal.add_argument("--delta", type=float)
    cal.add_argument("--target-advantage", type=float)
    cal.add_argument("--target-tpr", type=float)
    cal.add_argument("--fpr", type=float)
    cal.add_argument("--epochs", type=float)
    trade = commands.add_parser("tradeoff", parents=[shared], help="what a membership test can achieve")
    trade.add_argument("--fpr", type=float, nargs="*", default=[1e-5, 1e-3, 1e-2, 0.1])
    return parser


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    sigma, rate, steps = arguments.noise_multiplier, arguments.sample_rate, arguments.steps
    if arguments.command == "calibrate":
        found = calibration.calibrate(
            target_epsilon=arguments.target_epsilon,
            delta=arguments.delta,
            target_advantage=arguments.target_advantage,
            target_tpr=arguments.target_tpr,
            fpr=arguments.fpr,
            noise_multiplier=sigma,
            sample_rate=rate,
            steps=steps,
            epochs=arguments.epochs,
            adjacency=arguments.adjacency,
        )
        if rate is None:
            name, rate = "sample_rate", found
        else:
            name = "noise_multiplier" if sigma is None else "steps"
        if steps is None and arguments.epochs is not None:
            steps = max(1, math.ceil(arguments.epochs / rate - 1e-9))
        out = {name: found}
        sigma, steps = (found if name == "noise_multiplier" else sigma), (found if name == "steps" else steps)
    else:
        for name, value in (("--noise-multiplier", sigma), ("--sample-rate", rate), ("--steps", steps)):
            if value is None:
                raise AccountingError(f"{name} is missing.", why="epsilon depends on it.", cure=f"pass {name}.")
        accountant = PLDAccountant(arguments.adjacency).compose(dpsgd(sigma, rate, steps))
        if arguments.command == "epsilon":
            low, high = accountant.epsilon_bounds(arguments.delta)
            out = {"epsilon": high, "epsilon_lower": low, "delta": arguments.delta}
        else:
            curve = TradeOff(accountant)
            out = {
                "advantage": curve.advantage,
                "bayes_success": curve.bayes_success(),
                "tpr": {f"{fpr:g}": curve.tpr(fpr) for fpr in arguments.fpr},
            }
    if arguments.plot:
        _plot(arguments, sigma, rate, steps)
    return out


def _plot(arguments: argparse.Namespace, sigma: float, rate: float, steps: int) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AccountingError(
            "matplotlib is not installed.", why="--plot draws with it.", cure="pip install 'dpkit[plots]'."
        ) from None
    figure = Figure(figsize=(5.0, 3.5), layout="constrained")
    axes = figure.subplots()
    if arguments.command == "tradeoff":
        curve = TradeOff(PLDAccountant(arguments.adjacency).compose(dpsgd(sigma, rate, steps)))
        rates = [10.0 ** (-6.0 + 0.4 * i) for i in range(16)]
        axes.loglog(rates, [curve.tpr(x) for x in rates], label="best attack, at most")
        axes.loglog(rates, rates, ":", label="guessing")
        axes.set_xlabel("false-positive rate")
        axes.set_ylabel("true-positive rate")
        axes.legend()
    else:
        delta = arguments.delta if arguments.delta is not None else 1e-5
        counts = sorted({max(1, round(steps * i / 40)) for i in range(1, 41)})
        values = []
        accountant = PLDAccountant(arguments.adjacency)
        done = 0
        for count in counts:
            accountant.compose(dpsgd(sigma, rate, count - done))
            done = count
            values.append(accountant.epsilon(delta))
        axes.plot(counts, values)
        axes.set_xlabel("steps")
        axes.set_ylabel(f"ε at δ = {delta:g}")
    figure.savefig(arguments.plot)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 2 with the reason on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        out = _run(arguments)
    except AccountingError as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(out))
        return 0
    for name, value in out.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                print(f"{name} at {key}: {inner:.6g}")
        else:
            print(f"{name}: {value:.8g}" if isinstance(value, float) else f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
