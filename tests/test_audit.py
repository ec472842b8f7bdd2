"""Audits: their bounds are true and close, right engines stay below their claim, broken ones are found out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import dpkit
from dpkit import audit
from dpkit.clipping import FlatClipping
from dpkit.noise import NoiseSource
from dpkit.sampling import PoissonSampling

# --- the bounds ---


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_published_values(canaries: int, guesses: int, right: int, delta: float, published: float) -> None:
    """Steinke, Nasr and Jagielski (2023), appendix D and section 7: the ε refuted at 95% by these counts."""
    level = audit.p_value(canaries, guesses, right, published - 0.0015, delta)
    assert level < 0.05 < audit.p_value(canaries, guesses, right, published + 0.0015, delta)
    order = np.arange(canaries)
    coins = np.zeros(canaries, dtype=bool)
    half = guesses // 2
    coins[-(guesses - half) :] = True  # all guesses of "in" are right, and as many of "out" as it takes
    coins[: guesses - right] = True
    bound = audit.one_run(coins, order, delta=delta, guesses=guesses)
    assert bound.epsilon == pytest.approx(published, abs=1e-3)
    assert f"{right} of {guesses} guesses right" in bound.method


def test_p_value_is_the_definition() -> None:
    """Against the theorem written out by hand, for small numbers."""
    for m, r, v, epsilon, delta in (
        (5, 4, 3, 0.7, 0.01),
        (6, 6, 6, 0.0, 0.02),
        (4, 3, 1, 2.0, 0.1),
        (3, 2, 0, 1.0, 0.1),
    ):
        q = math.exp(epsilon) / (1 + math.exp(epsilon))
        law = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        beta = sum(law[v:])
        alpha = max(sum(law[k] for k in range(r + 1) if v - i <= k < v) / i for i in range(1, m + 1))
        assert audit.p_value(m, r, v, epsilon, delta) == pytest.approx(min(1.0, beta + 2 * m * delta * alpha))


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-4])
def test_randomised_response(epsilon: float, delta: float) -> None:
    """The worst (ε, δ)-DP mechanism: each coin told truly with e^ε / (1 + e^ε), or with certainty with δ.

    Of 300 audits at 90%, at most 10% may exceed ε (5 standard errors: fails for 1e-6 of the seeds); the mean is close.
    """
    rng = np.random.default_rng(0)
    m, runs, found = 1000, 300, []
    for _ in range(runs):
        coins = rng.random(m) < 0.5
        honest = rng.random(m) < 1 / (1 + math.exp(-epsilon)) * (1 - delta) + delta
        bound = audit.one_run(coins, np.where(honest, coins, ~coins), delta=delta, confidence=0.9, guesses=m)
        found.append(bound.epsilon)
    exceeding = np.mean(np.array(found) > epsilon)
    assert exceeding <= 0.1 + 5 * math.sqrt(0.1 * 0.9 / runs)
    assert np.mean(found) > 0.75 * epsilon - 0.05 if delta == 0.0 else np.mean(found) > 0.5 * epsilon - 0.1
    if delta == 0.0:
        assert exceeding > 0.01  # and not needlessly low


def test_the_chance_of_several_guesses_is_shared() -> None:
    """On fair coins and idle scores, hardly any audit claims anything, however many numbers of guesses it tries."""
    rng = np.random.default_rng(1)
    found = [
        audit.one_run(rng.random(500) < 0.5, rng.random(500), delta=0.0, confidence=0.9, guesses=range(10, 500, 10))
        for _ in range(100)
    ]
    assert sum(bound.epsilon > 0 for bound in found) <= 10


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.0])
def test_attack_is_valid_and_close(mu: float) -> None:
    """Scores N(0, 1) against N(μ, 1): the bound is below the Gaussian mechanism's ε at δ, and not far below."""
    rng, delta = np.random.default_rng(2), 1e-3
    truth = dpkit_epsilon(mu, delta)
    found = [
        audit.attack(rng.normal(mu, 1, 20_000), rng.normal(0, 1, 20_000), delta=delta, confidence=0.9).epsilon
        for _ in range(40)
    ]
    assert np.mean(np.array(found) > truth) <= 0.1 + 5 * math.sqrt(0.09 / 40)
    assert np.mean(found) > 0.5 * truth - 1e-9


def dpkit_epsilon(mu: float, delta: float) -> float:
    from dpkit.accountants import epsilon

    return epsilon(noise_multiplier=1 / mu, sample_rate=1.0, steps=1, delta=delta) if mu else 0.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_attack_on_randomised_response(epsilon: float) -> None:
    """One bit, told truly with e^ε / (1 + e^ε): valid and close, in either direction of the scores."""
    rng = np.random.default_rng(3)
    q = 1 / (1 + math.exp(-epsilon))
    for sign in (1, -1):
        found = [
            audit.attack(sign * (rng.random(5000) < q), sign * (rng.random(5000) >= q), delta=0.0, confidence=0.9)
            for _ in range(40)
        ]
        assert sum(bound.epsilon > epsilon for bound in found) <= 10
        assert np.mean([bound.epsilon for bound in found]) > 0.8 * epsilon


