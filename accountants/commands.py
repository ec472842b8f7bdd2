"""The accountants' part of the command line: ``epsilon``, ``delta``, ``calibrate`` and ``tradeoff``.

`dpkit.__main__` adds its own commands to these; ``python -m dpkit.accountants`` has these alone. A command is a
function from the parsed arguments to an `Answer`; `shown` prints it, or the refusal.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from . import calibration, figures
from .accountant import ADJACENCIES, Accountant
from .calibration import make_accountant
from .errors import AccountingError
from .events import dpsgd
from .fdp import TradeOff
from .pld import PLDAccountant
from .rounding import down, up

OK, OVER, REFUSED = 0, 1, 2
"""Exit codes: done; what was asked about is beyond what it may be (a budget); the question has no true answer."""

RATES = (0.001, 0.01, 0.1)
Row = tuple[str, str]


@dataclass
class Answer:
    """``values`` for ``--json``, ``lines`` for people, and the exit code."""

    values: dict[str, Any]
    lines: list[str]
    code: int = OK


@dataclass(frozen=True)
class Setting:
    """DP-SGD as the command line knows it."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    adjacency: str
    accountant: str

    def judge(self, kind: str = "") -> Accountant:
        """The accountant, with all steps taken."""
        event = dpsgd(self.noise_multiplier, self.sample_rate, self.steps)
        return make_accountant(kind or self.accountant, self.adjacency).compose(event)

    def curve(self) -> TradeOff:
        return TradeOff(self.judge("pld"))

    def values(self) -> dict[str, Any]:
        return {
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "steps": self.steps,
            "adjacency": self.adjacency,
        }

    def title(self) -> str:
        return (
            f"DP-SGD: noise multiplier {up(self.noise_multiplier, 6)}, sampling rate {self.sample_rate:.6g}, "
            f"{self.steps} steps ({self.adjacency})"
        )


# ---- arguments


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Answer], help: str, example: str, **options: Any
) -> argparse.ArgumentParser:
    """Add a command whose help ends in an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(run=run)
    return parser


def printing() -> argparse.ArgumentParser:
    """How to answer: what all commands share."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object; infinity is the string 'inf'")
    shared.add_argument("--plot", metavar="FILE", help="draw it, too: .png, .svg or .pdf (needs dpkit[plots])")
    return shared


def add_to(commands: Any, program: str) -> None:
    """Add the accountants' commands."""
    dp = argparse.ArgumentParser(add_help=False, parents=[printing()])
    dp.add_argument(
        "--noise-multiplier", metavar="SIGMA", type=float, help="noise standard deviation over the clipping norm"
    )
    dp.add_argument("--sample-rate", metavar="Q", type=float, help="probability of a record to be in a batch")
    dp.add_argument(
        "--batch-size", metavar="B", type=float, help="with --records, in place of --sample-rate: expected batch size"
    )
    dp.add_argument("--records", metavar="N", type=int, help="number of records (units)")
    dp.add_argument("--steps", metavar="T", type=int, help="number of noisy steps")
    dp.add_argument("--epochs", metavar="E", type=float, help="in place of --steps: passes over the data")
    dp.add_argument("--adjacency", default="add_or_remove_one", choices=ADJACENCIES)
    dp.add_argument("--accountant", choices=("pld", "rdp"), default="pld", help="pld is tight, rdp quick")
    common = "--noise-multiplier 1.1 --batch-size 256 --records 60000 --epochs 15"

    eps = command(
        commands,
        "epsilon",
        _epsilon,
        "bounds on epsilon at a delta, and what they mean",
        f"{program} epsilon {common} --delta 1e-5",
        parents=[dp],
    )
    eps.add_argument("--delta", type=float, required=True)
    dlt = command(
        commands,
        "delta",
        _delta,
        "bounds on delta at an epsilon",
        f"{program} delta {common} --epsilon 1",
        parents=[dp],
    )
    dlt.add_argument("--epsilon", type=float, required=True)
    cal = command(
        commands,
        "calibrate",
        _calibrate,
        "the one missing number (noise, rate or steps) that meets a target",
        f"{program} calibrate --target-epsilon 3 --delta 1e-5 --batch-size 256 --records 60000 --epochs 15",
        parents=[dp],
    )
    cal.add_argument("--target-epsilon", type=float)
    cal.add_argument("--delta", type=float)
    cal.add_argument("--target-advantage", type=float, help="largest TPR - FPR of a membership test")
    cal.add_argument("--target-tpr", type=float, help="largest TPR at --fpr")
    cal.add_argument("--fpr", type=float)
    trade = command(
        commands,
        "tradeoff",
        _tradeoff,
        "what a membership test can achieve",
        f"{program} tradeoff {common} --fpr 0.001 0.01",
        parents=[dp],
    )
    trade.add_argument("--fpr", type=float, nargs="*", default=[1e-5, 1e-3, 1e-2, 0.1])


