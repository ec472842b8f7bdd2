"""The loss of a plain ``loss.backward()``, looked at before anything is differentiated.

Clipping bounds what a record does through its own gradient. So the loss has to be a sum, or a mean, of one loss a
record. A loss that a loop composes leaves autograd's graph between itself and the model's last layers, to be read:

- *by second derivatives*: where records are apart, the gradient at the rows of the one does not change with the rows of
  the other. Contrast, statistics of the batch, the root of a mean: all show, exactly, whatever they are made of;
- *by its operations*, where a record acts through what is no function of the outputs, or by steps: means over some of
  the rows only (ignored targets, masks), class weights that are divided by their sum, the hardest records, pairs.

What is constant in the graph, and was computed from several records' labels, is not seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .errors import CoupledRecordsError, PrivacyError
from .records import Records
from .taps import Batch, Pick, Spread, Tap, refuse_reached

if TYPE_CHECKING:
    from .tape import Tape

_ENDS = tuple(function._backward_cls for function in (Tap, Spread, Pick))
_WHY = "a record then acts through the gradients of others, too, and clipping its own does not bound that."
_ACTS = "the gradient at one record's outputs changes with another record's"
_ONE_EACH = (
    'compute one loss a record (reduction="none"), weigh and divide it by what is its own, or by a constant, and '
    "take the mean of that."
)


class Losses:
    """What was seen of the losses that reached one model.

    Attributes:
        told: whether there were some, and records were seen to be apart in each kind of them.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._met: dict[tuple[type, ...], bool] = {}  # kinds of loss, and whether records were seen to be apart
        self._cleared: set[tuple[tuple[type, ...], int]] = set()  # operations that act on one record's rows
        self._pairs: dict[tuple[type, ...], tuple[int, list[_Square]]] = {}  # n in the first batch; perhaps pairs
        self._divisors: dict[tuple[tuple[type, ...], int], tuple[float, int]] = {}
        self._looks = 0

    @property
    def told(self) -> bool:
        return 0 < len(self._met) < _KINDS and all(self._met.values())

    def forget(self) -> None:
        """The model is another one now: look at all kinds anew, and go on knowing of which it could not be told."""
        self._met = {kind: told for kind, told in self._met.items() if not told}
        for known in (self._cleared, self._pairs, self._divisors):
            known.clear()

    def look(self, roots: Sequence[Tensor], grads: Sequence[Tensor | None] | None) -> None:
        """Raise if a record acts through another one's gradient in what is about to be back-propagated.

        A kind of loss that was not met before is differentiated for it, the others again ever more seldom; hooks of its
        tensors run then, too. Those in the model do not: the passes end where the model's last layers gave something.

        Args:
            roots, grads: as `torch.autograd.backward` was given them.

        Raises:
            CoupledRecordsError: with the operation that mixes them, where it is known.
        """
        batch = self._tape.batch
        if batch is None or batch.n < 2:
            return
        nodes = _above(roots)
        ends = [node for node in nodes if _is_end(node) and node.batch is batch]
        if not ends or not all(_fits(end, batch.n) for end in ends):
            return
        kind = tuple(map(type, nodes))
        self._looks += 1
        new = kind not in self._met and len(self._met) < _KINDS
        seldom = new or self._looks & (self._looks - 1) == 0
        if new or (seldom and kind in self._met):  # the same operations may run along other dimensions now
            apart = _apart(batch, ends, roots, grads)
            if apart is not None:
                self._met[kind] = apart and self._met.get(kind, True)
        for k, node in enumerate(nodes):
            rule = _RULES.get(type(node).__name__)
            if rule is None:
                continue
            if rule is _divided:
                self._refuse_changing_divisor(kind, k, node, batch.n)
            if seldom or (kind, k) not in self._cleared:
                for edge, cotangent, seen in rule(node, batch.n, seldom):
                    if _several(batch, ends, edge, cotangent):
                        _refuse(seen)
                    self._cleared.add((kind, k))
        then, squares = self._pairs.get(kind, (batch.n, []))
        if new:
            squares = list(_squares(nodes, batch.n))
            self._pairs[kind] = batch.n, [square for square in squares if not square.sure]
            _refuse_pairs(batch, ends, nodes, [square for square in squares if square.sure], roots, grads)
        elif squares and then != batch.n:
            self._pairs[kind] = batch.n, []
            _refuse_pairs(batch, ends, nodes, [s for s in squares if s.there(nodes, batch.n)], roots, grads)

    def _refuse_changing_divisor(self, kind: Any, k: int, node: Any, n: int) -> None:
        """Raise if a sum over the records is divided by a number that changes, and not as their number does."""
        by = _number(node._saved_other) if _sums(node, n) else None
        if by is None or not math.isfinite(by):
            return
        before, then = self._divisors.setdefault((kind, k), (by, n))
        if then != n and not (math.isclose(by, before) or math.isclose(by * then, before * n)):
            _refuse(f"the sum of the losses is divided by {by:g} for {n} records, and was by {before:g} for {then}")


