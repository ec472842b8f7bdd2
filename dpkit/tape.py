"""The tape: the only file that hooks into a model.

It notes, in the backward pass, the per-sample gradient of every trainable parameter, whichever way the parameter was
used. During a private forward, layers with a rule see their parameters detached (so that autograd never computes their
ordinary gradient) and their outputs pass through a `Tap`; parameters used in any other way are replaced by a `StandIn`.
Between forwards everything is the user's own: nothing is wrapped, renamed, or stored on the model.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import checks, probe
from .errors import ConfigurationError, CoupledRecordsError, DoubleUseError, UncoveredParameterError
from .forms import Dense, Form, Outer, joined
from .rules import Rule, looked_up, positions, rule_for, summed, trains
from .standin import StandIn, as_copies, as_data
from .trees import leaves, signature, tree_map

Emit = Callable[[Tensor | None, Tensor], Any]


# ---------------------------------------------------------------- the autograd side


class Tap(torch.autograd.Function):
    """Identity whose backward hands (input, gradient) to a rule.

    The input is kept by ``save_for_backward``, so activation checkpointing keeps its saving and a later in-place change
    is an error. The output is no view, so in-place operations on it stay possible.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor | None, anchor: Tensor, emit: Emit, batch: Batch, dims: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.emit, ctx.batch, ctx.dims = emit, batch, dims
        ctx.set_materialize_grads(False)
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            (x,) = ctx.saved_tensors
            x_dim, y_dim = ctx.dims
            if x is not None:
                x = x.detach().movedim(x_dim, 0)
            moved = grad.movedim(y_dim, 0) if y_dim else grad
            if ctx.batch.examined is not None:
                ctx.batch.examine(moved)
            else:
                for parameter, form in ctx.emit(x, moved):
                    ctx.batch.add(parameter, form, tapped=True)
        return grad, None, None, None, None, None


