"""The tape: the only file that hooks into a model.

It notes, in the backward pass, the per-sample gradient of every trainable parameter, whichever way the parameter was
used. During a private forward, layers with a rule see their parameters detached (so that autograd never computes their
ordinary gradient) and their outputs pass through a `Tap`; parameters used in any other way are replaced by a `StandIn`.
Between forwards everything is the user's own: nothing is wrapped, renamed, or stored on the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, probe
from .apart import order_of
from .buffers import Buffers, differing, refuse_written
from .errors import ConfigurationError, CoupledRecordsError, PrivacyError, UncoveredParameterError
from .forms import joined
from .live import Live
from .records import Records, place
from .rules import Rule, rule_for, trains
from .standin import StandIn
from .taps import Batch, Pairs, Refusal, Tap
from .trees import leaves, signature, tree_map


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
        self._watches: list[Any] = []
        self._watched = checks.with_problems_in_training(model)
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

    def open(self, n: int, marked: Sequence[nn.Parameter] = ()) -> None:
        """From now on, forwards are private: n records are in the user's hands; ``marked``: see `Batch`."""
        self.restore()
        unproven = frozenset(p for p in self._names if p.requires_grad and p not in self.proven)
        self.batch = Batch(n, unproven=unproven, anchors=self._anchors, marked=marked)
        self._watches = [p.register_post_accumulate_grad_hook(_Hook(self._keep)) for p in unproven]

    def _keep(self, parameter: Tensor) -> None:
        if self.batch is not None and not self.paused:  # what a public pass leaves is the user's
            self.batch.keep(parameter)

    def close(self) -> Batch | None:
        """End the batch and return what its backward passes brought."""
        self.restore()
        batch, self.batch = self.batch, None
        for watch in self._watches:
            watch.remove()
        self._watches.clear()
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
        router.order = order_of(module, args, kwargs)
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
        site = router.site(module, k, leaves((args, kwargs)))
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
            if router.assumed:
                measured = self._examine(module, args, kwargs, router.plan.inputs, router.n)
                router.verify(measured)
                probe.extend(router.plan, measured)
            output = self._finished(router, output)
        return output

    def _tapped(self, module: nn.Module, site: probe.Site, args: Any, kwargs: Any, y: Any, router: Live) -> Any:
        rule = self._rules[module]
        assert rule is not None
        if site.folded is not None:
            probe.refuse_folded(self.path(module), f"a call of {type(module).__name__}", site.folded)
        k, x = next((k, v) for k, v in enumerate(leaves((args, kwargs))) if isinstance(v, Tensor))
        there = site.arguments[k], site.outputs[0]
        if not all(isinstance(r, Records) for r in there):
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
        return Tap.apply(y, kept, self.anchor(y), lambda a, g: function(module, a, g), router.batch, *there)

    # ---- the outermost call

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Decide what the call that starts now is: private, or left alone."""
        self._router = None
        batch = self.batch
        if batch is None or self.paused or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing runs a part again, in the backward
            if self._latest is not None:
                self._router = Live(self, self._latest, batch, batch.n, again=True)
            return
        checks.refuse_problems(self._watched)
        key = (module, signature((args, kwargs)))
        plan = self._plans.get(key)
        tensors = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
        if plan is None:
            dims = self._find_records(tensors, batch.n)
            if not any(d is not None for d in dims):
                sizes = sorted({tuple(t.shape)[:1] for t in tensors})
                batch.passive = (
                    f"{self.path(module)} was called on tensors of leading sizes {[s[0] for s in sizes if s]}"
                )
                return
            plan = self._examine_any(module, args, kwargs, dims, batch.n)
            if batch.n > 1:
                self._plans[key] = plan
        rows = {t.shape[d] for t, d in zip(tensors, plan.inputs, strict=True) if d is not None}
        if len(rows) != 1:
            batch.passive = (
                f"{self.path(module)} was called on tensors with different numbers of records {sorted(rows)}"
            )
            return
        self._latest = plan
        self._router = Live(self, plan, batch, rows.pop())

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
            if isinstance(v, StandIn) and v.records is not None and v.copies is not None:
                return v.records.join(v.copies)
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
            if k in router.plan.crossed and isinstance(v, Tensor) and v.requires_grad:
                return Pairs.apply(v, router.plan.crossed[k], self.path(self.model))
            return v

        if (
            not router.plan.losses
            and not router.plan.crossed
            and not any(isinstance(v, StandIn) for v in leaves(output))
        ):
            return output
        return tree_map(finish, output)

    # ---- the probe

    def _examine_any(self, module: nn.Module, args: Any, kwargs: Any, dims: list[int | None], n: int) -> probe.Plan:
        """Examine; where the model cannot run on fewer records, one argument may only happen to be as long as the batch
        (positions [t] or a mask [t, t] with t = n). Then each is tried as carrying no records.

        A refusal is final: only a crash is followed by another try, and a try counts only if outputs carry records.
        """
        try:
            return self._examine(module, args, kwargs, dims, n)
        except PrivacyError:
            raise
        except Exception:
            matching = [k for k, d in enumerate(dims) if d is not None]
            for k in reversed(matching if len(matching) > 1 else []):
                others = [None if j == k else d for j, d in enumerate(dims)]
                try:
                    plan = self._examine(module, args, kwargs, others, n)
                except Exception:  # the first crash is the one to tell
                    continue
                if plan.gives_records:
                    return plan
            raise

    def _examine(self, module: nn.Module, args: Any, kwargs: Any, dims: list[int | None], n: int) -> probe.Plan:
        """Run the call aside on all and on all but one of the records; see `dpkit.probe`."""
        m = n - 1 if n > 1 else 2
        plan = probe.Plan(inputs=dims)
        arguments = (args, kwargs)

        def run(what: Any, rows: int) -> tuple[Any, probe.Recorder]:
            buffers.put_back()
            recorder = probe.Recorder(rows)
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

        with probe.undisturbed(self.model) as buffers:
            probe.without_dropout(self.model)
            full, seen_full = run(probe.cut(arguments, dims, n, n), n)
            written, held = buffers.reached(seen_full.taint), buffers.released()
            part, seen_part = run(probe.cut(arguments, dims, n, m), m)
            changed = differing(held, buffers.released()) - written
            if changed:
                run(probe.cut(arguments, dims, n, n), n)
                written |= changed - differing(held, buffers.released())  # the rest changes by chance
            refuse_written(written)
            difference = probe.same(full, part, n, m)
            if difference is not None:
                again, _ = run(probe.cut(arguments, dims, n, n), n)
                if not _differ(full, again):
                    probe.refuse_coupling(self.path(module), difference)
                self.model.eval()  # random by design: judge it without chance
                full, seen_full = run(probe.cut(arguments, dims, n, n), n)
                part, seen_part = run(probe.cut(arguments, dims, n, m), m)
                difference = probe.same(full, part, n, m)
                if difference is not None:
                    probe.refuse_coupling(self.path(module), difference)
            if n > 1 and any(isinstance(v, Tensor) and v.ndim == 0 and v.is_floating_point() for v in leaves(full)):
                alone, _ = run(probe.last(arguments, dims, n), 1)
                plan.losses = probe.mixed_losses(full, part, alone, n, m, arguments)
            plan.crossed = probe.crossed(full, part)
            probe.merge(seen_full, seen_part, plan)
            if n > 1:
                where = [_where(a, b, n, m) for a, b in zip(leaves(full), leaves(part), strict=False)]
                plan.gives_records = any(r is not None for r in where)
                with torch.enable_grad():
                    self._attribute(module, probe.cut(arguments, dims, n, n), where, plan, n, buffers)
        return plan

    def _attribute(
        self,
        module: nn.Module,
        arguments: Any,
        where: list[Records | None],
        plan: probe.Plan,
        n: int,
        buffers: Buffers,
    ) -> None:
        """One record's outputs are differentiated: every form must give its gradient to that record, and all of it.

        This is where a wrong attribution shows that sums cannot show (positions taken for records, a batch of one).
        """
        trainable = [p for p in self._names if p.requires_grad]
        args, kwargs = arguments

        def one_record(out: Any) -> Tensor | None:
            terms = []
            for v, r in zip(leaves(out), where, strict=False):
                if isinstance(v, Tensor) and r is not None and v.requires_grad:
                    mine = r.split(v)[n - 1]
                    terms.append(
                        (mine * torch.linspace(-1.0, 1.3, mine.numel(), device=v.device).view_as(mine).cos()).sum()
                    )
            return torch.stack([t.to(terms[0].dtype) for t in terms]).sum() if terms else None

        plain_args, plain_kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, arguments)
        buffers.put_back()
        self.stack.append(_Frame(module, outermost=True))
        try:
            loss = one_record(module.forward(*plain_args, **plain_kwargs))
        finally:
            self.restore()
        if loss is None:
            return
        buffers.put_back()
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
            largest = max((float(g.to_dense().norm()) for g in expected if g is not None), default=0.0)
            tolerance = trial.tolerance
            for p, grad in zip(trainable, expected, strict=True):
                if p in trial.forms:
                    form = joined(trial.forms[p])
                    probe.refuse_misattributed(self.name(p), form, grad, n - 1, 1e-3 * largest, tolerance)
                elif grad is not None and float(grad.to_dense().norm()) > tolerance * largest:
                    raise UncoveredParameterError(
                        f"{self.name(p)} {list(p.shape)} has a gradient in ordinary training and none in a private one",
                        why="it is used by an operation that the engine cannot follow, such as an autograd.Function.",
                        cure="freeze it, or register a rule for the module that uses it (dpkit.register_rule).",
                    )


def _where(a: Any, b: Any, n: int, m: int) -> Records | None:
    """Where a floating output has its records."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()):
        return None
    where = place(tuple(a.shape), tuple(b.shape), n, m)
    return where if isinstance(where, Records) else None


def _differ(one: Any, other: Any) -> bool:
    """Whether two runs on the same input gave different outputs: the model is random by design."""
    pairs = zip(leaves(one), leaves(other), strict=False)
    return any(
        isinstance(a, Tensor)
        and a.is_floating_point()
        and not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in pairs
    )
