"""LSTM, GRU and RNN whose parameters meet the data in linear maps only, at the speed of torch's fused kernels.

Letters: t position, n record, i in, h hidden, g gates' width (4h, 3h or h), p projected width (h without projection).

A recurrent layer uses its hidden-to-hidden matrix once a position, each time on what the last time gave. Yet once all
hidden states are known, all its uses are one linear map: ``gates = x W_ih' + h_prev W_hh'``. So the fused kernel runs
first, without gradient, and gives every h; then one product over all positions gives every gate; and `_LSTMStates` and
its siblings return the known states as functions of the gates. Their backward is one short loop over time that turns
the states' gradients into the gates'. From there autograd, or whoever watches the linear maps, goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from .cells import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from .known import known_linear

_BLOCK = 16
"""Positions whose slopes are computed at a time in a backward: few enough to stay in the cache."""


class _LSTMStates(torch.autograd.Function):
    """h [t, n, p] and c [t, n, h] as functions of the input's and the state's part of the gates, [t, n, 4h] each, the
    projections [t, n, p], h0 and c0."""

    @staticmethod
    def forward(
        ctx: Any,
        from_x: Tensor,
        from_h: Tensor,
        projected: Tensor | None,
        h0: Tensor,
        c0: Tensor,
        w_hh: Tensor,
        w_hr: Tensor | None,
        h: Tensor,
        c: Tensor,
        acts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(c0, w_hh, w_hr, c, acts)
        ctx.set_materialize_grads(False)
        return h.detach(), c.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None) -> Any:
        c0, w_hh, w_hr, c, acts = ctx.saved_tensors
        steps, n, width = c.shape
        flat = acts.new_empty(steps, n, 4 * width)
        now = acts.new_empty(n, 4, width)  # the gates' gradients at one position; a buffer that stays in the cache
        ifg, only_o, gates = now[:, :3], now[:, 3], now.flatten(1)
        grad_projected = None if w_hr is None else acts.new_empty(steps, n, w_hr.shape[0])
        dh_next, dc_next = None, None
        for start in range((steps - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
            block = slice(start, start + _BLOCK)
            i, f, g, o = acts[block].unbind(2)  # [t, n, h]
            tanh_c = _tanh(c[block])
            c_prev = torch.cat([c0[None], c[: _BLOCK - 1]]) if not start else c[start - 1 : start + _BLOCK - 1]
            by_c = acts.new_empty(*tanh_c.shape[:2], 3, width)  # [t, n, 3, h]
            torch.mul(g, _slope(i), out=by_c[:, :, 0])
            torch.mul(c_prev[: len(tanh_c)], _slope(f), out=by_c[:, :, 1])
            torch.addcmul(i, i * g, g, value=-1, out=by_c[:, :, 2])
            by_h, h_to_c = tanh_c * _slope(o), torch.addcmul(o, o * tanh_c, tanh_c, value=-1)
            every = (by_c, by_h, h_to_c, f, flat[block])
            for t, (for_ifg, for_o, to_c, f_t, kept) in _backwards(start, *every):
                dh = None if grad_h is None else grad_h[t]
                if dh_next is not None:
                    dh = torch.mm(dh_next, w_hh) if dh is None else torch.addmm(dh, dh_next, w_hh)
                if dh is None:
                    dh = acts.new_zeros(n, w_hh.shape[1])
                if grad_projected is not None:
                    grad_projected[t] = dh
                    dh = dh @ w_hr
                dc = dh * to_c
                if dc_next is not None:
                    dc += dc_next
                if grad_c is not None:
                    dc += grad_c[t]
                torch.mul(dc[:, None], for_ifg, out=ifg)
                torch.mul(dh, for_o, out=only_o)
                kept.copy_(gates)
                dc_next, dh_next = dc.mul_(f_t), gates
        return flat, flat, grad_projected, torch.mm(flat[0], w_hh), dc_next, None, None, None, None, None


def _backwards(start: int, *blocks: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Positions from the last to the first, ``start``, each with what ``blocks`` [t, ...] hold for it.

    Taken apart by one call each: to index tensors one by one takes as long as to compute with what they hold.
    """
    every = list(zip(*(block.unbind() for block in blocks), strict=True))
    return zip(range(start + len(every) - 1, start - 1, -1), reversed(every), strict=True)