# ---- passes that end where the model's last layers gave something


def _brought(batch: Batch, ends: list[Any], outputs: Any, grads: Any, **how: Any) -> list[tuple[Tensor, int]]:
    """What a backward pass brings to nodes of the tape's, rows [n·k, ...] and k. It does not go below them: a hook of
    the user's there would see another pass than his."""
    with batch.looked_at_by(lambda rows, factor: False):  # where one is below another
        found = torch.autograd.grad(outputs, [GradientEdge(end, 0) for end in ends], grads, allow_unused=True, **how)
    there = [_records(end) for end in ends]
    return [(r.lead(grad), r.factor) for r, grad in zip(there, found, strict=True) if grad is not None]


def _apart(batch: Batch, ends: list[Any], roots: Sequence[Tensor], grads: Any) -> bool | None:
    """Raise if the gradient at some records' rows changes with the rows of others; whether that could be told.

    None where some are not finite: other batches may tell.
    """
    try:
        found = [v for v in _brought(batch, ends, roots, grads, create_graph=True) if v[0].requires_grad]
        rows = [v for v, _ in found]
        for one in _halves(batch) if found else ():
            weights = [_pattern(v) * _mask(one, v, factor) for v, factor in found]
            for v, factor in _brought(batch, ends, rows, weights, retain_graph=True):
                _refuse_any(v, factor, ~one, _ACTS)
    except PrivacyError:
        raise
    except _UNTOLD:
        return False
    return all(bool(torch.isfinite(v).all()) for v in (*roots, *rows)) or None


def _several(batch: Batch, ends: list[Any], edge: GradientEdge, cotangent: Tensor) -> bool:
    """Whether what is at an edge of the graph comes from more than one unit.

    Where it cannot be followed, one value for all of the batch does.
    """
    try:
        reached = _reached(batch, ends, edge, cotangent)
    except _UNTOLD:
        return cotangent.numel() == 1
    return len(_owners(batch)[reached].unique()) > 1


def _reached(batch: Batch, ends: list[Any], edge: GradientEdge, cotangent: Tensor) -> Tensor:
    """[n]: which records' rows a gradient at an edge of the graph comes to."""
    reached = torch.zeros(batch.n, dtype=torch.bool)
    for rows, _ in _brought(batch, ends, [edge], [cotangent], retain_graph=True):
        touched = (rows != 0) & torch.isfinite(rows)  # 0 times what is not finite says nothing
        reached.logical_or_(touched.reshape(batch.n, -1).any(1).cpu())
    return reached


_UNTOLD = (RuntimeError, AttributeError, TypeError)
"""What a pass that is not the user's may meet: an operation without second derivatives, reentrant checkpointing; a hook
that asks a gradient's norm where there is none."""


def _refuse_pairs(
    batch: Batch, ends: list[Any], nodes: list[Any], squares: list[_Square], roots: Sequence[Tensor], grads: Any
) -> None:
    """Raise if in one of these, [n, n], the values of two units count."""
    owners = _owners(batch)
    for square in squares:
        edge = GradientEdge(nodes[square.node], square.output)
        grad = torch.autograd.grad(roots, [edge], grads, retain_graph=True, allow_unused=True)[0]
        if grad is None:
            continue
        apart = (owners[:, None] != owners).to(grad)
        shape = [batch.n if d in square.dims else 1 for d in range(grad.ndim)]
        between = grad * apart.view(shape)
        try:
            counts = bool(_reached(batch, ends, edge, between).any())
        except _UNTOLD:
            counts = bool(between.any())
        if counts:
            _refuse(
                f"the loss is made of a value for each pair of records, {list(grad.shape)} for {batch.n} of them",
                "bring outputs and targets to the same shape ([n] and [n], not [n, 1] and [n]); contrast views "
                "within one record.",
            )


def refuse_mixed(batch: Batch, values: Tensor, dim: int) -> None:
    """Raise if what a module of the model is called on mixes the records that other modules of it gave.

    Args:
        values: an argument that was computed from earlier outputs, with the records in dimension ``dim``.
    """
    ends = [node for node in _above([values]) if _is_end(node) and node.batch is batch]
    for one in _halves(batch) if ends else ():
        cotangent = _pattern(values) * _mask(one, values.movedim(dim, 0), 1).movedim(0, dim)
        seen = "between two modules of the model a record's values were computed from another record's"
        try:
            for rows, factor in _brought(batch, ends, [values], [cotangent], retain_graph=True):
                _refuse_any(rows, factor, ~one, seen)
        except PrivacyError:
            raise
        except _UNTOLD:
            return


