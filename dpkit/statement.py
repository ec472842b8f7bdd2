"""What a run promises: the guarantee, how it came about, what it takes for granted and leaves out, as one value.

It says what the guides ask to be said of a differentially private model: the setting, the unit of privacy and what
neighbours are, which uses of the data are covered, what is released, how it was accounted under which assumptions, and
how to check it (after the reporting advice of Ponomareva et al. 2023, "How to DP-fy ML", and the components of a
guarantee of NIST SP 800-226). `dpkit.wording` writes it as text and as Markdown. Without torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from dpkit.accountants import Event, PLDAccountant, TradeOff

from . import wording
from .errors import ConfigurationError

SCHEMA, SCHEMA_VERSION = "dpkit.statement", 1
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)


@dataclass(frozen=True)
class Assumption:
    """What has to hold for the guarantee; ``checked``: how this run was seen to keep it, "" if it was not checked."""

    text: str
    checked: str = ""


@dataclass(frozen=True)
class Scope:
    """One thing that ε covers, or does not."""

    topic: str
    text: str


@dataclass(frozen=True)
class Strength:
    """What a guarantee means: what a test for one unit's presence achieves at best, as f-DP says (Dong, Roth, Su 2022).

    Attributes:
        advantage: the most that its true-positive rate exceeds its false-positive rate.
        tpr: (false-positive rate, the largest true-positive rate there), pairs.
    """

    advantage: float
    tpr: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Statement:
    """The whole guarantee. ``str(statement)`` is the text; `markdown`, `model_card` and `json` say the same.

    Every number is the accountant's, the ledger's or the engine's own.

    Attributes:
        epsilon, delta: the guarantee, of everything released so far; ``epsilon`` is an upper bound.
        epsilon_lower: a lower bound on the least ε at ``delta`` that the mechanism has, as it was accounted: what lies
            between is the accountant's slack.
        adjacency, neighbours: which two data sets are neighbours, the accountant's name for it and in words.
        unit, units: whose presence is hidden, and how many there are.
        strength: what it means for one unit.
        accountant: the name of the judge.
        releases, events: how many releases were made, and what was counted for them: (event, how often), in order.
        sampling, clipping, noise: in words.
        max_grad_norm: C of now.
        expected_batch_size: the divisor of the noisy sums.
        seeded: what was seeded by hand ("noise", "draws"); a run that repeats protects only against those who do not
            know the seeds.
        max_epsilon: the hard budget, if there is one.
        runs, epsilon_of_runs: how many runs the durable ledger holds, this one included, and ε of all of them together
            (at ``delta``); None without a ledger.
        cautions: what a reader should be warned of.
        assumptions: what has to hold, and how it was checked.
        covered, left_out: what ε covers, and what it does not.
        version: of dpkit.
    """

    epsilon: float
    epsilon_lower: float
    delta: float
    adjacency: str
    neighbours: str
    unit: str
    units: int
    strength: Strength
    accountant: str
    releases: int
    events: tuple[tuple[Event, int], ...]
    sampling: str
    clipping: str
    noise: str
    max_grad_norm: float
    expected_batch_size: float
    seeded: tuple[str, ...]
    max_epsilon: float | None
    runs: int | None
    epsilon_of_runs: float | None
    cautions: tuple[str, ...]
    assumptions: tuple[Assumption, ...]
    covered: tuple[Scope, ...]
    left_out: tuple[Scope, ...]
    version: str

    def __str__(self) -> str:
        return wording.text(self.to_dict(), self.events)

    def markdown(self, level: int = 2) -> str:
        """As Markdown, with headings from ``level`` on."""
        if level not in range(1, 6):
            raise ConfigurationError(
                f"level is {level!r}", why="it is that of a heading.", cure="pass 1, 2, 3, 4 or 5."
            )
        return wording.markdown(self.to_dict(), self.events, level)

    def model_card(self, *, front_matter: bool = False) -> str:
        """A section for a Hugging Face model card (``README.md``); with ``front_matter`` a card of its own, whose YAML
        header holds the tags and the numbers."""
        return (wording.front_matter(self.to_dict()) if front_matter else "") + self.markdown()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able: infinity is the string "inf". `from_dict` gives back an equal statement."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "dpkit_version": self.version,
            "guarantee": {
                "epsilon": _plain(self.epsilon),
                "epsilon_lower": _plain(self.epsilon_lower),
                "delta": self.delta,
                "adjacency": self.adjacency,
                "neighbours": self.neighbours,
                "unit": self.unit,
                "units": self.units,
            },
            "strength": {
                "advantage": self.strength.advantage,
                "tpr": [{"fpr": fpr, "tpr": tpr} for fpr, tpr in self.strength.tpr],
            },
            "accounting": {
                "accountant": self.accountant,
                "releases": self.releases,
                "events": [{"event": event.to_json(), "count": count} for event, count in self.events],
                "max_epsilon": self.max_epsilon,
                "runs": self.runs,
                "epsilon_of_runs": _plain(self.epsilon_of_runs),
            },
            "mechanism": {
                "sampling": self.sampling,
                "clipping": self.clipping,
                "max_grad_norm": self.max_grad_norm,
                "expected_batch_size": self.expected_batch_size,
                "noise": self.noise,
                "seeded": list(self.seeded),
            },
            "cautions": list(self.cautions),
            "assumptions": [{"text": a.text, "checked": a.checked} for a in self.assumptions],
            "covered": [{"topic": s.topic, "text": s.text} for s in self.covered],
            "left_out": [{"topic": s.topic, "text": s.text} for s in self.left_out],
        }

    def json(self) -> str:
        """`to_dict` as a JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_dict(data: Any) -> Statement:
        """The statement that `to_dict` wrote.

        Raises:
            ConfigurationError: no statement, of another schema version, or with missing or surplus fields.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            _refuse("what was given is no statement", "its schema says so.", "pass what Statement.to_dict() returned.")
        if data.get("schema_version") != SCHEMA_VERSION:
            _refuse(
                f"a statement of schema version {data.get('schema_version')!r}",
                f"this release reads version {SCHEMA_VERSION} only; guessing could change what it says.",
                "read it with the dpkit release that wrote it.",
            )
        try:
            said = Statement._understood(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # AccountingError is a ValueError
            _refuse(f"a statement that is not understood ({error!r})", "it was changed.", "write it again.")
        if said.to_dict() != data:
            _refuse("a statement with fields that are not known", "they would be lost.", "write it again.")
        return said

    @staticmethod
    def from_json(text: str) -> Statement:
        """The statement that `json` wrote; raises as `from_dict` does."""
        try:
            data = json.loads(text)
        except ValueError as error:
            _refuse(f"what was given is no JSON ({error})", "there is nothing to read.", "pass Statement.json().")
        return Statement.from_dict(data)

    @staticmethod
    def _understood(data: dict[str, Any]) -> Statement:
        flat: dict[str, Any] = {"version": data["dpkit_version"], "strength": data["strength"]}
        for group in ("guarantee", "accounting", "mechanism"):
            flat.update(data[group])
        flat["strength"] = Strength(
            flat["strength"]["advantage"], tuple((pair["fpr"], pair["tpr"]) for pair in flat["strength"]["tpr"])
        )
        for name in ("epsilon", "epsilon_lower", "epsilon_of_runs"):
            flat[name] = math.inf if flat[name] == "inf" else flat[name]
        flat["events"] = tuple((Event.from_json(entry["event"]), entry["count"]) for entry in flat["events"])
        flat["seeded"], flat["cautions"] = tuple(flat["seeded"]), tuple(data["cautions"])
        flat["assumptions"] = tuple(Assumption(a["text"], a["checked"]) for a in data["assumptions"])
        for name in ("covered", "left_out"):
            flat[name] = tuple(Scope(s["topic"], s["text"]) for s in data[name])
        return Statement(**{field.name: flat[field.name] for field in fields(Statement)})

    def verify(self) -> tuple[float, float]:
        """Compute ε anew from the events that the statement lists; returns (lower, upper), from the tight accountant.

        Raises:
            ConfigurationError: the ε that is stated lies below what these events cost, or what it is said to mean
                does.
        """
        judge = judged(self.events, self.adjacency)
        lower, upper = judge.epsilon_bounds(self.delta)
        if not self.epsilon >= lower:
            _refuse(
                f"epsilon {self.epsilon:.6g} is stated, and what was released costs at least {lower:.6g}",
                "the statement promises more than was kept.",
                "take the statement from the engine again; do not edit it.",
            )
        for what, told, least in self._achieved(judge, lower):
            if not told >= least:
                _refuse(
                    f"{what} of a test for one unit is said to be {told:.6g} at most, and some test has {least:.6g}",
                    "the statement promises more than was kept.",
                    "take the statement from the engine again; do not edit it.",
                )
        return lower, upper

    def _achieved(self, judge: PLDAccountant, lower: float) -> Iterator[tuple[str, float, float]]:
        """(what, the bound that is stated, a lower bound on the truth) for all that the strength says."""
        nothing, curve = math.isinf(lower), TradeOff(judge)
        yield "the advantage", self.strength.advantage, 1.0 if nothing else judge.delta_bounds(0.0)[0]
        for fpr, tpr in self.strength.tpr:
            yield f"the true-positive rate at {fpr:g}", tpr, 1.0 if nothing else curve.tpr_bounds(fpr)[0]


def judged(events: tuple[tuple[Event, int], ...], adjacency: str) -> PLDAccountant:
    """The tight accountant, with what was released."""
    judge = PLDAccountant(adjacency)
    for event, count in events:
        judge.compose(event, count)
    return judge


def strength_of(judge: PLDAccountant, epsilon: float) -> Strength:
    """What the guarantee means; where ε is infinite, nothing is promised."""
    if math.isinf(epsilon):
        return Strength(1.0, tuple((fpr, 1.0) for fpr in FALSE_POSITIVE_RATES))
    curve = TradeOff(judge)
    return Strength(curve.advantage, tuple((fpr, curve.tpr(fpr)) for fpr in FALSE_POSITIVE_RATES))


def _plain(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "inf" if value == math.inf else value


def _refuse(seen: str, why: str, cure: str) -> NoReturn:
    raise ConfigurationError(seen, why=why, cure=cure)
