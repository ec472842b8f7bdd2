"""Which dominating pairs stand for an event under an adjacency."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from . import morepairs
from .allocation import blocks, one_of
from .errors import UnsupportedEventError
from .events import (
    ApproximateDP,
    Composed,
    DeterministicBatches,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    Gaussian,
    GroupOf,
    Laplace,
    PoissonSampled,
    RandomAllocation,
    RandomizedResponse,
    Repeated,
    SampledWithoutReplacement,
    TruncatedPoissonSampled,
)
from .mixtures import MixedPair, TwoSidedPair, exchange_pair, group_pair, zeroed_pair
from .morepairs import LaplacePair, SampledPair
from .pairs import DiscretePair, GaussianPair, Pair


@dataclass(frozen=True)
class Term:
    """A dominating pair for each direction, and how often it runs."""

    remove: Pair
    add: Pair
    runs: int = 1


@dataclass(frozen=True)
class Judged:
    """One event as the accountant sees it: squared Gaussian distance, and pairs."""

    mu_squared: float = 0.0
    terms: tuple[Term, ...] = ()
    reached: tuple[Term, ...] | None = None
    """Pairs that some data set attains, for lower bounds; None where ``terms`` are attained themselves."""

    def lower(self) -> tuple[Term, ...]:
        """The pairs of the lower bound."""
        return self.terms if self.reached is None else self.reached


NOTHING = Judged()


def both(remove: Pair, add: Pair) -> Judged:
    return Judged(terms=(Term(remove, add),))


def reach(adjacency: str) -> float:
    """How far one record moves a sum, in units of C."""
    return 2.0 if adjacency == "replace_one" else 1.0


def unsupported(event: Event, adjacency: str, why: str = "") -> UnsupportedEventError:
    return UnsupportedEventError(
        f"{event!r} under {adjacency} adjacency.",
        why=why or "no dominating pair is known for it, so no epsilon can be vouched for.",
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
    inner = getattr(event, "event", None)
    if isinstance(inner, Composed | Repeated):  # several releases from one batch
        one = _one_gaussian(inner)
        if one is None:
            raise unsupported(event, adjacency, "of several releases from one batch only Gaussians are worked out.")
        return judge(replace(event, event=one), adjacency)  # type: ignore[call-arg]
    base = _unsampled(event, int(reach(adjacency)))
    if base is not None:
        return both(base, base.flip() if isinstance(base, DiscretePair) else base)
    if isinstance(event, DeterministicBatches):
        return judge(event.event, adjacency)
    if isinstance(event, PoissonSampled):
        return _poisson(event, adjacency)
    if isinstance(event, TruncatedPoissonSampled):
        return _truncated(event, adjacency)
    if isinstance(event, SampledWithoutReplacement):
        return _without_replacement(event, adjacency)
    if isinstance(event, RandomAllocation):
        return _allocation(event, adjacency)
    if isinstance(event, GroupOf):
        return _group(event, adjacency)
    raise unsupported(event, adjacency)


def _one_gaussian(event: Event) -> Gaussian | None:
    """Gaussian releases of the same batch as one, of the joint distance; None if there is anything else."""
    precision = 0.0
    for part, n in event.flat():
        if not isinstance(part, Gaussian):
            return None
        precision += n / part.noise_multiplier**2 if part.noise_multiplier > 0.0 else math.inf
    return Gaussian(1.0 / math.sqrt(precision)) if precision > 0.0 else None


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


def _additive(event: Event, shift: int) -> Pair | None:
    """The pair of noise added to a sum that a record moves by ``shift`` contributions; None for anything else."""
    if isinstance(event, Gaussian):
        sigma = event.noise_multiplier
        return GaussianPair(sigma=sigma / shift) if sigma > 0.0 else DiscretePair((), (), 1.0, 1.0)
    return _unsampled(event, shift) if isinstance(event, Laplace | DiscreteGaussian | DiscreteLaplace) else None


def _sampled(base: Pair, q: float, *, flipped: bool = False) -> Pair:
    """(1 − q)Q + qP against Q, or the other way round."""
    if isinstance(base, GaussianPair):
        return GaussianPair(q=q, sigma=base.sigma, flipped=flipped)
    if isinstance(base, DiscretePair) and base.infinite == 1.0:  # no noise: whoever is in the batch is seen
        revealed = DiscretePair((math.log1p(-q),), (1.0 - q,), q)
        return revealed.flip() if flipped else revealed
    return SampledPair(base, q, flipped)


def _two_sided(base: Pair, q: float) -> TwoSidedPair:
    """One record exchanged in a share q of the runs of a mechanism that (P, Q) dominates for exchanges.

    delta(ε) is at most that of (1 − q)Q + qP against Q for ε ≥ 0, and that of P against (1 − q)P + qQ below (advanced
    joint convexity of Balle, Barthe, Gaboardi 2018; Zhu, Dong, Wang 2022).
    """
    return TwoSidedPair(_sampled(base, q), _sampled(base, q, flipped=True))


def _poisson(event: PoissonSampled, adjacency: str) -> Judged:
    q, inner = event.sample_rate, event.event
    if q == 0.0:
        return NOTHING
    if q == 1.0:
        return judge(inner, adjacency)
    if _hardly_noisy(inner):
        return _as_without_noise(event, adjacency)
    if q < _RAREST:
        return Judged(terms=judge(replace(event, sample_rate=_RAREST), adjacency).terms, reached=())
    if adjacency == "replace_one":
        if isinstance(inner, Gaussian) and inner.noise_multiplier > 0.0:
            pair = exchange_pair(1, q, inner.noise_multiplier)
            return both(pair, pair)
        base = _additive(inner, 2)
        if base is None:
            raise unsupported(event, adjacency, "what a batch without the record gives is not bounded by it.")
        # without the record, with it, with the other one: any two of them are at most an exchange apart
        two = _two_sided(base, q)
        return Judged(terms=(Term(two, two),), reached=())
    base = _additive(inner, 1)
    if base is None and adjacency == "add_or_remove_one" and isinstance(inner, ApproximateDP):
        base = _unsampled(inner, 1)
    if base is None:
        raise unsupported(event, adjacency, "it is not known how it acts on a batch without the record.")
    return both(_sampled(base, q), _sampled(base, q, flipped=True))


_LEAST = 2e-3
"""A sampled Gaussian of less noise counts as one without: its quadrature has of the order of 10 / σ² points, which at
1e-4 would take all of a machine's memory."""

