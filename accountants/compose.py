"""From pairs and counts to a spectrum: the tilt, the grid and the window that make an answer tight.

Nothing here is part of a guarantee: whatever tilt, grid or estimate is chosen, `lattice` and `spectrum` return true
bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .lattice import Lattice, beyond, choose_edges, dominated, dominating
from .numeric import dot, root
from .pairs import Atoms, DiscretePair, Pair
from .spectrum import Spectrum, WindowTooLongError, lower_orders

MAX_SIZE = 1 << 22
_LARGEST_CAP = 30.0  # beyond it a loss's Q-mass may underflow
SHADES = (0.85, 0.93, 0.98, 1.0)  # a tilt a little below the optimum: lighter tails, so shorter windows


@dataclass(frozen=True)
class Plan:
    """Where the composed loss has what matters for one question."""

    theta: float
    slope: float
    """−d log delta / d epsilon, the tilt at which the tails count."""
    epsilon: float
    log_delta: float
    deviation: float
    kurtosis: float
    """Excess kurtosis of the tilted composed law."""
    pilots: list[Atoms]
    spans: list[tuple[float, float]]
    head: float
    tail: float
    cap: float = math.inf
    """Losses beyond are summed apart."""
    share: float = 1.0
    """Roughly the part of delta that losses within the cap make up."""

    @property
    def heavy(self) -> bool:
        """Whether the tilted law is far from normal: a few large losses, or none."""
        return self.kurtosis > 0.5


def moments(atoms: Atoms, t: float) -> tuple[float, float, float]:
    """K(t), K'(t), K''(t) of a law given by atoms."""
    exponent = t * atoms.loss
    with np.errstate(divide="ignore"):
        exponent = exponent + np.log(atoms.mass)
    top = float(exponent.max())
    weight = np.exp(np.maximum(exponent - top, -600.0))  # denormal numbers are slow
    total = float(weight.sum())
    mean = float(dot(weight, atoms.loss)) / total
    variance = float(dot(weight, (atoms.loss - mean) ** 2)) / total
    return top + math.log(total), mean, variance


def _root(rising: Callable[[float], float], start: float) -> float:
    """log t where ``rising(log t)`` crosses zero, within e^-16 .. e^23; the nearer end if it does not."""
    low = high = min(max(start, -15.0), 22.0)
    while rising(low) > 0.0 and low > -16.0:
        low -= 1.0
    while rising(high) < 0.0 and high < 23.0:
        high += 1.0
    if low < high and rising(low) < 0.0 < rising(high):
        return root(rising, low, high, xtol=1e-3)
    if rising(high) < 0.0:
        return math.nan
    return low


