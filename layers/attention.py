"""Multi-head attention whose parameters meet the data in linear maps only.

Letters: l query position, s key position, n record, e width, h head, d width of a head (e = h d).

torch's own attention cuts its packed projection [3e, e] into slices when queries, keys and values differ. Here the
whole matrix is applied in one `F.linear`, to the concatenation of the inputs, and the result is cut instead: the same
numbers, and each parameter has one use that a per-sample gradient can be read off. The price is that the parts of the
product that are cut away are computed too (three times the projection's work in cross-attention, none in
self-attention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``torch.nn.functional.multi_head_attention_forward`` computes, argument by argument.

    Args:
        query, key, value: [l, n, e], [s, n, e], [s, n, e]; or without n.
        key_padding_mask: [n, s], bool (True: ignored) or float (added).
        attn_mask: [l, s] or [n h, l, s], bool (True: ignored) or float (added).
        static_k, static_v: [n h, s, d], keys and values to use instead of the projected ones.

    Returns:
        [l, n, e] and, if ``need_weights``, [n, l, s] (averaged over heads) or [n, h, l, s]; without n as the input.
    """
    F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, num_heads)  # type: ignore[attr-defined]
    batched = query.dim() == 3
    if not batched:
        same = query is key, key is value
        query = query.unsqueeze(1)
        key = query if same[0] else key.unsqueeze(1)
        value = key if same[1] else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    n, e = query.shape[1:]
    if e != embed_dim_to_check or e % num_heads:
        raise ValueError(f"the query's width is {e}; embed_dim is {embed_dim_to_check}, with {num_heads} heads")
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask and needs it; pass the causal attn_mask as well")
    if use_separate_proj_weight:
        q, k, v = _separate(query, key, value, q_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias)
    else:
        q, k, v = _packed(query, key, value, in_proj_weight, in_proj_bias)

    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # the kernel knows the causal mask
    else:
        attn_mask = _additive(attn_mask, query.dtype)
        is_causal = is_causal and key_padding_mask is None
    key_padding_mask = _additive(key_padding_mask, query.dtype)
    appended = 0
    if bias_k is not None and bias_v is not None:  # one more key and value, the same for all records
        if static_k is not None or static_v is not None:
            raise ValueError("bias_k and bias_v cannot be added to static_k and static_v")
        k = torch.cat([k, torch.zeros_like(k[:1]) + bias_k])
        v = torch.cat([v, torch.zeros_like(v[:1]) + bias_v])
        appended += 1
    q = q.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)  # [n, h, l, d]
    k = _heads(k, static_k, n, num_heads)
    v = _heads(v, static_v, n, num_heads)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        appended += 1
    mask = _merged(attn_mask, key_padding_mask, n, num_heads, appended)

    p = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, p) if p > 0 else weights
        y = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal)
    y = F.linear(y.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if not batched:
        y, weights = y.squeeze(1), None if weights is None else weights.squeeze(0)
    return y, weights


def _packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections by one matrix [3e, e], used whole."""
    if weight is None or key.shape != value.shape:
        raise ValueError(
            f"a packed projection needs in_proj_weight and keys and values of one shape; saw {list(key.shape)}, "
            f"{list(value.shape)}"
        )
    if query is key and key is value:
        q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        return q, k, v
    e, t, s = query.shape[-1], query.shape[0], key.shape[0]
    apart = key is not value
    y = F.linear(torch.cat([query, key, value] if apart else [query, key]), weight, bias)
    return y[:t, :, :e], y[t : t + s, :, e : 2 * e], y[t + s * apart :, :, 2 * e :]


def _separate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections by matrices of their own [e, e], [e, kdim], [e, vdim]; the bias [3e] is one."""
    if q_weight is None or k_weight is None or v_weight is None or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            "separate projections need q_proj_weight, k_proj_weight, v_proj_weight, and as many keys as values; saw "
            f"{list(key.shape)}, {list(value.shape)}"
        )
    q, k, v = F.linear(query, q_weight), F.linear(key, k_weight), F.linear(value, v_weight)
    if bias is not None:
        b_q, b_k, b_v = bias.chunk(3)
        q, k, v = q + b_q, k + b_k, v + b_v
    return q, k, v


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as numbers to add: -inf where a bool mask says True."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool (True: ignored) or floating (added), not {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _heads(x: Tensor, static: Tensor | None, n: int, h: int) -> Tensor:
    """[s, n, e], or the static [n h, s, d] in its place, as [n, h, s, d]."""
    if static is not None:
        return static.reshape(n, h, *static.shape[1:])
    return x.reshape(*x.shape[:-1], h, -1).permute(1, 2, 0, 3)


def _merged(attn_mask: Tensor | None, padding: Tensor | None, n: int, h: int, appended: int) -> Tensor | None:
    """Both masks as one that broadcasts to [n, h, l, s]; appended keys are seen by all."""
    if attn_mask is not None:
        attn_mask = attn_mask.view(n, h, *attn_mask.shape[1:]) if attn_mask.dim() == 3 else attn_mask[None, None]
        attn_mask = F.pad(attn_mask, (0, appended))
    if padding is not None:
        padding = F.pad(padding, (0, appended))[:, None, None]
    if attn_mask is None or padding is None:
        return attn_mask if padding is None else padding
    both: Tensor = attn_mask + padding
    return both


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` (same constructor, parameters and results) by `multi_head_attention`.

    dpkit's engine takes torch's own module apart in the same way, so a model need not be changed for it; this class is
    for other libraries that see a layer's parameters only through linear maps.

    >>> attention = MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 8)
    >>> [list(v.shape) for v in attention(x, x, x)]
    [[3, 5, 8], [3, 5, 5]]
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``torch.nn.MultiheadAttention.forward``."""
        turned = self.batch_first and query.dim() == 3
        if turned:
            same = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same[0] else key.transpose(0, 1)
            value = key if same[1] else value.transpose(0, 1)
        y, weights = multi_head_attention(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return y.transpose(0, 1) if turned else y, weights
