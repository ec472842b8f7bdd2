"""The examination of a model before its first private forward of a kind: probe it, and attribute one record's gradient.

Where the records cannot be followed through a module, the smallest module around it that can be run on one record at a
time is (`dpkit.apiece`), and the model is examined again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from . import probe, randomness
from .buffers import Buffers, differing, refuse_remembered, refuse_written
from .errors import CoupledRecordsError, PrivacyError, UncoveredParameterError
from .joined import joined
from .live import Live
from .methods import Kept
from .outputs import finished
from .records import Records, place
from .standin import forget_cached
from .taps import Batch
from .trees import holders, leaves, tree_map, within

if TYPE_CHECKING:
    from .tape import Tape

log = logging.getLogger("dpkit")


class _Lost(Exception):
    """The records could not be followed: the refusal, and the layer or parameter where."""

    def __init__(self, refusal: PrivacyError, where: nn.Module | nn.Parameter | None) -> None:
        super().__init__(str(refusal))
        self.refusal, self.where = refusal, where


def examine_any(tape: Tape, module: nn.Module, args: Any, kwargs: Any, dims: list[int | None], n: int) -> probe.Plan:
    """Examine; where the model cannot run on fewer records, one argument may only happen to be as long as the batch
    (positions [t] or a mask [t, t] with t = n), or hold them in another dimension. Then the others are tried.

    A refusal is final: only a crash is followed by another try, and a try counts only if outputs carry records.
    """
    try:
        return examine(tape, module, args, kwargs, dims, n)
    except PrivacyError:
        raise
    except Exception as crash:
        for others in _other_places(args, kwargs, dims, n):
            try:
                plan = examine(tape, module, args, kwargs, others, n)
            except Exception:  # the first crash is the one to tell
                continue
            if plan.gives_records:
                return plan
        _refuse_lists(tape.path(module), args, kwargs, n, crash)
        raise


def _other_places(args: Any, kwargs: Any, dims: list[int | None], n: int) -> Iterator[list[int | None]]:
    """Where else the records may be: in the second dimension of some arguments (states of recurrent layers, [layers, n,
    h]), or not in one that happens to be as long as the batch."""
    tensors = [v for v in leaves((args, kwargs)) if isinstance(v, Tensor)]
    second = [k for k, v in enumerate(tensors) if dims[k] != 1 and v.ndim > 1 and v.shape[1] == n]
    for moved in ([k for k in second if dims[k] is None], second):
        if moved:
            yield [1 if k in moved and tensors[k].ndim > 2 else d for k, d in enumerate(dims)]
    matching = [k for k, d in enumerate(dims) if d is not None]
    for k in reversed(matching if len(matching) > 1 else []):
        yield [None if j == k else d for j, d in enumerate(dims)]


def _refuse_lists(path: str, args: Any, kwargs: Any, n: int, crash: Exception) -> None:
    """Raise where the crash is likely to come from a list with a value for each record: it was as long as before."""
    for v in (*args, *kwargs.values()):
        if isinstance(v, list | tuple) and len(v) == n and all(isinstance(x, int | float | str) for x in v):
            raise UncoveredParameterError(
                f"{path} is called on a {type(v).__name__} of {n} values, as many as there are records, and fails when "
                f"a record is left out ({crash})",
                why="which record a value belongs to is measured by leaving records out, of tensors.",
                cure="pass them as a tensor [n], and make the list inside: lengths.tolist().",
            ) from crash


def examine(tape: Tape, module: nn.Module, args: Any, kwargs: Any, dims: list[int | None], n: int) -> probe.Plan:
    """Measure; where records are lost in a module, have a module around it run on one record at a time."""
    before, first, able = set(tape.apiece), None, None
    while True:
        try:
            return _measure(tape, module, args, kwargs, dims, n)
        except _Lost as lost:
            if first is None and n > 1:  # left alone, the others may go another way: without padding, masks are dropped
                first = lost.refusal
                others, named = probe.turned((args, kwargs), dims)
                try:
                    return _measure(tape, module, others, named, dims, n)
                except _Lost:
                    pass
            first = first or lost.refusal
            if able is None:
                able = _splittable(tape, module, args, kwargs, dims, n)
            more = _around(tape, module, lost.where, able) - tape.apiece
            if not more:
                tape.apiece = before
                raise first from None
            tape.apiece |= more
            paths = sorted(tape.path(m) for m in more)
            log.warning(
                "%s%s: run on one record at a time, which is exact but slow; a rule (register_rule) is faster. (%s)",
                ", ".join(paths[:3]),
                f" and {len(paths) - 3} more" if len(paths) > 3 else "",
                lost.refusal.seen,
            )


def _around(
    tape: Tape, root: nn.Module, where: nn.Module | nn.Parameter | None, able: set[nn.Module]
) -> set[nn.Module]:
    """The smallest module around ``where`` that can run on one record at a time, with all others of its class.

    A module that already runs so is passed over: what was lost is lost around it.
    """
    owners = (
        {m for m, name in tape.owners if m._parameters.get(name) is where}
        if isinstance(where, nn.Parameter)
        else {where}
    )
    path = {m for m in root.modules() if any(o in set(m.modules()) for o in owners)}
    candidates = [m for m in path if m in able and m not in tape.apiece and all(o in set(m.modules()) for o in owners)]
    if not candidates:
        return set()
    smallest = min(candidates, key=lambda m: sum(1 for _ in m.modules()))
    if type(smallest).__module__.startswith("torch."):  # a container says nothing of its like
        return {smallest}
    return {m for m in able if type(m) is type(smallest) and (m is smallest or m not in path)}


class _Run:
    """One call aside of the model, on arguments of the probe's choosing."""

    def __init__(self, tape: Tape, module: nn.Module, dims: list[int | None], buffers: Buffers) -> None:
        self.tape, self.module, self.dims, self.buffers = tape, module, dims, buffers
        self.keys: list[str] = []  # names of the latest outputs, where they have some
        self.holds = False  # whether some are in objects of other kinds than containers

    def recorded(self, what: Any, rows: int, *, watch: bool = False) -> tuple[list[Any], probe.Recorder]:
        recorder = probe.Recorder(rows, lambda: self.tape.stack[-1].module, watch=watch)
        tensors = [v for v in leaves(what) if isinstance(v, Tensor)]
        recorder.taint.mark([v for v, d in zip(tensors, self.dims, strict=True) if d is not None])
        out = self.routed(recorder, what)
        self.keys = _keys(out)
        self.holds = bool(holders(out))
        return within(out), recorder

    def routed(self, router: probe.Recorder | Live, what: Any) -> Any:
        tape = self.tape
        self.buffers.put_back()
        forget_cached()
        tape.router = router
        try:
            frame = tape.push(self.module)
            what = tape.enter(frame, *what) or what
            args, kwargs = what
            watch = router.taint if isinstance(router, probe.Recorder) else router.watch(what)
            with watch or contextlib.nullcontext():
                out = self.module.forward(*args, **kwargs)
            return tape.leave(frame, args, kwargs, out)
        finally:
            tape.restore()

    def plain(self, what: Any, *, but: Collection[str] = ()) -> Any:
        """With the buffers as they were, but these: as the run before has left them."""
        args, kwargs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, what)
        self.buffers.put_back(but=but)
        forget_cached()
        self.tape.push(self.module)
        try:
            return self.module.forward(*args, **kwargs)
        finally:
            self.tape.restore()