def make_plan(pairs: Sequence[Pair], counts: Sequence[int], *, log_delta: float, epsilon: float | None = None) -> Plan:
    """The tilt for a question: for a given δ the θ that minimises (ΣTK(θ) − log δ)/θ; for a given ε the saddle point.

    With ``epsilon`` given, ``log_delta`` only sets how far the tails are followed.
    """
    steps = max(1, sum(counts))
    head, tail = -37.0 - math.log(steps), log_delta - 17.0 - math.log(steps)
    spans = [pair.span(head, tail) for pair in pairs]
    pilots = [pair.atoms(np.array(span)) for pair, span in zip(pairs, spans, strict=True)]

    def sums(t: float) -> tuple[float, float, float]:
        k = m = v = 0.0
        for atoms, n in zip(pilots, counts, strict=True):
            a, b, c = moments(atoms, t)
            k, m, v = k + n * a, m + n * b, v + n * c
        return k, m, v

    def by_delta(log_t: float) -> float:
        t = math.exp(log_t)
        k, m, _ = sums(t)
        return t * m - k + log_delta

    def by_epsilon(log_t: float) -> float:
        return sums(math.exp(log_t))[1] - float(epsilon or 0.0)

    variance = max(sums(0.0)[2], 1e-300)
    start = 0.5 * math.log(max(-2.0 * log_delta, 1e-3) / variance)
    log_best = _root(by_delta if epsilon is None else by_epsilon, start)
    if math.isnan(log_best):
        # a bounded loss: no tilt reaches this far; take one that gets most of the way to the end
        most = by_delta(20.0) - log_delta
        log_best = _root(lambda x: by_delta(x) - log_delta - 0.8 * most, start)
        log_best = log_best if math.isfinite(log_best) else start
    best = math.exp(log_best)
    if epsilon is not None:
        # below the mean no tilt is called for: one of half a standard deviation, in relative entropy
        least = _root(lambda x: by_delta(x) - log_delta - 0.125, start)
        best = max(best, 0.5 / math.sqrt(variance) if math.isnan(least) else math.exp(least))
    for shade in SHADES:
        theta = shade * best
        k, mean, variance = sums(theta)
        deviation = math.sqrt(max(variance, 0.0))
        shrink = math.log(max(1.0, 2.5 * theta * (1.0 + theta) * deviation))
        if epsilon is None:
            estimate = max((k - log_delta - shrink) / theta, 1e-3 * deviation, 1e-12)
        else:
            estimate = max(epsilon, 1e-12)
        # tilted too little, a law that turns from many small losses to one large one never gets near epsilon
        if estimate - mean <= 2.5 * deviation:
            break
    if epsilon is not None:
        log_delta = min(-1e-9, k - theta * epsilon - shrink)
    kurtosis = _kurtosis(pilots, counts, theta, variance)
    return Plan(theta, best, estimate, log_delta, deviation, kurtosis, pilots, spans, head, tail)


def _kurtosis(pilots: Sequence[Atoms], counts: Sequence[int], theta: float, variance: float) -> float:
    fourth = 0.0
    for atoms, n in zip(pilots, counts, strict=True):
        k, m, v = moments(atoms, theta)
        with np.errstate(divide="ignore"):
            weight = np.exp(np.maximum(theta * atoms.loss + np.log(atoms.mass) - k, -600.0))
        fourth += n * (float(dot(weight, (atoms.loss - m) ** 4)) - 3.0 * v * v)
    return fourth / max(variance, 1e-150) ** 2


def _reach_down(laws: Sequence[Atoms | Lattice], counts: Sequence[int]) -> float:
    """How far the composed loss falls below 0 with a probability under Q of more than e^-12."""
    best = math.inf
    for t in lower_orders(laws, counts):
        total = 0.0
        for law, n in zip(laws, counts, strict=True):
            power = np.expm1(np.maximum(-t * law.loss, -40.0))
            total += n * math.log1p(float(dot(law.mass * np.exp(-law.loss), power)))
        best = min(best, (total + 12.0) / t)
    return best if math.isfinite(best) else 0.0


@dataclass(frozen=True)
class _Guess:
    """delta at one epsilon, in two parts: one loss beyond the cap, and Chernoff's bound within it."""

    log_delta: float
    log_within: float
    theta: float
    deviation: float


