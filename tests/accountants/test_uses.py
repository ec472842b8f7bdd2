"""Calibration, trade-off curves, filters, imports, the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dpkit.accountants.__main__ import main

from dpkit.accountants import (
    AccountingError,
    BudgetSpentError,
    Gaussian,
    GDPAccountant,
    GDPFilter,
    PLDAccountant,
    PoissonSampled,
    RandomizedResponse,
    RDPAccountant,
    RDPFilter,
    RDPOdometer,
    UnreachableTargetError,
    adaptive_clipping,
    adaptive_clipping_gradient_noise,
    banded_matrix,
    calibrate,
    delta,
    dpsgd,
    epsilon,
    from_dp_accounting,
    from_opacus,
    tradeoff,
)


@pytest.mark.parametrize("name", ["cal_e1_q.01_T1000", "cal_deepmind_e8", "cal_e0.1_q.001_T1e4", "cal_e50_q.1_T100"])
def test_noise_is_calibrated_to_the_target(name: str, truth: dict[str, Any]) -> None:
    target, at, q, steps, known = truth["calibration"][name]
    sigma = calibrate(target_epsilon=target, delta=at, sample_rate=q, steps=steps)
    assert sigma == pytest.approx(known, rel=5e-5)
    assert epsilon(noise_multiplier=sigma, sample_rate=q, steps=steps, delta=at) <= target
    # the true optimum lies no further below than 1e-5 or so
    less = PLDAccountant().compose(dpsgd(sigma * (1 - 2e-5), q, steps))
    assert less.epsilon_bounds(at)[0] > target * (1 - 2e-5)
    assert epsilon(noise_multiplier=sigma * (1 - 3e-5), sample_rate=q, steps=steps, delta=at) > target


def test_rate_steps_and_epochs_are_calibrated() -> None:
    rate = calibrate(target_epsilon=3.0, delta=1e-5, noise_multiplier=1.0, steps=1000)
    assert epsilon(noise_multiplier=1.0, sample_rate=rate, steps=1000, delta=1e-5) <= 3.0
    assert epsilon(noise_multiplier=1.0, sample_rate=rate * 1.0001, steps=1000, delta=1e-5) > 3.0
    steps = calibrate(target_epsilon=3.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.01)
    assert isinstance(steps, int)
    assert epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=steps, delta=1e-5) <= 3.0
    assert epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=steps + 1, delta=1e-5) > 3.0
    by_epochs = calibrate(target_epsilon=3.0, delta=1e-5, sample_rate=0.01, epochs=3)
    assert by_epochs == calibrate(target_epsilon=3.0, delta=1e-5, sample_rate=0.01, steps=300)


def test_attack_targets_are_calibrated() -> None:
    sigma = calibrate(target_advantage=0.1, sample_rate=0.01, steps=1000)
    assert delta(noise_multiplier=sigma, sample_rate=0.01, steps=1000, epsilon=0.0) <= 0.1
    assert delta(noise_multiplier=sigma * 0.999, sample_rate=0.01, steps=1000, epsilon=0.0) > 0.1
    sigma = calibrate(target_tpr=0.01, fpr=1e-3, sample_rate=1.0, steps=10)
    assert tradeoff(Gaussian(sigma) * 10).tpr(1e-3) <= 0.01


def test_unreachable_targets_name_the_limit() -> None:
    with pytest.raises(UnreachableTargetError, match="noise_multiplier"):
        calibrate(target_epsilon=1e-9, delta=1e-12, sample_rate=1.0, steps=10**8)
    with pytest.raises(UnreachableTargetError, match="steps"):
        calibrate(target_epsilon=0.01, delta=1e-9, noise_multiplier=0.5, sample_rate=0.5)
    for bad in (
        {"target_epsilon": 1.0},
        {"target_epsilon": 1.0, "target_advantage": 0.1, "delta": 1e-5},
        {"target_tpr": 0.1, "fpr": 0.2},
        {"target_epsilon": 1.0, "delta": 1e-5, "steps": 5, "epochs": 2.0, "sample_rate": 0.1},
        {"target_epsilon": -1.0, "delta": 1e-5, "steps": 5, "sample_rate": 0.1},
    ):
        with pytest.raises(AccountingError, match="Cure"):
            calibrate(**bad)  # type: ignore[arg-type]


def test_gaussian_trade_off_down_to_tiny_rates(truth: dict[str, Any]) -> None:
    curve = tradeoff(Gaussian(1.0))
    for fpr, tpr in truth["gaussian_mu1_tradeoff"]:
        low, high = curve.tpr_bounds(fpr)
        assert tpr * (1 - 1e-3) <= low <= tpr * (1 + 1e-7)
        assert tpr * (1 - 1e-7) <= high <= tpr * (1 + 1e-3)
    assert curve.advantage == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=1e-8)
    assert curve.bayes_success() == pytest.approx(0.5 + 0.5 * curve.advantage, rel=1e-12)
    assert 1.0 <= curve.gdp_mu() <= 1.1
    assert curve.gdp_regret(1.0) == pytest.approx(0.0, abs=1e-6)


def test_trade_off_of_a_training_run() -> None:
    curve = tradeoff(dpsgd(1.0, 0.01, 1000))
    before = 0.0
    for fpr in (1e-9, 1e-3, 0.5):
        low, high = curve.tpr_bounds(fpr)
        assert max(before, fpr) <= high
        assert high * (1 - 5e-3) <= low <= high
        before = high
    assert curve.bayes_success(0.1) == pytest.approx(curve.bayes_success(0.9))
    mu = curve.gdp_mu()
    assert curve.gdp_regret(mu) >= 0.0
    assert curve.tpr(0.5) <= 0.5 + curve.advantage


def test_adaptive_clipping_and_matrices() -> None:
    noise = adaptive_clipping_gradient_noise(1.0, 5.0)
    assert noise > 1.0
    assert adaptive_clipping(noise, 5.0).noise_multiplier == pytest.approx(1.0)
    with pytest.raises(AccountingError, match="counts alone"):
        adaptive_clipping_gradient_noise(2.0, 0.9)
    assert banded_matrix(1.0, 4, 0.1, 10).flat() == [(PoissonSampled(0.1, Gaussian(1.0)), 3)]


def test_estimates_are_labelled_and_too_low() -> None:
    assert GDPAccountant.is_estimate
    assert "ESTIMATE" in (GDPAccountant.__doc__ or "")
    event = dpsgd(0.7, 256 / 60000, 10546)
    assert GDPAccountant().compose(event).epsilon(1e-5) == pytest.approx(5.066, abs=2e-3)
    assert GDPAccountant().compose(event).epsilon(1e-5) < PLDAccountant().compose(event).epsilon_bounds(1e-5)[0]


def test_filters_stop_in_time() -> None:
    step = PoissonSampled(0.01, Gaussian(1.0))
    guard = RDPFilter(2.0, 1e-5, order=8.0)
    n = 0
    while guard.admits(step):
        guard.spend(step)
        n += 1
    assert n > 100
    assert guard.left < 0.01
    with pytest.raises(BudgetSpentError, match="Cure"):
        guard.spend(step)
    assert PLDAccountant().compose(step, n).epsilon(1e-5) <= 2.0
    assert RDPAccountant().compose(step, n).epsilon(1e-5) <= 2.0 + 1e-9
    ball = GDPFilter(1.0)
    ball.spend(Gaussian(2.0), 4)
    with pytest.raises(BudgetSpentError):
        ball.spend(Gaussian(100.0))
    with pytest.raises(AccountingError, match="no Gaussian"):
        ball.admits(step)
    assert ball.epsilon(1e-5) == PLDAccountant().compose(Gaussian(1.0)).epsilon(1e-5)


def test_odometer_is_never_below_the_truth() -> None:
    step, meter, acc, last = PoissonSampled(0.05, Gaussian(1.0)), RDPOdometer(1e-5), PLDAccountant(), 0.0
    for _ in range(30):
        meter.spend(step, 20)
        acc.compose(step, 20)
        assert meter.epsilon >= last
        assert meter.epsilon >= acc.epsilon(1e-5)
        last = meter.epsilon


def test_histories_of_others() -> None:
    assert from_opacus({"history": [(1.1, 0.01, 100)]}) == from_opacus([[1.1, 0.01, 100]])  # type: ignore[arg-type]
    assert from_opacus([(1.1, 0.01, 100), (1.1, 0.01, 5)]).flat() == [(PoissonSampled(0.01, Gaussian(1.1)), 105)]
    with pytest.raises(AccountingError, match="Cure"):
        from_opacus([(1.0, 2.0)])
    dpa = pytest.importorskip("dp_accounting")
    event = dpa.ComposedDpEvent(
        [
            dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(0.01, dpa.GaussianDpEvent(1.1)), 100),
            dpa.SelfComposedDpEvent(dpa.RandomizedResponseDpEvent(0.5, 2), 7),
            dpa.NoOpDpEvent(),
        ]
    )
    assert from_dp_accounting(event).flat() == [
        (PoissonSampled(0.01, Gaussian(1.1)), 100),
        (RandomizedResponse(0.5, 2), 7),
    ]
    with pytest.raises(AccountingError, match="NonPrivate"):
        from_dp_accounting(dpa.NonPrivateDpEvent())


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--noise-multiplier", "1.1", "--sample-rate", "0.01", "--steps", "500", "--json"]
    assert main(["epsilon", *common, "--delta", "1e-5"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["epsilon"] == epsilon(noise_multiplier=1.1, sample_rate=0.01, steps=500, delta=1e-5)
    assert out["epsilon_lower"] <= out["epsilon"]
    assert main(["tradeoff", *common, "--fpr", "0.001"]) == 0
    assert json.loads(capsys.readouterr().out)["tpr"]["0.001"] > 0.001
    assert (
        main(["calibrate", "--target-epsilon", "2", "--delta", "1e-5", "--sample-rate", "0.01", "--steps", "100"]) == 0
    )
    assert "noise_multiplier" in capsys.readouterr().out
    assert main(["epsilon", "--sample-rate", "0.01", "--steps", "5", "--delta", "1e-5"]) == 2
    assert "Cure: pass --noise-multiplier" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    for command in (["epsilon", *common, "--delta", "1e-5"], ["tradeoff", *common]):
        figure = tmp_path / f"{command[0]}.png"
        assert main([*command, "--plot", str(figure)]) == 0
        assert figure.stat().st_size > 1000


def test_import_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import dpkit.accountants as a; print(a.dpsgd(1.0, 0.1, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PoissonSampled" in done.stdout
