"""Laws that hold for every setting, tried on settings that Hypothesis picks."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from dpkit.accountants import Event, Gaussian, PLDAccountant, RDPAccountant, SampledWithoutReplacement, dpsgd

SIGMA = st.floats(0.6, 20.0)
RATE = st.floats(0.01, 1.0)
STEPS = st.integers(20, 3000)
DELTA = st.floats(-25.0, -2.0).map(lambda x: 10.0**x)
# two answers for the same truth differ by at most the grid's cost
SLACK = 3e-5
laws = settings(max_examples=12, deadline=None, derandomize=True)


def pld(event: Event, delta: float, adjacency: str = "add_or_remove_one") -> tuple[float, float]:
    return PLDAccountant(adjacency).compose(event).epsilon_bounds(delta)


@laws
@given(SIGMA, RATE, STEPS, DELTA)
def test_bounds_are_ordered_tight_and_below_renyi(sigma: float, q: float, steps: int, delta: float) -> None:
    low, high = pld(dpsgd(sigma, q, steps), delta)
    assert 0.0 <= low <= high < math.inf
    assert high <= RDPAccountant().compose(dpsgd(sigma, q, steps)).epsilon(delta) * (1 + SLACK) + 1e-9
    if high > 1e-3 and steps * q > 3.0:
        assert high - low <= 1e-3 * high


@laws
@given(SIGMA, RATE, STEPS, DELTA, st.floats(1.01, 2.0))
def test_monotone(sigma: float, q: float, steps: int, delta: float, factor: float) -> None:
    base = pld(dpsgd(sigma, q, steps), delta)[1]
    room = base * (1 + SLACK) + 1e-12
    assert pld(dpsgd(sigma * factor, q, steps), delta)[1] <= room
    assert pld(dpsgd(sigma, q / factor, steps), delta)[1] <= room
    assert pld(dpsgd(sigma, q, max(1, int(steps / factor))), delta)[1] <= room
    assert pld(dpsgd(sigma, q, steps), min(0.5, delta * factor))[1] <= room


@laws
@given(SIGMA, RATE, st.integers(1, 40), DELTA)
def test_a_count_is_that_many_compositions(sigma: float, q: float, steps: int, delta: float) -> None:
    one = PLDAccountant()
    for _ in range(steps):
        one.compose(dpsgd(sigma, q, 1))
    assert one.ledger == PLDAccountant().compose(dpsgd(sigma, q, steps)).ledger
    two = PLDAccountant().compose(dpsgd(sigma, q, 1), steps)
    assert one.epsilon(delta) == two.epsilon(delta)


@laws
@given(SIGMA, SIGMA, RATE, STEPS, DELTA)
def test_order_does_not_matter(a: float, b: float, q: float, steps: int, delta: float) -> None:
    first, second = dpsgd(a, q, steps), dpsgd(b, q / 2, 7)
    ab, ba = pld(first + second, delta), pld(second + first, delta)
    assert abs(ab[1] - ba[1]) <= SLACK * ab[1] + 1e-12
    assert ab[1] >= pld(first, delta)[0]


@laws
@given(SIGMA, STEPS, DELTA)
def test_epsilon_and_delta_are_inverse(sigma: float, steps: int, delta: float) -> None:
    acc = PLDAccountant().compose(dpsgd(sigma, 0.05, steps))
    epsilon = acc.epsilon(delta)
    if epsilon > 0.0:
        assert acc.delta(epsilon * (1 + SLACK)) <= delta * (1 + 1e-9)


@laws
@given(st.floats(0.8, 20.0), st.integers(1, 500), DELTA)
def test_replace_one_agrees_with_renyi_and_with_the_whole(sigma: float, steps: int, delta: float) -> None:
    # the whole data set in every batch: a Gaussian at distance 2, in both accountants
    whole = SampledWithoutReplacement(50, 50, Gaussian(sigma)) * steps
    exact = pld(whole, delta, "replace_one")[1]
    assert exact <= RDPAccountant("replace_one").compose(Gaussian(sigma), steps).epsilon(delta)
    part = pld(SampledWithoutReplacement(5, 50, Gaussian(sigma)) * steps, delta, "replace_one")
    assert part[1] <= exact * (1 + SLACK) + 1e-12
    # and never below what one direction alone would say
    single = pld(dpsgd(sigma / 2, 0.1, steps), delta)
    assert part[1] >= single[0] * (1 - 1e-3)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.floats(0.8, 10.0), st.floats(0.01, 0.5), st.integers(1, 300), DELTA)
def test_an_exchange_costs_more_than_a_removal_and_less_than_renyi_says(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    low, high = pld(dpsgd(sigma, q, steps), delta, "replace_one")
    above = RDPAccountant("replace_one").compose(dpsgd(sigma, q, steps)).epsilon(delta)
    assert low <= high <= above * (1 + SLACK) + 1e-9
    assert high >= pld(dpsgd(sigma, q, steps), delta)[0] * (1 - SLACK)
