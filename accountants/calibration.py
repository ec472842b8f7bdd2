"""The missing number: which noise, rate or number of steps meets a target; and the one-call forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .accountant import Accountant, check_delta, check_epsilon
from .errors import AccountingError, UnreachableTargetError
from .events import Event, dpsgd
from .fdp import TradeOff
from .pld import PLDAccountant
from .rdp import RDPAccountant

_KINDS: dict[str, type[Accountant]] = {"pld": PLDAccountant, "rdp": RDPAccountant}
_SIGMA = (1e-2, 1e5)
_RATE = (1e-9, 1.0)
_MAX_STEPS = 10**9


def make_accountant(kind: str = "pld", adjacency: str = "add_or_remove_one", *, tolerance: float = 1e-5) -> Accountant:
    """The accountant called ``kind``: "pld" (tight) or "rdp" (quick)."""
    if kind in ("gdp", "gdp_estimate"):
        raise AccountingError(
            f"accountant is {kind!r}.",
            why="the central-limit answer is an estimate, often far below the truth; nothing may rest on it.",
            cure="pass 'pld' or 'rdp'; for the estimate itself build a GDPAccountant.",
        )
    if kind not in _KINDS:
        raise AccountingError(
            f"accountant is {kind!r}.", why="no accountant has that name.", cure=f"pass one of {sorted(_KINDS)}."
        )
    if kind == "pld":
        return PLDAccountant(adjacency, tolerance=tolerance)
    return _KINDS[kind](adjacency)


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    adjacency: str = "add_or_remove_one",
    accountant: str = "pld",
) -> float:
    """Epsilon of DP-SGD at ``delta``: an upper bound.

    >>> round(epsilon(noise_multiplier=1.1, sample_rate=0.01, steps=1000, delta=1e-5), 3)
    1.515
    """
    event = dpsgd(noise_multiplier, sample_rate, steps)
    return make_accountant(accountant, adjacency).compose(event).epsilon(delta)


def delta(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    epsilon: float,
    adjacency: str = "add_or_remove_one",
    accountant: str = "pld",
) -> float:
    """Delta of DP-SGD at ``epsilon``: an upper bound."""
    event = dpsgd(noise_multiplier, sample_rate, steps)
    return make_accountant(accountant, adjacency).compose(event).delta(epsilon)


def _target(
    target_epsilon: float | None,
    delta: float | None,
    target_advantage: float | None,
    target_tpr: float | None,
    fpr: float | None,
) -> tuple[str, float, Callable[[Accountant], float]]:
    """(its name, its value, what to ask the accountant); less is better."""
    given = [x is not None for x in (target_epsilon, target_advantage, target_tpr)]
    if sum(given) != 1:
        raise AccountingError(
            f"{sum(given)} targets were given.",
            why="exactly one can be met at a time.",
            cure="pass target_epsilon with delta, or target_advantage, or target_tpr with fpr.",
        )
    if target_epsilon is not None:
        if delta is None:
            raise AccountingError("target_epsilon without delta.", why="they go together.", cure="pass delta=...")
        if not (check_epsilon(target_epsilon) > 0.0 and math.isfinite(target_epsilon)):
            raise AccountingError(
                f"target_epsilon is {target_epsilon!r}.", why="it must be positive and finite.", cure="pass e.g. 3.0."
            )
        at = check_delta(delta)
        return "epsilon", target_epsilon, lambda acc: acc.epsilon(at)
    value = target_advantage if target_advantage is not None else target_tpr
    assert value is not None
    if not 0.0 < value < 1.0:
        raise AccountingError(f"the target is {value!r}.", why="it is a probability.", cure="pass a number in (0, 1).")
    if target_advantage is not None:
        return "advantage", value, lambda acc: acc.delta(0.0)
    if fpr is None or not 0.0 < fpr < value:
        raise AccountingError(
            f"target_tpr {value:g} at fpr {fpr!r}.",
            why="a true-positive rate is only meaningful above a false-positive rate in (0, target_tpr).",
            cure="pass fpr=1e-3, say, and a target_tpr above it.",
        )
    rate = fpr
    # the excess over guessing goes to zero with the privacy loss, the rate itself does not
    return "tpr", value - rate, lambda acc: TradeOff(acc).tpr(rate) - rate


def calibrate(
    *,
    target_epsilon: float | None = None,
    delta: float | None = None,
    target_advantage: float | None = None,
    target_tpr: float | None = None,
    fpr: float | None = None,
    noise_multiplier: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    adjacency: str = "add_or_remove_one",
    accountant: str = "pld",
    build: Callable[[float, float, int], Event] = dpsgd,
    tolerance: float = 1e-5,
) -> Any:
    """The one missing number among noise_multiplier, sample_rate and steps with which a target is met.

    Returns the least noise_multiplier, the largest sample_rate, or the largest number of steps (an int, searched
    exactly). With ``epochs`` in place of ``steps``, steps = ceil(epochs / sample_rate) at every candidate.

    Guarantee: the returned value itself was checked by the accountant's upper bound and is not over the target; a
    noise multiplier or rate is within a relative ``tolerance`` or so of the best one.

    Args:
        target_epsilon, delta: the target (ε, δ); or ``target_advantage``, the membership advantage TPR − FPR; or
            ``target_tpr`` at ``fpr``, an attacker's largest true-positive rate.
        build: (noise_multiplier, sample_rate, steps) -> event, for something other than Poisson DP-SGD.

    Raises:
        UnreachableTargetError: no value meets the target; the message names the limit that stands in the way.

    >>> round(calibrate(target_epsilon=1.0, delta=1e-5, sample_rate=0.01, steps=1000), 3)
    1.415
    """
    name, target, ask = _target(target_epsilon, delta, target_advantage, target_tpr, fpr)
    if epochs is not None:
        if steps is not None:
            raise AccountingError(
                "steps and epochs were both given.", why="one follows from the other.", cure="pass one."
            )
        if not epochs > 0.0:
            raise AccountingError(f"epochs is {epochs!r}.", why="it must be positive.", cure="pass e.g. 3.")
    missing = [
        label
        for label, value in (("noise_multiplier", noise_multiplier), ("sample_rate", sample_rate), ("steps", steps))
        if value is None and not (label == "steps" and epochs is not None)
    ]
    if len(missing) != 1:
        raise AccountingError(
            f"missing: {', '.join(missing) or 'nothing'}.",
            why="exactly one of noise_multiplier, sample_rate, steps is solved for.",
            cure="give all but one.",
        )

    def ratio(sigma: float, rate: float, count: int, tight: float) -> float:
        acc = make_accountant(accountant, adjacency, tolerance=tight).compose(build(sigma, rate, count))
        return ask(acc) / target

    def steps_at(rate: float) -> int:
        return steps if steps is not None else max(1, math.ceil((epochs or 0.0) / rate - 1e-9))

    fine = 1e-5  # what `epsilon` and the accountants use: what is checked here is what they will say
    if missing == ["noise_multiplier"]:
        assert sample_rate is not None
        rate = float(sample_rate)
        return _solve(
            lambda x, tol: ratio(x, rate, steps_at(rate), tol),
            *_SIGMA,
            False,
            fine,
            tolerance,
            name,
            missing[0],
            target,
        )
    assert noise_multiplier is not None
    sigma = float(noise_multiplier)
    if missing == ["sample_rate"]:
        return _solve(
            lambda x, tol: ratio(sigma, x, steps_at(x), tol), *_RATE, True, fine, tolerance, name, missing[0], target
        )
    assert sample_rate is not None
    rate = float(sample_rate)
    return _most_steps(lambda n: ratio(sigma, rate, n, 1e-5), name, target)


def _unreachable(name: str, target: float, what: str, limit: str, reached: float, cure: str) -> UnreachableTargetError:
    why = f"{what} = {limit} is the most private end of the search, and its {name} lies above the target."
    if math.isinf(reached) or reached >= 1.0 > target:
        why = f"even there the mechanism reveals a record with a probability above delta, whatever its {what}."
    return UnreachableTargetError(
        f"the target {name} {target:g} is not met: even {what} = {limit} gives {name} = {reached:.6g}.",
        why=why,
        cure=cure,
    )


def _solve(
    ratio: Callable[[float, float], float],
    low: float,
    high: float,
    rising: bool,
    fine: float,
    tolerance: float,
    name: str,
    what: str,
    target: float,
) -> float:
    """The x nearest the private end's far side with ratio(x) ≤ 1; ``ratio`` rises or falls with x."""

    from scipy.optimize import brentq  # here, not above: it doubles the import time

    def excess(log_x: float, tol: float) -> float:
        value = ratio(math.exp(log_x), tol)
        if rising is False:
            return math.log(min(max(value, 1e-9), 1e9))
        return -math.log(min(max(value, 1e-9), 1e9))

    safe, loose = (low, high) if rising else (high, low)
    a, b = math.log(low), math.log(high)
    # walk outwards from a usual value, so that no extreme setting is evaluated for nothing
    x, width = math.log(1e-2) if rising else 0.0, 0.5
    here = excess(x, 1e-3)
    while True:
        y = min(max(x + width if here > 0.0 else x - width, a), b)
        there = excess(y, 1e-3)
        if here * there <= 0.0:
            break
        if y in (a, b):
            end = low if y == a else high
            reached = ratio(end, fine)
            if end == safe and reached > 1.0:
                cure = (
                    "raise noise_multiplier or the target."
                    if rising
                    else "lower sample_rate or steps, or raise the target."
                )
                raise _unreachable(name, target, what, f"{safe:g}", reached * target, cure)
            if end == loose and reached <= 1.0:
                return loose
            break
        x, here, width = y, there, 1.5 * width
    left, right = min(x, y), max(x, y)
    root = float(brentq(lambda v: excess(v, 1e-3), left, right, xtol=1e-4)) if here * there < 0.0 else y
    left, right, width = root - 4e-4, root + 1e-4, 8e-4
    while excess(left, fine) < 0.0 and left > a - 1.0:
        left, right, width = left - width, left, 2.0 * width
    while excess(right, fine) > 0.0 and right < b + 1.0:
        left, right, width = right, right + width, 2.0 * width
    root = float(brentq(lambda v: excess(v, fine), left, right, xtol=0.2 * tolerance))
    # at most a few nudges to the private side
    for nudge in range(1, 60):
        x = math.exp(root + (-1.0 if rising else 1.0) * 0.2 * tolerance * (nudge - 1 if nudge < 4 else 1.5**nudge))
        x = min(max(x, low), high)
        if ratio(x, fine) <= 1.0:
            return x
    raise _unreachable(name, target, what, f"{x:g}", ratio(x, fine) * target, "raise the target.")


def _most_steps(ratio: Callable[[int], float], name: str, target: float) -> int:
    """The largest number of steps with ratio ≤ 1, exactly."""
    one = ratio(1)
    if one > 1.0:
        cure = "raise noise_multiplier, lower sample_rate, or raise the target."
        raise _unreachable(name, target, "steps", "1", one * target, cure)
    low, high = 1, 2
    while ratio(high) <= 1.0:
        low, high = high, high * 4
        if high > _MAX_STEPS:
            return _MAX_STEPS
    while high - low > 1:
        middle = (low + high) // 2 if high < 4 * low or high < 64 else int(math.sqrt(low * high))
        if ratio(middle) <= 1.0:
            low = middle
        else:
            high = middle
    return low
