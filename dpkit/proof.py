"""The first batch's proofs: forms add up to autograd's own gradient, and losses are one a record."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import GradientMismatchError, NonPrivateGradientError
from .joined import joined
from .probe import refuse_hooked
from .tape import Tape
from .taps import Batch, Look, refuse_reached

_PENALTY = "A penalty on weights uses no record: leave it out of the loss, and give the optimizer weight_decay."


def prove(tape: Tape, batch: Batch, max_grad_norm: float) -> None:
    """Compare the forms with autograd's own gradient, for parameters that were not compared before.

    What is rounding alone beside ``max_grad_norm`` (all that a softmax over one class leaves) is neither right nor
    wrong: it proves nothing, and its parameter is compared again.
    """
    compared: list[tuple[nn.Parameter, Tensor, Tensor, float]] = []
    for p in tape.parameters():
        stray, p.grad = p.grad, None
        if stray is None and p in tape.proven:
            continue
        grad, tapped = batch.autograd.get(p, stray), batch.tapped.get(p)
        if grad is not None and not tapped:
            _refuse_uncovered(tape, batch, p)
        if tapped:
            form = joined(tapped)
            ours = form.weighted_sum(torch.ones(batch.n, device=p.device))
            theirs = torch.zeros_like(ours) if grad is None else grad.to_dense().to(ours.dtype).flatten()
            compared.append((p, ours, theirs, float(form.sq_norm().sqrt().sum())))
        elif p in batch.forms and p not in tape.proven and not tape.rules_of(p):
            tape.proven.add(p)
    if not all(math.isfinite(scale) for *_, scale in compared):
        return  # a record is not finite: its turn comes with the next batch
    for p, ours, theirs, scale in compared:
        gap, size = float((ours - theirs).norm()), float(theirs.norm())
        if max(gap, scale, size) <= torch.finfo(ours.dtype).eps * batch.n * max_grad_norm:
            continue
        # a gradient that is zero but for rounding (an attention key's bias) is judged against the largest one
        if gap > batch.tolerance * max(scale, size) and gap > batch.tolerance * 1e-3 * _most(batch):
            refuse_hooked(tape.name(p), p)
            raise GradientMismatchError(
                f"{tape.name(p)} {list(p.shape)}: the per-record gradients add up to something else than "
                f"autograd's gradient (they differ by {gap:.3g}, norm {size:.3g})",
                why="either its layer's rule is wrong, or the parameter is also used where no rule sees it; what "
                "is not clipped per record is not covered by the guarantee.",
                cure=f"correct the rule (dpkit.register_rule), or freeze the parameter. {_PENALTY}",
            )
        tape.proven.add(p)


def _most(batch: Batch) -> float:
    """The largest of the parameters' gradients in the batch, those that were compared before among them."""
    norms = [float(joined(found).sq_norm().sqrt().sum()) for found in batch.forms.values()]
    return max((v for v in norms if math.isfinite(v)), default=0.0)


def _refuse_uncovered(tape: Tape, batch: Batch, p: nn.Parameter) -> None:
    if batch.passive:
        raise NonPrivateGradientError(
            f"{tape.name(p)} received an ordinary gradient: {batch.passive}, while {batch.n} records were drawn",
            why="the gradient is not clipped per record.",
            cure="feed the model the batches of the private loader, one row for each record, in the dimension that "
            "batch_first says; several views of a record one after another, model(a) and model(b), not in more rows.",
        )
    raise NonPrivateGradientError(
        f"{tape.name(p)} {list(p.shape)} received a gradient that the engine did not see",
        why="what is not clipped per record is not covered by the guarantee.",
        cure="freeze it, register a rule for its module (dpkit.register_rule), or use the parameter through its "
        f"module inside the model's forward. {_PENALTY}",
    )


def refuse_coupled_losses(tape: Tape, batch: Batch, losses: Tensor) -> bool:
    """The strict door: no record's loss may reach the others. Returns whether that could be told.

    Each record's loss is differentiated by itself; of many records, the last, the first and some in between.

    Raises:
        CoupledRecordsError: one has a gradient at another record's activations.
    """
    anchors = tape.anchors()
    if not anchors:
        return False  # no forward was private yet: the step will say why
    try:
        for record in _some(batch.n):
            with batch.looked_at_by(_of(record)):
                torch.autograd.grad(losses[record], anchors, retain_graph=True, allow_unused=True)
        return bool(torch.isfinite(losses).all())  # else the next batch is examined too
    except RuntimeError as error:
        if "checkpoint" not in str(error):  # reentrant checkpointing allows .backward() only
            raise
        return False


def _of(record: int) -> Look:
    """The loss of one record must not reach another record's rows, wherever in the model."""

    def look(rows: Tensor, factor: int) -> bool:
        others = torch.arange(rows.shape[0], device=rows.device) // factor != record
        seen = f"the loss of record {record} has a gradient at another record's activations"
        refuse_reached(rows, others, seen, "make losses[i] depend on record i alone.")
        return True

    return look


def _some(n: int, most: int = 8) -> list[int]:
    """The last of n records, the first, and others spread between, at most ``most`` in all."""
    return [n - 1 - k * (n - 1) // (min(n, most) - 1) for k in range(min(n, most))] if n > 1 else [0]
