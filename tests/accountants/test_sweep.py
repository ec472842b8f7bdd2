"""Random settings of everything from q = 1e-7 to 1 and σ = 0.1 to 1000: both bounds against oracles of other kinds."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from dpkit.accountants import PLDAccountant, RDPAccountant, dpsgd
from tests.accountants.oracle import (
    NoAnswerError,
    contour_deltas,
    jump_samples,
    one_step_log_delta,
    simple_test_epsilon,
)

Setting = tuple[float, float, int, float]


def draw(seed: int, count: int) -> list[Setting]:
    """(q, sigma, steps, delta), every one log-uniform."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        q, sigma = 10 ** rng.uniform(-7, 0), 10 ** rng.uniform(-1, 3)
        out.append((q, sigma, int(10 ** rng.uniform(0, 7)), 10 ** rng.uniform(-30, -3)))
    return out


def judge_setting(setting: Setting) -> str:
    """Check both bounds; says by what."""
    q, sigma, steps, delta = setting
    low, high = PLDAccountant().compose(dpsgd(sigma, q, steps)).epsilon_bounds(delta)
    assert 0.0 <= low <= high < math.inf
    assert high >= simple_test_epsilon(q, sigma, steps, delta) * (1 - 1e-9)
    assert low <= RDPAccountant().compose(dpsgd(sigma, q, steps)).epsilon(delta) * (1 + 1e-9)
    if high > 1e-12:
        assert high - low <= 1.5e-2 * high  # 1e-3 but for a few, counted in the slow sweep
    log_delta = math.log(delta)
    if steps == 1 and high > 0.0:
        assert one_step_log_delta(q, sigma, high) <= log_delta + 1e-9 * (1 + abs(log_delta))
        assert low == 0.0 or one_step_log_delta(q, sigma, low) >= log_delta - 1e-9 * (1 + abs(log_delta))
        return "closed form"
    try:
        at_high, at_low = contour_deltas([(sigma, q, steps)], [high, low], log_delta=log_delta)
    except (NoAnswerError, FloatingPointError, OverflowError):
        if steps > 300 or high == 0.0:
            return "simple test"
        (above, doubt), (below, blur) = jump_samples(q, sigma, steps, [high, low], seed=steps)
        if doubt > 0.02 * delta or blur > 0.02 * delta:
            return "simple test"
        assert above <= delta + 5.0 * doubt
        assert low == 0.0 or below >= delta - 5.0 * blur
        return "sampling"
    assert at_high <= delta * (1 + 1e-7)
    assert low == 0.0 or at_low >= delta * (1 - 1e-7)
    return "contour"


def test_a_sample_of_random_settings() -> None:
    kinds = Counter(judge_setting(setting) for setting in draw(11, 16))
    assert kinds["contour"] >= 5, kinds


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_random_settings() -> None:
    wrong, kinds = [], Counter[str]()
    for setting in draw(5, 1000):
        try:
            kinds[judge_setting(setting)] += 1
        except AssertionError as error:
            wrong.append((setting, str(error)[:200]))
    assert not wrong, wrong
    assert kinds["contour"] > 400, kinds
