"""Errors of the accountants: what was seen, why it matters, and the cure."""

from __future__ import annotations


class AccountingError(ValueError):
    """An input for which no true privacy statement can be made.

    The message has three parts, so that it can be acted on: what was seen, why it breaks the statement, how to cure it.

    >>> print(AccountingError("sample_rate is 1.5.", why="a probability is at most 1.", cure="pass batch / records."))
    sample_rate is 1.5.
      Why: a probability is at most 1.
      Cure: pass batch / records.
    """

    def __init__(self, saw: str, *, why: str = "", cure: str = "") -> None:
        self.saw, self.why, self.cure = saw, why, cure
        parts = [saw]
        if why:
            parts.append(f"  Why: {why}")
        if cure:
            parts.append(f"  Cure: {cure}")
        super().__init__("\n".join(parts))


class UnsupportedEventError(AccountingError):
    """An event, or an event under an adjacency, that this accountant has no proven bound for."""


class UnreachableTargetError(AccountingError):
    """A calibration target that no value of the free parameter meets."""