_RAREST = 1e-10
"""A smaller rate counts as this one: of losses so small double precision keeps too few digits."""


def _hardly_noisy(event: Event) -> bool:
    return isinstance(event, Gaussian) and 0.0 < event.noise_multiplier < _LEAST


def _as_without_noise(event: Event, adjacency: str) -> Judged:
    """Whoever is in the batch is seen: an upper bound; no lower one is given."""
    bare = replace(event, event=Gaussian(0.0))  # type: ignore[call-arg]
    return Judged(terms=judge(bare, adjacency).terms, reached=())


def _truncated(event: TruncatedPoissonSampled, adjacency: str) -> Judged:
    """Given how many others were drawn, either Poisson sampling, or an exchange at the rate of staying in the batch.

    Let K ~ Bin(n − 1, q) of the others be drawn, B the cap. If K < B the record joins with probability q. If K ≥ B the
    batch without it is a uniform B-subset of the others; with it, it is that, or, with probability qB/(K + 1), the
    record and B − 1 of the others. The subsets' laws do not depend on K, so the rates of K ≥ B average to
    r = B·P(Bin(n, q) > B) / (n ψ), ψ = P(K ≥ B). The law of K is the same on both data sets, and delta is jointly
    convex.
    """
    q, n, cap, inner = event.sample_rate, event.dataset_size, event.max_batch_size, event.event
    plain = PoissonSampled(q, inner)
    if q == 0.0 or cap == 0:
        return NOTHING
    if cap >= n:
        return judge(plain, adjacency)
    if not isinstance(inner, Gaussian):
        raise unsupported(event, adjacency, "the exchange within a full batch is worked out for Gaussians.")
    if q == 1.0:
        return judge(SampledWithoutReplacement(cap, n, inner), adjacency)
    if _hardly_noisy(inner):
        return _as_without_noise(event, adjacency)
    from scipy.special import bdtrc  # here, not above: it triples the import time

    cut = min(1.0, float(bdtrc(cap - 1, n - 1, q)) * (1.0 + 1e-9))
    over = float(bdtrc(cap, n, q)) * (1.0 + 1e-9)
    if cut < 1e-290:
        return judge(plain, adjacency)
    rate = min(q, cap * over / (n * cut) * (1.0 + 1e-8))
    free, full = judge(plain, adjacency), _fixed_size(rate, inner, adjacency)
    (a,), (b,) = free.terms, full.terms
    sides = ((a.remove, b.remove), (a.add, b.add))
    remove, add = (MixedPair(((1.0 - cut, x), (cut, y))) for x, y in sides)
    # others that contribute nothing: the record is in the batch with probability (1 − ψ)q + ψr
    least = judge(PoissonSampled((1.0 - cut) * q + cut * rate * (1.0 - 1e-7), inner), adjacency)
    return Judged(terms=(Term(remove, add),), reached=least.lower())


def _without_replacement(event: SampledWithoutReplacement, adjacency: str) -> Judged:
    if event.batch_size == 0:
        return NOTHING
    if event.batch_size == event.dataset_size:
        return judge(event.event, adjacency)
    if _hardly_noisy(event.event):
        return _as_without_noise(event, adjacency)
    judged = _fixed_size(event.batch_size / event.dataset_size, event.event, adjacency)
    if not judged.terms and judged.mu_squared == 0.0:
        raise unsupported(event, adjacency, "it is not known how it acts on a batch with another record in its place.")
    return judged


