"""dpkit.testing finds what is wrong, says where, and finds nothing where nothing is."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpkit
from dpkit.testing import ClippingCase, ModuleCase, batches, check_loop, check_rule, clipping_cases, modules, released
from tests import models as m

ROOT = Path(__file__).resolve().parent.parent


class Scale(nn.Module):
    """y = weight * x + bias."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.linspace(0.5, 1.5, width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def right(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    yield layer.weight, dpkit.Dense((grad * x).flatten(1, -2).sum(1))
    yield layer.bias, dpkit.Dense(grad.flatten(1, -2).sum(1))


@pytest.fixture
def rule() -> Iterator[Callable[[Any], None]]:
    """Registers a rule for `Scale`, for one test."""

    def register(function: Any) -> None:
        dpkit.register_rule(Scale)(function)

    yield register
    dpkit.unregister_rule(Scale)


X = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))


def test_custom_layers_page() -> None:
    """docs/custom_layers.md, from top to bottom; in a process of its own, as it registers rules."""
    page = (ROOT / "docs" / "custom_layers.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.S))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Shifted: followed, 5 records" in done.stdout


def test_a_right_rule(rule: Callable[[Any], None]) -> None:
    rule(right)
    for x in (X, X.double()):
        report = check_rule(Scale().to(x.dtype), x)
        assert (report.how, report.records, report.module) == ("its rule", 5, "Scale")
        assert set(report.errors) == {"weight", "bias"}
        assert max(report.errors.values()) < (1e-12 if x.dtype == torch.float64 else 1e-5)
        assert 0.5 < report.sensitivity <= 1 + 1e-2
        assert "weight: relative error" in str(report)


def _scaled(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    for p, form in right(layer, x, grad):
        yield p, form.scaled(torch.full((len(x),), 0.5)) if p is layer.weight else form


def _rolled(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    yield layer.weight, dpkit.Dense((grad * x).flatten(1, -2).sum(1).roll(1, 0))
    yield layer.bias, dpkit.Dense(grad.flatten(1, -2).sum(1))


def _one_record(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    factors = torch.ones(len(x))
    factors[2] = 1.5
    for p, form in right(layer, x, grad):
        yield p, form.scaled(factors) if p is layer.weight else form


def _forgets(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    yield layer.weight, dpkit.Dense((grad * x).flatten(1, -2).sum(1))


def _rows(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    yield layer.weight, dpkit.Dense((grad * x).flatten(0, -2))
    yield layer.bias, dpkit.Dense(grad.flatten(1, -2).sum(1))


def _infinite(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    for p, form in right(layer, x, grad):
        yield p, form.scaled(torch.tensor([1.0, 1, torch.nan, 1, 1]))


class TooShort(dpkit.Dense):
    """Reports norms that are too small, so that a record would exceed its bound."""

    def sq_norm(self) -> Tensor:
        return super().sq_norm() / 4


def _short_norms(layer: Scale, x: Tensor, grad: Tensor) -> Any:
    for p, form in right(layer, x, grad):
        yield p, TooShort(form.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (_scaled, "weight, record"),
        (_rolled, "weight, record"),
        (_one_record, "weight, record 2"),
        (_forgets, "no gradient was found"),
        (_rows, "15 records, there are 5"),
        (_infinite, "record 2"),
        (_short_norms, "below the gradient's own norm"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_wrong_rules(rule: Callable[[Any], None], wrong: Any, words: str) -> None:
    """Each is named by parameter and record."""
    rule(wrong)
    with pytest.raises(AssertionError, match=re.escape(words)):
        check_rule(Scale(), X)


@pytest.mark.parametrize(
    ("module", "inputs", "kwargs", "how"),
    [
        (nn.Linear(4, 3), (X,), {}, "its rule"),
        (nn.LSTM(4, 3, batch_first=True), (X,), {}, "followed"),
        (nn.MultiheadAttention(4, 2, batch_first=True), (X, X, X), {"need_weights": False}, "followed"),
        (nn.Embedding(7, 3, padding_idx=0), (torch.arange(15).view(5, 3) % 7,), {}, "its rule"),
        (nn.Bilinear(4, 4, 2), (X[:, 0], X[:, 1]), {}, "followed"),
        (m.GatedLinear(4), (X, X.flip(0)), {"power": 2.0}, "followed"),
        (m.GatedLinear(4), (X,), {"gate": X.flip(1)}, "followed"),
        (Scale(), (X,), {}, "followed"),
        (nn.Conv1d(3, 2, 3), (X,), {}, "its rule"),
        (m.Experts(), (X[..., :3],), {}, "one record at a time"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_modules_of_all_kinds(module: nn.Module, inputs: Any, kwargs: Any, how: str) -> None:
    assert check_rule(module, *inputs, **kwargs).how == how


def test_dropout_is_off() -> None:
    """The module is copied, and the copy is in eval mode; the user's own is left as it is."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    check_rule(module, X)
    assert module.training
    assert all(p.grad is None for p in module.parameters())


class Coupled(nn.Module):
    """Centres over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


def test_modules_that_mix_records() -> None:
    with pytest.raises(AssertionError):
        check_rule(Coupled(), X)


@pytest.mark.parametrize("inputs", [(), (torch.tensor(1.0),), (X[:1],)])
def test_nothing_to_check(inputs: Any) -> None:
    with pytest.raises(ValueError, match="at least two records"):
        check_rule(nn.Linear(4, 2), *inputs)
    with pytest.raises(ValueError, match="no trainable parameter"):
        check_rule(nn.Linear(4, 2).requires_grad_(False), X)
    with pytest.raises(ValueError, match="rows of records"):
        check_rule(Reduced(), X)


class Reduced(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum((0, 1))


# --- loops ---


DATA = TensorDataset(X.flatten(1), torch.linspace(-1, 1, 5)[:, None])


def ordinary(engine: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def scaled_by_the_batch(engine: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        losses = (model(x) - y).square()
        (losses * (losses.detach().sum() > 3)).mean().backward()
        optimizer.step()


def twice(engine: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
    for _ in range(2):
        ordinary(engine, model, optimizer, loader)


@pytest.mark.parametrize("options", [{}, {"clipping": "automatic"}, {"max_physical_batch_size": 2}])
def test_a_sound_loop(options: dict[str, Any]) -> None:
    worst = check_loop(nn.Linear(12, 1), DATA, ordinary, max_grad_norm=0.5, **options)
    assert 0.5 < worst <= 1.001


def test_loops_that_are_not() -> None:
    torch.manual_seed(1)
    model = nn.Linear(12, 1)
    with torch.no_grad():
        model.weight.mul_(4)
    with pytest.raises(AssertionError, match="moves the step by"):
        check_loop(model, DATA, gated_by_the_batch(model), max_grad_norm=0.5)
    with pytest.raises(AssertionError, match="took 2 steps"):
        released(model, DATA, twice)
    with pytest.raises(ValueError, match="at least two"):
        check_loop(model, TensorDataset(*DATA[:1]), ordinary)


def gated_by_the_batch(model: nn.Module) -> Any:
    """Trains on the other records only where the first one is there."""

    def loop(engine: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
        for x, y in loader:
            optimizer.zero_grad()
            there = float((x == DATA.tensors[0][0]).all(1).any())
            (there * (model(x) - y).square()).mean().backward()
            optimizer.step()

    return loop


def test_records_can_be_chosen() -> None:
    """Only the records that are asked for are left out."""
    check_loop(nn.Linear(12, 1), DATA, gated_by_the_batch(nn.Linear(12, 1)), max_grad_norm=0.5, records=[3])


# --- strategies ---


@settings(max_examples=15, deadline=None)
@given(case=clipping_cases(), data=st.data())
def test_clipping_cases(case: ClippingCase, data: st.DataObject) -> None:
    case.check(data.draw(st.integers(0, case.n - 1)))


@settings(max_examples=15, deadline=None)
@given(case=clipping_cases(least=2, most=4, max_physical_batch_size=None, wild=False))
def test_a_sum_is_the_sum_of_its_records(case: ClippingCase) -> None:
    whole = case.sum(range(case.n))
    parts = torch.stack([case.sum([k]) for k in range(case.n)]).sum(0)
    assert (whole - parts).norm() <= 1e-7 * case.n * case.max_grad_norm


class NoClipping:
    """Claims a sensitivity that it does not keep."""

    def weights(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        return torch.ones_like(norms[:, 0])

    def sensitivity(self, max_grad_norm: float) -> float:
        return max_grad_norm


def test_a_clipping_of_ones_own_that_does_not_clip() -> None:
    """The strategies find it, or the step itself."""

    @settings(max_examples=20, deadline=None, database=None, phases=[Phase.generate])
    @given(case=clipping_cases(clipping=NoClipping(), max_grad_norm=0.01))
    def property_of(case: ClippingCase) -> None:
        case.check()

    with pytest.raises(
        (AssertionError, dpkit.ConfigurationError), match=r"times max_grad_norm|lets a record contribute"
    ):
        property_of()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_modules_and_batches(data: st.DataObject) -> None:
    case = data.draw(modules("mlp", "sequence"))
    x, y = data.draw(batches(case, 2, 3))
    assert 2 <= len(x) == len(y) <= 3
    losses = case.losses(case.build().double(), x, y)
    assert losses.shape == (len(x),)


def test_own_modules_in_the_strategies() -> None:
    own = ModuleCase(Scale, lambda n, generator: torch.randn(n, 4, generator=generator))

    @settings(max_examples=5, deadline=None)
    @given(case=clipping_cases(modules=st.just(own), most=3))
    def property_of(case: ClippingCase) -> None:
        assert isinstance(case.model(), Scale)
        case.check(0)

    property_of()
    with pytest.raises(dpkit.ConfigurationError, match="transformer"):
        modules("transformer")


def test_without_hypothesis() -> None:
    """Only the strategies need it, and they say so."""
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import torch, dpkit.testing as t\n"
        "t.check_rule(torch.nn.Linear(2, 1), torch.randn(3, 2))\n"
        "try: t.modules\nexcept ImportError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dpkit.testing.modules needs hypothesis: pip install 'dpkit[test]'" in done.stdout
