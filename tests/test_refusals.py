"""Every refusal: the right kind of error, naming the culprit, saying why, and how to cure it."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dpkit
from dpkit.autograd import _watching
from tests.training import Run, attach, data, drawing, mlp, squared_loss, train, weights, work

Refused = pytest.ExceptionInfo[dpkit.PrivacyError]


def refused(kind: type[dpkit.PrivacyError], *words: str) -> Any:
    """Expect exactly this kind of error, whose message has the words, a reason and a cure."""

    class Expect:
        def __enter__(self) -> None:
            self.raises = pytest.raises(kind)
            self.info = self.raises.__enter__()

        def __exit__(self, *what: Any) -> bool:
            caught = bool(self.raises.__exit__(*what))
            error = self.info.value
            assert type(error) is kind
            for word in words:
                assert word in str(error), f"{word!r} is not in: {error}"
            assert error.seen
            assert error.why, f"no reason is given: {error}"
            assert error.cure, f"no cure is given: {error}"
            assert f"\n  Why: {error.why}\n  Cure: {error.cure}" in str(error)
            return caught

    return Expect()


def images(n: int = 6, channels: int = 3) -> TensorDataset:
    return TensorDataset(torch.randn(n, channels, 5, 5), torch.randn(n, 1))


def step_on(model: nn.Module, dataset: Any = None, **options: Any) -> Run:
    """Attach and take one step, with the squared loss."""
    run = attach(model, dataset, **options)
    train(run)
    return run


# --- modules that use the batch ---


def network(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(norm), nn.Flatten(), nn.Linear(36, 1))


BATCH_NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(4),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "frozen": lambda: nn.BatchNorm2d(4).requires_grad_(False),
    "synchronised": lambda: nn.SyncBatchNorm(4),
    "lazy": lambda: nn.LazyBatchNorm2d(),
}


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_batch_norm(kind: str) -> None:
    """In train mode every kind is refused at once, frozen or not: it mixes records and releases statistics."""
    with refused(dpkit.UnsupportedModuleError, "1.0 (", "BatchNorm", "GroupNorm"):
        attach(network(BATCH_NORMS[kind]()), images())


def test_batch_norm_back_in_train_mode() -> None:
    """model.train() undoes eval(): it is noticed at the next forward; statistics have not been touched."""
    model = network(nn.BatchNorm2d(4)).eval()
    run = step_on(model, images())
    model.train()
    before = copy.deepcopy(model[1][0].state_dict())
    with refused(dpkit.UnsupportedModuleError, "1.0 (BatchNorm2d)", "eval"):
        train(run)
    assert all(torch.equal(v, before[k]) for k, v in model[1][0].state_dict().items())


def test_batch_norm_without_running_statistics_in_eval_mode() -> None:
    """eval() does not help where there are no statistics from elsewhere."""
    with refused(dpkit.UnsupportedModuleError, "1.0 (BatchNorm2d)"):
        attach(network(nn.BatchNorm2d(4, track_running_stats=False)).eval(), images())


def test_instance_norm_with_running_statistics() -> None:
    """It normalises each record by itself, but its running statistics are released without noise."""
    with refused(dpkit.UnsupportedModuleError, "1.0 (InstanceNorm2d)", "running"):
        attach(network(nn.InstanceNorm2d(4, track_running_stats=True)), images())
    step_on(network(nn.InstanceNorm2d(4, affine=True)), images())


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embedding_options(kind: type[nn.Module], option: dict[str, Any]) -> None:
    """max_norm updates weights in the forward; scale_grad_by_freq divides by counts over the batch."""
    with refused(dpkit.UnsupportedModuleError, f"0 ({kind.__name__})", *option):
        attach(nn.Sequential(kind(5, 4, **option), nn.Linear(4, 1)), data())


class Functional(nn.Module):
    """The same options, passed to the function."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.options = nn.Parameter(torch.randn(5, 4)), options

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table, **self.options).sum((1, 2))[:, None]


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_options_of_the_function(option: dict[str, Any]) -> None:
    tokens = TensorDataset(torch.randint(0, 5, (6, 3)), torch.randn(6, 1))
    with refused(dpkit.UncoveredParameterError, "table", *option):
        step_on(Functional(**option), tokens)


# --- records that depend on each other ---


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.first, self.last, self.share = nn.Linear(4, 5), nn.Linear(5, 1), share

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.last(y - self.share * y.mean(0))


class AcrossRecords(nn.Module):
    """Attention whose sequence is the batch: batch_first was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)).mean(1)


class Contrastive(nn.Module):
    """Scores of every record against every other one, as logits [n, n]."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) @ self.right(x).T


