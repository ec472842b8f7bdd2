"""Calibration, trade-off curves, filters, imports, the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dpkit.accountants.__main__ import main
from dpkit.accountants.gaussian import log_delta
from scipy.special import ndtr, ndtri

from dpkit.accountants import (
    AccountingError,
    ApproximateDP,
    BudgetSpentError,
    DiscreteLaplace,
    Event,
    Gaussian,
    GDPAccountant,
    GDPFilter,
    Laplace,
    PLDAccountant,
    PoissonSampled,
    RandomAllocation,
    RandomizedResponse,
    RDPAccountant,
    RDPFilter,
    RDPOdometer,
    SampledWithoutReplacement,
    TradeOff,
    TruncatedPoissonSampled,
    UnreachableTargetError,
    adaptive_clipping,
    adaptive_clipping_gradient_noise,
    banded_matrix,
    best_order,
    calibrate,
    delta,
    dpsgd,
    epsilon,
    from_dp_accounting,
    from_opacus,
    make_accountant,
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
    with pytest.raises(UnreachableTargetError, match=r"even noise_multiplier = 100000 gives epsilon = 0\.647"):
        calibrate(target_epsilon=1e-9, delta=1e-12, sample_rate=1.0, steps=10**8)
    with pytest.raises(UnreachableTargetError, match="even steps = 1 gives epsilon"):
        calibrate(target_epsilon=0.01, delta=1e-9, noise_multiplier=0.5, sample_rate=0.5)
    with pytest.raises(UnreachableTargetError, match=r"even noise_multiplier = 100000 gives advantage = 0\.0039"):
        calibrate(target_advantage=1e-4, sample_rate=1.0, steps=10**6)
    leaky = lambda sigma, rate, steps: dpsgd(sigma, rate, steps) + ApproximateDP(0.1, 1e-3)  # noqa: E731
    with pytest.raises(UnreachableTargetError, match="reveals a record with a probability above delta"):
        calibrate(target_epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=10, build=leaky)
    for bad in (
        {"target_epsilon": 1.0},
        {"target_epsilon": 1.0, "target_advantage": 0.1, "delta": 1e-5},
        {"target_tpr": 0.1, "fpr": 0.2},
        {"target_epsilon": 1.0, "delta": 1e-5, "steps": 5, "epochs": 2.0, "sample_rate": 0.1},
        {"target_epsilon": -1.0, "delta": 1e-5, "steps": 5, "sample_rate": 0.1},
    ):
        with pytest.raises(AccountingError, match="Cure"):
            calibrate(**bad)  # type: ignore[arg-type]


def test_other_mechanisms_are_calibrated() -> None:
    def epochs(sigma: float, rate: float, steps: int) -> Event:
        return RandomAllocation(round(1 / rate), Gaussian(sigma)) * (steps * round(rate * 1000) // 1000 or 1)

    sigma = calibrate(target_epsilon=1.0, delta=1e-5, sample_rate=0.05, steps=40, build=epochs)
    event = epochs(sigma, 0.05, 40)
    assert PLDAccountant().compose(event).epsilon(1e-5) <= 1.0
    assert PLDAccountant().compose(epochs(sigma * 0.999, 0.05, 40)).epsilon(1e-5) > 1.0
    sigma = calibrate(
        target_epsilon=2.0,
        delta=1e-6,
        sample_rate=0.01,
        steps=500,
        build=lambda s, q, t: PoissonSampled(q, Laplace(s)) * t,
    )
    assert PLDAccountant().compose(PoissonSampled(0.01, Laplace(sigma)), 500).epsilon(1e-6) <= 2.0
    pairs = calibrate(target_epsilon=1.5, delta=1e-5, sample_rate=0.02, steps=200, adjacency="replace_one")
    acc = PLDAccountant("replace_one").compose(dpsgd(pairs, 0.02, 200))
    assert 1.5 * (1 - 1e-4) <= acc.epsilon(1e-5) <= 1.5


def test_gaussian_trade_off_down_to_tiny_rates(truth: dict[str, Any]) -> None:
    curve = tradeoff(Gaussian(1.0))
    for fpr, tpr in truth["gaussian_mu1_tradeoff"]:
        low, high = curve.tpr_bounds(fpr)
        assert tpr * (1 - 1e-3) <= low <= tpr * (1 + 1e-7)
        assert tpr * (1 - 1e-7) <= high <= tpr * (1 + 1e-3)
    assert curve.advantage == pytest.approx(math.erf(0.5 / math.sqrt(2)), rel=1e-8)
    assert curve.bayes_success() == pytest.approx(0.5 + 0.5 * curve.advantage, rel=1e-12)
    assert 1.0 <= curve.gdp_mu <= 1.002
    assert curve.gdp_regret(1.0) == pytest.approx(0.0, abs=1e-6)


def test_trade_off_of_a_training_run() -> None:
    curve = tradeoff(dpsgd(1.0, 0.01, 1000))
    before = 0.0
    for fpr in (1e-9, 1e-3, 0.5):
        low, high = curve.tpr_bounds(fpr)
        assert max(before, fpr) <= high
        assert high * (1 - 1e-3) <= low <= high
        before = high
    assert curve.bayes_success(0.1) == pytest.approx(curve.bayes_success(0.9))
    assert 0.0 < curve.gdp_regret() < 0.1
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
    assert not PLDAccountant.is_estimate
    assert "ESTIMATE" in (GDPAccountant.__doc__ or "")
    assert "ESTIMATE" in repr(GDPAccountant())
    assert "estimate" in GDPAccountant().state_dict()["accountant"]
    event = dpsgd(0.7, 256 / 60000, 10546)
    assert GDPAccountant().compose(event).epsilon(1e-5) == pytest.approx(5.066, abs=2e-3)
    assert GDPAccountant().compose(event).epsilon(1e-5) < PLDAccountant().compose(event).epsilon_bounds(1e-5)[0]
    with pytest.raises(AccountingError, match="estimate"):
        make_accountant("gdp")
    with pytest.raises(AccountingError, match="estimate"):
        calibrate(target_epsilon=1.0, delta=1e-5, sample_rate=0.1, steps=3, accountant="gdp")
    with pytest.raises(AccountingError, match="estimate"):
        TradeOff(GDPAccountant())
    dpkit = pytest.importorskip("dpkit")
    with pytest.raises(dpkit.PrivacyError, match="estimates"):
        dpkit.PrivacyEngine(accountant=GDPAccountant())


def test_who_needs_a_schedule_fixed_in_advance() -> None:
    assert PLDAccountant().needs_fixed_schedule
    assert RDPAccountant().needs_fixed_schedule
    assert "fixed in advance" in " ".join((PLDAccountant.__doc__ or "").split())
    for adaptive in (RDPFilter(1.0, 1e-5), GDPFilter(1.0), RDPOdometer(1e-5)):
        assert not adaptive.needs_fixed_schedule


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


def test_a_filter_of_several_orders() -> None:
    step = PoissonSampled(0.02, Gaussian(1.0))
    order = best_order(step * 500, 1e-5)
    assert RDPAccountant().compose(step, 500).epsilon(1e-5) > 0.0

    def runs(guard: RDPFilter, event: Event) -> int:
        n = 0
        while guard.admits(event, 5):
            guard.spend(event, 5)
            n += 5
        with pytest.raises(BudgetSpentError, match="Cure"):
            guard.spend(event, 5)
        return n

    one = runs(RDPFilter(3.0, 1e-5, order=order), step)
    wrong = runs(RDPFilter(3.0, 1e-5, order=20 * order), step)
    several = runs(RDPFilter(3.0, 1e-5, order=(0.5 * order, order, 20 * order)), step)
    assert wrong < several < one
    # each order has a third of delta: never more than that order alone would admit with it
    assert several <= runs(RDPFilter(3.0, 1e-5 / 3, order=order), step)
    assert PLDAccountant().compose(step, one).epsilon(1e-5) <= 3.0
    # an order that was once exceeded does not come back
    guard = RDPFilter(3.0, 1e-5, order=(order, 20 * order))
    guard.spend(step, several)
    left = guard.left
    assert not guard.admits(Gaussian(0.5))
    assert guard.left == left
    with pytest.raises(AccountingError, match="above 1"):
        RDPFilter(1.0, 1e-5, order=(2.0, 0.5))


def test_odometer_is_never_below_the_truth() -> None:
    step, meter, acc, last = PoissonSampled(0.05, Gaussian(1.0)), RDPOdometer(1e-5), PLDAccountant(), 0.0
    for _ in range(30):
        meter.spend(step, 20)
        acc.compose(step, 20)
        assert meter.epsilon >= last
        assert meter.epsilon >= acc.epsilon(1e-5)
        last = meter.epsilon


def _discrete_step() -> tuple[Any, Any]:
    """P and Q of one Poisson step of two-sided geometric noise, by hand; its directions differ."""
    x = np.arange(-40, 41)
    q = np.exp(-np.abs(x) / 1.2)
    q /= q.sum()
    shifted = np.exp(-np.abs(x - 1) / 1.2) / np.exp(-np.abs(x) / 1.2).sum()
    return 0.7 * q + 0.3 * shifted, q


def test_trade_off_against_neyman_and_pearson() -> None:
    p, q = _discrete_step()
    p2, q2 = np.multiply.outer(p, p).ravel(), np.multiply.outer(q, q).ravel()
    curve = tradeoff(PoissonSampled(0.3, DiscreteLaplace(1.2)) * 2)
    rates = [1e-12, 1e-6, 1e-3, 0.03, 0.2, 0.5, 0.8, 0.97]
    powers = []
    for null, other in ((q2, p2), (p2, q2)):
        order = np.argsort(-(other / null))
        powers.append((np.append(0.0, np.cumsum(null[order])), np.append(0.0, np.cumsum(other[order]))))
    grid = np.union1d(np.concatenate([fpr for fpr, _ in powers]), rates)
    best = np.max([np.interp(grid, *power) for power in powers], axis=0)
    for rate in rates:
        # the least concave curve above both directions' best tests
        left, right = grid <= rate, grid >= rate
        x, y = grid[left][:, None], best[left][:, None]
        z, w = grid[right][None], best[right][None]
        with np.errstate(invalid="ignore", divide="ignore"):
            chords = np.where(z > x, y + (w - y) * (rate - x) / (z - x), y)
        hull = float(np.nanmax(chords))
        low, high = curve.tpr_bounds(rate)
        assert low <= hull * (1 + 1e-6)
        assert hull * (1 - 1e-6) <= high <= hull * 1.1  # at a kink the search may stop a little above it
        assert low >= high * 0.9
        assert curve.fnr(rate) == pytest.approx(1.0 - high, abs=1e-12)
    # by hand, one direction's test does better than the other's at some rates
    assert float(np.abs(np.interp(rates, *powers[0]) - np.interp(rates, *powers[1])).max()) > 0.01
    for prior in (0.1, 0.5, 0.8):
        success = max(float(np.maximum(prior * a, (1 - prior) * b).sum()) for a, b in ((p2, q2), (q2, p2)))
        assert success * (1 - 1e-9) <= curve.bayes_success(prior) <= success * 1.005


def test_false_negatives_keep_their_digits() -> None:
    curve = tradeoff(Gaussian(0.2))
    for fpr in (0.5, 0.9, 0.999):
        exact = float(ndtr(ndtri(1 - fpr) - 5.0))
        assert exact * (1 - 1e-3) <= curve.fnr(fpr) <= exact * (1 + 1e-9)


@pytest.mark.parametrize("event", [dpsgd(1.0, 0.01, 1000), RandomizedResponse(0.4) * 4], ids=["dpsgd", "rr"])
def test_the_least_mu_covers_the_curve(event: Event) -> None:
    curve = tradeoff(event)
    mu = curve.gdp_mu
    end = PLDAccountant().compose(event).epsilon(1e-10)
    points = np.linspace(0.0, 0.999 * end, 40)
    acc = PLDAccountant().compose(event)
    assert all(math.exp(log_delta(float(x), mu)) >= acc.delta_bounds(float(x))[0] for x in points)
    assert any(math.exp(log_delta(float(x), mu * 0.99)) < curve.delta(float(x)) for x in points)
    assert curve.gdp_regret() >= curve.gdp_regret(0.5 * mu) == 0.0


def test_histories_of_others() -> None:
    assert from_opacus({"history": [(1.1, 0.01, 100)]}) == from_opacus([[1.1, 0.01, 100]])
    assert from_opacus([(1.1, 0.01, 100), (1.1, 0.01, 5)]).flat() == [(PoissonSampled(0.01, Gaussian(1.1)), 105)]
    for bad in ([(1.0, 2.0)], [(1.0, 2.0, 3)], [(1.0, 0.1, 2.5)], ["abc"], {"mechanism": "rdp"}):
        with pytest.raises(AccountingError, match="Cure"):
            from_opacus(bad)  # type: ignore[arg-type]
    opacus = pytest.importorskip("opacus.accountants")
    theirs = opacus.RDPAccountant()
    for _ in range(30):
        theirs.step(noise_multiplier=1.1, sample_rate=0.02)
    theirs.step(noise_multiplier=0.9, sample_rate=0.02)
    assert from_opacus(theirs.state_dict()) == dpsgd(1.1, 0.02, 30) + dpsgd(0.9, 0.02, 1)
    dpa = pytest.importorskip("dp_accounting")
    event = dpa.ComposedDpEvent(
        [
            dpa.SelfComposedDpEvent(dpa.PoissonSampledDpEvent(0.01, dpa.GaussianDpEvent(1.1)), 100),
            dpa.SelfComposedDpEvent(dpa.RandomizedResponseDpEvent(0.5, 2), 7),
            dpa.NoOpDpEvent(),
            dpa.SampledWithoutReplacementDpEvent(100, 5, dpa.GaussianDpEvent(2.0)),
            dpa.TruncatedSubsampledGaussianDpEvent(1000, 0.01, 20, 1.5),
            dpa.LaplaceDpEvent(3.0),
        ]
    )
    assert from_dp_accounting(event).flat() == [
        (PoissonSampled(0.01, Gaussian(1.1)), 100),
        (RandomizedResponse(0.5, 2), 7),
        (SampledWithoutReplacement(5, 100, Gaussian(2.0)), 1),
        (TruncatedPoissonSampled(0.01, 1000, 20, Gaussian(1.5)), 1),
        (Laplace(3.0), 1),
    ]
    for unknown in (dpa.NonPrivateDpEvent(), dpa.UnsupportedDpEvent(), dpa.ZCDpEvent(0.1), "GaussianDpEvent"):
        with pytest.raises(AccountingError, match="no counterpart"):
            from_dp_accounting(unknown)


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
    assert main(["delta", *common, "--epsilon", "1"]) == 0
    assert 0.0 < json.loads(capsys.readouterr().out)["delta"] < 1e-2
    assert main(["epsilon", *common[:4], "--epochs", "5", "--json", "--delta", "1e-5"]) == 0
    assert json.loads(capsys.readouterr().out) == out
    assert main(["epsilon", "--noise-multiplier", "0", *common[2:], "--delta", "1e-5"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == "inf"
    for bad in (
        ["--delta", "2"],
        ["--delta", "1e-5", "--epochs", "2"],
        ["--delta", "1e-5", "--plot", "/nowhere/a.png"],
    ):
        assert main(["epsilon", *common[:-1], *bad]) == 2
        assert "Why:" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["epsilon", *common, "--adjacency", "nearby", "--delta", "1e-5"])
    capsys.readouterr()
    assert main(["epsilon", "--sample-rate", "0.01", "--steps", "5", "--delta", "1e-5"]) == 2
    assert "Cure: pass --noise-multiplier" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    for command in (
        ["epsilon", *common, "--delta", "1e-5"],
        ["delta", *common, "--epsilon", "1"],
        ["tradeoff", *common],
        ["calibrate", *common[2:], "--target-epsilon", "2", "--delta", "1e-5"],
    ):
        figure = tmp_path / f"{command[0]}.png"
        assert main([*command, "--plot", str(figure)]) == 0
        assert figure.stat().st_size > 1000


def test_import_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import dpkit.accountants as a; print(a.dpsgd(1.0, 0.1, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PoissonSampled" in done.stdout
