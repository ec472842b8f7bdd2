"""What a backward pass is for, what it starts from and whom it reaches: asked of torch's autograd engine."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .errors import UncoveredParameterError


class Anchor:
    """A leaf that requires grad, and the node of autograd's at which its gradient would be accumulated."""

    def __init__(self, device: torch.device) -> None:
        self.leaf = torch.zeros((), device=device, requires_grad=True)
        self.node = torch.autograd.graph.get_gradient_edge(self.leaf).node


def accumulates(anchors: Iterable[Anchor]) -> bool:
    """Whether the running backward pass accumulates gradients into leaves, of which some are known.

    ``torch.autograd.grad(loss, x)`` and ``loss.backward(inputs=[x])`` (adversarial examples, saliency) pass the same
    nodes as ``loss.backward()`` and yet ask for no parameter's gradient.
    """
    if torch._C._current_graph_task_id() == -1:
        return True
    asked = False
    for anchor in anchors:
        if torch._C._will_engine_execute_node(anchor.node):
            return True
        asked = True
    return not asked


class Strangers:
    """Parameters outside a model that other optimizers train: those of every optimizer of which a step was seen.

    Args:
        known: the model's own.
    """

    def __init__(self, known: Container[nn.Parameter]) -> None:
        self._known, self._nodes = known, dict[nn.Parameter, Any]()
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        _watching.add(self)
        _watch_all_optimizers()

    def forget(self) -> None:
        """Look at no more steps."""
        _watching.discard(self)

    def meet(self, optimizer: Optimizer) -> None:
        """A step of an optimizer, whosever it is."""
        if optimizer in self._met:
            return
        self._met.add(optimizer)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p not in self._known and p.is_leaf and p.requires_grad:
                self._nodes[p] = torch.autograd.graph.get_gradient_edge(p).node

    def refuse_reached(self) -> None:
        """Raise if the running backward pass gives one of them a gradient."""
        for p, node in self._nodes.items():
            if p not in self._known and torch._C._will_engine_execute_node(node):
                raise UncoveredParameterError(
                    f"a parameter {list(p.shape)} outside the model, which another optimizer trains, gets a gradient "
                    "from private records",
                    why="it learns from them without clipping, noise and account, and the model learns through it; so "
                    "it did in the steps before this one.",
                    cure="make one module of both (nn.ModuleList), with one optimizer, and start anew. Where the "
                    "gradient is not wanted, detach: discriminator(fake.detach()).",
                )


class Listener(Protocol):
    """Is told of every ``torch.autograd.backward`` (and so of every ``loss.backward()``) before it runs."""

    def before_backward(self, roots: Sequence[Tensor], grads: Sequence[Tensor | None] | None) -> None:
        """What is back-propagated, and the gradients that were given for it, if any. May raise: then nothing runs."""
        ...


_listening: weakref.WeakSet[Listener] = weakref.WeakSet()


def listen(listener: Listener) -> None:
    """From now on, while it lives, a listener is told of backward passes for the parameters' gradients."""
    _listening.add(listener)
    _hear_backward()


@functools.cache
def _hear_backward() -> None:
    """Replace torch's function by one that tells, and calls it: there is no hook for the beginning of a pass."""
    run = torch.autograd.backward

    @functools.wraps(run)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("inputs", args[3] if len(args) > 3 else None)  # for other gradients: saliency
        if asked is None and _listening and torch._C._current_graph_task_id() == -1:  # checkpointing begins others
            roots = (tensors,) if isinstance(tensors, Tensor) else [v for v in tensors if isinstance(v, Tensor)]
            grads = (grad_tensors,) if isinstance(grad_tensors, Tensor) else grad_tensors
            for listener in tuple(_listening):
                listener.before_backward(roots, grads)
        return run(tensors, grad_tensors, *args, **kwargs)

    torch.autograd.backward = backward


_watching: weakref.WeakSet[Strangers] = weakref.WeakSet()


@functools.cache
def _watch_all_optimizers() -> None:
    def tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for strangers in tuple(_watching):
            strangers.meet(optimizer)

    register_optimizer_step_pre_hook(tell)  # once, and for good: torch fails where one is removed during a step


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that is no part of a graph: it raises where the gradient is to be differentiated again (but by dpkit).

    Raises:
        UncoveredParameterError: a gradient penalty (``create_graph=True``).
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and ctx.batch.look is None:
            raise UncoveredParameterError(
                "a backward pass with create_graph=True inside a private batch: a gradient penalty, or another use of "
                "second derivatives",
                why="a penalty's gradient reaches the parameters by second derivatives, of which no record's share is "
                "known; the part that leads through the layers' weights would be missing without a word.",
                cure="leave the penalty out: clip or normalise the critic's weights instead (that is no use of the "
                "data), or take the penalty on public data inside engine.paused().",
            )
        return backward(ctx, *grads)

    return wrapper