class HardRouting(nn.Module):
    """Serves the last two records only: a capacity, as in mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.expert = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.arange(len(x)) >= len(x) - 2
        return self.expert(x) * (self.score(x).squeeze(1) * kept)[:, None]


@pytest.mark.parametrize("build", [Centred, lambda: Centred(0.3), HardRouting])
def test_coupled_records(build: Callable[[], nn.Module]) -> None:
    """One record's output changes when another one leaves the batch."""
    with refused(dpkit.CoupledRecordsError, type(build()).__name__, "left out"):
        step_on(build())


def test_attention_across_records() -> None:
    sequences = TensorDataset(torch.randn(6, 3, 4), torch.randn(6, 1))
    with refused(dpkit.CoupledRecordsError, "AcrossRecords", "changed by"):
        step_on(AcrossRecords(), sequences)


def test_scores_between_records() -> None:
    """[n, n] logits: the gradient of a contrastive loss reaches all records; the diagonal's is each record's own."""
    run = attach(Contrastive())
    for x, _ in run.loader:
        run.model(x).diagonal().square().mean().backward()
        run.optimizer.step()
    with refused(dpkit.CoupledRecordsError, "Contrastive", "[8, 8]", "pair"):
        for x, _ in run.loader:
            F.cross_entropy(run.model(x), torch.arange(len(x))).backward()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_coupled_records_behind_a_flattened_output(share: float, inner: bool) -> None:
    """Logits as [n·t, v], in either order of the rows: the records are told apart, and compared, all the same."""

    class Flat(Centred):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return (y.transpose(0, 1) if inner else y).flatten(0, 1)

    run = attach(Flat(share), TensorDataset(torch.randn(6, 5, 4), torch.randn(6, 1)))

    def fit() -> None:
        for x, _ in run.loader:
            run.model(x).square().mean().backward()
            run.optimizer.step()

    if share:
        with refused(dpkit.CoupledRecordsError, "Flat", "left out"):
            fit()
    else:
        fit()


def test_coupling_of_a_single_record_is_noticed_later() -> None:
    """A first batch of one record says little; the next one is examined, too."""
    run = attach(Centred(), data(), 2)
    with drawing([0]):
        train(run)
    with refused(dpkit.CoupledRecordsError, "Centred"), drawing([0, 1]):
        train(run)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_loss_of_the_model_over_tokens(name: str) -> None:
    """`.loss` averages over all labelled tokens: a long record makes the others' gradients small."""
    from tests.hf_models import HF_CASES

    case = next(c for c in HF_CASES if c.name == name)
    batch = case.records(4)
    tokens, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    run = attach(case.model(), TensorDataset(tokens, mask, labels))
    with refused(dpkit.CoupledRecordsError, type(run.model).__name__, "tokens", "engine.backward"):
        for ids, seen, wanted in run.loader:
            output = run.model(input_ids=ids, attention_mask=seen, labels=wanted)
            output.loss.backward()
            run.optimizer.step()


def test_loss_of_the_model_that_averages_over_records() -> None:
    """A model's own loss that is the mean of one loss a record is nothing to refuse."""

    class WithLoss(nn.Module):
        def __init__(self, weighted: bool) -> None:
            super().__init__()
            self.layer, self.weighted = nn.Linear(4, 1), weighted

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            losses = (self.layer(x) - y).square().squeeze(1)
            weights = (y.squeeze(1) > 0).float() + 0.1
            return ((losses * weights).sum() / weights.sum() if self.weighted else losses.mean()), losses

    run = attach(WithLoss(False))
    for x, y in run.loader:
        run.model(x, y)[0].backward()
        run.optimizer.step()
    run = attach(WithLoss(True))
    with refused(dpkit.CoupledRecordsError, "WithLoss", "neither the mean nor the sum"):
        for x, y in run.loader:
            run.model(x, y)[0].backward()
            run.optimizer.step()


# --- rows that are no records ---


@pytest.mark.parametrize("strict", [False, True])
def test_positions_as_records(strict: bool) -> None:
    """[B·T, d] given to the model: each token would be clipped as a record."""
    run = attach(mlp(), TensorDataset(torch.randn(6, 5, 4), torch.randn(6, 1)))
    with refused(dpkit.NonPrivateGradientError, "0.weight", "[30]", "6 records"):
        for x, y in run.loader:
            losses = (run.model(x.flatten(0, 1)).view(6, 5).mean(1) - y[:, 0]).square()
            if strict:
                run.engine.backward(losses)
            else:
                losses.mean().backward()
            run.optimizer.step()


