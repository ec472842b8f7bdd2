"""The Rényi accountant: above the truth, at the published figures, exact moments."""

from __future__ import annotations

import math
from typing import Any

import pytest
from dpkit.accountants.moments import poisson_gaussian_log_mgf
from dpkit.accountants.pairs import GaussianPair
from dpkit.accountants.rdp import _pair_log_mgf, log_mgf
from scipy.special import gammaln, logsumexp

from dpkit.accountants import (
    ApproximateDP,
    DeterministicBatches,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    Gaussian,
    GroupOf,
    Laplace,
    PLDAccountant,
    PoissonSampled,
    RandomAllocation,
    RandomizedResponse,
    RDPAccountant,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
    UnreachableTargetError,
    UnsupportedEventError,
    calibrate,
    dpsgd,
    epsilon,
)


def test_upper_bound_on_the_truth_settings(case: dict[str, Any]) -> None:
    acc = RDPAccountant()
    for sigma, q, steps in case["steps"]:
        acc.compose(dpsgd(sigma, q, steps))
    assert case["epsilon"] <= acc.epsilon(case["delta"]) <= 5.0 * case["epsilon"]
    assert case["delta"] <= acc.delta(case["epsilon"])


@pytest.mark.parametrize("q", [1e-8, 1e-4, 0.01, 0.3, 0.999])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 5.0, 1e4])
@pytest.mark.parametrize("order", [2, 3, 7, 40, 300])
def test_whole_orders_agree_with_the_binomial_sum(q: float, sigma: float, order: int) -> None:
    k = range(order + 1)
    terms = [
        gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)
        + (order - j) * math.log1p(-q) + j * math.log(q) + (j * j - j) / (2 * sigma**2)
        for j in k
    ]  # fmt: skip
    exact = float(logsumexp(terms))
    assert poisson_gaussian_log_mgf(order - 1.0, q, sigma) == pytest.approx(exact, rel=1e-10, abs=3e-13)


def test_tiny_moments_keep_their_digits() -> None:
    # order 2 is log(1 + q²(e^{1/σ²} − 1)) in closed form
    for q, sigma in [(1e-8, 1.0), (1e-6, 100.0), (1e-3, 1e4)]:
        exact = math.log1p(q * q * math.expm1(1.0 / sigma**2))
        assert poisson_gaussian_log_mgf(1.0, q, sigma) == pytest.approx(exact, rel=1e-7)


def test_published_figures() -> None:
    # what the order-by-order accountants of the field print for the MNIST tutorial, improved by continuous orders
    value = epsilon(noise_multiplier=1.1, sample_rate=256 / 60000, steps=14040, delta=1e-5, accountant="rdp")
    assert value == pytest.approx(2.5943, abs=2e-4)


def test_calibration_meets_the_target_from_below() -> None:
    sigma = calibrate(target_epsilon=1.0, delta=1e-5, sample_rate=0.01, steps=1000, accountant="rdp")
    assert sigma == pytest.approx(1.51305, rel=1e-4)

    def value(s: float) -> float:
        return epsilon(noise_multiplier=s, sample_rate=0.01, steps=1000, delta=1e-5, accountant="rdp")

    assert value(sigma) <= 1.0 < value(sigma * (1 - 2e-5))
    with pytest.raises(UnreachableTargetError, match="Cure:"):
        calibrate(target_epsilon=1e-9, delta=1e-12, sample_rate=1.0, steps=10**8, accountant="rdp")


def test_moments_by_a_pair_are_those_in_closed_form() -> None:
    for q, sigma in ((0.02, 1.0), (0.3, 2.0)):
        for t in (0.1, 1.0, 5.0, 9.0):
            remove = _pair_log_mgf(GaussianPair(q=q, sigma=sigma), t)
            assert remove == pytest.approx(poisson_gaussian_log_mgf(t, q, sigma), rel=1e-8, abs=1e-12)
            add = _pair_log_mgf(GaussianPair(q=q, sigma=sigma, flipped=True), t)
            assert add == pytest.approx(poisson_gaussian_log_mgf(-1.0 - t, q, sigma), rel=1e-8, abs=1e-12)
    # order 2 of randomised response: Σ p²/q
    exact = math.log(0.75**2 / 0.25 + 0.25**2 / 0.75)
    assert log_mgf(RandomizedResponse(0.5), 1.0, "replace_one") == pytest.approx(exact, rel=1e-12)


EVERY: list[tuple[Event, int]] = [
    (PoissonSampled(0.05, Gaussian(1.5)), 200),
    (SampledWithoutReplacement(5, 100, Gaussian(3.0)), 200),
    (TruncatedPoissonSampled(0.01, 50_000, 620, Gaussian(1.5)), 300),
    (PoissonSampled(0.05, Laplace(3.0)), 100),
    (DiscreteGaussian(9.0), 20),
    (DiscreteLaplace(9.0), 20),
    (DeterministicBatches(Gaussian(5.0)), 5),
    (GroupOf(2, PoissonSampled(0.05, Gaussian(2.0))), 100),
]


@pytest.mark.parametrize(("event", "n"), [*EVERY, (RandomAllocation(100, Gaussian(1.5)), 5)], ids=repr)
def test_renyi_lies_above_the_loss_distribution(event: Event, n: int) -> None:
    adjacency = "replace_one" if isinstance(event, PoissonSampled | SampledWithoutReplacement) else "zero_out"
    tight = PLDAccountant(adjacency).compose(event, n).epsilon_bounds(1e-5)
    loose = RDPAccountant(adjacency).compose(event, n).epsilon(1e-5)
    assert tight[1] <= loose * (1 + 3e-5) + 1e-9
    assert loose <= 3.0 * tight[1] + 0.1


def test_infinite_divergences_are_refused() -> None:
    for event in (ApproximateDP(0.1, 1e-6), RandomizedResponse(0.0)):
        with pytest.raises(UnsupportedEventError, match="Rényi"):
            RDPAccountant().compose(event)
    assert RDPAccountant().compose(ApproximateDP(0.1)).epsilon(1e-6) < 0.11


def test_a_training_loop_is_one_composition() -> None:
    acc = RDPAccountant()
    acc.compose(PoissonSampled(0.01, Gaussian(1.0))).epsilon(1e-5)
    for _ in range(1000):
        acc.compose(PoissonSampled(0.01, Gaussian(1.0)))
        acc.epsilon(1e-5)
    assert acc.epsilon(1e-5) == pytest.approx(RDPAccountant().compose(dpsgd(1.0, 0.01, 1001)).epsilon(1e-5), rel=1e-9)
