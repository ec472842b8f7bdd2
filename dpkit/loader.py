"""How a logical batch is served: through the user's own dataset, collate_fn and workers, in parts where asked for.

Workers run ahead of what the user has; what counts, and what is saved, is what was served and worked on. An interrupted
pass goes on by repeating its draws from the pass's beginning and serving those that were not done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate

from . import randomness
from .collating import Collates
from .errors import CheckpointError, SamplingError, UnfinishedStepError
from .fingerprint import marks_of
from .paced import RepeatedOrder
from .ranks import Ranks
from .sampling import FixedBatches, Sampling
from .seeds import scramble, unforeseeable
from .shares import mark_of, shared
from .state import refuse_others
from .trees import tree_map
from .units import UnitIndex, Units

Limit = int | Callable[[], int] | None
"""The most rows of a physical batch, or what says so when a logical batch is drawn."""


@dataclasses.dataclass(eq=False)
class Draw:
    """One physical batch in the user's hands.

    Attributes:
        units: whose its rows are.
        last: whether it completes its logical batch, so that ``optimizer.step()`` releases.
        logical, part: its place: the how-manieth logical batch of the pass, and which part of it.
        number: how many batches with records were served before it in the pass.
        limit: the most rows that a part of its logical batch may have.
        done: whether it has been worked on, or skipped; then what follows it is next.
        void: whether its rows are another rank's, and served to keep this one in step; they do not enter the sum.
        mark: tells its logical batch from others, where several ranks draw the same.
    """

    units: Units
    last: bool
    logical: int
    part: int
    number: int
    limit: int | None = None
    done: bool = False
    void: bool = False
    mark: int = 0

    @property
    def n(self) -> int:
        """Rows in it; the records, where a record is the unit of privacy."""
        return self.units.rows

    @property
    def place(self) -> tuple[int, int]:
        """(logical batch, part) of what is to be done next: itself, until it is done."""
        if not self.done:
            return self.logical, self.part
        return (self.logical + 1, 0) if self.last else (self.logical, self.part + 1)


class _PhysicalBatches:
    """The batch sampler behind `PrivateDataLoader`: splits logical draws, notes each in ``log`` (workers run ahead)."""

    def __init__(
        self, sampling: Sampling, units: UnitIndex, generator: torch.Generator, given: Limit, ranks: Ranks
    ) -> None:
        self.sampling, self.units, self.generator, self.given = sampling, units, generator, given
        self.ranks = ranks
        self.log: deque[Draw] = deque()
        self.start, self.served = (0, 0), 0
        self.resumed: int | None = None  # the limit of the logical batch that a resumed pass starts in
        self.order: int | None = None  # tells the order of a pass from others, where what a pass costs rests on it
        self._drawn: Iterator[list[list[int]]] | None = None  # the pass, until somebody begins to go through it

    @property
    def limit(self) -> int | None:
        """The most rows of a part; no unit is split."""
        limit = self.given() if callable(self.given) else self.given
        return None if limit is None else max(limit, self.units.most)

    def __len__(self) -> int:
        return self.sampling.steps

    def begin(self) -> None:
        """Draw a pass, once: torch's iterators ask for the batches once or twice, by what workers there are."""
        draws, self.order = self.sampling.draws(self.generator), None
        if isinstance(self.sampling, FixedBatches | RepeatedOrder):
            batches = list(draws)
            draws, self.order = iter(batches), mark_of(batches)
        self._drawn = self._rows(draws)

    def _rows(self, draws: Iterator[list[int]]) -> Iterator[list[list[int]]]:
        return (self.units.drawn(k, self.generator) for k in draws)

    def __iter__(self) -> Iterator[list[int]]:
        self.log = deque()
        return self._serve(self.log, *self.start, self.served)

    def _serve(self, log: deque[Draw], logical: int, part: int, number: int) -> Iterator[list[int]]:
        draws, self._drawn = self._drawn or self._rows(self.sampling.draws(self.generator)), None
        for k, drawn in enumerate(islice(draws, logical, None), logical):
            limit = self.resumed if k == logical and self.resumed is not None else self.limit
            parts, count = shared(drawn, limit, self.ranks)
            mark = mark_of(drawn) if self.ranks.size > 1 else 0
            for j, mine in enumerate(parts):
                if (k, j) < (logical, part):
                    continue
                sizes = tuple(len(rows) for rows in mine)
                draw = Draw(Units(sizes, self.units.averaged), j == len(parts) - 1, k, j, number=number, limit=limit)
                draw.void, draw.mark = j >= count, mark
                log.append(draw)
                if mine:
                    number += 1
                    yield list(chain(*mine))


