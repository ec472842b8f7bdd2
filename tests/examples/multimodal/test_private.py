"""The private pieces: what a unit can move, what a search costs, and that nothing exact is released."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

for needed in ("sklearn", "PIL", "transformers"):
    pytest.importorskip(needed)

from dpkit.accountants import ApproximateDP, Gaussian, epsilon, make_accountant  # noqa: E402
from examples.multimodal import private  # noqa: E402
from examples.multimodal.private import Cost, class_weights, report_noisy_max, right_units, validation  # noqa: E402

LABELS = [0, 0, 0, 1, 1, 2, 0, 1]
UNITS = ["a", "a", "a", "a", "b", "c", "d", "d"]


def test_a_unit_moves_the_counts_by_at_most_one() -> None:
    whole = private._class_mass(LABELS, UNITS, 3)
    assert whole.sum() == pytest.approx(4)  # units, not rows
    for unit in set(UNITS):
        rest = [(label, u) for label, u in zip(LABELS, UNITS, strict=True) if u != unit]
        moved = whole - private._class_mass(*zip(*rest, strict=True), 3)
        assert 0 < np.linalg.norm(moved) <= 1 + 1e-12
        assert np.linalg.norm(moved) == pytest.approx(1) or unit in "ad"


def test_class_weights_are_noisy_and_larger_for_rare_classes() -> None:
    labels, units = [0] * 900 + [1] * 100, [str(k) for k in range(1000)]
    draws = [class_weights(labels, units, 2, 5.0, np.random.default_rng(seed))[0] for seed in range(200)]
    assert len({tuple(d) for d in draws}) == 200
    assert np.mean(draws, axis=0) == pytest.approx([1000 / 1800, 1000 / 200], rel=0.05)
    assert class_weights(labels, units, 2, 5.0, np.random.default_rng(0))[1] == Gaussian(5.0)
    with pytest.raises(ValueError, match="not private"):
        class_weights(labels, units, 2, 0.0, np.random.default_rng(0))


def test_noise_of_the_counts_has_its_size() -> None:
    rng = np.random.default_rng(0)
    labels, units = [0] * 500 + [1] * 500, [str(k) for k in range(1000)]
    weights = np.array([class_weights(labels, units, 2, 10.0, rng)[0] for _ in range(1000)])
    ratio = weights[:, 1] / weights[:, 0]  # = noisy count 0 / noisy count 1
    assert np.std(np.log(ratio)) == pytest.approx(math.sqrt(2) * 10 / 500, rel=0.15)


def test_a_unit_moves_the_validation_by_at_most_one() -> None:
    right = np.array([True, True, False, True, True, False, True, True])
    whole = right_units(right, UNITS)
    for unit in set(UNITS):
        keep = [k for k, u in enumerate(UNITS) if u != unit]
        moved = whole - right_units(right[keep], [UNITS[k] for k in keep])
        assert 0 <= moved <= 1  # and never the other way: what report-noisy-max relies on
    value, event = validation(right, UNITS, 0.1, np.random.default_rng(0))
    assert value != whole / 4
    assert value == pytest.approx(whole / 4, abs=0.2)
    assert event == Gaussian(0.1)
    with pytest.raises(ValueError, match="not private"):
        validation(right, UNITS, 0.0, np.random.default_rng(0))


def test_report_noisy_max_is_the_exponential_mechanism() -> None:
    rng, scores, eps = np.random.default_rng(0), [3.0, 5.0, 4.0], 0.7
    counts = Counter(report_noisy_max(scores, eps, rng)[0] for _ in range(20000))
    expected = np.exp(eps * np.array(scores)) / np.exp(eps * np.array(scores)).sum()
    assert [counts[k] / 20000 for k in range(3)] == pytest.approx(expected, abs=0.015)
    # a unit that leaves lowers each score by 0 to 1: no outcome's probability changes by more than a factor e^ε
    lower = np.exp(eps * (np.array(scores) - [1.0, 0.0, 1.0]))
    ratio = expected / (lower / lower.sum())
    assert np.abs(np.log(ratio)).max() <= eps + 1e-12
    assert report_noisy_max(scores, eps, rng)[1] == ApproximateDP(eps)
    with pytest.raises(ValueError, match="not private"):
        report_noisy_max(scores, 0.0, rng)


def test_a_lead_is_enough() -> None:
    lead, rng = private.least_units(0.5, 5), np.random.default_rng(0)
    wins = sum(report_noisy_max([lead, 0, 0, 0, 0], 0.5, rng)[0] == 0 for _ in range(5000))
    assert wins / 5000 == pytest.approx(0.95, abs=0.015)


def test_the_search_costs_the_larger_side() -> None:
    step = private.sampled_steps(1.0, 0.1, 50)
    run = epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=50, delta=1e-5)
    cost = Cost((("supernet", step),), (("choice", ApproximateDP(0.5)),), 1e-5)
    assert cost.epsilon == pytest.approx(run)
    twice = Cost((("supernet", step), ("final", step)), (("choice", ApproximateDP(0.5)),), 1e-5)
    both = make_accountant("pld").compose(step, 2).epsilon(1e-5)
    assert twice.epsilon == pytest.approx(both)
    assert run < both < 2 * run
    assert Cost((("supernet", step),), (("choice", ApproximateDP(20.0)),), 1e-5).epsilon == pytest.approx(20, rel=1e-3)
    told = "\n".join(twice.lines())
    assert f"the search, in all: ε = {both:.3f}" in told
    assert "validation units: choice: ε = 0.500" in told


def test_what_is_released_beside_the_training_is_inside_epsilon() -> None:
    beside = Gaussian(4.0)
    alone = private.noise_for(3.0, 1e-5, 0.1, 50)
    sigma = private.noise_for(3.0, 1e-5, 0.1, 50, beside)
    assert sigma > alone
    both = make_accountant("pld").compose(private.sampled_steps(sigma, 0.1, 50)).compose(beside)
    assert both.epsilon(1e-5) <= 3.0
    assert both.epsilon(1e-5) == pytest.approx(3.0, rel=1e-3)
