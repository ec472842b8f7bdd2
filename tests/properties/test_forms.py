"""Forms against their definition: whatever is computed without `dense()` agrees with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpkit.forms import Dense, Form, Outer, Routed, Rows
from dpkit.joined import Joined, joined

SIZES = st.integers(1, 5)
DTYPES = st.sampled_from([torch.float32, torch.float64])
SCALES = st.sampled_from([1e-6, 1.0, 1e6])


def reference(form: Form) -> Tensor:
    """[n, p]: the per-sample gradients in float64."""
    match form:
        case Dense(value):
            return value.double().flatten(1)
        case Outer(g, a) if g.ndim == 2:
            return torch.einsum("no,ni->noi", g.double(), a.double()).flatten(1)
        case Outer(g, a):
            return torch.einsum("n...to,n...ti->n...oi", g.double(), a.double()).flatten(1)
        case Rows(index, g, v):
            out = torch.zeros(len(index), v, g.shape[-1], dtype=torch.float64)
            for n in range(index.shape[0]):
                for t in range(index.shape[1]):
                    out[n, index[n, t]] += g[n, t].double()
            return out.flatten(1)
        case Routed(index, g, a, m):
            out = torch.zeros(len(index), m, g.shape[-1], a.shape[-1], dtype=torch.float64)
            for n in range(index.shape[0]):
                for t in range(index.shape[1]):
                    out[n, index[n, t]] += torch.outer(g[n, t].double(), a[n, t].double())
            return out.flatten(1)
        case Joined(parts):
            return torch.stack([reference(p) for p in parts]).sum(0)
    raise TypeError(form)


def terms(form: Form) -> Tensor:
    """[n]: the summed lengths of all terms: what rounding is measured against."""
    match form:
        case Outer(g, a):
            return (g.double().norm(dim=-1) * a.double().norm(dim=-1)).view(len(g), -1).sum(1)
        case Rows(_, g, _):
            return g.double().norm(dim=-1).sum(1)
        case Routed(_, g, a, _):
            return (g.double().norm(dim=-1) * a.double().norm(dim=-1)).sum(1)
        case Joined(parts):
            return torch.stack([terms(p) for p in parts]).sum(0)
    return reference(form).norm(dim=1)


@st.composite
def forms(draw: st.DrawFn, kinds: str = "dporsxmj", n: int | None = None, shape: tuple[int, int] | None = None) -> Form:
    """A form of a kind: d(ense), p(roduct), o(uter), r(ows), s(tacked outer), x (routed), m(erged), j(oined)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    n = draw(SIZES) if n is None else n
    o, i = (draw(SIZES), draw(SIZES)) if shape is None else shape
    t, dtype, scale = draw(SIZES), draw(DTYPES), draw(SCALES)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype) * scale

    def cancelling(x: Tensor) -> Tensor:
        """Perhaps with its second half the negative of the first, but for a little."""
        if t > 1 and draw(st.booleans()):
            x[..., t // 2 : 2 * (t // 2), :] = -x[..., : t // 2, :] * (1 + draw(st.sampled_from([0.0, 1e-3, 1e-6])))
        return x

    kind = draw(st.sampled_from(kinds))
    if kind == "d":
        return Dense(normal(n, o, i))
    if kind == "p":
        return Outer(normal(n, o), normal(n, i))
    if kind == "o":
        a = normal(n, t, i)
        a[:, t // 2 : 2 * (t // 2)] = a[:, : t // 2]
        return Outer(cancelling(normal(n, t, o)), a)
    if kind == "s":
        return Outer(normal(n, 2, t, o), normal(n, 2, t, i))
    if kind == "r":
        index = torch.randint(0, o, (n, t), generator=generator)
        index[:, t // 2 : 2 * (t // 2)] = index[:, : t // 2]
        return Rows(index, cancelling(normal(n, t, i)), o)
    if kind == "x":
        m = draw(SIZES)
        a = normal(n, t, i)
        a[:, t // 2 : 2 * (t // 2)] = a[:, : t // 2]
        index = torch.randint(0, m, (n, t), generator=generator)
        index[:, t // 2 : 2 * (t // 2)] = index[:, : t // 2]
        same = [Routed(index, cancelling(normal(n, t, o)), a, m)]
        if draw(st.booleans()):
            same.append(Routed(index.flip(1), normal(n, t, o), normal(n, t, i), m))
        return joined(same)
    merged = draw(st.lists(forms(kinds="dpor" if kind == "j" else "po", n=n, shape=(o, i)), min_size=2, max_size=3))
    if draw(st.booleans()) and isinstance(merged[0], Outer):
        merged.append(Outer(-merged[0].g, merged[0].a))  # the first use is cancelled by another
    if kind == "j" and draw(st.booleans()):  # all uses are cancelled by one of another kind, but for a little
        rest = 1 + draw(st.sampled_from([0.0, 1e-5, 1e-3]))
        merged.append(Dense(-rest * sum(f.dense() for f in merged)))  # type: ignore[arg-type]
    kinds_of = {v.dtype for f in merged for v in vars(f).values() if isinstance(v, Tensor) and v.is_floating_point()}
    return joined(merged) if len(kinds_of) == 1 else merged[0]


def rounding(form: Form) -> float:
    """A bound on the relative rounding of one term."""
    match form:
        case Joined(parts):
            return max(rounding(p) for p in parts)
    narrow = any(v.dtype == torch.float32 for v in vars(form).values() if isinstance(v, Tensor))
    return 1e-5 if narrow else 1e-13


@settings(max_examples=200, deadline=None)
@given(form=forms())
def test_dense(form: Form) -> None:
    """`dense()` is the definition."""
    expected = reference(form)
    gap = (form.dense().double().flatten(1) - expected).norm(dim=1)
    assert (gap <= rounding(form) * terms(form)).all()


@settings(max_examples=300, deadline=None)
@given(form=forms())
def test_norm_is_never_too_small(form: Form) -> None:
    """Cancellation included: a norm below the true one would let a record exceed the clipping bound.

    What adding up the terms in their own dtype rounds away is not there in the released sum either.
    """
    true, reported = reference(form).norm(dim=1), form.sq_norm().double().sqrt()
    rounded_away = 4 * torch.finfo(form.sq_norm().dtype).eps * terms(form)
    assert (reported >= true * (1 - 1e-5) - rounded_away).all()


@settings(max_examples=300, deadline=None)
@given(form=forms())
def test_norm_is_accurate(form: Form) -> None:
    """Where terms do not cancel, norms are exact; where they do, the excess is bounded by rounding of the terms."""
    true, reported = reference(form).norm(dim=1), form.sq_norm().double().sqrt()
    slack = 1e-5 * true + 3 * rounding(form) ** 0.5 * terms(form) * (true < 0.3 * terms(form))
    assert (reported <= true + slack + 1e-30).all()


@settings(max_examples=200, deadline=None)
@given(form=forms(), seed=st.integers(0, 2**32))
def test_weighted_sum(form: Form, seed: int) -> None:
    """`weighted_sum(w)` is the sum over records of w times the gradient, and `take` a subset of the records."""
    w = torch.rand(form.n, generator=torch.Generator().manual_seed(seed))
    expected, size = w.double() @ reference(form), float(terms(form).sum())
    assert (form.weighted_sum(w).double() - expected).norm() <= rounding(form) * size
    kept = (w > 0.5).nonzero().flatten()
    assert (form.take(kept).weighted_sum(w[kept]).double() - w[kept].double() @ reference(form)[kept]).norm() <= (
        rounding(form) * size
    )


@settings(max_examples=100, deadline=None)
@given(form=forms(kinds="dorsx"), k=st.integers(1, 3))
def test_folded(form: Form, k: int) -> None:
    """`folded(k)`: each k rows in a row are one record."""
    many = form.take(torch.arange(form.n).repeat_interleave(k))
    gap = many.folded(k).dense().double().flatten(1) - k * reference(form)
    assert (gap.norm(dim=1) <= k * rounding(form) * terms(form)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    """4,096 equal terms: float16 sums would overflow, bfloat16 sums would stop growing at 256."""
    ones = torch.ones(1, 4096, 2, dtype=dtype)
    for form in (Outer(ones, ones), Rows(torch.zeros(1, 4096, dtype=torch.long), ones, 2)):
        assert form.dense().dtype == torch.float32
        torch.testing.assert_close(form.sq_norm(), reference(form).square().sum(1).float())
    total = Dense(torch.ones(4096, 3, dtype=dtype)).weighted_sum(torch.ones(4096))
    torch.testing.assert_close(total, torch.full((3,), 4096.0))


@pytest.mark.parametrize("p", [5000, 65_537, 1 << 20, (1 << 22) + 7])
@pytest.mark.parametrize("square", [0.1, 0.3, 0.7])
def test_long_rows_of_numbers_that_are_alike(square: float, p: int) -> None:
    """Their squares, added up one after the other in float32, lose percents: more than the bound may be exceeded by."""
    row = torch.full((2, p), square**0.5)
    exact = row[0, 0].double() ** 2 * p
    assert torch.allclose(Dense(row).sq_norm().double(), exact, rtol=1e-5)
    assert torch.allclose(Outer(row, row[:, :3]).sq_norm().double(), exact * 3 * square, rtol=1e-5)
    assert torch.allclose(Rows(torch.tensor([[0], [1]]), row[:, None], 2).sq_norm().double(), exact, rtol=1e-5)


def test_perfect_cancellation_is_bounded() -> None:
    """g ⊗ a − g ⊗ a is 0; its ghost norm may be reported as positive, never as NaN or negative."""
    g, a = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    norm = Outer(torch.cat([g, -g], 1), torch.cat([a, a], 1)).sq_norm()
    assert torch.isfinite(norm).all()
    assert (norm >= 0).all()


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_the_table_are_refused(row: int) -> None:
    """A user's rule may give any; scipy would write into other memory."""
    form = Rows(torch.tensor([[0, row]]), torch.ones(1, 2, 3), 5)
    with pytest.raises(IndexError, match=f"{min(row, 0)} to {max(row, 0)} of a table of 5"):
        form.weighted_sum(torch.ones(1))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_rows_of_nobody(shape: tuple[int, int]) -> None:
    form = Rows(torch.zeros(shape, dtype=torch.int64), torch.ones(*shape, 2), 5)
    assert torch.equal(form.weighted_sum(torch.ones(shape[0])), torch.zeros(10))