def jump_plan(pairs: Sequence[Pair], counts: Sequence[int], plan: Plan, *, epsilon: float | None = None) -> Plan:
    """The plan again for a law of large rare losses: those beyond a cap little above epsilon are summed apart.

    No tilt brings such a law's mass near epsilon: it turns from no large loss at all to some far beyond. Below the cap
    that is different. With ``epsilon`` given the plan is for that, else for the plan's delta.
    """
    if plan.epsilon > 300.0:
        return plan  # far beyond any use of a cap
    down = 1.05 * _reach_down(plan.pilots, counts)
    sides = []
    for atoms, n in zip(plan.pilots, counts, strict=True):
        order = np.argsort(atoms.loss)
        loss, mass = atoms.loss[order], atoms.mass[order]
        q = np.append(np.cumsum((mass * np.exp(-loss))[::-1])[::-1], 0.0)
        d = np.append(np.cumsum((mass * -np.expm1(-loss))[::-1])[::-1], 0.0)
        sides.append((n, loss, mass, q, d))

    def guess(x: float) -> _Guess:
        cap = x + max(down, 0.03 * x)
        far = 0.0
        within = []
        for n, loss, mass, q, d in sides:
            i = int(np.searchsorted(loss, cap))
            far += n * max(0.0, float(d[i]) - math.expm1(x) * float(q[i]))
            within.append((n, plan.pilots[0]._replace(loss=loss[:i], mass=mass[:i])))

        def sums(t: float) -> tuple[float, float, float]:
            parts = [(n, moments(atoms, t)) for n, atoms in within]
            return tuple(sum(n * part[i] for n, part in parts) for i in range(3))  # type: ignore[return-value]

        theta = math.exp(_root(lambda log_t: sums(math.exp(log_t))[1] - x, math.log(max(plan.theta, 1e-6))))
        k, _, variance = sums(theta)
        theta = max(theta, 0.5 / math.sqrt(max(variance, 1e-300))) if math.isfinite(theta) else plan.theta
        k, _, variance = sums(theta)
        deviation = math.sqrt(max(variance, 0.0))
        chernoff = k - theta * x - math.log(max(1.0, 2.5 * theta * (1.0 + theta) * deviation))
        total = float(np.logaddexp(chernoff, math.log(far) if far > 0.0 else -math.inf))
        return _Guess(total, chernoff, theta, deviation)

    if epsilon is None:
        if plan.epsilon > _LARGEST_CAP and guess(_LARGEST_CAP).log_delta > plan.log_delta:
            return plan
        high = math.log(min(plan.epsilon * 1.1, _LARGEST_CAP))
        low = high - 1.0
        while guess(math.exp(low)).log_delta < plan.log_delta and low > high - 30.0:
            low -= 1.0

        def rising(x: float) -> float:
            return guess(math.exp(x)).log_delta - plan.log_delta

        at = root(rising, low, high, xtol=0.01) if rising(high) < 0.0 < rising(low) else high
        epsilon = math.exp(at)
    here, there = guess(epsilon), guess(epsilon * 1.02)
    slope = max((here.log_delta - there.log_delta) / (0.02 * epsilon), 1e-3 * here.theta)
    if epsilon + down > _LARGEST_CAP:
        return plan
    share = math.exp(max(-12.0, min(0.0, here.log_within - here.log_delta)))
    return replace(
        plan,
        theta=here.theta,
        slope=slope,
        epsilon=epsilon,
        deviation=here.deviation,
        cap=epsilon + max(down, 0.03 * epsilon),
        share=share,
    )


def _origin(pair: Pair, pilot: Atoms, step: float) -> float:
    """Where to pin the grid: on a true atom, on the R-mean of a bulk narrower than the grid, else anywhere."""
    breaks = pair.breaks()
    if breaks:
        return breaks[0]
    order = np.argsort(pilot.loss)
    loss, mass = pilot.loss[order], pilot.mass[order]
    total = np.cumsum(mass)
    middle = float(loss[int(np.searchsorted(total, 0.5 * total[-1]))])
    near = np.abs(loss - middle) < 0.5 * step
    if float(mass[near].sum()) < 0.3:
        return 0.0
    return middle - math.log(float(dot(mass[near], np.exp(middle - loss[near]))) / float(mass[near].sum()))