class Listener(Protocol):
    """The engine, as the loader sees it."""

    def begin_pass(self) -> None: ...
    def admits(self) -> bool: ...
    def hand_out(self, draw: Draw, batch: Any) -> None: ...
    def take_back(self, draw: Draw) -> None: ...
    def empty_draw(self, draw: Draw) -> None: ...


class PrivateDataLoader(DataLoader[Any]):
    """The user's data loader with private batches; ``len`` is the number of logical batches (optimizer steps).

    Attributes:
        completed: how many passes came to their end.
        inside: whether a pass is under way: begun, and neither at its end nor left.
    """

    _is_accelerate_prepared = True  # Accelerate takes other loaders apart and draws from their pieces

    def __init__(
        self,
        loader: DataLoader[Any],
        sampling: Sampling,
        units: UnitIndex,
        listener: Listener,
        limit: Limit,
        ranks: Ranks,
    ) -> None:
        generator = loader.generator
        if generator is None:
            # not from torch's global one: amplification holds against those only who cannot repeat the draw
            generator = unforeseeable()
        self.completed, self.inside = 0, False
        self._listener: Listener | None = listener
        self._given = loader.generator
        self._device: torch.device | None = getattr(loader, "device", None)  # where Accelerate's loaders put batches
        self._passes, self._process = 0, os.getpid()
        self._latest: Draw | None = None
        self._place, self._served = (0, 0), 0  # where a resumed pass goes on, after how many batches with records
        self._origin: dict[str, torch.Tensor] = {}  # the generators when this pass began
        self._order: int | None = None  # of the pass that is gone on with
        self._rows = len(loader.dataset)  # type: ignore[arg-type]
        self._marks: dict[str, Any] | None = None
        self._owned: int | None = None
        self._fetched: Draw | None = None
        self._chance = randomness.Chance()  # outside the engine, before that one was fetched
        self._resumed: dict[str, Any] | None = None  # chance at the moment of the checkpoint, until the pass goes on
        self._then: dict[str, Any] | None = None  # and after the batch that had been fetched by then is fetched again
        workers: dict[str, Any] = {}
        self._workers: randomness.BatchChance | None = None
        alone = units.records and units.copies == 1 and loader.collate_fn is not default_collate
        collate = Collates(loader.collate_fn) if alone else loader.collate_fn
        if loader.num_workers > 0:
            self._workers = randomness.BatchChance(collate, loader.worker_init_fn)
            workers = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
                "multiprocessing_context": loader.multiprocessing_context,
            }
        super().__init__(
            loader.dataset,
            batch_sampler=_PhysicalBatches(sampling, units, generator, limit, ranks),
            num_workers=loader.num_workers,
            collate_fn=self._workers or collate,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=self._workers.begin if self._workers is not None else None,
            generator=torch.Generator(),  # for the workers' seeds alone
            pin_memory_device=loader.pin_memory_device,
            **workers,
        )

    def close(self) -> None:
        """Stop serving: the engine has been detached."""
        self._listener = None

    @property
    def seeded(self) -> bool:
        """Whether the draws repeat with a seed that somebody chose."""
        return self._given is not None

    @property
    def units(self) -> UnitIndex:
        """Whose rows are drawn together."""
        return self._batches.units

    @property
    def _batches(self) -> _PhysicalBatches:
        batches = self.batch_sampler
        assert isinstance(batches, _PhysicalBatches)
        return batches

    # ---- serving

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        listener = self._attached()
        with contextlib.closing(self._serve(listener)) as served:
            for draw, batch in served:
                if draw.n:
                    yield batch
                else:
                    listener.empty_draw(draw)

    def logical_batches(self) -> Iterator[Iterator[Any]]:
        """One pass, one item for each optimizer step: the step's physical batches, none where nobody was drawn.

        For loops that count steps, or do something after each of them:

        >>> for parts in loader.logical_batches():                                              # doctest: +SKIP
        ...     for batch in parts:
        ...         engine.backward(losses(model, batch))
        ...     optimizer.step()
        ...     scheduler.step()

        Call ``optimizer.step()`` once for each item, whether it held batches or not.

        Raises:
            UnfinishedStepError: the next item is asked for before all parts of this one were taken.
        """
        with contextlib.closing(self._serve(self._attached())) as served:
            for draw, batch in served:
                yield self._parts(draw, batch, served)
                if self._latest is not None and not self._latest.last:
                    raise UnfinishedStepError(
                        "the next logical batch was asked for before all parts of this one were taken",
                        why="its step would be taken on a part of the records that were drawn.",
                        cure="go through all parts, then call optimizer.step(); or leave the pass (break).",
                    )

    def _parts(self, draw: Draw, batch: Any, served: Iterator[tuple[Draw, Any]]) -> Iterator[Any]:
        if draw.n:
            yield batch
        while not draw.last:
            draw, batch = next(served)
            yield batch

    def _attached(self) -> Listener:
        if self._listener is None:
            raise SamplingError(
                "this private data loader belongs to an engine that was detached",
                why="nobody would count the batches it draws.",
                cure="use the original data loader, or call make_private again.",
            )
        return self._listener

    def _serve(self, listener: Listener) -> Generator[tuple[Draw, Any], None, None]:
        """A pass: every draw in its turn, handed out, with its batch (None where nobody was drawn); then taken back."""
        self._passes += 1
        this = self._passes
        inner = self._begin(listener)
        try:
            log, end = self._batches.log, object()
            batch: Any = None
            while batch is not end:
                chance = randomness.Chance()
                batch = next(inner, end)
                self._refuse_stale(this, listener)
                if batch is not end:
                    self._fetched, self._chance = next(d for d in log if d.n), chance
                if self._then is not None:
                    randomness.restore(self._then)
                    self._then = None
                while log:
                    self._refuse_stale(this, listener)
                    if not listener.admits():
                        return
                    draw = self._latest = log.popleft()
                    placed = self._placed(batch) if draw.n else None
                    listener.hand_out(draw, placed)
                    yield draw, placed
                    listener.take_back(draw)
                    if draw.n:
                        break
            self.completed += 1
        finally:
            if self._passes == this:
                self.inside, self._latest = False, None

    def _placed(self, batch: Any) -> Any:
        device = self._device
        if device is None:
            return batch
        return tree_map(lambda v: v.to(device, non_blocking=self.pin_memory) if hasattr(v, "to") else v, batch)

    def _refuse_stale(self, this: int, listener: Listener) -> None:
        """Raise in a pass that another one, or the engine's end, has made void: not even its empty draws are steps."""
        if self._listener is not listener:
            raise SamplingError(
                "a pass over the data was resumed after its engine had been detached",
                why="nobody would count the batches it draws.",
                cure="leave the loop before engine.detach(), or call make_private again and begin a new pass.",
            )
        if self._passes != this:
            raise SamplingError(
                "an earlier pass over the data was resumed after a later one had begun",
                why="parts of two logical batches would meet in one sum, and a record may be in both.",
                cure="finish or leave one pass before the next; for two batches at a time call next() twice on one.",
            )

    def _begin(self, listener: Listener) -> Iterator[Any]:
        """A new pass, or the rest of an interrupted one."""
        chance, self._resumed = self._resumed, None
        self._refuse_other_length()
        if chance is None:
            listener.begin_pass()
            if self._process != os.getpid() and not self.seeded:  # forked: the other process draws from here, too
                scramble(self._batches.generator)
            self._process = os.getpid()
            self._batches.resumed = None
            self._place, self._served = (0, 0), 0
            self._origin = self._ranks_origin()
        own = randomness.capture() if chance is None and not self._batches.ranks.first else chance
        if own is not None:
            self._batches.generator.set_state(self._origin["draws"])
            torch.set_rng_state(self._origin["torch"])
        self.inside, self._latest, self._fetched = True, None, None
        self._batches.start, self._batches.served = self._place, self._served
        if self._workers is not None:
            self._workers.first = self._served
        seed = torch.empty((), dtype=torch.int64).random_(generator=self._given)  # in every pass, as torch does itself
        self.generator.manual_seed((int(seed) + self._batches.ranks.rank) % (1 << 63))
        self._batches.begin()
        inner = super().__iter__()
        if own is not None:
            randomness.restore(own)
        self._refuse_other_order()
        return inner

    def _refuse_other_length(self) -> None:
        rows = len(self.dataset)  # type: ignore[arg-type]
        if rows != self._rows:
            raise SamplingError(
                f"the data set has {rows} rows now, and had {self._rows} when the model was made private",
                why="who is drawn, and with which rate, was settled then: new records would never be, or others twice.",
                cure="engine.detach(), and make_private again: what was spent is added up.",
            )

    def _refuse_other_order(self) -> None:
        order, self._order = self._order, None
        if order is not None and order != self._batches.order:
            self.inside = False
            raise CheckpointError(
                "the pass that was interrupted cannot be gone on with: its batches come out in another order now",
                why="a record would take part a second time in a pass that was paid for once.",
                cure="make the data loader (shuffle, generator) as in the run that was saved, with the same torch; or "
                "load the checkpoint with replay=False: the rest of the pass is paid for anew.",
            )

    def _ranks_origin(self) -> dict[str, torch.Tensor]:
        """The generators that a pass is drawn from, in the state that they have on rank 0."""
        origin = {"draws": self._batches.generator.get_state(), "torch": torch.get_rng_state()}
        if self._batches.ranks.size == 1:
            return origin
        held = self._batches.ranks.decide(lambda: {name: state.tolist() for name, state in origin.items()})
        return {name: torch.tensor(state, dtype=torch.uint8) for name, state in held.items()}

    # ---- state

    def configuration(self) -> dict[str, Any]:
        """What has to be the same where a saved state is loaded, in numbers and words."""
        sampling: Any = self._batches.sampling
        units = self._batches.units
        fields = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling)}
        return {
            "records": len(self.dataset),  # type: ignore[arg-type]
            "units": units.count,
            "max_rows_per_unit": units.max_rows,
            "augmentations": units.copies,
            "unit_reduction": "mean" if units.averaged else "sum",
            "max_physical_batch_size": "auto" if callable(self._batches.given) else self._batches.given,
            **{name: value for name, value in fields.items() if isinstance(value, int | float | str)},
            **({} if units.rows is None else {"units' rows": self._owners()}),
            **(self._data() if sampling.by_place else {}),
        }

    def _data(self) -> dict[str, Any]:
        """Some rows of the data set, for what rests on its records keeping their places."""
        if self._marks is None:
            marks = marks_of(self.dataset)
            self._marks = {f"data set's {name}": mark for name, mark in marks.items() if mark is not None}
        return self._marks

    def _owners(self) -> int:
        """Tells which rows are whose."""
        if self._owned is None:
            rows = self._batches.units.rows or ()
            self._owned = mark_of([[len(r), *r] for r in rows])
        return self._owned

    def state_dict(self) -> dict[str, Any]:
        """The place in the pass, the generators that its draws repeat from, and the chance outside the engine."""
        then = None
        if self._resumed is not None:
            chance, then = self._resumed, self._then
        elif self.inside and self._fetched is not None and not self._fetched.done:
            chance = self._chance.plain()  # it will be fetched again
            if self._fetched is not self._latest:  # while draws of nobody came first
                then = randomness.capture()
        else:
            chance = randomness.capture()
        place = self._latest.place if self._latest is not None else self._place
        draws = self._batches.generator.get_state()
        return {
            "completed": self.completed,
            "inside": self.inside,
            "place": list(place if self._batches.ranks.size == 1 else (place[0], 0)),
            "limit": self._limit_at(place),
            "data": self._data() if place[1] and self._batches.ranks.size == 1 else None,
            "served": self._served if self._fetched is None else self._fetched.number + self._fetched.done,
            "origin": self._origin if self.inside else {"draws": draws, "torch": torch.get_rng_state()},
            "order": (self._order if self._resumed is not None else self._batches.order) if self.inside else None,
            "chance": chance,
            "then": then,
        }

    def _limit_at(self, place: tuple[int, int]) -> int | None:
        """What the parts of the logical batch there are, or will be, cut by."""
        if self._resumed is not None:
            return self._batches.resumed
        drawn = [d for d in (self._latest, *self._batches.log) if d is not None and d.logical == place[0]]
        return drawn[0].limit if self.inside and drawn else self._batches.limit

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: where a pass was under way, the next one iterated is its rest."""
        if state["data"] is not None:  # a part of the logical batch is summed up
            refuse_others(self._data(), state["data"])
        self._passes += 1  # an iterator that is still about belongs to another life
        self.completed, self.inside = state["completed"], state["inside"]
        ranks = self._batches.ranks
        # the parts are other ones among several ranks: a logical batch that was begun is begun again
        self._place = tuple(state["place"]) if ranks.size == 1 else (state["place"][0], 0)
        self._served = state["served"]
        self._latest, self._fetched, self._origin = None, None, state["origin"]
        self._order = state["order"]
        self._batches.resumed = state["limit"]
        self._batches.generator.set_state(state["origin"]["draws"])
        chance = state["chance"] if ranks.first else randomness.apart(state["chance"], ranks.rank)
        self._resumed = chance if state["inside"] else None
        self._then = state["then"] if state["inside"] else None
        randomness.restore(chance)

    def reseed(self) -> None:
        """Draw anew, by nobody's seed, from the current logical batch on; its parts that were served are forgotten."""
        self._place, self._order = (self._place[0], 0), None
        generator = self._batches.ranks.share(scramble(self._batches.generator))
        self._origin = {**self._origin, "draws": generator.get_state()}


def refuse_private(loader: object) -> None:
    """Raise if the data loader is one that `make_private` returned."""
    if isinstance(loader, PrivateDataLoader):
        raise SamplingError(
            "the data loader is private already",
            why="its draws are counted by another engine.",
            cure="pass the original one; several networks that learn from the same batch are one module "
            "(nn.ModuleList) with one optimizer.",
        )
