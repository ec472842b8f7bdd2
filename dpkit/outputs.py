"""What leaves a call: a layer's output through its tap, and what the outermost call gives to the user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import probe
from .errors import CoupledRecordsError, UncoveredParameterError
from .live import Live
from .records import Folded, Records
from .standin import StandIn
from .taps import Pairs, Refusal, Tap
from .trees import holders, leaves, tree_map

if TYPE_CHECKING:
    from .tape import Tape


def tapped(tape: Tape, module: nn.Module, site: probe.Site, args: Any, kwargs: Any, y: Any, router: Live) -> Any:
    """A layer's output through a `Tap`, at which its rule gives the forms; refused where it could not."""
    rule = tape.rules[module]
    assert rule is not None
    tensors = [(k, v) for k, v in enumerate(leaves((args, kwargs))) if isinstance(v, Tensor)]
    taken = tensors if rule.all_inputs else tensors[:1]
    places = [site.arguments[k] for k, _ in taken]
    if rule.all_inputs:  # rows whose own values do not tell their order (routes that are all alike) follow the first
        lead = places[0]
        places = [lead if isinstance(r, Folded) and r.shares(lead) else r for r in places]
    folded = next((r for r in (*places, *site.arguments, *site.outputs) if isinstance(r, Folded)), None)
    if folded is not None and (not rule.all_inputs or folded in (*places, *site.outputs)):
        probe.refuse_folded(tape.path(module), f"a call of {type(module).__name__}", folded)
    there = site.outputs[0]
    if not isinstance(places[0], Records) or not isinstance(there, Records):
        raise CoupledRecordsError(
            f"the input of {tape.path(module)} comes from the batch but has no dimension of records",
            why="it was reduced over the records, so the layer's gradient mixes them.",
            cure="reduce over the records only in the loss.",
        )
    if rule.all_inputs and len({r.factor for r in (*places, there) if isinstance(r, Records)}) > 1:
        raise UncoveredParameterError(
            f"{tape.path(module)} ({type(module).__name__}) takes tensors with different numbers of rows a record",
            why="a rule is given rows that belong together.",
            cure="keep the records in a dimension of their own ([n, t, ...] rather than [n*t, ...]).",
        )
    if not isinstance(y, Tensor):
        raise UncoveredParameterError(
            f"{tape.path(module)} ({type(module).__name__}) has a rule but returns a {type(y).__name__}",
            why="a rule is given the gradient of one output tensor.",
            cure="return one tensor, or remove the rule: the engine then follows the parameters themselves.",
        )
    needed = rule.needs_input(tape.own(module))
    function = rule.function

    def emit(inputs: tuple[Tensor, ...], grad: Tensor) -> Any:
        return function(module, inputs if rule.all_inputs else inputs[0] if inputs else None, grad)

    kept, held = ([v for _, v in taken], tuple(places)) if needed else ([], ())
    return Tap.apply(y, tape.anchor(y), emit, router.batch, there, held, *kept)


def finished(tape: Tape, router: Live, output: Any) -> Any:
    """What the outermost call returns to the user, with refusals where a loss may not go."""
    counter, plan = iter(range(1 << 30)), router.plan

    def finish(v: Any) -> Any:
        k = next(counter)
        if isinstance(v, StandIn) and v.records is not None and v.copies is not None:
            return v.records.join(v.copies)
        if k in plan.losses and isinstance(v, Tensor) and v.requires_grad:
            return Refusal.apply(
                v,
                CoupledRecordsError(
                    f"the loss that {tape.path(tape.model)} computes itself was back-propagated: {plan.losses[k]}",
                    why="one record then rescales the gradients of all others, which clipping does not bound.",
                    cure="compute one loss a record from the logits and call engine.backward(losses).",
                ),
            )
        if k in plan.reduced and isinstance(v, Tensor) and v.requires_grad:
            return Refusal.apply(
                v,
                CoupledRecordsError(
                    f"output {k} of {tape.path(tape.model)} {list(v.shape)} has no row for each record, and a loss "
                    "on it was back-propagated",
                    why="it was reduced over the records, so that one acts through the others' gradients too.",
                    cure="return the rows, and reduce over the records only in the loss, by mean or sum.",
                ),
            )
        if k in plan.crossed and isinstance(v, Tensor) and v.requires_grad:
            return Pairs.apply(v, plan.crossed[k], tape.path(tape.model))
        return v

    if not (plan.losses or plan.crossed or plan.reduced or plan.holds) and not any(
        isinstance(v, StandIn) for v in leaves(output)
    ):
        return output

    def finish_all(tree: Any) -> Any:
        new = tree_map(finish, tree)
        return new if any(a is not b for a, b in zip(leaves(new), leaves(tree), strict=True)) else tree

    held = holders(output) if plan.holds else []
    output = finish_all(output)
    for attributes in held:
        attributes.update({name: finish_all(v) for name, v in attributes.items()})
    return output
