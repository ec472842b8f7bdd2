"""Every refusal of dpkit: what was seen, why it breaks the guarantee, and the cure."""

from __future__ import annotations


class PrivacyError(Exception):
    """Root of all refusals: continuing would make the reported (ε, δ) untrue.

    Args:
        seen: what was observed, with the path of the module or parameter.
        why: why the guarantee would not hold.
        cure: what to do about it.
    """

    def __init__(self, seen: str, *, why: str = "", cure: str = "") -> None:
        self.seen, self.why, self.cure = seen, why, cure
        lines = [seen]
        if why:
            lines.append(f"  Why: {why}")
        if cure:
            lines.append(f"  Cure: {cure}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.seen, self.why, self.cure))


def _rebuild(kind: type[PrivacyError], seen: str, why: str, cure: str) -> PrivacyError:
    return kind(seen, why=why, cure=cure)


class ConfigurationError(PrivacyError, ValueError):
    """An argument out of its range, or arguments that contradict each other."""


class UncoveredParameterError(PrivacyError):
    """A parameter received a gradient that is not clipped per record."""


class NonPrivateGradientError(UncoveredParameterError):
    """A gradient reached ``p.grad`` by a path that the engine does not see."""


class GradientMismatchError(PrivacyError):
    """A rule's per-record gradients do not add up to autograd's gradient."""


class CoupledRecordsError(PrivacyError):
    """One record's output or loss depends on another record."""


class FoldedBatchError(PrivacyError):
    """A layer sees a leading dimension that is not the number of records (B·T, windows, a batch of one)."""


class UnsupportedModuleError(PrivacyError):
    """A module that cannot be made private as it is (BatchNorm in train mode, weights renormalised in the forward)."""


class SamplingError(PrivacyError):
    """A data loader whose batches cannot be accounted."""


class DoubleUseError(PrivacyError):
    """Records were back-propagated that this step did not draw, or were drawn once and used twice."""


class UnfinishedStepError(PrivacyError):
    """A logical batch was back-propagated and no ``optimizer.step()`` followed before the next one."""


class NotAttachedError(PrivacyError):
    """The engine is not attached to a model (yet, or any more)."""


class CheckpointError(PrivacyError):
    """A checkpoint that is damaged, or of another run, model, optimizer or data set; nothing of it was loaded."""


class ReplayError(CheckpointError):
    """A step that was released before an interruption comes out differently when it is taken again."""


class LedgerError(PrivacyError):
    """A ledger that is damaged, cannot be written, or does not match the run."""


class BudgetExhaustedError(PrivacyError):
    """The next release would exceed the budget; it was not made."""


class RanksError(PrivacyError):
    """The processes of a distributed run do not do the same, or one of them has failed."""
