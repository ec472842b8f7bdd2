"""The oracle and the cases check each other before either is used on dpkit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.cases import CASES, ModelCase
from tests.hf_models import HF_CASES
from tests.oracle import batched_vjp_grads, clip, clipped_sum, norm, per_record_grads, size, take

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # an even kernel pads unevenly: on purpose

TOLERANCE = 1e-10
TOLERANCE_FLOAT32_INSIDE = 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_oracles_agree(case: ModelCase) -> None:
    """The loop over single records and the batched VJP give the same gradients, and they are not all zero."""
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", HF_CASES, ids=lambda case: case.name)
def test_two_oracles_agree_on_hugging_face(case: ModelCase) -> None:
    """The same over the 54 architectures."""
    check_case(case)


def check_case(case: ModelCase) -> None:
    """Fails unless `case` is sound: its records independent, its losses one per record, its gradients not trivial."""
    model, batch, n = case.model(torch.float64), case.records(dtype=torch.float64), case.n
    assert size(batch) == n
    loop = per_record_grads(model, case.losses, batch, n)
    norms = torch.stack([norm(grad) for grad in loop])
    assert torch.isfinite(norms).all()
    assert (norms > 1e-6).all()
    assert norms.max() > 1.001 * norms.min(), "records should differ"
    singles = torch.cat([case.losses(model, take(batch, i)) for i in range(n)])
    tolerance = TOLERANCE_FLOAT32_INSIDE if "float32_inside" in case.tags else TOLERANCE
    torch.testing.assert_close(case.losses(model, batch), singles, rtol=tolerance, atol=tolerance)
    if "loop_only" in case.tags:
        return
    for name, stacked in batched_vjp_grads(model, case.losses, batch, n).items():
        for i in range(n):
            error = (stacked[i] - loop[i][name]).norm()
            assert error <= tolerance * norms[i], f"{name}, record {i}: {error:.2e} of {norms[i]:.2e}"


def test_clip_is_what_the_papers_say() -> None:
    """Flat leaves short gradients alone, automatic never does, per-layer bounds each tensor and so the whole."""
    grad = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert norm(grad) == 5
    assert norm(clip(grad, 10.0)) == 5
    assert norm(clip(grad, 1.0)).item() == pytest.approx(1.0)
    assert norm(clip(grad, 1.0, "automatic")).item() == pytest.approx(5 / 5.01)
    per_layer = clip(grad, 5.0, "per_layer")
    assert per_layer["a"].norm() == 3
    assert per_layer["b"].norm().item() == pytest.approx(5 / 2**0.5)


def test_shared_parameter_counts_once() -> None:
    """A weight under two names is one entry of the gradient."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    x = torch.randn(2, 3)
    grads = per_record_grads(model, lambda model, x: model(x).square().sum(1), x, 2)
    assert [list(grad) for grad in grads] == [["0.weight"]] * 2


def test_clipped_sum_of_a_linear_model_by_hand() -> None:
    """y = w·x with loss y: each record's gradient is its x."""
    model = nn.Linear(2, 1, bias=False)
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    total = clipped_sum(model, lambda model, x: model(x)[:, 0], x, 2, max_grad_norm=1.0)
    torch.testing.assert_close(total["weight"], torch.tensor([[0.9, 1.2]]))
