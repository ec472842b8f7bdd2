"""What the running backward pass is for: asked of torch's autograd engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

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


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that is no part of a graph: it raises where the gradient is to be differentiated again.

    Raises:
        UncoveredParameterError: a gradient penalty (``create_graph=True``).
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
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
