"""The probe: which dimension carries the records, measured, and whether the records are independent.

Before the first private forward of a kind, the model runs twice without gradient, once on all n records and once on
n - 1 of them. Whatever changed its size from n to n - 1 carries the records; whatever stayed does not, even if its size
happens to equal n (a position table with as many positions as there are records). And the outputs of the records that
stayed must not have changed: else one record's output depends on another, and no clipping per record bounds what that
record did.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import randomness
from .buffers import Buffers
from .errors import CoupledRecordsError, FoldedBatchError, GradientMismatchError, UncoveredParameterError
from .forms import Form
from .moves import Move, Places, Taint
from .records import Folded, Place, Records, Shape, place
from .standin import StandIn
from .trees import leaves, tree_map

K = TypeVar("K")


@dataclass
class Call:
    """One call of a layer with a rule, or one operation on stand-ins, as the probe saw it.

    Attributes:
        arguments, outputs: the tensors among them (None for stand-ins and for what is no tensor), in order.
        numbers: the integers among the arguments.
        tainted: whether an argument was computed from the batch.
    """

    what: str
    arguments: list[Seen | None]
    numbers: list[int | None]
    tainted: bool
    outputs: list[Seen | None] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """A tensor's shape; and the tensor, where a dimension may hold several rows a record."""

    shape: Shape
    value: Tensor | None

    @staticmethod
    def of(v: Any, n: int) -> Seen | None:
        if not isinstance(v, Tensor) or isinstance(v, StandIn):
            return None
        folded = any(s > n and s % n == 0 for s in v.shape[:2])
        return Seen(tuple(v.shape), v.detach() if folded else None)


@dataclass(frozen=True)
class Moved:
    """A `Move` as the probe saw it, and the module in whose forward it was."""

    name: str
    module: nn.Module
    base: Seen | None
    values: Seen | None
    out: Seen | None


@dataclass
class Site:
    """What is known about one call: where the records are.

    Attributes:
        numbers: for each argument that is an integer growing with the records, the rows a record in it.
        data: the result is ordinary batch data.
    """

    what: str
    arguments: list[Place]
    numbers: list[int | None]
    outputs: list[Place]
    data: bool
    ranks: list[int | None] = field(default_factory=list)

    def fits(self, values: list[Any], n: int) -> bool:
        """Whether a call with these arguments, n records, can be the one that was measured.

        What requires a gradient descends from the batch (every parameter is detached or stands in), so it must carry
        records.
        """
        if len(values) != len(self.arguments):
            return False
        for v, there, rank in zip(values, self.arguments, self.ranks, strict=True):
            if isinstance(v, StandIn) or not isinstance(v, Tensor):
                if rank is not None:
                    return False
            elif (
                v.ndim != rank
                or (there is None and v.requires_grad)
                or (isinstance(there, Records) and v.shape[there.dim] != n * there.factor)
            ):
                return False
        return True

    def agrees(self, other: Site) -> bool:
        """Whether the other says the same of where the records are."""
        return (self.arguments, self.outputs[: len(other.outputs)], self.data) == (
            other.arguments,
            other.outputs[: len(self.outputs)],
            other.data,
        )

    @property
    def folded(self) -> Folded | None:
        """A place that could not be told, if there is one."""
        return next((p for p in (*self.arguments, *self.outputs) if isinstance(p, Folded)), None)


@dataclass
class Plan:
    """What one probe has learnt about one kind of call of the model."""

    inputs: list[int | None]  # record dimension of every tensor leaf of the arguments
    calls: dict[tuple[nn.Module, int], list[Site]] = field(default_factory=dict)  # alternatives: paths of the model
    ops: dict[tuple[nn.Parameter, str, int], list[Site]] = field(default_factory=dict)
    bare: set[nn.Parameter] = field(default_factory=set)  # parameters met outside a layer with a rule
    losses: dict[int, str] = field(default_factory=dict)  # scalar outputs that mix records: leaf number -> reason
    reduced: set[int] = field(default_factory=set)  # other outputs that were reduced over the records: leaf numbers
    crossed: dict[int, list[int]] = field(default_factory=dict)  # outputs on pairs of records: leaf -> dimensions
    moves: list[Places] = field(default_factory=list)  # rows that are moved as the data say, in order
    lost: nn.Module | None = None  # where they are moved so that the records can no longer be followed
    gives_records: bool = False  # whether a floating output carries records
    scalars: bool = False  # whether there are floating outputs of one value
    by_chance: bool = False  # whether random numbers are drawn in the forward
    used: int = 0  # how often, where there are such outputs
    holds: bool = False  # whether outputs are in objects of other kinds than containers