def _splittable(
    tape: Tape, module: nn.Module, args: Any, kwargs: Any, dims: list[int | None], n: int
) -> set[nn.Module]:
    """The modules through whose calls the records can be followed from outside."""
    m, kept = n - 1 if n > 1 else 2, tape.apiece
    tape.apiece = set()
    try:
        with probe.undisturbed(tape.model) as buffers, probe.opened(tape.model):
            run = _Run(tape, module, dims, buffers)
            probe.without_dropout(tape.model)
            _, full = run.recorded(probe.cut((args, kwargs), dims, n, n), n, watch=True)
            _, part = run.recorded(probe.cut((args, kwargs), dims, n, m), m, watch=True)
    finally:
        tape.apiece = kept
    return probe.splittable(full, part)


def _measure(tape: Tape, module: nn.Module, args: Any, kwargs: Any, dims: list[int | None], n: int) -> probe.Plan:
    """Run the call aside on all and on all but one of the records; see `dpkit.probe`."""
    m = n - 1 if n > 1 else 2
    plan, arguments = probe.Plan(inputs=dims), (args, kwargs)
    with probe.undisturbed(tape.model) as buffers, probe.opened(tape.model):
        run = _Run(tape, module, dims, buffers)
        probe.without_dropout(tape.model)
        chance = randomness.capture()
        full, seen_full = run.recorded(probe.cut(arguments, dims, n, n), n)
        own_chance = buffers.drawn  # which is put back before each run, so that no other run tells
        by_chance = own_chance or randomness.drawn_since(chance)
        written, held = buffers.reached(seen_full.taint), buffers.released()
        remembered, others = buffers.reached(seen_full.taint, released=False), buffers.others()
        part, seen_part = run.recorded(probe.cut(arguments, dims, n, m), m)
        changed = differing(held, buffers.released()) - written
        noted = differing(others, buffers.others()) - remembered  # numbers that were taken out of tensors
        if changed or noted:
            run.recorded(probe.cut(arguments, dims, n, n), n)
            written |= changed - differing(held, buffers.released())  # the rest changes by chance
            remembered |= noted - differing(others, buffers.others())
        refuse_written(written)
        if remembered:
            _refuse_remembered(run, probe.cut(arguments, dims, n, n), remembered)
        difference = probe.same(full, part, n, m)
        if difference is not None and not own_chance:
            again = (run.recorded(probe.cut(arguments, dims, n, n), n)[0] for _ in range(32))
            parts = (run.recorded(probe.cut(arguments, dims, n, m), m)[0] for _ in range(4))  # slim chances pass by
            if not by_chance or not (
                any(_differ(full, other) for other in again) or any(not probe.same(full, p, n, m) for p in parts)
            ):
                probe.refuse_coupling(tape.path(module), difference)
        chance_stays, added, in_train_mode = False, None, probe.Plan(inputs=dims)
        if by_chance:
            if seen_full.same_way(seen_part):
                probe.merge(seen_full, seen_part, in_train_mode)
            if n > 1 and any(isinstance(v, Tensor) and v.numel() == 1 for v in full):
                added = _added_up(run, probe.cut(arguments, dims, n, n), n)
            apart = n == 1 or _apart_by_chance(tape, run, probe.cut(arguments, dims, n, n), full, part, n)
            tape.model.eval()  # random by design: judge it without chance
            chance = randomness.capture()
            full, seen_full = run.recorded(probe.cut(arguments, dims, n, n), n)
            chance_stays = randomness.drawn_since(chance) or buffers.drawn
            part, seen_part = run.recorded(probe.cut(arguments, dims, n, m), m)
            difference = probe.same(full, part, n, m)
            if chance_stays and not apart:
                probe.refuse_draws(tape.path(module), difference or "no output stays the same")
            if difference is not None and not chance_stays:
                probe.refuse_coupling(tape.path(module), difference)
        _refuse_unseen(tape.path(module), full)
        if n > 1:
            alone = _alone(run, arguments, dims, n, full)
            difference = None if alone is None or chance_stays else probe.same_alone(full, part, alone, n)
            if difference is not None:
                probe.refuse_coupling(tape.path(module), difference)
            if alone is not None:
                labels = kwargs.get("labels")
                plan.losses = probe.mixed_losses(full, part, alone, n, run.keys, labels, added, chance_stays)
                plan.scalars = any(isinstance(v, Tensor) and v.numel() == 1 and v.is_floating_point() for v in full)
            plan.by_chance, plan.reduced = by_chance, probe.reduced(full, part, n, seen_full.taint.has)
        plan.crossed, plan.holds = probe.crossed(full, part), run.holds
        probe.merge(seen_full, seen_part, plan)
        if plan.lost is not None:
            try:
                probe.refuse_scattered(tape.path(plan.lost))
            except PrivacyError as refusal:
                raise _Lost(refusal, plan.lost) from refusal
        plan.calls = in_train_mode.calls | plan.calls  # of what is in train mode alone, what was seen there
        plan.ops = in_train_mode.ops | plan.ops
        plan.bare |= in_train_mode.bare
        where = [_where(a, b, n, m) for a, b in zip(full, part, strict=False)]
        plan.gives_records = n > 1 and any(r is not None for r in where)
        with torch.enable_grad():
            _attribute(tape, run, probe.cut(arguments, dims, n, n), where, plan, n, repeats=not chance_stays)
    return plan