def test_several_rows_a_record() -> None:
    """A collate_fn that makes two rows of each record (views, chunks): epsilon a row is not epsilon a record."""

    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(v) for v in zip(*rows, strict=True))
        return torch.cat([x, x + 0.1]), torch.cat([y, y])

    with refused(dpkit.NonPrivateGradientError, "0.weight", "[16]", "8 records"):
        step_on(mlp(), loader={"collate_fn": collate})


def test_other_batch_than_drawn() -> None:
    """More records, fewer records, another data set's records: whatever is not the drawn batch."""
    for rows in (3, 9, 1):
        run = attach(mlp())
        with refused(dpkit.NonPrivateGradientError, "0.weight", f"[{rows}]", "8 records"):
            for _ in run.loader:
                work(run, (torch.randn(rows, 4), torch.randn(rows, 1)))
        run.engine.detach()
    run = step_on(mlp())  # the same after the first batch has been proven
    for rows in (3, 9, 1):
        next(iter(run.loader))
        with pytest.raises((dpkit.NonPrivateGradientError, dpkit.DoubleUseError)) as caught:
            work(run, (torch.randn(rows, 4), torch.randn(rows, 1)))
        assert "8" in str(caught.value)


# --- used twice ---


def test_old_graph_after_its_step() -> None:
    """A graph that is back-propagated again after its step would put its records into another step."""
    run = attach(mlp(), data(), 4)
    with drawing([0, 1], [2, 3]), refused(dpkit.DoubleUseError, "step has been taken"):
        old: list[Tensor] = []
        for batch in run.loader:
            loss = squared_loss(run.model, batch)
            for earlier in old:
                earlier.backward()
            loss.backward(retain_graph=True)
            old.append(loss)
            run.optimizer.step()


def test_step_without_a_batch() -> None:
    """Two steps on one batch; gradients that were left over, or scaled by hand, are nobody's sum."""
    run = attach(mlp())
    for batch in run.loader:
        work(run, batch)
        with refused(dpkit.DoubleUseError, "without a batch"):
            run.optimizer.step()
    with refused(dpkit.DoubleUseError, "without a batch"):
        run.optimizer.step()
    run.optimizer.zero_grad()
    before = run.engine.accountant.ledger
    run.optimizer.step()  # nothing to release
    assert run.engine.accountant.ledger == before


def test_public_gradients_before_the_first_batch() -> None:
    run = attach(mlp())
    squared_loss(run.model, data().tensors).backward()
    with refused(dpkit.DoubleUseError, "without a batch", "paused"):
        run.optimizer.step()


@pytest.mark.parametrize("physical", [None, 3])
def test_batch_without_a_step(physical: int | None) -> None:
    """Accumulating by hand over draws: one record could be in several of them, clipped once in each."""
    run = attach(mlp(), data(), 4, max_physical_batch_size=physical)
    with drawing([0, 1, 2, 3], [2, 3]), refused(dpkit.UnfinishedStepError, "optimizer.step()", "max_physical"):
        for batch in run.loader:
            squared_loss(run.model, batch).backward()


def test_batch_without_a_step_at_the_end_of_the_pass() -> None:
    run = attach(mlp())
    with refused(dpkit.UnfinishedStepError, "optimizer.step()"):
        for batch in run.loader:
            squared_loss(run.model, batch).backward()


def test_two_passes_at_once() -> None:
    """zip(loader, loader): parts of two logical batches would meet in one sum."""
    run = attach(mlp(), data(), 4, max_physical_batch_size=2)
    with drawing([0, 1, 2, 3], [4, 5]), refused(dpkit.SamplingError, "pass"):
        first, second = iter(run.loader), iter(run.loader)
        for batches in (first, second, first):
            work(run, next(batches))


def test_the_rest_of_a_pass_that_was_left() -> None:
    """Its empty draws would release what a later pass has in hand."""
    run = attach(mlp(), data(), 4, max_physical_batch_size=1)
    with drawing([0], [], []):
        first = iter(run.loader)
        work(run, next(first))
    with drawing([0, 1]):
        second = iter(run.loader)
        squared_loss(run.model, next(second)).backward()
        run.optimizer.step()
        ledger = run.engine.accountant.ledger
        with refused(dpkit.SamplingError, "pass"):
            next(first)
        assert run.engine.accountant.ledger == ledger
        work(run, next(second))


def test_the_rest_of_a_pass_after_detach() -> None:
    """Neither batches nor empty draws: they would be ordinary steps that nobody counts."""
    for draws in ([[0], [1]], [[0], []]):
        run = attach(mlp(), data(), 4)
        with drawing(*draws):
            batches = iter(run.loader)
            work(run, next(batches))
            run.engine.detach()
            with refused(dpkit.SamplingError, "detached"):
                next(batches)


# --- loaders that cannot be accounted ---


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(8, 4)


