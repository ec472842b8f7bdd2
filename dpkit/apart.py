"""Composite operations of torch that are taken apart when they meet a `StandIn`, and the functions that do so.

``nn.MultiheadAttention``, ``nn.LSTM`` and the like hand all their parameters to one function of torch. Run on n copies
of each parameter it would cost n times the memory. `dpkit.layers` has the same functions in terms of linear maps and
table look-ups, whose per-sample gradients are cheap (`Outer`, `Rows`). The user's module stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dpkit import layers

TAKEN_APART: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: layers.multi_head_attention,
    F.embedding_bag: layers.embedding_bag,
    torch.lstm: layers.lstm,
    torch.gru: layers.gru,
    torch.rnn_tanh: layers.rnn_tanh,
    torch.rnn_relu: layers.rnn_relu,
    torch.lstm_cell: layers.lstm_cell,
    torch.gru_cell: layers.gru_cell,
    torch.rnn_tanh_cell: layers.rnn_tanh_cell,
    torch.rnn_relu_cell: layers.rnn_relu_cell,
}


def packed_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedSequence | None:
    """The packed sequence that a recurrent module is given, if it is given one."""
    if isinstance(module, nn.RNNBase):
        return next((v for v in (*args, *kwargs.values()) if isinstance(v, PackedSequence)), None)
    return None


def brings_back(module: nn.Module) -> bool:
    """Whether a recurrent module is known to permute records only as it permutes them back: not somebody's subclass."""
    return type(module) in (nn.LSTM, nn.GRU, nn.RNN, layers.LSTM, layers.GRU, layers.RNN)


def is_packed(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a function of torch is a recurrent one that is given packed data, which do not tell in which order."""
    return func in _RECURRENT and not isinstance(args[3], bool)


def take_apart(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], order: Tensor | None) -> Any:
    """Run the substitute of ``func``. In a packed sequence's data records stand in the order of their lengths; they are
    brought back to their own (``order``) before they meet a parameter, else copy i would meet another record."""
    if order is None or func not in _RECURRENT:
        return TAKEN_APART[func](*args, **kwargs)
    data, sizes, hx, *others = args
    back = order.argsort()
    own = [s[:, order] for s in ([hx] if isinstance(hx, Tensor) else hx)]
    out, *last = TAKEN_APART[func](
        data, sizes, own[0] if isinstance(hx, Tensor) else own, *others, order=order, **kwargs
    )
    return (out, *(s[:, back] for s in last))


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
