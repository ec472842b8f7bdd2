"""Policies that change from one reading to the next, so that the guard has to read them.

Three changes, as Llama Guard's authors describe them (Inan et al., 2023): categories that are not violated are dropped
at random; all violated ones are dropped, and the verdict becomes safe; and the order, and with it the codes, is
shuffled. They change the policy and never add a conversation: the data set draws them when a conversation is read, and
all readings of one conversation are one unit of privacy, whose gradient is clipped once. ε is what it is without them,
against those who do not know the draws: with a known seed, whoever takes part in a step decides under which policies
those after it are read. As for the noise, a seed is for runs that are to be repeated; to release a model, give none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .prompt import Verdict
from .taxonomy import Taxonomy


@dataclass(frozen=True)
class Augmentation:
    """How policies are drawn.

    Attributes:
        drop: the probability that a reading leaves out some categories that are not violated (each with 1/2).
        drop_violated: the probability that a reading of an unsafe conversation leaves out all violated ones.
        shuffle: whether the order, and with it the codes, is drawn.
    """

    drop: float = 0.5
    drop_violated: float = 0.2
    shuffle: bool = True

    def __call__(
        self, taxonomy: Taxonomy, verdict: Verdict, generator: torch.Generator | None = None
    ) -> tuple[Taxonomy, Verdict]:
        """A policy drawn from ``taxonomy``, and the verdict under it. At least one category is left."""

        def chance(p: float) -> bool:
            return torch.rand((), generator=generator).item() < p

        violated = {taxonomy.named(name).name for name in verdict.names}
        names = taxonomy.names
        unnamed = (
            verdict.unsafe and not violated
        )  # unsafe, but nobody said of which category: no policy may judge it less
        if violated and len(violated) < len(names) and chance(self.drop_violated):
            names = [name for name in names if name not in violated]
            verdict = Verdict(False)
            violated = set()
        if not unnamed and chance(self.drop):
            kept = [name for name in names if name in violated or chance(0.5)]
            names = kept or names[:1]
        if self.shuffle:
            names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
        drawn = taxonomy.only(names)
        return (drawn.numbered() if self.shuffle else drawn), verdict


NONE = Augmentation(drop=0.0, drop_violated=0.0, shuffle=False)
