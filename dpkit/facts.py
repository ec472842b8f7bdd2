"""From a run, or its checkpoint, to what it promises (`dpkit.statement`).

Numbers come from what was counted. What the accountant does not know (whose records, which sampling, what was checked)
the engine tells in `Facts`, one for each time that it was attached; they are kept in its checkpoints. Where an engine
served several lives, the statement says the least that is true of all of them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpkit.accountants import Accountant, Event, make_accountant

from . import __version__, checkpoint
from .errors import CheckpointError, ConfigurationError
from .loader import PrivateDataLoader
from .paced import RepeatedOrder
from .sampling import FixedBatches
from .spending import Spending
from .statement import Assumption, Scope, Statement, judged, strength_of
from .step import PrivateStep


@dataclass(frozen=True)
class Facts:
    """What is known of one life of an engine beside what was counted; plain values.

    Attributes:
        unit, units: whose presence is hidden, and how many there are.
        sampling: in words.
        fixed: whether batches are fixed, so that neighbours differ by zeroing out.
        expected_batch_size: the divisor of the noisy sums.
        clipping: in words.
        max_grad_norm: C of now.
        noise: in words.
        secure, seeded_noise, seeded_draws: of the random numbers.
        examined: whether the model was seen to keep the records apart.
        compared, trainable: how many of the trainable tensors had their gradients compared with autograd's.
        losses_examined: whether losses were given one by one, and seen to be each of its own record.
        durable: whether a ledger's file holds every release.
        max_epsilon: the hard budget, or None.
        processes: how many trained together.
        losses_read: whether the losses' graphs were read, and no record was seen in another one's gradient.
    """

    unit: str
    units: int
    sampling: str
    fixed: bool
    expected_batch_size: float
    clipping: str
    max_grad_norm: float
    noise: str
    secure: bool
    seeded_noise: bool
    seeded_draws: bool
    examined: bool
    compared: int
    trainable: int
    losses_examined: bool
    durable: bool
    max_epsilon: float | None
    processes: int = 1
    losses_read: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def facts_of(step: PrivateStep, spending: Spending, loader: PrivateDataLoader) -> Facts:
    """What there is to know of the attached engine."""
    sampling, units = step.sampling, loader.units
    fixed, drawn = isinstance(sampling, FixedBatches | RepeatedOrder), sampling.sample_rate < 1.0
    trainable = [p for p in step.tape.parameters() if p.requires_grad]
    parts = [sampling.name]
    if units.max_rows is not None:
        parts.append(f"at most {units.max_rows} rows of a unit, drawn anew each time")
    if units.copies > 1:
        parts.append(f"each row read {units.copies} times")
    return Facts(
        unit=units.name,
        units=units.count,
        sampling=", ".join(parts),
        fixed=fixed,
        expected_batch_size=sampling.expected_batch_size,
        clipping=repr(step.clipping),
        max_grad_norm=step.max_grad_norm,
        noise=step.noise.describe(),
        secure=step.noise.secure,
        seeded_noise=step.noise.seeded,
        seeded_draws=drawn and loader.seeded,
        examined=step.tape.examined,
        compared=sum(p in step.tape.proven for p in trainable),
        trainable=len(trainable),
        losses_examined=step.strictly_examined,
        durable=spending.ledger is not None,
        max_epsilon=None if spending.budget is None else spending.budget.max_epsilon,
        processes=step.ranks.size,
        losses_read=step.tape.losses.told,
    )


class Lives:
    """The lives of one engine: what there is to tell of all that it released."""

    def __init__(self, spending: Spending) -> None:
        self._spending = spending
        self._ended: list[Facts] = []
        self._now: tuple[PrivateStep, PrivateDataLoader] | None = None
        self._mark = 0  # how many releases there were when this life began

    def begin(self, step: PrivateStep, loader: PrivateDataLoader) -> None:
        """The engine was attached."""
        self._now, self._mark = (step, loader), self._spending.released

    def end(self) -> None:
        """It is being detached."""
        self._ended, self._now = self.told(), None

    def go_on(self, lives: Sequence[Facts]) -> None:
        """A state was loaded: so far, releases were made in these lives."""
        self._ended, self._mark = list(lives), self._spending.released

    def all(self) -> list[Facts]:
        """The lives in which something was released; where there is none, the present one."""
        return self.told() or self._present()

    def told(self) -> list[Facts]:
        """The lives in which something was released."""
        here = self._present() if self._spending.released > self._mark else []
        return list(dict.fromkeys([*self._ended, *here]))

    def _present(self) -> list[Facts]:
        return [] if self._now is None else [facts_of(self._now[0], self._spending, self._now[1])]


def lives_in(held: Mapping[str, Any]) -> list[Facts]:
    """The lives that an engine's saved state made releases in.

    Raises:
        CheckpointError: it does not tell.
    """
    try:
        return [Facts(**life) for life in held["about"]["lives"]] if held["spending"]["released"] else []
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the saved state does not tell of its run ({error!r})",
            why="a statement of the run would leave out what was released before.",
            cure="load it with the dpkit release that wrote it.",
        ) from error


def stated(
    lives: Sequence[Facts],
    accountant: Accountant,
    releases: int,
    composed: int,
    epsilon: float,
    delta: float,
    together: tuple[int, float] | None,
) -> Statement:
    """The statement of everything that was released in these lives.

    Args:
        composed: how many of the accountant's events are those of the releases.
        together: how many runs the durable ledger holds, and the ε of all of them.

    Raises:
        ConfigurationError: the lives hide the presence of different units.
    """
    names = sorted({life.unit for life in lives})
    if len(names) > 1:
        raise ConfigurationError(
            f"this engine trained with several units of privacy: {', '.join(names)}",
            why="their costs were added up, and the sum is a guarantee for none of them.",
            cure="use an engine for each, and state each by itself.",
        )
    now, events = lives[-1], accountant.ledger
    fixed, adjacency = any(life.fixed for life in lives), accountant.adjacency
    if fixed and adjacency == "add_or_remove_one":
        adjacency = "zero_out"  # the same for all that the engine releases; not for every event that was added by hand
        epsilon = max(epsilon, judged(events, adjacency).epsilon(delta))
    judge = judged(events, adjacency)
    return Statement(
        epsilon=epsilon,
        epsilon_lower=min(epsilon, judge.epsilon_bounds(delta)[0]),
        delta=delta,
        adjacency=adjacency,
        neighbours=f"differ by {_DIFFERENCES[adjacency]} one {now.unit}",
        unit=now.unit,
        units=now.units,
        strength=strength_of(judge, epsilon),
        accountant=type(accountant).__name__,
        releases=releases,
        events=events,
        sampling=_each(life.sampling for life in lives),
        clipping=_each(life.clipping for life in lives),
        noise=_each(life.noise for life in lives),
        max_grad_norm=now.max_grad_norm,
        expected_batch_size=now.expected_batch_size,
        seeded=_seeded(lives),
        max_epsilon=now.max_epsilon,
        runs=None if together is None else together[0],
        epsilon_of_runs=None if together is None else together[1],
        cautions=tuple(_cautions(lives, epsilon, delta, sum(n for _, n in events) - composed)),
        assumptions=tuple(_assumptions(lives, events)),
        covered=COVERED if now.max_epsilon is None else (*COVERED, _BUDGET),
        left_out=LEFT_OUT,
        version=__version__,
    )


def statement_of(path: str | os.PathLike[str], delta: float | None = None) -> Statement:
    """The statement of a run from its checkpoint, without its model: of all that had been released when it was saved.

    Args:
        path: what ``engine.save_checkpoint`` wrote.
        delta: by default the run's target_delta.

    Raises:
        CheckpointError: damaged, or no checkpoint of a run that can be stated.
        ConfigurationError: no delta is known.
    """
    held = checkpoint.load(path)["state"]
    try:
        about, spent = held["about"], held["spending"]
        lives = [Facts(**life) for life in about["lives"]]
        target, counted = about["target_delta"], spent["accountant"]
        releases, composed = int(spent["released"]), int(spent["composed"])
        accountant = make_accountant(counted["accountant"], counted["adjacency"])
        accountant.load_state_dict(counted)
    except (KeyError, TypeError, ValueError) as error:  # AccountingError is a ValueError
        raise CheckpointError(
            f"{path} does not tell what its run promises ({error!r})",
            why="it was written by an earlier release, or by an accountant that has no name.",
            cure="load it into its engine, and ask engine.statement().",
        ) from error
    delta = target if delta is None else delta
    if delta is None:
        raise ConfigurationError(
            f"{path}: no delta was given, and the run had no target_delta",
            why="ε is a function of δ.",
            cure="pass delta=1e-5, say.",
        )
    return stated(lives, accountant, releases, composed, accountant.epsilon(delta), float(delta), None)


_DIFFERENCES = {"add_or_remove_one": "adding or removing", "replace_one": "replacing", "zero_out": "zeroing out"}


def _seeded(lives: Sequence[Facts]) -> tuple[str, ...]:
    """What was seeded by hand in any of the lives."""
    noise, draws = any(life.seeded_noise for life in lives), any(life.seeded_draws for life in lives)
    return ("noise",) * noise + ("draws",) * draws


def _each(words: Iterator[str]) -> str:
    """What was true of some life, each once."""
    return "; in other parts: ".join(dict.fromkeys(words))


def _cautions(lives: Sequence[Facts], epsilon: float, delta: float, beside: int) -> Iterator[str]:
    """What a reader should be warned of."""
    seeded = _seeded(lives)
    if seeded:
        yield (
            f"SEEDED BY HAND: {' and '.join(seeded)}. The run can be repeated; the guarantee holds against those only "
            "who do not know the seed."
        )
    if beside:
        yield f"{beside} of the events were counted as told, by hand or from another library; dpkit did not see them."
    most = max(life.units for life in lives)
    if delta * most >= 1.0:
        yield f"δ is not below 1 / N = {1.0 / most:.3g}: publishing one unit whole would be within it."
    if epsilon == float("inf"):
        yield "Without noise nothing is promised, whatever else is said here."


def _assumptions(lives: Sequence[Facts], events: Sequence[tuple[Event, int]]) -> Iterator[Assumption]:
    """What has to hold, and how it was checked."""

    def seen(what: str, how: str) -> str:
        return how if all(getattr(life, what) for life in lives) else ""

    yield Assumption(
        "the loss is a mean or sum of one loss a record",
        seen("losses_examined", "losses were given one by one, and each had its own record's gradient on a batch")
        or seen("losses_read", "no gradient moved with another record's outputs; constants in it were not seen"),
    )
    yield Assumption(
        "the model treats every record by itself",
        seen("examined", "measured on the first batches: outputs did not move"),
    )
    least = min(lives, key=lambda life: life.compared / max(1, life.trainable))
    yield Assumption(
        "each record's gradient is the one that is clipped",
        f"compared with autograd's on a batch, for {least.compared} of {least.trainable} trainable tensors"
        if least.compared
        else "",
    )
    yield Assumption(
        "records are drawn as was accounted, and each enters a step once",
        "dpkit draws and counts them itself" if not any(life.fixed for life in lives) else "dpkit counts them itself",
    )
    yield Assumption(
        "σ followed a schedule that was fixed in advance: one chosen in view of earlier releases needs a filter",
        "σ and the sampling rate never changed" if len({event for event, _ in events}) <= 1 else "",
    )
    yield Assumption(
        "the last bits of the noisy values tell nothing, and nobody foretells the generator",
        seen("secure", "secure_mode: AES-256, rounded to a grid"),
    )
    yield Assumption(
        "the run was not interrupted and repeated from an earlier state",
        seen("durable", "every release is in a ledger on disk, and repeated ones were compared with it"),
    )
    if any(life.processes > 1 for life in lives):
        yield Assumption(
            "all processes hold the same data in the same order",
            "some rows were compared, and at every step what was drawn",
        )
    drawn = "" if all(life.fixed for life in lives) else "who was drawn, "
    yield Assumption(f"nobody sees {drawn}sums before noise, the engine's checkpoints, or gradients of a batch")
    yield Assumption("a record moves the computed sum by at most C, but for the rounding of floating point")
    yield Assumption("what makes one unit is said rightly: one person has one id, and no record is there twice")
    yield Assumption(
        "a record's content depends on that record alone (no deduplication, sorting or filtering by others)"
    )


COVERED = (
    Scope("weights", "those after every step, all together, the last ones included"),
    Scope(
        "whatever is computed from them", "predictions on other data, averages of weights, fine-tuning on public data"
    ),
)
_BUDGET = Scope("stopping at the hard budget", "when training ended by max_epsilon tells nothing more")
LEFT_OUT = (
    Scope("hyper-parameters", "choices made by looking at the data or at other runs on it; each run spends its own ε"),
    Scope("early stopping", "and selection among checkpoints, by looking at private data"),
    Scope("statistics", "vocabularies, label counts, class weights, normalisation taken from the private data"),
    Scope("public passes", "what is done inside engine.paused()"),
    Scope("logs", "losses, accuracies, gradient norms, engine.nonfinite_records, and whatever is printed from batches"),
    Scope("checkpoints of the engine", "they hold sums without noise, and the generators; publish the weights alone"),
    Scope("inference", "private data that users of the model send to it later"),
    Scope("side channels", "time, memory, and what the machine lets others see; access to the data where it is kept"),
)