# ---- pairs


@dataclass(frozen=True)
class _Square:
    """Two dimensions of a node's output that are as long as the batch: pairs of records, or so by chance.

    Batches of two sizes tell; ``sure``: it is the slip that is known best, [n, 1] less [n].
    """

    node: int
    output: int
    dims: tuple[int, int]
    sure: bool

    def there(self, nodes: list[Any], n: int) -> bool:
        """Whether they are as long as this batch, too."""
        shape = tuple(nodes[self.node]._input_metadata[self.output].shape)
        return all(d < len(shape) and shape[d] == n for d in self.dims)


def _squares(nodes: list[Any], n: int) -> Iterator[_Square]:
    surely: set[Any] = set()
    for k, node in enumerate(nodes):
        if _is_end(node):
            continue
        if _column_less_row(node, n):
            surely |= {node, node.next_functions[0][0]}
        for j, meta in enumerate(node._input_metadata):
            long = [d for d, size in enumerate(meta.shape) if size == n]
            for dims in itertools.combinations(long, 2):
                yield _Square(k, j, dims, node in surely)


# ---- the graph


def _above(roots: Sequence[Tensor]) -> list[Any]:
    """The nodes between the loss and the first ones of the tape's, those among them."""
    ahead = [node for root in roots if (node := root.grad_fn) is not None]
    nodes: dict[Any, None] = {}
    while ahead:
        node = ahead.pop()
        if node not in nodes:
            nodes[node] = None
            if not _is_end(node):
                ahead += [below for below, _ in node.next_functions if below is not None]
    return list(nodes)


def _is_end(node: Any) -> bool:
    return isinstance(node, _ENDS)


def _records(end: Any) -> Records:
    """Where they are in what a node of the tape's gave: in copies and rows that were picked, they lead."""
    return getattr(end, "y_records", None) or Records(0)


def _fits(end: Any, n: int) -> bool:
    """Whether n records were at a node of the tape's; what is to be said where they were not, others say."""
    shape, there = tuple(end._input_metadata[0].shape), _records(end)
    return len(shape) > there.dim and shape[there.dim] == n * there.factor


def _column_less_row(node: Any, n: int) -> bool:
    """Whether [n, 1] and [n] were subtracted, or given to a loss of torch's, which makes them [n, n]."""
    name = type(node).__name__
    below, k = node.next_functions[0] if node.next_functions else (None, 0)
    if below is None or not (name == "SubBackward0" or name.endswith("LossBackward0")):
        return False
    before, after = tuple(below._input_metadata[k].shape), tuple(node._input_metadata[0].shape)
    if type(below).__name__ == "ExpandBackward0":
        before, after = tuple(below._saved_self_sym_sizes), before
    return after == (n, n) and before in ((n, 1), (n,), (1, n))


def _sums(node: Any, n: int) -> bool:
    """Whether one value is divided, and it is a sum of one or several for each record."""
    while node is not None and all(math.prod(m.shape) == 1 for m in node._input_metadata):
        if type(node).__name__ == "SumBackward0":
            return bool(math.prod(node._saved_self_sym_sizes) >= n)
        if type(node).__name__ not in ("DivBackward0", "MulBackward0", "NegBackward0", "ToCopyBackward0"):
            return False
        node = node.next_functions[0][0]
    return False


def _number(divisor: Tensor | None) -> float | None:
    """The divisor, if it was a Python number; None for a tensor."""
    if divisor is None or divisor.ndim or divisor.device.type != "cpu":
        return None
    narrow = torch.tensor(1, dtype=torch.int8)  # a number takes part in no promotion within its kind, a tensor does
    kept = torch.float32 if divisor.is_floating_point() else torch.int8
    return float(divisor) if torch.result_type(narrow, divisor) == kept and divisor.dtype != kept else None


# ---- operations that mix records; each rule gives (edge, cotangent, what was seen) where it may


def _divided(node: Any, n: int, seldom: bool) -> Iterator[tuple[GradientEdge, Tensor, str]]:
    """A sum over the records that is divided by a tensor."""
    by = node._saved_other
    if by is None or by.numel() != 1 or by.requires_grad or _number(by) is not None or not _sums(node, n):
        return
    if (by.device.type == "cpu" or seldom) and float(by) % n != 0:
        yield (
            *_whole(node),
            f"the sum of the losses is divided by a tensor, {float(by):g} for {n} records (how many are not masked, or "
            "what the weights add up to?)",
        )