@pytest.mark.parametrize(
    ("hits", "false", "delta"), [(30, 2, 0.0), (30, 2, 0.05), (3, 0, 0.0), (97, 40, 0.2), (50, 50, 0)]
)
def test_attack_counts_as_clopper_and_pearson(hits: int, false: int, delta: float) -> None:
    """log((least rate of true positives - δ) / largest rate of false ones), by scipy's exact intervals."""
    a, b = np.zeros(200), np.zeros(200)
    a[: 2 * hits], b[: 2 * false] = 1.0, 1.0  # 100 of each choose the threshold, 100 count

    def bounds(k: int) -> Any:
        return stats.binomtest(k, 100).proportion_ci(0.95, "exact")

    expected = max(
        math.log(max(bounds(k).low - delta, 1e-300) / bounds(j).high)
        for k, j in ((hits, false), (false, hits), (100 - false, 100 - hits), (100 - hits, 100 - false))
    )
    bound = audit.attack(a, b, delta=delta, confidence=0.95)
    assert bound.epsilon == pytest.approx(max(0.0, expected))


def test_threshold_is_not_chosen_on_the_runs_that_count() -> None:
    """Idle scores at 50% confidence: the best of 4,000 half-lines would, on the same runs, nearly always claim some."""
    rng = np.random.default_rng(4)
    found = [audit.attack(rng.random(200), rng.random(200), delta=0.0, confidence=0.5).epsilon for _ in range(100)]
    assert sum(value > 0 for value in found) <= 40


def test_likelihood_ratio() -> None:
    """With a canary that widens the scores, only the ratio tells."""
    rng = np.random.default_rng(5)
    wide, narrow = rng.normal(0, 3, 4000), rng.normal(0, 1, 4000)
    scores = [audit.likelihood_ratio(v, wide, narrow) for v in (rng.normal(0, 3, 4000), rng.normal(0, 1, 4000))]
    assert audit.attack(*scores, delta=1e-3).epsilon > 1.5


# --- this engine, and broken ones ---


def trial(sigma: float, rate: float = 1.0, epochs: int = 1, canaries: int = 100_000, **options: Any) -> audit.Trial:
    return audit.dirac(
        canaries,
        noise_multiplier=sigma,
        sample_rate=rate,
        epochs=epochs,
        generator=torch.Generator().manual_seed(0),
        noise_generator=torch.Generator().manual_seed(1),
        **options,
    )


@pytest.mark.parametrize("sigma", [0.7, 3.0])
@pytest.mark.parametrize(("rate", "epochs"), [(1.0, 1), (0.5, 4)])
def test_the_engine_keeps_its_claim(sigma: float, rate: float, epochs: int) -> None:
    """Both bounds stay below ε; they are above half of it where one step of known noise is all there is."""
    result = trial(sigma, rate, epochs, canaries=20_000)
    assert not result.refuted()
    assert max(bound.epsilon for bound in result.bounds()) > (0.3 if rate == 1.0 else 0.2) * result.claimed
    assert all(bound.confidence == 0.975 for bound in result.bounds())


