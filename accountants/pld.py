"""Privacy-loss-distribution accounting: rigorous upper and lower bounds within 1e-4 of the truth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from . import gaussian, single
from .accountant import Accountant, check_delta, check_epsilon
from .compose import MAX_SIZE, Chernoff, Plan, build, chernoff, jump_plan, make_plan, refine, solve_epsilon
from .errors import AccountingError
from .events import Event
from .mechanisms import judge
from .pairs import DiscretePair, GaussianPair, Pair
from .spectrum import Spectrum

Counts = tuple[int, ...]
_FAINT = -500.0
"""log of a delta that nobody asks for; far below it masses underflow."""


@dataclass(frozen=True)
class _Built:
    spectrum: Spectrum
    plan: Plan
    cost: float
    """What the grid adds to epsilon at the full counts."""
    blur: float
    """Relative error bound of B where it was built."""


class Direction:
    """One neighbouring direction of a composition: answers questions, keeping the spectra it built."""

    def __init__(self, pairs: tuple[Pair, ...]) -> None:
        self.pairs = pairs
        self._built: dict[bool, list[_Built]] = {True: [], False: []}
        self._seen: Counts | None = None
        self._intrinsic = [pair.infinite for pair in pairs]
        self._quick: list[Chernoff] = []
        self._distances: list[float] | None = None
        self._last: float | None = None
        """The last epsilon found: in a training loop the next one is near."""

    def _floor(self, counts: Counts) -> float:
        """log of the mechanism's own P(L = ∞)."""
        if any(p >= 1.0 and n for p, n in zip(self._intrinsic, counts, strict=True)):
            return 0.0
        lost = -math.expm1(sum(n * math.log1p(-p) for p, n in zip(self._intrinsic, counts, strict=True) if n))
        return math.log(lost) if lost > 0.0 else -math.inf

    def _good(self, built: _Built, counts: Counts, epsilon: float, log_delta: float, tolerance: float) -> bool:
        """Whether an answer from this spectrum is as tight as a fresh one would be."""
        if epsilon == 0.0:
            return True
        if epsilon > built.spectrum.cap:
            return False  # true, but loose
        value, error, _, infinite = built.spectrum.bracket(epsilon, counts)
        if not error <= max(1e-6, 4.0 * built.blur) * value:
            return False
        own = self._floor(counts)
        spent = infinite - (math.exp(own) if own > -700.0 else 0.0)
        if spent > 0.0 and math.log(spent) > log_delta - 13.0:
            return False
        away = abs(log_delta - built.plan.log_delta)
        if not built.spectrum.upper and away > 1.0:
            return False  # a lower law drops what lies far from the losses that it was built for
        cost = built.cost * sum(counts) / max(1, sum(built.spectrum.counts))
        fine = cost <= 2.0 * tolerance * max(epsilon, 0.1 / built.plan.slope)
        return fine and away <= 5.0 + 0.5 * abs(built.plan.log_delta)

    def _store(self, built: _Built) -> None:
        kept = self._built[built.spectrum.upper]
        kept.append(built)
        del kept[:-16]

    def _fresh(self, counts: Counts, plan: Plan, tolerance: float, upper: bool, room: Counts) -> _Built:
        spectrum, cost = build(self.pairs, room, plan, tolerance, upper=upper, fewest=counts)
        return _Built(spectrum, plan, cost, 0.0)

    def _room(self, counts: Counts) -> Counts:
        """Twice the counts that have grown since the last question: a training loop rebuilds at doublings only."""
        seen, self._seen = self._seen, counts
        if seen is None or not all(a <= b for a, b in zip(seen, counts, strict=True)):
            return counts
        return tuple(2 * b if b > a else b for a, b in zip(seen, counts, strict=True))

    def _apart(self, counts: Counts) -> float:
        """A bound on the total variation: the sum of the steps'."""
        if self._distances is None:
            self._distances = [pair.distance() for pair in self.pairs]
        return sum(n * d for n, d in zip(counts, self._distances, strict=True))

    def pure(self, counts: Counts) -> float:
        """Pure epsilon: the sum of the largest losses; infinite where some loss is unbounded."""
        return sum(n * max(0.0, pair.supremum()) for n, pair in zip(counts, self.pairs, strict=True) if n)

    def epsilon(self, counts: Counts, log_delta: float, tolerance: float, *, upper: bool) -> float:
        """The bound on epsilon at exp(log_delta)."""
        if self._floor(counts) >= log_delta:
            return math.inf
        if sum(counts) == 1:
            return single.epsilon(self._only(counts), log_delta, upper=upper)
        if log_delta > -25.0 and self._apart(counts) <= math.exp(log_delta):
            return 0.0
        value = self._search(counts, log_delta, tolerance, upper)
        return min(value, self.pure(counts)) if upper and self._floor(counts) == -math.inf else value

    def _one_loss(self, counts: Counts) -> tuple[float, float] | None:
        """(the loss, log P(it is finite)) where nothing that runs has more than one finite loss: there is no noise."""
        loss = log_mass = 0.0
        for n, pair in zip(counts, self.pairs, strict=True):
            if n and not (isinstance(pair, DiscretePair) and len(pair.losses) == 1):
                return None
            if n and isinstance(pair, DiscretePair):
                loss, log_mass = loss + n * pair.losses[0], log_mass + n * math.log(pair.masses[0])
        return loss, log_mass

    def _only(self, counts: Counts) -> Pair:
        """The pair that runs, where one does, once."""
        return self.pairs[counts.index(1)]

    def _stored(self, counts: Counts, log_delta: float, tolerance: float, upper: bool) -> float | None:
        """The answer of a spectrum that is there already, if it is good enough."""
        for built in reversed(self._built[upper]):
            if built.spectrum.fits(counts):
                answer = solve_epsilon(built.spectrum, counts, log_delta, self._last or built.plan.epsilon)
                if self._good(built, counts, answer, log_delta, tolerance):
                    if 0.0 < answer < math.inf:
                        self._last = answer
                    return answer
        return None

    def _search(self, counts: Counts, log_delta: float, tolerance: float, upper: bool) -> float:
        stored = self._stored(counts, log_delta, tolerance, upper)
        if stored is not None:
            return stored
        room = self._room(counts) if upper else counts
        plan = self._known_plan(counts, log_delta) or self._plan(room, log_delta)
        best = math.inf if upper else 0.0
        step: float | None = None
        wider, finest, replans = 0.0, 1.0, 6
        before: tuple[float, float] | None = None
        for _ in range(11):
            spectrum, cost = build(
                self.pairs, room, plan, tolerance * finest**2, upper=upper, fewest=counts, step=step, wider=wider
            )
            answer = solve_epsilon(spectrum, counts, log_delta, plan.epsilon)
            best = min(best, answer) if upper else max(best, answer)
            value, error, _, _ = spectrum.bracket(answer if 0.0 < answer < math.inf else plan.epsilon, counts)
            if wider == 0.0 and error > 0.1 * tolerance * plan.theta * plan.epsilon * value:
                # what lies outside the window weighs more here than was guessed
                wider = min(16.0, max(2.0, math.log(error / value) + 16.0)) if value > 0.0 else 16.0
                step = spectrum.step
                if 0.0 < answer < math.inf and value > 10.0 * error:
                    plan = refine(self.pairs, plan, spectrum, counts, answer)
                continue
            if upper and room == counts and math.isfinite(plan.cap) and 0.0 < answer < 0.97 * plan.epsilon and replans:
                # the cap lies too far out
                plan, replans = jump_plan(self.pairs, room, plan, epsilon=answer), replans - 1
                continue
            if not 0.0 < answer < math.inf:
                break
            if before is not None:
                # the error is second order in the step: compare with the coarser grid
                ratio = (before[0] / spectrum.step) ** 2
                cost = abs(before[1] - answer) / max(ratio - 1.0, 0.5)
            self._store(_Built(spectrum, plan, cost, error / value if value > 0.0 else math.inf))
            better = refine(self.pairs, plan, spectrum, counts, answer)
            scale = max(answer, 0.1 / better.slope)  # next to epsilon 0 only delta has a scale
            budget = tolerance * scale * (1.0 if upper else 2.0)
            typical = abs(plan.epsilon - answer) < 0.08 * scale and better.slope < 1.5 * plan.slope
            if cost <= 1.2 * budget and (before is not None or typical):
                break
            finer = 0.5 if before is None else min(0.7, max(0.1, math.sqrt(0.7 * budget / cost)))
            finer = max(finer, spectrum.size / MAX_SIZE)
            if finer > 0.75:
                break  # as fine as memory allows
            before, step, plan = (spectrum.step, answer), spectrum.step * finer, better
            finest *= finer
        return float(best)

    def _known_plan(self, counts: Counts, log_delta: float) -> Plan | None:
        """The plan of an upper spectrum for the same question, for the lower one."""
        for built in reversed(self._built[True]):
            if built.spectrum.counts == counts and abs(built.plan.log_delta - log_delta) < 1.0:
                return built.plan
        return None

    def epsilon_beyond(self, counts: Counts, log_delta: float, tolerance: float, known: float) -> float:
        """max(known, the upper bound on epsilon), at less cost where a cruder bound stays within ``known``."""
        if sum(counts) == 1:
            return max(known, self.epsilon(counts, log_delta, tolerance, upper=True))
        if self._floor(counts) == -math.inf and self.pure(counts) <= known:
            return known
        if any(quick.epsilon(counts, log_delta) <= known for quick in self._quick):
            return known
        if self._floor(counts) >= log_delta:
            return math.inf
        stored = self._stored(counts, log_delta, 100.0 * tolerance, upper=True)
        if stored is not None and stored <= known:
            return known
        if self._quick_at(counts, log_delta).epsilon(counts, log_delta) <= known:
            return known
        if self.epsilon(counts, log_delta, 100.0 * tolerance, upper=True) <= known:
            return known
        return max(known, self.epsilon(counts, log_delta, tolerance, upper=True))

    def log_delta_beyond(self, counts: Counts, epsilon: float, tolerance: float, known: float) -> float:
        """max(known, the upper bound on log delta), at less cost where a cruder bound stays within ``known``."""
        if sum(counts) == 1:
            return max(known, self.log_delta(counts, epsilon, tolerance, upper=True))
        if any(quick.log_delta(counts, epsilon) <= known for quick in self._quick):
            return known
        if self._floor(counts) < -700.0 and known > -700.0 and math.isfinite(epsilon):
            if self._quick_at(counts, known).log_delta(counts, epsilon) <= known:
                return known
            if self.log_delta(counts, epsilon, 100.0 * tolerance, upper=True) <= known:
                return known
        return max(known, self.log_delta(counts, epsilon, tolerance, upper=True))

    def _quick_at(self, counts: Counts, log_delta: float) -> Chernoff:
        quick = chernoff(self.pairs, counts, self._plan(counts, log_delta))
        self._quick = [*self._quick[-15:], quick]
        return quick

    def _plan(self, counts: Counts, log_delta: float) -> Plan:
        plan = make_plan(self.pairs, counts, log_delta=log_delta)
        if plan.heavy and all(pair.conserves() for pair in self.pairs):
            return jump_plan(self.pairs, counts, plan)
        return plan

    def log_delta(self, counts: Counts, epsilon: float, tolerance: float, *, upper: bool) -> float:
        """The bound on log delta at ``epsilon``."""
        if self._floor(counts) >= 0.0 or epsilon >= self.pure(counts):
            return self._floor(counts)  # no finite loss lies beyond
        point = self._one_loss(counts)
        if point is not None:
            loss, log_mass = point
            value = math.exp(self._floor(counts)) - math.exp(log_mass) * math.expm1(min(0.0, epsilon - loss))
            return min(0.0, math.log(value) + (1e-12 if upper else -1e-12)) if value > 0.0 else -math.inf
        if sum(counts) == 1:
            return single.log_delta(self._only(counts), epsilon, upper=upper)
        for built in reversed(self._built[upper]):
            if built.spectrum.fits(counts):
                answer = built.spectrum.log_delta(epsilon, counts)
                if self._good(built, counts, epsilon, answer, tolerance):
                    return answer
        room = self._room(counts) if upper else counts
        rough = make_plan(self.pairs, room, log_delta=-60.0, epsilon=epsilon)
        if rough.log_delta < _FAINT:  # delta falls with epsilon: what it is where it can still be told bounds it
            nearer = make_plan(self.pairs, room, log_delta=_FAINT).epsilon
            if nearer < 0.99 * epsilon:
                return self.log_delta(counts, nearer, tolerance, upper=True) if upper else -math.inf
        plan = make_plan(self.pairs, room, log_delta=min(rough.log_delta, -1.0) - 2.0, epsilon=max(epsilon, 1e-9))
        answers = []
        for _ in range(2):
            plan = replace(plan, epsilon=max(epsilon, 1.0 / plan.slope))
            built = self._fresh(counts, plan, tolerance, upper, room)
            answers.append(built.spectrum.log_delta(epsilon, counts))
            value, error, _, _ = built.spectrum.bracket(epsilon, counts)
            self._store(_Built(built.spectrum, plan, built.cost, error / value if value > 0.0 else math.inf))
            if math.isinf(answers[-1]) or (
                value > 0.0 and error <= 1e-5 * value and answers[-1] > plan.log_delta - 10.0
            ):
                break
            plan = make_plan(self.pairs, room, log_delta=answers[-1] - 2.0, epsilon=max(epsilon, 1e-9))
        return min(answers) if upper else max(answers)