def build(
    pairs: Sequence[Pair],
    counts: Sequence[int],
    plan: Plan,
    tolerance: float,
    *,
    upper: bool,
    fewest: Sequence[int] | None = None,
    step: float | None = None,
    wider: float = 0.0,
) -> tuple[Spectrum, float]:
    """A spectrum whose discretisation costs about ``tolerance`` of epsilon at most, and an estimate of that cost.

    With ``step`` given the grid is that, whatever it costs. ``wider`` lowers the log of the mass outside the window.
    """
    steps = max(1, sum(counts))
    budget = tolerance * max(plan.epsilon, 0.1 / plan.slope)
    fixed = step is not None
    # one large loss alone: interpolating delta over a cell of width w costs (slope w)²/8 of it
    widest = math.sqrt(4.0 * budget / plan.slope)
    if step is None:
        step = min(math.sqrt(12.0 * budget / (steps * (1.0 + plan.slope))), 0.5 / (1.0 + plan.slope), 0.02)
    floor = 12.0 * plan.deviation / MAX_SIZE
    tail_mass, head_mass = math.exp(plan.tail), math.exp(plan.head)
    thetas = (plan.theta, plan.slope)
    spacings = [pair.spacing() for pair in pairs]
    spacing = max(spacings)
    if len(pairs) == 1 and spacing > 0.0 and isinstance(pairs[0], DiscretePair):
        step, floor = spacing, 0.0  # the law lies on this grid: there is nothing to approximate
    for _ in range(4):
        step = max(step, floor)
        if spacing > 0.0:  # so that the atoms lie on edges
            step = spacing / max(1, math.floor(spacing / step))
        laws: list[Lattice] = []
        far = plan.cap
        costs = [0.0, 0.0]
        for pair, n, pilot, (lo, hi) in zip(pairs, counts, plan.pilots, plan.spans, strict=True):
            origin = _origin(pair, pilot, step)
            apart = (0.0, 0.0)
            cap = origin + step * float(math.ceil((plan.cap - origin) / step)) if plan.cap < hi else math.inf
            if cap < hi:
                apart = beyond(pair, cap, hi, upper=upper)
                pilot = pair.atoms(np.array([lo, cap]))
            edges = choose_edges(pilot, lo, min(cap, hi), origin, step, thetas, widest, pair.breaks())
            if cap < hi:
                last = round((cap - origin) / step)
                edges = np.append(edges[edges < last], last)
            if upper:
                law = dominating(pair, edges, origin, step, head_mass, tail_mass, apart)
            else:
                law = dominated(pair, edges, origin, step, apart)
            laws.append(law)
            for i, theta in enumerate(thetas):
                costs[i] += n * abs(law.log_mgf(theta) - moments(pilot, theta)[0]) / theta
        cost = costs[0] * plan.share
        if any(law.beyond[0] > 0.0 for law in laws):
            # the grid widens the law: the cap must lie as far above epsilon as that may fall
            down = _reach_down(laws, counts)
            if plan.epsilon + down > plan.cap:
                plan = replace(plan, cap=plan.epsilon + 1.1 * down)
                continue
        if fixed or cost <= budget * 1.05 or step <= floor or not upper:
            break
        step *= min(0.9, max(0.3, math.sqrt(0.85 * budget / cost)))
    # the mass outside the window may cost a fiftieth of the tolerance of B ≈ 1 / (2.5 θ (1 + θ) deviation)
    share = 0.02 * budget * (1.0 + plan.theta) / max(1.0, (1.0 + plan.theta) * plan.deviation)
    wrap = min(27.0, max(8.0, -math.log(min(share, 0.1)) + 1.0)) + wider
    least = None if fewest is None else list(fewest)
    try:
        spectrum = Spectrum(laws, list(counts), plan.theta, upper=upper, fewest=least, wrap=wrap, cap=far)
    except WindowTooLongError as error:
        coarser = 1.1 * step * error.length / MAX_SIZE
        return build(pairs, counts, plan, tolerance, upper=upper, fewest=fewest, step=coarser, wider=wider)
    return spectrum, cost


def refine(pairs: Sequence[Pair], plan: Plan, spectrum: Spectrum, counts: tuple[int, ...], epsilon: float) -> Plan:
    """The plan again, with epsilon and the slope of log delta there as first found."""
    dx = max(1e-3 * epsilon, 2.0 * spectrum.step)
    slope = (spectrum.log_delta(epsilon, counts) - spectrum.log_delta(epsilon + dx, counts)) / dx
    if not (math.isfinite(slope) and slope > 0.0):
        slope = plan.slope
    if math.isfinite(plan.cap):
        return jump_plan(pairs, counts, plan, epsilon=epsilon)
    return replace(plan, epsilon=epsilon, slope=min(max(slope, 0.5 * plan.theta), 30.0 * plan.theta))


