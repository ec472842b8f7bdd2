"""Sampling schemes against their definition: every choice of contributions is integrated or enumerated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from dpkit.accountants.allocation import one_of
from dpkit.accountants.gaussian import log_delta
from dpkit.accountants.mechanisms import judge
from dpkit.accountants.pairs import GaussianPair, Pair

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
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
    UnsupportedEventError,
    dpsgd,
    single,
)

Array = Any
Law = tuple[Array, Array]
EPSILONS = (0.0, 0.02, 0.3, 1.0, 2.5)
Y = np.linspace(-12.0, 12.0, 2401)


def normal(mean: float, sigma: float) -> Array:
    density = np.exp(-0.5 * ((Y - mean) / sigma) ** 2)
    return density / density.sum()


def hockey(p: Array, q: Array, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())


def twice(a: Law, b: Law, epsilon: float) -> float:
    """delta of a release of ``a`` and one of ``b``."""
    keep = [np.flatnonzero(x[0] + x[1] > 1e-9) for x in (a, b)]
    p = np.multiply.outer(a[0][keep[0]], b[0][keep[1]])
    q = np.multiply.outer(a[1][keep[0]], b[1][keep[1]])
    return hockey(p, q, epsilon) - 2e-6  # what was dropped


def batches(scheme: Event, others: int) -> Iterator[tuple[float, int, float]]:
    """(probability, how many of the others are in the batch, chance that the record is, given a place goes to it)."""
    if isinstance(scheme, PoissonSampled):
        q = scheme.sample_rate
        for k in range(others + 1):
            yield math.comb(others, k) * q**k * (1 - q) ** (others - k), k, q
    if isinstance(scheme, TruncatedPoissonSampled):
        q, cap = scheme.sample_rate, scheme.max_batch_size
        for k in range(others + 1):
            yield math.comb(others, k) * q**k * (1 - q) ** (others - k), min(k, cap), q * min(1.0, cap / (k + 1))
    if isinstance(scheme, SampledWithoutReplacement):
        yield 1.0, scheme.batch_size, scheme.batch_size / scheme.dataset_size


def output(scheme: Event, others: list[float], record: float | None, noise: Callable[[float], Array]) -> Array:
    """The law of the noisy sum of one step, by enumerating batches; ``record`` None: it is not in the data set."""
    total = np.zeros(len(Y))
    cap = getattr(scheme, "max_batch_size", getattr(scheme, "batch_size", len(others) + 1))
    for weight, size, chance in batches(scheme, len(others)):
        without = [noise(sum(c)) for c in itertools.combinations(others, size)]
        share = 0.0 if record is None else chance
        total += weight * (1.0 - share) * np.mean(without, axis=0)
        if share > 0.0:
            beside = [noise(record + sum(c)) for c in itertools.combinations(others, min(size, cap - 1))]
            total += weight * share * np.mean(beside, axis=0)
    return total


def neighbours(adjacency: str) -> list[tuple[float | None, float | None]]:
    values: tuple[float, ...] = (-1.0, 0.0, 1.0)
    if adjacency == "add_or_remove_one":
        return [(x, None) for x in values if x] + [(None, x) for x in values if x]
    if adjacency == "zero_out":
        return [(1.0, 0.0), (0.0, 1.0)]
    return [(1.0, -1.0), (1.0, 0.0), (0.0, 1.0)]


N = 4
SCHEMES: list[Callable[[Event], Event]] = [
    lambda e: PoissonSampled(0.2, e),
    lambda e: SampledWithoutReplacement(1, N, e),
    lambda e: SampledWithoutReplacement(2, N, e),
    lambda e: TruncatedPoissonSampled(0.3, N, 1, e),
    lambda e: TruncatedPoissonSampled(0.4, N, 2, e),
]


ADJACENCIES = ("add_or_remove_one", "replace_one", "zero_out")
# truncation, but for the exchange of a record, takes some ten seconds each
COMBINED = [
    pytest.param(i, adjacency, marks=[pytest.mark.slow] if i >= 3 and adjacency != "replace_one" else [])
    for i in range(len(SCHEMES))
    for adjacency in ADJACENCIES
]


@pytest.mark.parametrize(("scheme", "adjacency"), COMBINED)
def test_no_data_set_exceeds_the_pair(scheme: int, adjacency: str) -> None:
    sigma = 0.9
    event = SCHEMES[scheme](Gaussian(sigma))
    laws: list[Law] = []
    for others in itertools.combinations_with_replacement((-1.0, 0.0, 1.0), N - 1):
        for x, z in neighbours(adjacency):
            laws.append((
                output(event, list(others), x, lambda m: normal(m, sigma)),
                output(event, list(others), z, lambda m: normal(m, sigma)),
            ))  # fmt: skip
    one = PLDAccountant(adjacency).compose(event)
    worst_of_two = {epsilon: sorted(laws, key=lambda law: -hockey(*law, epsilon))[:2] for epsilon in EPSILONS}
    two = PLDAccountant(adjacency).compose(event, 2)
    for epsilon in EPSILONS:
        truth = max(hockey(p, q, epsilon) for p, q in laws)
        low, high = one.delta_bounds(epsilon)
        assert low <= truth * (1 + 2e-4) + 1e-12  # the sums on the grid of Y are good to that
        assert truth <= high * (1 + 2e-4) + 1e-12
        if not isinstance(event, TruncatedPoissonSampled):
            assert high <= truth * 1.002 + 1e-9  # some data set gets there
        again = max(twice(a, b, epsilon) for a in worst_of_two[epsilon] for b in worst_of_two[epsilon])
        assert again <= two.delta(epsilon) * (1 + 5e-5)


@pytest.mark.parametrize("adjacency", ["add_or_remove_one", "replace_one", "zero_out"])
@pytest.mark.parametrize("inner", [Laplace(1.5), DiscreteGaussian(1.2), DiscreteLaplace(1.5)], ids=repr)
@pytest.mark.parametrize("scheme", [0, 2])
def test_other_noise_inside_sampling(inner: Event, scheme: int, adjacency: str) -> None:
    def noise(mean: float) -> Array:
        x = Y - mean if isinstance(inner, Laplace) else np.where(np.abs(Y - np.rint(Y)) < 1e-6, Y - mean, np.inf)
        if isinstance(inner, DiscreteGaussian):
            mass = np.exp(-0.5 * (x / inner.sigma) ** 2)
        else:
            mass = np.exp(-np.abs(x) / 1.5)
        return mass / mass.sum()

    event = SCHEMES[scheme](inner)
    acc = PLDAccountant(adjacency).compose(event)
    for epsilon in EPSILONS:
        truth = 0.0
        for others in itertools.combinations_with_replacement((-1.0, 0.0, 1.0), N - 1):
            for x, z in neighbours(adjacency):
                p, q = output(event, list(others), x, noise), output(event, list(others), z, noise)
                truth = max(truth, hockey(p, q, epsilon))
        low, high = acc.delta_bounds(epsilon)
        # the laws on the grid end at ±12, which costs them a little mass
        assert low <= truth + 2e-4
        assert truth <= high + 2e-4


def test_contributions_off_the_line_are_no_worse() -> None:
    # two-dimensional contributions, at random: the worst are the opposite ones on a line
    rng = np.random.default_rng(3)
    grid = np.linspace(-6.0, 6.0, 97)
    plane = np.stack(np.meshgrid(grid, grid), axis=-1)
    q, sigma = 0.3, 1.0

    def bump(centre: Array) -> Array:
        mass = np.exp(-0.5 * ((plane - centre) ** 2).sum(-1) / sigma**2)
        return mass / mass.sum()

    poisson = PLDAccountant("replace_one").compose(PoissonSampled(q, Gaussian(sigma)))
    fixed = {
        adjacency: PLDAccountant(adjacency).compose(SampledWithoutReplacement(3, 10, Gaussian(sigma)))
        for adjacency in ("replace_one", "zero_out", "add_or_remove_one")
    }
    for _ in range(15):
        x, z, other = (v * rng.uniform(0, 1) ** 0.2 / np.linalg.norm(v) for v in rng.normal(size=(3, 2)))
        empty = np.zeros(2)
        for epsilon in (0.0, 0.1, 0.7):
            p, r = (1 - q) * bump(empty) + q * bump(x), (1 - q) * bump(empty) + q * bump(z)
            assert hockey(p, r, epsilon) <= poisson.delta(epsilon) * (1 + 1e-6)
            p, r = (1 - q) * bump(other) + q * bump(x), (1 - q) * bump(other) + q * bump(z)
            assert hockey(p, r, epsilon) <= fixed["replace_one"].delta(epsilon) * (1 + 1e-6)
            r = (1 - q) * bump(other) + q * bump(empty)
            assert max(hockey(p, r, epsilon), hockey(r, p, epsilon)) <= fixed["zero_out"].delta(epsilon) * (1 + 1e-6)
            r = bump(other)
            worst = max(hockey(p, r, epsilon), hockey(r, p, epsilon))
            assert worst <= fixed["add_or_remove_one"].delta(epsilon) * (1 + 1e-6)


def test_nulling_in_a_batch_of_fixed_size_is_not_poisson() -> None:
    # all others at −C, the record at +C: at ε = 1 sixty thousand times what distance C at rate q would say
    acc = PLDAccountant("zero_out").compose(SampledWithoutReplacement(1, 100, Gaussian(1.0)))
    p = 0.99 * normal(-1.0, 1.0) + 0.01 * normal(1.0, 1.0)
    q = 0.99 * normal(-1.0, 1.0) + 0.01 * normal(0.0, 1.0)
    truth = hockey(p, q, 1.0)
    assert truth == pytest.approx(1.693e-4, rel=1e-3)
    assert truth * (1 - 1e-6) <= acc.delta(1.0) <= truth * 1.01
    assert PLDAccountant().compose(PoissonSampled(0.01, Gaussian(1.0))).delta(1.0) < 1e-4 * truth


def test_known_figures() -> None:
    def eps(event: Event, adjacency: str, delta: float = 1e-5) -> float:
        return PLDAccountant(adjacency).compose(event).epsilon(delta)

    for batch, n, sigma, steps, want in ((1, 100, 2.0, 1000, 2.19893), (1, 200, 1.6, 5000, 3.99732)):
        event = SampledWithoutReplacement(batch, n, Gaussian(sigma)) * steps
        exchanged = eps(event, "replace_one")
        assert want * 0.9999 <= exchanged <= want * 1.0001
        one_sided, nulled = eps(event, "add_or_remove_one"), eps(event, "zero_out")
        assert one_sided == pytest.approx(eps(dpsgd(sigma / 2, batch / n, steps), "add_or_remove_one"), rel=1e-5)
        assert nulled < exchanged
        assert one_sided < exchanged
    for cap, want, slack in ((50_000, 4.7352, 1e-4), (620, 4.7357, 1e-4), (560, 7.302, 1e-3)):
        truncated = TruncatedPoissonSampled(0.01, 50_000, cap, Gaussian(1.0)) * 5000
        assert eps(truncated, "add_or_remove_one", 1e-6) == pytest.approx(want, rel=slack)


def test_truncation_grows_with_the_cut() -> None:
    last = 0.0
    for cap in (50_000, 640, 600, 580, 560):
        acc = PLDAccountant().compose(TruncatedPoissonSampled(0.01, 50_000, cap, Gaussian(2.0)), 500)
        low, high = acc.epsilon_bounds(1e-6)
        assert last <= high * (1 + 1e-5)
        assert low <= high
        last = high
    # never cut, or always full
    whole = PLDAccountant().compose(TruncatedPoissonSampled(0.01, 500, 500, Gaussian(2.0)), 50).epsilon(1e-6)
    assert whole == PLDAccountant().compose(dpsgd(2.0, 0.01, 50)).epsilon(1e-6)
    full = PLDAccountant().compose(TruncatedPoissonSampled(1.0, 500, 5, Gaussian(2.0)), 50).epsilon(1e-6)
    assert full == PLDAccountant().compose(SampledWithoutReplacement(5, 500, Gaussian(2.0)), 50).epsilon(1e-6)


def test_exchange_under_poisson_beside_dp_accounting() -> None:
    dpa = pytest.importorskip("dp_accounting")
    from dp_accounting import pld as their_pld

    for sigma, q, steps in ((1.0, 0.01, 300), (2.0, 0.1, 50)):
        theirs = their_pld.PLDAccountant(dpa.NeighboringRelation.REPLACE_ONE)
        theirs.compose(dpa.PoissonSampledDpEvent(q, dpa.GaussianDpEvent(sigma)), steps)
        low, high = PLDAccountant("replace_one").compose(dpsgd(sigma, q, steps)).epsilon_bounds(1e-5)
        assert low * 0.9999 <= theirs.get_epsilon(1e-5) <= high * 1.01


def _ratio_samples(t: int, sigma: float, chosen: int, count: int, rng: np.random.Generator) -> Array:
    """R under P, one record in ``chosen`` of ``t`` rounds (the first, by symmetry)."""
    z = rng.normal(size=(count, t))
    z[:, :chosen] += 1.0 / sigma
    x = np.exp(z / sigma - 0.5 / sigma**2)
    if chosen == 1:
        return x.mean(axis=1)
    total, squares = x.sum(axis=1), (x * x).sum(axis=1)
    return (total * total - squares) / (t * (t - 1))


@pytest.mark.parametrize(("t", "sigma", "chosen"), [(30, 1.0, 1), (200, 0.7, 1), (12, 0.8, 2)])
def test_random_allocation_by_monte_carlo(t: int, sigma: float, chosen: int) -> None:
    rng = np.random.default_rng(t)
    ratio = np.concatenate([_ratio_samples(t, sigma, chosen, 20_000, rng) for _ in range(10)])
    acc = PLDAccountant().compose(RandomAllocation(t, Gaussian(sigma), chosen))
    for epsilon in (0.0, 0.2, 0.5, 1.0):
        gain = np.maximum(0.0, 1.0 - math.exp(epsilon) / ratio)
        mean, error = float(gain.mean()), 4.5 * float(gain.std()) / math.sqrt(len(ratio)) + 1e-7
        low, high = acc.delta_bounds(epsilon)
        assert low - error <= mean <= high + error
        if chosen == 1:
            assert high - low <= 0.03 * high + 1e-7


def test_two_rounds_by_integration() -> None:
    sigma = 0.8
    x = normal(1.0, sigma) / normal(0.0, sigma)
    weight = np.multiply.outer(normal(0.0, sigma), normal(0.0, sigma))
    ratio = 0.5 * np.add.outer(x, x)
    acc = PLDAccountant().compose(RandomAllocation(2, Gaussian(sigma)))
    for epsilon in (0.0, 0.1, 0.5, 1.5, 3.0):
        remove = float((weight * np.maximum(ratio - math.exp(epsilon), 0.0)).sum())
        add = float((weight * np.maximum(1.0 - math.exp(epsilon) * ratio, 0.0)).sum())
        low, high = acc.delta_bounds(epsilon)
        assert low <= max(remove, add) * (1 + 1e-5) + 1e-9
        assert max(remove, add) <= high * (1 + 1e-5) + 1e-9
        assert high - low <= 2e-3 * high + 1e-7


@pytest.mark.parametrize("base", [GaussianPair(sigma=1.0), judge(DiscreteLaplace(2.0), "zero_out").terms[0].remove])
def test_allocated_laws_are_ordered(base: Pair) -> None:
    upper, lower = (one_of(base, 37, upper=side) for side in (True, False))
    for law in (upper, lower):
        assert float(law.mass.sum()) == pytest.approx(1.0, abs=1e-6)
        assert float((law.mass * np.exp(-law.loss)).sum()) + law.outside == pytest.approx(1.0, abs=1e-6)
    for side in ("one", "other"):
        a, b = (upper, lower) if side == "one" else (upper.flip(), lower.flip())
        for epsilon in np.linspace(-2.0, 3.0, 21):
            da, db = (float((w.mass * np.maximum(0.0, -np.expm1(epsilon - w.loss))).sum()) for w in (a, b))
            assert db <= da * (1 + 1e-9) + 1e-12


def test_few_rounds_of_a_discrete_mechanism_are_enumerated() -> None:
    # randomised values ±: R over all outcomes of three rounds
    scale, rounds = 1.2, 3
    pair = judge(DiscreteLaplace(scale), "zero_out").terms[0].remove
    atoms = pair.atoms(np.array([-5.0, 5.0]))
    x, q = np.exp(atoms.loss), atoms.mass * np.exp(-atoms.loss)
    acc = PLDAccountant().compose(RandomAllocation(rounds, DiscreteLaplace(scale)))
    for epsilon in (0.0, 0.1, 0.3, 0.6):
        remove = add = 0.0
        for outcome in itertools.product(range(len(x)), repeat=rounds):
            weight, ratio = math.prod(q[list(outcome)]), float(np.mean(x[list(outcome)]))
            remove += weight * max(ratio - math.exp(epsilon), 0.0)
            add += weight * max(1.0 - math.exp(epsilon) * ratio, 0.0)
        low, high = acc.delta_bounds(epsilon)
        assert low <= max(remove, add) * (1 + 1e-7) + 1e-12
        assert max(remove, add) * (1 - 1e-7) <= high <= max(remove, add) * 1.001 + 1e-9


def test_allocation_lies_below_its_relatives() -> None:
    def bounds(event: Event) -> tuple[float, float]:
        return PLDAccountant().compose(event).epsilon_bounds(1e-5)

    # figures of an independent study: ε = 0.62094 for 1 of 100 at σ = 1; 100 epochs at σ = 2
    low, high = bounds(RandomAllocation(100, Gaussian(1.0)))
    assert low <= 0.62094 <= high
    assert high - low <= 1e-3 * high
    low, high = bounds(RandomAllocation(100, Gaussian(2.0)) * 100)
    assert low <= 2.14125
    assert 2.1405 <= high <= 2.1413
    assert high < bounds(dpsgd(2.0, 0.01, 10_000))[0]
    assert bounds(RandomAllocation(20, Gaussian(3.0), 20))[1] == bounds(Gaussian(3.0) * 20)[1]
    assert bounds(RandomAllocation(1, Gaussian(3.0)))[1] == bounds(Gaussian(3.0))[1]
    assert bounds(RandomAllocation(5, Gaussian(3.0), 0))[1] == 0.0
    several = bounds(RandomAllocation(7, Gaussian(3.0), 3))
    assert several[0] <= several[1] <= bounds(Gaussian(3.0) * 3)[1]


def test_extreme_allocations() -> None:
    for t, sigma in ((2, 0.05), (1000, 0.3), (100_000, 2.0), (3, 50.0)):
        low, high = PLDAccountant().compose(RandomAllocation(t, Gaussian(sigma))).epsilon_bounds(1e-6)
        assert 0.0 <= low <= high < math.inf
        assert high <= PLDAccountant().compose(Gaussian(sigma)).epsilon(1e-6) * (1 + 1e-3)
    assert PLDAccountant().compose(RandomAllocation(10, Gaussian(0.0))).epsilon(1e-6) == math.inf


def test_everything_composes_with_everything() -> None:
    parts: list[Event] = [
        RandomAllocation(50, Gaussian(3.0)) * 2,
        dpsgd(2.0, 0.01, 100),
        Laplace(30.0),
        Gaussian(20.0),
        TruncatedPoissonSampled(0.01, 50_000, 620, Gaussian(2.0)) * 50,
        SampledWithoutReplacement(5, 500, Gaussian(4.0)) * 50,
        DeterministicBatches(Gaussian(25.0)),
        GroupOf(2, dpsgd(4.0, 0.01, 2)),
        DiscreteGaussian(40.0),
        ApproximateDP(0.01, 1e-9),
    ]
    acc = PLDAccountant()
    last = 0.0
    for part in parts:
        low, high = acc.compose(part).epsilon_bounds(1e-5)
        assert low <= high
        assert high >= last * (1 - 1e-4)
        last = high
    assert last < 3.0


def test_group_privacy_of_a_training_run() -> None:
    # three records at once: binomial mixtures, integrated
    q, sigma = 0.2, 1.1
    weights = [math.comb(3, i) * q**i * (1 - q) ** (3 - i) for i in range(4)]
    p = sum(w * normal(float(i), sigma) for i, w in enumerate(weights))
    m = sum(w * normal(-float(i), sigma) for i, w in enumerate(weights))
    zero = normal(0.0, sigma)
    event = GroupOf(3, PoissonSampled(q, Gaussian(sigma)))
    for epsilon in EPSILONS:
        truth = max(hockey(p, zero, epsilon), hockey(zero, p, epsilon))
        assert truth * (1 - 5e-5) <= PLDAccountant().compose(event).delta(epsilon) <= truth * 1.002 + 1e-9
        truth = hockey(p, m, epsilon)
        exchanged = PLDAccountant("replace_one").compose(event).delta(epsilon)
        assert truth * (1 - 5e-5) <= exchanged <= truth * 1.002 + 1e-9
    assert judge(GroupOf(4, Laplace(8.0)), "zero_out") == judge(Laplace(2.0), "zero_out")
    assert PLDAccountant().compose(GroupOf(1200, PoissonSampled(1e-3, Gaussian(50.0))), 10).epsilon(1e-5) < 1.0


@pytest.mark.parametrize(
    ("event", "adjacency"),
    [
        (PoissonSampled(0.1, ApproximateDP(0.1, 1e-6)), "replace_one"),
        (PoissonSampled(0.1, ApproximateDP(0.1, 1e-6)), "zero_out"),
        (PoissonSampled(0.1, RandomizedResponse(0.5)), "add_or_remove_one"),
        (SampledWithoutReplacement(1, 10, RandomizedResponse(0.5)), "replace_one"),
        (SampledWithoutReplacement(1, 10, ApproximateDP(0.1)), "zero_out"),
        (TruncatedPoissonSampled(0.1, 10, 2, Laplace(1.0)), "add_or_remove_one"),
        (RandomAllocation(10, Gaussian(1.0)), "replace_one"),
        (RandomAllocation(10, RandomizedResponse(0.5)), "zero_out"),
        (RandomAllocation(10, PoissonSampled(0.5, Gaussian(1.0))), "zero_out"),
        (GroupOf(2, RandomizedResponse(0.5)), "zero_out"),
        (PoissonSampled(0.1, PoissonSampled(0.1, Gaussian(1.0))), "zero_out"),
    ],
    ids=repr,
)
def test_what_is_not_proven_is_refused(event: Event, adjacency: str) -> None:
    with pytest.raises(UnsupportedEventError, match="Why:"):
        PLDAccountant(adjacency).compose(event)
    with pytest.raises(ValueError, match="Cure:"):
        RandomAllocation(3, Gaussian(1.0), 4)


def test_points_are_a_matter_of_tightness_only() -> None:
    rough = (
        one_of(GaussianPair(sigma=1.0), 64, upper=True, points=120),
        one_of(GaussianPair(sigma=1.0), 64, upper=False, points=120),
    )
    fine = one_of(GaussianPair(sigma=1.0), 64, upper=True)
    for epsilon in np.linspace(-1.0, 3.0, 17):
        above, within, below = (
            float((w.mass * np.maximum(0.0, -np.expm1(epsilon - w.loss))).sum()) for w in (rough[0], fine, rough[1])
        )
        assert below <= within * (1 + 1e-9)
        assert within <= above * 1.02 + 1e-12


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.3, 0.5), (0.9, 3.0)])
def test_one_run_is_exact_to_rounding(q: float, sigma: float) -> None:
    acc = PLDAccountant().compose(PoissonSampled(q, Gaussian(sigma)))
    for epsilon in (0.0, 0.1, 1.0, 3.0):
        exact = q * math.exp(log_delta(math.log1p(math.expm1(epsilon) / q), 1.0 / sigma))
        low, high = acc.delta_bounds(epsilon)
        below = math.exp(single.log_delta(GaussianPair(q=q, sigma=sigma), epsilon, upper=False))
        assert exact * (1 - 1e-9) <= max(low, below)
        assert below <= exact * (1 + 1e-11)
        assert exact * (1 - 1e-11) <= high <= exact * (1 + 1e-9) + 1e-290


def test_an_equal_gaussian_beside_an_allocation_is_counted_too() -> None:
    """Two of three rounds, as one round for certain and one of two, beside a Gaussian of the same noise."""
    scheme = RandomAllocation(3, Gaussian(1.0), selected=2)
    together = PLDAccountant().compose(scheme).compose(Gaussian(1.0)).epsilon(1e-5)
    almost = PLDAccountant().compose(scheme).compose(Gaussian(1.0 + 1e-9)).epsilon(1e-5)
    assert together == pytest.approx(almost, rel=1e-4)
