"""A statement's words: as text, as Markdown, and as the YAML header of a model card.

What is said of a bound is rounded to the side on which it stays true. Names that users chose (a privacy unit's column)
are escaped wherever they could end a table's cell, a heading or a YAML value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpkit.accountants import Event, Gaussian, PoissonSampled, rounding

Events = Sequence[tuple[Event, int]]


def promise(said: Mapping[str, Any]) -> str:
    """The formal sentence."""
    told = said["guarantee"]
    epsilon, delta = rounding.up(float(told["epsilon"])), rounding.up(told["delta"], 6)
    return (
        f"The weights are ({epsilon}, {delta})-differentially private for data sets that {told['neighbours']}."
        if epsilon != "inf"
        else f"The weights are NOT differentially private at delta {delta}: what was released had too little noise."
    )


def rows(said: Mapping[str, Any], events: Events) -> Iterator[tuple[str, str]]:
    """What a table says: (what, how much)."""
    told, counted, how = said["guarantee"], said["accounting"], said["mechanism"]
    lower = told["epsilon_lower"]
    yield "Setting", "central: whoever trains sees the data, and is trusted to release the weights only"
    yield "Unit of privacy", f"{told['unit']} ({told['units']} of them, a number that is taken to be public)"
    yield "Neighbouring data sets", f"{told['neighbours']} ({told['adjacency']})"
    yield "What is released", "the weights after every step, and whatever is computed from them"
    yield "ε", f"at most {rounding.up(float(told['epsilon']))}"
    yield "ε, lower bound", f"{rounding.down(float(lower))} (of the mechanism as it was accounted)"
    yield "δ", rounding.up(told["delta"], 6)
    yield from meaning(said["strength"])
    yield "Mechanism", f"noisy sums of clipped gradients; {counted['releases']} releases, by {how['sampling']}"
    for words in counted_words(events):
        yield "Accounted", words
    yield "Clipping", f"{how['clipping']}, to C (now {how['max_grad_norm']:.4g})"
    yield "Noise", how["noise"]
    yield "Expected batch size", f"{how['expected_batch_size']:g}"
    yield "Accounting", f"{counted['accountant']}, a rigorous upper bound"
    if counted["max_epsilon"] is not None:
        yield "Hard budget", f"ε ≤ {counted['max_epsilon']:g} at δ"
    if counted["runs"] is not None:
        spent = rounding.up(float(counted["epsilon_of_runs"]))
        yield "All runs in the ledger", f"{counted['runs']} together: ε at most {spent}"


def meaning(strength: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a test for one unit's presence can achieve."""
    yield "Membership test, advantage", f"at most {rounding.up(strength['advantage'], 3)} (TPR − FPR; 0 is guessing)"
    for pair in strength["tpr"]:
        bound, guess = rounding.up(pair["tpr"], 3), f"{pair['fpr']:g}"
        yield f"Membership test, TPR at {100.0 * pair['fpr']:g}% FPR", f"at most {bound} ({guess} is guessing)"


def counted_words(events: Events, most: int = 8) -> Iterator[str]:
    """What was counted, in at most so many lines: a long schedule of σ by its range (JSON has it step by step)."""
    if not events:
        yield "nothing yet"
    if len(events) <= most:
        yield from (f"{count} × {event_words(event)}" for event, count in events)
        return
    groups: dict[str, list[tuple[float, int]]] = {}
    for event, count in events:
        sigma, others = _noise_of(event)
        groups.setdefault(others, []).append((sigma, count))
    for others, members in list(groups.items())[:most]:
        low, high = min(sigma for sigma, _ in members), max(sigma for sigma, _ in members)
        noise = f"σ from {low:.6g} to {high:.6g}" if low < high else f"σ = {low:.6g}"
        yield f"{sum(count for _, count in members)} × " + (
            others if low < 0.0 else f"Gaussian noise, {noise}, {others}"
        )
    if len(groups) > most:
        rest = sum(count for members in list(groups.values())[most:] for _, count in members)
        yield f"{rest} more, of {len(groups) - most} other kinds"


