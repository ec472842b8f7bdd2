"""Rows that are moved as the data say: by an index, a mask or an order that was computed from the batch.

The probe measures where the records are on one batch. Where a batch's own values choose the rows (image features that
take the places of image tokens, the last token that is no padding, tokens sorted by expert), another batch may have
them elsewhere in tensors of the same shapes. So in every private forward each such operation is repeated on the rows'
owners, and the owners have to be where the plan says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import CoupledRecordsError, UncoveredParameterError
from .records import Folded, Place, Records
from .trees import leaves

_WHERE = {
    "index": (1, None),
    "take": (1, None),
    "embedding": (1, None),
    "masked_select": (1, None),
    "index_select": (2, None),
    "gather": (2, None),
    "index_put": (1, 2),
    "_index_put_impl": (1, 2),
    "masked_scatter": (1, 2),
    "index_add": (2, 3),
    "index_copy": (2, 3),
    "scatter": (2, 3),
    "scatter_add": (2, 3),
}
"""Operations that move rows: which argument holds the index, and which the values that are written."""


@dataclass(frozen=True)
class Move:
    """One operation that moved rows as the data said.

    Attributes:
        name: torch's name of the operation, without the underscore of its in-place form.
        base, values, out: what was read from or written to, what was written (None where it only reads), the result.
    """

    name: str
    arguments: tuple[Any, ...]
    base: Tensor
    values: Tensor | None
    out: Tensor


@dataclass(frozen=True)
class Places:
    """Where the records are in a move's tensors, as the probe found it; ``written``: it writes, else it reads."""

    name: str
    base: Place
    values: Place
    out: Place
    written: bool

    @property
    def lost(self) -> bool:
        """Whether the records can no longer be followed."""
        ends = (self.base, self.values if self.written else self.out)
        return any(isinstance(r, Folded) for r in ends) and any(r is not None for r in ends)

    def check(self, move: Move, n: int, path: str) -> Tensor | None:
        """Raise unless every row goes from a record to itself, or whole records change places: then returns who stands
        where [n]."""
        if not isinstance(self.base, Records) or not self.fits(move, n):
            if isinstance(self.base, Records):
                raise _misplaced(path, f"{move.name} moves other numbers of rows than when the model was examined")
            return None
        owners = self.base.owners(move.base.shape, n, move.base.device)
        other = move.out if move.values is None else move.values
        there = self.values if self.written else self.out
        if isinstance(there, Records):
            found, expected = _read(move, owners), there.owners(other.shape, n, other.device)
            if move.name == "masked_scatter":
                expected = expected.reshape(-1)[: found.numel()]
            elif move.name.startswith("scatter"):
                expected = expected[tuple(slice(s) for s in found.shape)]
            if not torch.equal(found, expected.expand(found.shape)):
                order = None if self.written else self._order(found, n)
                if order is None:
                    raise _misplaced(path, f"{move.name} moves rows from one record to another")
                return order
        return None

    def _order(self, found: Tensor, n: int) -> Tensor | None:
        """The records' new order, if that is all that changed (sequences sorted by their lengths)."""
        if self.base != self.out or not isinstance(self.out, Records) or self.out.factor != 1:
            return None
        rows = found.movedim(self.out.dim, 0).reshape(n, -1)
        whole = torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(
            rows[:, 0].sort().values, torch.arange(n, dtype=rows.dtype, device=rows.device)
        )
        return rows[:, 0].long() if whole else None

    def fits(self, move: Move, n: int) -> bool:
        """Whether the move's tensors have the shapes that the plan speaks of."""
        pairs = ((self.base, move.base), (self.values, move.values), (self.out, move.out))
        return move.name == self.name and all(
            v is None or not isinstance(r, Records) or (v.ndim > r.dim and v.shape[r.dim] == n * r.factor)
            for r, v in pairs
        )


def _read(move: Move, owners: Tensor) -> Tensor:
    """The owners at the places that the move reads, or writes to."""
    _, index, *_ = move.arguments
    if move.name in ("index", "index_put", "_index_put_impl"):
        return owners[tuple(slice(None) if i is None else i for i in index)]
    if move.name in ("masked_select", "masked_scatter"):
        return owners.masked_select(index)
    if move.name == "take":
        return owners.take(index)
    if move.name == "embedding":
        return owners[index]
    dim, index = move.arguments[1], move.arguments[2]
    if move.name in ("gather", "scatter", "scatter_add"):
        return owners.gather(dim, index)
    return owners.index_select(dim, index)


