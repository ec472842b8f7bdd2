"""From the arguments of `make_private` to σ (as given, or the least one that meets a target) and to the hard budget."""

from __future__ import annotations

from collections.abc import Callable

from dpkit.accountants import Accountant, Event, Gaussian, calibrate, dpsgd

from . import checks
from .budget import Budget, kind_of
from .errors import ConfigurationError
from .paced import Paced
from .sampling import FixedBatches, Sampling


def noise_multiplier_for(
    accountant: Accountant,
    sampling: Sampling,
    noise_multiplier: float | None,
    target_epsilon: float | None,
    target_delta: float | None,
    epochs: int | None,
    steps: int | None,
) -> float:
    """σ as given, or the least one that keeps the planned steps within (target_epsilon, target_delta).

    Raises:
        ConfigurationError: an argument out of range, both or neither of σ and a complete target, or a target for an
            accountant that has counted something before.
    """
    if target_delta is not None:
        checks.number("target_delta", target_delta, low=0.0, high=1.0)
    if noise_multiplier is not None:
        if target_epsilon is not None or epochs is not None or steps is not None:
            raise ConfigurationError(
                "noise_multiplier was given together with target_epsilon, epochs or steps",
                why="one determines the other.",
                cure="give noise_multiplier alone, or target_epsilon, target_delta and epochs (or steps).",
            )
        return checks.number("noise_multiplier", noise_multiplier, low=0.0, strict=False)
    if target_epsilon is None or target_delta is None or (epochs is None) == (steps is None):
        raise ConfigurationError(
            "neither noise_multiplier nor a complete target was given",
            why="the noise follows from one of them.",
            cure="give noise_multiplier, or target_epsilon, target_delta and one of epochs and steps.",
        )
    if accountant.ledger:
        raise ConfigurationError(
            "target_epsilon was given to an engine that has spent budget already",
            why="the target would not count what was spent before.",
            cure="give noise_multiplier, or use a new engine and add up the two budgets.",
        )
    checks.number("target_epsilon", target_epsilon, low=0.0)
    total = checks.count("steps", steps) if steps is not None else checks.count("epochs", epochs) * sampling.steps
    build: Callable[[float, float, int], Event] = dpsgd
    if isinstance(sampling, Paced):
        build = lambda sigma, _, steps: sampling.planned(sigma, steps)  # noqa: E731
    elif isinstance(sampling, FixedBatches):
        total = -(-total // sampling.steps)
    sigma: float = calibrate(
        target_epsilon=target_epsilon,
        delta=target_delta,
        sample_rate=sampling.sample_rate,
        steps=total,
        accountant=kind_of(accountant),
        build=build,
    )
    return sigma


def budget_for(
    accountant: Accountant,
    sampling: Sampling,
    noise_multiplier: float,
    max_epsilon: float | None,
    target_delta: float | None,
) -> Budget | None:
    """The hard budget (max_epsilon, target_delta), or None.

    Raises:
        ConfigurationError: no delta, or not even a first step would fit.
    """
    if max_epsilon is None:
        return None
    if target_delta is None:
        raise ConfigurationError(
            f"max_epsilon = {max_epsilon!r} without target_delta", why="ε is a function of δ.", cure="give both."
        )
    limit = checks.number("max_epsilon", max_epsilon, low=0.0)
    kind, adjacency = kind_of(accountant), accountant.adjacency
    budget = Budget(limit, target_delta, kind=kind, adjacency=adjacency, expected=sampling.steps)
    event = sampling.event(Gaussian(noise_multiplier), first=True)
    if event is not None and not budget.room({}, event, 1):
        raise ConfigurationError(
            f"max_epsilon = {limit:g} at delta {target_delta:g}, and noise_multiplier = {noise_multiplier:g}",
            why="the first step would exceed the budget.",
            cure="raise max_epsilon or noise_multiplier.",
        )
    return budget
