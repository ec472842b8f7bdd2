"""Bad input to every public function: refused by its name with a reason, and nothing is lost by it.

Values come from a list of the usual accidents and from Hypothesis. What is neither refused nor good is a failure, and
so is any error of another family. `tests/test_damage.py` does the same to files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import dpkit
from dpkit import audit
from tests.training import attach, data, mlp, train, weights

ACCIDENTS: list[Any] = [
    None, True, False, "", "1", "1.0", "mean", "flat", b"1", -1, 0, 1, 2, 10**400, -1.0, 0.0, 1.0, 1.5, 5e-324,
    1e308, math.nan, math.inf, -math.inf, -(10**400), 1 + 0j, Decimal("1"), Decimal("NaN"), Fraction(1, 2), [], [1],
    (1,), {}, {1: 2}, set(), object(), int, len, np.float64(1.0), np.float64("nan"), np.float32(0.5), np.int64(2),
    np.bool_(True), np.array(1.0), np.array([1.0, 2.0]), np.array([]), np.array("x"), torch.tensor(1.0),
    torch.tensor([1.0, 2.0]),
    torch.tensor([]), torch.tensor(math.nan), nn.Linear(1, 1), range(3), Path("nowhere"),
]  # fmt: skip
HYPOTHETICAL = st.one_of(
    st.floats(), st.integers(), st.text(max_size=5), st.booleans(), st.binary(max_size=4), st.complex_numbers(),
    st.decimals(), st.fractions(), st.lists(st.floats(), max_size=3), st.floats(width=32).map(np.float32),
    st.integers(-5, 5).map(np.int32), st.floats().map(torch.tensor),
)  # fmt: skip


def number(low: float, high: float = math.inf, strict: bool = True) -> Callable[[Any], bool]:
    """Whether a value is a real number in its range (a bool is none, a 0-dimensional array neither)."""

    def good(v: Any) -> bool:
        if not isinstance(v, Real) or isinstance(v, bool | np.bool_):
            return False
        try:
            x = float(v)
        except OverflowError:
            return False
        return math.isfinite(x) and (low < x < high if strict else low <= x <= high)

    return good


def count(v: Any) -> bool:
    return isinstance(v, Integral) and not isinstance(v, bool | np.bool_) and 1 <= int(v) < 2**31


def optional(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: v is None or good(v)


def one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, type(known[0])) and v in known


positive, never = number(0.0), lambda v: False
delta = number(0.0, 1.0)
ARGUMENTS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "noise_multiplier": ({}, number(0.0, strict=False)),
    "max_grad_norm": ({}, positive),
    "target_epsilon": ({"target_delta": 1e-5, "epochs": 1, "noise_multiplier": None}, positive),
    "target_delta": ({"target_epsilon": 3.0, "epochs": 1, "noise_multiplier": None}, delta),
    "epochs": ({"target_epsilon": 3.0, "target_delta": 1e-5, "noise_multiplier": None}, count),
    "steps": ({"target_epsilon": 3.0, "target_delta": 1e-5, "noise_multiplier": None}, count),
    "max_epsilon": ({"target_delta": 1e-5, "noise_multiplier": 1e6}, optional(positive)),
    "clipping": ({}, one_of("flat", "automatic", "per_layer", "adaptive")),
    "loss_reduction": ({}, one_of("mean", "sum")),
    "max_physical_batch_size": ({}, optional(count)),
    "noise_generator": ({}, optional(never)),
    "grad_scaler": ({}, optional(never)),
    "privacy_unit": ({}, lambda v: v is None or (type(v) is int and v in (-2, -1, 0, 1)) or callable(v)),
    "max_rows_per_unit": ({"privacy_unit": [0, 0, 1, 1, 2, 2, 3, 3]}, optional(count)),
    "unit_reduction": ({"privacy_unit": [0, 0, 1, 1, 2, 2, 3, 3]}, one_of("mean", "sum")),
    "augmentations": ({}, count),
    "poisson_sampling": ({}, lambda v: isinstance(v, bool)),
    "batch_first": ({}, lambda v: isinstance(v, bool)),
}
BEYOND = ("target_epsilon", "target_delta", "epochs", "steps", "max_epsilon")
"""Where a good value may be refused all the same: nothing reaches such a target."""


def try_argument(name: str, value: Any) -> str:
    """Whether it was "refused" or "accepted"; fails if that is wrong, or if something was lost."""
    others, good = ARGUMENTS[name]
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    engine = dpkit.PrivacyEngine(accountant="rdp")
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **others, name: value}
    try:
        engine.make_private(model, optimizer, DataLoader(data(), 4), **options)
    except (dpkit.PrivacyError, dpkit.accountants.AccountingError):
        outcome = "refused"
    else:
        outcome = "accepted"
        engine.detach()
    if outcome == "accepted" or (type(value) in (int, float, str, bool) and name not in BEYOND):
        assert good(value) == (outcome == "accepted"), f"{name}={value!r} was {outcome}"
    assert torch.equal(weights(model), before)
    assert engine.accountant.ledger == ()
    assert not optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
    train(attach(model, optimizer=optimizer))  # model and optimizer are as good as new
    return outcome


def fails(value: Any) -> bool:
    """Whether it is a function that raises an error of its own when it is asked for a row's unit."""
    return value is int or isinstance(value, nn.Module)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_make_private(name: str) -> None:
    """Every accident at every argument."""
    outcomes = [try_argument(name, value) for value in ACCIDENTS if name != "privacy_unit" or not fails(value)]
    assert outcomes.count("refused") >= 20


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(set(ARGUMENTS) - {"steps", "epochs", "augmentations"})), value=HYPOTHETICAL)
def test_arguments_of_make_private_by_hypothesis(name: str, value: Any) -> None:
    try_argument(name, value)


