"""The unit of privacy: whose presence the guarantee hides, and which rows of a batch are that unit's.

A unit is one record by default; a user, a patient or a conversation if its rows are many. Units are drawn, the rows of
one come into the batch together, and their gradients become one before it is clipped. What the engine bounds, noises
and accounts for is then the unit, however many rows it has: copies of a row, augmented or not, cost nothing more.

Letters: u unit, n row.

The setting is that of user-level privacy in McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private
Recurrent Language Models" (2018); averaging copies before clipping, of De, Berrada, Hayes, Smith and Balle, "Unlocking
High-Accuracy Differentially Private Image Classification through Scale" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import checks
from .errors import ConfigurationError, SamplingError
from .forms import Form, Outer
from .trees import leaves

PrivacyUnit = str | int | Sequence[Any] | Callable[[Any], Any]
"""A column (a key or position in each row), one id a row, or a function from a row to its unit's id."""


@dataclass(frozen=True)
class Units:
    """The units of one physical batch: the first ``sizes[0]`` rows are one unit's, the next ``sizes[1]`` another's.

    Attributes:
        averaged: whether a unit's gradient is the mean over its rows, or their sum.
    """

    sizes: tuple[int, ...]
    averaged: bool = True

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @cached_property
    def single(self) -> bool:
        """Whether every unit is one row."""
        return all(s == 1 for s in self.sizes)

    def owners(self) -> Tensor | None:
        """[n]: the number of each row's unit; None where every unit is one row."""
        return None if self.single else torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def sq_norm(self, form: Form) -> Tensor:
        """[u]: squared norms of the units' gradients, from the form of their rows.

        Units are taken together with others that have at most twice their rows, so that padding stays below that.
        """
        if self.single:
            return form.sq_norm()
        sizes, starts = self._sizes(), self._starts()
        found, order = [], []
        for band in sizes.log2().ceil().unique():
            mine = (sizes.log2().ceil() == band).nonzero().flatten()
            k = int(sizes[mine].max())
            place = torch.arange(k).expand(len(mine), k)
            own = sizes[mine].unsqueeze(1)
            index = (starts[mine].unsqueeze(1) + torch.minimum(place, own - 1)).flatten()
            weights = ((place < own).double() / (own if self.averaged else 1)).flatten()
            folded = form.take(index).scaled(weights).folded(k)
            found.append((folded.settled() if isinstance(folded, Outer) else folded).sq_norm())
            order.append(mine)
        squares = torch.cat(found)
        return squares[torch.cat(order).argsort().to(squares.device)]

    def spread(self, weights: Tensor) -> Tensor:
        """[n] from [u]: with which weight each row enters the sum over units."""
        if self.single:
            return weights
        sizes = self._sizes().to(weights.device)
        return (weights / sizes if self.averaged else weights).repeat_interleave(sizes)

    def take(self, kept: Tensor) -> tuple[Units, Tensor]:
        """The units ``kept`` [k], and the indices of their rows."""
        chosen = kept.tolist()
        starts = self._starts()
        rows = [torch.arange(int(starts[k]), int(starts[k]) + self.sizes[k]) for k in chosen]
        index = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
        return Units(tuple(self.sizes[k] for k in chosen), self.averaged), index

    def _sizes(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.long)

    def _starts(self) -> Tensor:
        return self._sizes().cumsum(0) - self._sizes()


@dataclass(frozen=True)
class UnitIndex:
    """Which rows of the data set belong to which unit.

    Attributes:
        count: U, the number of units.
        rows: each unit's rows; None where row k is unit k.
        max_rows: at most this many rows of a unit, drawn anew each time, take part in a step.
        copies: how often a row is read each time it takes part (augmentation by the data set's own random transform).
        averaged: whether a unit's gradient is the mean over its rows, or their sum.
    """

    count: int
    rows: tuple[tuple[int, ...], ...] | None = None
    max_rows: int | None = None
    copies: int = 1
    averaged: bool = True
    name: str = "record"

    @property
    def records(self) -> bool:
        """Whether each row of the data set is a unit of its own."""
        return self.rows is None

    @property
    def most(self) -> int:
        """The most rows that one unit brings into a step."""
        largest = 1 if self.rows is None else max(len(r) for r in self.rows)
        return min(largest, self.max_rows or largest) * self.copies

    def drawn(self, units: Sequence[int], generator: torch.Generator) -> list[list[int]]:
        """The rows with which each of the drawn units takes part."""
        if self.rows is None:
            return [[unit] * self.copies for unit in units]
        return [[row for row in self._some(self.rows[u], generator) for _ in range(self.copies)] for u in units]

    def _some(self, rows: tuple[int, ...], generator: torch.Generator) -> tuple[int, ...]:
        """All of a unit's rows, or ``max_rows`` drawn without regard to what they hold."""
        if self.max_rows is None or len(rows) <= self.max_rows:
            return rows
        order = torch.randperm(len(rows), generator=generator, device=generator.device)
        return tuple(rows[k] for k in order[: self.max_rows].tolist())


def packed(units: Sequence[list[int]], max_size: int | None) -> list[list[list[int]]]:
    """The rows of the drawn units as physical batches of at most ``max_size`` rows, none of which splits a unit."""
    parts: list[list[list[int]]] = [[]]
    size = 0
    for rows in units:
        if parts[-1] and max_size is not None and size + len(rows) > max_size:
            parts.append([])
            size = 0
        parts[-1].append(rows)
        size += len(rows)
    return parts


