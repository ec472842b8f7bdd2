"""Where autograd meets the tape: identities that hand gradients over, and the batch that collects them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import Anchor, Strangers, accumulates, once_differentiable
from .errors import CoupledRecordsError, DoubleUseError
from .forms import Dense, Form
from .methods import Methods
from .records import Records
from .rules import looked_up
from .sharded import Shards

Emit = Callable[[tuple[Tensor, ...], Tensor], Iterable[tuple[Tensor | None, Form]]]
Look = Callable[[Tensor, int], bool]
"""Is shown a gradient's rows [n·k, ...] and k; returns whether the pass is to go on below them."""


class Tap(torch.autograd.Function):
    """Identity whose backward hands (inputs, gradient) to a rule.

    The inputs that it needs are kept by ``save_for_backward``, so activation checkpointing keeps its saving and a later
    in-place change is an error. The output is no view, so in-place operations on it stay possible.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        anchor: Tensor,
        emit: Emit,
        batch: Batch,
        y_records: Records,
        x_records: tuple[Records | None, ...],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.emit, ctx.batch, ctx.x_records, ctx.y_records = emit, batch, x_records, y_records
        ctx.set_materialize_grads(False)
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            inputs = ctx.saved_tensors
            rows, factor = ctx.y_records.lead(grad), ctx.y_records.factor
            if ctx.batch.look is not None:
                grad = grad if ctx.batch.look(rows, factor) else torch.zeros_like(grad)  # hooks below expect a tensor
            else:
                led = tuple(
                    x.detach() if r is None else r.lead(x.detach()) for x, r in zip(inputs, ctx.x_records, strict=True)
                )
                for parameter, form in ctx.emit(led, rows):
                    ctx.batch.add(parameter, form if factor == 1 else form.folded(factor), tapped=True)
        return grad, *[None] * (5 + len(ctx.x_records))


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
            if ctx.batch.look is not None:
                ctx.batch.look(grad, 1)
            else:
                ctx.batch.add(ctx.parameter, Dense(grad), tapped=False)
        return None, None, None, None


class Pick(torch.autograd.Function):
    """Rows of each record's copy of a table, [n, ..., d], without making the copies."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, table: nn.Parameter, index: Tensor, padding: int | None, batch: Batch
    ) -> Tensor:
        ctx.table, ctx.index, ctx.padding, ctx.batch = table, index, padding, batch
        ctx.set_materialize_grads(False)
        return F.embedding(index, table.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is not None:
            if ctx.batch.look is not None:
                ctx.batch.look(grad, 1)
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


class Pairs(torch.autograd.Function):
    """Identity on values for pairs of records, whose backward refuses a gradient off the diagonal."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dims: list[int], path: str) -> Tensor:
        ctx.dims, ctx.path = dims, path
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sizes = {grad.shape[d] for d in ctx.dims}
        rest = grad
        if len(ctx.dims) == 2 and len(sizes) == 1:
            rest = grad.movedim(ctx.dims, (0, 1))[~torch.eye(sizes.pop(), dtype=torch.bool, device=grad.device)]
        if bool((rest != 0).any()):
            raise CoupledRecordsError(
                f"an output of {ctx.path} {list(grad.shape)} holds a value for each pair of records, and a loss on the "
                "pairs was back-propagated",
                why="a record then acts through other records' gradients too, which clipping its own does not bound.",
                cure="use each record's own entry alone (the diagonal), or contrast views within one record.",
            )
        return grad, None, None


@dataclass(eq=False)
class Batch:
    """One physical batch while it is in the user's hands: the forms that its backward passes have brought.

    Attributes:
        n: records in it.
        owners: [n] the unit that each record is of, where units have several.
        forms: per parameter, its forms in order of arrival.
        tapped: the forms that came through rules (those that the first-batch proof compares with autograd).
        methods: chooses the way to the norms and sums of each form.
        unproven: parameters whose forms have not been compared with autograd's own gradient yet.
        autograd: the ordinary gradients of those.
        passive: why forwards in this batch were left alone, if any was.
        anchors: the leaves that tell whether a backward pass accumulates gradients, or only asks for an input's.
        shards: whose rows are on which rank, where parameters are sharded; forms are those of the sharded ones.
        strangers: parameters of others, which may not be reached.
        marked: parameters that get zeros as their ``grad`` after a backward pass, for a GradScaler to inspect.
        look: is shown what the running backward pass brings, which is not taken in.
    """

    n: int
    methods: Methods = field(default_factory=lambda: Methods("model"))
    forms: dict[nn.Parameter, list[Form]] = field(default_factory=lambda: defaultdict(list))
    tapped: dict[nn.Parameter, list[Form]] = field(default_factory=lambda: defaultdict(list))
    unproven: frozenset[nn.Parameter] = frozenset()
    autograd: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    passive: str = ""
    anchors: Mapping[torch.device, Anchor] = field(default_factory=dict)
    marked: Sequence[nn.Parameter] = ()
    shards: Shards | None = None
    strangers: Strangers | None = None
    closed: bool = False
    owners: Tensor | None = None
    look: Look | None = None
    _task: tuple[int, bool] = (-1, True)

    def add(self, parameter: Tensor | None, form: Form, *, tapped: bool) -> None:
        """Take a form in; ``tapped``: by a rule, so that autograd's own gradient of that use can be compared."""
        if self.shards is not None:
            parameter = self.shards.origin(parameter)
        if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
            return
        if not self._accumulates():
            return  # torch.autograd.grad for something else: no parameter's gradient is asked for
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
                cure="feed the batches of the private loader as they come (their sizes vary, and what goes with them, "
                "noise say, has as many rows); evaluate under torch.no_grad() or engine.paused(). Several views of a "
                "record go through the model one after another, or in one more dimension, not in more rows.",
            )
        form = self.methods.settle(form, parameter)
        self.forms[parameter].append(form)
        if tapped and parameter in self.unproven:
            self.tapped[parameter].append(form)
        self._mark()

    def _accumulates(self) -> bool:
        """Whether the running backward pass is for the parameters' gradients; asked of autograd once a pass."""
        task = torch._C._current_graph_task_id()
        if task == -1 or task != self._task[0]:
            self._task = (task, accumulates(self.anchors.values()))
            if self._task[1] and task != -1 and self.strangers is not None:
                self.strangers.refuse_reached()
        return self._task[1]

    def _mark(self) -> None:
        for p in self.marked:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def unmark(self) -> None:
        """Take the zeros away; what autograd has added to them stays, to be refused."""
        for p in self.marked:
            if p.grad is not None and not bool(p.grad.any()):
                p.grad = None

    @property
    def tolerance(self) -> float:
        """How far the proof lets a gradient differ from autograd's: half precision anywhere rounds everywhere."""
        return 5e-2 if any(f.narrow for found in self.forms.values() for f in found) else 1e-3

    def keep(self, parameter: Tensor) -> None:
        """Hook on an unproven parameter: its ordinary gradient is taken away as soon as it is there, so that the user's
        ``clip_grad_norm_`` or ``zero_grad`` finds what it will find in every later batch: nothing."""
        assert isinstance(parameter, nn.Parameter)
        grad, parameter.grad = parameter.grad, None
        if grad is not None:
            held = self.autograd.get(parameter)
            self.autograd[parameter] = grad if held is None else held + grad
            self._mark()

    @contextlib.contextmanager
    def looked_at_by(self, look: Look) -> Iterator[None]:
        """Within, backward passes show their rows to ``look`` and bring nothing."""
        before, self.look = self.look, look
        try:
            yield
        finally:
            self.look = before


def refuse_reached(rows: Tensor, others: Tensor, seen: str, cure: str) -> None:
    """Raise where a gradient [n·k, ...] reaches rows that it must not; ``others`` [n·k] says which."""
    reached = rows[others]  # where a record is not finite, 0 times its NaN is NaN: that says nothing
    if bool(((reached != 0) & torch.isfinite(reached)).any()):
        raise CoupledRecordsError(
            seen, why="clipping bounds what a record does through its own gradient only.", cure=cure
        )
