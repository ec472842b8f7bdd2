"""The tape: the only file that hooks into a model.

It notes, in the backward pass, the per-sample gradient of every trainable parameter, whichever way the parameter was
used. During a private forward, layers with a rule see their parameters detached (so that autograd never computes their
ordinary gradient) and their outputs pass through a `Tap`; parameters used in any other way are replaced by a `StandIn`.
Between forwards everything is the user's own: nothing is wrapped, renamed, or stored on the model.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import checks, probe
from .apart import brings_back, packed_in
from .apiece import Apiece
from .autograd import Anchor, Strangers, listen
from .errors import ConfigurationError, UncoveredParameterError
from .examine import examine, examine_any, look_again
from .inputs import Given
from .live import Live
from .losses import Losses, refuse_mixed
from .methods import Methods
from .moves import Taint
from .outputs import finished, tapped
from .rules import Rule, rule_for, trains
from .sharded import Shards, holds_rows
from .standin import StandIn, forget_cached
from .taps import Batch
from .trees import flag, leaves, signature, tree_map


class _Hook:
    """A module hook that copies and pickles as nothing, so that copies of a private model are ordinary models."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # in a compiled model, too, hooks run as they are
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


@dataclass(eq=False)
class Frame:
    """One module call in progress, and the parameter entries to put back when it ends."""

    module: nn.Module
    restore: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    site: probe.Site | None = None
    outermost: bool = False
    quiet: bool = False
    apiece: Apiece | None = None
    given: Any = None  # the arguments of record 0, where the call was split
    router: Live | probe.Recorder | None = None  # set aside while the module runs as if there were no tape


_tapes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tape]] = weakref.WeakKeyDictionary()


