"""Attention equals torch's for every argument, and its per-record gradients are exact through the engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpkit.layers import MultiheadAttention, multi_head_attention
from tests.cases import squared
from tests.oracle import clipped_sum, norm
from tests.stepping import median_norm, private_step

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """A module's constructor arguments and the kind of call."""
    heads = draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 3))
    own = draw(st.booleans())
    return {
        "make": {
            "embed_dim": width,
            "num_heads": heads,
            "bias": draw(st.booleans()),
            "add_bias_kv": draw(st.booleans()),
            "add_zero_attn": draw(st.booleans()),
            "kdim": draw(st.sampled_from([None, 4, 5])) if own else None,
            "vdim": draw(st.sampled_from([None, 4, 7])) if own else None,
            "batch_first": draw(st.booleans()),
        },
        "l": draw(st.integers(1, 5)),
        "s": draw(st.integers(1, 5)),
        "n": draw(st.sampled_from([None, 1, 2, 3])),
        "inputs": "three" if own else draw(st.sampled_from(["self", "two", "three"])),
        "padding": draw(st.sampled_from([None, "bool", "float"])),
        "mask": draw(st.sampled_from([None, "bool", "float", "bool per record", "float per record", "causal"])),
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
    }


def call(option: dict[str, Any], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Inputs and keyword arguments for `option`; no query has all its keys masked by bool masks."""
    make, t, s, n = option["make"], option["l"], option["s"], option["n"]
    e = make["embed_dim"]
    s = t if option["inputs"] == "self" else s

    def data(length: int, width: int) -> Tensor:
        shape = (length, width) if n is None else (n, length, width) if make["batch_first"] else (length, n, width)
        return torch.randn(shape, dtype=dtype)

    query = data(t, e)
    key = query if option["inputs"] == "self" else data(s, make["kdim"] or e)
    value = key if option["inputs"] != "three" else data(s, make["vdim"] or e)
    kinds: dict[str, Any] = {}
    batch = () if n is None else (n,)
    if option["padding"]:
        ignored = torch.rand(*batch, s) < 0.4
        ignored[..., 0] = False
        kinds["key_padding_mask"] = ignored if option["padding"] == "bool" else torch.randn(*batch, s, dtype=dtype)
    if option["mask"] == "causal":
        kinds |= {"attn_mask": torch.ones(t, s, dtype=torch.bool).triu(1), "is_causal": True}
    elif option["mask"]:
        rows = ((n or 1) * make["num_heads"],) if "per record" in option["mask"] else ()
        ignored = torch.rand(*rows, t, s) < 0.4
        ignored[..., 0] = False
        kinds["attn_mask"] = ignored if "bool" in option["mask"] else torch.randn(*rows, t, s, dtype=dtype)
    kinds |= {"need_weights": option["need_weights"], "average_attn_weights": option["average_attn_weights"]}
    return (query, key, value), kinds


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@settings(max_examples=150, deadline=None)
@given(option=options(), seed=st.integers(0, 99))
def test_equals_torch(dtype: torch.dtype, tolerance: float, option: dict[str, Any], seed: int) -> None:
    """Outputs, attention weights, and every gradient, whatever the arguments."""
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(**option["make"], dtype=dtype)
    ours = MultiheadAttention(**option["make"], dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    inputs, kinds = call(option, dtype)
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        y, weights = module(*inputs, **kinds)
        terms = [y.square().sum()] + ([weights.cos().sum()] if weights is not None else [])
        torch.stack(terms).sum().backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
        results.append([y, *([weights] if weights is not None else []), *grads])
    assert len(results[0]) == len(results[1])
    for k, (one, other) in enumerate(zip(*results, strict=True)):
        assert one.shape == other.shape
        # gradients are sums of as many terms as there are positions: their scale counts
        scale = max(1.0, float(one.detach().abs().nan_to_num().max())) * (1 if k == 0 else 10)
        torch.testing.assert_close(other, one, rtol=0, atol=tolerance * scale, equal_nan=True)


def test_dropout_is_the_same_draw() -> None:
    """Train mode, the same seed: the same numbers."""
    x = torch.randn(3, 5, 8)
    theirs, ours = nn.MultiheadAttention(8, 2, 0.4), MultiheadAttention(8, 2, 0.4)
    ours.load_state_dict(theirs.state_dict())
    for need_weights in (True, False):
        outputs = []
        for module in (theirs, ours):
            torch.manual_seed(1)
            outputs.append(module(x, x, x, need_weights=need_weights)[0])
        torch.testing.assert_close(*outputs)
    assert not torch.allclose(ours(x, x, x)[0], ours.eval()(x, x, x)[0])


def test_static_keys_and_values() -> None:
    """The functional's last two arguments."""
    x, static = torch.randn(4, 3, 6), torch.randn(2, 6, 5, 3)
    layer = nn.MultiheadAttention(6, 2)
    arguments = (x, x, x, 6, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, True, 0.0, layer.out_proj.weight)
    kinds: dict[str, Any] = {"static_k": static[0], "static_v": static[1]}
    for one, other in zip(
        F.multi_head_attention_forward(*arguments, layer.out_proj.bias, **kinds),
        multi_head_attention(*arguments, layer.out_proj.bias, **kinds),
        strict=True,
    ):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"is_causal": True}, "attn_mask"), ({"attn_mask": torch.ones(4, 4, dtype=torch.int)}, "bool")],
)
def test_refusals(arguments: dict[str, Any], error: str) -> None:
    """What torch refuses is refused."""
    x = torch.randn(4, 3, 6)
    with pytest.raises((RuntimeError, ValueError), match=error):
        MultiheadAttention(6, 2)(x, x, x, **arguments)