@pytest.mark.parametrize(
    "options",
    [
        {"clipping": "automatic"},
        {"clipping": "per_layer"},
        {"max_physical_batch_size": 7000},
        {"poisson_sampling": False},
        {"augmentations": 2},
        {"privacy_unit": [k // 2 for k in range(20_000)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_keep_their_claim(options: dict[str, Any]) -> None:
    result = trial(1.0, 0.25, canaries=20_000, **options)
    assert not result.refuted()


def no_noise(self: NoiseSource, sums: Any, std: float) -> None:
    pass


def half_noise(self: NoiseSource, sums: Any, std: float, add: Any = NoiseSource.add_to) -> None:
    add(self, sums, std / 2)


def unclipped(self: FlatClipping, norms: Tensor, max_grad_norm: float) -> Tensor:
    return torch.ones(len(norms))


def shuffled(self: PoissonSampling, generator: torch.Generator) -> Iterator[list[int]]:
    """Every record is in exactly one batch of a pass, and each batch is used twice."""
    order = torch.randperm(self.records, generator=generator)
    for batch in order.split(int(2 * self.expected_batch_size)):
        yield from [batch.tolist()] * 2


def twice(self: PoissonSampling, generator: torch.Generator, draws: Any = PoissonSampling.draws) -> Iterator[list[int]]:
    """Each record that is drawn is served twice, and clipped once each time."""
    for drawn in draws(self, generator):
        yield [k for k in drawn for _ in range(2)]


BROKEN: dict[str, tuple[type, str, Callable[..., Any], dict[str, Any]]] = {
    "no noise": (NoiseSource, "add_to", no_noise, {"sigma": 3.0, "canaries": 10_000}),
    "half the noise": (NoiseSource, "add_to", half_noise, {"sigma": 3.0, "canaries": 200_000}),
    "clipping off": (FlatClipping, "weights", unclipped, {"sigma": 3.0, "canaries": 10_000}),
    "shuffled with reuse": (
        PoissonSampling,
        "draws",
        shuffled,
        {"sigma": 3.0, "rate": 0.25, "epochs": 4, "canaries": 100_000},
    ),
    "counted twice": (PoissonSampling, "draws", twice, {"sigma": 3.0, "canaries": 200_000}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_engines_are_found_out(name: str) -> None:
    """Broken in one place, the engine claims what it always claims, and the claim is refuted."""
    owner, method, broken, run = BROKEN[name]
    with mock.patch.object(owner, method, broken):
        result = trial(**run)
    assert result.refuted(), [bound.epsilon for bound in result.bounds()]
    assert result.claimed == pytest.approx(trial(**{**run, "canaries": 1000}).claimed)  # it says what it always says


# --- drawing, and bad input ---


def test_drawing() -> None:
    """Bars for lower bounds, a line for each claim; what is refuted is red."""
    bounds = {
        "right": audit.LowerBound(0.5, 1e-5, 0.95, ""),
        "broken": audit.LowerBound(2.0, 1e-5, 0.95, ""),
    }
    axes = audit.draw(bounds, 1.0)
    assert [bar.get_width() for bar in axes.patches] == [0.5, 2.0]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] != colours[1]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["right", "broken"]
    assert len(audit.draw(bounds, {"right": 1.0, "broken": 3.0}, axes).patches) == 4
    axes.figure.canvas.draw()
    for bad in ({}, {"x": 1.0}):
        with pytest.raises(dpkit.ConfigurationError, match="lower bounds"):
            audit.draw(bad, 1.0)  # type: ignore[arg-type]


COINS, SCORES = np.array([True, False] * 10), np.arange(20.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: audit.flip(0),
        lambda: audit.flip(1.5),  # type: ignore[arg-type]
        lambda: audit.p_value(10, 5, 6, 1.0),
        lambda: audit.p_value(10, 11, 6, 1.0),
        lambda: audit.p_value(10, 5, -1, 1.0),
        lambda: audit.p_value(10, 5, 2.5, 1.0),  # type: ignore[arg-type]
        lambda: audit.p_value(10, 5, 3, -1.0),
        lambda: audit.p_value(10, 5, 3, math.nan),
        lambda: audit.p_value(10, 5, 3, 1.0, 2.0),
        lambda: audit.one_run(COINS, SCORES[:-1], delta=0.0),
        lambda: audit.one_run(COINS * 1.0, SCORES, delta=0.0),
        lambda: audit.one_run(COINS[:, None], SCORES, delta=0.0),
        lambda: audit.one_run([], [], delta=0.0),
        lambda: audit.one_run(COINS, SCORES * math.nan, delta=0.0),
        lambda: audit.one_run(COINS, ["high"] * 20, delta=0.0),
        lambda: audit.one_run(COINS, SCORES, delta=1.5),
        lambda: audit.one_run(COINS, SCORES, delta=0.0, confidence=1.0),
        lambda: audit.one_run(COINS, SCORES, delta=0.0, guesses=21),
        lambda: audit.one_run(COINS, SCORES, delta=0.0, guesses=[]),
        lambda: audit.one_run(COINS, SCORES, delta=0.0, guesses=[0]),
        lambda: audit.attack(SCORES, SCORES[:3], delta=0.0),
        lambda: audit.attack(SCORES, SCORES * math.nan, delta=0.0),
        lambda: audit.attack(SCORES, SCORES, delta=-1.0),
        lambda: audit.likelihood_ratio(SCORES, [1.0], SCORES),
        lambda: audit.likelihood_ratio(SCORES, [1.0, 1.0], SCORES),
        lambda: audit.dirac(0, noise_multiplier=1.0),
        lambda: audit.dirac(10, noise_multiplier=-1.0),
        lambda: audit.dirac(10, noise_multiplier=1.0, sample_rate=2.0),
        lambda: audit.dirac(10, noise_multiplier=1.0, epochs=0),
        lambda: audit.dirac(10, noise_multiplier=1.0, delta=1.0),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], Any]) -> None:
    with pytest.raises(dpkit.ConfigurationError) as caught:
        call()
    assert caught.value.why
    assert caught.value.cure


def test_ways_to_pass_scores() -> None:
    """Lists, arrays and tensors, on whatever graph."""
    expected = audit.one_run(COINS, SCORES, delta=0.0)
    tensor = torch.tensor(SCORES, requires_grad=True)
    assert audit.one_run(COINS.tolist(), SCORES.tolist(), delta=0.0) == expected
    assert audit.one_run(torch.tensor(COINS), tensor, delta=0.0) == expected
