"""Pictures of what accountants answer. Needs matplotlib (``pip install 'dpkit[plots]'``), no display, and no pyplot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .calibration import make_accountant
from .errors import AccountingError
from .events import Event
from .fdp import TradeOff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = tuple(10.0 ** (-6.0 + 0.2 * i) for i in range(31))
"""The false-positive rates at which a trade-off curve is drawn, 1e-6 to 1."""

Events = Sequence[tuple[Event, int]]


def blank(size: tuple[float, float] = (5.5, 3.8)) -> tuple[Figure, Any]:
    """An empty figure and its axes; it belongs to no window and needs none.

    Raises:
        AccountingError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AccountingError(
            "matplotlib is not installed.", why="figures are drawn with it.", cure="pip install 'dpkit[plots]'."
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; the name's ending says in which format.

    Raises:
        AccountingError: it could not be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise AccountingError(
            f"the figure {os.fspath(path)}: {error}.",
            why="it could not be written.",
            cure="pass a writable file name that ends in .png, .svg or .pdf.",
        ) from None


def prefixes(events: Events, points: int = 40) -> Iterator[tuple[int, list[tuple[Event, int]]]]:
    """(how many releases, what was released since the prefix before), growing to the whole in about so many parts."""
    total, done, fresh = sum(n for _, n in events), 0, []
    marks = {max(1, round(total * i / points)) for i in range(1, points + 1)}
    for event, count in events:
        left = count
        while left:
            step = min(left, min(mark for mark in marks if mark > done) - done)
            done, left = done + step, left - step
            fresh.append((event, step))
            if done in marks:
                yield done, fresh
                fresh = []


def over_steps(
    histories: Mapping[str, Events],
    ask: Callable[[Any], float],
    label: str,
    *,
    adjacency: str = "add_or_remove_one",
    accountant: str = "pld",
    limit: tuple[str, float] | None = None,
) -> Figure:
    """What an accountant answers after each release, one curve for each history.

    Args:
        histories: what was released, in order, by name.
        ask: the question, from the accountant to a number, e.g. ``lambda a: a.epsilon(1e-5)``.
        label: what the answer is.
        limit: (name, value) of a level to draw.

    Raises:
        AccountingError: nothing was released in any of them, or matplotlib is not installed.
    """
    if not any(n for events in histories.values() for _, n in events):
        raise AccountingError("nothing was released.", why="there is nothing to draw.", cure="train first.")
    figure, axes = blank()
    for name, events in histories.items():
        judge, counts, values = make_accountant(accountant, adjacency), [0], [0.0]
        for count, fresh in prefixes(events):
            for event, n in fresh:
                judge.compose(event, n)
            counts.append(count)
            values.append(ask(judge))
        axes.plot(counts, values, label=name)
    if limit is not None:
        axes.axhline(limit[1], linestyle=":", color="0.4", label=limit[0])
    if len(histories) > 1 or limit is not None:
        axes.legend(loc="lower right")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("releases (noisy steps)")
    axes.set_ylabel(label)
    return figure


def tradeoff(curves: Mapping[str, TradeOff]) -> Figure:
    """The largest true-positive rate of any test for one unit's presence, against its false-positive rate; one curve
    for each name. Both axes are logarithmic: what an attacker who may hardly ever be wrong achieves is on the left.

    Raises:
        AccountingError: no curves, or matplotlib is not installed.
    """
    if not curves:
        raise AccountingError("no curves were given.", why="there is nothing to draw.", cure="pass {name: TradeOff}.")
    figure, axes = blank()
    for name, curve in curves.items():
        axes.loglog(RATES, [curve.tpr(fpr) for fpr in RATES], label=f"{name}: best test, at most")
    axes.loglog(RATES, RATES, ":", color="0.4", label="guessing")
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    axes.legend(loc="lower right")
    return figure
