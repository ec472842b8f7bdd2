"""The missing number: which noise, rate or number of steps meets a target."""

from __future__ import annotations

import math

from .accountant import Accountant, check_delta
from .errors import AccountingError, UnreachableTargetError
from .events import dpsgd
from .rdp import RDPAccountant

_ACCOUNTANTS: dict[str, type[Accountant]] = {"rdp": RDPAccountant}
_SIGMA = (1e-2, 1e6)


def make_accountant(kind: str, adjacency: str = "add_or_remove_one") -> Accountant:
    """The accountant called ``kind``: "rdp"."""
    if kind not in _ACCOUNTANTS:
        raise AccountingError(
            f"accountant is {kind!r}.", why="no accountant has that name.", cure=f"pass one of {sorted(_ACCOUNTANTS)}."
        )
    return _ACCOUNTANTS[kind](adjacency=adjacency)


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    adjacency: str = "add_or_remove_one",
    accountant: str = "rdp",
) -> float:
    """Epsilon of DP-SGD at ``delta``: an upper bound."""
    event = dpsgd(noise_multiplier, sample_rate, steps)
    return make_accountant(accountant, adjacency).compose(event).epsilon(delta)


def calibrate(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    adjacency: str = "add_or_remove_one",
    accountant: str = "rdp",
    tolerance: float = 1e-5,
) -> float:
    """The least noise multiplier (to a relative ``tolerance``) with which DP-SGD stays within (epsilon, delta).

    Guarantee: the returned value itself was checked by the accountant and is not over the target.

    Raises:
        UnreachableTargetError: no noise multiplier up to 1e6 is enough.
    """
    delta = check_delta(delta)
    if not (target_epsilon > 0.0 and math.isfinite(target_epsilon)):
        raise AccountingError(
            f"target_epsilon is {target_epsilon!r}.", why="it must be positive and finite.", cure="pass e.g. 3.0."
        )

    def over(sigma: float) -> bool:
        value = make_accountant(accountant, adjacency).compose(dpsgd(sigma, sample_rate, steps)).epsilon(delta)
        return value > target_epsilon

    low, high = _SIGMA
    if over(high):
        raise UnreachableTargetError(
            f"epsilon {target_epsilon:g} at delta {delta:g} is not met by a noise multiplier of {high:g}.",
            why="more noise than that leaves no signal.",
            cure="raise the target, or lower sample_rate or steps.",
        )
    if not over(low):
        return low
    while high / low > 1.0 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if over(middle) else (low, middle)
    return high
