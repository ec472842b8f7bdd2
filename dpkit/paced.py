"""Samplings for correlated noise: when a record may take part again, and what its participations cost together.

They know how many releases there were (`Paced`), which a sampling for independent noise need not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

from dpkit.accountants import Composed, Event, Gaussian, PoissonSampled, banded_matrix

from .correlated import BandedNoise, Correlation
from .errors import ConfigurationError, SamplingError
from .sampling import FixedBatches, PoissonSampling, Sampling, taking_part


@runtime_checkable
class Paced(Protocol):
    """What the engine asks beyond `dpkit.sampling.Sampling`: the guarantee depends on the order of the releases."""

    def begin_pass(self) -> bool: ...

    def follows(self, logical: int) -> bool: ...

    def advance(self) -> None: ...

    def restart(self) -> None: ...

    def planned(self, noise_multiplier: float, steps: int) -> Event: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(eq=False)
class CyclicPoisson:
    """b groups take turns; each record of the group whose turn it is takes part with probability ``sample_rate``.

    Guarantee (b-banded C): a record takes part at most once in b steps, and what it adds to the query C x then lies in
    those b steps alone. So T steps cost ⌈T / b⌉ Poisson steps with one Gaussian each (Choquette-Choo et al. 2023). Each
    record's group is drawn for itself: adding or removing a record leaves the others' groups as they are.

    Attributes:
        records: N, units in the data set.
        expected_batch_size: B, of a step; the rate within a group is B b / N.
        steps: logical batches in one pass.
        bands: b.
        groups: [N], each record's group.
    """

    records: int
    expected_batch_size: float
    steps: int
    bands: int
    groups: Tensor = field(repr=False)
    name: str = "cyclic Poisson sampling"
    by_place = True

    def __post_init__(self) -> None:
        self._turn = 0
        self._origin = 0  # the turn at which this pass began
        self._since = 0  # releases since the mechanism began

    @property
    def sample_rate(self) -> float:
        return min(1.0, self.expected_batch_size * self.bands / self.records)

    def draws(self, generator: torch.Generator) -> Iterator[list[int]]:
        origin = self._origin
        for k in range(self.steps):
            drawn = taking_part(self.records, self.sample_rate, generator).to(self.groups.device)
            yield drawn[self.groups[drawn] == (origin + k) % self.bands].tolist()

    def event(self, inner: Event, *, first: bool) -> Event | None:
        if self._since % self.bands:
            return None
        return inner if self.sample_rate == 1.0 else PoissonSampled(self.sample_rate, inner)

    def planned(self, noise_multiplier: float, steps: int) -> Event:
        """What so many steps will cost."""
        return banded_matrix(noise_multiplier, self.bands, self.sample_rate, steps)

    def begin_pass(self) -> bool:
        """The groups go on taking turns where they were; returns whether another mechanism begins."""
        self._origin = self._turn
        return False

    def follows(self, logical: int) -> bool:
        """Whether that logical batch of the pass is the next to be released: it is of the group whose turn it is."""
        return self._origin + logical == self._turn

    def advance(self) -> None:
        """There was a release."""
        self._turn += 1
        self._since += 1

    def restart(self) -> None:
        """Another mechanism begins."""
        self._since = 0

    def state_dict(self) -> dict[str, Any]:
        """Groups and turn; the groups are part of who is drawn, and as confidential."""
        return {"groups": self.groups, "turn": self._turn, "origin": self._origin, "since": self._since}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on with those groups, at that turn."""
        self.groups = state["groups"]
        self._turn, self._origin, self._since = state["turn"], state["origin"], state["since"]


