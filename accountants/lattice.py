"""Loss laws on a uniform grid: one that dominates the pair, and one that the pair dominates.

Upper (connect the dots; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022): every atom is split on the two edges of its
cell so that its P-mass and its Q-mass are both kept. In the likelihood ratio R under Q that is a mean-preserving
spread, and delta(epsilon) = E_Q[(R − e^epsilon)+] is convex in R, so delta can only grow, and does so again under
composition.

Lower: a polygon below that convex function with corners on the edges. Both bounds are second order in the cell width.

Not every grid point is an edge: cells are narrow where the tilted law has its mass and wide in the tails, which is what
keeps long-tailed steps on fine grids affordable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .numeric import dot
from .pairs import Array, Atoms, Ints, Pair, U

MAX_CELLS = 40_000


@dataclass(frozen=True)
class Lattice:
    """A discrete loss law: P-mass ``mass`` at the losses ``origin + step · index``, and ``infinite`` at infinity."""

    origin: float
    step: float
    index: Ints
    mass: Array
    infinite: float
    beyond: tuple[float, float] = (0.0, 0.0)
    """(Q-mass, P-mass − Q-mass) of losses that were left out: see `beyond`."""

    @property
    def loss(self) -> Array:
        out: Array = self.origin + self.step * self.index.astype(np.float64)
        return out

    def log_mgf(self, t: float) -> float:
        """log E[e^{tL}; L < ∞]."""
        exponent = t * self.loss
        top = float(exponent.max())
        return top + float(np.log(dot(self.mass, np.exp(exponent - top))))


def choose_edges(
    pilot: Atoms,
    lo: float,
    hi: float,
    origin: float,
    step: float,
    thetas: Sequence[float],
    widest: float,
    breaks: Sequence[float] = (),
) -> Ints:
    """Grid indices of cell edges covering [lo, hi]: a step apart where the tilted law is dense, wider elsewhere.

    A cell of width w and tilted mass f·w adds about f·w·w²/12 to the log moment, so w grows like f^(-1/3), by a factor
    that lets all the wide cells together cost a third of what cells of one step everywhere would; f is the larger of
    the densities at the given tilts.
    """
    first = math.floor((lo - origin) / step) - 1
    last = math.ceil((hi - origin) / step) + 1
    order = np.argsort(pilot.loss)
    loss, mass = pilot.loss[order], pilot.mass[order]
    inner = loss[:: max(1, len(loss) // 800)]
    marks = np.sort(np.concatenate([np.linspace(lo, hi, 400), inner, [origin - step, origin, origin + step]]))
    marks = marks[np.concatenate([[True], np.diff(marks) > 1e-14 * (1.0 + np.abs(marks[1:]))])]
    width = np.diff(marks)
    density = np.full(len(width), 1e-300)
    with np.errstate(divide="ignore"):
        log_mass = np.log(mass)
    for theta in thetas:
        power = theta * loss + log_mass
        cumulative = np.cumsum(np.exp(power - power.max()))
        share = np.diff(np.interp(marks, loss, cumulative / cumulative[-1])) / width
        density = np.maximum(density, share)
    density = np.maximum(density, np.maximum(np.roll(density, 1), np.roll(density, -1)))
    density = np.maximum(density, 1e-30 * density.max())
    root = np.cbrt(density)
    scale = step / math.sqrt(3.0 * float(dot(root, width)))
    want = np.maximum(step, np.minimum(scale / root, min(widest, 0.25 / (1.0 + max(thetas)))))
    want *= max(1.0, float(np.sum(width / want)) / MAX_CELLS)  # looser, never wrong
    count = np.concatenate([[0.0], np.cumsum(width / want)])
    positions = np.interp(np.arange(0.0, math.ceil(count[-1]) + 1.0), count, marks)
    grid = np.rint((positions - origin) / step).astype(np.int64)
    pins = np.floor((np.asarray(breaks, dtype=float) - origin) / step).astype(np.int64)
    edges: Ints = np.unique(np.concatenate([[first, last, 0], np.clip(grid, first, last), pins, pins + 1]))
    return edges


def _collect(size: int, *parts: tuple[Ints, Array]) -> Array:
    """Sum masses into bins. Positive terms: relative error at most (terms per bin)·u, added by the caller's slack."""
    index = np.concatenate([part[0] for part in parts])
    mass = np.concatenate([part[1] for part in parts])
    out: Array = np.bincount(index, weights=mass, minlength=size).astype(np.float64)
    return out