class OddBatches(BatchSampler):
    """A user's own rule."""


class Moves(DataLoader[Any]):
    """Does something to its batches on their way."""

    def __iter__(self) -> Any:
        return ([v.double() for v in batch] for batch in super().__iter__())


SEQUENCE = SequentialSampler(data())
LOADERS: dict[str, tuple[Callable[[], Any], str]] = {
    "weighted": (lambda: DataLoader(data(), 4, sampler=WeightedRandomSampler([1.0] * 8, 8)), "WeightedRandomSampler"),
    "subset": (lambda: DataLoader(data(), 4, sampler=SubsetRandomSampler([0, 1, 2])), "SubsetRandomSampler"),
    "replacement": (lambda: DataLoader(data(), 4, sampler=RandomSampler(data(), replacement=True)), "RandomSampler"),
    "repeated": (lambda: DataLoader(data(), 4, sampler=RandomSampler(data(), num_samples=20)), "RandomSampler"),
    "own sampler": (lambda: DataLoader(data(), 4, sampler=[0, 1, 2, 3]), "list"),
    "others": (lambda: DataLoader(data(), 4, sampler=SequentialSampler(range(6))), "SequentialSampler"),
    "stream": (lambda: DataLoader(Stream(), 4), "Stream"),
    "batch sampler": (lambda: DataLoader(data(), batch_sampler=OddBatches(SEQUENCE, 4, False)), "OddBatches"),
    "no batches": (lambda: DataLoader(data(), batch_size=None), "NoneType"),
    "empty": (lambda: DataLoader([], 4), "empty"),
    "too large": (lambda: DataLoader(data(), 9), "9"),
    "own iteration": (lambda: Moves(data(), 4), "__iter__"),
    "no loader": (lambda: [data().tensors], "list"),
}


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("name", LOADERS)
def test_unknown_sampling(name: str, poisson: bool) -> None:
    """Whoever is drawn by another rule than the one that is accounted has another epsilon."""
    build, word = LOADERS[name]
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with refused(dpkit.SamplingError, word):
        dpkit.PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=build(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=poisson,
        )
    attach(model)  # the refusal left nothing behind


def test_private_loader_twice() -> None:
    run, model = attach(mlp()), mlp()
    with refused(dpkit.SamplingError, "private already"):
        dpkit.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=run.loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


# --- parameters and optimizers ---


def test_unfrozen_and_not_in_the_optimizer() -> None:
    """It would be in the gradient and not in the step, or in the step and not in the norm."""
    model = mlp()
    model[0].requires_grad_(False)
    run = attach(model, optimizer=torch.optim.SGD(model[2].parameters(), lr=1.0))
    train(run)
    model[0].requires_grad_(True)
    with refused(dpkit.UncoveredParameterError, "0.weight", "optimizer", "add_param_group"):
        train(run)


def test_trainable_and_never_in_the_optimizer() -> None:
    model = mlp()
    run = attach(model, optimizer=torch.optim.SGD(model[2].parameters(), lr=1.0))
    with refused(dpkit.UncoveredParameterError, "0.weight", "optimizer"):
        train(run)


def test_in_the_optimizer_and_not_in_the_model() -> None:
    """At once, and when it is added later."""
    model, stranger = mlp(), nn.Parameter(torch.zeros(7, 2))
    with refused(dpkit.UncoveredParameterError, "[7, 2]", "not in the model"):
        attach(model, optimizer=torch.optim.SGD([*model.parameters(), stranger], lr=1.0))
    run = attach(model)
    run.optimizer.add_param_group({"params": [stranger]})
    with refused(dpkit.UncoveredParameterError, "[7, 2]", "not in the model"):
        train(run)


def test_a_head_that_another_optimizer_trains() -> None:
    """It would learn from the records without privacy, and the model through it."""
    body, head = mlp(), nn.Linear(1, 1)
    run, other = attach(body), torch.optim.SGD(head.parameters(), lr=0.1)

    def fit() -> None:
        for x, y in run.loader:
            (head(run.model(x)) - y).square().mean().backward()
            run.optimizer.step()
            other.step()

    fit()
    before = weights(body)
    with refused(dpkit.UncoveredParameterError, "[1, 1]", "another optimizer", "ModuleList"):
        fit()
    assert torch.equal(weights(body), before)


