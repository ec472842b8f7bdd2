"""One step of an LSTM, GRU or RNN, whose parameters meet the data in linear maps only.

Letters: n record, i in, h hidden.

torch's cells hand all their parameters to one function. Here the two matrices are applied by `F.linear` and the gates
are computed from the results, so that each parameter has one use a step that a per-sample gradient can be read off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lstm_cell(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``torch.lstm_cell`` computes: x [n, i] and the states h, c [n, h] to the next h and c."""
    x, h, c = _of_records(x, *hx)
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """What ``torch.gru_cell`` computes: x [n, i] and the state [n, h] to the next one."""
    x, h = _of_records(x, hx)
    xr, xz, xn = F.linear(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = F.linear(h, w_hh, b_hh).chunk(3, -1)
    new = (xn + (xr + hr).sigmoid() * hn).tanh()
    return new + (xz + hz).sigmoid() * (h - new)


def rnn_tanh_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """What ``torch.rnn_tanh_cell`` computes: x [n, i] and the state [n, h] to the next one."""
    x, h = _of_records(x, hx)
    return (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).tanh()


def rnn_relu_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """What ``torch.rnn_relu_cell`` computes: x [n, i] and the state [n, h] to the next one."""
    x, h = _of_records(x, hx)
    return (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).relu()


def _of_records(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    """x and the states as the records' own: what is the same for all of them (a parameter, zeros) enters the linear
    maps as data as soon as one of the others is."""
    if x.dim() != 2:
        raise ValueError(
            f"a recurrent cell's input has {x.dim()} dimensions; without a dimension of records no gradient belongs to "
            "a record. Pass [n, i]."
        )
    for s in states:
        if s.dim() != 2 or s.shape[0] != x.shape[0]:
            raise RuntimeError(f"a state of a recurrent cell is {list(s.shape)}; for {x.shape[0]} records it is [n, h]")
    x = x if type(x) is Tensor else x + torch.zeros_like(states[0][:, :1])
    return (x, *(s + torch.zeros_like(x[:, :1]) for s in states))


def _blank(cell: nn.RNNCellBase, x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], cell.hidden_size, dtype=x.dtype, device=x.device)


class LSTMCell(nn.LSTMCell):
    """``torch.nn.LSTMCell``: same constructor, parameters and results; input without records is refused.

    >>> h, c = LSTMCell(3, 4)(torch.randn(2, 3))
    >>> list(h.shape)
    [2, 4]
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """See ``torch.nn.LSTMCell.forward``."""
        h = _blank(self, input) if hx is None else None
        states = (h, h) if h is not None else hx
        assert states is not None
        return lstm_cell(input, states, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GRUCell(nn.GRUCell):
    """``torch.nn.GRUCell``: same constructor, parameters and results; input without records is refused."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """See ``torch.nn.GRUCell.forward``."""
        h = _blank(self, input) if hx is None else hx
        return gru_cell(input, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class RNNCell(nn.RNNCell):
    """``torch.nn.RNNCell``: same constructor, parameters and results; input without records is refused."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """See ``torch.nn.RNNCell.forward``."""
        h = _blank(self, input) if hx is None else hx
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        run = rnn_tanh_cell if self.nonlinearity == "tanh" else rnn_relu_cell
        return run(input, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
