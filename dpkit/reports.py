"""What the command line tells of files: ``dpkit budget LEDGER`` and ``dpkit statement FILE``.

Without torch, until a checkpoint is opened.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dpkit.accountants import Accountant, Event, commands, figures, make_accountant, rounding

from .budget import Budget
from .errors import ConfigurationError
from .ledger import Ledger, Run
from .statement import Statement, judged, strength_of

FORMATS = ("text", "markdown", "card", "json")


def add_to(parsers: Any, program: str) -> None:
    """Add these commands."""
    budget = commands.command(
        parsers,
        "budget",
        budget_of,
        "what the runs on a data set have spent, each and together, and what is left",
        f"{program} budget run.ledger --max-epsilon 8",
        parents=[commands.printing()],
    )
    budget.add_argument("ledger", help="the file that PrivacyEngine(ledger=...) writes")
    budget.add_argument("--delta", type=float, help="by default the runs' own target_delta")
    budget.add_argument("--max-epsilon", type=float, help="the budget, to tell what is left; exit code 1 if exceeded")
    budget.add_argument("--accountant", choices=("pld", "rdp"), default="pld", help="pld is tight, rdp quick")
    said = commands.command(
        parsers,
        "statement",
        statement_in,
        "the whole guarantee of a run, from its checkpoint or from a stored statement, which is verified",
        f"{program} statement run.checkpoint --format markdown",
        parents=[commands.printing()],
    )
    said.add_argument("file", help="what engine.save_checkpoint wrote, or Statement.json()")
    said.add_argument("--delta", type=float, help="by default the run's target_delta")
    said.add_argument("--format", choices=FORMATS, default="text", help="card is a Hugging Face model card")


# ---- budget


def budget_of(arguments: argparse.Namespace) -> commands.Answer:
    """What a ledger's runs have spent at a delta, each and together, and how many more releases fit.

    Raises:
        ConfigurationError: no delta, and the runs have none in common.
    """
    ledger, limit = Ledger(arguments.ledger, None), arguments.max_epsilon
    delta = _delta_of(ledger) if arguments.delta is None else arguments.delta
    kind, adjacency = arguments.accountant, ledger.adjacency

    def spent(totals: dict[Event, int]) -> Accountant:
        judge = make_accountant(kind, adjacency)
        for event, n in totals.items():
            judge.compose(event, n)
        return judge

    total = spent(ledger.totals()).epsilon(delta)
    means = strength_of(judged(tuple(ledger.totals().items()), adjacency), total)
    told: dict[str, Any] = {
        "delta": delta,
        "adjacency": adjacency,
        "runs": [
            {"run": name, **_told(run), "epsilon": spent(run.totals).epsilon(delta)}
            for name, run in ledger.runs.items()
        ],
        "epsilon": total,
        "strength": {"advantage": means.advantage, "tpr": {f"{fpr:g}": tpr for fpr, tpr in means.tpr}},
        "torn": ledger.torn,
    }
    if limit is not None:
        hard = Budget(limit, delta, kind=kind, adjacency=adjacency, expected=1)
        latest = {
            name: next((r.event for r in reversed(run.releases) if r.event), None) for name, run in ledger.runs.items()
        }
        told["max_epsilon"], told["left"] = limit, max(0.0, limit - total)
        told["releases_left"] = {
            name: hard.most(ledger.totals(), event) for name, event in latest.items() if event is not None
        }
    if arguments.plot:
        histories = {
            f"run {name}": [(release.event, 1) for release in run.releases if release.event is not None]
            for name, run in ledger.runs.items()
        }
        figures.save(
            figures.over_steps(
                histories,
                lambda judge: judge.epsilon(delta),
                f"ε at δ = {delta:g}",
                adjacency=adjacency,
                accountant=kind,
                limit=None if limit is None else ("budget", limit),
            ),
            arguments.plot,
        )
    exceeded = limit is not None and total > limit
    return commands.Answer(told, _budget_lines(told, exceeded), commands.OVER if exceeded else commands.OK)


def _delta_of(ledger: Ledger) -> float:
    named = (run.about.get("target_delta") for run in ledger.runs.values())
    wanted = {float(value) for value in named if value is not None}
    if len(wanted) != 1:
        raise ConfigurationError(
            f"{ledger.path}: no delta was given, and the runs name {sorted(wanted) or 'none'}",
            why="ε is a function of δ.",
            cure="pass --delta.",
        )
    return wanted.pop()


def _told(run: Run) -> dict[str, Any]:
    return {
        "begun": run.about.get("time", ""),
        "sampling": run.about.get("sampling", ""),
        "releases": len(run.releases),
    }


def _budget_lines(told: dict[str, Any], exceeded: bool) -> list[str]:
    rows = [
        (
            f"run {run['run']}",
            f"epsilon at most {rounding.up(run['epsilon'], 6)}, {run['releases']} releases, begun {run['begun']}, "
            f"{run['sampling']}",
        )
        for run in told["runs"]
    ]
    rows.append((f"all {len(told['runs'])} together", f"epsilon at most {rounding.up(told['epsilon'], 6)}"))
    if "left" in told:
        left = rounding.down(told["left"], 6)
        rows.append(
            (f"left of {told['max_epsilon']:g}", "NOTHING: the budget is exceeded")
            if exceeded
            else (f"left of {told['max_epsilon']:g}", f"{left} for another mechanism, by simple composition")
        )
        rows += [
            ("  or", f"{n} more releases like the last of run {name}") for name, n in told["releases_left"].items()
        ]
    title = f"Spent at delta {rounding.up(told['delta'], 6)} ({told['adjacency']}):"
    lines = commands.table(title, rows, told["strength"] if told["runs"] else None)
    if told["torn"]:
        lines.append("The last line is torn: its release was never handed out, and is not counted.")
    return lines


# ---- statement


def statement_in(arguments: argparse.Namespace) -> commands.Answer:
    """The statement in a file.

    Raises:
        CheckpointError, ConfigurationError: it tells none, or promises more than its events cost.
    """
    said = _stored(arguments.file)
    if said is None:
        from .facts import statement_of  # torch, which only a checkpoint needs

        said = statement_of(arguments.file, arguments.delta)
    elif arguments.delta not in (None, said.delta):
        raise ConfigurationError(
            f"{arguments.file} states its guarantee at delta {said.delta:g}",
            why="what it promises elsewhere is not in it.",
            cure="leave --delta out, or take the statement from the checkpoint.",
        )
    else:
        said.verify()
    if arguments.plot:
        figure = figures.over_steps(
            {"": said.events},
            lambda judge: judge.epsilon(said.delta),
            f"ε at δ = {said.delta:g}",
            adjacency=said.adjacency,
        )
        figures.save(figure, arguments.plot)
    written = {
        "text": said.__str__,
        "markdown": said.markdown,
        "card": lambda: said.model_card(front_matter=True),
        "json": said.json,
    }[arguments.format]()
    return commands.Answer(said.to_dict(), [written.rstrip("\n")])


def _stored(path: str) -> Statement | None:
    """A statement that was stored as JSON; None if the file is something else."""
    try:
        with Path(path).open("rb") as file:
            if file.read(1) != b"{":
                return None
        return Statement.from_json(Path(path).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None  # the checkpoint's reader says why
