"""Which dominating pairs stand for an event under an adjacency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from .errors import UnsupportedEventError
from .events import Event, Gaussian, PoissonSampled
from .pairs import DiscretePair, GaussianPair, Pair


@dataclass(frozen=True)
class Judged:
    """One event as the accountant sees it: squared Gaussian distance, or a pair for each direction, times ``runs``."""

    mu_squared: float = 0.0
    remove: Pair | None = None
    add: Pair | None = None
    runs: int = 1


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
    if isinstance(event, PoissonSampled):
        q, inner = event.sample_rate, event.event
        if q == 0.0:
            return NOTHING
        if q == 1.0:
            return judge(inner, adjacency)
        if isinstance(inner, Gaussian) and adjacency != "replace_one":
            sigma = inner.noise_multiplier
            if sigma == 0.0:
                revealed = DiscretePair((math.log1p(-q),), (1.0 - q,), q)
                return Judged(remove=revealed, add=revealed.flip())
            return Judged(
                remove=GaussianPair(q=q, sigma=sigma), add=GaussianPair(q=q, sigma=sigma, flipped=True)
            )
    raise unsupported(event, adjacency)