def _fixed_size(q: float, inner: Event, adjacency: str) -> Judged:
    """A record in a batch of fixed size with probability q, in the place of another one where it is not.

    Adding or removing: P = (1 − q) M(T, j) + q M(T, x) against M(T, j), an exchange of j and x on one side only.
    Exchanging x for x': (1 − q) M(T, j) + q M(T, x) against (1 − q) M(T, j) + q M(T, x'), any two an exchange apart.
    Nulling x: x' is zero. For a Gaussian the worst j is opposite to x for ε ≥ 0, and equal to it below (`mixtures`).
    """
    base = _additive(inner, 2)
    if base is None and adjacency == "replace_one" and isinstance(inner, ApproximateDP):
        base = _unsampled(inner, 2)
    if base is None:
        return NOTHING
    one_sided = Term(_sampled(base, q), _sampled(base, q, flipped=True))
    if adjacency == "add_or_remove_one":
        return Judged(terms=(one_sided,))
    if adjacency == "zero_out" and isinstance(inner, Gaussian) and inner.noise_multiplier > 0.0:
        sigma = inner.noise_multiplier
        near = GaussianPair(q=q, sigma=sigma), GaussianPair(q=q, sigma=sigma, flipped=True)
        remove = TwoSidedPair(zeroed_pair(q, sigma), near[1])
        add = TwoSidedPair(near[0], zeroed_pair(q, sigma, flipped=True))
        return Judged(terms=(Term(remove, add),), reached=(Term(*near),))  # others that contribute nothing
    two = _two_sided(base, q)
    if not isinstance(inner, Gaussian) or adjacency == "zero_out":
        return Judged(terms=(Term(two, two),), reached=())
    return Judged(terms=(Term(two, two),), reached=(one_sided,))  # all others like the record's replacement


def _allocation(event: RandomAllocation, adjacency: str) -> Judged:
    base = _additive(event.event, 1)
    if adjacency == "replace_one" or base is None:
        raise unsupported(event, adjacency, "only adding, removing or nulling a record of a noisy sum is proven.")
    if event.selected == 0:
        return NOTHING
    if event.selected == event.steps:
        return _repeated(judge(event.event, adjacency), event.steps)
    if _hardly_noisy(event.event):
        return _as_without_noise(event, adjacency)
    if base.infinite == 1.0:  # no noise: the round with the record shows it
        return both(base, base)
    cut = blocks(event.steps, event.selected)
    terms = []
    for rounds, runs in cut:
        if rounds == 1:
            add = base.flip() if isinstance(base, DiscretePair) else base
            terms.append(Term(base, add, runs))
        else:
            upper = one_of(base, rounds, upper=True)
            terms.append(Term(upper, upper.flip(), runs))
    if event.selected == 1:
        lower = one_of(base, event.steps, upper=False)
        return Judged(terms=tuple(terms), reached=(Term(lower, lower.flip()),))
    if not isinstance(base, GaussianPair):
        return Judged(terms=tuple(terms), reached=())
    # the sum of all rounds is one Gaussian, at distance selected / √steps
    least = GaussianPair(sigma=base.sigma * math.sqrt(event.steps) / event.selected)
    return Judged(terms=tuple(terms), reached=(Term(least, least),))


def _repeated(judged: Judged, runs: int) -> Judged:
    def times(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(Term(term.remove, term.add, term.runs * runs) for term in terms)

    reached = None if judged.reached is None else times(judged.reached)
    return Judged(judged.mu_squared * runs, times(judged.terms), reached)


def _group(event: GroupOf, adjacency: str) -> Judged:
    inner, size = event.event, event.size
    if size == 1:
        return judge(inner, adjacency)
    if isinstance(inner, Gaussian):
        return Judged(mu_squared=size**2 * judge(inner, adjacency).mu_squared)
    base = _additive(inner, size * int(reach(adjacency)))
    if base is not None:
        return both(base, base.flip() if isinstance(base, DiscretePair) else base)
    if isinstance(inner, PoissonSampled) and isinstance(inner.event, Gaussian):
        q, sigma = inner.sample_rate, inner.event.noise_multiplier
        if q in (0.0, 1.0):
            return NOTHING if q == 0.0 else judge(GroupOf(size, inner.event), adjacency)
        if sigma < _LEAST * size:  # the group is seen if any of it is in the batch
            return _seen(-math.expm1(size * math.log1p(-q)) * (1.0 + 1e-12), adjacency)
        if adjacency == "replace_one":
            pair = exchange_pair(size, q, sigma)
            return both(pair, pair)
        return both(group_pair(size, q, sigma), group_pair(size, q, sigma, flipped=True))
    raise unsupported(event, adjacency)


def _seen(rate: float, adjacency: str) -> Judged:
    """With this probability all is told, else nothing."""
    told = DiscretePair((), (), 1.0, 1.0)
    if rate >= 1.0:
        return Judged(terms=(Term(told, told),), reached=())
    two = _two_sided(told, rate)
    one_sided = Term(_sampled(told, rate), _sampled(told, rate, flipped=True))
    return Judged(terms=(Term(two, two) if adjacency == "replace_one" else one_sided,), reached=())