class Recorder:
    """The router of one probing run: stand-ins give their logical values, and every meeting is written down.

    Args:
        n: the records in this run.
        inside: tells which module's forward is running.
        watch: write down the calls of all modules, not only those of layers with a rule.
    """

    def __init__(self, n: int, inside: Callable[[], nn.Module], *, watch: bool = False) -> None:
        self.n, self.inside = n, inside
        self.taint = Taint(self._moved, self.without_order)
        self.moves: list[Moved] = []
        self.lost: nn.Module | None = None  # where the order of packed records was forgotten
        self.quiet = 0  # inside a rule, an operation on stand-ins or a module that runs on one record at a time
        self.calls: dict[tuple[nn.Module, int], Call] = {}
        self.ops: dict[tuple[nn.Parameter, str, int], Call] = {}
        self.visits: dict[tuple[nn.Module, int], Call] | None = {} if watch else None
        self.bare: set[nn.Parameter] = set()
        self.order: Tensor | None = None
        self._open: list[tuple[nn.Module, int]] = []
        self._called: dict[nn.Module, int] = defaultdict(int)
        self._operated: dict[tuple[nn.Parameter, str], int] = defaultdict(int)

    def _seen(self, tree: Any) -> list[Seen | None]:
        return [Seen.of(v, self.n) for v in leaves(tree)]

    def _moved(self, move: Move) -> Tensor | None:
        if not self.quiet:
            seen = [Seen.of(v, self.n) for v in (move.base, move.values, move.out)]
            self.moves.append(Moved(move.name, self.inside(), *seen))
        return None

    def without_order(self) -> None:
        """Packed data are used whose order is not known: were they packed in another one than the records'?"""
        if self.taint.reordered and not self.quiet:
            self.lost = self.lost or self.inside()

    def same_way(self, other: Recorder) -> bool:
        """Whether both runs took the same way through the model, where chance may choose one."""
        return self.calls.keys() == other.calls.keys() and self.ops.keys() == other.ops.keys()

    def call(self, layer: nn.Module, args: Any, kwargs: Any) -> bool:
        """Note a call of a layer with a rule. Returns whether it may use the rule: its input comes from the batch."""
        k = self._called[layer]
        self._called[layer] += 1
        self.calls[layer, k] = call = self._call(layer, args, kwargs)
        return call.tainted and not any(isinstance(v, StandIn) for v in leaves((args, kwargs)))

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Call:
        numbers = [v if type(v) is int else None for v in leaves((args, kwargs))]
        return Call(type(module).__name__, self._seen((args, kwargs)), numbers, self.taint.has((args, kwargs)))

    def visit(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called."""
        if self.visits is not None:
            key = module, sum(m is module for m, _ in self.visits)
            self._open.append(key)
            self.visits[key] = self._call(module, args, kwargs)

    def visited(self, module: nn.Module, output: Any) -> None:
        """Note what it returned; a module that returns what the batch does not reach is none that `apiece` can run."""
        if self.visits is not None:
            call = self.visits[self._open.pop()]
            values = [v for v in leaves(output) if isinstance(v, Tensor)]
            call.outputs = self._seen(output)
            call.tainted = call.tainted and bool(values) and not any(isinstance(v, StandIn) for v in values)

    def returned(self, layer: nn.Module, output: Any) -> None:
        self.calls[layer, self._called[layer] - 1].outputs = self._seen(output)

    def operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = leaves((args, kwargs))
        origin = next(v for v in values if isinstance(v, StandIn)).origin
        self.bare.update(v.origin for v in values if isinstance(v, StandIn))
        name = name_of(func)
        k = self._operated[origin, name]
        self._operated[origin, name] += 1
        plain_args, plain_kwargs = tree_map(lambda v: v.value if isinstance(v, StandIn) else v, (args, kwargs))
        tainted = self.taint.has((plain_args, plain_kwargs))
        numbers = [v if type(v) is int else None for v in values]
        arguments = self._seen((args, kwargs))
        self.quiet += 1
        out = func(*plain_args, **plain_kwargs)
        self.quiet -= 1
        if kwargs.get("out") is not None:
            out = kwargs["out"]  # the caller's own tensor, which torch would return
        self.ops[origin, name, k] = Call(name, arguments, numbers, tainted, self._seen(out))
        if tainted or kwargs.get("out") is not None:
            return out
        return tree_map(lambda v: StandIn.of(v, origin, self) if isinstance(v, Tensor) else v, out)


def name_of(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def merge(full: Recorder, part: Recorder, plan: Plan) -> None:
    """Write into ``plan`` what the two runs' comparison tells."""
    for key, site in _sites(full.calls, part.calls, full.n, part.n).items():
        plan.calls[key] = [site]
    for op, site in _sites(full.ops, part.ops, full.n, part.n).items():
        plan.ops[op] = [site]
    plan.bare |= full.bare | part.bare
    plan.lost = full.lost
    if plan.lost is not None:
        return
    for k in range(max(len(full.moves), len(part.moves))):
        a, b = ((r.moves[k] if k < len(r.moves) else None) for r in (full, part))
        if a is None or b is None or (a.name, a.module) != (b.name, b.module):
            plan.lost = (a or b or full.moves[-1]).module
            return
        base, values, out = (
            _place(x, y, full.n, part.n) for x, y in ((a.base, b.base), (a.values, b.values), (a.out, b.out))
        )
        plan.moves.append(Places(a.name, base, values, out, written=a.values is not None))
        if plan.moves[-1].lost:
            plan.lost = a.module
            return


def refuse_scattered(path: str) -> None:
    raise FoldedBatchError(
        f"{path}: rows are moved as the data say, and the records can no longer be followed",
        why="each row has to be clipped with the record that it came from.",
        cure="keep the records in a dimension of their own, or register a rule for the module (dpkit.register_rule).",
    )


def extend(plan: Plan, other: Plan) -> None:
    """Add to ``plan`` what another probe of the same model, on another path, has learnt."""
    for call, sites in other.calls.items():
        plan.calls[call] = _with(plan.calls.get(call, []), sites)
    for op, sites in other.ops.items():
        plan.ops[op] = _with(plan.ops.get(op, []), sites)
    plan.bare |= other.bare


def _with(known: list[Site], more: list[Site]) -> list[Site]:
    return known + [s for s in more if not any(s.agrees(k) and s.ranks == k.ranks for k in known)]


def _sites(full: dict[K, Call], part: dict[K, Call], n: int, m: int) -> dict[K, Site]:
    sites: dict[K, Site] = {}
    for key, a in full.items():
        b = part.get(key)
        if b is None or (a.what, len(a.arguments), len(a.outputs)) != (b.what, len(b.arguments), len(b.outputs)):
            continue
        sites[key] = Site(
            what=a.what,
            arguments=[_place(x, y, n, m) for x, y in zip(a.arguments, b.arguments, strict=True)],
            numbers=[_rows(x, y, n, m) for x, y in zip(a.numbers, b.numbers, strict=True)],
            outputs=[_place(x, y, n, m) for x, y in zip(a.outputs, b.outputs, strict=True)],
            data=a.tainted,
            ranks=[None if x is None else len(x.shape) for x in a.arguments],
        )
    return sites


def _place(a: Seen | None, b: Seen | None, n: int, m: int) -> Place:
    if a is None or b is None:
        return None
    changed = [(d, s, t) for d, (s, t) in enumerate(zip(a.shape, b.shape, strict=False)) if s != t]
    if len(a.shape) == len(b.shape) and [(s, t) for _, s, t in changed] == [(n, m)] * 2:
        return Records(changed[0][0])  # a value for each pair of records: the first one's, see `Pairs`
    return place(a.shape, b.shape, n, m, (a.value, b.value))


def _rows(x: int | None, y: int | None, n: int, m: int) -> int | None:
    """k, if an integer argument is k·n in one run and k·m in the other."""
    return x // n if x is not None and y is not None and x != y and x % n == 0 and x // n * m == y else None


def splittable(full: Recorder, part: Recorder) -> set[nn.Module]:
    """The modules that can run on one record at a time: records have a place in all that enters and leaves them."""
    assert full.visits is not None
    assert part.visits is not None
    sites = _sites(full.visits, part.visits, full.n, part.n)
    bad = {m for m, _ in full.visits.keys() ^ sites.keys()} | {m for m, _ in part.visits.keys() ^ sites.keys()}
    for (m, _), site in sites.items():
        carried = any(isinstance(r, Records) for r in site.arguments) and any(
            isinstance(r, Records) for r in site.outputs
        )
        if not site.data or site.folded is not None or not carried:
            bad.add(m)
    return {m for m, _ in sites} - bad


def cut(tree: Any, dims: list[int | None], n: int, m: int) -> Any:
    """The arguments with m of the n records: the first m, or (n = 1) the only one twice. All tensors are copies."""
    found = iter(dims)

    def one(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        d = next(found)
        v = v.detach()
        if d is None or m == n:
            return v.clone()
        return v.narrow(d, 0, m).clone() if m < n else torch.cat([v] * m, d)

    return tree_map(one, tree)


def alone(tree: Any, dims: list[int | None], i: int) -> Any:
    """The arguments with record i alone."""
    found = iter(dims)

    def one(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        d = next(found)
        return v.detach().clone() if d is None else v.detach().narrow(d, i, 1).clone()

    return tree_map(one, tree)


def turned(tree: Any, dims: list[int | None]) -> Any:
    """The arguments with the records in reverse order, so that another one is the last."""
    found = iter(dims)

    def one(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        d = next(found)
        return v.detach().clone() if d is None else v.detach().flip(d)

    return tree_map(one, tree)


def replaced(tree: Any, dims: list[int | None], others: Mapping[int, int]) -> Any:
    """The arguments with another record in the place of some."""
    found = iter(dims)

    def one(v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        d, new = next(found), v.detach().clone()
        if d is not None:
            for gone, other in others.items():
                new.select(d, gone).copy_(v.select(d, other))
        return new

    return tree_map(one, tree)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[Buffers]:
    """Run the model aside: random state, buffers and train flags are put back. Gives the buffers."""
    chance = randomness.capture()
    flags = [(m, m.training) for m in model.modules()]
    buffers = Buffers(model)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield buffers
    finally:
        for m, flag in flags:
            m.training = flag
        buffers.put_back()
        randomness.restore(chance)


@contextlib.contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Shake the parameters, and put them back: what a zero hides (a gate, an adapter, a residual branch that starts at
    zero, or at 10⁻⁵) would pass every test unseen and open later. Signs are kept. Autocast must not remember the shaken
    weights."""
    kept = [(p, p.data) for p in model.parameters() if p.is_floating_point() and p.layout == torch.strided]
    try:
        for p, value in kept:
            noise = torch.randn_like(value)
            ajar = 0.01 + 0.02 * noise.abs()
            shut = (
                value == 0 if not value.numel() or bool(value.abs().amax() >= _SHUT) else torch.ones_like(value).bool()
            )
            p.data = torch.where(shut, ajar.copysign(value), value * (1 + 0.05 * noise.clamp(-2, 2)))
        torch.clear_autocast_cache()
        yield
    finally:
        for p, value in kept:
            p.data = value
        torch.clear_autocast_cache()


_SHUT = 0.01
"""A parameter without a larger entry is taken for a gate that is all but shut."""


def without_dropout(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.training = False


def same(full: Any, part: Any, n: int, m: int) -> str | None:
    """None if the shared records' outputs agree, else what differs."""
    for k, (a, b) in enumerate(zip(leaves(full), leaves(part), strict=False)):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or isinstance(a, StandIn):
            continue
        if not a.is_floating_point():
            continue
        where = place(tuple(a.shape), tuple(b.shape), n, m)
        if isinstance(where, Records):
            found = [gap(where.split(a), where.split(b), min(n, m))]
        elif isinstance(where, Folded) and where.factor == where.factor // 1 and _grew(a, b) == [where.dim]:
            # rows of a record in either order: the records that stayed must be found unchanged in one of them
            orders = (Records(where.dim, int(where.factor), inner) for inner in (False, True))
            found = [gap(r.split(a), r.split(b), min(n, m)) for r in orders]
        else:
            continue
        if all(found):
            return f"output {k} of the records that stayed {found[0]}"
    return None


def same_alone(full: Any, part: Any, alone: Any, n: int) -> str | None:
    """None if the last record's outputs are the same with all others left out, else what differs."""
    for k, (a, b, c) in enumerate(zip(leaves(full), leaves(part), leaves(alone), strict=False)):
        if not all(isinstance(v, Tensor) and not isinstance(v, StandIn) and v.is_floating_point() for v in (a, b, c)):
            continue
        where = place(tuple(a.shape), tuple(b.shape), n, n - 1, (a, b))
        if isinstance(where, Records) and c.ndim == a.ndim and c.shape[where.dim] == where.factor:
            mine, own = where.split(a)[n - 1 :], where.split(c)
            found = gap(mine, own) if mine.shape == own.shape else ""
            if found:
                return f"output {k} of the last record {found}"
    return None


def same_but(full: list[Any], other: list[Any], where: list[Records | None], gone: int) -> str | None:
    """None if the outputs of all records but one agree, else what differs."""
    for k, (a, b, r) in enumerate(zip(full, other, where, strict=False)):
        if r is None or a.shape != b.shape:
            continue
        x, y = r.split(a), r.split(b)
        rest = torch.arange(len(x), device=x.device) != gone
        found = gap(x[rest], y[rest])
        if found:
            return f"output {k} of the other records {found}"
    return None


def gap(x: Tensor, y: Tensor, kept: int | None = None) -> str:
    """How the first ``kept`` records' values [n, ...] (all by default) differ; nothing if they do not."""
    tolerance = 5e-2 if x.dtype in (torch.float16, torch.bfloat16) else 1e-3
    x, y = x[:kept].double(), y[:kept].double()
    finite = torch.isfinite(x) & torch.isfinite(y)
    scale = float(x[finite].abs().max()) if bool(finite.any()) else 0.0
    gap = float((x - y)[finite].abs().max()) if bool(finite.any()) else 0.0
    if gap > tolerance * max(scale, 1e-6) or not torch.equal(torch.isnan(x), torch.isnan(y)):
        return f"changed by {gap:.3g} (its scale is {scale:.3g})"
    return ""


def _grew(a: Tensor, b: Tensor) -> list[int]:
    """The dimensions in which two runs' outputs differ."""
    return [d for d, (s, t) in enumerate(zip(a.shape, b.shape, strict=False)) if s != t] if a.ndim == b.ndim else []


def crossed(full: Any, part: Any) -> dict[int, list[int]]:
    """Outputs that hold a value for each pair of records (contrastive scores): leaf number -> their dimensions."""
    pairs = zip(leaves(full), leaves(part), strict=False)
    found = {
        k: _grew(a, b)
        for k, (a, b) in enumerate(pairs)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()
    }
    return {k: dims for k, dims in found.items() if len(dims) > 1}


def paired(v: Tensor, dims: list[int] | None, n: int) -> bool:
    """Whether v holds one value for each pair of n records, in these two dimensions."""
    return dims is not None and len(dims) == 2 and all(v.shape[d] == n for d in dims)


def mixed_losses(
    full: list[Any],
    part: list[Any],
    alone: list[Any],
    n: int,
    keys: list[str],
    labels: Any,
    added: list[bool] | None,
    by_chance: bool,
) -> dict[int, str]:
    """Outputs that hold nothing for each record, and are neither the mean nor the sum of one value a record: leaf
    number -> reason.

    Args:
        keys: the outputs' names, where they have some.
        labels: an argument of that name.
        added: whether each output is a sum over the records, where chance has a hand in the model.
        by_chance: whether it has in the outputs at hand, so that they cannot be compared.
    """
    found: dict[int, str] = {}
    for k, (a, b, c) in enumerate(zip(full, part, alone, strict=False)):
        if not all(isinstance(v, Tensor) and v.numel() == 1 and v.is_floating_point() for v in (a, b, c)):
            continue
        x, y, z = float(a), float(b), float(c)
        scale = 1e-3 * max(abs(n * x), abs((n - 1) * y), abs(z), 1e-6)
        if k < len(keys) and "aux" in keys[k]:
            found[k] = f"{keys[k]} balances the experts over the tokens of the whole batch"
        elif isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
            found[k] = "it averages over the labelled tokens of the whole batch"
        elif (added is not None and not all(added[k : k + 1])) or not (
            by_chance or abs(n * x - ((n - 1) * y + z)) <= scale or abs(x - (y + z)) <= scale
        ):
            found[k] = "it is neither the mean nor the sum of one loss a record"
    return found


def reduced(full: list[Any], part: list[Any], n: int, reached: Callable[[Any], bool]) -> set[int]:
    """Outputs that come from the batch and have no row for each record, but more than one value: leaf numbers."""
    return {
        k
        for k, (a, b) in enumerate(zip(full, part, strict=False))
        if all(isinstance(v, Tensor) and not isinstance(v, StandIn) and v.is_floating_point() for v in (a, b))
        and a.numel() > 1
        and place(tuple(a.shape), tuple(b.shape), n, n - 1) is None
        and reached(a)
    }


def refuse_coupling(path: str, what: str, when: str = "other records were left out of the batch") -> None:
    raise CoupledRecordsError(
        f"{path}: {what} when {when}",
        why="a record then acts through the other records' gradients too, which clipping its own does not bound.",
        cure="remove what mixes records: BatchNorm (use GroupNorm), statistics of the batch, mixup, balancing losses.",
    )


def refuse_hooked(name: str, p: Tensor) -> None:
    """Raise if a hook of the user's may be why a parameter's gradient is not what its records' add up to."""
    if p._backward_hooks:
        raise UncoveredParameterError(
            f"{name} has a hook (register_hook) that changes its gradient",
            why="records' gradients are computed and clipped as if there were none.",
            cure="remove it. To keep a part of a parameter as it is, multiply it by a mask in the forward, or make the "
            "part a buffer; to change what the optimizer sees, register optimizer.register_step_pre_hook after "
            "make_private: it finds the noisy gradient.",
        )


def refuse_draws(path: str, what: str) -> None:
    raise CoupledRecordsError(
        f"{path} draws random numbers, in eval mode too, and how many is for the records to say: {what}",
        why="whether an output changes by chance or because of another record cannot be told.",
        cure="draw as many for every record (no rejection sampling), or outside, and pass them as an argument.",
    )


def refuse_folded(path: str, what: str, folded: Folded) -> None:
    factor = "several" if folded.factor != folded.factor else f"{folded.factor:g}"
    raise FoldedBatchError(
        f"{path}: dimension {folded.dim} in {what} holds {factor} rows a record, in an order that could not be told",
        why="each row would be clipped as if it were a record, so a record could move the sum by several times C.",
        cure="keep the records in a dimension of their own ([n, t, ...] rather than [n*t, ...]).",
    )


def refuse_misattributed(
    name: str, form: Form, expected: Tensor | None, weights: Tensor, floor: float, tolerance: float
) -> None:
    """Raise unless the sum of ``form`` with the weights [n] is the gradient of the losses' sum with these weights.

    What is below ``floor`` may be rounding alone; ``tolerance`` is relative.
    """
    norms = form.sq_norm().sqrt()
    ours = form.weighted_sum(weights.to(norms))
    theirs = torch.zeros_like(ours) if expected is None else expected.to_dense().to(ours).flatten()
    size = float(theirs.norm())
    if not (size < float("inf") and bool(torch.isfinite(norms).all())):
        return
    gap = float((ours - theirs).norm())
    if gap > tolerance * max(size, float(norms.max()), floor):
        raise GradientMismatchError(
            f"{name}: its per-record gradients, weighted by record, add up to {float(ours.norm()):.4g}, autograd says "
            f"{size:.4g} (they differ by {gap:.3g})",
            why="a part of a record's gradient is missing or is found at another record, and would be clipped with the "
            "wrong norm.",
            cure="keep records in a dimension of their own all through the model; correct the layer's rule "
            "(dpkit.register_rule), or freeze the parameter.",
        )
