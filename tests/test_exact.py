"""The real optimizer step, without noise, equals the definition: −(Σ clipped per-record gradients) / expected batch.

Over every model kind, in float32 (train mode) and float64 (eval mode), every clipping and both loss reductions. The
threshold is the median of the batch's gradient norms, so that about half of the records are clipped.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpkit
from tests.cases import CASES, ModelCase, select
from tests.hf_models import FAST, HF_CASES
from tests.oracle import Losses, PyTree, clipped_sum, norm, per_record_grads, size, take, trainable

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # an even kernel pads unevenly: on purpose

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
TOLERANCE_FLOAT32_INSIDE = 1e-5
LEARNING_RATE = {torch.float32: 2.0**14, torch.float64: 1.0}
"""A large power of two in float32, so that rounding `p - lr · g` to p's precision does not hide what is compared."""


def median_norm(model: nn.Module, losses: Losses, batch: PyTree) -> float:
    """A threshold that clips about half of the records."""
    return float(torch.stack([norm(grad) for grad in per_record_grads(model, losses, batch, size(batch))]).median())


def private_step(
    model: nn.Module,
    losses: Losses,
    batch: PyTree,
    max_grad_norm: float,
    *,
    clipping: str = "flat",
    loss_reduction: str = "mean",
    batch_first: bool = True,
    max_physical_batch_size: int | None = None,
    strict: bool = False,
) -> dict[str, Tensor]:
    """What one noiseless private step adds to each trainable parameter at learning rate 1.

    The data set is `batch` and the sample rate 1, so that every Poisson draw is the whole of it.
    """
    n = size(batch)
    parameters = trainable(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    rate = LEARNING_RATE[next(iter(before.values())).dtype]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    loader = DataLoader(range(n), batch_size=n, collate_fn=lambda rows: take(batch, list(rows)))
    engine = dpkit.PrivacyEngine()
    private_model, private_optimizer, private_loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        loss_reduction=loss_reduction,
        batch_first=batch_first,
        max_physical_batch_size=max_physical_batch_size,
    )
    assert private_model is model
    assert private_optimizer is optimizer
    for part in private_loader:
        optimizer.zero_grad()
        values = losses(model, part)
        if strict:
            engine.backward(values)
        else:
            (values.mean() if loss_reduction == "mean" else values.sum()).backward()
        optimizer.step()
    engine.detach()
    return {name: (parameter.detach() - before[name]) / rate for name, parameter in parameters.items()}


def assert_exact(case: ModelCase, dtype: torch.dtype, *, clipping: str = "flat", **options: object) -> None:
    """Fails unless the private step of `case` is the definition's, to a relative `TOLERANCE`."""
    model, batch = case.model(dtype, train=dtype == torch.float32), case.records(dtype=dtype)
    oracle_model = copy.deepcopy(model)
    n = size(batch)
    max_grad_norm = median_norm(oracle_model, case.losses, batch)
    total = clipped_sum(oracle_model, case.losses, batch, n, max_grad_norm, clipping)
    try:
        step = private_step(
            model,
            case.losses,
            batch,
            max_grad_norm,
            clipping=clipping,
            batch_first="time_first" not in case.tags,
            **options,  # type: ignore[arg-type]
        )
    except dpkit.PrivacyError as refusal:
        if "may_refuse" in case.tags:
            pytest.skip(f"refused: {type(refusal).__name__}: {refusal}")
        raise
    assert step.keys() == total.keys()
    tolerance = TOLERANCE_FLOAT32_INSIDE if "float32_inside" in case.tags else TOLERANCE[dtype]
    scale = norm(total).item() / n
    wrong = {
        name: error / scale
        for name in total
        if not (error := (step[name] + total[name] / n).norm().item()) <= tolerance * scale
    }
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
one_per_trait = pytest.mark.parametrize(
    "case",
    [case for case in select(without="may_refuse") if case.name in {
        "mlp", "linear-4d", "conv2d", "cnn", "embedding-padding", "layer-norm-3d", "lm-tied-T-equals-n",
        "encoder-layer-padding", "vision-transformer", "called-twice", "weight-norm", "keyword-only-dict-output",
    }],
    ids=lambda case: case.name,
)  # fmt: skip


@every_case
def test_flat_float64(case: ModelCase) -> None:
    """Flat clipping, summed loss, eval mode: 1e-10."""
    assert_exact(case, torch.float64, loss_reduction="sum")


@every_case
def test_flat_float32(case: ModelCase) -> None:
    """Flat clipping, averaged loss, train mode: 1e-5."""
    assert_exact(case, torch.float32, loss_reduction="mean")


@every_case
def test_automatic(case: ModelCase) -> None:
    """Automatic clipping: 1e-10."""
    assert_exact(case, torch.float64, clipping="automatic")


@every_case
def test_per_layer(case: ModelCase) -> None:
    """Per-layer clipping: 1e-10."""
    assert_exact(case, torch.float64, clipping="per_layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", [case for case in HF_CASES if case.name in FAST], ids=lambda case: case.name)
def test_hugging_face(case: ModelCase, dtype: torch.dtype) -> None:
    """Architectures from transformers, tiny."""
    assert_exact(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in HF_CASES if case.name not in FAST], ids=lambda case: case.name)
def test_hugging_face_all(case: ModelCase) -> None:
    """The rest of the 54."""
    assert_exact(case, torch.float64)


@one_per_trait
def test_strict_door(case: ModelCase) -> None:
    """``engine.backward(losses)`` is the same step."""
    assert_exact(case, torch.float64, strict=True)


@one_per_trait
@pytest.mark.parametrize("physical", [1, 2, 3])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
def test_physical_batches(case: ModelCase, physical: int, loss_reduction: str) -> None:
    """The split of a logical batch into physical ones does not matter, a physical batch of one included."""
    assert_exact(case, torch.float64, max_physical_batch_size=physical, loss_reduction=loss_reduction)