def _misplaced(path: str, what: str) -> CoupledRecordsError:
    return CoupledRecordsError(
        f"{path}: {what}, as the data of this batch say",
        why="the rows would be credited to other records than those they came from.",
        cure="give every record the same number of such rows (pad them), or register a rule for the module.",
    )


def _packing() -> Any:
    """The frame of torch's function that packs records in the order of their lengths, or unpacks them, while it runs.

    The order goes along in the packed sequence, so that the records are found again (`dpkit.apart`); the packed data
    themselves have no dimension of records, and are refused wherever else they meet a parameter.
    """
    frame: Any = sys._getframe(2)
    for _ in range(4):
        if frame is None or frame.f_code in (pack_padded_sequence.__code__, pad_packed_sequence.__code__):
            return frame
        frame = frame.f_back
    return None


class Taint(TorchDispatchMode):
    """Marks every tensor that is computed from the marked ones, and tells of the rows that these moved.

    Memory is marked, not the tensors that show it: what is written into a view has reached the whole.

    Attributes:
        moved: is told of every `Move`; returns the order [n] that it put the records into, if it did.
    """

    def __init__(self, moved: Callable[[Move], Tensor | None], without_order: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.marked: dict[int, StorageWeakRef] = {}  # the weak references keep an address from being given again
        self.moved, self.without_order = moved, without_order
        self.reordered = False  # records were packed in the order of their lengths
        self._orders: dict[int, Tensor] = {}  # memory in which the records stand in another order

    def used(self, packed: PackedSequence) -> None:
        """A packed sequence is unpacked or goes through a recurrent layer: with its order, if there is one."""
        if packed.unsorted_indices is None and self.without_order is not None:
            self.without_order()

    def mark(self, tree: Any) -> None:
        for v in leaves(tree):
            if isinstance(v, Tensor) and v.layout == torch.strided:
                memory = v.untyped_storage()
                if memory._cdata not in self.marked:
                    self.marked[memory._cdata] = StorageWeakRef(memory)

    def has(self, tree: Any) -> bool:
        return any(_address(v) in self.marked for v in leaves(tree))

    def order(self, tree: Any) -> Tensor | None:
        """The order in which the records stand in a tensor of ``tree``; None: in their own."""
        found = (self._orders.get(_address(v)) for v in leaves(tree)) if self._orders else iter(())
        return next((order for order in found if order is not None), None)

    def put(self, tree: Any, order: Tensor | None) -> None:
        """Note in which order the records stand in the tensors of ``tree``."""
        own = order is None or torch.equal(order, torch.arange(len(order), device=order.device))
        for v in leaves(tree):
            if own or order is None:
                self._orders.pop(_address(v), None)
            elif isinstance(v, Tensor):
                self.mark(v)
                self._orders[_address(v)] = order

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        where = _WHERE.get(name)
        moves = where is not None and len(args) > where[0] and self.has(args[where[0]])
        packing = _packing() if moves or name == "copy" else None  # of "copy" unpacking is made
        order = self.order((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if self.has((args, kwargs or {})):
            self.mark(out)
        if order is not None:
            self.put(out, order)
        if packing is not None and packing.f_code is pack_padded_sequence.__code__:
            self.reordered |= moves
        elif packing is not None:
            self.used(packing.f_locals["sequence"])
        elif moves and where is not None:
            values = args[where[1]] if where[1] is not None and len(args) > where[1] else None
            values = values if isinstance(values, Tensor) and values.is_floating_point() else None
            base = args[0]
            told = base if where[1] is None else values
            if isinstance(base, Tensor) and base.is_floating_point() and isinstance(told, Tensor) and self.has(told):
                new = self.moved(Move(name, args, base, values, out))
                if new is not None:
                    before = self.order(base)
                    self.put(out, new if before is None else before[new])
        return out


def _address(v: Any) -> int:
    try:
        return v.untyped_storage()._cdata if isinstance(v, Tensor) and v.layout == torch.strided else 0
    except NotImplementedError as error:
        raise UncoveredParameterError(
            f"a function of torch.func (vmap, grad) calls a layer, or uses a parameter, in the forward ({error})",
            why="inside it the records are not seen.",
            cure="call the layer on the batch itself; what uses no parameter may stay in there.",
        ) from error