def event_words(event: Event) -> str:
    """One event, in words."""
    sigma, others = _noise_of(event)
    return f"Gaussian noise, σ = {sigma:.6g}, {others}" if sigma >= 0.0 else others


def _noise_of(event: Event) -> tuple[float, str]:
    """(σ, the rest in words); σ is −1 where the event is no Gaussian step."""
    if isinstance(event, PoissonSampled) and isinstance(event.event, Gaussian):
        return event.event.noise_multiplier, f"q = {event.sample_rate:.6g}"
    if isinstance(event, Gaussian):
        return event.noise_multiplier, "everybody taking part (q = 1)"
    return -1.0, repr(event)


def _lists(said: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The titled lists below the table."""
    if said["cautions"]:
        yield "Caution", list(said["cautions"])
    yield "Covered", [f"{s['topic']}: {s['text']}" for s in said["covered"]]
    yield "Not covered", [f"{s['topic']}: {s['text']}" for s in said["left_out"]]
    checked = [a for a in said["assumptions"] if a["checked"]]
    yield "Assumptions that were checked", [f"{a['text']} ({a['checked']})" for a in checked]
    yield "Assumptions that were not checked", [a["text"] for a in said["assumptions"] if not a["checked"]]


def text(said: Mapping[str, Any], events: Events) -> str:
    """Plain text."""
    lines = [_one_line(promise(said)), ""]
    table = [(what, _one_line(how)) for what, how in rows(said, events)]
    wide = max(len(what) for what, _ in table)
    lines += [f"{what:<{wide}}  {how}" for what, how in table]
    for title, items in _lists(said):
        lines += ["", f"{title}:", *(f"  - {_one_line(item)}" for item in items)]
    return "\n".join([*lines, "", _source(said)])


def markdown(said: Mapping[str, Any], events: Events, level: int) -> str:
    """A section of Markdown."""
    mark = "#" * level
    lines = [f"{mark} Privacy guarantee", "", _escaped(promise(said)), "", "| | |", "|---|---|"]
    lines += [f"| {_escaped(what)} | {_escaped(how)} |" for what, how in rows(said, events)]
    for title, items in _lists(said):
        lines += ["", f"{mark}# {title}", "", *(f"- {_escaped(item)}" for item in items)]
    return "\n".join([*lines, "", _escaped(_source(said)), ""])


def front_matter(said: Mapping[str, Any]) -> str:
    """A YAML header: tags, and the numbers under ``differential_privacy``."""
    told, counted = said["guarantee"], said["accounting"]
    values = {
        "epsilon": told["epsilon"],
        "delta": told["delta"],
        "adjacency": told["adjacency"],
        "unit": told["unit"],
        "accountant": counted["accountant"],
        "releases": counted["releases"],
    }
    lines = ["---", "tags:", "- differential-privacy", "- dp-sgd", "differential_privacy:"]
    return "\n".join([*lines, *(f"  {name}: {_yaml(value)}" for name, value in values.items()), "---", "", ""])


def _yaml(value: float | str) -> str:
    """A scalar that every reader of YAML 1.1 or 1.2 takes for what it is."""
    if value == "inf" or value == math.inf:
        return ".inf"
    if isinstance(value, float):
        mantissa, mark, exponent = repr(value).partition("e")
        return mantissa + ("" if "." in mantissa else ".0") + mark + exponent  # 1e-05 would be a string in YAML 1.1
    return json.dumps(value)  # numbers as they are; a JSON string is a double-quoted YAML string


def _source(said: Mapping[str, Any]) -> str:
    return f"Stated by dpkit {said['dpkit_version']} (docs/guarantee.md says how each part is kept and tested)."


def _one_line(value: str) -> str:
    """Without line ends and other control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _escaped(value: str) -> str:
    """As it stands, in a cell or an item of Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~" else c for c in _one_line(value))
