"""dpkit on the command line: ``dpkit budget LEDGER`` tells what the runs on a data set have spent, and what is left."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from dpkit.accountants import AccountingError, make_accountant

from .budget import Budget
from .errors import ConfigurationError, PrivacyError
from .ledger import Ledger, Run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    budget = commands.add_parser("budget", help="what is spent, by run and in all, and what is left")
    budget.add_argument("ledger", help="the file that PrivacyEngine(ledger=...) writes")
    budget.add_argument("--delta", type=float, help="by default the runs' own target_delta")
    budget.add_argument("--max-epsilon", type=float, help="the budget, to tell what is left of it")
    budget.add_argument("--accountant", choices=("pld", "rdp"), default="pld")
    budget.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def budget(
    ledger: Ledger, *, delta: float | None = None, max_epsilon: float | None = None, kind: str = "pld"
) -> dict[str, Any]:
    """What a ledger's runs have spent at ``delta``, each and together, and how many more releases fit.

    Raises:
        ConfigurationError: no delta, and the runs have none in common.
    """
    if delta is None:
        named = (run.about.get("target_delta") for run in ledger.runs.values())
        wanted = {float(value) for value in named if value is not None}
        if len(wanted) != 1:
            raise ConfigurationError(
                f"{ledger.path}: no delta was given, and the runs name {sorted(wanted) or 'none'}",
                why="ε is a function of δ.",
                cure="pass --delta.",
            )
        delta = wanted.pop()

    def epsilon(totals: Any) -> float:
        judge = make_accountant(kind, ledger.adjacency)
        for event, n in totals.items():
            judge.compose(event, n)
        return judge.epsilon(delta)

    spent = epsilon(ledger.totals())
    out: dict[str, Any] = {
        "delta": delta,
        "adjacency": ledger.adjacency,
        "runs": [{"run": name, **_told(run), "epsilon": epsilon(run.totals)} for name, run in ledger.runs.items()],
        "epsilon": spent,
        "torn": ledger.torn,
    }
    if max_epsilon is not None:
        limit = Budget(max_epsilon, delta, kind=kind, adjacency=ledger.adjacency, expected=1)
        latest = {
            name: next((r.event for r in reversed(run.releases) if r.event), None) for name, run in ledger.runs.items()
        }
        out["max_epsilon"], out["left"] = max_epsilon, max(0.0, max_epsilon - spent)
        out["releases_left"] = {
            name: limit.most(ledger.totals(), event) for name, event in latest.items() if event is not None
        }
    return out


def _told(run: Run) -> dict[str, Any]:
    return {
        "begun": run.about.get("time", ""),
        "sampling": run.about.get("sampling", ""),
        "releases": len(run.releases),
    }


def _lines(told: dict[str, Any]) -> list[str]:
    at = f"at delta {told['delta']:g}"
    lines = [
        f"run {run['run']}, begun {run['begun']}, {run['sampling']}: {run['releases']} releases, "
        f"epsilon {run['epsilon']:.6g}"
        for run in told["runs"]
    ]
    lines.append(f"all {len(told['runs'])} runs together: epsilon {told['epsilon']:.6g} {at} ({told['adjacency']})")
    if "left" in told:
        lines.append(
            f"left of {told['max_epsilon']:g}: {told['left']:.6g} for another mechanism, by simple composition"
        )
        lines += [f"  or {n} more releases like the last of run {name}" for name, n in told["releases_left"].items()]
    if told["torn"]:
        lines.append("the last line is torn: its release was never handed out, and is not counted")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0, or 2 with the reason on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        told = budget(
            Ledger(arguments.ledger, None),
            delta=arguments.delta,
            max_epsilon=arguments.max_epsilon,
            kind=arguments.accountant,
        )
    except (PrivacyError, AccountingError) as error:
        if arguments.json:
            print(json.dumps({"error": str(error)}))
        else:
            print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(told) if arguments.json else "\n".join(_lines(told)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
