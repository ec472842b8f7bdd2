"""Which dominating pairs stand for an event under an adjacency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from . import morepairs
from .errors import UnsupportedEventError
from .events import (
    ApproximateDP,
    DeterministicBatches,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    Gaussian,
    GroupOf,
    Laplace,
    PoissonSampled,
    RandomizedResponse,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
)
from .morepairs import GroupPair, LaplacePair, SampledPair, WithoutReplacementPair
from .pairs import DiscretePair, GaussianPair, Pair


@dataclass(frozen=True)
class Judged:
    """One event as the accountant sees it: squared Gaussian distance, or a pair for each direction, times ``runs``."""

    mu_squared: float = 0.0
    remove: Pair | None = None
    add: Pair | None = None
    leak: float = 0.0
    """Total variation by which the true mechanism may differ from the judged one, per run."""


NOTHING = Judged()


def reach(adjacency: str) -> float:
    """How far one record moves a sum, in units of C."""
    return 2.0 if adjacency == "replace_one" else 1.0


def unsupported(event: Event, adjacency: str) -> UnsupportedEventError:
    return UnsupportedEventError(
        f"{event!r} under {adjacency} adjacency.",
        why="no dominating pair is known for it, so no epsilon can be vouched for.",
        cure="use another adjacency, or a sampling whose pair is known.",
    )


@lru_cache(maxsize=65536)
def judge(event: Event, adjacency: str) -> Judged:
    """The pairs for a single event.

    Raises:
        UnsupportedEventError: none is known.
    """
    if isinstance(event, Gaussian):
        sigma = event.noise_multiplier
        return Judged(mu_squared=(reach(adjacency) / sigma) ** 2 if sigma > 0.0 else math.inf)
    base = _unsampled(event, int(reach(adjacency)))
    if base is not None:
        return Judged(remove=base, add=base.flip() if isinstance(base, DiscretePair) else base)
    if isinstance(event, DeterministicBatches):
        return judge(event.event, adjacency)
    if isinstance(event, PoissonSampled):
        return _poisson(event, adjacency)
    if isinstance(event, TruncatedPoissonSampled):
        return _truncated(event, adjacency)
    if isinstance(event, SampledWithoutReplacement):
        return _without_replacement(event, adjacency)
    if isinstance(event, GroupOf):
        return _group(event, adjacency)
    raise unsupported(event, adjacency)


def _unsampled(event: Event, shift: int) -> Pair | None:
    """The pair of a mechanism run on everybody, other than a Gaussian."""
    if isinstance(event, Laplace):
        if event.noise_multiplier == 0.0:
            return DiscretePair((), (), 1.0, 1.0)
        return LaplacePair(shift / event.noise_multiplier)
    if isinstance(event, DiscreteGaussian):
        return morepairs.discrete_gaussian(event.sigma, shift * event.sensitivity)
    if isinstance(event, DiscreteLaplace):
        return morepairs.discrete_laplace(event.scale, shift * event.sensitivity)
    if isinstance(event, RandomizedResponse):
        return morepairs.randomized_response(event.noise_probability, event.categories)
    if isinstance(event, ApproximateDP):
        return morepairs.approximate(event.epsilon, event.delta)
    return None


def _poisson(event: PoissonSampled, adjacency: str) -> Judged:
    q, inner = event.sample_rate, event.event
    if q == 0.0:
        return NOTHING
    if q == 1.0:
        return judge(inner, adjacency)
    if adjacency == "replace_one":
        # no pair is proven here for the exchange of a record under Poisson sampling
        raise unsupported(event, adjacency)
    if isinstance(inner, Gaussian):
        sigma = inner.noise_multiplier
        if sigma == 0.0:
            revealed = DiscretePair((math.log1p(-q),), (1.0 - q,), q)
            return Judged(remove=revealed, add=revealed.flip())
        return Judged(remove=GaussianPair(q=q, sigma=sigma), add=GaussianPair(q=q, sigma=sigma, flipped=True))
    base = None if isinstance(inner, RandomizedResponse) else _unsampled(inner, 1)
    if base is None:
        raise unsupported(event, adjacency)
    return Judged(remove=SampledPair(base, q), add=SampledPair(base, q, flipped=True))


def _truncated(event: TruncatedPoissonSampled, adjacency: str) -> Judged:
    """Poisson sampling, and the chance that the cut is ever felt as a distance in total variation."""
    whole = judge(PoissonSampled(event.sample_rate, event.event), adjacency)
    if event.sample_rate == 0.0 or event.max_batch_size >= event.dataset_size:
        return whole
    from scipy.special import bdtrc  # here, not above: it triples the import time

    leak = float(bdtrc(event.max_batch_size, event.dataset_size, event.sample_rate))
    return Judged(whole.mu_squared, whole.remove, whole.add, min(1.0, leak * (1.0 + 1e-9)))


def _without_replacement(event: SampledWithoutReplacement, adjacency: str) -> Judged:
    q = event.batch_size / event.dataset_size
    if q == 0.0:
        return NOTHING
    if q == 1.0:
        return judge(event.event, adjacency)
    if adjacency == "add_or_remove_one" or not isinstance(event.event, Gaussian):
        raise unsupported(event, adjacency)
    sigma = event.event.noise_multiplier
    if sigma == 0.0:
        pair: Pair = DiscretePair((0.0,), (1.0 - q,), q, q)
    else:
        pair = WithoutReplacementPair(q, sigma / reach(adjacency))
    return Judged(remove=pair, add=pair)


def _group(event: GroupOf, adjacency: str) -> Judged:
    inner, size = event.event, event.size
    if size == 1:
        return judge(inner, adjacency)
    if isinstance(inner, Gaussian):
        return Judged(mu_squared=size**2 * judge(inner, adjacency).mu_squared)
    if isinstance(inner, PoissonSampled) and isinstance(inner.event, Gaussian):
        q, sigma = inner.sample_rate, inner.event.noise_multiplier
        if q in (0.0, 1.0):
            return NOTHING if q == 0.0 else judge(GroupOf(size, inner.event), adjacency)
        if adjacency != "replace_one" and sigma > 0.0:
            pairs = [GroupPair(q=q, sigma=sigma, size=size, flipped=flipped) for flipped in (False, True)]
            return Judged(remove=pairs[0], add=pairs[1])
    raise unsupported(event, adjacency)