class Spectral(nn.Module):
    """A layer that multiplies by complex weights, as Fourier neural operators do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.cfloat))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((x.to(torch.cfloat) @ self.weight).abs())
        return y


def test_complex_parameters() -> None:
    """The noise would be real, or too small: refused, at once or when they are unfrozen."""
    with refused(dpkit.ConfigurationError, "weight", "complex64"):
        attach(Spectral(), noise_multiplier=1.0)
    model = Spectral()
    model.weight.requires_grad_(False)
    run = attach(model, noise_multiplier=1.0)
    train(run)
    model.weight.requires_grad_(True)
    with refused(dpkit.ConfigurationError, "weight", "complex64"):
        train(run)
    assert run.engine.releases == 1


@pytest.mark.parametrize("warm", [False, True])
def test_hooks_that_change_a_parameters_gradient(warm: bool) -> None:
    """Half of a table is kept as it is by a hook: a private step would not know of it. One that only looks may stay."""
    model, seen = mlp(), []
    model[0].weight.register_hook(lambda g: seen.append(float(g.norm())))
    run = attach(model)
    train(run)
    assert seen
    if not warm:
        model = mlp()
        run = attach(model)
    model[2].weight.register_hook(lambda g: g * torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    if warm:  # nothing would call it any more: no ordinary gradient is computed
        run.engine.detach()
        run = attach(model)
    with refused(dpkit.UncoveredParameterError, "2.weight", "register_hook", "mask"):
        train(run)


def test_optimizers_that_step_in_the_backward() -> None:
    """They would be given the ordinary gradient of the first batch."""
    model = mlp()
    before = weights(model)
    each = {p: torch.optim.SGD([p], lr=1.0) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: each[p].step())
    run = attach(model)
    with refused(dpkit.ConfigurationError, "0.weight", "accumulated"):
        train(run)
    assert torch.equal(weights(model), before)


def test_engines_that_are_forgotten_look_at_no_optimizer() -> None:
    gc.collect()
    before = len(_watching)
    train(attach(mlp()))
    gc.collect()
    assert len(_watching) <= before
    attach(mlp()).engine.detach()
    assert len(_watching) <= before


@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("warm", [False, True])
def test_parameter_used_outside_the_forward(size: float, warm: bool) -> None:
    """A penalty on the weights in the loss: a gradient that no record is clipped for. Small ones from batch 2 on."""
    run = attach(mlp())
    if warm:
        train(run)

    def penalised() -> None:
        for _ in range(2):
            for batch in run.loader:
                (squared_loss(run.model, batch) + size * run.model[2].weight.square().sum()).backward()
                run.optimizer.step()

    with pytest.raises((dpkit.GradientMismatchError, dpkit.NonPrivateGradientError), match=r"2\.weight") as caught:
        penalised()
    assert caught.value.why
    assert caught.value.cure


def test_penalty_in_the_first_loss() -> None:
    """Refused before its step, not after."""
    run = attach(mlp())
    before = copy.deepcopy(run.model.state_dict())
    with refused(dpkit.GradientMismatchError, "2.weight", "add up"):
        for batch in run.loader:
            (squared_loss(run.model, batch) + run.model[2].weight.square().sum()).backward()
            run.optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())


def test_gradient_written_by_hand() -> None:
    """p.grad that somebody filled in is not a clipped sum."""
    run = step_on(mlp())
    with refused(dpkit.NonPrivateGradientError, "2.bias"):
        for batch in run.loader:
            squared_loss(run.model, batch).backward()
            run.model[2].bias.grad = torch.ones(1)  # type: ignore[union-attr]
            run.optimizer.step()


def test_a_refused_step_releases_nothing() -> None:
    """After a refusal neither weights nor ledger have moved, and no sum is carried over."""
    run = step_on(mlp(), noise_multiplier=1.0)
    before, ledger = copy.deepcopy(run.model.state_dict()), run.engine.accountant.ledger
    for _ in range(2):
        squared_loss(run.model, next(iter(run.loader))).backward()
        run.model[2].bias.grad = torch.ones(1)  # type: ignore[union-attr]
        with pytest.raises(dpkit.NonPrivateGradientError):
            run.optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert run.engine.accountant.ledger == ledger
    train(run)


def test_a_refused_part_takes_its_logical_batch_with_it() -> None:
    """A loop that catches the refusal and goes on: the next step holds its own records alone."""
    run = attach(mlp(), data(), 4, max_physical_batch_size=1, loss_reduction="sum")
    vector = nn.utils.parameters_to_vector
    with drawing([0], [1, 2], [3]):
        for k, (x, _) in enumerate(run.loader):
            before = vector(run.model.parameters()).detach()
            (run.model(x) * 1e6).sum().backward()
            if k == 2:
                run.model[2].bias.grad = torch.ones(1)  # type: ignore[union-attr]
                with refused(dpkit.NonPrivateGradientError, "2.bias"):
                    run.optimizer.step()
                continue
            run.optimizer.step()
            moved = float((vector(run.model.parameters()).detach() - before).norm()) * 4
            assert moved == pytest.approx(0.0 if k == 1 else 1.0, rel=1e-3)


def test_closure() -> None:
    """It is evaluated before the gradient is clipped and noised: the step is the one without a closure."""
    ends = []
    for how in ("plain", "closure", "keyword"):
        run = attach(mlp(), noise_multiplier=0.7, noise_generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            for batch in run.loader:

                def closure(batch: Any = batch, run: Any = run) -> torch.Tensor:
                    run.optimizer.zero_grad()
                    loss = squared_loss(run.model, batch)
                    loss.backward()
                    return loss

                if how == "plain":
                    closure()
                    run.optimizer.step()
                else:
                    assert (
                        run.optimizer.step(**{"closure": closure}) > 0
                        if how == "keyword"
                        else run.optimizer.step(closure)
                    )
        ends.append(weights(run.model))
        assert run.engine.get_epsilon(1e-5) > 0
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_closure_that_is_evaluated_again() -> None:
    """SAM and line searches would use the data beyond the noisy gradient."""

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    model = mlp()
    run = attach(model, optimizer=Twice(model.parameters(), lr=1.0))
    for batch in run.loader:
        with refused(dpkit.ConfigurationError, "second time", "first-order"):
            run.optimizer.step(lambda batch=batch: squared_loss(model, batch).backward())
        with refused(dpkit.ConfigurationError, "was given str", "closure"):
            run.optimizer.step("closure")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_that_look_at_more_than_the_gradient(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = mlp()
    with refused(dpkit.ConfigurationError, kind.__name__):  # type: ignore[attr-defined]
        attach(model, optimizer=kind(model.parameters()))


def test_two_engines() -> None:
    """On one model; and one engine on two models."""
    model = mlp()
    run = attach(model)
    with refused(dpkit.ConfigurationError, "private already", "detach"):
        attach(model)
    other = mlp()
    with refused(dpkit.ConfigurationError, "attached already", "detach"):
        run.engine.make_private(
            module=other,
            optimizer=torch.optim.SGD(other.parameters(), lr=1.0),
            data_loader=DataLoader(data(), 4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    train(run)


# --- rules ---


class Scale(nn.Module):
    """y = weight · x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("factor", [1.0, 1.01, 2.0, 0.0, -1.0])
