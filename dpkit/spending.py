"""What a run has released and may still release: accountant, ledger, budget, and what an interruption left behind."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dpkit.accountants import Accountant, Event, GroupOf, PLDAccountant, make_accountant

from .budget import Budget, Totals, kind_of
from .errors import BudgetExhaustedError, CheckpointError, LedgerError, ReplayError
from .fingerprint import Fingerprint
from .ledger import Ledger, Release


class Spending:
    """Counts every release before it is handed out: in the ledger's file if there is one, and in the accountant.

    A run that goes on from a checkpoint repeats the releases that the ledger holds beyond it, with the same draws and
    the same noise. Each must come out as it did: it is then the same release, and was counted. Another sum with the
    same noise would tell the difference of the two without any noise, and is refused.

    Attributes:
        run: the run's name in the ledger.
        released: how many releases the run has made, those of a pass that others paid for included.
        composed: how many events the accountant holds for them; it may hold others that were added by hand.
        budget: the hard budget, if there is one.
        target: what the noise was calibrated for, if it was.
        about: what the ledger says of the run.
    """

    def __init__(self, accountant: Accountant, ledger: Ledger | None) -> None:
        self.accountant, self.ledger = accountant, ledger
        self.run, self.released, self.composed = secrets.token_hex(8), 0, 0
        self.budget: Budget | None = None
        self.target: tuple[float, float] | None = None  # (ε, δ) that σ was calibrated for
        self.about: dict[str, Any] = {}
        self._fingerprint = Fingerprint()
        self._pending: deque[Release] = deque()  # released before the interruption, to be repeated
        self._latest = ""  # the checksum of the run's latest line

    @property
    def repeating(self) -> bool:
        """Whether the next release repeats one that was made before an interruption."""
        return bool(self._pending)

    def admits(self, event: Event | None) -> bool:
        """Whether a release of ``event`` stays within the budget."""
        if self.budget is None or event is None or self.repeating:
            return True
        if self.ledger is not None:
            self.ledger.read()
        return self.budget.admits(self._totals(), event)

    def record(self, event: Event | None, release: Sequence[Tensor]) -> None:
        """Count a release; nobody may see it before this has returned.

        Raises:
            ReplayError: it was made before, and comes out differently.
            BudgetExhaustedError: it does not fit (another run took what was left).
            LedgerError: it could not be written.
        """
        if self._pending:
            self._repeat(event, release)
            return
        if self.ledger is not None:
            mark = self._fingerprint.of(release)
            line = self.ledger.append(
                self.run, event, mark, number=self.released, about=self.about, admit=lambda: self._refuse_excess(event)
            )
            self._latest = line.check
        else:
            self._refuse_excess(event)
        if event is not None:
            self.accountant.compose(event)
            self.composed += 1
        self.released += 1

    def follow(self, event: Event | None) -> None:
        """Another rank has made a release, and counted it as ``event`` (None: it repeats one that was)."""
        if event is not None:
            self.accountant.compose(event)
            self.composed += 1
        self.released += 1

    def mirror(self, state: dict[str, Any]) -> None:
        """Know what rank 0 knows, from its `state_dict`; it alone keeps the ledger."""
        self.accountant.load_state_dict(state["accountant"])
        self.run, self.released, self._latest = state["run"], state["released"], state["latest"]
        self.composed = state["composed"]

    def leave_ledger(self) -> None:
        """Another rank keeps the ledger."""
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = None

    def _repeat(self, event: Event | None, release: Sequence[Tensor]) -> None:
        expected = self._pending[0]
        if (event, self._fingerprint.of(release)) != (expected.event, expected.fingerprint):
            raise ReplayError(
                f"release {self.released} was made before the interruption and comes out differently now",
                why="its noise would be used for two sums, and their difference is then released without noise.",
                cure="undo what changed (code, settings, data, number of threads, hardware); or load the checkpoint "
                "with replay=False: the run goes on with fresh draws and noise, and what was released counts beside.",
            )
        self._latest = self._pending.popleft().check
        self.released += 1

    def _refuse_excess(self, event: Event | None) -> None:
        if self.budget is not None and event is not None and not self.budget.admits(self._totals(), event):
            raise BudgetExhaustedError(
                f"another step would exceed epsilon {self.budget.max_epsilon:g} at delta {self.budget.delta:g}",
                why="the budget was set to hold in any case. Nothing was released.",
                cure="stop here; the weights are those of the last step.",
            )

    def _totals(self) -> Totals:
        """Everything that counts against the budget: the ledger's runs, and what this accountant knows beside."""
        totals = self.accountant.totals()
        if self.ledger is not None:
            run = self.ledger.runs.get(self.run)
            for event, n in self.ledger.totals().items():
                totals[event] = totals.get(event, 0) + n - (run.totals.get(event, 0) if run else 0)
        return totals

    def epsilon(self, delta: float, group_size: int = 1) -> float:
        """ε of this run at ``delta``; with ``group_size`` k, for neighbouring data sets that differ by k units."""
        if group_size > 1:
            judge = PLDAccountant(adjacency=self.accountant.adjacency)  # the Rényi accountant has no bound for groups
            for event, count in self.accountant.ledger:
                judge.compose(GroupOf(group_size, event), count)
            return judge.epsilon(delta)
        value = self.accountant.epsilon(delta)
        budget = self.budget
        if budget is not None and delta == budget.delta and value > budget.max_epsilon and budget.holds(self._totals()):
            return budget.max_epsilon  # both are upper bounds; the other was found on a finer grid
        if self.target is not None and delta == self.target[1] and 0 < value - self.target[0] < 1e-3 * self.target[0]:
            once = make_accountant(kind_of(self.accountant), self.accountant.adjacency)  # as it was calibrated
            for event, count in self.accountant.totals().items():
                once.compose(event, count)
            value = min(value, once.epsilon(delta))
        return value

    def together(self, delta: float) -> tuple[int, float] | None:
        """How many runs the ledger holds, this one included, and ε of all of them; None without a ledger."""
        if self.ledger is None:
            return None
        self.ledger.read()
        judge = make_accountant(kind_of(self.accountant), self.accountant.adjacency)
        for event, n in self._totals().items():
            judge.compose(event, n)
        return len({self.run, *self.ledger.runs}), judge.epsilon(delta)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """The run, how far it is, and what the accountant has counted, to be repeated or not."""
        return {
            "run": self.run,
            "released": self.released,
            "composed": self.composed,
            "counted": self.released + len(self._pending),
            "latest": self._latest,
            "ledger": None if self.ledger is None else self.ledger.id,
            "accountant": self.accountant.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, replay: bool = True, repeatable: bool = True) -> None:
        """Go on with that run; what the ledger, or this process, knows to have been released since stays counted.

        Args:
            replay: repeat those releases, bit for bit; if False the caller sees to fresh randomness.
            repeatable: whether the noise can be repeated.

        Raises:
            CheckpointError: this engine has made releases of another run, or of this run with no ledger to repeat from.
            LedgerError: the ledger does not hold what the checkpoint says.
        """
        same, later = state["run"] == self.run, self.released > state["released"]
        if self.released and not same:
            raise CheckpointError(
                f"this engine has made {self.released} releases of run {self.run}, the checkpoint is of another run",
                why="what this engine has spent would be forgotten.",
                cure="load the checkpoint with a new engine.",
            )
        if self.ledger is None:
            if state["ledger"] is not None:
                raise CheckpointError(
                    "the checkpoint is of a run that keeps a ledger, this engine has none",
                    why="what was released after the checkpoint would not be known.",
                    cure="make the engine with PrivacyEngine(ledger=...), the same file.",
                )
            if same and later and replay:
                raise CheckpointError(
                    f"this engine has made {self.released} releases, the checkpoint holds {state['released']}",
                    why="without a ledger nobody can tell whether the repeated releases come out the same; otherwise "
                    "their noise would be used twice.",
                    cure="load with replay=False: fresh draws and noise, and everything stays counted; or keep a "
                    "ledger.",
                )
            if not (same and later):
                self.accountant.load_state_dict(state["accountant"])
                self.released, self.composed = state["released"], state["composed"]
            self.run = state["run"]
            return
        releases = self._releases_since(self.ledger, state)
        if releases and replay and not repeatable:
            raise CheckpointError(
                f"{len(releases)} releases were made after the checkpoint, with noise that cannot be repeated",
                why="the batches of the checkpoint would be released a second time, which costs more than two batches.",
                cure="load with replay=False: fresh draws, and everything that was released stays counted.",
            )
        new = releases[state["counted"] - state["released"] :]
        since = [[release.event.to_json(), 1] for release in new if release.event is not None]
        held = state["accountant"]
        self.accountant.load_state_dict({**held, "ledger": [*held["ledger"], *since]})
        self.run, self.released, self._latest = state["run"], state["released"], state["latest"]
        self.composed = state["composed"] + len(since)
        self._pending = deque(releases if replay else [])
        if not replay and releases:
            self.released, self._latest = self.released + len(releases), releases[-1].check

    def _releases_since(self, ledger: Ledger, state: dict[str, Any]) -> list[Release]:
        """What the ledger holds of the run beyond the checkpoint."""
        ledger.read()
        run, done, counted = ledger.runs.get(state["run"]), state["released"], state["counted"]
        held = run.releases if run is not None else []
        if state["ledger"] != ledger.id or len(held) < counted or (done and held[done - 1].check != state["latest"]):
            raise LedgerError(
                f"{ledger.path} does not match the checkpoint, which knows of {counted} releases of run {state['run']}"
                + (f"; the ledger holds {len(held)}" if state["ledger"] == ledger.id else " in another ledger"),
                why="releases would be forgotten, or counted in the wrong place.",
                cure="use the ledger that the run was started with, unchanged.",
            )
        return held[done:]