def _rate(arguments: argparse.Namespace) -> float | None:
    """The sampling rate, given or from --batch-size and --records."""
    given: float | None = arguments.sample_rate
    size, records = arguments.batch_size, arguments.records
    if size is None and records is None:
        return given
    if given is not None or size is None or records is None:
        raise AccountingError(
            "--sample-rate, --batch-size and --records do not go together like that.",
            why="the rate is given, or it is batch size / records.",
            cure="pass --sample-rate alone, or --batch-size with --records.",
        )
    if not 0.0 < size <= records:
        raise AccountingError(
            f"--batch-size {size:g} of --records {records}.",
            why="their quotient is a probability.",
            cure="pass a batch size between 0 and the number of records.",
        )
    return float(size) / int(records)


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


def _refuse_both(arguments: argparse.Namespace) -> None:
    if arguments.steps is not None and arguments.epochs is not None:
        raise AccountingError(
            "--steps and --epochs were both given.", why="one follows from the other.", cure="pass one."
        )


def _setting(arguments: argparse.Namespace) -> Setting:
    """All of DP-SGD, given."""
    _refuse_both(arguments)
    rate = _rate(arguments)
    missing = (
        ("--noise-multiplier", arguments.noise_multiplier),
        ("--sample-rate", rate),
        ("--steps", arguments.epochs if arguments.steps is None else arguments.steps),
    )
    for name, value in missing:
        if value is None:
            raise AccountingError(f"{name} is missing.", why="the answer depends on it.", cure=f"pass {name}.")
    assert rate is not None
    steps = _steps(arguments, rate)
    return Setting(arguments.noise_multiplier, rate, steps, arguments.adjacency, arguments.accountant)


# ---- what is told


def strength(curve: TradeOff, rates: tuple[float, ...] = RATES) -> dict[str, Any]:
    """What a guarantee means: f-DP's curve at some points."""
    return {"advantage": curve.advantage, "tpr": {f"{fpr:g}": curve.tpr(fpr) for fpr in rates}}


def strength_rows(told: dict[str, Any]) -> Iterator[Row]:
    """The same, for people."""
    yield "advantage", f"at most {up(told['advantage'], 3)}   (TPR - FPR; guessing has 0)"
    for fpr, tpr in told["tpr"].items():
        yield f"TPR at {100.0 * float(fpr):g}% FPR", f"at most {up(tpr, 3)}   (guessing has {fpr})"


def aligned(rows: list[Row]) -> list[str]:
    """Two columns."""
    wide = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{wide}}  {value}" for name, value in rows]


def table(title: str, rows: list[Row], means: dict[str, Any] | None) -> list[str]:
    """A titled table, and below it what the guarantee means."""
    lines = [title, *aligned(rows)]
    if means is not None:
        lines += ["The best test for one record's presence has:", *aligned(list(strength_rows(means)))]
    return lines


def epsilon_row(low: float, high: float, delta: float) -> Row:
    """ε, from above and from below."""
    return "epsilon", f"at most {up(high, 6)} (at least {down(low, 6)}) at delta {up(delta, 6)}"


def _bounds(setting: Setting, delta: float) -> tuple[float, float]:
    """(lower, upper) for ε: the accountant's that was asked for from above, the tight one's from below."""
    high = setting.judge().epsilon(delta)
    tight = setting.judge("pld")
    assert isinstance(tight, PLDAccountant)
    return min(high, tight.epsilon_bounds(delta)[0]), high


# ---- commands


def _epsilon(arguments: argparse.Namespace) -> Answer:
    setting, delta = _setting(arguments), arguments.delta
    low, high = _bounds(setting, delta)
    means = strength(setting.curve())
    if arguments.plot:
        _draw_epsilon(arguments, setting, delta)
    values = {"epsilon": high, "epsilon_lower": low, "delta": delta, **setting.values(), "strength": means}
    return Answer(values, table(setting.title(), [epsilon_row(low, high, delta)], means))


def _delta(arguments: argparse.Namespace) -> Answer:
    setting, epsilon = _setting(arguments), arguments.epsilon
    high = setting.judge().delta(epsilon)
    tight = setting.judge("pld")
    assert isinstance(tight, PLDAccountant)
    low = min(high, tight.delta_bounds(epsilon)[0])
    if arguments.plot:
        figure = figures.over_steps(
            {"": setting.judge().ledger},
            lambda judge: judge.delta(epsilon),
            f"δ at ε = {epsilon:g}",
            adjacency=setting.adjacency,
            accountant=setting.accountant,
        )
        _save(arguments, figure, setting)
    row = ("delta", f"at most {up(high, 6)} (at least {down(low, 6)}) at epsilon {up(epsilon, 6)}")
    values = {"delta": high, "delta_lower": low, "epsilon": epsilon, **setting.values()}
    return Answer(values, table(setting.title(), [row], None))