class Spread(torch.autograd.Function):
    """n copies of a parameter, whose gradients are the per-sample gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, parameter: nn.Parameter, batch: Batch, n: int) -> Tensor:
        ctx.parameter, ctx.batch = parameter, batch
        ctx.set_materialize_grads(False)
        return parameter.detach().expand(n, *parameter.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            if ctx.batch.examined is not None:
                ctx.batch.examine(grad)
            else:
                ctx.batch.add(ctx.parameter, Dense(grad), tapped=False)
        return None, None, None, None


class Pick(torch.autograd.Function):
    """Rows of each record's copy of a table, [n, ..., d], without making the copies."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: nn.Parameter, index: Tensor, padding: int | None, batch: Batch) -> Tensor:
        ctx.table, ctx.index, ctx.padding, ctx.batch = table, index, padding, batch
        ctx.set_materialize_grads(False)
        return F.embedding(index, table.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            if ctx.batch.examined is not None:
                ctx.batch.examine(grad)
            else:
                ctx.batch.add(ctx.table, looked_up(ctx.index, grad, ctx.table.shape[0], ctx.padding), tapped=False)
        return None, None, None, None, None


class Refusal(torch.autograd.Function):
    """Identity whose backward raises: for a loss that mixes records."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, error: Exception) -> Tensor:
        ctx.error = error
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise ctx.error


@dataclass(eq=False)
class Batch:
    """One physical batch while it is in the user's hands: the forms that its backward passes have brought.

    Attributes:
        n: records in it.
        forms: per parameter, its forms in order of arrival.
        tapped: the forms that came through rules (those that the first-batch proof compares with autograd).
        passive: why forwards in this batch were left alone, if any was.
    """

    n: int
    forms: dict[nn.Parameter, list[Form]] = field(default_factory=lambda: defaultdict(list))
    tapped: dict[nn.Parameter, list[Form]] = field(default_factory=lambda: defaultdict(list))
    unproven: frozenset[nn.Parameter] = frozenset()  # not yet compared with autograd's own gradient
    passive: str = ""
    closed: bool = False
    examined: int | None = None  # strict door: the only record that the running backward may touch

    def add(self, parameter: nn.Parameter | None, form: Form, *, tapped: bool) -> None:
        if parameter is None or not parameter.requires_grad:
            return
        if self.closed:
            raise DoubleUseError(
                "a backward pass reached a batch whose step has been taken",
                why="its records would enter a second step that they were not drawn for.",
                cure="run forward and backward on each batch that the private loader yields, before optimizer.step().",
            )
        if form.n != self.n:
            raise DoubleUseError(
                f"{form.n} records were back-propagated in a step that drew {self.n}",
                why="the step is accounted for the records that were drawn, each of them once.",
                cure="feed the batches of the private loader as they come; evaluate under torch.no_grad() or "
                "engine.paused(). Several views of one record belong in one more dimension, not in more rows.",
            )
        if isinstance(form, Outer):
            form = form.settled()
        self.forms[parameter].append(form)
        if tapped and parameter in self.unproven:
            self.tapped[parameter].append(form)

    def examine(self, grad: Tensor) -> None:
        """Strict door, first batch: the loss of one record must not reach another record."""
        others = torch.arange(grad.shape[0], device=grad.device) != self.examined
        if bool((grad[others] != 0).any()):
            raise CoupledRecordsError(
                f"the loss of record {self.examined} has a gradient at another record's activations",
                why="clipping bounds what a record does through its own gradient only.",
                cure="make losses[i] depend on record i alone.",
            )


class _Hook:
    """A module hook that copies and pickles as nothing, so that copies of a private model are ordinary models."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: Any) -> Any:
        return no_hook

    def __reduce__(self) -> Any:
        return (_no_hook, ())


def no_hook(*args: Any) -> None:
    """What a hook becomes in a copy of the model."""


def _no_hook() -> Callable[..., None]:
    return no_hook


# ---------------------------------------------------------------- the live forward


class Live:
    """The router of one private forward: looks up where the records are and pairs copies with them."""

    def __init__(self, tape: Tape, plan: probe.Plan, batch: Batch, n: int) -> None:
        self.tape, self.plan, self.batch, self.n = tape, plan, batch, n
        self._called: dict[nn.Module, int] = defaultdict(int)
        self._operated: dict[nn.Parameter, int] = defaultdict(int)
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
        k = self._operated[origin]
        self._operated[origin] += 1
        name = probe.name_of(func)
        site = self.plan.ops.get((origin, k))
        if site is None or site.what != name or len(site.arguments) != len(values):
            site = self._guess(values, name, origin)
        self._refuse_folded(site, name, origin)
        fast = self._by_rule(func, args, kwargs, site)
        if fast is not None:
            return fast
        return self._by_copies(func, args, kwargs, values, site, name, origin)

    def _guess(self, values: list[Any], name: str, origin: nn.Parameter) -> probe.Site:
        """Outside the forward (in the user's loss) nothing was measured: there, records lead."""
        if self.tape.stack:
            raise UncoveredParameterError(
                f"{self.tape.name(origin)}: the operation {name} did not occur when the first batch was examined",
                why="which dimension of its arguments carries the records has not been measured.",
                cure="keep the model's operations the same from batch to batch, or register a rule for the module.",
            )
        dims: list[probe.Dim] = [
            0 if isinstance(v, Tensor) and not isinstance(v, StandIn) and v.ndim and v.shape[0] == self.n else None
            for v in values
        ]
        met = any(d is not None for d in dims)
        return probe.Site(name, dims, [False] * len(values), [0 if met else None], met)

    def _refuse_folded(self, site: probe.Site, name: str, origin: nn.Parameter) -> None:
        if any(isinstance(d, probe.Folded) for d in (*site.arguments, *site.outputs)):
            probe.refuse_folded(self.tape.name(origin), name, [*site.arguments, *site.outputs])

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

    def _by_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], site: probe.Site) -> Tensor | None:
        """Matrix products and table look-ups with a whole parameter: the forms that their layers would give."""
        if len(args) < 2 or isinstance(args[0], StandIn) or not isinstance(args[1], StandIn) or not args[1].root:
            return None
        weight, x, x_dim, y_dim = args[1].origin, args[0], site.arguments[0], site.outputs[0]
        if func is F.linear and site.data and isinstance(x_dim, int) and isinstance(y_dim, int):
            b = args[2] if len(args) > 2 else kwargs.get("bias")
            if isinstance(b, StandIn) and not b.root:
                return None
            bias = b.origin if isinstance(b, StandIn) else None
            y = F.linear(x, self._seen(weight), b if bias is None else self._seen(bias))

            def emit(a: Tensor | None, g: Tensor) -> Any:
                return _linear_forms(weight, bias, a, g)

            return Tap.apply(y, x, self.tape.anchor(y), emit, self.batch, (x_dim, y_dim)) if torch.is_grad_enabled() else y
        if func is F.embedding:
            how = dict(zip(("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args[2:], strict=False)) | kwargs
            padding = how.get("padding_idx")
            if how.get("max_norm") is not None or how.get("scale_grad_by_freq"):
                raise UncoveredParameterError(
                    f"{self.tape.name(weight)} is looked up with max_norm or scale_grad_by_freq",
                    why="the first updates weights in the forward, the second couples records by their counts.",
                    cure="look it up without them.",
                )
            d = x_dim if isinstance(x_dim, int) else None
            index = as_copies(x, d) if d is not None else x.expand(self.n, *x.shape)
            copies = Pick.apply(self.tape.anchor(x), weight, index, padding, self.batch)
            if d is None:
                return StandIn.of(copies.detach()[0], weight, self, copies=copies)
            data = as_data(copies, d)
            return data if site.data else StandIn.of(data, weight, self, copies=copies, record=d)
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
            elif isinstance(v, Tensor) and isinstance(d := site.arguments[k], int):
                if v.shape[d] != self.n:
                    raise DoubleUseError(
                        f"{self.tape.name(origin)} meets {v.shape[d]} records in {name} in a forward of {self.n}",
                        why="copy i of a parameter must meet record i alone.",
                        cure="run the model on one batch of records at a time.",
                    )
                slots[k] = len(mapped)
                mapped.append(as_copies(v, d))

        in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i") or name == "__setitem__")

        shape: list[Any] = []  # the output's structure, which vmap does not carry

        def single(*tensors: Tensor) -> Any:
            counter = iter(range(len(values)))

            def fill(v: Any) -> Any:
                k = next(counter)
                if k in slots:
                    return tensors[slots[k]]
                return 1 if type(v) is int and k < len(site.numbers) and site.numbers[k] else v

            a, kw = tree_map(fill, (args, kwargs))
            out = _embedding(*a, **kw) if func is F.embedding else func(*a, **kw)
            shape.append(out)
            return tensors[slots[0]] if in_place else tuple(v for v in leaves(out) if isinstance(v, Tensor))

        if in_place and isinstance(args[0], StandIn):
            raise UncoveredParameterError(
                f"{self.tape.name(origin)} is changed in place by {name} in the forward",
                why="the change happens to all records' copies at once and cannot be attributed.",
                cure="use the operation that returns a new tensor.",
            )
        functorch = torch._C._functorch
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
            d = site.outputs[k] if k < len(site.outputs) else None
            if isinstance(d, int):
                data = as_data(v, d)
                return data if site.data else StandIn.of(data, origin, self, copies=v, record=d)
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


def _linear_forms(weight: nn.Parameter, bias: nn.Parameter | None, x: Tensor | None, grad: Tensor) -> Any:
    g = positions(grad)
    if trains(weight) and x is not None:
        yield weight, Outer(g, positions(x))
    if bias is not None and trains(bias):
        yield bias, summed(g)


# ---------------------------------------------------------------- the tape


@dataclass
class _Frame:
    """One module call in progress, and the parameter entries to put back when it ends."""

    module: nn.Module
    restore: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    site: probe.Site | None = None
    outermost: bool = False


_tapes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tape]] = weakref.WeakKeyDictionary()


class Tape:
    """Hooks on one model; `open` a batch, let the user run forward and backward, `close` it and take the forms."""

    def __init__(self, model: nn.Module, *, batch_first: bool = True) -> None:
        other = _tapes.get(model)
        if other is not None and other() is not None:
            raise ConfigurationError(
                "this model is private already",
                why="two engines would clip the same gradients twice and account for them once each.",
                cure="call detach() on the engine that holds it first.",
            )
        self.model, self.batch_first = model, batch_first
        self.batch: Batch | None = None
        self.paused = False
        self.proven: set[nn.Parameter] = set()
        self.stack: list[_Frame] = []
        self._names: dict[nn.Parameter, str] = {}
        self._paths: dict[nn.Module, str] = {}
        self._rules: dict[nn.Module, Rule | None] = {}
        self._owners: list[tuple[nn.Module, str]] = []
        self._plans: dict[Any, probe.Plan] = {}
        self._latest: probe.Plan | None = None
        self._router: Live | probe.Recorder | None = None
        self._anchors: dict[torch.device, Tensor] = {}
        self._handles: list[Any] = []
        self._statistics = checks.batch_statistics(model)
        for path, module in model.named_modules():
            self._paths[module] = path or type(module).__name__
            own = [(name, p) for name, p in module._parameters.items() if p is not None]
            for name, p in own:
                self._names.setdefault(p, f"{path}.{name}" if path else name)
                self._owners.append((module, name))
            self._rules[module] = rule_for(module) if own else None
            if next(module.parameters(), None) is not None:
                self._handles += [
                    module.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
                    module.register_forward_hook(_Hook(self._leave), prepend=True, with_kwargs=True, always_call=True),
                ]
        _tapes[model] = weakref.ref(self)

    # ---- names for errors

    def name(self, parameter: nn.Parameter) -> str:
        return self._names.get(parameter, "a parameter outside the model")

    def path(self, module: nn.Module) -> str:
        return self._paths.get(module, type(module).__name__)

    def anchor(self, like: Tensor) -> Tensor:
        """A leaf that requires grad, so that layers with integer inputs get a gradient."""
        if like.device not in self._anchors:
            self._anchors[like.device] = torch.zeros((), device=like.device, requires_grad=True)
        return self._anchors[like.device]

    def anchors(self) -> list[Tensor]:
        return list(self._anchors.values())

    def parameters(self) -> dict[nn.Parameter, str]:
        """The model's parameters, each once, with their names."""
        return self._names

    # ---- batches

    def open(self, n: int) -> None:
        """From now on, forwards are private: n records are in the user's hands."""
        self.restore()
        unproven = frozenset(p for p in self._names if p.requires_grad and p not in self.proven)
        self.batch = Batch(n, unproven=unproven)

    def close(self) -> Batch | None:
        """End the batch and return what its backward passes brought."""
        self.restore()
        batch, self.batch = self.batch, None
        if batch is not None:
            batch.closed = True
        return batch

    def detach(self) -> None:
        """Remove every hook."""
        self.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _tapes.pop(self.model, None)

    def restore(self) -> None:
        """Put parameters back that an interrupted forward (KeyboardInterrupt) left replaced."""
        while self.stack:
            self._pop()
        self._router = None

    def _pop(self) -> _Frame:
        frame = self.stack.pop()
        for parameters, name, value in reversed(frame.restore):
            parameters[name] = value
        return frame

    # ---- hooks

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.stack and module is self.stack[0].module and not isinstance(self._router, probe.Recorder):
            self.restore()  # the outermost module is entered again: its last call was interrupted
        frame = _Frame(module, outermost=not self.stack)
        if frame.outermost:
            self._begin(module, args, kwargs)
        self.stack.append(frame)
        router = self._router
        if router is None:
            return
        if frame.outermost:
            self._stand_in(frame, router)
        if self._rules[module] is not None and self._uses_rule(module, args, kwargs, frame, router):
            own = module._parameters
            seen_by_autograd = self.batch.unproven if isinstance(router, Live) and self.batch else frozenset()
            for name, p in own.items():
                real = p.origin if isinstance(p, StandIn) else p
                if real is not None and (real.requires_grad or p is not real):
                    frame.restore.append((own, name, p))
                    own[name] = real if real in seen_by_autograd else real.detach()  # type: ignore[assignment]

    def _uses_rule(self, module: nn.Module, args: Any, kwargs: Any, frame: _Frame, router: Any) -> bool:
        if isinstance(router, probe.Recorder):
            return router.call(module, args, kwargs)
        k = router.count(module)
        if not any(trains(p) for p in self._own(module).values()):
            return False
        site = router.site(module, k)
        if not site.data or any(isinstance(v, StandIn) for v in leaves((args, kwargs))):
            return False
        frame.site = site
        return True

    @staticmethod
    def _own(module: nn.Module) -> dict[str, nn.Parameter | None]:
        return {k: p.origin if isinstance(p, StandIn) else p for k, p in module._parameters.items()}

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.stack or self.stack[-1].module is not module:
            return None
        frame = self._pop()
        router = self._router
        if frame.outermost:
            self._router = None
        if router is None or output is None:
            return None
        if isinstance(router, probe.Recorder):
            if self._rules[module] is not None:
                router.returned(module, output)
            return None
        if frame.site is not None and torch.is_grad_enabled():
            output = self._tapped(module, frame.site, args, kwargs, output, router)
        if frame.outermost:
            output = self._finished(router, output)
        return output

    def _tapped(self, module: nn.Module, site: probe.Site, args: Any, kwargs: Any, y: Any, router: Live) -> Any:
        rule = self._rules[module]
        assert rule is not None
        if any(isinstance(d, probe.Folded) for d in (*site.arguments, *site.outputs)):
            probe.refuse_folded(self.path(module), type(module).__name__, [*site.arguments, *site.outputs])
        k, x = next((k, v) for k, v in enumerate(leaves((args, kwargs))) if isinstance(v, Tensor))
        x_dim, y_dim = site.arguments[k], site.outputs[0]
        if x_dim is None or y_dim is None:
            raise CoupledRecordsError(
                f"the input of {self.path(module)} comes from the batch but has no dimension of records",
                why="it was reduced over the records, so the layer's gradient mixes them.",
                cure="reduce over the records only in the loss.",
            )
        if not isinstance(y, Tensor):
            raise UncoveredParameterError(
                f"{self.path(module)} ({type(module).__name__}) has a rule but returns a {type(y).__name__}",
                why="a rule is given the gradient of one output tensor.",
                cure="return one tensor, or remove the rule: the engine then follows the parameters themselves.",
            )
        kept = x if rule.needs_input(self._own(module)) else None
        function = rule.function
        return Tap.apply(y, kept, self.anchor(y), lambda a, g: function(module, a, g), router.batch, (x_dim, y_dim))

    # ---- the outermost call

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Decide what the call that starts now is: private, or left alone."""
        self._router = None
        batch = self.batch
        if batch is None or self.paused or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing runs a part again, in the backward
            if self._latest is not None:
                self._router = Live(self, self._latest, batch, batch.n)
            return
        checks.refuse_batch_statistics(self._statistics)
        key = (module, signature((args, kwargs)))
        plan = self._plans.get(key)
        tensors = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
        if plan is None:
            dims = self._find_records(tensors, batch.n)
            if not any(d is not None for d in dims):
                sizes = sorted({tuple(t.shape)[:1] for t in tensors})
                batch.passive = f"{self.path(module)} was called on tensors of leading sizes {[s[0] for s in sizes if s]}"
                return
            plan = self._examine(module, args, kwargs, dims, batch.n)
            if batch.n > 1:
                self._plans[key] = plan
        sizes = {t.shape[d] for t, d in zip(tensors, plan.inputs, strict=True) if d is not None}
        if len(sizes) != 1:
            batch.passive = f"{self.path(module)} was called on tensors with different numbers of records {sorted(sizes)}"
            return
        self._latest = plan
        self._router = Live(self, plan, batch, sizes.pop())

    def _find_records(self, tensors: list[Tensor], n: int) -> list[int | None]:
        first = 0 if self.batch_first else 1
        dims: list[int | None] = []
        for t in tensors:
            lead = [d for d in (first, 0) if d < t.ndim and t.shape[d] == n]
            dims.append(lead[0] if lead else None)
        return dims

    def _stand_in(self, frame: _Frame, router: Live | probe.Recorder) -> None:
        """Replace the parameters that are used without a rule (all of them, while probing)."""
        made: dict[nn.Parameter, StandIn] = {}
        bare = None if isinstance(router, probe.Recorder) else router.plan.bare
        for module, name in self._owners:
            p = module._parameters.get(name)
            if p is None or (bare is not None and (p not in bare or not p.requires_grad)):
                continue
            if p not in made:
                made[p] = StandIn.of(p, p, router, root=True)
            frame.restore.append((module._parameters, name, p))
            module._parameters[name] = made[p]  # type: ignore[assignment]

    def _finished(self, router: Live, output: Any) -> Any:
        counter = iter(range(1 << 30))

        def finish(v: Any) -> Any:
            k = next(counter)
            if isinstance(v, StandIn) and v.record is not None and v.copies is not None:
                return as_data(v.copies, v.record)
            if k in router.plan.losses and isinstance(v, Tensor) and v.requires_grad:
                return Refusal.apply(
                    v,
                    CoupledRecordsError(
                        f"the loss that {self.path(self.model)} computes itself was back-propagated: "
                        f"{router.plan.losses[k]}",
                        why="one record then rescales the gradients of all others, which clipping does not bound.",
                        cure="compute one loss a record from the logits and call engine.backward(losses).",
                    ),
                )
            return v

        if not router.plan.losses and not any(isinstance(v, StandIn) for v in leaves(output)):
            return output
        return tree_map(finish, output)

    # ---- the probe

    def _examine(self, module: nn.Module, args: Any, kwargs: Any, dims: list[int | None], n: int) -> probe.Plan:
        """Run the call aside on all and on all but one of the records; see `dpkit.probe`."""
        m = n - 1 if n > 1 else 2
        plan = probe.Plan(inputs=dims)
        arguments = (args, kwargs)

        def run(what: Any) -> tuple[Any, probe.Recorder]:
            recorder = probe.Recorder()
            tensors = [v for v in leaves(what) if isinstance(v, Tensor)]
            recorder.taint.mark([v for v, d in zip(tensors, dims, strict=True) if d is not None])
            a, kw = what
            self._router, frame = recorder, _Frame(module, outermost=True)
            self.stack.append(frame)
            try:
                self._stand_in(frame, recorder)
                if self._rules[module] is not None:  # the outermost call is a layer itself: its own hook is running
                    recorder.call(module, a, kw)
                    self._pop()
                    self.stack.append(_Frame(module, outermost=True))
                with recorder.taint:
                    out = module.forward(*a, **kw)
                if self._rules[module] is not None:
                    recorder.returned(module, out)
                return out, recorder
            finally:
                self.restore()

        with probe.undisturbed(self.model):
            probe.without_dropout(self.model)
            full, seen_full = run(probe.cut(arguments, dims, n, n))
            part, seen_part = run(probe.cut(arguments, dims, n, m))
            difference = probe.same(full, part, n, m)
            if difference is not None:
                again, _ = run(probe.cut(arguments, dims, n, n))
                if not _differ(full, again):
                    probe.refuse_coupling(self.path(module), difference)
                self.model.eval()  # random by design: judge it without chance
                full, seen_full = run(probe.cut(arguments, dims, n, n))
                part, seen_part = run(probe.cut(arguments, dims, n, m))
                difference = probe.same(full, part, n, m)
                if difference is not None:
                    probe.refuse_coupling(self.path(module), difference)
            if n > 1 and any(isinstance(v, Tensor) and v.ndim == 0 and v.is_floating_point() for v in leaves(full)):
                alone, _ = run(probe.last(arguments, dims, n))
                plan.losses = probe.mixed_losses(full, part, alone, n, m, arguments)
            probe.merge(seen_full, seen_part, plan, n, m)
            if n > 1:
                where = [_where(a, b, n, m) for a, b in zip(leaves(full), leaves(part), strict=False)]
                with torch.enable_grad():
                    self._attribute(module, probe.cut(arguments, dims, n, n), where, plan, n)
        return plan

    def _attribute(self, module: nn.Module, arguments: Any, where: list[int | None], plan: probe.Plan, n: int) -> None:
        """One record's outputs are differentiated: every form must give its gradient to that record, and all of it.

        This is where a wrong attribution shows that sums cannot show (positions taken for records, a batch of one).
        """
        trainable = [p for p in self._names if p.requires_grad]
        args, kwargs = arguments

        def one_record(out: Any) -> Tensor | None:
            terms = []
            for v, d in zip(leaves(out), where, strict=False):
                if isinstance(v, Tensor) and d is not None and v.requires_grad:
                    mine = v.select(d, n - 1)
                    terms.append((mine * torch.linspace(-1.0, 1.3, mine.numel(), device=v.device).view_as(mine).cos()).sum())
            return torch.stack([t.to(terms[0].dtype) for t in terms]).sum() if terms else None

        plain_args, plain_kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, arguments)
        self.stack.append(_Frame(module, outermost=True))
        try:
            loss = one_record(module.forward(*plain_args, **plain_kwargs))
        finally:
            self.restore()
        if loss is None:
            return
        trial = Batch(n)
        router = Live(self, plan, trial, n)
        frame = _Frame(module, outermost=True)
        self._router, self._latest = router, plan
        self.stack.append(frame)
        try:
            self._stand_in(frame, router)
            if self._rules[module] is not None and self._uses_rule(module, args, kwargs, frame, router):
                y = module.forward(*args, **kwargs)
                out = self._tapped(module, frame.site, args, kwargs, y, router) if frame.site is not None else y
            else:
                out = module.forward(*args, **kwargs)
            out = self._finished(router, out)
        finally:
            self.restore()
        try:
            expected = torch.autograd.grad(loss, trainable, allow_unused=True)
            private = one_record(out)
            if private is not None:
                torch.autograd.grad(private, self.anchors(), allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" in str(error):  # reentrant checkpointing allows .backward() only
                return
            raise
        finally:
            trial.closed = True
        with torch.no_grad():
            for p, grad in zip(trainable, expected, strict=True):
                if p in trial.forms:
                    probe.refuse_misattributed(self.name(p), joined(trial.forms[p]), grad, n - 1)


def _where(a: Any, b: Any, n: int, m: int) -> int | None:
    """The record dimension of a floating output, if it has one."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()):
        return None
    d = probe.record_dim(tuple(a.shape), tuple(b.shape), n, m)
    return d if isinstance(d, int) else None


def _differ(one: Any, other: Any) -> bool:
    """Whether two runs on the same input gave different outputs: the model is random by design."""
    pairs = zip(leaves(one), leaves(other), strict=False)
    return any(
        isinstance(a, Tensor) and a.is_floating_point() and not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in pairs
    )