def _slack(cell: Ints) -> float:
    """A bound on the relative error of sums into bins."""
    most = int(np.bincount(cell).max(initial=1))
    return (4.0 * most + 8.0) * U


def beyond(pair: Pair, low: float, high: float, *, upper: bool) -> tuple[float, float]:
    """(Q-mass, P-mass − Q-mass) of the losses from ``low`` to ``high``: the first rounded down and the second up, or,
    for a lower bound, the other way round."""
    atoms = pair.atoms(np.array([low, high]))
    sign = 1.0 if upper else -1.0
    loss = atoms.loss + sign * (atoms.loss_error + 4.0 * U * np.abs(atoms.loss))
    mass = atoms.mass * (1.0 + sign * atoms.mass_error)
    # the two sides of ``low`` may overlap by a rounding of it
    gain = float(dot(mass, -np.expm1(-loss))) * (1.0 + sign * 1e-10)
    return float(dot(atoms.mass, np.exp(-atoms.loss))) * (1.0 - sign * 1e-10), gain


def dominating(
    pair: Pair,
    edges: Ints,
    origin: float,
    step: float,
    head_mass: float,
    tail_mass: float,
    apart: tuple[float, float] = (0.0, 0.0),
) -> Lattice:
    """The upper law on ``edges``.

    Guarantee: dominates ``pair``, together with what is ``apart`` (see `beyond`). Mass below the first edge (at most
    ``head_mass``) is moved up to it, mass above the last (at most ``tail_mass``) to infinity, and all rounding of
    masses and losses is rounded up.
    """
    points: Array = origin + step * edges.astype(np.float64)
    atoms = pair.atoms(points)
    loss = atoms.loss + atoms.loss_error + 4.0 * U * (np.abs(atoms.loss) + abs(origin))
    cell = np.clip(np.searchsorted(points, loss, side="right") - 1, 0, len(points) - 2)
    left = points[cell]
    share = np.clip(np.expm1(np.minimum(left - loss, 0.0)) / np.expm1(left - points[cell + 1]), 0.0, 1.0)
    mass = atoms.mass * (1.0 + atoms.mass_error)
    up = mass * share
    total = _collect(len(edges), (cell, mass - up), (cell + 1, up)) * (1.0 + _slack(cell))
    total[0] += head_mass
    missing = 1.0 - pair.infinite - tail_mass - sum(apart) - float(total.sum())
    if missing > 1e-9:  # never expected: a law that lost mass must not pass for one that has it
        total[-1] += missing
    keep = total > 1e-280  # denormal numbers are slow
    dropped = 0.0 if keep.all() else 1e-275
    return Lattice(origin, step, edges[keep], total[keep], pair.infinite + tail_mass + dropped, apart)


def _cell_sums(mass: Array, loss: Array, cell: Ints, points: Array) -> tuple[Array, Array, Array]:
    """For every cell [r, r'] of R: Q-mass times r, E_Q(R − r) and E_Q(r' − R)."""
    n = len(points) - 1
    lift = loss - points[cell]
    q: Array = np.bincount(cell, weights=mass * np.exp(-lift), minlength=n).astype(np.float64)
    low: Array = np.bincount(cell, weights=mass * -np.expm1(-lift), minlength=n).astype(np.float64)
    high: Array = np.bincount(cell, weights=mass * np.expm1(points[cell + 1] - loss), minlength=n).astype(np.float64)
    return q, low, high


def _log_tails(q: Array, low: Array, high: Array, points: Array) -> tuple[Array, Array]:
    """log E_Q(R − r)+ and log E_Q(r − R)+ at every edge r, to within 1e-9."""
    with np.errstate(divide="ignore"):
        mass, width = np.log(q) - points[:-1], points[:-1] + np.log(np.expm1(np.diff(points)))
        above = np.append(np.logaddexp.accumulate(mass[::-1])[-2::-1], -math.inf)  # log Q(R > r')
        below = np.append(-math.inf, np.logaddexp.accumulate(mass)[:-1])  # log Q(R < r)
        # from one edge to the next: all that lies beyond times the width, plus the cell's own share
        calls = np.logaddexp.accumulate(np.logaddexp(above + width, np.log(low))[::-1])[::-1]
        puts = np.logaddexp.accumulate(np.logaddexp(below + width, np.log(high)))
    return np.append(calls, -math.inf), np.append(-math.inf, puts)


def _call(i: int, q: Array, low: Array, points: Array) -> float:
    """E_Q(R − r)+ at edge i, to within 32 roundings."""
    return math.fsum(low[i:] - q[i:] * np.expm1(points[i] - points[i:-1]))