class PLDAccountant(Accountant):
    """The composed privacy loss itself, discretised from above and from below.

    Guarantee: `epsilon` and `delta` are upper bounds, and with `epsilon_bounds` the truth is bracketed. Discretisation
    (`lattice`), truncation, wrap-around and floating-point error (`spectrum`) are all inside the bounds. Both
    directions, removing a record and adding one, are composed separately. The schedule of events must be fixed in
    advance; for one that depends on earlier answers use `dpkit.accountants.filters`.

    Args:
        adjacency: see `Accountant`.
        tolerance: how much of epsilon the grid may cost, relative; what is reported stays an upper bound whatever it
            is.

    >>> from dpkit.accountants import dpsgd
    >>> acc = PLDAccountant().compose(dpsgd(1.1, 0.01, 1000))
    >>> low, high = acc.epsilon_bounds(delta=1e-5)
    >>> low <= high <= acc.epsilon(delta=1e-5) <= low * 1.0001
    True
    """

    kind: ClassVar[str] = "pld"

    def __init__(self, adjacency: str = "add_or_remove_one", *, tolerance: float = 1e-5) -> None:
        super().__init__(adjacency)
        if not 1e-8 <= tolerance <= 0.1:
            raise AccountingError(
                f"tolerance is {tolerance!r}.", why="it must lie in [1e-8, 0.1].", cure="leave it at its default, 1e-5."
            )
        self._tolerance = tolerance
        self._directions: dict[tuple[Pair, ...], Direction] = {}

    def _check(self, event: Event) -> None:
        judge(event, self.adjacency)

    def _terms(self, *, lower: bool = False) -> tuple[float, tuple[Pair, ...], tuple[Pair, ...], Counts]:
        """The ledger as (squared Gaussian distance, pairs for removing, pairs for adding, counts)."""
        mu_squared = 0.0
        both: dict[tuple[Pair, Pair], int] = {}
        for event, n in self._ledger:
            judged = judge(event, self.adjacency)
            mu_squared += n * judged.mu_squared
            for term in judged.lower() if lower else judged.terms:
                key = (term.remove, term.add)
                both[key] = both.get(key, 0) + n * term.runs
        if both and 0.0 < mu_squared < math.inf:
            # all Gaussians are one Gaussian, exactly
            whole = GaussianPair(sigma=1.0 / math.sqrt(mu_squared))
            both[whole, whole] = both.get((whole, whole), 0) + 1  # a block of an allocation may be the same Gaussian
        return mu_squared, tuple(a for a, _ in both), tuple(b for _, b in both), tuple(both.values())

    def _direction(self, pairs: tuple[Pair, ...]) -> Direction:
        if pairs not in self._directions:
            if len(self._directions) > 8:
                self._directions.clear()
            self._directions[pairs] = Direction(pairs)
        return self._directions[pairs]

    def _sides(self, remove: tuple[Pair, ...], add: tuple[Pair, ...]) -> list[Direction]:
        """The directions to compose; one if they are the same."""
        return [self._direction(pairs) for pairs in ((remove,) if remove == add else (remove, add))]

    def _epsilon(self, delta: float) -> float:
        mu_squared, remove, add, counts = self._terms()
        log_delta = math.log(delta)
        if math.isinf(mu_squared):
            return math.inf
        if not remove:
            return gaussian.epsilon(log_delta, math.sqrt(mu_squared))
        first, *others = self._sides(remove, add)
        best = first.epsilon(counts, log_delta, self._tolerance, upper=True)
        for side in others:
            best = side.epsilon_beyond(counts, log_delta, self._tolerance, best)
        return best

    def _delta(self, epsilon: float) -> float:
        mu_squared, remove, add, counts = self._terms()
        if math.isinf(mu_squared):
            return 1.0
        if not remove:
            return math.exp(gaussian.log_delta(epsilon, math.sqrt(mu_squared))) * (1.0 + 1e-9)
        first, *others = self._sides(remove, add)
        best = first.log_delta(counts, epsilon, self._tolerance, upper=True)
        for side in others:
            best = side.log_delta_beyond(counts, epsilon, self._tolerance, best)
        return math.exp(best)

    def epsilon_bounds(self, delta: float) -> tuple[float, float]:
        """(lower, upper) for the true epsilon at ``delta``.

        Guarantee: lower ≤ truth ≤ upper; (upper − lower) / truth is about 3e-5 at the default tolerance.
        """
        log_delta = math.log(check_delta(delta))
        upper = self.epsilon(delta)
        if not self._ledger or upper == 0.0:
            return 0.0, upper
        mu_squared, remove, add, counts = self._terms(lower=True)
        if math.isinf(mu_squared):
            return math.inf, math.inf
        if not remove:
            return gaussian.epsilon(log_delta, math.sqrt(mu_squared), upper=False), upper
        first, *others = self._sides(remove, add)
        lower = first.epsilon(counts, log_delta, self._tolerance, upper=False)
        for side in others:
            if lower < upper * (1.0 - 5e-4):  # the other direction may be the larger one
                lower = max(lower, side.epsilon(counts, log_delta, self._tolerance, upper=False))
        return min(lower, upper), upper

    def delta_bounds(self, epsilon: float) -> tuple[float, float]:
        """(lower, upper) for the true delta at ``epsilon``."""
        epsilon = check_epsilon(epsilon)
        upper = self.delta(epsilon)
        if not self._ledger or upper == 0.0:
            return 0.0, upper
        mu_squared, remove, add, counts = self._terms(lower=True)
        if math.isinf(mu_squared):
            return 1.0, 1.0
        if not remove:
            return math.exp(gaussian.log_delta(epsilon, math.sqrt(mu_squared))) * (1.0 - 1e-9), upper
        sides = self._sides(remove, add)
        lower = math.exp(max(side.log_delta(counts, epsilon, self._tolerance, upper=False) for side in sides))
        return min(lower, upper), upper
