"""Privacy accounting on the command line: ``python -m dpkit.accountants epsilon|delta|calibrate|tradeoff``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from . import calibration
from .accountant import ADJACENCIES
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
    shared.add_argument("--epochs", type=float, help="in place of --steps: passes over the data")
    shared.add_argument("--adjacency", default="add_or_remove_one", choices=ADJACENCIES)
    shared.add_argument("--json", action="store_true", help="print one JSON object; infinity is the string 'inf'")
    shared.add_argument("--plot", metavar="FILE", help="write a figure (needs matplotlib)")
    eps = commands.add_parser("epsilon", parents=[shared], help="bounds on epsilon at a delta")
    eps.add_argument("--delta", type=float, required=True)
    dlt = commands.add_parser("delta", parents=[shared], help="bounds on delta at an epsilon")
    dlt.add_argument("--epsilon", type=float, required=True)
    cal = commands.add_parser("calibrate", parents=[shared], help="the one missing number for a target")
    cal.add_argument("--target-epsilon", type=float)
    cal.add_argument("--delta", type=float)
    cal.add_argument("--target-advantage", type=float, help="largest TPR - FPR of a membership test")
    cal.add_argument("--target-tpr", type=float, help="largest TPR at --fpr")
    cal.add_argument("--fpr", type=float)
    trade = commands.add_parser("tradeoff", parents=[shared], help="what a membership test can achieve")
    trade.add_argument("--fpr", type=float, nargs="*", default=[1e-5, 1e-3, 1e-2, 0.1])
    return parser


def _steps(arguments: argparse.Namespace, rate: float) -> int:
    """The number of steps, given or from --epochs."""
    given: int = arguments.steps
    if arguments.epochs is None:
        return given
    epochs: float = arguments.epochs
    if not (epochs > 0.0 and rate > 0.0):
        raise AccountingError(
            f"--epochs {epochs:g} at sample rate {rate:g}.",
            why="both must be positive to give a number of steps.",
            cure="pass --steps.",
        )
    return max(1, math.ceil(epochs / rate - 1e-9))


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    sigma, rate = arguments.noise_multiplier, arguments.sample_rate
    if arguments.steps is not None and arguments.epochs is not None:
        raise AccountingError(
            "--steps and --epochs were both given.", why="one follows from the other.", cure="pass one."
        )
    out: dict[str, Any]
    if arguments.command == "calibrate":
        found = calibration.calibrate(
            target_epsilon=arguments.target_epsilon,
            delta=arguments.delta,
            target_advantage=arguments.target_advantage,
            target_tpr=arguments.target_tpr,
            fpr=arguments.fpr,
            noise_multiplier=sigma,
            sample_rate=rate,
            steps=arguments.steps,
            epochs=arguments.epochs,
            adjacency=arguments.adjacency,
        )
        if sigma is None:
            out = {"noise_multiplier": found}
            sigma, steps = found, _steps(arguments, rate)
        elif rate is None:
            out = {"sample_rate": found}
            rate, steps = found, _steps(arguments, found)
        else:
            out, steps = {"steps": found, "epochs": found * rate}, found
    else:
        missing = (
            ("--noise-multiplier", sigma),
            ("--sample-rate", rate),
            ("--steps", arguments.steps or arguments.epochs),
        )
        for name, value in missing:
            if value is None:
                raise AccountingError(f"{name} is missing.", why="the answer depends on it.", cure=f"pass {name}.")
        steps = _steps(arguments, rate)
        accountant = PLDAccountant(arguments.adjacency).compose(dpsgd(sigma, rate, steps))
        if arguments.command == "epsilon":
            low, high = accountant.epsilon_bounds(arguments.delta)
            out = {"epsilon": high, "epsilon_lower": low, "delta": arguments.delta}
        elif arguments.command == "delta":
            low, high = accountant.delta_bounds(arguments.epsilon)
            out = {"delta": high, "delta_lower": low, "epsilon": arguments.epsilon}
        else:
            curve = TradeOff(accountant)
            out = {
                "advantage": curve.advantage,
                "bayes_success": curve.bayes_success(),
                "gdp_mu": curve.gdp_mu,
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
    setting = f"σ = {sigma:.4g}, q = {rate:.4g}, T = {steps}"
    accountant = PLDAccountant(arguments.adjacency)
    if arguments.command == "tradeoff" or getattr(arguments, "target_epsilon", 0.0) is None:
        curve = TradeOff(accountant.compose(dpsgd(sigma, rate, steps)))
        rates = [10.0 ** (-6.0 + 0.3 * i) for i in range(21)]
        axes.loglog(rates, [curve.tpr(x) for x in rates], label="best test, at most")
        axes.loglog(rates, rates, ":", label="guessing")
        axes.set_xlabel("false-positive rate")
        axes.set_ylabel("true-positive rate")
        axes.legend()
    else:
        counts = sorted({max(1, round(steps * i / 40)) for i in range(41)})
        values, done = [], 0
        for count in counts:
            accountant.compose(dpsgd(sigma, rate, count - done))
            done = count
            if arguments.command == "delta":
                values.append(accountant.delta(arguments.epsilon))
            else:
                values.append(accountant.epsilon(arguments.delta))
        axes.plot(counts, values)
        axes.set_ylim(bottom=0.0)
        axes.set_xlim(0, steps)
        axes.set_xlabel("steps")
        if arguments.command == "delta":
            axes.set_ylabel(f"δ at ε = {arguments.epsilon:g}")
        else:
            axes.set_ylabel(f"ε at δ = {arguments.delta:g}")
            if arguments.command == "calibrate":
                axes.axhline(arguments.target_epsilon, linestyle=":", color="0.4", label="target")
                axes.legend(loc="lower right")
    axes.set_title(setting, fontsize="medium")
    try:
        figure.savefig(arguments.plot)
    except (OSError, ValueError) as error:
        raise AccountingError(
            f"--plot {arguments.plot}: {error}.",
            why="the figure could not be written.",
            cure="pass a writable file name that ends in .png, .svg or .pdf.",
        ) from None


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return "inf" if value == math.inf else value


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
        print(json.dumps(_plain(out)))
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
