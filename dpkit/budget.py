"""The hard budget: training ends before (ε, δ) would be exceeded, never after."""

from __future__ import annotations

from dpkit.accountants import Accountant, Event, RDPAccountant, make_accountant

Totals = dict[Event, int]


class Budget:
    """Whether one more release fits into (``max_epsilon``, ``delta``), asked before each and answered at little cost.

    Guarantee: what was admitted is (``max_epsilon``, ``delta``)-DP together, stopping time included, as long as the
    noise multipliers followed a schedule that was fixed in advance: every prefix of it meets the budget. Where σ is
    chosen in view of earlier releases, the accountant's answer does not apply: use `dpkit.accountants.RDPFilter`.

    Args:
        kind: "pld" or "rdp", the judge.
        expected: how many releases to ask for at once; a question is then asked only once in so many steps.
    """

    def __init__(self, max_epsilon: float, delta: float, *, kind: str, adjacency: str, expected: int) -> None:
        self.max_epsilon, self.delta = max_epsilon, delta
        self._kind, self._adjacency, self._expected = kind, adjacency, max(1, expected)
        self._event: Event | None = None
        self._before: Totals = {}  # what had been released when `_room` was found
        self._room = 0

    def admits(self, totals: Totals, event: Event) -> bool:
        """Whether ``event`` fits beside what was released so far."""
        if event != self._event or self._used(totals) >= self._room:
            self._event, self._before, self._room = event, dict(totals), self.room(totals, event, self._expected)
        return self._used(totals) < self._room

    def holds(self, totals: Totals) -> bool:
        """Whether what was released is known to be within the budget."""
        return self._event is not None and self._fits(totals, self._event, 0)

    def _used(self, totals: Totals) -> int:
        """How many runs of the event have been added since the question, all of them if others were added too."""
        assert self._event is not None
        used = totals.get(self._event, 0) - self._before.get(self._event, 0)
        others = {e: n for e, n in totals.items() if e != self._event}
        known = {e: n for e, n in self._before.items() if e != self._event}
        return used if others == known and used >= 0 else self._room

    def room(self, totals: Totals, event: Event, most: int) -> int:
        """How many more runs of ``event`` are known to fit: ``most``, or at least half of what does; 0 if none does."""
        while most and not self._fits(totals, event, most):
            most //= 2
        return most

    def most(self, totals: Totals, event: Event, cap: int = 1 << 40) -> int:
        """How many more runs of ``event`` fit, exactly (or ``cap``)."""
        low, high = 0, 1
        while self._fits(totals, event, high):
            low, high = high, 4 * high
            if high > cap:
                return cap
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(totals, event, middle) else (low, middle)
        return low

    def _fits(self, totals: Totals, event: Event, count: int) -> bool:
        judge = make_accountant(self._kind, self._adjacency)
        for other, n in totals.items():
            judge.compose(other, n)
        return judge.compose(event, count).epsilon(self.delta) <= self.max_epsilon


def kind_of(accountant: Accountant) -> str:
    """The judge by the accountant's name: "rdp" for the Rényi accountant, else "pld"."""
    return "rdp" if isinstance(accountant, RDPAccountant) else "pld"