def _apart_by_chance(tape: Tape, run: _Run, arguments: Any, full: Any, part: Any, n: int) -> bool:
    """Raise where chance decides whose record meets whose (mixup), or hides that they meet.

    With the same draws, and another record in the place of one, the outputs of the rest stay what they were. Returns
    whether that could be told: not where the data say how much is drawn (rejection sampling).
    """
    where = [_where(a, b, n, n - 1) for a, b in zip(full, part, strict=False)]
    for k in range(_DRAWS):
        gone, other = (n - 1, 0) if k % 2 else (0, n - 1)
        runs = _with_the_same_draws(run, arguments, {}, {gone: other})
        if runs is None:
            return False
        difference = probe.same_but(runs[0], runs[1], where, gone)
        if difference is not None:
            probe.refuse_coupling(tape.path(run.module), difference, "another one was replaced")
    return True


def _added_up(run: _Run, arguments: Any, n: int) -> list[bool] | None:
    """Whether each output is a sum over the records: those at even places, replaced, change it by as much, whatever
    stands at the odd ones. None where that cannot be told."""
    even, odd = {k: (k + 1) % n for k in range(0, n, 2)}, {k: k - 1 for k in range(1, n, 2)}
    added: list[bool] = []
    for _ in range(_DRAWS):
        runs = _with_the_same_draws(run, arguments, {}, even, odd, {**even, **odd})
        if runs is None:
            return None
        found = [
            isinstance(a, Tensor) and a.shape == d.shape and not probe.gap((a + d).flatten(), (b + c).flatten())
            for a, b, c, d in zip(*runs, strict=False)
        ]
        added = [one and other for one, other in zip(added or found, found, strict=False)]
    return added