def _put(i: int, q: Array, high: Array, points: Array) -> float:
    """E_Q(r − R)+ at edge i, to within 32 roundings."""
    right = points[1 : i + 1]
    return math.fsum(high[:i] + q[:i] * np.exp(right - points[:i]) * np.expm1(points[i] - right))


def _skip_corners(out: Array, points: Array) -> None:
    """Make a polygon convex, in place: a corner of negative mass is skipped, its mass split on its neighbours."""
    before = np.arange(-1, len(out) - 1)
    after = np.arange(1, len(out) + 1)
    todo = list(np.flatnonzero(out < 0.0)[::-1])
    last = len(out) - 1
    while todo:
        i = int(todo.pop())
        mass = float(out[i])
        if mass >= 0.0:
            continue
        a, b = int(before[i]), int(after[i])
        out[i] = 0.0
        if a >= 0 and b <= last:
            x, y = float(points[i] - points[a]), float(points[b] - points[i])
            up = mass * math.expm1(-x) / math.expm1(-x - y)
            out[a] += (mass - up) * (1.0 + 8.0 * U)
            out[b] += up * (1.0 + 8.0 * U)
            after[a], before[b] = b, a
            todo += [j for j in (a, b) if out[j] < 0.0]
        elif b <= last:  # the first corner: what is taken further right lowers more
            out[b] += mass * math.exp(float(points[b] - points[i]))
            before[b] = -1
            todo += [b] if out[b] < 0.0 else []
        elif a >= 0:  # the last corner: negative by rounding only
            out[a] += 2.0 * mass * math.exp(float(points[a] - points[i]))
            last, after[a] = a, len(out)
            todo += [a] if out[a] < 0.0 else []


def _floored(q: Array, low: Array, points: Array) -> Array:
    """Masses of the crudest law: all of Q on the edge below its mean of R."""
    out = np.zeros(len(points))
    with np.errstate(divide="ignore"):
        log_q = float(np.logaddexp.reduce(np.log(q) - points[:-1]))
    if math.isfinite(log_q):
        mean = math.log(float(np.sum(q + low))) - log_q
        i = max(0, int(np.searchsorted(points, mean - 1e-8)) - 1)
        out[i] = math.exp(log_q + float(points[i]) - 1e-8)
    return out


def _below(q: Array, low: Array, high: Array, pinned: Array, points: Array, slack: float) -> Array:
    """Masses of the polygon V of `dominated`; to be lowered by the relative rounding ``slack`` once more."""
    n = len(q)
    width = np.expm1(np.diff(points))
    full = width / (1.0 + width)
    told = q * width > 1e-290  # of less the place is not known: at the left edge, which costs most
    share = np.divide(low, q * width, out=np.zeros(n), where=told)
    rest = np.divide(high, q * width, out=np.ones(n), where=told)
    g = low * rest * (1.0 + slack)
    q_all, high_all = q + pinned[:-1], high + pinned[:-1] * width
    log_calls, log_puts = _log_tails(q_all, low, high_all, points)
    calls, puts = np.exp(np.minimum(log_calls, 700.0)), np.exp(np.minimum(log_puts, 700.0))
    halves = g / (rest**2 + share**2)
    left, right = halves * rest, halves * share
    # no more than a quarter of the tail beyond is taken from it; the near edge bears the rest
    upper = log_calls[1:] < log_puts[1:]
    capped = np.where(upper, np.minimum(right, 0.25 * calls[1:]), right)
    left = np.where(capped < right, (g - share * capped) / rest * (1.0 + slack), left)
    right = capped
    capped = np.where(upper, left, np.minimum(left, 0.25 * puts[:-1]))
    right = np.where(capped < left, (g - rest * capped) / np.maximum(share, 1e-300) * (1.0 + slack), right)
    d = np.append(capped, 0.0)
    d[1:] = np.maximum(d[1:], right)
    with np.errstate(divide="ignore"):
        log_d = np.log(d)
    over, short = np.flatnonzero(log_d > log_puts - 1e-8), np.flatnonzero(log_d > log_calls - 1e-8)
    start, stop = int(over[-1]) if len(over) else 0, int(short[0]) if len(short) else n
    if stop - start < 2:
        return _floored(q_all, low, points)
    # V is on the line E_Q(R) − k up to ``start``, and zero from ``stop`` on; there the next edge must make up for d
    put, call = _put(start, q_all, high_all, points), _call(stop, q_all, low, points)
    if len(over) and share[start] > 0.0:
        moved = (g[start] - rest[start] * put * (1.0 - 2.0 * slack)) / share[start]
        if moved < 0.5 * math.exp(float(log_calls[start + 1])):
            d[start], d[start + 1] = put, max(d[start + 1], moved)
        # else E_Q(R) falls by d − put at ``start``: the line is that much lower
    if len(short):
        d[stop - 1] = max(d[stop - 1], (g[stop - 1] - share[stop - 1] * call * (1.0 - 2.0 * slack)) / rest[stop - 1])
        d[stop] = call * (1.0 + slack)
    out = np.append(high / width, 0.0)
    out[1:] += low / full
    out = (out + pinned) * (1.0 - slack)
    doubt = 8.0 * U * (d[1:] + d[:-1])
    out[:-1] -= (d[1:] - d[:-1] + doubt) / width
    out[1:] += (d[1:] - d[:-1] - doubt) / full
    if len(over):
        next_put = _put(start + 1, q_all, high_all, points) * (1.0 - slack)
        lowered = max(0.0, d[start] - put * (1.0 + slack))
        out[start], out[:start] = (next_put - d[start + 1] + lowered) / width[start], 0.0
    if len(short):
        next_call = _call(stop - 1, q_all, low, points) * (1.0 - slack)
        out[stop], out[stop + 1 :] = (next_call - d[stop - 1]) / full[stop - 1], 0.0
    _skip_corners(out[start : stop + 1], points[start : stop + 1])
    return np.maximum(out, 0.0)