def _negative_log_likelihood(node: Any, n: int, seldom: bool) -> Iterator[tuple[GradientEdge, Tensor, str]]:
    """Divided by the weights of the targets that are not ignored."""
    if node._saved_reduction != 1:
        return
    weight, target = node._saved_weight, node._saved_target
    if weight is not None and seldom and bool((weight != weight[0]).any()):
        yield *_whole(node), "a loss with class weights is averaged: divided by what the weights of the batch add up to"
    elif weight is None and (target.device.type == "cpu" or seldom):
        counted = int(node._saved_total_weight)
        if counted != target.numel():
            seen = f"{target.numel() - counted} of {target.numel()} targets are ignored, and the loss is averaged over "
            yield *_whole(node), seen + "the rest of the batch"


def _mean(node: Any, n: int, seldom: bool) -> Iterator[tuple[GradientEdge, Tensor, str]]:
    """A mean over a number of values that is no multiple of the number of records."""
    sizes = node._saved_self_sym_sizes
    dims = _dims(node, len(sizes))
    count = math.prod(sizes[d] for d in dims)
    if count % n and seldom:
        seen = f"a mean is taken over {count} values of several of {n} records (those that a mask has chosen?)"
        yield GradientEdge(node, 0), _corner(node._input_metadata[0]), seen


def _selected(node: Any, n: int, seldom: bool) -> Iterator[tuple[GradientEdge, Tensor, str]]:
    """The largest, smallest or middle ones, over the records."""
    below, k = node.next_functions[0]
    if not seldom or below is None:
        return
    shape = tuple(below._input_metadata[k].shape)
    dims = _dims(node, len(shape))
    cotangent = torch.zeros(shape, device=_device(below, k), dtype=below._input_metadata[k].dtype)
    cotangent[tuple(slice(None) if d in dims else 0 for d in range(len(shape)))] = 1
    name = type(node).__name__.removesuffix("Backward0").removesuffix("Backward1").lower()
    yield GradientEdge(below, k), cotangent, f"the loss depends on which records have the largest values ({name})"


_RULES: dict[str, Callable[[Any, int, bool], Iterator[tuple[GradientEdge, Tensor, str]]]] = {
    "DivBackward0": _divided,
    "NllLossBackward0": _negative_log_likelihood,
    "NllLoss2DBackward0": _negative_log_likelihood,
    "MeanBackward0": _mean,
    "MeanBackward1": _mean,
} | {
    f"{name}Backward{k}": _selected
    for name in ("Max", "Min", "Amax", "Amin", "Topk", "Sort", "Kthvalue", "Median", "Nanmedian", "Mode", "Aminmax")
    for k in (0, 1)
}


def _dims(node: Any, ndim: int) -> list[int]:
    """The dimensions over which a node reduces, sorts or chooses."""
    dim = getattr(node, "_saved_dim", None)
    given = [dim] if isinstance(dim, int) else dim or range(ndim)
    return [(d - (1 << 64) if d > 1 << 63 else d) % max(ndim, 1) for d in given] if ndim else []


def _device(node: Any, k: int) -> torch.device:
    return torch.device(node._input_metadata[k].device)


def _whole(node: Any) -> tuple[GradientEdge, Tensor]:
    meta = node._input_metadata[0]
    return GradientEdge(node, 0), torch.ones(tuple(meta.shape), dtype=meta.dtype, device=_device(node, 0))


def _corner(meta: Any) -> Tensor:
    """A cotangent of the first value alone."""
    cotangent = torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=torch.device(meta.device))
    cotangent[(0,) * cotangent.ndim] = 1
    return cotangent


# ---- halves of the records


_KINDS = 32
"""How many kinds of loss are differentiated twice, at most: a graph that follows the data is another one each time."""


def _owners(batch: Batch) -> Tensor:
    """[n]: the unit of each record, by number: what the records of one do with each other is its own affair."""
    return torch.arange(batch.n) if batch.owners is None else batch.owners


def _halves(batch: Batch) -> Iterator[Tensor]:
    """Masks [n] of the records of half of the units; any two units are parted by one of them."""
    owners = _owners(batch)
    for bit in range(int(owners.max()).bit_length()):
        yield (owners >> bit) % 2 == 1


def _mask(records: Tensor, rows: Tensor, factor: int) -> Tensor:
    """``records`` [n] as numbers beside rows [n·k, ...]."""
    mask = records.to(rows.device).repeat_interleave(factor)
    return mask.view(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)


def _pattern(like: Tensor) -> Tensor:
    """Numbers of which no two are the same, without touching anybody's chance."""
    return torch.arange(1, like.numel() + 1, device=like.device).cos().view(like.shape).to(like.dtype)


def _refuse_any(rows: Tensor, factor: int, records: Tensor, seen: str) -> None:
    """Raise where a gradient's rows [n·k, ...] reach some of these records [n]."""
    refuse_reached(rows, _mask(records, rows, factor).flatten() != 0, f"in the loss, {seen}", _ONE_EACH)


def _refuse(seen: str, cure: str = _ONE_EACH) -> NoReturn:
    raise CoupledRecordsError(seen, why=_WHY, cure=cure)
