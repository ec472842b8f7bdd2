"""A ``collate_fn`` that makes a row of several records is refused; one that sorts, pads or augments is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

import dpkit
from tests.training import attach, data, mlp, train

Pair = tuple[Tensor, Tensor]
OWN = np.random.default_rng(0)


def mixup(rows: list[Any]) -> Pair:
    x, y = default_collate(rows)
    other = torch.randperm(len(x))
    return 0.6 * x + 0.4 * x[other], 0.6 * y + 0.4 * y[other]


def cutmix(rows: list[Any]) -> Pair:
    """The last features are the next record's; numpy's chance says how many."""
    x, y = default_collate(rows)
    x[:, int(np.random.rand() < 0.5) :] = x.roll(1, 0)[:, -1:]  # noqa: NPY002
    return x, y


def centred(rows: list[Any]) -> Pair:
    x, y = default_collate(rows)
    return x - x.mean(0), y


def sorted_rows(rows: list[Any]) -> Pair:
    x, y = default_collate(sorted(rows, key=lambda row: float(row[0][0])))
    return x, y


def shuffled(rows: list[Any]) -> Pair:
    x, y = default_collate([rows[k] for k in torch.randperm(len(rows)).tolist()])
    return x, y


def augmented(rows: list[Any]) -> Pair:
    x, y = default_collate(rows)
    return x + 0.1 * torch.randn_like(x), y


def own_chance(rows: list[Any]) -> Pair:
    x, y = default_collate(rows)
    return x * float(OWN.random()), y


def as_much_as_the_rows_say(rows: list[Any]) -> Pair:
    x, y = default_collate(rows)
    return x + torch.rand(2 + int(x[-1, 0] > x[0, 0]))[0] * torch.ones_like(x), y


def padded(rows: list[Any]) -> Pair:
    return pad_sequence([x for x, _ in rows], batch_first=True), torch.stack([y for _, y in rows])


def emptied(rows: list[Any]) -> Pair:
    """Takes the rows apart, as those who write ``row.pop("labels")`` do."""
    found = [(row.pop("x"), row.pop("y")) for row in rows]
    return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])


class Dicts(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        x, y = data()[k]
        return {"x": x, "y": y}


@pytest.mark.parametrize("collate", [mixup, cutmix, centred])
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_several_records(collate: Any, workers: int) -> None:
    run = attach(mlp(), loader={"collate_fn": collate, "num_workers": workers})
    with pytest.raises(dpkit.SamplingError, match="rows of several records"):
        train(run)


@pytest.mark.parametrize(
    "collate", [sorted_rows, shuffled, augmented, own_chance, as_much_as_the_rows_say, padded, emptied]
)
def test_rows_of_their_own_records(collate: Any) -> None:
    train(attach(mlp(), Dicts() if collate is emptied else data(), loader={"collate_fn": collate}), 4)


def test_mixing_within_a_unit_is_its_own_affair() -> None:
    train(attach(mlp(), loader={"collate_fn": mixup}, augmentations=2))


def test_looking_changes_nothing() -> None:
    """What is served is what the user's function makes, with the chance that it would have had."""
    served = []
    for collate in (augmented, lambda rows: augmented(rows)):
        torch.manual_seed(3)
        run = attach(mlp(), loader={"collate_fn": collate, "generator": torch.Generator().manual_seed(1)})
        if served:
            run.loader.collate_fn = collate  # not looked at
        served.append([batch for _ in range(4) for batch in run.loader])
    for one, other in zip(*served, strict=True):
        assert torch.equal(one[0], other[0])