def dominated(pair: Pair, edges: Ints, origin: float, step: float, apart: tuple[float, float] = (0.0, 0.0)) -> Lattice:
    """The lower law on ``edges``.

    Guarantee: dominated by ``pair``. Mass outside the edges is dropped, all rounding is rounded down.

    Let U(k) = E_Q(R − k)+, with every cell merged into one atom (data processing: U can only fall). A law on the edges
    whose call function V stays below U is dominated. Connecting the dots of U, as in `dominating`, overshoots it at the
    atom c of a cell [r, r'] by g = (Q-mass)·(c − r)(r' − c)/(r' − r). So V is the polygon through U − d, where d lowers
    the line over every cell by at least g at c: with c = (1 − λ)r + λr', d ≥ g(1 − λ)/((1 − λ)² + λ²) at r and
    d ≥ gλ/((1 − λ)² + λ²) at r'. An atom close to one edge then costs the other edge next to nothing. A corner of V
    that is not convex is skipped, which lowers V. In the tails, where d is more than U lies above its asymptotes, V is
    on the asymptote. The masses of V are the connected dots' minus second differences of d; no difference of values of
    U is ever taken. Atoms on edges (``pinned``), and a bulk narrower than the grid, need no d at all.
    """
    points: Array = origin + step * edges.astype(np.float64)
    atoms = pair.atoms(points)
    n = len(edges) - 1
    mass = atoms.mass * (1.0 - atoms.mass_error)
    loss = atoms.loss - atoms.loss_error - 4.0 * U * (np.abs(atoms.loss) + abs(origin))
    bulk = np.abs(loss - origin) < 0.5 * step
    if not pair.breaks() and float(mass[bulk].sum()) > 0.3:
        # merge it into one atom, and move the grid to where that lies
        weight = float(mass[bulk].sum())
        mean = origin - math.log(float(dot(mass[bulk], np.exp(origin - loss[bulk]))) / weight)
        mean -= 8.0 * U * (abs(mean) + bulk.sum() * step)
        points, origin = points + (mean - origin), mean
        mass, loss = np.append(mass[~bulk], weight * (1.0 - bulk.sum() * U)), np.append(loss[~bulk], mean)
    # atoms lie on edges: put the edges a hair below them and move them down, instead of merging them with others
    points, origin = points - 1e-9 * step, origin - 1e-9 * step
    cell = np.searchsorted(points, loss, side="right") - 1
    inside = (cell >= 0) & (cell < n)
    mass, loss, cell = mass[inside], loss[inside], cell[inside]
    pin = loss - points[cell] < 3e-9 * step
    lowered = mass[pin] * np.exp(points[cell[pin]] - loss[pin])
    pinned: Array = np.bincount(cell[pin], weights=lowered, minlength=n + 1).astype(np.float64)
    mass, loss, cell = mass[~pin], loss[~pin], cell[~pin]
    slack = _slack(np.append(cell, 0)) + 64.0 * U
    q, low, high = _cell_sums(mass, loss, cell, points)
    out = _below(q, low, high, pinned, points, slack) * (1.0 - slack)
    keep = out > 1e-280
    return Lattice(origin, step, edges[keep], out[keep], pair.infinite, apart)
