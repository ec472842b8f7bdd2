"""Embedding and EmbeddingBag equal torch's for every option, and are exact through the engine without large tables."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import dpkit
from dpkit.layers import Embedding, EmbeddingBag, embedding_bag
from tests.cases import squared
from tests.oracle import clipped_sum, norm
from tests.stepping import median_norm, private_step


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(["sum", "mean", "max"]),
    padding=st.sampled_from([None, 0, -1]),
    last=st.booleans(),
    weighted=st.booleans(),
    sizes=st.one_of(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_equals_torch(
    mode: str, padding: int | None, last: bool, weighted: bool, sizes: list[int] | int, seed: int
) -> None:
    """Outputs and gradients: bags as rows or by offsets, empty ones, duplicates, padding, weights."""
    torch.manual_seed(seed)
    theirs, ours = (
        kind(5, 3, mode=mode, padding_idx=padding, include_last_offset=last, dtype=torch.float64)
        for kind in (nn.EmbeddingBag, EmbeddingBag)
    )
    ours.load_state_dict(theirs.state_dict())
    if isinstance(sizes, int):
        entries, offsets = torch.randint(0, 5, (3, sizes)), None
    else:
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        entries, offsets = torch.randint(0, 5, (int(bounds[-1]),)), bounds if last else bounds[:-1]
    weights = None
    if weighted and mode == "sum":
        weights = torch.randn(entries.shape, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        if weights is not None:
            weights.grad = None
        y = module(entries, offsets, weights)
        y.cos().sum().backward()
        results.append([y, module.weight.grad, *([weights.grad] if weights is not None else [])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    padding=st.sampled_from([None, 0, -1]),
    sparse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_embedding_equals_torch(
    shape: list[int], padding: int | None, sparse: bool, dtype: torch.dtype, index: torch.dtype
) -> None:
    """The same look-up; the constructor takes the same arguments, `from_pretrained` included."""
    theirs = nn.Embedding(5, 3, padding, sparse=sparse, dtype=dtype)
    ours = Embedding(5, 3, padding, sparse=sparse, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randint(0, 5, shape, dtype=index)
    grads = []
    for module in (theirs, ours):
        module(x).cos().sum().backward()
        grads.append(module.weight.grad)
    assert torch.equal(ours(x), theirs(x))
    assert grads[0].is_sparse == grads[1].is_sparse == sparse
    assert torch.equal(*(g.to_dense() for g in grads))
    assert torch.equal(Embedding.from_pretrained(theirs.weight.detach())(x), theirs(x))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_sparse_bag(mode: str) -> None:
    """``sparse=True``: the gradient of the table is sparse, as torch's."""
    theirs, ours = (kind(5, 3, mode=mode, sparse=True) for kind in (nn.EmbeddingBag, EmbeddingBag))
    ours.load_state_dict(theirs.state_dict())
    grads = []
    for module in (theirs, ours):
        module(torch.tensor([[0, 0, 3], [1, 2, 2]])).cos().sum().backward()
        grads.append(module.weight.grad)
    assert grads[1].is_sparse
    torch.testing.assert_close(*(g.to_dense() for g in grads))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("kind", [Embedding, EmbeddingBag])
def test_refusals(kind: type[nn.Module], option: dict[str, Any]) -> None:
    """What couples records is refused, by the constructor and by the function."""
    with pytest.raises(ValueError, match="Leave them out"):
        kind(5, 3, **option)
    with pytest.raises(ValueError, match="Leave them out"):
        embedding_bag(torch.zeros(2, 2, dtype=torch.long), torch.zeros(5, 3), **option)


def test_refusals_of_the_arguments() -> None:
    """What torch refuses is refused."""
    table, entries = torch.randn(5, 3), torch.tensor([0, 1, 2])
    for arguments, error in (
        ({"mode": "median"}, "median"),
        ({"mode": "mean", "per_sample_weights": torch.ones(3)}, "per_sample_weights"),
        ({"offsets": None}, "offsets"),
        ({"offsets": torch.tensor([1])}, "the first one at 0"),
        ({"input": entries[None], "offsets": torch.tensor([0])}, "rows"),
    ):
        with pytest.raises(ValueError, match=error):
            embedding_bag(**{"input": entries, "offsets": torch.tensor([0]), "weight": table, **arguments})