@dataclass(frozen=True)
class Chernoff:
    """A quick bound without any transform: delta(ε) ≤ c(θ)·exp(ΣTK(θ) − θε) + P(L = ∞), c(θ) = θ^θ/(1+θ)^{1+θ}.

    Guarantee: K is that of dominating lattice laws, so the bound holds for the pairs.
    """

    theta: float
    log_k: tuple[float, ...]
    infinite: tuple[float, ...]

    def _lost(self, counts: Sequence[int]) -> float:
        if any(p >= 1.0 and n for p, n in zip(self.infinite, counts, strict=True)):
            return 1.0
        return -math.expm1(sum(n * math.log1p(-p) for p, n in zip(self.infinite, counts, strict=True) if n))

    def _scale(self, counts: Sequence[int]) -> float:
        t = self.theta
        total = sum(n * (k + 1e-14 * (1.0 + abs(k))) for n, k in zip(counts, self.log_k, strict=True))
        return total + t * math.log(t) - (1.0 + t) * math.log1p(t)

    def epsilon(self, counts: Sequence[int], log_delta: float) -> float:
        rest = math.exp(log_delta) - self._lost(counts)
        return math.inf if rest <= 0.0 else max(0.0, (self._scale(counts) - math.log(rest)) / self.theta)

    def log_delta(self, counts: Sequence[int], epsilon: float) -> float:
        lost = self._lost(counts)
        value = math.exp(min(0.0, self._scale(counts) - self.theta * epsilon)) + lost
        return min(0.0, math.log(value)) if value > 0.0 else -math.inf


def chernoff(pairs: Sequence[Pair], counts: Sequence[int], plan: Plan) -> Chernoff:
    """The Chernoff bound of this plan, on a grid of 1e-3 of epsilon."""
    steps = max(1, sum(counts))
    step = min(math.sqrt(12e-3 * plan.epsilon / (steps * (1.0 + plan.slope))), 0.5 / (1.0 + plan.slope), 0.02)
    theta = plan.slope
    laws = []
    for pair, pilot, (lo, hi) in zip(pairs, plan.pilots, plan.spans, strict=True):
        origin = _origin(pair, pilot, step)
        edges = choose_edges(pilot, lo, hi, origin, step, (theta,), math.inf, pair.breaks())
        laws.append(dominating(pair, edges, origin, step, math.exp(plan.head), math.exp(plan.tail)))
    return Chernoff(theta, tuple(law.log_mgf(theta) for law in laws), tuple(law.infinite for law in laws))


def solve_epsilon(spectrum: Spectrum, counts: tuple[int, ...], log_delta: float, guess: float) -> float:
    """An epsilon with delta(epsilon) ≤ δ by an upper spectrum, or ≥ δ by a lower one; 0 or inf where there is none.

    Secant steps on log delta, aimed a relative 3e-10 of δ to the safe side; the returned epsilon was itself evaluated.
    """
    side = -1.0 if spectrum.upper else 1.0

    def excess(x: float) -> float:
        return spectrum.log_delta(x, counts) - log_delta

    if spectrum.upper and excess(0.0) <= 0.0:
        return 0.0
    low, high = 0.0, math.inf
    x, slope = max(guess, 1e-12), -spectrum.theta
    previous: tuple[float, float] | None = None
    for _ in range(200):
        value = excess(x)
        if 0.0 <= side * value < 1e-9:
            return x
        if value > 0.0:
            low = max(low, x)
        else:
            high = min(high, x)
        if math.isfinite(high) and high - low <= 1e-12 * high:
            break
        proposal = math.nan
        if math.isfinite(value):
            if previous is not None and (value - previous[1]) * (x - previous[0]) < 0.0:
                slope = (value - previous[1]) / (x - previous[0])
            previous = (x, value)
            proposal = x - (value - side * 3e-10) / slope
        if not low < proposal < high:
            proposal = 2.0 * low + spectrum.step if math.isinf(high) else 0.5 * (low + high)
        x = proposal
        if x > 1e9:
            return math.inf if spectrum.upper else low
    return high if spectrum.upper else low