class Attends(nn.Module):
    """Attention of a given kind between two inputs (or one), with a head."""

    def __init__(self, attention: nn.Module, kinds: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.kinds = attention, kinds
        self.head = nn.Linear(attention.embed_dim, 2).to(next(attention.parameters()).dtype)

    def forward(self, x: Tensor, z: Tensor, padding: Tensor) -> Tensor:
        key = x if self.kinds["inputs"] == "self" else z
        value = key if self.kinds["inputs"] != "three" else key.flip(1)
        mask = torch.ones(x.shape[1], key.shape[1], dtype=torch.bool).triu(1) if self.kinds["causal"] else None
        x, key, value = (v if self.attention.batch_first else v.transpose(0, 1) for v in (x, key, value))
        if self.kinds["inputs"] == "self":
            key = value = x
        y = self.attention(
            x,
            key,
            value,
            key_padding_mask=padding if self.kinds["padding"] else None,
            attn_mask=mask,
            need_weights=self.kinds["need_weights"],
            is_causal=self.kinds["causal"],
        )[0]
        return self.head(y if self.attention.batch_first else y.transpose(0, 1))


@settings(max_examples=40, deadline=None)
@given(
    make=st.fixed_dictionaries(
        {name: st.booleans() for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    ),
    kinds=st.fixed_dictionaries(
        {
            "inputs": st.sampled_from(["self", "two", "three"]),
            **{name: st.booleans() for name in ("padding", "causal", "need_weights")},
        }
    ),
    kind=st.sampled_from([nn.MultiheadAttention, MultiheadAttention]),
    n=st.sampled_from([1, 2, 4, 6]),
)
def test_private_step_is_exact(make: dict[str, Any], kinds: dict[str, Any], kind: type[nn.Module], n: int) -> None:
    """The engine's step is the definition's, for torch's own module and for ours."""
    torch.manual_seed(0)
    model = Attends(kind(6, 2, dtype=torch.float64, **make), kinds)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    padding = torch.arange(4) >= torch.randint(1, 5, (n, 1))
    batch = (
        torch.randn(n, 4, 6, dtype=torch.float64),
        torch.randn(n, 4, 6, dtype=torch.float64),
        padding,
        torch.randn(n, dtype=torch.float64),
    )

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return squared(model(*batch[:-1]), batch[-1])

    twin = copy.deepcopy(model)
    bound = median_norm(twin, losses, batch)
    total = clipped_sum(twin, losses, batch, n, bound)
    step = private_step(model, losses, batch, bound)
    assert norm({k: step[k] + total[k] / n for k in total}) <= 1e-10 * norm(total) / n


def test_taken_apart_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a private step of plain ``nn.MultiheadAttention`` no copies of the projections are made."""
    from dpkit import live

    copied: list[tuple[int, ...]] = []
    spread = live.Spread.apply

    def spy(anchor: Tensor, parameter: Tensor, *rest: Any) -> Tensor:
        copied.append(tuple(parameter.shape))
        return spread(anchor, parameter, *rest)

    monkeypatch.setattr(live.Spread, "apply", spy)
    for inputs in ("self", "two", "three"):
        kinds = {"inputs": inputs, "padding": False, "causal": False, "need_weights": False}
        model = Attends(nn.MultiheadAttention(6, 2), kinds)
        batch = (torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.zeros(3, 4, dtype=torch.bool), torch.randn(3))
        private_step(model, lambda m, b: squared(m(*b[:-1]), b[-1]), batch, 1.0)
        assert copied == []