def test_unknown_names() -> None:
    """No argument is swallowed, no name guessed."""
    with pytest.raises(TypeError, match="max_grad_nrom"):
        attach(mlp(), max_grad_nrom=1.0)
    for value in ("opacus", "PLD", "", None, 3, ["pld"]):
        with pytest.raises((dpkit.PrivacyError, dpkit.accountants.AccountingError)):
            dpkit.PrivacyEngine(accountant=value)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="PrivacyEngin"):
        _ = dpkit.PrivacyEngin  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ACCIDENTS, ids=lambda v: type(v).__name__)
def test_questions_and_schedules(value: Any) -> None:
    """get_epsilon, the schedules of σ and C, on a running engine: the old values and the ledger stay."""
    run = attach(mlp(), noise_multiplier=2.0, max_grad_norm=3.0, target_delta=1e-5)
    train(run)
    ledger = run.engine.accountant.ledger
    for name, good in (("noise_multiplier", number(0.0, strict=False)), ("max_grad_norm", positive)):
        kept = getattr(run.engine, name)
        if good(value):
            setattr(run.engine, name, value)
            setattr(run.engine, name, kept)
        else:
            with pytest.raises(dpkit.ConfigurationError, match=name):
                setattr(run.engine, name, value)
        assert getattr(run.engine, name) == kept
    if not optional(delta)(value):
        with pytest.raises(dpkit.ConfigurationError, match="delta"):
            run.engine.get_epsilon(value)
    if not count(value):
        with pytest.raises(dpkit.ConfigurationError, match="group_size"):
            run.engine.get_epsilon(group_size=value)
    with pytest.raises(dpkit.PrivacyError):
        run.engine.backward(value)
    with pytest.raises((dpkit.PrivacyError, TypeError)):
        run.engine.load_state_dict(value)
    assert run.engine.accountant.ledger == ledger
    train(run)


@pytest.mark.parametrize("value", ACCIDENTS, ids=lambda v: type(v).__name__)
def test_objects(value: Any) -> None:
    """Models, optimizers, loaders, rules and clippings that are none."""
    model = mlp()
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data(), 4)
    good = {"module": model, "optimizer": optimizer, "data_loader": loader}
    for name in good:
        if name == "module" and isinstance(value, nn.Module):
            continue
        with pytest.raises(dpkit.PrivacyError):
            dpkit.PrivacyEngine().make_private(**{**good, name: value}, noise_multiplier=1.0, max_grad_norm=1.0)
    for build in (
        lambda: dpkit.AutomaticClipping(gamma=value),
        lambda: dpkit.AdaptiveClipping(learning_rate=value),
    ):
        if positive(value):
            build()
        else:
            with pytest.raises(dpkit.ConfigurationError):
                build()
    if not (isinstance(value, type) and issubclass(value, nn.Module)):
        with pytest.raises(TypeError):
            dpkit.register_rule(value)(lambda layer, x, grad: iter(()))
    if not count(value):
        with pytest.raises(dpkit.ConfigurationError):
            audit.flip(value)
    with pytest.raises(dpkit.ConfigurationError):
        audit.one_run(value, value, delta=0.0)
    train(attach(model, optimizer=optimizer))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_data_sets(n: int) -> None:
    """Empty, of one record, and smaller than a batch."""
    if n == 1:
        train(attach(mlp(), data(1), 1))
        return
    with pytest.raises(dpkit.SamplingError, match=r"empty|exceeds"):
        attach(mlp(), data(n), 4)