def look_again(tape: Tape, module: nn.Module, args: Any, kwargs: Any, plan: probe.Plan, n: int) -> None:
    """Whether losses that the model computes are means or sums over the records of this batch, too: what they are
    divided by (class weights) may be the same for all records of one batch, and not of another."""
    with probe.undisturbed(tape.model) as buffers:
        run, arguments, dims = _Run(tape, module, plan.inputs, buffers), (args, kwargs), plan.inputs
        probe.without_dropout(tape.model)
        whole = probe.cut(arguments, dims, n, n)
        added = _added_up(run, whole, n) if plan.by_chance else None
        out = run.plain(whole)
        part, alone = run.plain(probe.cut(arguments, dims, n, n - 1)), run.plain(probe.alone(arguments, dims, n - 1))
        full = within(out), within(part), within(alone)
        plan.losses |= probe.mixed_losses(*full, n, _keys(out), kwargs.get("labels"), added, plan.by_chance)


def _with_the_same_draws(run: _Run, arguments: Any, *others: Mapping[int, int]) -> list[list[Any]] | None:
    """The outputs with each of these replacements; None where not as much was drawn for all."""
    chance, drawn = randomness.capture(), None
    found: list[list[Any]] = []
    own: list[Any] = []
    for replacements in others:
        randomness.restore(chance)
        found.append(within(run.plain(probe.replaced(arguments, run.dims, replacements))))
        if drawn is not None and (randomness.drawn_since(drawn) or run.buffers.generators_moved(own)):
            return None
        drawn, own = drawn or randomness.capture(), own or run.buffers.generators()
    return found