def test_wrong_rule(factor: float) -> None:
    """A rule that is off by a factor is caught on the first batch; the right one is not."""

    @dpkit.register_rule(Scale)
    def scale(layer: Scale, x: Tensor, grad: Tensor) -> Any:
        yield layer.weight, dpkit.Dense(factor * grad * x)

    try:
        model = nn.Sequential(Scale(), nn.Linear(4, 1))
        if factor == 1.0:
            step_on(model)
        else:
            with refused(dpkit.GradientMismatchError, "0.weight", "register_rule"):
                step_on(model)
    finally:
        dpkit.unregister_rule(Scale)


def test_rule_that_credits_the_wrong_record() -> None:
    """Sums cannot tell a permutation of the records; the proof record by record can."""

    @dpkit.register_rule(Scale)
    def scale(layer: Scale, x: Tensor, grad: Tensor) -> Any:
        yield layer.weight, dpkit.Dense((grad * x).roll(1, 0))

    try:
        with pytest.raises((dpkit.GradientMismatchError, dpkit.CoupledRecordsError), match=r"0\.weight"):
            step_on(nn.Sequential(Scale(), nn.Linear(4, 1)))
    finally:
        dpkit.unregister_rule(Scale)


def test_rule_that_is_right_for_the_last_record_only() -> None:
    """All records are looked at, not one of them."""

    @dpkit.register_rule(Scale)
    def scale(layer: Scale, x: Tensor, grad: Tensor) -> Any:
        factors = torch.full((len(x), 1), 0.5)
        factors[-1] = 1.0
        yield layer.weight, dpkit.Dense(factors * grad * x)

    try:
        with refused(dpkit.GradientMismatchError, "0.weight", "add up"):
            step_on(nn.Sequential(Scale(), nn.Linear(4, 1)))
    finally:
        dpkit.unregister_rule(Scale)


def test_rule_that_forgets_a_parameter() -> None:
    """The parameter received a gradient and has no form."""

    class Affine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    @dpkit.register_rule(Affine)
    def affine(layer: Affine, x: Tensor, grad: Tensor) -> Any:
        yield layer.weight, dpkit.Outer(grad, x)

    try:
        with pytest.raises(dpkit.PrivacyError, match=r"0\.bias"):
            step_on(nn.Sequential(Affine(4, 3), nn.Linear(3, 1)))
    finally:
        dpkit.unregister_rule(Affine)


