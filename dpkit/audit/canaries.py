"""Canaries: records whose presence an attacker tries to tell; and a run made of nothing else, to audit the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkit import checks
from dpkit.engine import PrivacyEngine

from .bounds import LowerBound, attack, one_run


def flip(canaries: int, generator: torch.Generator | None = None) -> Tensor:
    """[m] independent fair coins: whether each canary is in."""
    checks.count("canaries", canaries)
    return torch.rand(canaries, generator=generator, dtype=torch.float64) < 0.5


@dataclass(frozen=True)
class Trial:
    """A run on canaries.

    Attributes:
        included: [m], the coins.
        scores: [m], how far the run has moved along each canary's own direction, in multiples of C.
        claimed: ε at ``delta`` as the engine reports it.
    """

    included: Tensor
    scores: Tensor
    claimed: float
    delta: float

    def bounds(self, confidence: float = 0.95) -> tuple[LowerBound, LowerBound]:
        """Lower bounds on ε from the guesses right (`one_run`) and from the error rates (`attack`).

        The second takes the canaries as so many independent runs; in a run of `dirac` they are, whatever the engine
        does to each alike: none meets another's coordinate. Each holds with (1 + confidence) / 2, so both do with
        ``confidence``.
        """
        each = (1.0 + confidence) / 2.0
        scores, coins = self.scores, self.included
        return (
            one_run(coins, scores, delta=self.delta, confidence=each),
            attack(scores[coins], scores[~coins], delta=self.delta, confidence=each),
        )

    def refuted(self, confidence: float = 0.95) -> bool:
        """Whether one of the bounds exceeds the claim."""
        return any(bound.refutes(self.claimed) for bound in self.bounds(confidence))


class _Coordinates(nn.Module):
    """One weight a canary: its gradient is along that coordinate alone, whatever the others do."""

    def __init__(self, canaries: int) -> None:
        super().__init__()
        self.table = nn.Embedding(canaries, 1)
        nn.init.zeros_(self.table.weight)

    def forward(self, index: Tensor) -> Tensor:
        moved: Tensor = self.table(index).squeeze(-1)
        return moved


def dirac(
    canaries: int = 100_000,
    *,
    noise_multiplier: float,
    sample_rate: float = 1.0,
    epochs: int = 1,
    delta: float = 1e-5,
    max_grad_norm: float = 1.0,
    size: float = 10.0,
    generator: torch.Generator | None = None,
    noise_generator: torch.Generator | None = None,
    **options: Any,
) -> Trial:
    """Train on gradient canaries with a private engine, as it is installed here, and look at what it releases.

    Each of m canaries has a coordinate of its own; where its coin fell on "in", its gradient there is ``size`` times C,
    else zero. That is the worst case for each canary, and m of them are m experiments at once. A claim that such a run
    refutes is false; one that it does not refute may still be (an audit is no proof).

    Args:
        sample_rate: q; a pass has 1 / q steps.
        generator: for coins and draws; and ``noise_generator`` for the noise.
        options: passed on to `PrivacyEngine.make_private` (``clipping``, ``max_physical_batch_size``, ...).

    The canaries are those of Nasr et al., "Tight Auditing of Differentially Private Machine Learning" (2023), one for
    each coordinate as in Andrew et al., "One-shot Empirical Privacy Estimation for Federated Learning" (2024).
    """
    coins = flip(canaries, generator)
    rate = checks.number("sample_rate", sample_rate, low=0.0, high=1.0, strict=False)
    checks.count("epochs", epochs)
    batch_size = max(1, round(rate * canaries))
    model, lr = _Coordinates(canaries), 2.0**-10
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    data: Any = range(canaries)
    engine = PrivacyEngine()
    _, _, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=batch_size, generator=generator, collate_fn=torch.tensor),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        noise_generator=noise_generator,
        loss_reduction="sum",
        **options,
    )
    weights = coins.to(torch.float32) * (-size * max_grad_norm)
    for _ in range(epochs):
        for index in loader:
            optimizer.zero_grad()
            (model(index) * weights[index]).sum().backward()
            optimizer.step()
    claimed = engine.get_epsilon(delta)
    moved = model.table.weight.detach().squeeze(1).double() * (engine.expected_batch_size / (lr * max_grad_norm))
    engine.detach()
    return Trial(coins, moved, claimed, delta)