_DRAWS = 6


def _refuse_remembered(run: _Run, arguments: Any, buffers: set[str]) -> None:
    """Raise if outputs follow from what the batch before has left in buffers that are not saved, or in attributes.

    A slow average moves them by little: so not a bit of them may change, where a repeated run changes none.
    """
    chance, found = randomness.capture(), []
    for but in ((), (), buffers):
        randomness.restore(chance)
        found.append(run.plain(arguments, but=but))
    one, again, then = found
    if _differ(one, then) or (_equal(one, again) and not _equal(one, then)):
        refuse_remembered(buffers)


def _refuse_unseen(path: str, outputs: list[Any]) -> None:
    """Raise where the model returns something of another kind, in which no tensor is seen."""
    if any(isinstance(v, Tensor) for v in outputs):
        return
    kinds = sorted({type(v).__name__ for v in outputs if v is not None and not isinstance(v, int | float | str)})
    if kinds:
        raise UncoveredParameterError(
            f"{path} returns a {kinds[0]}, in which no tensor was found",
            why="whether the records are independent is measured on what a model returns.",
            cure="return tensors, or a tuple, a dict, a dataclass or an object that has them as attributes.",
        )


def _alone(run: _Run, arguments: Any, dims: list[int | None], n: int, full: list[Any]) -> list[Any] | None:
    """The outputs for the last record alone. Some models cannot run on one record; that matters for a loss only."""
    try:
        return run.recorded(probe.alone(arguments, dims, n - 1), 1)[0]
    except Exception:
        if any(isinstance(v, Tensor) and v.ndim == 0 and v.is_floating_point() for v in full):
            raise
        return None


