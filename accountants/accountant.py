"""The base of the accountants: a ledger of what was done, and the questions that can be asked of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, SupportsIndex, TypeVar

from .errors import AccountingError
from .events import Event, _count

VERSION = 1
ADJACENCIES = ("add_or_remove_one", "replace_one", "zero_out")
Self = TypeVar("Self", bound="Accountant")


def check_delta(delta: float) -> float:
    """``delta`` as a float in (0, 1), or an error."""
    if not 0.0 < delta < 1.0:
        raise AccountingError(
            f"delta is {delta!r}.",
            why="delta is a probability strictly between 0 and 1; at 0 Gaussian noise has no finite epsilon.",
            cure="pass a delta well below 1 / number of records, e.g. 1e-6.",
        )
    return float(delta)


def check_epsilon(epsilon: float) -> float:
    """``epsilon`` as a float of at least 0 (infinity allowed), or an error."""
    if not epsilon >= 0.0:
        raise AccountingError(f"epsilon is {epsilon!r}.", why="epsilon is at least 0.", cure="pass a number >= 0.")
    return float(epsilon)


class Accountant(ABC):
    """Judges a growing ledger of events under one adjacency.

    Guarantee: unless the class says "estimate", `epsilon` and `delta` are upper bounds for the adaptive composition of
    everything in the ledger, provided that the schedule of events was fixed in advance (see `dpkit.accountants.filters`
    for schedules that depend on the data's answers).

    Args:
        adjacency: which two data sets are neighbours: ``add_or_remove_one`` (one record more or less), ``replace_one``
            (one record exchanged; the sum moves by up to 2C) or ``zero_out`` (one record's contribution nulled).
    """

    kind: ClassVar[str] = ""
    is_estimate: ClassVar[bool] = False
    """Whether answers are estimates, of which no guarantee may be quoted."""
    needs_fixed_schedule: ClassVar[bool] = True
    """Whether answers hold only for a schedule of events fixed in advance; False for filters and odometers."""

    def __init__(self, adjacency: str = "add_or_remove_one") -> None:
        if adjacency not in ADJACENCIES:
            raise AccountingError(
                f"adjacency is {adjacency!r}.",
                why="the sensitivity of every release depends on it.",
                cure=f"pass one of {', '.join(ADJACENCIES)}.",
            )
        self._adjacency = adjacency
        self._ledger: list[tuple[Event, int]] = []
        self._said: dict[float, float] = {}  # epsilon by delta: the same question has the same answer

    @property
    def adjacency(self) -> str:
        """The neighbouring relation of every answer."""
        return self._adjacency

    @property
    def ledger(self) -> tuple[tuple[Event, int], ...]:
        """What was released, in order, as (event, count); equal neighbours are merged."""
        return tuple(self._ledger)

    def compose(self: Self, event: Event, count: SupportsIndex = 1) -> Self:
        """Add ``count`` runs of ``event`` to the ledger; returns the accountant itself.

        Raises:
            AccountingError: not an event, or a count below 0.
            UnsupportedEventError: an event this accountant cannot bound; the ledger is then unchanged.
        """
        if not isinstance(event, Event):
            raise AccountingError(
                f"compose() got {event!r}.",
                why="only an event says what was released.",
                cure="pass e.g. PoissonSampled(0.01, Gaussian(1.0)).",
            )
        times = _count("count", count)
        parts = event.flat()
        last = self._ledger[-1][0] if self._ledger else None
        for part, _ in parts:
            if part != last:
                self._check(part)
        for part, n in parts:
            self._append(part, n * times)
        return self

    def _append(self, event: Event, n: int) -> None:
        if n == 0:
            return
        self._said.clear()
        if self._ledger and self._ledger[-1][0] == event:
            self._ledger[-1] = (self._ledger[-1][0], self._ledger[-1][1] + n)
        else:
            self._ledger.append((event, n))

    def totals(self) -> dict[Event, int]:
        """The ledger without its order: how often each event ran in all."""
        out: dict[Event, int] = {}
        for event, n in self._ledger:
            out[event] = out.get(event, 0) + n
        return out

    @abstractmethod
    def _check(self, event: Event) -> None:
        """Raise UnsupportedEventError unless ``event`` (a single one) can be bounded."""

    @abstractmethod
    def _epsilon(self, delta: float) -> float: ...

    @abstractmethod
    def _delta(self, epsilon: float) -> float: ...

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon this accountant can vouch for at ``delta``; 0.0 for an empty ledger, never negative.

        Raises:
            AccountingError: delta outside (0, 1).
        """
        delta = check_delta(delta)
        if not self._ledger:
            return 0.0
        if delta not in self._said:
            value = self._epsilon(delta)
            self._said[delta] = math.inf if math.isnan(value) else max(0.0, float(value))
        return self._said[delta]

    def delta(self, epsilon: float) -> float:
        """The smallest delta this accountant can vouch for at ``epsilon``; in [0, 1].

        Raises:
            AccountingError: epsilon below 0.
        """
        epsilon = check_epsilon(epsilon)
        value = self._delta(epsilon) if self._ledger else 0.0
        return 1.0 if math.isnan(value) else min(1.0, max(0.0, float(value)))

    def state_dict(self) -> dict[str, Any]:
        """The ledger and the adjacency, JSON-able; `load_state_dict` restores them exactly."""
        return {
            "version": VERSION,
            "accountant": self.kind,
            "adjacency": self._adjacency,
            "ledger": [[event.to_json(), n] for event, n in self._ledger],
        }

    def load_state_dict(self, state: Any) -> None:
        """Replace the ledger by a stored one. Any accountant reads any other's: the ledger says what was done.

        Raises:
            AccountingError: another format version, another adjacency, or events that are not understood; the ledger
                is then unchanged.
        """
        if not isinstance(state, dict) or not {"version", "adjacency", "ledger"} <= set(state):
            raise AccountingError(
                "the stored state is not an accountant's.",
                why="version, adjacency and ledger are needed.",
                cure="pass what state_dict() returned.",
            )
        if state["version"] != VERSION:
            raise AccountingError(
                f"the stored state has format version {state['version']!r}.",
                why=f"this release reads version {VERSION} only; guessing could lose a release.",
                cure="load it with the dpkit release that wrote it.",
            )
        if state["adjacency"] != self._adjacency:
            raise AccountingError(
                f"the stored state is for adjacency {state['adjacency']!r}, this accountant for {self._adjacency!r}.",
                why="the same noise gives another epsilon under another adjacency.",
                cure=f"build the accountant with adjacency={state['adjacency']!r}.",
            )
        fresh = type(self)(adjacency=self._adjacency)
        for data, n in state["ledger"]:
            fresh.compose(Event.from_json(data), n)
        self._ledger, self._said = fresh._ledger, {}

    def __repr__(self) -> str:
        n = sum(count for _, count in self._ledger)
        return f"{type(self).__name__}(adjacency={self._adjacency!r}, releases={n})"