@dataclass(eq=False)
class RepeatedOrder:
    """The user's fixed batches in the same order in every pass: a record takes part once in ``steps`` steps, exactly.

    Guarantee: k passes cost one Gaussian, of squared sensitivity Σ of the inner products of the k columns of C that are
    the record's (all entries of C are at least 0, so that no directions of its gradients make it more). The j-th pass
    is charged with what it adds. Neighbouring data sets differ by zeroing out one record. A pass after one that was
    left half-way begins another mechanism.
    """

    batches: BatchSampler
    expected_batch_size: float
    steps: int
    correlation: Correlation = field(repr=False)
    sample_rate: float = 1.0
    name: str = "fixed batches in a fixed order"
    by_place = True

    def __post_init__(self) -> None:
        self._passes = 0  # complete ones of this mechanism
        self._released = 0  # in this pass, by this mechanism
        self._done = 0  # in this pass

    def draws(self, generator: torch.Generator) -> Iterator[list[int]]:
        return iter(list(self.batches))

    def _added(self, k: int) -> float:
        """What the k-th pass (from 0) adds to the squared sensitivity."""
        others = math.fsum(self.correlation.inner(j * self.steps) for j in range(1, k + 1))
        return (self.correlation.inner(0) + 2.0 * others) * (1.0 + 1e-12)

    def _cost(self, noise_multiplier: float, k: int) -> Event:
        return Gaussian(noise_multiplier / math.sqrt(self._added(k)))

    def event(self, inner: Event, *, first: bool) -> Event | None:
        if not first:
            return None
        assert isinstance(inner, Gaussian)
        return self._cost(inner.noise_multiplier, self._passes)

    def planned(self, noise_multiplier: float, steps: int) -> Event:
        """What so many steps will cost."""
        return Composed(tuple(self._cost(noise_multiplier, k) for k in range(-(-steps // self.steps))))

    def begin_pass(self) -> bool:
        """Returns whether another mechanism begins, because the pass before was left half-way."""
        self._done = 0
        left = self._released % self.steps != 0
        if left:
            self.restart()
        return left

    def follows(self, logical: int) -> bool:
        """Whether that logical batch of the pass is the next to be released."""
        return logical == self._done

    def advance(self) -> None:
        """There was a release."""
        self._released, self._done = self._released + 1, self._done + 1
        if self._released == self.steps:
            self._passes, self._released = self._passes + 1, 0

    def restart(self) -> None:
        """Another mechanism begins."""
        self._passes = self._released = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the passes stand."""
        return {"passes": self._passes, "released": self._released, "done": self._done}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on there."""
        self._passes, self._released, self._done = state["passes"], state["released"], state["done"]


def paced(sampling: Sampling, correlation: Correlation, generator: torch.Generator) -> Sampling:
    """The sampling that goes with correlated noise, in place of the one for independent noise.

    Args:
        generator: from which the groups are drawn.

    Raises:
        SamplingError: no guarantee is known for the two together.
    """
    if isinstance(sampling, PoissonSampling):
        if not isinstance(correlation, BandedNoise):
            raise SamplingError(
                f"{type(correlation).__name__} with Poisson sampling",
                why="a record may then take part in any two steps, and its participations overlap in all later ones.",
                cure="use BandedNoise, or poisson_sampling=False.",
            )
        bands, size, records = correlation.bands, sampling.expected_batch_size, sampling.records
        if size * bands > records:
            raise SamplingError(
                f"{bands} bands, batches of {size:g} and {records} records",
                why="each group has records for less than one batch.",
                cure=f"use at most {int(records // size)} bands.",
            )
        groups = torch.randint(bands, (records,), generator=generator, device=generator.device)
        return CyclicPoisson(records, size, sampling.steps, bands, groups)
    if isinstance(sampling, FixedBatches):
        if not isinstance(sampling.batches.sampler, SequentialSampler):
            raise SamplingError(
                "correlated noise with batches that are shuffled anew in every pass",
                why="a record may be last in one pass and first in the next, and its participations then overlap.",
                cure="use shuffle=False (shuffle the data set itself once), or poisson_sampling=True with BandedNoise.",
            )
        return RepeatedOrder(sampling.batches, sampling.expected_batch_size, sampling.steps, correlation)
    raise ConfigurationError(
        f"correlated noise with {sampling.name}",
        why="what a record's participations cost together is not known for it.",
        cure="leave noise out: independent noise goes with every sampling.",
    )