def _attribute(
    tape: Tape, run: _Run, arguments: Any, where: list[Records | None], plan: probe.Plan, n: int, *, repeats: bool
) -> None:
    """Every record's gradient is where it belongs: shown for all of them by one weighted sum.

    Each record has a loss of its own, made of its outputs. Autograd differentiates the sum of w[i] times loss i; the
    forms are those of the unweighted sum, and their sum with the weights w must be the same. The weights are random, so
    what is credited to another record changes the result (a sum with equal weights would not show it).

    And where the model ``repeats`` itself (no chance is in it), a record's gradient is the same without the others.
    """
    trainable = [p for p in tape.names if p.requires_grad]
    device = next((v.device for v in leaves(arguments) if isinstance(v, Tensor)), torch.device("cpu"))
    weights = (0.5 + torch.rand(n, device=device)) * torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)

    def losses(out: Any, n: int = n) -> Tensor | None:
        terms = []
        for v, rows in zip(within(out), _rows(out, where, plan, n), strict=True):
            if rows is not None:
                terms.append((rows * torch.linspace(-1.0, 1.3, rows.shape[1], device=v.device).cos()).sum(1))
        return torch.stack([t.to(terms[0].dtype) for t in terms]).sum(0) if terms else None

    chance = randomness.capture()  # dropout that is no module (of attention weights) is the same draw in both runs
    with (kept := Kept(tape.names)).counting, tape.watched(kept.note):
        plain = run.plain(arguments)
    tape.methods.activations = max(tape.methods.activations, kept.bytes / n)
    for name, left in kept.left.items():
        tape.methods.left[name] = max(tape.methods.left.get(name, 0.0), left / n)
    theirs = losses(plain)
    if theirs is None or not trainable:
        return
    trial = Batch(n)
    router = Live(tape, plan, trial, n)
    tape.latest = plan
    randomness.restore(chance)
    try:
        with tape.taking(trial):
            out = run.routed(router, tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, arguments))
        router.verify(plan)
        out = finished(tape, router, out)
    except PrivacyError as refusal:
        raise _Lost(refusal, router.culprit) from refusal
    except Exception as crash:  # the plain forward did not: it does something that stand-ins cannot do
        cannot = UncoveredParameterError(
            f"{tape.path(run.module)} cannot run with one copy of its parameters a record ({crash})",
            why="what is not clipped per record is not covered by the guarantee.",
            cure="register a rule for the module that does it (dpkit.register_rule), or freeze its parameters.",
        )
        raise _Lost(cannot, router.culprit) from crash
    try:
        weighted = (theirs * weights.to(theirs.dtype)).sum()
        with tape.taking(None):
            expected = torch.autograd.grad(weighted, trainable, allow_unused=True)
        ours = losses(out)
        if ours is not None:
            with tape.taking(trial):
                torch.autograd.grad(ours.sum(), tape.anchors(), allow_unused=True)
        alone = _without_the_others(run, arguments, where, plan, plain, losses, trainable, n) if repeats else []
    except CheckpointError as error:
        raise UncoveredParameterError(
            f"{tape.path(run.module)}: a function is checkpointed that uses parameters by itself",
            why="when it is computed again, in the backward, parameters are followed inside of modules only.",
            cure="checkpoint a module, checkpoint(self.block, x), or a function that calls modules.",
        ) from error
    except RuntimeError as error:
        if "checkpoint" in str(error):  # reentrant checkpointing allows .backward() only
            return
        raise
    finally:
        trial.closed = True
    with torch.no_grad():
        _refuse_another_function(tape, run, arguments, plain, out)
        largest = max((float(g.to_dense().norm()) for g in expected if g is not None), default=0.0)
        tolerance = trial.tolerance
        floor = largest * (1e-3 if tolerance < 1e-2 else 2e-2)  # an attention key's bias gets rounding alone
        for p, grad in zip(trainable, expected, strict=True):
            try:
                if p in trial.forms:
                    form = joined(trial.forms[p])
                    probe.refuse_misattributed(tape.name(p), form, grad, weights, floor, tolerance)
                elif grad is not None and float(grad.to_dense().norm()) > tolerance * largest:
                    raise UncoveredParameterError(
                        f"{tape.name(p)} {list(p.shape)} has a gradient in ordinary training and none in a private one",
                        why="it is used by an operation that the engine cannot follow, such as an autograd.Function.",
                        cure="freeze it, or register a rule for the module that uses it (dpkit.register_rule).",
                    )
            except PrivacyError as refusal:
                probe.refuse_hooked(tape.name(p), p)
                if any(not rule.built_in for rule in tape.rules_of(p)):  # a wrong rule is not to be hidden
                    raise
                raise _Lost(refusal, p) from refusal
        for whose, grads in alone:
            _refuse_acting(tape, trial, whose, dict(zip(trainable, grads, strict=True)))


def _rows(out: Any, where: list[Records | None], plan: probe.Plan, n: int) -> list[Tensor | None]:
    """What each record has of each output [n, ·]; None for what is no record's."""
    found: list[Tensor | None] = []
    for k, v in enumerate(within(out)):
        r = where[k] if k < len(where) else None
        rows = None
        if isinstance(v, Tensor) and v.requires_grad:
            if r is not None:
                rows = r.split(v).flatten(1)
            elif probe.paired(v, plan.crossed.get(k), n):
                rows = v.diagonal(0, *plan.crossed[k]).movedim(-1, 0).reshape(n, -1)
        found.append(rows)
    return found


