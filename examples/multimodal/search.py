"""The search for the fusion layer, and what it costs.

1. *Supernet.* One private training run, in each step of which the fusion layer is drawn at random, without regard to
   the data. It is one DP-SGD run and costs what one run costs, however many candidates there are.
2. *Choice.* Each candidate's number of right validation units, of which only the best one's name is released: report
   noisy max. The validation units are others than the training units, so the two costs do not add up.
3. *Final run*, where one is asked for: another private run on the training units, with the layer that was chosen. It
   composes with the supernet's.

Training every candidate and choosing the best instead would cost as many runs as there are candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpkit.accountants import Event

from .mmbt import MMBT
from .private import Cost, report_noisy_max, right_units, sampled_steps
from .records import Records
from .train import Recipe, Run, predict, train


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        accuracy: of each candidate on the validation rows. Not released: for the eyes of who runs the example.
        cost: with its events; ``cost.epsilon`` is what the search spent.
    """

    chosen: int
    accuracy: dict[int, float]
    supernet: Run
    cost: Cost


def search(
    model: MMBT,
    train_records: Records,
    validation_records: Records,
    candidates: Sequence[int],
    recipe: Recipe,
    *,
    epsilon: float,
    selection_epsilon: float = 0.5,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Search:
    """Train ``model`` as a supernet, leave it at the layer that was chosen, and account for it.

    Args:
        epsilon: for the supernet's run.
        selection_epsilon: for the choice.
    """
    shared = set(train_records.units) & set(validation_records.units)
    if shared:
        raise ValueError(f"{len(shared)} units are in both sets: the two costs would add up")
    rng = np.random.default_rng((seed, 1))
    draws = np.random.default_rng((seed, 2))

    def any_layer(step: int) -> None:
        model.fusion = int(draws.choice(list(candidates)))

    run = train(
        model,
        train_records,
        recipe,
        name="supernet",
        epsilon=epsilon,
        seed=seed,
        before_step=any_layer,
        on_step=on_step,
    )
    assert run.noise_multiplier is not None
    assert run.sample_rate is not None
    assert run.delta is not None
    scores, accuracy = [], {}
    for layer in candidates:
        model.fusion = layer
        right = (predict(model, validation_records).argmax(1) == validation_records.labels).numpy()
        scores.append(right_units(right, validation_records.units))
        accuracy[layer] = float(right.mean())
    best, choice = report_noisy_max(scores, selection_epsilon, rng)
    model.fusion = candidates[best]
    spent: tuple[tuple[str, Event], ...] = (
        ("supernet, one run", sampled_steps(run.noise_multiplier, run.sample_rate, run.steps)),
    )
    return Search(candidates[best], accuracy, run, Cost(spent, (("choice by report noisy max", choice),), run.delta))


def with_final_run(cost: Cost, run: Run) -> Cost:
    """The search's cost together with a private run on the same training units."""
    assert run.noise_multiplier is not None
    assert run.sample_rate is not None
    event = sampled_steps(run.noise_multiplier, run.sample_rate, run.steps)
    return Cost((*cost.on_train, ("final run", event)), cost.on_validation, cost.delta)