def test_duplicate_rule() -> None:
    with pytest.raises(ValueError, match="Linear already has a rule"):
        dpkit.register_rule(nn.Linear)(lambda layer, x, grad: iter(()))
    with pytest.raises(TypeError, match="Module"):
        dpkit.register_rule(int)(lambda layer, x, grad: iter(()))  # type: ignore[type-var]


# --- the strict door ---


@pytest.mark.parametrize(
    "reduce",
    [
        lambda losses: losses.mean(),
        lambda losses: losses.mean(0, keepdim=True).squeeze(),
        lambda losses: losses - losses.T,
        lambda losses: losses.expand(-1, 2),
        lambda losses: losses[None],
        lambda losses: losses[:, None],
    ],
    ids=["scalar", "0-dimensional", "[n, n]", "[n, 2]", "[1, n, 1]", "[n, 1, 1]"],
)
def test_losses_of_another_shape(reduce: Callable[[Tensor], Tensor]) -> None:
    """A broadcast [n, n], above all, is how a [n, 1] loss once lost its bound."""
    run = attach(mlp())
    for x, y in run.loader:
        with refused(dpkit.ConfigurationError, "losses has shape", 'reduction="none"'):
            run.engine.backward(reduce((run.model(x) - y).square()))


def test_one_column_is_flattened() -> None:
    """[n, 1] is [n]."""
    outcomes = []
    for flat in (True, False):
        run = attach(mlp())
        for x, y in run.loader:
            losses = (run.model(x) - y).square()
            assert losses.shape == (8, 1)
            run.engine.backward(losses.squeeze(1) if flat else losses)
            run.optimizer.step()
        outcomes.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_number_of_losses(rows: int) -> None:
    run = attach(mlp())
    for x, y in run.loader:
        losses = (run.model(x) - y).square().flatten()
        with refused(dpkit.DoubleUseError, f"{rows} losses", "8 drawn"):
            run.engine.backward(losses.repeat(2)[:rows])


def test_losses_outside_a_batch() -> None:
    run = attach(mlp())
    with refused(dpkit.DoubleUseError, "8 losses", "0 drawn"):
        run.engine.backward((run.model(data().tensors[0])).square().flatten())


@pytest.mark.parametrize(
    "couple",
    [
        lambda out: out - out.mean(),
        lambda out: out.cumsum(0),
        lambda out: out.softmax(0),
        lambda out: out + out.roll(1),
    ],
    ids=["centred", "cumulative", "softmax", "neighbour"],
)
def test_coupled_losses(couple: Callable[[Tensor], Tensor]) -> None:
    """A loss that looks at other records' outputs."""
    run = attach(mlp())
    with refused(dpkit.CoupledRecordsError, "record 7"):
        for x, _ in run.loader:
            run.engine.backward(couple(run.model(x).flatten()).square())


@pytest.mark.parametrize("record", range(7))
def test_one_coupled_loss(record: int) -> None:
    """It need not be the last record's loss that looks at another record's output."""

    def couple(out: Tensor) -> Tensor:
        return torch.cat([out[:record], out[record : record + 1] + out[7], out[record + 1 :]])

    run = attach(mlp())
    with refused(dpkit.CoupledRecordsError, f"record {record}"):
        for x, _ in run.loader:
            run.engine.backward(couple(run.model(x).flatten()).square())


def test_strict_door_before_make_private() -> None:
    with pytest.raises(dpkit.NotAttachedError, match="make_private"):
        dpkit.PrivacyEngine().backward(torch.zeros(3))


# --- numbers and names ---


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("noise_multiplier", v) for v in (-1.0, NAN, INF, "1", True, torch.ones(2))),
        *(("max_grad_norm", v) for v in (0.0, -1.0, NAN, INF, None, "1")),
        *(("max_physical_batch_size", v) for v in (0, -1, 2.5, "4", True)),
        *(("clipping", v) for v in ("ghost", "Flat", "", None, 1, object())),
        *(("loss_reduction", v) for v in ("none", "MEAN", None)),
        *(("target_delta", v) for v in (0.0, 1.0, -1e-5, 5.0, NAN)),
    ],
)
def test_bad_arguments(name: str, value: object) -> None:
    """Out of range, not a number, unknown: refused at once, by the argument's name."""
    with refused(dpkit.ConfigurationError, name):
        attach(mlp(), **{name: value})


@pytest.mark.parametrize(
    "targets",
    [
        {"target_epsilon": 3.0},
        {"target_epsilon": 3.0, "target_delta": 1e-5},
        {"target_epsilon": 3.0, "epochs": 2},
        {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 2, "steps": 3},
        {"target_delta": 1e-5, "epochs": 2},
        {},
    ],
    ids=lambda targets: " ".join(targets) or "nothing",
)
def test_incomplete_targets(targets: dict[str, Any]) -> None:
    """Half a target says nothing."""
    with refused(dpkit.ConfigurationError, "noise_multiplier", "target"):
        make_private(**targets)


