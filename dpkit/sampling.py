"""Who takes part in a step, and how the logical batch is served.

A sampling is a value with ``draws(generator)`` (one pass over the data: the units of each logical batch) and
``event(inner, first)`` (what a step of it costs, given the noise's event). `PrivateDataLoader` serves the draws
through the user's own dataset, collate_fn and workers, as physical batches where a bound was given.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from dpkit.accountants import Event, PoissonSampled

from .errors import SamplingError
from .units import UnitIndex, Units


class Sampling(Protocol):
    """What the loader and the ledger ask of a sampling."""

    @property
    def steps(self) -> int: ...

    @property
    def expected_batch_size(self) -> float: ...

    @property
    def sample_rate(self) -> float: ...

    @property
    def name(self) -> str: ...

    def draws(self, generator: torch.Generator) -> Iterator[list[int]]: ...

    def event(self, inner: Event, *, first: bool) -> Event | None: ...


@dataclass(frozen=True)
class PoissonSampling:
    """Every unit (record) takes part in every step independently with probability ``sample_rate``.

    Attributes:
        records: N, units in the data set.
        expected_batch_size: B; q = B / N.
        steps: logical batches in one pass.
    """

    records: int
    expected_batch_size: float
    steps: int
    name: str = "Poisson sampling"

    @property
    def sample_rate(self) -> float:
        return min(1.0, self.expected_batch_size / self.records)

    def draws(self, generator: torch.Generator) -> Iterator[list[int]]:
        for _ in range(self.steps):
            # float64: float32 has steps of 2^-24, and the chance of `u < q` would exceed a small q noticeably
            u = torch.rand(self.records, generator=generator, dtype=torch.float64, device=generator.device)
            yield (u < self.sample_rate).nonzero().flatten().tolist()

    def event(self, inner: Event, *, first: bool) -> Event:
        return inner if self.sample_rate == 1.0 else PoissonSampled(self.sample_rate, inner)


@dataclass(frozen=True)
class FixedBatches:
    """The user's own fixed-size batches: every record takes part once a pass, in a batch that others may know.

    No amplification is claimed: a pass costs one full-batch Gaussian (parallel composition), with neighbouring data
    sets that differ by zeroing out one record (add-or-remove-one would shift all later batches).
    """

    batches: BatchSampler
    expected_batch_size: float
    steps: int
    sample_rate: float = 1.0
    name: str = "fixed batches"

    def draws(self, generator: torch.Generator) -> Iterator[list[int]]:
        yield from self.batches

    def event(self, inner: Event, *, first: bool) -> Event | None:
        return inner if first else None


@dataclass(eq=False)
class Draw:
    """One physical batch in the user's hands.

    Attributes:
        units: whose its rows are.
        last: whether it completes its logical batch, so that ``optimizer.step()`` releases.
        first: whether it is the first logical batch of a pass.
        noise_multiplier, max_grad_norm: σ and C of its logical batch, fixed when the batch was handed out.
    """

    units: Units
    last: bool
    first: bool
    noise_multiplier: float = 0.0
    max_grad_norm: float = 0.0

    @property
    def n(self) -> int:
        """Rows in it; the records, where a record is the unit of privacy."""
        return self.units.rows


class _PhysicalBatches:
    """The batch sampler behind `PrivateDataLoader`: splits logical draws, notes each in ``log`` (workers run ahead)."""

    def __init__(self, sampling: Sampling, units: UnitIndex, generator: torch.Generator, max_size: int | None) -> None:
        self.sampling, self.units, self.generator, self.max_size = sampling, units, generator, max_size
        self.log: deque[Draw] = deque()

    def __len__(self) -> int:
        return self.sampling.steps

    def __iter__(self) -> Iterator[list[int]]:
        log: deque[Draw] = deque()
        self.log = log
        return self._serve(log)

    def _serve(self, log: deque[Draw]) -> Iterator[list[int]]:
        for k, drawn in enumerate(self.sampling.draws(self.generator)):
            if not drawn:
                log.append(Draw(Units(()), last=True, first=k == 0))
                continue
            parts = list(self.units.parts(drawn, self.generator, self.max_size))
            for number, (rows, units) in enumerate(parts, 1):
                log.append(Draw(units, last=number == len(parts), first=k == 0))
                yield rows


class Listener(Protocol):
    """The engine, as the loader sees it."""

    def begin_pass(self) -> None: ...
    def hand_out(self, draw: Draw) -> None: ...
    def take_back(self, draw: Draw) -> None: ...
    def empty_draw(self, draw: Draw) -> None: ...


class PrivateDataLoader(DataLoader[Any]):
    """The user's data loader with private batches; ``len`` is the number of logical batches (optimizer steps)."""

    def __init__(
        self,
        loader: DataLoader[Any],
        sampling: Sampling,
        units: UnitIndex,
        listener: Listener,
        max_size: int | None,
    ) -> None:
        generator = loader.generator
        if generator is None:
            # not from torch's global one: amplification holds against those only who cannot repeat the draw
            generator = torch.Generator().manual_seed(secrets.randbits(63))
        self._listener: Listener | None = listener
        self._passes = 0
        workers: dict[str, Any] = {}
        if loader.num_workers > 0:
            workers = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
                "multiprocessing_context": loader.multiprocessing_context,
            }
        super().__init__(
            loader.dataset,
            batch_sampler=_PhysicalBatches(sampling, units, generator, max_size),
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
            pin_memory_device=loader.pin_memory_device,
            **workers,
        )

    def close(self) -> None:
        """Stop serving: the engine has been detached."""
        self._listener = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        listener = self._listener
        if listener is None:
            raise SamplingError(
                "this private data loader belongs to an engine that was detached",
                why="nobody would count the batches it draws.",
                cure="use the original data loader, or call make_private again.",
            )
        batches: Any = self.batch_sampler
        listener.begin_pass()
        self._passes += 1
        this = self._passes
        inner = super().__iter__()
        log = batches.log
        for batch in inner:
            if self._passes != this:
                _refuse(
                    "an earlier pass over the data was resumed after a later one had begun",
                    "parts of two logical batches would meet in one sum, and a record may be in both.",
                    "finish or leave one pass before the next; for two batches at a time call next() twice on one.",
                )
            while log[0].n == 0:
                listener.empty_draw(log.popleft())
            draw = log.popleft()
            listener.hand_out(draw)
            yield batch
            listener.take_back(draw)
        while log:
            listener.empty_draw(log.popleft())