class Bags(nn.Module):
    """Bags of words given as padded rows with lengths, or with weights; laid end to end inside the model."""

    def __init__(self, kind: type[nn.EmbeddingBag], how: str, words: int = 7, **options: Any) -> None:
        super().__init__()
        self.bag = kind(words, 4, include_last_offset=how == "last", **options)
        self.head, self.how = nn.Linear(4, 2), how

    def forward(self, x: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
        if self.how == "rows":
            return self.head(self.bag(x))
        if self.how == "weights":
            return self.head(self.bag(x, per_sample_weights=weights))
        there = torch.arange(x.shape[1]) < lengths[:, None]
        ends = lengths.cumsum(0)
        offsets = F.pad(ends, (1, 0)) if self.how == "last" else ends - lengths
        return self.head(self.bag(x[there], offsets))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([nn.EmbeddingBag, EmbeddingBag]),
    mode=st.sampled_from(["sum", "mean", "max"]),
    how=st.sampled_from(["rows", "offsets", "last", "weights"]),
    padding=st.sampled_from([None, 0, -1]),
    n=st.sampled_from([1, 2, 3, 4, 7]),
    seed=st.integers(0, 9),
)
def test_private_step_is_exact(
    kind: type[nn.EmbeddingBag], mode: str, how: str, padding: int | None, n: int, seed: int
) -> None:
    """The engine's step is the definition's: duplicates, padding, weights, empty bags, every mode and form of input."""
    torch.manual_seed(seed)
    model = Bags(kind, how, mode="sum" if how == "weights" else mode, padding_idx=padding).double()
    batch = (
        torch.randint(0, 7, (n, 5)),
        torch.randint(0, 6, (n,)),
        torch.randn(n, 5, dtype=torch.float64),
        torch.randn(n, dtype=torch.float64),
    )

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return squared(model(*batch[:-1]), batch[-1])

    twin = copy.deepcopy(model)
    bound = median_norm(twin, losses, batch)
    total = clipped_sum(twin, losses, batch, n, bound)
    step = private_step(model, losses, batch, bound)
    assert norm({k: step[k] + total[k] / n for k in total}) <= 1e-10 * norm(total) / n


def test_the_longest_bag_is_as_long_as_there_are_records() -> None:
    """Without the last record bags are one shorter as well: the records are still found."""
    model = Bags(nn.EmbeddingBag, "offsets", mode="sum")
    batch = (torch.randint(0, 7, (3, 5)), torch.tensor([1, 2, 3]), torch.randn(3, 5), torch.randn(3))
    private_step(model, lambda m, b: squared(m(*b[:-1]), b[-1]), batch, 1.0)


class EndToEnd(nn.Module):
    """Called on bags that were laid end to end by the collate function, as torch's tutorial does."""

    def __init__(self, kind: type[nn.EmbeddingBag]) -> None:
        super().__init__()
        self.bag, self.head = kind(7, 4), nn.Linear(4, 2)

    def forward(self, entries: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.bag(entries, offsets))


def end_to_end(bags: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Entries and offsets."""
    lengths = torch.tensor([len(bag) for bag in bags])
    return torch.cat(bags), lengths.cumsum(0) - lengths


@pytest.mark.parametrize("kind", [nn.EmbeddingBag, EmbeddingBag])
def test_bags_laid_end_to_end_outside_are_refused(kind: type[nn.EmbeddingBag]) -> None:
    """A record cannot be left out of them; the error says to lay them inside."""
    model = EndToEnd(kind)
    loader = DataLoader([torch.randint(0, 7, (k,)) for k in (3, 1, 4)], batch_size=3, collate_fn=end_to_end)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dpkit.PrivacyEngine()
    _, _, private = engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(dpkit.PrivacyError, match="bag is given offsets, and entries") as refusal:
        model(*next(iter(private)))
    assert "in its forward" in refusal.value.cure


class Largest(TorchDispatchMode):
    """The most elements that any tensor made meanwhile has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, tuple | list) else [out]:
            if isinstance(v, Tensor):
                self.elements = max(self.elements, v.untyped_storage().nbytes() // max(v.element_size(), 1))
        return out


@pytest.mark.parametrize("kind", [nn.EmbeddingBag, EmbeddingBag, nn.Embedding, Embedding])
def test_large_vocabularies(kind: type[nn.Module]) -> None:
    """A private step allocates no tensor larger than the table: [n, v, d] never exists."""
    v, n = 5000, 6
    model = Bags(kind, "rows", v) if issubclass(kind, nn.EmbeddingBag) else nn.Sequential(kind(v, 4), nn.Linear(4, 2))
    batch = (torch.randint(0, v, (n, 5)), torch.full((n,), 5), torch.randn(n, 5), torch.randn(n))

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return squared(model(*batch[:-1]) if isinstance(model, Bags) else model(batch[0]), batch[-1])

    with Largest() as largest:
        step = private_step(model, losses, batch, 1.0)
    assert largest.elements <= v * 4
    assert next(iter(step.values())).count_nonzero() > 0
