"""Losses that the loop composes and gives to plain ``loss.backward()``: those in which a record acts through another's
gradient are refused before anything is released; those that only look like it are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import dpkit
from tests.training import attach, drawing

N, K, T = 11, 3, 5
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, K))


class Residual(nn.Module):
    """Its output is reached by the last layer, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return y + self.second(y)


class Language(nn.Module):
    """Logits [n, T, K] for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(x))
        return y


class Attends(nn.Module):
    """Ends in attention without parameters, [n, T, T] inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(7, 6), nn.Linear(6, 3 * K)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.table(x)).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v  # type: ignore[no-any-return]


def records(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % K


def texts(length: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(7, (N, length), generator=generator), torch.randint(K, (N, length), generator=generator)


def some_ignored(y: Tensor) -> Tensor:
    y = y.clone()
    y[0] = -100
    return y


def off(y: Tensor) -> Tensor:
    """A number for each record."""
    return y.float() - 0.9


W = torch.tensor([1.0, 2.0, 3.0])


def contrast(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    a, b = model(x), model(x + 0.1)
    return F.cross_entropy(a @ b.T, torch.arange(len(x)))


def hardest_triplet(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    a = model(x)
    return F.relu(1 - a[0] @ a[1:].T).max() + 0 * a.sum()


COUPLED: dict[str, Loss] = {
    "class weights": lambda m, x, y: F.cross_entropy(m(x), y, weight=W),
    "class weights, smoothed": lambda m, x, y: F.cross_entropy(m(x), y, weight=W, label_smoothing=0.1),
    "class weights, a module": lambda m, x, y: nn.CrossEntropyLoss(weight=W)(m(x), y),
    "class weights, log-likelihood": lambda m, x, y: F.nll_loss(m(x).log_softmax(1), y, weight=W),
    "class weights, scaled and divided": lambda m, x, y: F.cross_entropy(m(x), y, weight=W) * 1024.0 / 3,
    "some targets ignored": lambda m, x, y: F.cross_entropy(m(x), some_ignored(y)),
    "contrast of two views": contrast,
    "softmax over the records": lambda m, x, y: m(x)[:, 0].log_softmax(0).mul(off(y)).mean(),
    "root of a mean": lambda m, x, y: F.mse_loss(m(x)[:, 0], off(y)).sqrt(),
    "logarithm of a mean": lambda m, x, y: F.cross_entropy(m(x), y).log(),
    "centred": lambda m, x, y: (o := m(x), F.cross_entropy(o - o.mean(0), y))[1],
    "variance": lambda m, x, y: F.relu(1 - m(x).std(0)).mean(),
    "correlation": lambda m, x, y: (z := m(x), (z.T @ z / len(z) - torch.eye(K)).square().sum())[1],
    "mixup of outputs": lambda m, x, y: (o := m(x), F.cross_entropy(0.7 * o + 0.3 * o.roll(1, 0), y))[1],
    "of neighbours": lambda m, x, y: (o := m(x)[:, 0], F.softplus(o[1:] - o[:-1]).sum())[1],
    "of the first and the last alone": lambda m, x, y: (o := m(x)[:, 0], o.square().sum() + o[0] * o[-1])[1],
    "a column less a row": lambda m, x, y: (m(x)[:, :1] - off(y)).square().mean(),
    "a column less a row, mean absolute error": lambda m, x, y: (m(x)[:, :1] - off(y)).abs().mean(),
    "pairs": lambda m, x, y: (o := m(x)[:, 0], F.relu(1 - (o[:, None] - o[None]) * off(y)).mean())[1],
    "the hardest records": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").topk(4).values.mean(),
    "the hardest record": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").max(),
    "the hardest records, sorted": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").sort().values[-4:].mean(),
    "the median": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").median(),
    "a hardest triplet": hardest_triplet,
    "mean over chosen ones": lambda m, x, y: (
        (F.cross_entropy(m(x), y, reduction="none") * (x[:, 0] > 0)).sum() / (x[:, 0] > 0).sum()
    ),
    "weights that sum to one": lambda m, x, y: (
        (F.cross_entropy(m(x), y, reduction="none") * x[:, 0].exp()).sum() / x[:, 0].exp().sum()
    ),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("build", [classifier, Residual])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled(name: str, build: Callable[[], nn.Module]) -> None:
    """Refused in the first step, whatever the model ends with."""
    run = attach(build(), TensorDataset(*records()))
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    for x, y in run.loader:
        with pytest.raises(dpkit.CoupledRecordsError):
            COUPLED[name](run.model, x, y).backward()
        break
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert run.engine.get_epsilon(1e-5) == 0


def ctc(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loss without second derivatives."""
    logits = model(x).log_softmax(-1)[None].expand(T, -1, -1)
    return F.ctc_loss(logits, y[:, None] % 2 + 1, torch.full((len(x),), T), torch.ones(len(x), dtype=torch.long))


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Means, maxima and ignored targets of one record each."""
    out = model(x)
    return torch.stack([out[i].mean() + out[i].max() + F.mse_loss(out[i], out[i] * 0) for i in range(len(x))]).mean()


def diagonal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Pairs, of which only each record with itself counts."""
    a, b = model(x), model(x + 0.1)
    return F.softplus((a @ b.T).diagonal()).mean()


def focal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    ce = F.cross_entropy(model(x), y, reduction="none")
    return ((1 - (-ce).exp()) ** 2 * ce).mean()


APART: dict[str, Loss] = {
    "cross-entropy": lambda m, x, y: F.cross_entropy(m(x), y),
    "cross-entropy, summed": lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"),
    "smoothed": lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1),
    "weights that are all alike": lambda m, x, y: F.cross_entropy(m(x), y, weight=torch.full((K,), 2.0)),
    "class weights, summed": lambda m, x, y: F.cross_entropy(m(x), y, weight=W, reduction="sum"),
    "class weights, by hand": lambda m, x, y: (F.cross_entropy(m(x), y, weight=W, reduction="none")).mean(),
    "class weights, soft targets": lambda m, x, y: F.cross_entropy(m(x), F.one_hot(y, K).float(), weight=W),
    "ignored, summed": lambda m, x, y: F.cross_entropy(m(x), some_ignored(y), reduction="sum"),
    "ignored, for each": lambda m, x, y: F.cross_entropy(m(x), some_ignored(y), reduction="none").mean(),
    "focal": focal,
    "binary": lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), F.one_hot(y, K).float(), pos_weight=W),
    "squared": lambda m, x, y: F.mse_loss(m(x)[:, 0], off(y)),
    "absolute": lambda m, x, y: F.l1_loss(m(x)[:, 0], off(y)),
    "Huber": lambda m, x, y: F.huber_loss(m(x)[:, 0], off(y)),
    "Gaussian": lambda m, x, y: F.gaussian_nll_loss(m(x)[:, 0], off(y), m(x)[:, 1].exp()),
    "Kullback-Leibler": lambda m, x, y: F.kl_div(
        m(x).log_softmax(1), F.one_hot(y, K) * 0.9 + 0.03, reduction="batchmean"
    ),
    "a margin": lambda m, x, y: F.multi_margin_loss(m(x), y),
    "a triplet within a record": lambda m, x, y: F.triplet_margin_loss(m(x), m(x + 0.1), m(x - 1)),
    "cosine": lambda m, x, y: F.cosine_embedding_loss(m(x), m(x + 0.1), torch.ones(len(x))),
    "best class": lambda m, x, y: m(x).max(1).values.square().mean(),
    "two best classes": lambda m, x, y: m(x).topk(2, 1).values.square().mean(),
    "sorted classes": lambda m, x, y: m(x).sort(-1).values[:, 0].square().mean(),
    "norms": lambda m, x, y: m(x).norm(dim=1).mean(),
    "divided by their number": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").sum() / len(x),
    "divided by their number, a tensor": lambda m, x, y: (
        F.cross_entropy(m(x), y, reduction="none").sum() / torch.tensor(len(x))
    ),
    "divided by their expected number": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").sum() / N,
    "chosen by a mask, and summed": lambda m, x, y: F.cross_entropy(m(x), y, reduction="none")[x[:, 0] > 0].sum(),
    "of a part, halved": lambda m, x, y: F.cross_entropy(m(x), y) / 2,
    "a critic's": lambda m, x, y: m(x)[:, 0].mean() - m(x + 1)[:, 0].mean(),
    "one by one": one_by_one,
    "the diagonal of pairs": diagonal,
    "connectionist": ctc,
}

SIZES = (N, 7, K, 2, 1, 0, N)


@pytest.mark.parametrize("build", [classifier, Residual])
@pytest.mark.parametrize("name", APART)
def test_apart(name: str, build: Callable[[], nn.Module]) -> None:
    """Batches of many sizes, as many as classes among them."""
    with drawing(*(range(size) for size in SIZES)):
        run = attach(build(), TensorDataset(*records()), lr=0.1)
        for x, y in run.loader:
            APART[name](run.model, x, y).backward()
            run.optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("build", [Language, Attends])
@pytest.mark.parametrize("length", [T, N])
def test_tokens(length: int, build: Callable[[], nn.Module], reduction: str) -> None:
    """All tokens' mean is a mean of the records'; also where there are as many as records."""
    with drawing(*(range(size) for size in SIZES)):
        run = attach(build(), TensorDataset(*texts(length)), lr=0.1)
        for x, y in run.loader:
            F.cross_entropy(run.model(x).flatten(0, 1), y.flatten(), reduction=reduction).backward()
            run.optimizer.step()


def test_lengths_that_happen_to_be_sizes() -> None:
    """Attention [n, T, T] with T = n, of one batch and of another: in between T was not n."""
    with drawing(range(N), range(N), range(7), range(5), range(7)):
        run = attach(Attends(), TensorDataset(*texts(N)), lr=0.1)
        for k, (x, y) in enumerate(run.loader):
            length = (N, N, 4, 5, 7)[k]
            F.cross_entropy(run.model(x[:, :length]).flatten(0, 1), y[:, :length].flatten()).backward()
            run.optimizer.step()


@pytest.mark.parametrize("build", [Language, Attends])
@pytest.mark.parametrize("mean", ["ignored", "by a mask", "by their number", "chosen"])
def test_mean_of_all_tokens_that_count(mean: str, build: Callable[[], nn.Module]) -> None:
    """As language models are trained everywhere: a record with few tokens counts for less among those with many."""
    run = attach(build(), TensorDataset(*texts()))
    x, y = next(iter(run.loader))
    y[:3, 2:] = -100
    counts = y != -100
    values = F.cross_entropy(run.model(x).transpose(1, 2), y, reduction="none")
    loss = {
        "ignored": lambda: F.cross_entropy(run.model(x).flatten(0, 1), y.flatten()),
        "by a mask": lambda: (values * counts).sum() / counts.sum(),
        "by their number": lambda: (values * counts).sum() / counts.sum().clamp(min=1).float(),
        "chosen": lambda: values[counts].mean(),
    }[mean]()
    seen = r"targets are ignored|divided by|a mean is taken over 46 values"
    with pytest.raises(dpkit.CoupledRecordsError, match=seen):
        loss.backward()


def test_divided_by_a_number_that_changes() -> None:
    """As ``.item()`` gives it: one batch does not tell it from a constant."""
    with drawing(range(N), range(7), range(5)):
        run = attach(classifier(), TensorDataset(*records()), lr=0.1)
        for k, (x, y) in enumerate(run.loader):
            chosen = x[:, 0] > 0
            loss = (F.cross_entropy(run.model(x), y, reduction="none") * chosen).sum() / chosen.sum().item()
            if k:
                with pytest.raises(dpkit.CoupledRecordsError, match="and was by"):
                    loss.backward()
                break
            loss.backward()
            run.optimizer.step()


def test_pairs_of_which_two_sizes_tell() -> None:
    """Eleven thresholds for each of eleven records may be pairs; seven for each of seven are."""
    sizes = (N, N, 7)
    with drawing(*map(range, sizes)):
        run = attach(classifier(), TensorDataset(*records()), lr=0.1)
        for k, (x, y) in enumerate(run.loader):
            loss = F.relu(1 - run.model(x)[:, :1] * off(y)).mean()
            if k == len(sizes) - 1:
                with pytest.raises(dpkit.CoupledRecordsError, match=r"pair of records, \[7, 7\]"):
                    loss.backward()
                return
            loss.backward()
            run.optimizer.step()


def within_units(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Views of one unit, contrasted with each other: rows 2k and 2k + 1."""
    z = model(x).unflatten(0, (-1, 2))
    return F.cross_entropy((z @ z.transpose(1, 2)).flatten(0, 1), torch.arange(len(x)) % 2)


@pytest.mark.parametrize("name", ["within units", "over pairs of a unit's rows", *COUPLED])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_units_of_several_rows(name: str) -> None:
    """What the rows of one unit do with each other is its own affair."""
    x, y = records(12)
    within: dict[str, Loss] = {
        "within units": within_units,
        "over pairs of a unit's rows": lambda m, x, y: (
            z := m(x),
            (F.relu(1 - z @ z.T) * (torch.arange(len(x))[:, None] // 2 == torch.arange(len(x)) // 2)).sum(),
        )[1],
    }
    with drawing(range(6), range(4)):
        run = attach(classifier(), TensorDataset(x, y), 6, privacy_unit=[k // 2 for k in range(12)], lr=0.1)
        for x, y in run.loader:
            loss = (within | COUPLED)[name](run.model, x, y)
            if name in within:
                loss.backward()
                run.optimizer.step()
                continue
            with pytest.raises(dpkit.CoupledRecordsError):
                loss.backward()
            break


@pytest.mark.parametrize("later", [1, 2, 40])
def test_a_loss_that_comes_later(later: int) -> None:
    """The kind of loss changes in the middle of the training."""
    with drawing(*[range(N)] * (later + 1)):
        run = attach(classifier(), TensorDataset(*records()), lr=0.1)
        for k, (x, y) in enumerate(run.loader):
            if k == later:
                with pytest.raises(dpkit.CoupledRecordsError):
                    contrast(run.model, x, y).backward()
                return
            F.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()


def test_the_same_operations_along_another_dimension() -> None:
    """No new kind of loss: it is noticed when known kinds are looked at again."""
    with drawing(*[range(N)] * 9):
        run = attach(classifier(), TensorDataset(*records()), lr=0.1)
        for k, (x, y) in enumerate(run.loader):
            loss = -(run.model(x).log_softmax(1 if k < 4 else 0) * F.one_hot(y, K)).mean()
            if k == 7:
                with pytest.raises(dpkit.CoupledRecordsError):
                    loss.backward()
                return
            loss.backward()
            run.optimizer.step()


def test_what_could_not_be_told_stays_so() -> None:
    """Also when the model has got other modules since."""
    run = attach(classifier(), TensorDataset(*records()))
    losses = run.engine._step.tape.losses  # type: ignore[union-attr]
    for loss in (APART["connectionist"], APART["cross-entropy"]):
        for x, y in run.loader:
            loss(run.model, x, y).backward()
            run.optimizer.step()
        assert not losses.told
        losses.forget()
        assert not losses.told


class InParts(nn.Module):
    """Two modules that the loop calls one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, K)


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda z: z - z.mean(0),
    "mixed": lambda z: 0.7 * z + 0.3 * z.roll(1, 0),
    "attention over the records": lambda z: (z @ z.T).softmax(1) @ z,
    "the first in the place of the last": lambda z: torch.cat([z[:-1], z[:1]]),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_mixed_between_modules(name: str) -> None:
    run = attach(InParts(), TensorDataset(*records()))
    x, y = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError, match="between two modules"):
        F.cross_entropy(run.model.head(BETWEEN[name](run.model.body(x))), y).backward()


def test_apart_between_modules() -> None:
    run = attach(InParts(), TensorDataset(*records()))
    for x, y in run.loader:
        z = run.model.body(x)
        F.cross_entropy(run.model.head(F.layer_norm(torch.tanh(z), (8,)) + z.detach().mean(0) * 0), y).backward()
        run.optimizer.step()


def test_looking_leaves_no_trace() -> None:
    """Neither chance nor a single bit of the step follows from the look at the loss."""
    steps = []
    for look in (True, False):
        run = attach(nn.Sequential(classifier(), nn.Dropout(0.3)), TensorDataset(*records()))
        if not look:
            run.engine._step.tape.losses.look = lambda *_: None  # type: ignore[attr-defined]
        torch.manual_seed(5)
        for x, y in run.loader:
            F.cross_entropy(run.model(x), y).backward()
            run.optimizer.step()
        steps.append((torch.rand(3), *run.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["module", "before", "tensor"])
@pytest.mark.parametrize("build", [classifier, Residual])
def test_hooks_in_the_model(build: Callable[[], nn.Module], kind: str) -> None:
    """What watches gradients below the last layer finds a tensor wherever ordinary training has one; where no other way
    leads there, it sees the user's passes alone."""
    model, seen = build(), list[float]()

    def watch(*given: Any) -> None:
        grad = given[-1]
        seen.append(float((grad[0] if isinstance(grad, tuple) else grad).detach().norm()))

    def hold(module: nn.Module, given: Any, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(watch)

    watched = list(model.children())[:-1]
    for m in watched:
        if kind == "tensor":
            m.register_forward_hook(hold)
        else:
            (m.register_full_backward_hook if kind == "module" else m.register_full_backward_pre_hook)(watch)
    run = attach(model, TensorDataset(*records()))
    for _ in range(3):
        for x, y in run.loader:
            loss = F.cross_entropy(run.model(x), y)
            seen.clear()  # what the examination has brought
            loss.backward()
            assert len(seen) == len(watched) or build is Residual
            assert seen[-1] > 0
            run.optimizer.step()


def test_what_the_statement_says() -> None:
    """That the loss was read, where it was; not where it could not be."""
    for loss, said in ((APART["cross-entropy"], True), (APART["connectionist"], False)):
        run = attach(classifier(), TensorDataset(*records()), noise_multiplier=1.0)
        for x, y in run.loader:
            loss(run.model, x, y).backward()
            run.optimizer.step()
        assert ("no gradient moved" in str(run.engine.statement(delta=1e-5))) == said


def test_other_backward_passes_are_left_alone() -> None:
    """Public passes, saliency, other models, and everything after detach."""
    run = attach(classifier(), TensorDataset(*records()))
    x, y = next(iter(run.loader))
    with run.engine.paused():
        contrast(run.model, x, y).backward()
    run.optimizer.zero_grad()
    x.requires_grad_()
    contrast(run.model, x, y).backward(inputs=[x])
    other = classifier()
    contrast(other, x.detach(), y).backward()
    run.engine.detach()
    contrast(run.model, x, y).backward()
    assert all(p.grad is not None for m in (other, run.model) for p in m.parameters())


def test_the_strict_door() -> None:
    """It looks at the losses one by one, of the first batch; what comes later is looked at all the same."""
    run = attach(classifier(), TensorDataset(*records()))
    for x, y in run.loader:
        run.engine.backward(F.cross_entropy(run.model(x), y, weight=W, reduction="none"))
        run.optimizer.step()
    x, y = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError):
        run.engine.backward(F.cross_entropy(run.model(x).log_softmax(0), y, reduction="none"))


def test_arguments_of_backward() -> None:
    """Every way in which torch lets a backward pass be written is heard."""
    for start in (
        lambda loss: torch.autograd.backward(loss),
        lambda loss: torch.autograd.backward([loss], [torch.tensor(2.0)]),
        lambda loss: torch.autograd.backward(tensors=(loss,), retain_graph=True),
        lambda loss: loss.backward(torch.tensor(0.5)),
        lambda loss: loss.expand(2).backward(torch.ones(2)),
    ):
        run = attach(classifier(), TensorDataset(*records()))
        x, y = next(iter(run.loader))
        with pytest.raises(dpkit.CoupledRecordsError):
            start(contrast(run.model, x, y))


class Checkpointed(nn.Module):
    """Its activations are computed again in the backward, by a pass within the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(checkpoint(lambda z: torch.tanh(self.body(z)), self.first(x), use_reentrant=True))
        return y


def test_reentrant_checkpointing() -> None:
    """There torch can follow no part of the graph by itself; what the operations tell remains."""
    run = attach(Checkpointed(), TensorDataset(*records()), lr=0.1)
    for x, y in run.loader:
        (F.cross_entropy(run.model(x), y) + run.model(x).mean(1).square().mean()).backward()
        run.optimizer.step()
    for name in ("class weights", "some targets ignored", "mean over chosen ones", "a column less a row"):
        x, y = next(iter(run.loader))
        with pytest.raises(dpkit.CoupledRecordsError):
            COUPLED[name](run.model, x, y).backward()
