"""A convolution's per-sample gradients, by every way, against autograd on one record at a time in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpkit import convolved, forms
from dpkit.convolved import Convolved

CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def convolutions(draw: st.DrawFn) -> Convolved:
    """Dimensions, sizes, stride, padding, dilation and groups at random; some gradients cancel almost."""
    dims, groups, n = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 4))
    per_dim = st.lists(st.integers(1, 2), min_size=dims, max_size=dims).map(tuple)
    stride, dilation = draw(per_dim), draw(per_dim)
    padding = tuple(v - 1 for v in draw(per_dim))
    kernel = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims).map(tuple))
    out = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims).map(tuple))
    surplus = draw(st.integers(0, 1))  # pixels that no patch reaches
    sizes = [
        max(1, (t - 1) * s + d * (k - 1) + 1 - 2 * p) + surplus * (s - 1)
        for t, s, d, k, p in zip(out, stride, dilation, kernel, padding, strict=True)
    ]
    channels, o = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype, scale = draw(st.sampled_from([torch.float32, torch.float64])), draw(st.sampled_from([1e-5, 1.0, 1e5]))
    x = torch.randn(n, channels, *sizes, generator=generator, dtype=dtype)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last) if dims == 2 else x.transpose(0, 1).clone().transpose(0, 1)
    weight = torch.zeros(o, channels // groups, *kernel, dtype=dtype)
    y = CONVOLUTION[dims](x, weight, None, stride, padding, dilation, groups)
    grad = torch.randn(y.shape, generator=generator, dtype=dtype) * scale
    if draw(st.booleans()) and grad.shape[-1] > 1:  # equal patches with opposite gradients, but for a little
        x, half = torch.ones_like(x), grad.shape[-1] // 2
        rest = 1 + draw(st.sampled_from([0.0, 1e-6, 1e-3]))
        grad[..., half : 2 * half] = -rest * grad[..., :half]
    return Convolved(x, grad, tuple(weight.shape), stride, padding, dilation, groups)


def reference(form: Convolved) -> Tensor:
    """[n, p] in float64."""
    found = []
    for x, grad in zip(form.x.double(), form.grad.double(), strict=True):
        weight = torch.zeros(form.shape, dtype=torch.float64, requires_grad=True)
        how = (form.stride, form.padding, form.dilation, form.groups)
        y = CONVOLUTION[x.ndim - 1](x[None], weight, None, *how)
        found.append(torch.autograd.grad((y * grad[None]).sum(), weight)[0].flatten())
    return torch.stack(found)


def longest(form: Convolved) -> Tensor:
    """[n]: a bound on the summed lengths of the terms |g_t||a_t|."""
    g, x = form.grad.double().flatten(2).norm(dim=1).sum(1), form.x.double().flatten(1).norm(dim=1)
    return g * x


@settings(max_examples=150, deadline=None)
@given(form=convolutions(), seed=st.integers(0, 2**32))
def test_every_way_is_the_definition(form: Convolved, seed: int) -> None:
    """Norms, weighted sums, dense gradients, subsets and multiples, by each way."""
    expected, bound = reference(form), longest(form)
    tolerance = 1e-5 if form.x.dtype == torch.float32 else 1e-12
    w = torch.rand(form.n, generator=torch.Generator().manual_seed(seed))
    kept = (w > 0.5).nonzero().flatten()
    for name, way in form.ways().items():
        taken = way.take()
        gap = (taken.dense().double().flatten(1) - expected).norm(dim=1)
        assert (gap <= tolerance * bound).all(), name
        norm, true = taken.sq_norm().double().sqrt(), expected.norm(dim=1)
        eps = torch.finfo(form.x.dtype).eps
        assert (norm >= true * (1 - 1e-5) - 4 * eps * bound).all(), f"{name}: too small"
        assert (norm <= true * (1 + 1e-5) + 3 * tolerance**0.5 * bound * (true < 0.3 * bound)).all(), (
            f"{name}: too large"
        )
        some = taken.take(kept[:1]).sq_norm().double() if len(kept) else torch.empty(0)
        rounding = 1e-9 * float(bound.max()) ** 2
        torch.testing.assert_close(some, taken.sq_norm().double()[kept[:1]].to(some), rtol=1e-4, atol=rounding)
        multiples = taken.scaled(w).sq_norm().double().sqrt()
        torch.testing.assert_close(multiples, w.double() * norm, rtol=1e-3, atol=2e-4 * float(bound.max()))
        for total, weights, rows in (
            (taken.weighted_sum(w), w, expected),
            (taken.take(kept).weighted_sum(w[kept]), w[kept], expected[kept]),
            (taken.scaled(w).weighted_sum(w), w.double().square(), expected),
        ):
            assert total.shape == expected.shape[1:]
            assert (total.double() - weights.double() @ rows).norm() <= tolerance * float(bound.sum()), name


@settings(max_examples=40, deadline=None)
@given(form=convolutions())
def test_some_records_at_a_time(form: Convolved) -> None:
    """The bounds on scratch only cut the work into pieces."""
    expected, bound = reference(form), longest(form)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((convolved, "SCRATCH"), (convolved, "_RESULT"), (convolved, "_CACHED")):
            patch.setattr(module, name, 1)
        for name, way in form.ways().items():
            taken = way.take()
            norm = taken.sq_norm().double().sqrt()
            assert ((taken.dense().double().flatten(1) - expected).norm(dim=1) <= 1e-5 * bound).all(), name
            assert (norm >= expected.norm(dim=1) * (1 - 1e-5) - 1e-6 * bound).all(), name


@pytest.mark.parametrize("rest", [1e-2, 3e-3, 1e-3, 1e-4])
def test_ghost_norms_are_never_too_small_where_terms_cancel(rest: float) -> None:
    """Equal patches whose gradients are opposite but for a little: rounding is far larger than what is left.

    What adding up the terms in float32 rounds away is not there in the released sum either.
    """
    generator = torch.Generator().manual_seed(0)
    n, c, o, t = 64, 3, 4, 32
    x = torch.randn(n, c, 1, generator=generator).expand(n, c, 2 * t).contiguous()
    g = torch.randn(n, o, t, generator=generator)
    form = Convolved(x, torch.cat([g, -(1 + rest) * g], 2), (o, c, 1), (1,), (0,), (1,), 1)
    true = reference(form).norm(dim=1)
    terms = form.grad.double().norm(dim=1).sum(1) * x[:, :, 0].double().norm(dim=1)
    rounded_away = 4 * torch.finfo(torch.float32).eps * terms
    assert (form.sq_norm().double().sqrt() >= true * (1 - 1e-5) - rounded_away).all()
    assert (form.lengths().double() >= terms * (1 - 1e-5)).all()


@pytest.mark.parametrize("t", [1, 63, 64, 127, 130, 300])
def test_gram_blocks(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences take the ghost norm in blocks, and few records at a time."""
    g, a = torch.randn(3, 2, t, 4, dtype=torch.float64), torch.randn(3, 2, t, 5, dtype=torch.float64)
    form = forms.Outer(g, a)
    expected = form.dense().flatten(1).square().sum(1)
    torch.testing.assert_close(form.sq_norm(), expected)
    monkeypatch.setattr(forms, "SCRATCH", 1)
    torch.testing.assert_close(form.sq_norm(), expected)


@pytest.mark.parametrize("size", [7, 14, 28])
@pytest.mark.parametrize("pixel", [0.3, 0.77])
def test_ghost_norms_of_blank_images(pixel: float, size: int) -> None:
    """All products are the same number, of which a long dot product loses more than is promised."""
    x, grad = torch.full((2, 16, size, size), pixel), torch.full((2, 8, size, size), 0.013)
    form = Convolved(x, grad, (8, 16, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    exact = size**4 * x[0].double().square().mean() * grad[0].double().square().mean() * 16 * 8
    assert torch.allclose(form.sq_norm().double(), exact, rtol=1e-5)


def test_half_precision() -> None:
    """In bfloat16 every way adds up in float32."""
    x, grad = torch.ones(2, 1, 64, 64, dtype=torch.bfloat16), torch.ones(2, 1, 64, 64, dtype=torch.bfloat16)
    form = Convolved(x, grad, (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    for way in form.ways().values():
        taken = way.take()
        assert taken.sq_norm().tolist() == [4096.0**2] * 2
        assert taken.weighted_sum(torch.ones(2)).tolist() == [8192.0]