def _calibrate(arguments: argparse.Namespace) -> Answer:
    _refuse_both(arguments)
    sigma, rate = arguments.noise_multiplier, _rate(arguments)
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
        accountant=arguments.accountant,
    )
    out: dict[str, Any]
    if sigma is None:
        out, row = {"noise_multiplier": found}, ("noise_multiplier", f"at least {up(found, 8)}")
        sigma, steps = found, _steps(arguments, float(rate or 0.0))
    elif rate is None:
        out, row = {"sample_rate": found}, ("sample_rate", f"at most {down(found, 8)}")
        rate, steps = found, _steps(arguments, found)
    else:
        out, row = {"steps": found, "epochs": found * rate}, ("steps", f"at most {found} ({found * rate:.4g} epochs)")
        steps = int(found)
    assert rate is not None
    setting = Setting(sigma, rate, steps, arguments.adjacency, arguments.accountant)
    rows, means = [row], strength(setting.curve())
    if arguments.delta is not None:
        low, high = _bounds(setting, arguments.delta)
        out.update({"epsilon": high, "epsilon_lower": low, "delta": arguments.delta})
        rows.append(epsilon_row(low, high, arguments.delta))
    if arguments.plot and arguments.target_epsilon is None:
        _save(arguments, figures.tradeoff({"DP-SGD": setting.curve()}), setting)
    elif arguments.plot:
        _draw_epsilon(arguments, setting, arguments.delta, ("target", arguments.target_epsilon))
    return Answer({**setting.values(), **out, "strength": means}, table(setting.title(), rows, means))


def _tradeoff(arguments: argparse.Namespace) -> Answer:
    setting = _setting(arguments)
    curve = setting.curve()
    bounds = {f"{fpr:g}": curve.tpr_bounds(fpr) for fpr in arguments.fpr}
    means = {"advantage": curve.advantage, "tpr": {fpr: high for fpr, (_, high) in bounds.items()}}
    if arguments.plot:
        _save(arguments, figures.tradeoff({"DP-SGD": curve}), setting)
    values = {
        **means,
        "tpr_lower": {fpr: low for fpr, (low, _) in bounds.items()},
        "bayes_success": curve.bayes_success(),
        "gdp_mu": curve.gdp_mu,
        **setting.values(),
    }
    rows = [
        ("guesses of in or out", f"right at most {up(values['bayes_success'], 4)} of the time   (0.5 is chance)"),
        ("Gaussian DP", f"mu = {up(values['gdp_mu'], 4)} covers the curve"),
    ]
    return Answer(values, table(setting.title(), rows, means))


def _draw_epsilon(
    arguments: argparse.Namespace, setting: Setting, delta: float, limit: tuple[str, float] | None = None
) -> None:
    figure = figures.over_steps(
        {"DP-SGD": setting.judge().ledger},
        lambda judge: judge.epsilon(delta),
        f"ε at δ = {delta:g}",
        adjacency=setting.adjacency,
        accountant=setting.accountant,
        limit=limit,
    )
    _save(arguments, figure, setting)


def _save(arguments: argparse.Namespace, figure: Any, setting: Setting) -> None:
    title = f"σ = {setting.noise_multiplier:.4g}, q = {setting.sample_rate:.4g}, T = {setting.steps}"
    figure.axes[0].set_title(title, fontsize="medium")
    figures.save(figure, arguments.plot)


# ---- printing


def shown(arguments: argparse.Namespace, out: TextIO, err: TextIO, refusals: tuple[type[Exception], ...] = ()) -> int:
    """Run the command and write its answer, or why there is none; returns the exit code.

    Args:
        refusals: errors that are answers, beside AccountingError: what was seen, why it matters, and the cure.
    """
    answers: tuple[type[Exception], ...] = (AccountingError, *refusals)
    try:
        answer: Answer = arguments.run(arguments)
    except answers as error:
        if arguments.json:
            saw = getattr(error, "saw", None) or getattr(error, "seen", None)
            parts = {"saw": saw, "why": getattr(error, "why", ""), "cure": getattr(error, "cure", "")}
            _write(out, json.dumps({"error": str(error), **parts}))
        else:
            _write(err, f"error: {error}")
        return REFUSED
    _write(out, json.dumps(plain(answer.values)) if arguments.json else "\n".join(answer.lines))
    return answer.code


def _write(stream: TextIO, text: str) -> None:
    """A line, in what the stream can encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for letter, word in {"ε": "epsilon", "δ": "delta", "σ": "sigma", "×": "x", "≤": "<=", "−": "-"}.items():
        try:
            letter.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace(letter, word)
    stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")


def plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return "inf" if value == math.inf else value
