"""Composition of lattice laws: one tilted Fourier transform, with every error of it inside a stated bound.

The law of one step is tilted, w_j = p_j e^{θ l_j − K(θ)}, so that the composed law has its bulk where epsilon is; then

    delta(ε) = e^{ΣTK − θε} · B + P(L = ∞),    B = Σ_{L > ε} r(L) (e^{−θ(L−ε)} − e^{−(1+θ)(L−ε)}),

with r = w^{*T} the composed tilted law. B is a sum over an N-periodic index and is taken in the Fourier domain
(Parseval):
B = (1/N) Σ_k conj(W_k) Π_i F_ik^{T_i}, with W the transform of the two geometric weights in closed form. The powers
of F
die out after a few hundred frequencies, so one spectrum answers any epsilon, and any number of steps, in microseconds.

What is bounded, u = 2^-53 (one rounding):

Wrap-around and window. The index is periodic with period N, the window is [j0, j0 + N). Mass of r outside it is read
at a
wrong place, where a weight is at most c = θ^θ/(1+θ)^{1+θ} ≤ 1, just as its own weight is. Chernoff at θ ± t on the
lattice law itself bounds that mass by τ, so the error is at most c·τ.

FFT round-off. In a Cooley-Tukey transform of length N = Π radices, every output is a sum over the inputs of products
along
one path through the stages. A computed complex product is xy(1 + e) with |e| ≤ √5 u (Brent, Percival, Zimmermann
2007), a
stored root of unity has relative error ≤ u (rounded from extended accuracy), a computed sum is (x + y)(1 + e), |e| ≤
u, and
its e goes to both terms. So the computed output is Σ_j x_j ω^{jk} Π(1 + e), with, per stage of radix 2, one sum, one
product and one root: |e| ≤ (1 + √5 + 1)u(1 + O(u)) < 5u; of radix 4, two sums and one product and root, < 6u ≤ 2·5u; of
radix 3 and 5 the inner sums have two and four terms and one constant factor in real arithmetic: < (2 + 2 + √5 + 1)u <
8u ≤
log2(3)·8u and < (4 + 2 + √5 + 1)u < 10u ≤ log2(5)·8u. Whatever the mix of radices 2 to 5, hence, with ‖x‖₁ = Σ|x_j|,

    |F̂_k − F_k| ≤ e_F = 8u · log2(N) · (1 + 1e-10) · ‖x‖₁      for every k.

The real-input transform computes half of the same outputs by the same butterflies. N is chosen 5-smooth.

Powers. Ĝ = exp(ΣT_i log F̂_i) has relative error at most expm1(ΣT_i e_i + 4u(1 + |log Ĝ|)), e_i = e_F/(|F̂_i| − e_F)
+ 4u(1 +
|log F̂_i|) the error of log F̂_i. Where F̂_i < 2 e_F, F_i is at most 3 e_F: e_F is put in its place and e_i = 100
stands for
"anything up to e^100 times that". Where few frequencies count, 1 − F is summed directly instead (`_direct`): its
error is a
few roundings of 1 − F itself, about 1/T, so that the error of the power does not grow with T.

Weights, sums. The geometric sums have relative error ≤ 32u each; the phases are reduced in exact integers; a sum of K
terms
by numpy's pairwise rule errs by at most (log2 K + 128)u of the sum of moduli. Dropped frequencies are bounded by
their moduli.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lattice import Lattice
from .numeric import smooth_length
from .pairs import Array, Ints, U

Complex = NDArray[np.complex128]
_FADE = 42.0


@dataclass(frozen=True)
class _Kept:
    """The frequencies that count for one set of step counts."""

    near: Complex
    """G_k conj(D1_k): rotate by the index of the first loss above epsilon."""
    far: Complex
    """G_k conj(D2_k)."""
    edge_near: float
    edge_far: float
    start: int
    base: float
    """Loss at index 0."""
    log_scale: float
    """ΣTK."""
    error: float
    infinite: float


class Spectrum:
    """The composition of lattice laws for any step counts between ``fewest`` and ``counts``.

    Args:
        laws: one lattice law per kind of step, all of the same grid step.
        counts: the largest number of times each will be run.
        theta: the tilt, > 0.
        upper: whether errors are to be rounded up or down.
        fewest: the smallest number of times each will be run; fewer runs need more frequencies.
        wrap: −log of the tilted mass that may lie outside the window, on either side.
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
    ) -> None:
        self.wrap = wrap
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
            mean = float(np.dot(weight, law.loss))
            self._tilted.append(weight)
            self._means.append(mean)
            variance += n * float(np.dot(weight, (law.loss - mean) ** 2))
        self.deviation = math.sqrt(variance)
        self._excess = self._chernoff_table()
        left, right = self._reach(self.counts)
        self.size = smooth_length(max(64, math.ceil((right + left) / self.step) + 4))
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
        self._near, self._far = self._geometric(theta, angle), self._geometric(1.0 + theta, angle)
        self._double = np.where((self._k == 0) | (2 * self._k == self.size), 1.0, 2.0) / self.size
        self._kept: dict[tuple[int, ...], _Kept] = {}

    def _alive(self, spectra: list[Complex]) -> tuple[Ints, float]:
        """The frequencies whose power at the fewest steps exceeds e^-_FADE, and a bound on all others' share in B.

        With G ≤ e^-_FADE (1 + e_F/|F|)^T for the others and |1 − ρ e^{−iφ}| ≥ sin(φ/2) ≥ φ/π for 0 ≤ ρ ≤ 1, φ ≤ π,
        their
        share is at most (2/N) Σ_k |G_k| (|D1| + |D2|) ≤ 2 max|G| (1 + log N).
        """
        if len(spectra) == 1:
            n = max(self.fewest[0], 1)
            f = spectra[0]
            power = f.real**2 + f.imag**2
            alive = power > math.exp(-2.0 * _FADE / n)
            ceiling = n * math.log(math.exp(-_FADE / n) + self._noise[0])
        else:
            total = np.zeros(len(spectra[0]))
            blur = 0.0
            for n, f, noise in zip(self.fewest, spectra, self._noise, strict=True):
                if n:
                    size = np.sqrt(f.real**2 + f.imag**2)
                    total += n * np.log(size + noise)
                    blur += n * noise
            alive = total > -_FADE
            ceiling = -_FADE
        alive[0] = True
        if alive.all():
            return np.flatnonzero(alive), 0.0
        return np.flatnonzero(alive), 2.0 * math.exp(ceiling) * (1.0 + math.log(self.size)) * (1.0 + 1e-9)

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
        the
        error of F^T no longer grows with T.
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
                small = float(np.dot(weight, np.expm1(exponent) - exponent))
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
        outside = 2.0 * math.exp(-self.wrap) if spare > 0.0 else 1.0
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
        weight_size = self._double * 2.0 * (np.abs(self._near) + np.abs(self._far))
        error = float(np.sum(weight_size * (slip + (size + slip) * (64.0 + math.log2(len(k) + 1) + 128.0) * U)))
        error += self._rest
        largest = math.exp(theta * math.log(theta) - (1.0 + theta) * math.log1p(theta))
        error += outside * largest
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
            error=error * (1.0 + 1e-9),
            infinite=-math.expm1(survive),
        )
        if len(self._kept) > 8:
            self._kept.clear()
        self._kept[counts] = kept
        return kept

    def _geometric(self, x: float, angle: Array) -> Complex:
        """1 / (1 − e^{−(x h + i angle)})."""
        out: Complex = -1.0 / np.expm1(-(x * self.step + 1j * angle))
        return out

    def bracket(self, epsilon: float, counts: tuple[int, ...]) -> tuple[float, float, float, float]:
        """(B, bound on its error, log scale, P(L = ∞)) at ``epsilon``."""
        kept = self._prepare(counts)
        n, h, theta = self.size, self.step, self.theta
        last = kept.base + h * (kept.start + n) - epsilon
        if last <= 0.0:
            return 0.0, kept.error, kept.log_scale, kept.infinite
        first = max(kept.start, math.floor((epsilon - kept.base) / h) + 1)
        gap = kept.base + h * first - epsilon
        turn = np.exp(2j * math.pi / n * ((self._k * (first % n)) % n))
        a = float(np.sum((kept.near * turn).real))
        b = float(np.sum((kept.far * turn).real))
        value = math.exp(-theta * gap) * a - math.exp(-(1.0 + theta) * gap) * b
        value -= math.exp(-theta * last) * kept.edge_near - math.exp(-(1.0 + theta) * last) * kept.edge_far
        return value, kept.error, kept.log_scale, kept.infinite

    def log_delta(self, epsilon: float, counts: tuple[int, ...]) -> float:
        """log of the bound on delta at ``epsilon``: above the lattice law's if ``upper``, else below it."""
        value, error, log_scale, infinite = self.bracket(epsilon, counts)
        total = value + error if self.upper else value - error
        log_finite = log_scale - self.theta * epsilon + math.log(total) if total > 0.0 else -math.inf
        if infinite <= 0.0:
            return min(0.0, log_finite)
        return min(0.0, float(np.logaddexp(log_finite, math.log(infinite))))