def _slope(gate: Tensor) -> Tensor:
    """The slope of the sigmoid where it has this value: s (1 − s)."""
    return torch.addcmul(gate, gate, gate, value=-1)


def _tanh(x: Tensor) -> Tensor:
    """tanh z = 2 sigmoid(2 z) − 1: on a CPU in a quarter of the time of torch's tanh."""
    s = torch.mul(x, 2).sigmoid_()
    return torch.add(s.new_full((), -1.0), s, alpha=2, out=s)


class _GRUStates(torch.autograd.Function):
    """h [t, n, h] as a function of the input's and the state's part of the gates, [t, n, 3h] each, and h0."""

    @staticmethod
    def forward(ctx: Any, from_x: Tensor, from_h: Tensor, h0: Tensor, w_hh: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(from_x, from_h, h0, w_hh, h)
        return h.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> Any:
        from_x, from_h, h0, w_hh, h = ctx.saved_tensors
        steps, _, width = h.shape
        grad_x, grads = torch.empty_like(from_x), torch.empty_like(from_h)
        dh_next: Tensor | None = None
        for start in range((steps - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
            block = slice(start, start + _BLOCK)
            xr, xz, xn = from_x[block].chunk(3, -1)
            hr, hz, hn = from_h[block].chunk(3, -1)
            r, z = (xr + hr).sigmoid_(), (xz + hz).sigmoid_()
            new = torch.addcmul(xn, r, hn).tanh_()
            h_prev = torch.cat([h0[None], h[: _BLOCK - 1]]) if not start else h[start - 1 : start + _BLOCK - 1]
            h_prev = h_prev[: len(z)]
            by = h.new_empty(*z.shape[:2], 4, width)  # [t, n, 4, h]: what dh is multiplied with for r, z, hn, and xn
            torch.mul(1 - z, 1 - new * new, out=by[:, :, 3])
            torch.mul(by[:, :, 3], r, out=by[:, :, 2])
            torch.mul(by[:, :, 2] * hn, 1 - r, out=by[:, :, 0])
            torch.mul(h_prev - new, _slope(z), out=by[:, :, 1])
            mine = grads[block]
            every = (by[:, :, :3], by[:, :, 3], z, mine, mine.unflatten(-1, (3, width)), grad_x[block, :, 2 * width :])
            for t, (for_rzn, for_xn, z_t, all_t, rzn, xn_t) in _backwards(start, *every):
                dh = grad_h[t] if dh_next is None else dh_next.add_(grad_h[t])
                torch.mul(dh[:, None], for_rzn, out=rzn)
                torch.mul(dh, for_xn, out=xn_t)
                dh_next = torch.addmm(dh * z_t, all_t, w_hh)
        grad_x[..., : 2 * width] = grads[..., : 2 * width]
        return grad_x, grads, dh_next, None, None


class _RNNStates(torch.autograd.Function):
    """h [t, n, h] as a function of the input's and the state's part of what goes into tanh or relu, [t, n, h] each, and
    h0."""

    @staticmethod
    def forward(ctx: Any, from_x: Tensor, from_h: Tensor, h0: Tensor, w_hh: Tensor, h: Tensor, relu: bool) -> Tensor:
        ctx.save_for_backward(w_hh, h)
        ctx.relu = relu
        return h.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> Any:
        w_hh, h = ctx.saved_tensors
        slope = (h > 0).to(h.dtype) if ctx.relu else 1 - h * h
        grads = torch.empty_like(h)
        dh = grad_h[-1]
        for t, (slope_t, grads_t) in _backwards(0, slope, grads):
            torch.mul(dh, slope_t, out=grads_t)
            dh = torch.addmm(grad_h[t - 1], grads_t, w_hh) if t else grads_t @ w_hh
        return grads, grads, dh, None, None, None


def _fused(mode: str, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], biased: bool) -> Tensor:
    """Every h [t, n, p] of one layer in one direction, by torch's kernel, without gradient."""
    run: Any = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[mode]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        plain = [w.detach() for w in weights]
        first = [s.detach()[None] for s in state]
        out = run(x.detach(), first if mode == "LSTM" else first[0], plain, biased, 1, 0.0, False, False, False)
    h: Tensor = out[0]
    return h


def _direction(
    mode: str, x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], biased: bool
) -> tuple[Tensor, Tensor | None]:
    """One layer forward in time: x [t, n, i] to h [t, n, p] and, for an LSTM, c [t, n, h]."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = (weights[2], weights[3]) if biased else (None, None)
    w_hr = weights[-1] if len(weights) in (3, 5) else None
    if any(type(v) not in (Tensor, nn.Parameter) for v in (x, *state)):
        return _stepwise(mode, x, state, (w_ih, w_hh, b_ih, b_hh), w_hr)
    if mode == "LSTM":
        return _lstm(x, state, weights, biased, w_hr)
    h0, chain = state[0], w_hh.detach()
    if mode == "GRU" and _loops(x):
        with torch.no_grad():
            h_prev, h, *parts = _looped_gru(x, h0, [w.detach() for w in weights], biased)
        from_x, from_h = known_linear(x, w_ih, b_ih, parts[0]), known_linear(h_prev, w_hh, b_hh, parts[1])
        return _GRUStates.apply(from_x, from_h, h0, chain, h), None
    h = _fused(mode, x, state, weights, biased)
    h_prev = torch.cat([h0.detach()[None], h[:-1]])
    if mode == "GRU":
        from_x, from_h = F.linear(x, w_ih, b_ih), F.linear(h_prev, w_hh, b_hh)
        return _GRUStates.apply(from_x, from_h, h0, chain, h), None
    # what goes into tanh or relu is never used: the states tell their own slope
    from_x, from_h = known_linear(x, w_ih, b_ih, h), known_linear(h_prev, w_hh, b_hh, h)
    return _RNNStates.apply(from_x, from_h, h0, chain, h, mode == "RNN_RELU"), None


def _loops(x: Tensor) -> bool:
    """Whether a loop over positions is cheaper than the fused kernel and computing again what it keeps for itself."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _looped_gru(x: Tensor, h0: Tensor, weights: Sequence[Tensor], biased: bool) -> tuple[Tensor, ...]:
    """A GRU on a CPU: every h before and after [t, n, h], and the input's and the state's part of the gates
    [t, n, 3h]."""
    (steps, n, _), width = x.shape, h0.shape[-1]
    from_x = F.linear(x, weights[0], weights[2] if biased else None)
    chain, bias = weights[1].T.contiguous(), weights[3] if biased else x.new_zeros(3 * width)
    from_h, h, gates = torch.empty_like(from_x), x.new_empty(steps + 1, n, width), x.new_empty(n, 2 * width)
    h[0] = h0
    r, z = gates.chunk(2, -1)
    for a, b, last, h_t in zip(from_x.unbind(), from_h.unbind(), h[:-1].unbind(), h[1:].unbind(), strict=True):
        torch.addmm(bias, last, chain, out=b)
        torch.add(a[:, : 2 * width], b[:, : 2 * width], out=gates).sigmoid_()
        new = torch.addcmul(a[:, 2 * width :], r, b[:, 2 * width :]).tanh_()
        torch.lerp(new, last, z, out=h_t)
    return h[:-1], h[1:], from_x, from_h


def _lstm(
    x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], biased: bool, w_hr: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`_direction` of an LSTM."""
    w_ih, w_hh = weights[:2]
    b_ih, b_hh = (weights[2], weights[3]) if biased else (None, None)
    h0, c0 = state
    with torch.no_grad():
        if _loops(x):
            h_prev, h, c, acts = _looped(x, h0, c0, [w.detach() for w in weights], biased)
        else:
            h = _fused("LSTM", x, state, weights, biased)
            h_prev = torch.cat([h0.detach()[None], h[:-1]])
            gates = F.linear(x, w_ih.detach(), None if b_ih is None else b_ih.detach())
            gates += F.linear(h_prev, w_hh.detach(), None if b_hh is None else b_hh.detach())
            acts = gates.unflatten(-1, (4, -1))  # [t, n, 4, h]: input, forget, cell, output, in the gates' place
            acts[:, :, :2].sigmoid_()
            acts[:, :, 2].tanh_()
            acts[:, :, 3].sigmoid_()
            c = acts[:, :, 0] * acts[:, :, 2]
            last = c0.detach()
            for t in range(len(c)):
                last = c[t].addcmul_(acts[t, :, 1], last)
    flat, chain = acts.flatten(2), w_hh.detach()
    from_x, from_h = known_linear(x, w_ih, b_ih, flat), known_linear(h_prev, w_hh, b_hh, flat)
    projected = None if w_hr is None else known_linear(acts[:, :, 3] * c.tanh(), w_hr, None, h)
    return _LSTMStates.apply(  # type: ignore[no-any-return]
        from_x, from_h, projected, h0, c0, chain, None if w_hr is None else w_hr.detach(), h, c, acts
    )


def _looped(
    x: Tensor, h0: Tensor, c0: Tensor, weights: Sequence[Tensor], biased: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An LSTM on a CPU, a position at a time: every h before and after [t, n, p], c [t, n, h] and the gates' values
    [t, n, 4, h]. The fused kernel keeps the gates for itself, and to compute them again costs more than this loop.

    All four gates are sigmoids, one of them of z doubled (exactly, in the weights), for tanh z = 2 sigmoid(2 z) − 1.
    """
    w_ih, w_hh = weights[:2]
    (steps, n, _), width, size = x.shape, c0.shape[-1], h0.shape[-1]
    doubled = x.new_ones(4, 1).index_fill_(0, torch.tensor(2), 2.0).expand(4, width).flatten()
    bias = (weights[2] + weights[3]) * doubled if biased else x.new_zeros(4 * width)
    begin, chain = ((w * doubled[:, None]).T.contiguous() for w in (w_ih, w_hh))
    to_h = weights[-1].T if len(weights) in (3, 5) else None
    acts, h, c = x.new_empty(steps, n, 4, width), x.new_empty(steps + 1, n, size), x.new_empty(steps, n, width)
    h[0] = last_h = h0
    last_c, tanh_c, minus_one = c0, x.new_empty(n, width), x.new_full((), -1.0)
    for start in range(0, steps, _BLOCK):
        block = slice(start, start + _BLOCK)
        flat = acts[block].flatten(2)
        torch.addmm(bias, x[block].flatten(0, 1), begin, out=flat.flatten(0, 1))
        every = (flat, *acts[block].unbind(2), h[1:][block], c[block])
        for z, i, f, g, o, h_t, c_t in zip(*(of.unbind() for of in every), strict=True):
            z.addmm_(last_h, chain).sigmoid_()
            torch.add(minus_one, g, alpha=2, out=g)
            last_c = torch.mul(f, last_c, out=c_t).addcmul_(i, g)
            torch.mul(last_c, 2, out=tanh_c).sigmoid_()
            torch.add(minus_one, tanh_c, alpha=2, out=tanh_c)
            if to_h is None:
                last_h = torch.mul(o, tanh_c, out=h_t)
            else:
                last_h = torch.mm(tanh_c.mul_(o), to_h, out=h_t)
    return h[:-1], h[1:], c, acts


def _stepwise(
    mode: str, x: Tensor, state: tuple[Tensor, ...], weights: tuple[Any, ...], w_hr: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`_direction` one position at a time: for subclasses of Tensor, which no ``autograd.Function`` can follow."""
    outputs: list[list[Tensor]] = [[], []]
    h, c = state[0], state[-1]
    for step in x.unbind(0):
        if mode == "LSTM":
            h, c = lstm_cell(step, (h, c), *weights)
            h = h if w_hr is None else F.linear(h, w_hr)
            outputs[1].append(c)
        else:
            run = {"GRU": gru_cell, "RNN_TANH": rnn_tanh_cell, "RNN_RELU": rnn_relu_cell}[mode]
            h = run(step, h, *weights)
        outputs[0].append(h)
    return torch.stack(outputs[0]), torch.stack(outputs[1]) if outputs[1] else None


def _layers(
    mode: str,
    x: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    biased: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    lengths: _Lengths | None = None,
) -> tuple[Tensor, ...]:
    """All layers on x [t, n, i] (or packed data, with `lengths`): the output and the last states [layers, n, ·]."""
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    rows = x if lengths is None else lengths.pad(x)
    # What is the same for all records (a parameter, zeros) becomes these records' own where it meets what is theirs.
    rows = rows if type(rows) is Tensor else rows + torch.zeros_like(hx[0][:1, :, :1])
    rows = rows.contiguous()  # [n, t, i] seen as [t, n, i] would be multiplied position by position
    like = torch.zeros_like(rows[:1, :, :1])  # [1, n, 1]
    states = [s + like for s in hx]
    last: list[list[Tensor]] = [[] for _ in hx]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            own = weights[k * each : (k + 1) * each]
            y = rows if not direction else rows.flip(0) if lengths is None else lengths.flip(rows)
            h, c = _direction(mode, y, tuple(s[k] for s in states), own, biased)
            for found, v in zip(last, (h, c), strict=False):
                assert v is not None
                found.append(v[-1] if lengths is None else lengths.last(v))
            outputs.append(h if not direction else h.flip(0) if lengths is None else lengths.flip(h))
        rows = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < num_layers - 1:
            if lengths is None:
                rows = F.dropout(rows, dropout, train)
            else:
                rows = lengths.pad(F.dropout(lengths.pack(rows), dropout, train))
    return (rows if lengths is None else lengths.pack(rows), *(torch.stack(v) for v in last))


class _Lengths:
    """Between packed data [Σ lengths, ·] and rows [t, n, ·] in which every record starts at t = 0.

    t is even, so that it never changes from n to n - 1 when a record is left out: who looks for the dimension of the
    records by leaving one out finds one only.
    """

    def __init__(self, batch_sizes: Tensor, order: Tensor | None, device: torch.device) -> None:
        sizes = F.pad(batch_sizes.to(device), (0, len(batch_sizes) % 2))
        column = torch.arange(int(batch_sizes[0]), device=device)
        if order is not None:
            column = order  # record r lies in column order[r]
        start = sizes.cumsum(0) - sizes
        self.valid = column < sizes[:, None]  # [t, n]
        self.where = torch.where(self.valid, start[:, None] + column, 0)
        self.length = self.valid.sum(0)  # [n]
        t = torch.arange(len(sizes), device=device)[:, None]
        self.mirror = torch.where(self.valid, self.length - 1 - t, t)
        self.back = torch.empty(int(sizes.sum()), dtype=torch.long, device=device)
        self.back[self.where[self.valid]] = self.valid.flatten().nonzero().flatten()

    def pad(self, x: Tensor) -> Tensor:
        return x[self.where] * self.valid[..., None]

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[self.back]

    def flip(self, x: Tensor) -> Tensor:
        return x.gather(0, self.mirror[..., None].expand_as(x))

    def last(self, x: Tensor) -> Tensor:
        return x.gather(0, (self.length - 1)[None, :, None].expand(1, -1, x.shape[-1]))[0]


def _function(mode: str) -> Any:
    def run(x: Tensor, *rest: Any, order: Tensor | None = None) -> tuple[Tensor, ...]:
        """What ``torch.lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu`` compute, in both of their signatures.

        (x, hx, weights, biased, layers, dropout, train, bidirectional, batch_first) or, packed,
        (data, batch_sizes, hx, weights, biased, layers, dropout, train, bidirectional).

        With ``order`` (a packed sequence's ``unsorted_indices``) the states, given and returned, are in the records'
        own order rather than in the order of their lengths.
        """
        if not isinstance(rest[2], bool):
            batch_sizes, hx, *packed = rest
            lengths = _Lengths(batch_sizes, order, x.device)
            return _layers(mode, x, hx if mode == "LSTM" else (hx,), *packed, lengths)  # type: ignore[call-arg]
        hx, *others, batch_first = rest
        if x.dim() != 3:
            raise ValueError(
                f"{mode}: the input has {x.dim()} dimensions; without a dimension of records no gradient belongs to a "
                "record. Pass [n, t, i] or [t, n, i]."
            )
        out, *last = _layers(mode, x.transpose(0, 1) if batch_first else x, hx if mode == "LSTM" else (hx,), *others)
        return (out.transpose(0, 1) if batch_first else out, *last)

    run.__name__ = mode.lower()
    return run


lstm, gru, rnn_tanh, rnn_relu = (_function(mode) for mode in ("LSTM", "GRU", "RNN_TANH", "RNN_RELU"))


class _Recurrent(nn.RNNBase):
    """The forward that the three layers share."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """See torch's layer of the same name; input without a dimension of records is refused."""
        packed = isinstance(input, PackedSequence)
        data = input.data if isinstance(input, PackedSequence) else input
        sizes = input.batch_sizes if isinstance(input, PackedSequence) else None
        order = input.unsorted_indices if isinstance(input, PackedSequence) else None
        if not packed and data.dim() != 3:
            raise ValueError(
                f"{type(self).__name__}: the input has {data.dim()} dimensions; without a dimension of records no "
                "gradient belongs to a record. Pass [n, t, i] (batch_first) or [t, n, i]."
            )
        if hx is None:
            n = int(sizes[0]) if sizes is not None else data.shape[0 if self.batch_first else 1]
            k = self.num_layers * (2 if self.bidirectional else 1)
            h0 = data.new_zeros(k, n, self.proj_size or self.hidden_size)
            hx = (h0, data.new_zeros(k, n, self.hidden_size)) if self.mode == "LSTM" else h0
        self.check_forward_args(data, hx, sizes)
        run = {"LSTM": lstm, "GRU": gru, "RNN_TANH": rnn_tanh, "RNN_RELU": rnn_relu}[self.mode]
        weights = [getattr(self, name) for name in self._flat_weights_names]
        others = (weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if sizes is None:
            out, *last = run(data, hx, *others, self.batch_first)
        else:  # states are in the records' own order, here and in the result
            out, *last = run(data, sizes, hx, *others, order=order)
        state = tuple(last) if self.mode == "LSTM" else last[0]
        if isinstance(input, PackedSequence):
            return PackedSequence(out, input.batch_sizes, input.sorted_indices, input.unsorted_indices), state
        return out, state


class LSTM(_Recurrent, nn.LSTM):
    """``torch.nn.LSTM``: same constructor, parameters and results.

    >>> y, (h, c) = LSTM(3, 4, batch_first=True)(torch.randn(2, 5, 3))
    >>> list(y.shape)
    [2, 5, 4]
    """


class GRU(_Recurrent, nn.GRU):
    """``torch.nn.GRU``: same constructor, parameters and results."""


class RNN(_Recurrent, nn.RNN):
    """``torch.nn.RNN``: same constructor, parameters and results."""