def units_of(
    dataset: Any,
    privacy_unit: PrivacyUnit | None,
    *,
    max_rows_per_unit: int | None = None,
    unit_reduction: str = "mean",
    augmentations: int = 1,
    max_physical_batch_size: int | None = None,
) -> UnitIndex:
    """Who the units of a map-style data set are; reads every row once if a column or a function is to tell.

    Raises:
        ConfigurationError: ids that are missing, or not one for each row; numbers out of range; a unit with more rows
            than a physical batch holds.
    """
    checks.choice("unit_reduction", unit_reduction, ("mean", "sum"))
    checks.count("augmentations", augmentations)
    if max_rows_per_unit is not None:
        checks.count("max_rows_per_unit", max_rows_per_unit)
    averaged = unit_reduction == "mean"
    if privacy_unit is None:
        if max_rows_per_unit is not None:
            _refuse(
                "max_rows_per_unit without privacy_unit", "a record is one row.", "say with privacy_unit whose rows."
            )
        units = UnitIndex(len(dataset), copies=augmentations, averaged=averaged)
    else:
        ids, name = _ids(dataset, privacy_unit)
        rows: dict[Hashable, list[int]] = {}
        for k, one in enumerate(ids):
            rows.setdefault(_id(one, k, name), []).append(k)
        held = tuple(tuple(r) for r in rows.values())
        units = UnitIndex(len(held), held, max_rows_per_unit, augmentations, averaged, name)
    if max_physical_batch_size is not None and units.count and units.most > max_physical_batch_size:
        _refuse(
            f"a unit brings {units.most} rows, a physical batch holds {max_physical_batch_size}",
            "a unit's rows are clipped together, so they have to be in one physical batch.",
            f"give max_rows_per_unit (at most {max_physical_batch_size // augmentations or 1}), or raise "
            "max_physical_batch_size.",
        )
    return units


def refuse_reordering(dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
    """Raise if ``collate`` does not keep the rows in their order: they would be clipped as another unit's.

    A few rows are collated, twice and in reverse order; what came out the same twice has to be reversed as well.
    """
    n = len(dataset)
    rows = [dataset[k] for k in sorted({round(j * (n - 1) / (_LOOKED_AT - 1)) for j in range(_LOOKED_AT)})]
    with torch.random.fork_rng(devices=[]):
        try:
            found = [collate(list(rows)), collate(list(rows)), collate(rows[::-1]), collate(rows[:-1] or rows)]
        except Exception:  # the user's own error will come where the user sees it
            return
    for a, b, c, fewer in zip(*map(leaves, found), strict=False):
        if not all(isinstance(v, Tensor) for v in (a, b, c, fewer)):
            continue
        dim = 0 if a.shape[:1] == (len(rows),) else 1
        if dim == 1 and (a.shape[1:2] != (len(rows),) or fewer.shape[1:2] != (len(rows) - 1,)):
            continue  # [t, n] is what has a column less for a row less
        if torch.equal(a, b) and not torch.equal(a.flip(dim), c):
            raise SamplingError(
                "collate_fn puts the rows into another order than that in which it is given them",
                why="whose rows are whose is known by their order, and each unit's rows are clipped together.",
                cure="keep the order (sort inside the model, or use pack_padded_sequence(enforce_sorted=False)).",
            )


_LOOKED_AT = 16


def _ids(dataset: Any, unit: PrivacyUnit) -> tuple[Iterable[Any], str]:
    """One id for each row of the data set, and what the unit is called."""
    n = len(dataset)
    if callable(unit):
        return (unit(dataset[k]) for k in range(n)), getattr(unit, "__name__", "privacy_unit")
    if isinstance(unit, str | int) and not isinstance(unit, bool):
        name = f"column {unit!r}"
        if unit in (getattr(dataset, "column_names", None) or ()):  # a table that gives whole columns (datasets)
            return dataset[unit], name
        return (_entry(dataset[k], unit, k) for k in range(n)), name
    ordered = hasattr(unit, "__len__") and hasattr(unit, "__iter__")
    if not ordered or isinstance(unit, bytes | Mapping | set | frozenset):
        _refuse(
            f"privacy_unit is a {type(unit).__name__}",
            "it has to tell the unit of every row.",
            "pass a column's name or position, one id for each row in order, or a function of a row.",
        )
    given: Any = unit
    ids = given.tolist() if hasattr(given, "tolist") else list(given)
    if not isinstance(ids, list) or len(ids) != n:
        _refuse(
            f"privacy_unit has {len(ids) if isinstance(ids, list) else 0} ids, the data set {n} rows",
            "each row has to be known to be somebody's.",
            "pass one id for each row, in the data set's order.",
        )
    return ids, "privacy_unit"


def _entry(row: Any, key: str | int, k: int) -> Any:
    try:
        return row[key] if hasattr(row, "__getitem__") else getattr(row, str(key))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"row {k} of the data set has no column {key!r}",
            why="each row has to be known to be somebody's.",
            cure="pass the name (or position) of a column that every row has, one id for each row, or a function.",
        ) from error


def _id(value: Any, k: int, name: str) -> Hashable:
    """A row's unit as something that equals itself and can be looked up."""
    if isinstance(value, Tensor) or hasattr(value, "item"):
        value = value.item() if getattr(value, "shape", None) in ((), (1,), None) else value.tolist()
    if isinstance(value, list):
        value = tuple(value)
    if value is None or value != value:
        _refuse(
            f"{name}: row {k} has the unit {value!r}",
            "a row that is nobody's would be protected as if it were a unit of its own.",
            "give it an id, or leave the row out.",
        )
    try:
        hash(value)
    except TypeError:
        _refuse(
            f"{name}: the unit of row {k} is a {type(value).__name__}",
            "rows of one unit are found by equal ids.",
            "use numbers, strings or tuples of them as ids.",
        )
    return value  # type: ignore[no-any-return]


def _refuse(seen: str, why: str, cure: str) -> NoReturn:
    raise ConfigurationError(seen, why=why, cure=cure)
