"""Who takes part in a step.

A sampling is a frozen value with ``draws(generator)`` (one pass over the data: the units of each logical batch)
and ``event(inner, first)`` (what a step of it costs, given the noise's event). All of its chance comes from the
generator, and from torch's global one at the moment when ``draws`` is called: put them back, and the pass repeats.
``by_place``: whether what it costs rests on each record keeping its place in the data set throughout a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.distributed import DistributedSampler

from dpkit.accountants import Event, PoissonSampled

from .errors import SamplingError
from .ranks import Ranks
from .units import UnitIndex


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

    @property
    def by_place(self) -> bool: ...

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
    by_place = False

    @property
    def sample_rate(self) -> float:
        return min(1.0, self.expected_batch_size / self.records)

    def draws(self, generator: torch.Generator) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield taking_part(self.records, self.sample_rate, generator).tolist()

    def event(self, inner: Event, *, first: bool) -> Event:
        return inner if self.sample_rate == 1.0 else PoissonSampled(self.sample_rate, inner)


def taking_part(records: int, rate: float, generator: torch.Generator) -> Tensor:
    """[k]: which of so many records take part, each independently with probability ``rate``, in ascending order.

    Of many records a random byte each decides first, which lets through t / 256 of them, and among those a number for
    each, with probability 256 · rate / t. The chance of both together exceeds ``rate`` by less than that of one number
    for each record does: by 2^-53 t / 256 at most, and the last bit of the quotient.
    """
    device, share = generator.device, math.ceil(256 * rate)
    if records < _MANY or share > 255:
        # float64: float32 has steps of 2^-24, and the chance of `u < q` would exceed a small q noticeably
        u = torch.rand(records, generator=generator, dtype=torch.float64, device=device)
        return (u < rate).nonzero().flatten()
    words = torch.empty(-(-records // 8), dtype=torch.int64, device=device).random_(
        -(1 << 63), None, generator=generator
    )
    few = (words.view(torch.uint8)[:records] < share).nonzero().flatten()
    u = torch.rand(len(few), generator=generator, dtype=torch.float64, device=device)
    return few[u < 256 * rate / share]


_MANY = 1 << 17


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
    by_place = True

    def draws(self, generator: torch.Generator) -> Iterator[list[int]]:
        return iter(list(self.batches))  # at once: the sampler's randomness is then used up before any user code runs

    def event(self, inner: Event, *, first: bool) -> Event | None:
        return inner if first else None


def checked(loader: DataLoader[Any], ranks: Ranks | None = None) -> DataLoader[Any]:
    """The user's loader, if it asks for a sampling that can be accounted; raises `SamplingError` if not."""
    if not isinstance(loader, DataLoader):
        _refuse(
            f"data_loader is a {type(loader).__name__}",
            "who takes part in a step has to be drawn, and counted, by the engine.",
            "pass a torch.utils.data.DataLoader over a map-style dataset.",
        )
    own = type(loader).__iter__ is not DataLoader.__iter__
    if own and not type(loader).__module__.startswith("accelerate."):  # what those do, move batches, is done
        _refuse(
            f"the loader is a {type(loader).__name__}, whose __iter__ is its own",
            "the engine draws batches from the data set itself, and what is done to them there would be left out.",
            "do it in collate_fn, in the data set or in the loop, and pass a plain DataLoader.",
        )
    if isinstance(loader.dataset, IterableDataset):
        _refuse(
            f"the data set is an IterableDataset ({type(loader.dataset).__name__})",
            "records of a stream cannot be drawn independently, so no sampling rate is true.",
            "use a map-style dataset (__getitem__ and __len__).",
        )
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        _refuse(
            f"the loader batches by {type(batches).__name__}",
            "batches composed by the user's own rule have no known sampling rate.",
            "build the DataLoader with batch_size=..., and let the engine draw.",
        )
    sampler: Any = batches.sampler
    records = len(loader.dataset)  # type: ignore[arg-type]
    plain = (type(sampler) is SequentialSampler and len(sampler) == records) or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == records
    )
    if type(sampler) is DistributedSampler and ranks is not None and ranks.size > 1:
        if (sampler.num_replicas, sampler.rank) != (ranks.size, ranks.rank):
            _refuse(
                f"the loader draws by a DistributedSampler for rank {sampler.rank} of {sampler.num_replicas}",
                f"this is rank {ranks.rank} of {ranks.size}.",
                "build it as DistributedSampler(dataset), or leave it out.",
            )
    elif not plain:
        _refuse(
            f"the loader draws by {type(sampler).__name__}",
            "uniform sampling would be accounted while other records are drawn, or others than asked for.",
            "use shuffle=True; for a part of the data torch.utils.data.Subset; weights or repetition change the "
            "sampling rate of single records and are not supported.",
        )
    if records == 0:
        _refuse("the data set is empty", "there is nothing to sample from.", "pass a data set with records.")
    return loader


def sampling_of(loader: DataLoader[Any], units: UnitIndex, ranks: Ranks | None = None, *, poisson: bool) -> Sampling:
    """How often each unit is drawn: the loader's batch size counts units, of all ranks together; with a
    DistributedSampler, of each rank."""
    batches: Any = loader.batch_sampler
    size, many = batches.batch_size, "records" if units.records else "units"
    if isinstance(batches.sampler, DistributedSampler):
        size *= 1 if ranks is None else ranks.size
        if not poisson:
            _refuse(
                "poisson_sampling=False with a DistributedSampler",
                "it deals some records out twice, so that all ranks have as many.",
                "leave the sampler out: every rank takes its share of the loader's batches.",
            )
    if units.records and _repeats(loader.dataset):
        _refuse(
            "the data set is a Subset or ConcatDataset that holds a record several times",
            "the record would take part in a step with more than the sampling rate, and be clipped once for each copy.",
            "use each index once, or say with privacy_unit whose rows they are.",
        )
    if size > units.count:
        _refuse(
            f"batch_size {size} exceeds the {units.count} {many} of the data set",
            "no sampling rate gives that expected batch size.",
            f"use batch_size <= {units.count}.",
        )
    steps = units.count // size if batches.drop_last else math.ceil(units.count / size)
    if poisson:
        return PoissonSampling(units.count, float(size), steps)
    if not units.records:
        order: Any = range(units.count)
        shuffled = isinstance(batches.sampler, RandomSampler)
        sampler = RandomSampler(order, generator=loader.generator) if shuffled else SequentialSampler(order)
        batches = BatchSampler(sampler, size, batches.drop_last)
    return FixedBatches(batches, float(size), steps)


def _repeats(dataset: Any) -> bool:
    """Whether a row of a data set that Subset and ConcatDataset are made of is in it several times."""
    found: dict[int, list[Tensor]] = {}

    def collect(part: Any, rows: Tensor) -> None:
        rows = rows % len(part)  # -1 is the last one
        if isinstance(part, Subset):
            collect(part.dataset, torch.as_tensor(list(part.indices))[rows])
        elif isinstance(part, ConcatDataset):
            ends = torch.tensor(part.cumulative_sizes)
            which = torch.bucketize(rows, ends, right=True)
            for k, inner in enumerate(part.datasets):
                collect(inner, rows[which == k] - (int(ends[k - 1]) if k else 0))
        else:
            found.setdefault(id(part), []).append(rows)

    if isinstance(dataset, Subset | ConcatDataset):
        collect(dataset, torch.arange(len(dataset)))
    return any(len(torch.cat(rows).unique()) < sum(map(len, rows)) for rows in found.values())


def _refuse(seen: str, why: str, cure: str) -> NoReturn:
    raise SamplingError(seen, why=why, cure=cure)
