"""Composition of lattice laws: one tilted Fourier transform, with every error of it inside a stated bound.

The law of one step is tilted, w_j = p_j e^{θ l_j − K(θ)}, so that the composed law has its bulk where epsilon is; then

    delta(ε) = e^{ΣTK − θε} · B + P(L = ∞),    B = Σ_{L > ε} r(L) (e^{−θ(L−ε)} − e^{−(1+θ)(L−ε)}),

with r = w^{*T} the composed tilted law. B is a sum over an N-periodic index and is taken in the Fourier domain
(Parseval): B = (1/N) Σ_k conj(W_k) Π_i F_ik^{T_i}, with W the transform of the payoff in closed form, written without a
difference of its two geometric series. The powers of F die out after a few hundred frequencies, so one spectrum answers
any epsilon, and any number of steps, in a fraction of a millisecond.

What is bounded, u = 2^-53 (one rounding):

Wrap-around and window. The index is periodic with period N, the window is [j0, j0 + N). Mass of r outside it is read at
a wrong place, where the payoff is at most c = θ^θ/(1+θ)^{1+θ} ≤ 1, just as its own is. Chernoff at θ ± t on the lattice
law itself bounds that mass by τ, so the error is at most c·τ.

FFT round-off. In a Cooley-Tukey transform of length N = Π radices, every output is a sum over the inputs of products
along one path through the stages. A computed complex product is xy(1 + e) with |e| ≤ √5 u (Brent, Percival, Zimmermann
2007), a stored root of unity has relative error ≤ u (rounded from extended accuracy), a computed sum is (x + y)(1 + e),
|e| ≤ u, and its e goes to both terms. So the computed output is Σ_j x_j ω^{jk} Π(1 + e_j), with, per stage of radix 2,
one sum, one product and one root: |e| ≤ (1 + √5 + 1)u(1 + O(u)) < 5u; of radix 4, two sums and one product and root,
< 6u ≤ 2·5u; of radix 3 and 5 the inner sums have two and four terms and one constant factor in real arithmetic, in
either half of a real pair: < (2 + 2 + √5 + 1)u < 8u ≤ log2(3)·8u and < (4 + 2 + √5 + 1)u < 10u ≤ log2(5)·8u. Whatever
the mix of radices 2 to 5, hence, with ‖x‖₁ = Σ|x_j| and one stage more for whatever recombines a real transform,

    |F̂_k − F_k| ≤ e_F = 8u · (log2(N) + 1) · (1 + 1e-10) · ‖x‖₁      for every k.

N is chosen 5-smooth: for other lengths pocketfft, which numpy uses, takes generic radices or Bluestein's convolution,
and neither is covered. The bound is in the 1-norm, so it holds for each frequency and not only on average; it is some
fifty times what is seen.

Powers. Ĝ = exp(ΣT_i log F̂_i) has relative error at most expm1(ΣT_i e_i + 4u(1 + |log Ĝ|)), where
e_i = e_F/(|F̂_i| − e_F) + 4u(1 + |log F̂_i|) is the error of log F̂_i. Where F̂_i < 2 e_F, F_i is at most 3 e_F: e_F is
put in its place and e_i = 100 stands for "anything up to e^100 times that". Where few frequencies count, 1 − F is
summed directly instead (`_direct`): its error is a few roundings of 1 − F itself, about 1/T, so that the error of the
power does not grow with T.

Weights, sums. The closed forms have relative error ≤ 32u each; the phases are reduced in exact integers; a sum of K
terms by numpy's pairwise rule errs by at most (log2 K + 128)u of the sum of moduli. Dropped frequencies are bounded by
their moduli.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lattice import Lattice
from .numeric import dot, smooth_length
from .pairs import Array, Atoms, Ints, U

Complex = NDArray[np.complex128]
MAX_LENGTH = 1 << 23


@dataclass(frozen=True)
class _Kept:
    """The frequencies that count for one set of step counts."""

    near: Complex
    """G_k conj(D1_k − D2_k): rotate by the index of the first loss above epsilon."""
    far: Complex
    """G_k conj(D2_k)."""
    edge_near: float
    edge_far: float
    start: int
    base: float
    """Loss at index 0."""
    log_scale: float
    """ΣTK."""
    slip_near: float
    """Errors of sums over ``near`` and ``far``, and what the mass outside the window may add."""
    slip_far: float
    outside: float
    infinite: float
    apart: tuple[float, float]
    """Σ T log(1 − Q_i), Σ T log(1 − D_i/(1 − Q_i)): see `Spectrum.apart`."""


def lower_orders(laws: Sequence[Atoms | Lattice], counts: Sequence[int]) -> list[float]:
    """Some t for Chernoff bounds on the composed loss from below: from one standard deviation to the very end."""
    squares = [float(dot(law.mass * np.exp(-law.loss), law.loss**2)) for law in laws]
    spread = sum(n * square for n, square in zip(counts, squares, strict=True))
    lowest = min(float(law.loss.min()) for law in laws)
    if lowest >= 0.0:
        return []
    last = -500.0 / lowest
    first = min(last, 0.5 / math.sqrt(max(spread, 1e-300)))
    return [float(t) for t in np.geomspace(first, last, 10 if last < 1e3 * first else 16)]


class WindowTooLongError(ValueError):
    """The composed law spans ``length`` grid steps, more than memory allows: another attempt needs a coarser grid."""

    def __init__(self, length: float) -> None:
        super().__init__(f"a window of {length:.3g} steps")
        self.length = length


class Spectrum:
    """The composition of lattice laws for any step counts between ``fewest`` and ``counts``.

    Args:
        laws: one lattice law per kind of step, all of the same grid step.
        counts: the largest number of times each will be run.
        theta: the tilt, > 0.
        upper: whether errors are to be rounded up or down.
        fewest: the smallest number of times each will be run; fewer runs need more frequencies.
        wrap: −log of the tilted mass that may lie outside the window, on either side.
        cap: the loss beyond which what the laws left out begins (`Lattice.beyond`).
    """

    def __init__(
        self,
        laws: list[Lattice],
        counts: list[int],
        theta: float,
        *,
        upper: bool,
        fewest: list[int] | None = None,
        wrap: float = 21.0,
        cap: float = math.inf,
    ) -> None:
        self.wrap, self.cap = wrap, cap
        self._fade = min(42.0, wrap + 5.0)  # what is dropped of the transform weighs less than what wraps around
        self._low: list[tuple[float, list[float]]] | None = None
        self.laws, self.counts, self.theta, self.upper = laws, tuple(counts), theta, upper
        self.fewest = tuple(counts if fewest is None else fewest)
        self.step = laws[0].step
        self._log_k = [law.log_mgf(theta) for law in laws]
        self._tilted: list[Array] = []
        self._means: list[float] = []
        variance = 0.0
        for law, log_k, n in zip(laws, self._log_k, counts, strict=True):
            exponent = theta * law.loss - log_k
            wiggle = 4.0 * U * (np.abs(exponent) + abs(log_k) + 4.0)
            weight = law.mass * np.exp(exponent) * (1.0 + wiggle if upper else 1.0 - wiggle)
            mean = float(dot(weight, law.loss))
            # denormal numbers would slow every sum down: what is dropped here is part of `outside`
            weight = np.where(weight < 1e-250, 0.0, weight)
            self._tilted.append(weight)
            self._means.append(mean)
            variance += n * float(dot(weight, (law.loss - mean) ** 2))
        self.deviation = math.sqrt(variance)
        self._excess = self._chernoff_table()
        left, right = self._reach(self.counts)
        length = max(64.0, (right + left) / self.step + 4.0)
        if length > MAX_LENGTH:
            raise WindowTooLongError(length)
        self.size = smooth_length(math.ceil(length))
        self._shifts: list[int] = []
        self._noise: list[float] = []
        spectra: list[Complex] = []
        for law, weight, mean in zip(laws, self._tilted, self._means, strict=True):
            shift = round((mean - law.origin) / self.step)
            self._shifts.append(shift)
            wrapped = np.bincount((law.index - shift) % self.size, weights=weight, minlength=self.size)
            spectra.append(np.fft.rfft(wrapped))
            self._noise.append(8.0 * U * (math.log2(self.size) + 1.0) * float(weight.sum()) * (1.0 + 1e-10))
        self._k, self._rest = self._alive(spectra)
        self._logs: list[Complex] = []
        self._doubts: list[Array] = []
        for law, weight, shift, f, noise in zip(laws, self._tilted, self._shifts, spectra, self._noise, strict=True):
            plain = sum(counts) * noise < 1e-9  # the fast transform's error is no matter
            direct = None if plain else self._direct(law.index - shift, weight)
            log_f, doubt = direct or self._transformed(f[self._k], noise)
            self._logs.append(log_f)
            self._doubts.append(doubt)
        angle = 2.0 * math.pi * self._k / self.size
        near, self._far = self._geometric(theta, angle), self._geometric(1.0 + theta, angle)
        turned = np.exp(-(theta * self.step + 1j * angle))
        self._near = -math.expm1(-self.step) * turned * near * self._far  # D1 − D2, without taking the difference
        self._double = np.where((self._k == 0) | (2 * self._k == self.size), 1.0, 2.0) / self.size
        self._kept: dict[tuple[int, ...], _Kept] = {}

    def _alive(self, spectra: list[Complex]) -> tuple[Ints, float]:
        """The frequencies whose power at the fewest steps exceeds e^-fade, and a bound on all others' share in B.

        For the others G ≤ e^-fade (1 + e_F/|F|)^T, and |1 − ρ e^{−iφ}| ≥ sin(φ/2) ≥ φ/π for 0 ≤ ρ ≤ 1, φ ≤ π, so that
        their share in a sum against D1, or D2, is at most (2/N) Σ_k |G_k| π/φ_k ≤ max|G| (1 + log N).
        """
        if len(spectra) == 1:
            n = max(self.fewest[0], 1)
            f = spectra[0]
            power = f.real**2 + f.imag**2
            alive = power > math.exp(-2.0 * self._fade / n)
            ceiling = n * math.log(math.exp(-self._fade / n) + self._noise[0])
        else:
            total = np.zeros(len(spectra[0]))
            blur = 0.0
            for n, f, noise in zip(self.fewest, spectra, self._noise, strict=True):
                if n:
                    size = np.sqrt(f.real**2 + f.imag**2)
                    total += n * np.log(size + noise)
                    blur += n * noise
            alive = total > -self._fade
            ceiling = -self._fade
        alive[0] = True
        if alive.all():
            return np.flatnonzero(alive), 0.0
        return np.flatnonzero(alive), math.exp(ceiling) * (1.0 + math.log(self.size)) * (1.0 + 1e-9)

    def _transformed(self, f: Complex, noise: float) -> tuple[Complex, Array]:
        """log F and a bound on its error, from the fast transform."""
        size = np.abs(f)
        log_f: Complex = np.log(np.where(size > 2.0 * noise, f, 1.0)) + np.where(
            size > 2.0 * noise, 0.0, math.log(noise)
        )
        # where F is lost in e_F it is taken as e_F, and G as unknown up to a factor e^100
        doubt = np.where(size > 2.0 * noise, noise / np.maximum(size - noise, 1e-300), 100.0)
        return log_f, doubt + 4.0 * U * (1.0 + np.abs(log_f))

    def _direct(self, index: Ints, weight: Array) -> tuple[Complex, Array] | None:
        """log F and a bound on its error by plain sums of 1 − F, where those are few; None where they are not.

        1 − F = Σ w (1 − e^{−iφ}) is of the order of 1/T where it counts, and known to a relative rounding or so: then
        the error of F^T no longer grows with T.
        """
        if len(self._k) * len(index) > 3_000_000:
            return None
        total = math.fsum(weight)
        phase = (self._k[:, None] * (index % self.size)[None, :]) % self.size
        phase = np.where(2 * phase > self.size, phase - self.size, phase)
        half = (math.pi / self.size) * phase
        sine = np.sin(half)
        missing = (2.0 * sine * sine) @ weight + 1j * ((2.0 * sine * np.cos(half)) @ weight)
        # a sum of n products errs by at most n u of the sum of moduli; each factor by a few roundings
        slip = (len(index) + 16.0) * U * 2.0 * (np.abs(sine) @ weight)
        if float(slip.max()) > 1e-3 or float(np.abs(missing).max()) > 0.9:
            return None
        log_f: Complex = math.log(total) + np.log1p(-missing / total)
        return log_f, 1.01 * slip / np.abs(total - missing) + 8.0 * U * np.abs(log_f) + 4.0 * U

    def _chernoff_table(self) -> list[tuple[float, list[float]]]:
        scale = max(self.deviation, self.step)
        guess = math.sqrt(2.0 * self.wrap)
        table = []
        for size in (0.02, 0.06, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05, 1.3):
            for sign in (-1.0, 1.0):
                t = sign * size * guess / scale
                table.append((t, self._moment(t)))
        return table

    def _moment(self, t: float) -> list[float]:
        """log of the tilted law's E[e^{t(L − mean)}] for each law, rounded up."""
        out = []
        for law, weight, mean in zip(self.laws, self._tilted, self._means, strict=True):
            exponent = t * (law.loss - mean)
            top = float(exponent.max())
            if top > 600.0:
                with np.errstate(divide="ignore"):
                    power = exponent + np.log(weight)
                top = float(power.max())
                out.append(top + math.log(float(np.exp(power - top).sum())) + 1e-12)
            else:  # keep the digits of a small moment: E[e^x − 1 − x], and E[x] is rounding only
                small = float(dot(weight, np.expm1(exponent) - exponent))
                out.append(math.log1p(small * (1.0 + 1e-12)) + 1e-14 * (1.0 + abs(t) * float(np.abs(law.loss).max())))
        return out

    def _reach(self, counts: tuple[int, ...]) -> tuple[float, float]:
        """Distances left and right of the mean beyond which the tilted mass is at most e^-wrap each."""
        best = [math.inf, math.inf]
        for t, moments in self._excess:
            total = sum(n * m for n, m in zip(counts, moments, strict=True))
            side = 1 if t > 0 else 0
            best[side] = min(best[side], (total + self.wrap) / abs(t))
        return best[0], best[1]

    def fits(self, counts: tuple[int, ...]) -> bool:
        """Whether these step counts can be answered from this spectrum."""
        return all(a <= n <= b for a, n, b in zip(self.fewest, counts, self.counts, strict=True))

    def _prepare(self, counts: tuple[int, ...]) -> _Kept:
        if counts in self._kept:
            return self._kept[counts]
        n, h, theta, k = self.size, self.step, self.theta, self._k
        left, right = self._reach(counts)
        mean = sum(c * m for c, m in zip(counts, self._means, strict=True))
        base = sum(c * (law.origin + s * h) for c, law, s in zip(counts, self.laws, self._shifts, strict=True))
        spare = n * h - (left + right)
        start = math.floor((mean - left - 0.5 * max(spare, 0.0) - base) / h)
        outside = 2.0 * math.exp(-self.wrap) + 1e-230 * sum(counts) if spare > 0.0 else 1.0
        log_g = np.zeros(len(k), dtype=np.complex128)
        doubt = np.zeros(len(k))
        for c, log_f, slip_f in zip(counts, self._logs, self._doubts, strict=True):
            if c:
                log_g += c * log_f
                doubt += c * slip_f
        g = np.exp(log_g)
        size = np.abs(g)
        doubt += 4.0 * U * (1.0 + np.abs(log_g))
        slip = size * np.expm1(np.minimum(doubt, 100.0))
        slip += (size + slip) * (192.0 + math.log2(len(k) + 1)) * U
        slip *= self._double * (1.0 + 1e-9)
        ratio = math.expm1(-h) / math.expm1(-(1.0 + theta) * h)  # |D1 − D2| ≤ ratio·|D1|
        largest = math.exp(theta * math.log(theta) - (1.0 + theta) * math.log1p(theta))
        turn = np.exp(2j * math.pi / n * ((k * ((start + n) % n)) % n))
        near: Complex = (self._double * g * np.conj(self._near)).astype(np.complex128)
        far: Complex = (self._double * g * np.conj(self._far)).astype(np.complex128)
        survive = 0.0
        for c, law in zip(counts, self.laws, strict=True):
            if c:
                survive += c * math.log1p(-law.infinite) if law.infinite < 1.0 else -math.inf
        sign = 1.0 if self.upper else -1.0
        scale = sum(c * (v + sign * 8.0 * U * (abs(v) + 1.0)) for c, v in zip(counts, self._log_k, strict=True))
        for c, law, s in zip(counts, self.laws, self._shifts, strict=True):  # the rounding of `base`
            scale += sign * (1.0 + theta) * 8.0 * U * c * (abs(law.origin) + abs(s) * h)
        kept = _Kept(
            near=near,
            far=far,
            edge_near=float(np.sum((near * turn).real)),
            edge_far=float(np.sum((far * turn).real)),
            start=start,
            base=base,
            log_scale=scale,
            slip_near=float(dot(slip, np.abs(self._near))) + ratio * self._rest,
            slip_far=float(dot(slip, np.abs(self._far))) + self._rest,
            outside=outside * largest,
            infinite=-math.expm1(survive),
            apart=self._apart(counts),
        )
        if len(self._kept) > 8:
            self._kept.clear()
        self._kept[counts] = kept
        return kept

    def _geometric(self, x: float, angle: Array) -> Complex:
        """1 / (1 − e^{−(x h + i angle)})."""
        out: Complex = -1.0 / np.expm1(-(x * self.step + 1j * angle))
        return out

    def _apart(self, counts: tuple[int, ...]) -> tuple[float, float]:
        stay = gain = 0.0
        for c, law in zip(counts, self.laws, strict=True):
            q, d = law.beyond
            stay += c * math.log1p(-q)
            gain += c * math.log1p(-min(d / (1.0 - q), 1.0 - 1e-15))
        return stay, gain

    def apart(self, epsilon: float, counts: tuple[int, ...]) -> tuple[float, float]:
        """(ΔP − e^ε ΔQ, a bound on what it leaves out) of all runs with a loss beyond the laws' caps.

        Once a loss has exceeded the cap the total exceeds ε too, but for a little: so those runs add P − e^ε Q to
        delta, in closed form from the mass beyond the cap in one step, Q_i and P_i = Q_i + D_i:
        ΔP − ΔQ = Π(1 − Q_i)^T − Π(1 − P_i)^T, as P and Q are whole (`Pair.conserves`). Where the rest of the run takes
        the total below ε again, (P − e^ε Q)+ is larger than that, by e^ε E_Q[min(1, (ε − L)+); far] at most, which
        Chernoff's bound on the rest limits, as x+ ≤ e^{tx}/(et). A lower bound may leave that out.
        """
        stay, gain = self._prepare(counts).apart
        if gain == 0.0:
            return 0.0, 0.0
        lost = -math.expm1(stay)
        most = (lost + math.exp(stay) * -math.expm1(gain)) * (1.0 + 1e-10)  # ΔP
        if epsilon > 600.0:
            return 0.0, most if self.upper else 0.0
        one, two = math.exp(stay) * -math.expm1(gain), math.expm1(epsilon) * lost
        slack = 1e-10 * (one + two)
        short = 0.0
        if self.upper:
            reach = min(
                (
                    sum(c * m for c, m in zip(counts, moments, strict=True))
                    - t * (self.cap - epsilon)
                    - max(0.0, math.log(t) + 1.0)
                    for t, moments in self._lower_tails()
                ),
                default=-math.inf if self.cap >= epsilon else 0.0,
            )  # of the log of Chernoff's bound
            short = (1.0 + math.expm1(epsilon)) * lost * math.exp(min(0.0, reach)) * (1.0 + 1e-9)
        value = max(0.0, one - two + (slack if self.upper else -slack))
        return value, min(short, max(0.0, most - value))

    def _lower_tails(self) -> list[tuple[float, list[float]]]:
        """log E_Q[e^{−tL} | L ≤ cap] of every law at some t, rounded up."""
        if self._low is None:
            self._low = []
            for t in lower_orders(self.laws, self.counts):
                moments = []
                for law in self.laws:
                    power = np.expm1(np.maximum(-t * law.loss, -40.0))
                    q = np.maximum(law.mass * np.exp(-law.loss), 1e-250)
                    total = float(dot(q, power)) + max(0.0, float(q.sum()) - (1.0 - law.beyond[0]))
                    slip = 1e-14 * (1.0 + float(dot(q, np.abs(power)))) + 2e-10 * law.beyond[0]
                    moments.append(math.log1p(max(0.0, total + slip) / (1.0 - law.beyond[0])))
                self._low.append((t, moments))
        return self._low

    def bracket(self, epsilon: float, counts: tuple[int, ...]) -> tuple[float, float, float, float]:
        """(B, bound on its error, log scale, P(L = ∞)) at ``epsilon``, with what is `apart` in units of B."""
        value, error, scale, infinite = self._transform(epsilon, counts)
        gain, short = self.apart(epsilon, counts)
        if gain > 0.0:
            unit = math.exp(min(600.0, self.theta * epsilon - scale))
            value, error = value + unit * gain, error + unit * short
        return value, error, scale, infinite

    def _transform(self, epsilon: float, counts: tuple[int, ...]) -> tuple[float, float, float, float]:
        kept = self._prepare(counts)
        n, h, theta = self.size, self.step, self.theta
        last = kept.base + h * (kept.start + n) - epsilon
        if last <= 0.0:
            return 0.0, kept.outside, kept.log_scale, kept.infinite
        first = max(kept.start, math.floor((epsilon - kept.base) / h) + 1)
        gap = kept.base + h * first - epsilon
        turn = np.exp(2j * math.pi / n * ((self._k * (first % n)) % n))
        a = float(np.sum((kept.near * turn).real))
        b = float(np.sum((kept.far * turn).real))
        value = error = 0.0
        for sign, x, p, q in ((1.0, gap, a, b), (-1.0, last, kept.edge_near, kept.edge_far)):
            value += sign * math.exp(-theta * x) * (p - math.expm1(-x) * q)
            error += math.exp(-theta * x) * (kept.slip_near - math.expm1(-x) * kept.slip_far)
        return value, error + kept.outside, kept.log_scale, kept.infinite

    def log_delta(self, epsilon: float, counts: tuple[int, ...]) -> float:
        """log of the bound on delta at ``epsilon``: above the lattice law's if ``upper``, else below it."""
        value, error, log_scale, infinite = self._transform(epsilon, counts)
        total = value + error if self.upper else value - error
        out = log_scale - self.theta * epsilon + math.log(total) if total > 0.0 else -math.inf
        gain, short = self.apart(epsilon, counts)
        for more in (infinite, gain + short):
            if more > 0.0:
                out = float(np.logaddexp(out, math.log(more)))
        return min(0.0, out)