def checked(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The user's loader, if it asks for a sampling that can be accounted; raises `SamplingError` if not."""
    if isinstance(loader, PrivateDataLoader):
        _refuse(
            "the data loader is private already", "its draws are counted by another engine.", "pass the original one."
        )
    if not isinstance(loader, DataLoader):
        _refuse(
            f"data_loader is a {type(loader).__name__}",
            "who takes part in a step has to be drawn, and counted, by the engine.",
            "pass a torch.utils.data.DataLoader over a map-style dataset.",
        )
    if isinstance(loader.dataset, IterableDataset):
        _refuse(
            f"the data set is an IterableDataset ({type(loader.dataset).__name__})",
            "records of a stream cannot be drawn independently, so no sampling rate is true.",
            "use a map-style dataset (__getitem__ and __len__).",
        )
    batches, size = loader.batch_sampler, loader.batch_size
    if type(batches) is not BatchSampler or size is None:
        _refuse(
            f"the loader batches by {type(batches).__name__}",
            "batches composed by the user's own rule have no known sampling rate.",
            "build the DataLoader with batch_size=..., and let the engine draw.",
        )
    sampler = loader.sampler
    records = len(loader.dataset)  # type: ignore[arg-type]
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == records
    )
    if not plain:
        _refuse(
            f"the loader draws by {type(sampler).__name__}",
            "uniform sampling would be accounted while other records are drawn, or others than asked for.",
            "use shuffle=True; for a part of the data torch.utils.data.Subset; weights or repetition change the "
            "sampling rate of single records and are not supported.",
        )
    if records == 0:
        _refuse("the data set is empty", "there is nothing to sample from.", "pass a data set with records.")
    return loader


def sampling_of(loader: DataLoader[Any], units: UnitIndex, *, poisson: bool) -> Sampling:
    """How often each unit is drawn: the loader's batch size counts units."""
    size, many = loader.batch_size, "records" if units.records else "units"
    assert size is not None
    if units.records and _repeats(loader.dataset):
        _refuse(
            "the data set is a Subset that holds a record several times",
            "the record would take part in a step with more than the sampling rate, and be clipped once for each copy.",
            "use each index once, or say with privacy_unit whose rows they are.",
        )
    if size > units.count:
        _refuse(
            f"batch_size {size} exceeds the {units.count} {many} of the data set",
            "no sampling rate gives that expected batch size.",
            f"use batch_size <= {units.count}.",
        )
    steps = units.count // size if loader.drop_last else math.ceil(units.count / size)
    if poisson:
        return PoissonSampling(units.count, float(size), steps)
    batches: Any = loader.batch_sampler
    if not units.records:
        order: Any = range(units.count)
        shuffled = isinstance(loader.sampler, RandomSampler)
        sampler = RandomSampler(order, generator=loader.generator) if shuffled else SequentialSampler(order)
        batches = BatchSampler(sampler, size, loader.drop_last)
    return FixedBatches(batches, float(size), steps)


def _repeats(dataset: Any) -> bool:
    while isinstance(dataset, Subset):
        if len(set(dataset.indices)) < len(dataset.indices):
            return True
        dataset = dataset.dataset
    return False


def _refuse(seen: str, why: str, cure: str) -> NoReturn:
    raise SamplingError(seen, why=why, cure=cure)