class Tape:
    """Hooks on one model; `open` a batch, let the user run forward and backward, `close` it and take the forms."""

    def __init__(
        self, model: nn.Module, *, batch_first: bool = True, method: str = "model", shards: Shards | None = None
    ) -> None:
        other = _tapes.get(model)
        if other is not None and other() is not None:
            raise ConfigurationError(
                "this model is private already",
                why="two engines would clip the same gradients twice and account for them once each.",
                cure="call detach() on the engine that holds it first.",
            )
        self.model, self.batch_first, self.shards = model, batch_first, shards
        self.batch: Batch | None = None
        self.given: Given | None = None  # the batch as it was handed out, where it is to be compared
        self.paused = False
        self.proven: set[nn.Parameter] = set()
        self.stack: list[Frame] = []
        self.names: dict[nn.Parameter, str] = {}
        self.methods = Methods(method, self.names)
        self._paths: dict[nn.Module, str] = {}
        self.rules: dict[nn.Module, Rule | None] = {}
        self.apiece: set[nn.Module] = set()  # modules that run on one record at a time
        self.owners: list[tuple[nn.Module, str]] = []
        self._remembered = 0  # batches that were, or could have been
        self._owned: list[nn.Parameter] = []  # what each of them owned
        self._plans: dict[Any, probe.Plan] = {}
        self._modules: list[nn.Module] = []
        self._flags: list[tuple[dict[str, Any], str]] = []  # attributes that may choose another function
        self._training: list[bool] = []  # which parameters did in the forward before
        self._attributed: set[nn.Parameter] = set()  # those that did when each of the plans was made
        self.latest: probe.Plan | None = None
        self.router: Live | probe.Recorder | None = None
        self._watching: Taint | None = None
        self._returned: list[StorageWeakRef] = []  # the memory of what forwards in this batch gave
        self._earlier: list[StorageWeakRef] = []  # of batches before, as long as somebody holds it
        self._anchors: dict[torch.device, Anchor] = {}
        self.strangers = Strangers(self.names)
        self.losses = Losses(self)
        self._handles: list[Any] = []
        self._watches: list[Any] = []
        self._watched: list[tuple[str, nn.Module]] = []
        self._attach()
        _tapes[model] = weakref.ref(self)
        listen(self)

    def _attach(self) -> None:
        self._watched = checks.with_problems_in_training(self.model)
        self._modules = list(self.model.modules())
        users = [vars(m) for m in self._modules if not type(m).__module__.startswith("torch.")]
        kinds = (bool, str, int, float)
        self._flags = [(at, name) for at in users for name, v in at.items() if type(v) in kinds and name != "training"]
        for path, module in self.model.named_modules():
            self._paths[module] = path or type(module).__name__
            own = [(name, p) for name, p in module._parameters.items() if p is not None]
            for name, p in own:
                self.names.setdefault(p, f"{path}.{name}" if path else name)
                self.owners.append((module, name))
                self._owned.append(p)
            self.rules[module] = rule_for(module) if own else None
            if next(module.parameters(), None) is not None:
                self._handles += [
                    module.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
                    module.register_forward_hook(_Hook(self._leave), prepend=True, with_kwargs=True, always_call=True),
                ]

    def renew(self) -> None:
        """Look at the model anew, between two batches: it has got other modules (adapters)."""
        for handle in self._handles:
            handle.remove()
        for known in (self._handles, self.names, self._paths, self.rules, self.owners, self._owned, self.apiece):
            known.clear()
        self._plans.clear()
        self.proven.clear()
        self.latest = None
        self.losses.forget()
        self._attach()

    @contextlib.contextmanager
    def watched(self, hook: Callable[..., None]) -> Iterator[None]:
        """Within, ``hook`` is called after each call of a module that owns parameters."""
        owners = dict.fromkeys(module for module, _ in self.owners)
        handles = [module.register_forward_hook(hook, always_call=True) for module in owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- names for errors

    def name(self, parameter: nn.Parameter) -> str:
        known = parameter if self.shards is None else self.shards.origin(parameter)
        return self.names.get(known, self.names.get(parameter, "a parameter outside the model"))

    def path(self, module: nn.Module) -> str:
        return self._paths.get(module, type(module).__name__)

    def rules_of(self, parameter: nn.Parameter) -> list[Rule]:
        """The rules of the layers that own the parameter."""
        owners = [m for m, name in self.owners if m._parameters.get(name) is parameter]
        return [rule for m in owners if (rule := self.rules[m]) is not None]

    def anchor(self, like: Tensor) -> Tensor:
        """A leaf that requires grad, so that layers with integer inputs get a gradient."""
        if like.device not in self._anchors:
            self._anchors[like.device] = Anchor(like.device)
        return self._anchors[like.device].leaf

    def anchors(self) -> list[Tensor]:
        return [anchor.leaf for anchor in self._anchors.values()]

    def parameters(self) -> dict[nn.Parameter, str]:
        """The model's parameters, each once, with their names."""
        return self.names

    @property
    def examined(self) -> bool:
        """Whether a forward was measured, and seen to keep the records apart."""
        return bool(self._plans)

    # ---- batches

    def open(self, n: int, marked: Sequence[nn.Parameter] = (), owners: Tensor | None = None) -> None:
        """From now on, forwards are private: n records are in the user's hands; ``marked``, ``owners``: see `Batch`."""
        self.restore()
        if self.shards is None:
            self._refuse_changed()
        unproven = frozenset(p for p in self.names if p.requires_grad and p not in self.proven)
        if self.shards is not None:  # torch would add up the ranks' ordinary gradients; the examination has compared
            unproven = frozenset()
        for p in self.names if unproven else ():
            if p in unproven and p._post_accumulate_grad_hooks:
                raise ConfigurationError(
                    f"{self.name(p)} has a hook on its accumulated gradient (an optimizer that steps in the backward?)",
                    why="in the first batch it would be given the ordinary gradient, before anything is clipped.",
                    cure="remove the hook; step with the optimizer that was given to make_private.",
                )
        self.methods.begin()
        self.batch = Batch(n, self.methods, unproven=unproven, anchors=self._anchors, marked=marked, shards=self.shards)
        self.batch.strangers, self.batch.owners = self.strangers, owners
        self._watches = [p.register_post_accumulate_grad_hook(_Hook(self._keep)) for p in unproven]

    def _refuse_changed(self) -> None:
        """Raise if a layer's parameter is another one than it was, or none any more."""
        for (module, name), p in zip(self.owners, self._owned, strict=True):
            if module._parameters.get(name) is not p:
                raise UncoveredParameterError(
                    f"{self.names[p]} is another parameter than when the model was made private (replaced, pruned, "
                    "parametrised)",
                    why="how its gradient is computed was settled then; and the optimizer may hold the old one.",
                    cure="change the model before make_private; or engine.detach(), and make_private again with an "
                    "optimizer of the new parameters: what was spent is added up.",
                )

    def remember(self, tree: Any, *, sampled: bool) -> None:
        """Of some batches, ever fewer, keep what was handed out, to compare it with what the model gets."""
        assert self.batch is not None
        self._remembered += 1
        if self._remembered <= 4 or self._remembered & (self._remembered - 1) == 0:
            batch = self.batch
            self.given = Given(tree, batch.n, batch.owners, sampled=sampled, batch_first=self.batch_first)

    def before_backward(self, roots: Sequence[Tensor], grads: Sequence[Tensor | None] | None) -> None:
        """A loss is about to be back-propagated; see `dpkit.losses`."""
        if self.batch is not None and not self.paused and self.shards is None:  # sharded: ranks would part
            self.losses.look(roots, grads)

    def _keep(self, parameter: Tensor) -> None:
        if self.batch is not None and not self.paused:  # what a public pass leaves is the user's
            self.batch.keep(parameter)

    def close(self) -> Batch | None:
        """End the batch and return what its backward passes brought."""
        self.restore()
        batch, self.batch, self.given = self.batch, None, None
        self._earlier = [held for held in (*self._earlier, *self._returned) if not held.expired()]
        self._returned = []
        for watch in self._watches:
            watch.remove()
        self._watches.clear()
        if batch is not None:
            batch.closed = True
        return batch

    @contextlib.contextmanager
    def taking(self, batch: Batch | None) -> Iterator[None]:
        """Within, what is computed again in a backward pass (activation checkpointing) is of this batch, or private to
        none."""
        before, self.batch = self.batch, batch
        try:
            yield
        finally:
            self.batch = before

    def detach(self) -> None:
        """Remove every hook."""
        self.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.strangers.forget()
        _tapes.pop(self.model, None)

    def restore(self) -> None:
        """Put parameters back that an interrupted forward (KeyboardInterrupt) left replaced."""
        while self.stack:
            self.pop()
        if self.router is not None:
            forget_cached()
        self.router = None
        self._unwatch()

    def _unwatch(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.__exit__(None, None, None)

    def push(self, module: nn.Module) -> Frame:
        """Begin a call; the parameter entries that it changes are put back by `pop`."""
        frame = Frame(module, outermost=not self.stack)
        self.stack.append(frame)
        return frame

    def pop(self) -> Frame:
        frame = self.stack.pop()
        for parameters, name, value in reversed(frame.restore):
            parameters[name] = value
        return frame

    # ---- hooks

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.stack and module is self.stack[0].module and not isinstance(self.router, probe.Recorder):
            self.restore()  # the outermost module is entered again: its last call was interrupted
        if not self.stack:
            self._begin(module, args, kwargs)
        return self.enter(self.push(module), args, kwargs)

    def enter(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        """Prepare a call; returns its arguments where they have to be others."""
        module, router = frame.module, self.router
        if router is None:
            return None
        packed = packed_in(module, args, kwargs)
        router.order = None if packed is None else packed.unsorted_indices
        if frame.outermost or (self.shards is not None and module in self.shards):
            self.stand_in(frame, router)
        if isinstance(router, probe.Recorder):
            router.visit(module, args, kwargs)
            if isinstance(module, nn.EmbeddingBag):
                given = [*args, *kwargs.values()]
                checks.refuse_loose_bags(self.path(module), given[0], given[1:], router.taint.has)
        if isinstance(module, nn.RNNBase) and isinstance(router, Live):
            router.in_order(module, (args, kwargs))
        if module in self.apiece:
            return self._part(frame, args, kwargs, router)
        if packed is not None and brings_back(module):
            if isinstance(router, probe.Recorder):
                router.taint.used(packed)
            frame.quiet = True
            router.quiet += 1
        if self.rules[module] is not None and self.uses_rule(module, args, kwargs, frame, router):
            router.quiet += not frame.quiet
            frame.quiet = True
            own = module._parameters
            seen_by_autograd = self.batch.unproven if isinstance(router, Live) and self.batch else frozenset()
            for name, p in own.items():
                real = p.origin if isinstance(p, StandIn) else p
                if real is not None and (real.requires_grad or p is not real):
                    frame.restore.append((own, name, p))
                    own[name] = real if real in seen_by_autograd else real.detach()  # type: ignore[assignment]
        return None

    def _part(self, frame: Frame, args: Any, kwargs: Any, router: Live | probe.Recorder) -> Any:
        """Split the call of a module that runs on one record at a time; while probing, run it as it is."""
        module, arguments = frame.module, (args, kwargs)
        frame.router, self.router = router, None  # whatever happens inside is no concern of the tape's
        router.quiet += not frame.quiet
        frame.quiet = True
        if isinstance(router, probe.Recorder):
            router.call(module, args, kwargs)
        elif torch.is_grad_enabled():
            router.culprit = module
            router.in_order(module, arguments)
            site = router.site(module, router.count(module), leaves(arguments))
            if site.folded is not None:
                probe.refuse_folded(self.path(module), f"a call of {type(module).__name__}", site.folded)
            if not site.data:
                raise UncoveredParameterError(
                    f"{self.path(module)} runs on one record at a time, and was called on something else than records",
                    why="its parameters would be credited to no record.",
                    cure="call it on the batch only, or register a rule for it (dpkit.register_rule).",
                )
            frame.apiece = apiece = Apiece(module, self.path(module), router, site, arguments)
            frame.restore += apiece.entries()
            frame.given = apiece.put(0)
            return frame.given
        for m in module.modules():
            for name, p in m._parameters.items():
                if isinstance(p, StandIn):
                    frame.restore.append((m._parameters, name, p))
                    m._parameters[name] = p.origin.detach()
        return tree_map(lambda v: v.value if isinstance(v, StandIn) else v, arguments)

    def _joined(self, frame: Frame, args: Any, kwargs: Any, output: Any) -> Any:
        """The output for all records, given that of record 0, for which the module's own call was used."""
        apiece = frame.apiece
        assert apiece is not None
        if any(a is not b for a, b in zip(leaves((args, kwargs)), leaves(frame.given), strict=True)):
            raise UncoveredParameterError(
                f"{apiece.path} runs on one record at a time, and a forward pre-hook changes its arguments after that",
                why="the hook would see the first record only.",
                cure="register the hook before make_private.",
            )
        outputs = [output]
        for i in range(1, apiece.n):
            a, kw = apiece.put(i)
            outputs.append(frame.module.forward(*a, **kw))
        return apiece.join(outputs)

    def uses_rule(self, module: nn.Module, args: Any, kwargs: Any, frame: Frame, router: Any) -> bool:
        """Whether this call goes by the module's rule."""
        if isinstance(router, probe.Recorder):
            return router.call(module, args, kwargs)
        k = router.count(module)
        if not any(trains(p) for p in self.own(module).values()):
            return False
        router.culprit = module
        router.in_order(module, (args, kwargs))
        values = leaves((args, kwargs))
        site = router.site(module, k, values)
        if not site.data or any(isinstance(v, StandIn) for v in values):
            return False
        frame.site = site
        return True

    @staticmethod
    def own(module: nn.Module) -> dict[str, nn.Parameter | None]:
        return {k: p.origin if isinstance(p, StandIn) else p for k, p in module._parameters.items()}

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.stack or self.stack[-1].module is not module:
            return None
        frame = self.stack[-1]
        try:
            output = self.leave(frame, args, kwargs, output)
        finally:
            while frame in self.stack:
                self.pop()
            router = self.router
            if frame.outermost:
                if router is not None:
                    forget_cached()
                self.router = None
                self._unwatch()
        if frame.outermost and isinstance(router, Live) and output is not None:
            with self._whole(bool(router.assumed)):
                if router.assumed:
                    measured = examine(self, module, args, kwargs, router.plan.inputs, router.n)
                    router.verify(measured)
                    probe.extend(router.plan, measured)
                    self.latest = router.plan
            output = finished(self, router, output)
            self._returned += [  # what requires no gradient may be an argument that is passed on, the same each time
                StorageWeakRef(v.untyped_storage()) for v in leaves(output) if isinstance(v, Tensor) and v.requires_grad
            ]
        return output

    def leave(self, frame: Frame, args: Any, kwargs: Any, output: Any) -> Any:
        """Take a call's output in; returns what it has to be from here on. The frame is off the stack then."""
        module = frame.module
        if frame.apiece is not None and output is not None:
            output = self._joined(frame, args, kwargs, output)
        self.pop()
        if frame.router is not None:
            self.router = frame.router
        router = self.router
        if router is not None and frame.quiet:
            router.quiet -= 1
        if router is None or output is None:
            return output
        if isinstance(router, probe.Recorder):
            router.visited(module, output)
            if self.rules[module] is not None or module in self.apiece:
                router.returned(module, output)
        elif frame.site is not None and torch.is_grad_enabled():
            output = tapped(self, module, frame.site, args, kwargs, output, router)
        return output

    # ---- the outermost call

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Decide what the call that starts now is: private, or left alone."""
        self.router = None
        batch = self.batch
        if batch is None or self.paused or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing runs a part again, in the backward
            if self.latest is not None:
                self.router = Live(self, self.latest, batch, batch.n, again=True)
            return
        checks.refuse_problems(self._watched)
        checks.refuse_inside_wrapper(self.path(module))
        key = (module, self._modes(), signature(args, kwargs))
        plan = self._plans.get(key)
        tensors = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
        if self._earlier:
            checks.refuse_returned(self.path(module), tensors, {held.cdata for held in self._earlier})
        with self._whole(plan is None):
            if plan is None:
                checks.refuse_packed(self.path(module), (*args, *kwargs.values()))
                dims = self._find_records(tensors, batch.n)
                if not any(d is not None for d in dims):
                    sizes = sorted({tuple(t.shape)[:1] for t in tensors})
                    batch.passive = (
                        f"{self.path(module)} was called on tensors of leading sizes {[s[0] for s in sizes if s]}"
                        if tensors
                        else f"{self.path(module)} was called on no tensor that is an argument, or in a tuple, list, "
                        "dict or dataclass that is one"
                    )
                    return
                checks.refuse_bypassed(self._paths)
                for t, d in zip(tensors, dims, strict=True):
                    if d is not None and t.grad_fn is not None and self.shards is None:
                        refuse_mixed(batch, t, d)
                plan = examine_any(self, module, args, kwargs, dims, batch.n)
                if batch.n > 2 or plan.gives_records:  # one record, which others are left with, says little
                    self._plans[key] = plan
                    self._attributed &= {p for p in self.names if p.requires_grad}
        rows = {t.shape[d] for t, d in zip(tensors, plan.inputs, strict=True) if d is not None}
        if len(rows) != 1:
            batch.passive = (
                f"{self.path(module)} was called on tensors with different numbers of records {sorted(rows)}"
            )
            return
        if self.given is not None:
            self.given.refuse_mixed(self.path(module), list(zip(tensors, plan.inputs, strict=True)))
        if plan.scalars and batch.n > 1 and self.shards is None:
            plan.used += 1
            if plan.used & (plan.used - 1) == 0 and plan.used > 1:
                look_again(self, module, args, kwargs, plan, batch.n)
        self.latest = plan
        forget_cached()
        self.router = Live(self, plan, batch, rows.pop())
        self._watching = self.router.watch((args, kwargs))
        if self._watching is not None:
            self._watching.__enter__()

    def _modes(self) -> tuple[Any, ...]:
        """The modules' train flags, and flags of their own (of a number: whether it is zero): with others the model is
        another function, and is examined anew. So it is where a parameter trains now of which no record's share has
        been shown."""
        training = [p.requires_grad for p in self.names]
        if training != self._training:
            self._training, now = training, {p for p in self.names if p.requires_grad}
            if not now <= self._attributed:
                self._attributed = now
                self._plans.clear()
        return (*[m.training for m in self._modules], *[flag(at.get(name), among=0) for at, name in self._flags])

    @contextlib.contextmanager
    def _whole(self, needed: bool) -> Iterator[None]:
        """For an examination: sharded parameters as they are gathered, under their names."""
        if self.shards is None:
            yield
            return
        names = self.names
        with self.shards.whole(needed) as now:
            if now:
                self.names = {now.get(p, p): name for p, name in names.items()}
            try:
                yield
            finally:
                self.names = names
        self.shards.refuse_repeated(self.apiece)

    def _find_records(self, tensors: list[Tensor], n: int) -> list[int | None]:
        first = 0 if self.batch_first else 1
        dims: list[int | None] = []
        for t in tensors:
            lead = [d for d in (first, 0) if d < t.ndim and t.shape[d] == n]
            dims.append(lead[0] if lead else None)
        return dims

    def stand_in(self, frame: Frame, router: Live | probe.Recorder) -> None:
        """Replace the parameters that are used without a rule (all of them, while probing)."""
        made: dict[nn.Parameter, StandIn] = {}
        bare = None if isinstance(router, probe.Recorder) else router.plan.bare
        inside = None if frame.outermost else set(frame.module.modules())
        for module, name in self.owners:
            p = module._parameters.get(name)
            if inside is not None and (module not in inside or isinstance(p, StandIn)):
                continue
            if self.shards is not None and holds_rows(p):
                continue  # a group of layers whose turn has not come
            if p is None or (bare is not None and (p not in bare or not p.requires_grad)):
                continue
            if p not in made:
                made[p] = StandIn.of(p, p, router, root=True)
            frame.restore.append((module._parameters, name, p))
            module._parameters[name] = made[p]  # type: ignore[assignment]
