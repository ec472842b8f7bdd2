"""Lower bounds on ε from what an attacker guesses right.

Letters: m canaries, r guesses, v right ones.

Both bounds hold with the confidence they state, whatever the attack; a clumsy attack makes them low, never wrong. A
bound above the ε that is claimed (at the same δ) refutes the claim at that confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from dpkit import checks
from dpkit.errors import ConfigurationError

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class LowerBound:
    """ε is at least ``epsilon`` at ``delta``, with probability ``confidence`` over the audit's own chance.

    Attributes:
        method: how it was found, in words.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str

    def refutes(self, claimed: float) -> bool:
        """Whether ``claimed`` ε cannot be true."""
        return self.epsilon > claimed


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float = 0.0) -> float:
    """The most that ``right`` or more of ``guesses`` can happen by, under (ε, δ)-DP, with ``canaries`` fair coins.

    Guarantee: for every (ε, δ)-DP algorithm (add-or-remove-one) that is given each of m canaries or not by an
    independent fair coin, and for every attacker who guesses r of the coins from its output,
    P[v or more are right] <= β + 2 m δ α, where W is binomial with r trials of probability e^ε / (1 + e^ε),
    β = P[W >= v], and α is the largest of P[v > W >= v - i] / i over i = 1, ..., m.

    Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run" (2023), corollary 5.4.

    >>> round(p_value(100, 100, 75, math.log(3)), 3)
    0.553
    """
    m, r, v = checks.count("canaries", canaries), checks.count("guesses", guesses), right
    if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v <= r <= m:
        raise ConfigurationError(
            f"{right!r} right of {guesses} guesses on {canaries} canaries",
            why="right guesses are some of the guesses, and these some of the canaries.",
            cure="count each canary once.",
        )
    checks.number("epsilon", epsilon, low=0.0, strict=False)
    if delta != 0.0:
        checks.number("delta", delta, low=0.0, high=1.0)
    if v == 0:
        return 1.0
    q = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(special.bdtrc(v - 1, r, q))
    if delta == 0.0:
        return beta
    # Once all of W's mass is counted the quotients only fall: twelve standard deviations below its mean, that is so.
    least = min(v - 1, max(0, int(r * q - 12.0 * math.sqrt(r * q * (1.0 - q)))))
    k = np.arange(v - 1, least - 1, -1.0)
    ways = special.gammaln(r + 1.0) - special.gammaln(k + 1.0) - special.gammaln(r - k + 1.0)
    law = np.exp(ways + special.xlogy(k, q) + special.xlog1py(r - k, -q))
    alpha = float((np.cumsum(law) / np.arange(1, len(k) + 1)).max())
    return min(1.0, beta + 2.0 * m * delta * alpha)