def _without_the_others(
    run: _Run,
    arguments: Any,
    where: list[Records | None],
    plan: probe.Plan,
    whole: Any,
    losses: Callable[[Any, int], Tensor | None],
    trainable: list[nn.Parameter],
    n: int,
) -> list[tuple[list[int], Sequence[Tensor | None]]]:
    """The gradients of the last record's loss, and of the first one's, with all others left out; where a model cannot
    run on one record, of all others' without the last. Each with whose they are."""
    found: list[tuple[list[int], Sequence[Tensor | None]]] = []
    sizes = [None if rows is None else rows.shape[1:] for rows in _rows(whole, where, plan, n)]
    for kept in ([n - 1], [0], list(range(n - 1))) if n > 1 else ():
        if len(kept) > 1 and found:
            break
        if len(kept) == 1:
            some = probe.alone(arguments, run.dims, kept[0])
        else:
            some = probe.cut(arguments, run.dims, n, n - 1)
        try:
            out = run.plain(some)
            rows = _rows(out, where, plan, len(kept))
            if [None if r is None else r.shape for r in rows] != [s and torch.Size([len(kept), *s]) for s in sizes]:
                continue  # the longest record was left out, or a dimension of one is gone
            own = losses(out, len(kept))
            if own is not None:
                with run.tape.taking(None):
                    found.append((kept, torch.autograd.grad(own.sum(), trainable, allow_unused=True)))
        except Exception:  # as for the outputs: some models cannot run on one record
            continue
    return found


def _refuse_acting(tape: Tape, trial: Batch, kept: list[int], alone: Mapping[nn.Parameter, Tensor | None]) -> None:
    """Raise where the gradient of these records is another one than without the others, though the outputs are the
    same."""
    which, found = torch.zeros(trial.n), {}
    which[kept] = 1.0
    for p, grad in alone.items():
        if p in trial.forms:
            ours = joined(trial.forms[p]).weighted_sum(which.to(p.device))
            found[p] = ours, torch.zeros_like(ours) if grad is None else grad.to_dense().to(ours).flatten()
    scale = max((float(theirs.norm()) for _, theirs in found.values()), default=0.0)
    for p, (ours, theirs) in found.items():
        # kernels for few records may round otherwise than those for many: on a GPU in ten bits
        tolerance = 4 * trial.tolerance if trial.tolerance > 1e-2 or p.device.type == "cpu" else 2e-2
        gap, size = float((ours - theirs).norm()), float(theirs.norm())
        if scale < float("inf") and gap > tolerance * max(size, 10 * tolerance * scale):
            raise CoupledRecordsError(
                f"{tape.name(p)}: a record's gradient changed by {gap:.3g} (of {size:.3g}) when others were left out "
                "of the batch, though what the model returns did not",
                why="a record then acts through the other records' gradients too, which clipping its own does not "
                "bound.",
                cure="let no factor of a gradient depend on the batch, or on its size: in the backward of an "
                "autograd.Function, in a hook, behind detach().",
            )


def _refuse_another_function(tape: Tape, run: _Run, arguments: Any, plain: Any, out: Any) -> None:
    """Raise where a module computes something else on one record at a time than on the batch."""
    if tape.apiece and _differ(plain, out) and not _differ(plain, run.plain(arguments)):
        refusal = UncoveredParameterError(
            f"{tape.path(run.module)} gives other outputs when a part of it runs on one record at a time",
            why="the private forward would train another model than this.",
            cure="register a rule for the module whose rows are not the records' (dpkit.register_rule).",
        )
        raise _Lost(refusal, next(iter(tape.apiece)))


def _where(a: Any, b: Any, n: int, m: int) -> Records | None:
    """Where a floating output has its records."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()):
        return None
    where = place(tuple(a.shape), tuple(b.shape), n, m, (a, b))
    return where if isinstance(where, Records) else None


def _keys(out: Any) -> list[str]:
    """The outputs' names, where they have some."""
    return [str(key) for key, v in out.items() for _ in leaves(v)] if isinstance(out, Mapping) else []


def _equal(one: Any, other: Any) -> bool:
    """Whether two runs gave the same outputs to the last bit."""
    pairs = [(a, b) for a, b in zip(within(one), within(other), strict=False) if isinstance(a, Tensor)]
    return all(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True) for a, b in pairs if a.shape == b.shape)


def _differ(one: Any, other: Any) -> bool:
    """Whether two runs on the same input gave different outputs."""
    pairs = [(a, b) for a, b in zip(within(one), within(other), strict=False) if isinstance(a, Tensor)]
    return any(
        a.is_floating_point() and (a.shape != b.shape or bool(probe.gap(a.detach().flatten(), b.detach().flatten())))
        for a, b in pairs
    )
