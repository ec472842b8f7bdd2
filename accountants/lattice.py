"""Loss laws on a uniform grid: one that dominates the pair, and one that the pair dominates.

Upper (connect the dots; Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022): every atom is split on the two edges of its
cell so that its P-mass and its Q-mass are both kept. In the likelihood ratio R under Q that is a mean-preserving
spread,
and delta(epsilon) = E_Q[(R − e^epsilon)+] is convex in R, so delta can only grow, and does so again under composition.

Lower (after the same paper's optimistic construction): the highest polygon below that convex function with corners on
the
edges. Both bounds are second order in the cell width.

Not every grid point is an edge: cells are narrow where the tilted law has its mass and wide in the tails, which is what
keeps long-tailed steps on fine grids affordable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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

    @property
    def loss(self) -> Array:
        out: Array = self.origin + self.step * self.index.astype(np.float64)
        return out

    def log_mgf(self, t: float) -> float:
        """log E[e^{tL}; L < ∞]."""
        exponent = t * self.loss
        top = float(exponent.max())
        return top + float(np.log(np.dot(self.mass, np.exp(exponent - top))))


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
    """Grid indices of cell edges covering [lo, hi]: about one step apart where the tilted law is dense, wider
    elsewhere.

    A cell of width w and tilted mass f·w adds about f·w·w²/12 to the log moment, so w grows like f^(-1/3), by a factor
    that lets all the wide cells together cost a third of what cells of one step everywhere would; f is the larger of
    the
    densities at the given tilts.
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
    for theta in thetas:
        exponent = theta * loss
        cumulative = np.cumsum(mass * np.exp(exponent - exponent.max()))
        share = np.diff(np.interp(marks, loss, cumulative / cumulative[-1])) / width
        density = np.maximum(density, share)
    density = np.maximum(density, np.maximum(np.roll(density, 1), np.roll(density, -1)))
    density = np.maximum(density, 1e-30 * density.max())
    root = np.cbrt(density)
    scale = step / math.sqrt(3.0 * float(np.dot(root, width)))
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


def dominating(pair: Pair, edges: Ints, origin: float, step: float, head_mass: float, tail_mass: float) -> Lattice:
    """The upper law on ``edges``.

    Guarantee: dominates ``pair``. Mass below the first edge (at most ``head_mass``) is moved up to it, mass above the
    last (at most ``tail_mass``) to infinity, and all rounding of masses and losses is rounded up.
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
    missing = 1.0 - pair.infinite - tail_mass - float(total.sum())
    if missing > 1e-9:  # never expected: a law that lost mass must not pass for one that has it
        total[-1] += missing
    keep = total > 0.0
    return Lattice(origin, step, edges[keep], total[keep], pair.infinite + tail_mass)


def _tangent(gap: float, i: int, points: Array, q: Array, low: Array) -> float:
    """Slope of the tangent to U from ``gap`` below it at edge i, minus U's own there, sign reversed; edge i's units."""
    if gap <= 0.0:
        return 0.0
    best, mass, lag, x_before = -math.inf, 0.0, 0.0, 0.0
    for j in range(i, len(q)):
        weight = float(q[j])
        if weight <= 0.0:
            continue
        lift = float(points[j] - points[i])
        x = math.expm1(lift) + float(low[j]) / weight * math.exp(lift)
        lag += mass * (x - x_before)
        slope = -(gap + lag) / x if x > 0.0 else -math.inf
        if slope < best:
            break
        best, x_before = slope, x
        mass += weight * math.exp(-lift)
    return best if math.isfinite(best) else 0.0


def dominated(pair: Pair, edges: Ints, origin: float, step: float) -> Lattice:
    """The lower law on ``edges``.

    Guarantee: dominated by ``pair``. Mass outside the edges is dropped, all rounding is rounded down.

    Let U(k) = E_Q(R − k)+, with every cell merged into one atom (data processing: U can only fall). From left to right
    this draws a high polygon V ≤ U with corners on edges only: it leaves each edge along the tangent to U that passes
    through it. Tangents to a convex function stay below it and get flatter, so V is convex, below U, and the call
    function
    of a law on the edges that is smaller in convex order; where V would fall below zero (far tail) the mass that is
    left is put on the last edge
    before, which lowers V by a constant. Only local quantities occur: D, the gap U − V at an edge, and a, the
    difference of
    the two slopes in units of the edge's R, so that nothing cancels.
    """
    points: Array = origin + step * edges.astype(np.float64)
    atoms = pair.atoms(points)
    n = len(edges) - 1
    mass = atoms.mass * (1.0 - atoms.mass_error)
    loss = atoms.loss - atoms.loss_error - 4.0 * U * (np.abs(atoms.loss) + abs(origin))
    pinned: Array = np.zeros(n + 1)
    bulk = np.abs(loss - origin) < 0.5 * step
    if not pair.breaks() and float(mass[bulk].sum()) > 0.3:
        # a bulk narrower than the grid is merged into one atom, and the grid moved to where that lies
        weight = float(mass[bulk].sum())
        mean = origin - math.log(float(np.dot(mass[bulk], np.exp(origin - loss[bulk]))) / weight)
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
    pinned = np.bincount(cell[pin], weights=lowered, minlength=n + 1).astype(np.float64)
    mass, loss, cell = mass[~pin], loss[~pin], cell[~pin]
    width = np.expm1(np.diff(points))
    # Q-masses and first moments per cell, all in units of the left edge's R
    q: Array = np.bincount(cell, weights=mass * np.exp(points[cell] - loss), minlength=n).astype(np.float64)
    low: Array = np.bincount(cell, weights=mass * -np.expm1(points[cell] - loss), minlength=n).astype(np.float64)
    high: Array = np.bincount(cell, weights=mass * np.expm1(points[cell + 1] - loss), minlength=n).astype(np.float64)
    # U at the edges: call[i] = call[i + 1] + S_{i+1} (r_{i+1} − r_i) + low[i], S in units of r_i
    slack = _slack(np.append(cell, 0))
    growth = np.exp(np.diff(points))
    out = np.zeros(n + 1)
    above = np.zeros(n + 1)
    call = np.zeros(n + 1)
    s = u = 0.0
    for i in range(n - 1, -1, -1):
        s /= float(growth[i])
        u += s * float(width[i]) + float(low[i])
        s += float(q[i])
        above[i], call[i] = s, u
    gap, slope, carried = (
        0.0,
        0.0,
        0.0,
    )  # carried: V's slope left of the edge minus U's right of it, in this edge's units
    tight = 1.0 - 4.0 * slack
    for i in range(n):
        if gap > call[i]:
            break
        slope = _tangent(gap, i, points, q, low) * tight
        out[i] = carried - slope
        gap = max(gap + slope * float(width[i]) + float(high[i]), 0.0)
        carried = (slope + float(q[i])) * float(growth[i])
        last = i
    # everything that is left goes on the edge after the last line drawn from
    stop = last + 1
    out[stop] = carried + (above[stop] if stop < n else 0.0)
    if gap > call[stop]:  # V is below zero there already: stop one edge earlier
        out[stop] = 0.0
        out[last] += slope + above[last]
    out = (np.maximum(out, 0.0) + pinned) * (1.0 - 8.0 * slack)
    keep = out > 0.0
    return Lattice(origin, step, edges[keep], out[keep], pair.infinite)
