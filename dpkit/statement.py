"""What a run promises, in words: the guarantee, how it came about, what it takes for granted and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .loader import PrivateDataLoader
from .paced import RepeatedOrder
from .sampling import FixedBatches
from .spending import Spending
from .step import PrivateStep


@dataclass(frozen=True)
class Statement:
    """``str(statement)`` is the text.

    Attributes:
        epsilon, delta: the guarantee, of everything released so far.
        neighbours: which two data sets are neighbours.
        accountant: who says so.
        mechanism: sampling, clipping, σ and how often.
        noise: where the noise comes from.
        seeded: what was seeded by hand ("noise", "draws"); a run that repeats protects only against those who do not
            know the seeds.
        assumptions: what has to hold and is not checked.
        left_out: what ε does not cover.
    """

    epsilon: float
    delta: float
    neighbours: str
    accountant: str
    mechanism: str
    noise: str
    seeded: tuple[str, ...]
    assumptions: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"The weights are ({self.epsilon:.4g}, {self.delta:g})-differentially private for data sets that "
            f"{self.neighbours} ({self.accountant}).",
            f"Mechanism: {self.mechanism}.",
            f"Noise: {self.noise}",
        ]
        if self.seeded:
            lines.append(
                f"SEEDED BY HAND: {' and '.join(self.seeded)}. The run can be repeated; the guarantee holds against "
                "those only who do not know the seed."
            )
        for title, items in (("Assumed", self.assumptions), ("Not covered", self.left_out)):
            lines.append(f"{title}:")
            lines += [f"  - {item}" for item in items]
        return "\n".join(lines)


def describe(
    step: PrivateStep, spending: Spending, loader: PrivateDataLoader, epsilon: float, delta: float
) -> Statement:
    """The statement of a run."""
    sampling = step.sampling
    amplified, fixed = sampling.sample_rate < 1.0, isinstance(sampling, FixedBatches | RepeatedOrder)
    rate = f"{sampling.name} at rate {sampling.sample_rate:.4g}" if amplified else sampling.name
    seeded = {"noise": step.noise.seeded, "draws": amplified and loader.seeded}
    return Statement(
        epsilon=epsilon,
        delta=delta,
        neighbours=f"differ by {'zeroing out' if fixed else 'adding or removing'} one {loader.units.name}",
        accountant=f"{type(spending.accountant).__name__}, an upper bound",
        mechanism=f"{spending.released} releases by {rate}, each the sum of gradients clipped by {step.clipping!r} "
        f"to C (now {step.max_grad_norm:.4g}), with noise of σ C (σ now {step.noise_multiplier:.4g})",
        noise=step.noise.describe(),
        seeded=tuple(name for name, by_hand in seeded.items() if by_hand),
        assumptions=tuple(_assumptions(step, amplified, spending.ledger is not None)),
        left_out=LEFT_OUT,
    )


def _assumptions(step: PrivateStep, amplified: bool, ledger: bool) -> Iterator[str]:
    """What has to hold and is not checked."""
    if step.strictly_examined:
        yield "each loss stays its own record's, as was seen on the first batch (engine.backward)"
    else:
        yield "the loss is a mean or sum of one loss a record; engine.backward(losses) would check it"
    drawn = "who was drawn, " if amplified else ""
    yield f"nobody sees {drawn}sums before noise, checkpoints, or gradients of a batch"
    yield "σ followed a schedule that was fixed in advance (one chosen in view of earlier releases needs a filter)"
    yield "a record moves the computed sum by at most C, but for the rounding of floating point"
    if not step.noise.secure:
        yield "nobody uses the last bits of the noisy values, or foretells the generator (see secure_mode)"
    if step.ranks.size > 1:
        yield f"the {step.ranks.size} processes hold the same data in the same order (some rows were compared)"
    if not ledger:
        yield "the run was not interrupted and repeated from an earlier state (a ledger would know)"


LEFT_OUT = (
    "choices made by looking at the data or at other runs on it: hyper-parameters, early stopping, vocabularies, "
    "label counts, normalisation",
    "passes inside engine.paused(), and the outputs of a model that is asked about private data",
    "engine.nonfinite_records, and anything else that is printed or logged from batches",
)
