"""The live forward: pairs each record with its own copy of every parameter that is used without a rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import probe
from .errors import CoupledRecordsError, DoubleUseError, UncoveredParameterError
from .forms import Outer
from .records import Place, Records
from .rules import positions, summed, trains
from .standin import StandIn
from .taps import Batch, Pick, Spread, Tap
from .trees import leaves, tree_map

if TYPE_CHECKING:
    from .tape import Tape


class Live:
    """The router of one private forward: looks up where the records are and pairs copies with them."""

    def __init__(self, tape: Tape, plan: probe.Plan, batch: Batch, n: int) -> None:
        self.tape, self.plan, self.batch, self.n = tape, plan, batch, n
        self._called: dict[nn.Module, int] = defaultdict(int)
        self._operated: dict[tuple[nn.Parameter, str], int] = defaultdict(int)
        self._copies: dict[nn.Parameter, Tensor] = {}

    def count(self, layer: nn.Module) -> int:
        """The number of this call of a layer with a rule within the forward."""
        self._called[layer] += 1
        return self._called[layer] - 1

    def site(self, layer: nn.Module, k: int) -> probe.Site:
        """Where the records are in the k-th call of a layer with a rule."""
        site = self.plan.calls.get((layer, k)) or self.plan.calls.get((layer, 0))
        if site is None:
            raise UncoveredParameterError(
                f"{self.tape.path(layer)} was first called now, after the first batch was examined",
                why="which dimension of its input carries the records has not been measured.",
                cure="call engine.detach() and make_private again, so that the model is examined anew.",
            )
        return site

    def operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = leaves((args, kwargs))
        origin = next(v for v in values if isinstance(v, StandIn)).origin
        name = probe.name_of(func)
        k = self._operated[origin, name]
        self._operated[origin, name] += 1
        site = self.plan.ops.get((origin, name, k))
        if site is None or len(site.arguments) != len(values):
            site = self._infer(values, name, origin) if self.tape.stack else self._guess(values, name)
        if site.folded is not None:
            probe.refuse_folded(self.tape.name(origin), name, site.folded)
        fast = self._by_rule(func, args, kwargs, site)
        if fast is not None:
            return fast
        return self._by_copies(func, args, kwargs, values, site, name, origin)

    def _infer(self, values: list[Any], name: str, origin: nn.Parameter) -> probe.Site:
        """An operation that the probe did not see (another length, another path): allowed where nothing is open."""
        standins = [v for v in values if isinstance(v, StandIn)]
        alone = not any(isinstance(v, Tensor) and not isinstance(v, StandIn) for v in values)
        counts = any(type(v) is int and v > 1 and v % self.n == 0 for v in values)  # may be the number of records
        if alone and not counts and all(s.records is None for s in standins):
            return probe.Site(name, [None] * len(values), [None] * len(values), [], data=False)
        if alone and len(standins) == 1 and name in _SHAPE_PRESERVING:
            return probe.Site(name, [None] * len(values), [None] * len(values), [standins[0].records], data=False)
        raise UncoveredParameterError(
            f"{self.tape.name(origin)}: the operation {name} did not occur when the first batch was examined",
            why="which dimension of its arguments carries the records has not been measured.",
            cure="keep the model's operations the same from batch to batch, or register a rule for the module.",
        )

    def _guess(self, values: list[Any], name: str) -> probe.Site:
        """Outside the forward (in the user's loss) nothing was measured: there, records lead."""
        places: list[Place] = [
            Records(0) if isinstance(v, Tensor) and not isinstance(v, StandIn) and v.shape[:1] == (self.n,) else None
            for v in values
        ]
        met = any(p is not None for p in places)
        return probe.Site(name, places, [None] * len(values), [Records(0) if met else None], met)

    def copies(self, s: StandIn) -> Tensor:
        if s.copies is not None:
            return s.copies
        parameter = s.origin
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
        if func is F.linear and site.data and isinstance(there[0], Records) and isinstance(there[1], Records):
            b = args[2] if len(args) > 2 else kwargs.get("bias")
            if isinstance(b, StandIn) and not b.root:
                return None
            bias = b.origin if isinstance(b, StandIn) else None
            y = F.linear(x, self._seen(weight), b if bias is None else self._seen(bias))

            def emit(a: Tensor | None, g: Tensor) -> Any:
                return _linear_forms(weight, bias, a, g)

            if torch.is_grad_enabled():
                tapped: Tensor = Tap.apply(y, x, self.tape.anchor(y), emit, self.batch, *there)
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
            out = torch.vmap(single, randomness="same")(*mapped)
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


_SHAPE_PRESERVING = frozenset(["contiguous", "clone", "to", "float", "double", "half", "bfloat16", "exp", "tanh"])
_UNDER_VMAP: dict[Any, Callable[..., Any]] = {F.embedding: _embedding, F.scaled_dot_product_attention: _attention}


def _linear_forms(weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor | None, grad: Tensor) -> Any:
    g = positions(grad)
    if trains(weight) and x is not None:
        yield weight, Outer(g, positions(x))
    if bias is not None and trains(bias):
        yield bias, summed(g)