def one_run(
    included: Any,
    scores: Any,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: int | Sequence[int] | None = None,
) -> LowerBound:
    """A lower bound from one training run with many canaries, each in it or not by its own fair coin.

    Args:
        included: [m] booleans, the coins. They must have been independent and fair (`flip`), and the run must not have
            depended on them otherwise.
        scores: [m] numbers from the run's output: the larger, the more likely the canary was in.
        guesses: how many canaries to guess, half of them (the highest scores) as in and half as out; several numbers
            share the confidence among them. By default all of them, a quarter, a 16th and a 64th.

    Raises:
        ConfigurationError: not as many scores as coins, scores that are NaN, numbers out of range.
    """
    coins, values = _booleans("included", included), _numbers("scores", scores)
    m = len(coins)
    if len(values) != m or m == 0:
        raise ConfigurationError(
            f"{m} coins and {len(values)} scores", why="each canary has one of both.", cure="pass them in one order."
        )
    delta = checks.number("delta", delta, low=0.0, high=1.0, strict=False)
    confidence = checks.number("confidence", confidence, low=0.0, high=1.0)
    if guesses is None:
        tried = sorted({max(min(m, 8), m // k) for k in (1, 4, 16, 64)})
    else:
        tried = [guesses] if isinstance(guesses, int) else list(guesses)
        for r in tried:
            checks.count("guesses", r)
    if not tried or max(tried) > m:
        raise ConfigurationError(
            f"guesses = {guesses!r}", why=f"there are {m} canaries.", cure="guess some of them, each once."
        )
    order = np.argsort(values, kind="stable")
    level = (1.0 - confidence) / len(tried)
    best = LowerBound(0.0, delta, confidence, "one run, no evidence")
    for r in tried:
        out, in_ = order[: r // 2], order[m - (r - r // 2) :]
        v = int(coins[in_].sum() + (~coins[out]).sum())
        epsilon = _largest_refuted(m, r, v, delta, level)
        if epsilon > best.epsilon:
            best = LowerBound(epsilon, delta, confidence, f"one run, {v} of {r} guesses right on {m} canaries")
    return best


def _largest_refuted(m: int, r: int, v: int, delta: float, level: float) -> float:
    """The ε below which all are refuted at that level."""
    q = float(special.betaincinv(v, r - v + 1, level)) if v else 0.0  # where β alone reaches the level
    if q <= 0.5:
        return 0.0
    high = math.log(q) - math.log1p(-q)
    if delta == 0.0:
        return high
    grid = np.linspace(0.0, high, 65)  # the whole rises with ε but for ripples of its second term: take the first rise
    first = next((k for k, e in enumerate(grid) if p_value(m, r, v, float(e), delta) >= level), len(grid) - 1)
    if first == 0:
        return 0.0
    low, high = float(grid[first - 1]), float(grid[first])
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(m, r, v, middle, delta) < level else (low, middle)
    return low


def attack(with_it: Any, without: Any, *, delta: float, confidence: float = 0.95) -> LowerBound:
    """A lower bound from many runs with a canary and many without, by Clopper and Pearson's bounds on two error rates.

    Under (ε, δ)-DP, P[score in S | in] <= e^ε P[score in S | out] + δ for every set S, and the same with in and out
    exchanged. S is a half-line; which one is chosen on the first half of the runs, the bound comes from the second.

    Args:
        with_it, without: scores of independent runs (losses, likelihood ratios (`likelihood_ratio`), anything): [a] of
            runs with the canary, [b] of runs without.

    Source: Jagielski, Ullman and Oprea, "Auditing Differentially Private Machine Learning" (2020).
    """
    a, b = _numbers("with_it", with_it), _numbers("without", without)
    delta = checks.number("delta", delta, low=0.0, high=1.0, strict=False)
    confidence = checks.number("confidence", confidence, low=0.0, high=1.0)
    if min(len(a), len(b)) < 4:
        raise ConfigurationError(
            f"{len(a)} and {len(b)} runs", why="half choose the threshold, half count.", cure="make at least 4 of each."
        )
    level = (1.0 - confidence) / 2.0
    pairs, best = (a, b), (-1.0, 0, 1, 1.0, 0.0)
    thresholds = np.quantile(np.concatenate([a[::2], b[::2]]), np.linspace(0.0, 1.0, 1025))
    for x, y in ((0, 1), (1, 0)):
        for sign in (1.0, -1.0):
            found = _log_ratios(sign * pairs[x][::2], sign * pairs[y][::2], sign * thresholds, delta, level)
            k = int(found.argmax())
            best = max(best, (float(found[k]), x, y, sign, float(thresholds[k])))
    _, x, y, sign, t = best
    epsilon = float(_log_ratios(sign * pairs[x][1::2], sign * pairs[y][1::2], np.array([sign * t]), delta, level)[0])
    return LowerBound(epsilon, delta, confidence, f"{len(a)} runs with the canary, {len(b)} without")


def _log_ratios(more: Numbers, less: Numbers, thresholds: Numbers, delta: float, level: float) -> Numbers:
    """Lower bounds on log((P[more >= t] - δ) / P[less >= t]), each at confidence 1 - 2 level; 0 at least."""
    n, k = len(more), len(less)
    hits = n - np.searchsorted(np.sort(more), thresholds, side="left")
    false = k - np.searchsorted(np.sort(less), thresholds, side="left")
    lower = np.where(hits > 0, special.betaincinv(np.maximum(hits, 1), n - hits + 1.0, level), 0.0)
    upper = np.where(false < k, special.betaincinv(false + 1.0, np.maximum(k - false, 1), 1.0 - level), 1.0)
    ratio: Numbers = np.maximum(lower - delta, upper) / upper
    return np.log(ratio)


def likelihood_ratio(scores: Any, with_it: Any, without: Any) -> Numbers:
    """Log likelihood ratios of scores under normal fits to reference runs with and without the canary.

    Source: Carlini, Chien, Nasr, Song, Terzis and Tramèr, "Membership Inference Attacks From First Principles" (2022).
    """
    values, a, b = _numbers("scores", scores), _numbers("with_it", with_it), _numbers("without", without)
    if min(len(a), len(b)) < 2 or min(a.std(), b.std()) == 0.0:
        raise ConfigurationError(
            f"{len(a)} and {len(b)} reference runs",
            why="a spread has to be estimated from them.",
            cure="give at least two with different scores of each.",
        )
    ratio: Numbers = stats.norm.logpdf(values, a.mean(), a.std()) - stats.norm.logpdf(values, b.mean(), b.std())
    return ratio


def _numbers(name: str, value: Any) -> Numbers:
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        ok = array.ndim == 1 and array.dtype.kind in "fiub"
        array = array.astype(np.float64) if ok else array
    except (TypeError, ValueError):
        ok = False
    if not ok or bool(np.isnan(array).any()):
        raise ConfigurationError(f"{name} is no row of numbers", why="NaN has no order.", cure="pass one score a run.")
    return array


def _booleans(name: str, value: Any) -> NDArray[np.bool_]:
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim != 1 or array.dtype != np.bool_:
        raise ConfigurationError(
            f"{name} is {array.dtype} of {array.ndim} dimensions",
            why="each canary was in or out.",
            cure="pass the booleans of dpkit.audit.flip.",
        )
    return array
