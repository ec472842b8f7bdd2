"""The real optimizer step, without noise, equals the definition: −(Σ clipped per-record gradients) / expected batch.

Over every model kind, in float32 (train mode) and float64 (eval mode), every clipping and both loss reductions. The
threshold is the median of the batch's gradient norms, so that about half of the records are clipped.
"""

from __future__ import annotations

import copy

import pytest
import torch

import dpkit
from tests.cases import CASES, ModelCase, select
from tests.hf_models import FAST, HF_CASES
from tests.oracle import clipped_sum, norm, size
from tests.stepping import median_norm, private_step

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # an even kernel pads unevenly: on purpose

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
TOLERANCE_FLOAT32_INSIDE = 1e-5


def assert_exact(
    case: ModelCase, dtype: torch.dtype, *, n: int | None = None, clipping: str = "flat", **options: object
) -> None:
    """Fails unless the private step of `case` on n records is the definition's, to a relative `TOLERANCE`."""
    model, batch = case.model(dtype, train=dtype == torch.float32), case.records(n, dtype=dtype)
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
        # A failed proof is no reasoned refusal: either a rule is wrong or the proof is too strict.
        if "may_refuse" in case.tags and not isinstance(refusal, dpkit.GradientMismatchError):
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


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8])
def test_number_of_records(case: ModelCase, n: int) -> None:
    """Numbers of records that coincide with widths, heads, lengths, channels: none is taken for the batch."""
    assert_exact(case, torch.float64, n=n)


@pytest.mark.slow
@every_case
def test_physical_batches_of_every_case(case: ModelCase) -> None:
    """5 records in parts of 2, 2 and 1."""
    assert_exact(case, torch.float64, max_physical_batch_size=2)
