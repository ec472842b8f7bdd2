"""The live forward: pairs each record with its own copy of every parameter that is used without a rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkit.layers import known_linear

from . import probe
from .errors import CoupledRecordsError, DoubleUseError, UncoveredParameterError
from .forms import Outer
from .moves import Move, Taint
from .records import Place, Records
from .rules import positions, summed, trains
from .standin import StandIn
from .taps import Batch, Pick, Spread, Tap
from .trees import leaves, tree_map

if TYPE_CHECKING:
    from .tape import Tape


class Live:
    """The router of one private forward: looks up where the records are and pairs copies with them.

    Attributes:
        again: a part of the forward is run again, in the backward (activation checkpointing).
        assumed: calls and operations that the probe had not seen, to be verified when the forward ends.
        culprit: the layer or parameter that was met last.
    """

    def __init__(self, tape: Tape, plan: probe.Plan, batch: Batch, n: int, *, again: bool = False) -> None:
        self.tape, self.plan, self.batch, self.n, self.again = tape, plan, batch, n, again
        self.assumed: list[tuple[Any, str, int, probe.Site]] = []
        self.order: Tensor | None = None
        self.culprit: nn.Module | nn.Parameter | None = None
        self.quiet = 0  # inside a rule, an operation on stand-ins or a module that runs on one record at a time
        self._moves = iter(plan.moves)
        self._taint: Taint | None = None
        self._called: dict[nn.Module, int] = defaultdict(int)
        self._operated: dict[tuple[nn.Parameter, str], int] = defaultdict(int)
        self._copies: dict[nn.Parameter, Tensor] = {}
        self._apiece: dict[nn.Parameter, tuple[Tensor, ...]] = {}

    def watch(self, arguments: Any) -> Taint | None:
        """What checks, while it is entered, that rows stay with their records; None where the data move none."""
        if not self.plan.moves or self.again:
            return None
        self._taint = taint = Taint(self._moved)
        tensors = [v for v in leaves(arguments) if isinstance(v, Tensor)]
        taint.mark([v for v, d in zip(tensors, self.plan.inputs, strict=True) if d is not None])
        return taint

    def _moved(self, move: Move) -> Tensor | None:
        if self.quiet:
            return None
        self.culprit = module = self.tape.stack[-1].module
        places = next(self._moves, None)
        if places is None:
            raise UncoveredParameterError(
                f"{self.tape.path(module)}: {move.name} moves rows by data, and did not when the model was examined",
                why="whose rows they are has not been measured.",
                cure="keep the model's operations the same from batch to batch, or register a rule for the module.",
            )
        self.quiet += 1
        try:
            return places.check(move, self.n, self.tape.path(module))
        finally:
            self.quiet -= 1

    def in_order(self, module: nn.Module | None, values: Any) -> None:
        """Raise where a parameter would meet records that the data have put into another order."""
        if self._taint is None or self._taint.order(values) is None:
            return
        path = "the loss" if module is None else self.tape.path(module)
        raise CoupledRecordsError(
            f"{path}: the records stand in another order, as the data of this batch say",
            why="each one would be credited to the record whose place it has taken.",
            cure="put them back before they meet parameters; pack with enforce_sorted=False, which does so.",
        )

    def without_order(self) -> None:
        """The probe has seen to it."""

    def count(self, layer: nn.Module) -> int:
        """The number of this call of a layer with a rule within the forward."""
        self._called[layer] += 1
        return self._called[layer] - 1

    def site(self, layer: nn.Module, k: int, values: list[Any]) -> probe.Site:
        """Where the records are in the k-th call of a layer with a rule."""
        if self.again:
            known = [s for (m, _), sites in self.plan.calls.items() if m is layer for s in sites]
        else:
            known = self.plan.calls.get((layer, k), [])
        fitting = [s for s in known if s.fits(values, self.n)]
        if fitting and all(s.agrees(fitting[0]) for s in fitting[1:]):
            return fitting[0]
        x = next((v for v in values if isinstance(v, Tensor)), None)
        if self.again or x is None or x.shape[:1] != (self.n,):
            raise UncoveredParameterError(
                f"{self.tape.path(layer)}: such a call did not occur when the model was examined",
                why="which dimension of its input carries the records has not been measured.",
                cure="keep records in the first dimension, and the model's calls the same from batch to batch.",
            )
        return self._assume(layer, k, values, type(layer).__name__)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = leaves((args, kwargs))
        self.culprit = origin = next(v for v in values if isinstance(v, StandIn)).origin
        inside = self.tape.stack[-1].module if self.tape.stack else None
        self.in_order(inside, values)
        name = probe.name_of(func)
        k = self._operated[origin, name]
        self._operated[origin, name] += 1
        out = kwargs.get("out")
        if out is not None and not isinstance(out, StandIn) and not torch.is_grad_enabled():
            plain_args, plain_kwargs = tree_map(lambda v: v.value if isinstance(v, StandIn) else v, (args, kwargs))
            func(*plain_args, **plain_kwargs)
            return out
        known = [s for s in self.plan.ops.get((origin, name, k), []) if s.fits(values, self.n)]
        if known:
            site = known[0]
        elif self.tape.stack:
            site = self._infer(values, name, origin, k)
        else:
            site = self._guess(values, name)
        if site.folded is not None:
            probe.refuse_folded(self.tape.name(origin), name, site.folded)
        self.quiet += 1
        try:
            fast = self._by_rule(func, args, kwargs, site)
            return self._by_copies(func, args, kwargs, values, site, name, origin) if fast is None else fast
        finally:
            self.quiet -= 1

    def _infer(self, values: list[Any], name: str, origin: nn.Parameter, k: int) -> probe.Site:
        """An operation that the probe did not see: the model took another path (another length, no padding)."""
        standins = [v for v in values if isinstance(v, StandIn)]
        plain = [v for v in values if isinstance(v, Tensor) and not isinstance(v, StandIn)]
        nothing: list[Any] = [None] * len(values)
        counts = any(type(v) is int and v > 1 and v % self.n == 0 for v in values)  # may be the number of records
        if not plain and (self.n == 1 or not counts) and all(s.records is None for s in standins):
            return probe.Site(name, nothing, nothing, [], data=False)
        if not plain and len(standins) == 1 and name in _SHAPE_PRESERVING:
            return probe.Site(name, nothing, nothing, [standins[0].records], data=False)
        leading = all(v.shape[:1] == (self.n,) for v in plain if v.requires_grad)
        if plain and leading and not self.again and (self.n == 1 or not counts):
            return self._assume(origin, k, values, name)
        raise UncoveredParameterError(
            f"{self.tape.name(origin)}: the operation {name} did not occur when the model was examined",
            why="which dimension of its arguments carries the records has not been measured.",
            cure="keep the model's operations the same from batch to batch, or register a rule for the module.",
        )

    def _assume(self, whose: nn.Module | nn.Parameter, k: int, values: list[Any], name: str) -> probe.Site:
        """Records lead, it seems; `verify` will measure before the forward's result is used."""
        site = self._guess(values, name)
        self.assumed.append((whose, name, k, site))
        return site

    def verify(self, measured: probe.Plan) -> None:
        """Raise unless what was assumed in this forward is what a new probe has measured."""
        for whose, name, k, site in self.assumed:
            known = (
                measured.calls.get((whose, k)) if isinstance(whose, nn.Module) else measured.ops.get((whose, name, k))
            )
            if not known or not site.agrees(known[0]):
                self.culprit = whose
                path = self.tape.path(whose) if isinstance(whose, nn.Module) else self.tape.name(whose)
                raise UncoveredParameterError(
                    f"{path}: in this batch {name} was used in a way that was not measured before",
                    why="the records were taken to be in the first dimension, and they are not.",
                    cure="keep the model's operations the same from batch to batch, or register a rule for the module.",
                )

    def _guess(self, values: list[Any], name: str) -> probe.Site:
        """Outside the forward (in the user's loss) nothing was measured: there, records lead."""
        places: list[Place] = [
            Records(0) if isinstance(v, Tensor) and not isinstance(v, StandIn) and v.shape[:1] == (self.n,) else None
            for v in values
        ]
        met = any(p is not None for p in places)
        return probe.Site(name, places, [None] * len(values), [Records(0) if met else None] * _MANY, met)

    def copies(self, s: StandIn) -> Tensor:
        return self._spread(s.origin) if s.copies is None else s.copies

    def apiece(self, parameter: nn.Parameter) -> tuple[Tensor, ...]:
        """Each record's own copy of a trainable parameter."""
        if parameter not in self._apiece:
            self._apiece[parameter] = self._spread(parameter).unbind(0)
        return self._apiece[parameter]

    def _spread(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self._copies:
            if trains(parameter):
                self._copies[parameter] = Spread.apply(self.tape.anchor(parameter), parameter, self.batch, self.n)
            else:
                self._copies[parameter] = parameter.detach().expand(self.n, *parameter.shape)
        return self._copies[parameter]

    def _by_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], site: probe.Site) -> Any:
        """Matrix products and table look-ups with a whole parameter: the forms that their layers would give."""
        if len(args) < 2 or isinstance(args[0], StandIn) or not isinstance(args[1], StandIn) or not args[1].root:
            return None
        weight, x, there = args[1].origin, args[0], (site.arguments[0], site.outputs[0])
        if func in _LINEAR and site.data and isinstance(there[0], Records) and isinstance(there[1], Records):
            b = args[2] if len(args) > 2 else kwargs.get("bias")
            if isinstance(b, StandIn) and not b.root:
                return None
            bias = b.origin if isinstance(b, StandIn) else None
            y = func(x, self._seen(weight), b if bias is None else self._seen(bias), *args[3:])

            def emit(a: tuple[Tensor, ...], g: Tensor) -> Any:
                return _linear_forms(weight, bias, a[0], g)

            if torch.is_grad_enabled():
                tapped: Tensor = Tap.apply(y, self.tape.anchor(y), emit, self.batch, there[1], (there[0],), x)
                return tapped
            return y
        if func is F.embedding:
            how = (
                dict(zip(("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args[2:], strict=False))
                | kwargs
            )
            padding = how.get("padding_idx")
            if how.get("max_norm") is not None or how.get("scale_grad_by_freq"):
                raise UncoveredParameterError(
                    f"{self.tape.name(weight)} is looked up with max_norm or scale_grad_by_freq",
                    why="the first updates weights in the forward, the second couples records by their counts.",
                    cure="look it up without them.",
                )
            r = there[0] if isinstance(there[0], Records) else None
            index = r.split(x) if r is not None else x.expand(self.n, *x.shape)
            copies = Pick.apply(self.tape.anchor(x), weight, index, padding, self.batch)
            if r is None:
                return StandIn.of(copies.detach()[0], weight, self, copies=copies)
            data = r.join(copies)
            return data if site.data else StandIn.of(data, weight, self, copies=copies, records=r)
        return None

    def _seen(self, parameter: nn.Parameter) -> Tensor:
        """The parameter as the operation sees it: detached, unless autograd's gradient is wanted for the proof."""
        return parameter if parameter in self.batch.unproven else parameter.detach()

    def _by_copies(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: list[Any],
        site: probe.Site,
        name: str,
        origin: nn.Parameter,
    ) -> Any:
        mapped: list[Tensor] = []
        slots: dict[int, int] = {}
        for k, v in enumerate(values):
            if isinstance(v, StandIn):
                slots[k] = len(mapped)
                mapped.append(self.copies(v))
            elif isinstance(v, Tensor) and isinstance(r := site.arguments[k], Records):
                if v.shape[r.dim] != self.n * r.factor:
                    raise DoubleUseError(
                        f"{self.tape.name(origin)} meets {v.shape[r.dim]} rows in {name} among {self.n} records",
                        why="copy i of a parameter must meet record i alone.",
                        cure="run the model on one batch of records at a time.",
                    )
                slots[k] = len(mapped)
                mapped.append(r.split(v))

        in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i") or name == "__setitem__")

        shape: list[Any] = []  # the output's structure, which vmap does not carry

        def single(*tensors: Tensor) -> Any:
            counter = iter(range(len(values)))

            def fill(v: Any) -> Any:
                k = next(counter)
                if k in slots:
                    return tensors[slots[k]]
                return site.numbers[k] if type(v) is int and site.numbers[k] is not None else v

            a, kw = tree_map(fill, (args, kwargs))
            out = _UNDER_VMAP.get(func, func)(*a, **kw)
            shape.append(out)
            return tensors[slots[0]] if in_place else tuple(v for v in leaves(out) if isinstance(v, Tensor))

        if in_place and isinstance(args[0], StandIn):
            raise UncoveredParameterError(
                f"{self.tape.name(origin)} is changed in place by {name} in the forward",
                why="the change happens to all records' copies at once and cannot be attributed.",
                cure="use the operation that returns a new tensor.",
            )
        functorch: Any = torch._C._functorch
        functorch._set_vmap_fallback_warning_enabled(False)  # slow operations are right all the same
        try:
            # chance as in the model itself: one draw for what all records share, one for each where it is their data
            out = torch.vmap(single, randomness="different" if site.data else "same")(*mapped)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise UncoveredParameterError(
                f"{self.tape.name(origin)} is used in {name}, which cannot run on one copy a record ({error})",
                why="what is not clipped per record is not covered by the guarantee.",
                cure="freeze the parameter, or register a rule for its module (dpkit.register_rule).",
            ) from error
        finally:
            functorch._set_vmap_fallback_warning_enabled(True)
        if in_place:
            return args[0]
        results, numbers = iter(out), iter(range(1 << 30))

        def finish(v: Any) -> Any:
            k = next(numbers)
            if not isinstance(v, Tensor):
                return v
            v = next(results)
            r = site.outputs[k] if k < len(site.outputs) else None
            if isinstance(r, Records):
                data = r.join(v)
                return data if site.data else StandIn.of(data, origin, self, copies=v, records=r)
            if site.data:
                raise CoupledRecordsError(
                    f"{self.tape.name(origin)} enters {name}, whose result has no dimension of records left",
                    why="the result mixes the records before the loss does.",
                    cure="reduce over the records only in the loss.",
                )
            return StandIn.of(v.detach()[0], origin, self, copies=v)

        return tree_map(finish, shape[-1])


def _embedding(index: Tensor, table: Tensor, padding_idx: int | None = None, *_: Any, **__: Any) -> Tensor:
    """Table look-up for ``vmap``, whose own batching rule forgets that ``padding_idx`` gets no gradient."""
    rows = table[index]
    return rows if padding_idx is None else torch.where((index == padding_idx).unsqueeze(-1), rows.detach(), rows)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention for ``vmap``: the fused kernels give no gradient to a mask (T5's relative bias)."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


_MANY = 8
"""More results than operations on parameters have (``broadcast_tensors``)."""
_SHAPE_PRESERVING = frozenset(["contiguous", "clone", "to", "float", "double", "half", "bfloat16", "exp", "tanh"])
_LINEAR = (F.linear, known_linear)
_UNDER_VMAP: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
    known_linear: lambda x, weight, bias, value: F.linear(x, weight, bias),
}


def _linear_forms(weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor, grad: Tensor) -> Any:
    g = positions(grad)
    if trains(weight):
        yield weight, Outer(g, positions(x))
    if bias is not None and trains(bias):
        yield bias, summed(g)