def make_private(engine: dpkit.PrivacyEngine | None = None, **options: Any) -> None:
    model = mlp()
    (engine or dpkit.PrivacyEngine()).make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data(), 4),
        max_grad_norm=1.0,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("target_epsilon", v) for v in (0.0, -1.0, NAN, INF)),
        *(("target_delta", v) for v in (0.0, 1.0, 2.0, NAN)),
        *(("epochs", v) for v in (0, -1, 1.5)),
    ],
)
def test_bad_targets(name: str, value: object) -> None:
    with refused(dpkit.ConfigurationError, name):
        make_private(**{"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 2, name: value})


def test_noise_and_target() -> None:
    """One determines the other; and a target does not count what was spent before."""
    with refused(dpkit.ConfigurationError, "noise_multiplier", "target_epsilon"):
        make_private(noise_multiplier=1.0, target_epsilon=3.0, target_delta=1e-5, epochs=2)
    run = attach(mlp(), noise_multiplier=1.0)
    train(run)
    run.engine.detach()
    with refused(dpkit.ConfigurationError, "target_epsilon", "spent"):
        make_private(run.engine, target_epsilon=3.0, target_delta=1e-5, epochs=2)


def test_wrong_objects() -> None:
    model = mlp()
    loader = DataLoader(data(), 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for module, opt, word in ((model.forward, optimizer, "method"), (model, "sgd", "str")):
        with pytest.raises(dpkit.ConfigurationError, match=word):
            dpkit.PrivacyEngine().make_private(
                module=module,  # type: ignore[type-var]
                optimizer=opt,  # type: ignore[type-var]
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )


class OwnClipping:
    """Clips each parameter by itself, to C or, rightly, to C / √k."""

    def __init__(self, right: bool, wide: bool = True) -> None:
        self.right, self.wide = right, wide

    def weights(self, norms: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
        bound = max_grad_norm / norms.shape[1] ** 0.5 if self.right else max_grad_norm
        weights = (bound / norms).clamp(max=1.0)
        return weights if self.wide else weights.T

    def sensitivity(self, max_grad_norm: float) -> float:
        return max_grad_norm


def test_a_clipping_that_exceeds_what_it_says() -> None:
    attach_and_train = lambda clipping: train(attach(mlp(), clipping=clipping, max_grad_norm=0.01))  # noqa: E731
    attach_and_train(OwnClipping(True))
    with refused(dpkit.ConfigurationError, "lets a record contribute 0.02", "while sensitivity is 0.01"):
        attach_and_train(OwnClipping(False))
    with refused(dpkit.ConfigurationError, "clipping.weights gives [4, 8]"):
        attach_and_train(OwnClipping(True, wide=False))


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm"])
@pytest.mark.parametrize("value", [-1.0, NAN, INF, "1"])
def test_bad_schedule(name: str, value: object) -> None:
    """Set between steps, the same bounds hold, and the old value stays."""
    run = attach(mlp(), noise_multiplier=2.0, max_grad_norm=2.0)
    with refused(dpkit.ConfigurationError, name):
        setattr(run.engine, name, value)
    assert getattr(run.engine, name) == 2.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, NAN, "1e-5"])
def test_bad_delta(delta: Any) -> None:
    run = attach(mlp(), noise_multiplier=1.0)
    with refused(dpkit.ConfigurationError, "delta"):
        run.engine.get_epsilon(delta)
    with refused(dpkit.ConfigurationError, "delta"):
        run.engine.get_epsilon()


def test_engine_arguments() -> None:
    with pytest.raises(ValueError, match="moments"):
        dpkit.PrivacyEngine(accountant="moments")
    with pytest.raises(TypeError, match="grad_sample_mode"):
        attach(mlp(), grad_sample_mode="ghost")  # no **kwargs that swallow


# --- the errors themselves ---


def test_one_family() -> None:
    """Every error is a PrivacyError, is documented, and survives being sent between processes."""
    kinds = [v for name in dpkit.__all__ if isinstance(v := getattr(dpkit, name), type) and issubclass(v, Exception)]
    assert len(kinds) >= 12
    for kind in kinds:
        assert issubclass(kind, dpkit.PrivacyError)
        assert kind.__doc__
        error = pickle.loads(pickle.dumps(kind("seen", why="why", cure="cure")))
        assert type(error) is kind
        assert (error.seen, error.why, error.cure) == ("seen", "why", "cure")
        assert str(error) == "seen\n  Why: why\n  Cure: cure"
