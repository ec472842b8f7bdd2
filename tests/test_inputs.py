"""What a loop does to a batch before the model gets it: rows of several records are refused, augmentation is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpkit
from tests.training import attach

N, K = 12, 3
Change = Callable[[Tensor], Tensor]


class Reads(nn.Module):
    """A small convolutional network on images of one channel, or on rows of as many numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2 * 36, K)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.first(x.view(-1, 1, 8, 8))).flatten(1))
        return y


def pictures(whole: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(256, (3 * N, 1, 8, 8), generator=generator, dtype=torch.uint8)
    x[:, :, :2] = 0  # a dark border, alike in all
    return TensorDataset(x if whole else x.float() / 255, torch.arange(3 * N) % K)


def mixup(x: Tensor) -> Tensor:
    return 0.8 * x + 0.2 * x[torch.randperm(len(x))]


def mixup_in_place(x: Tensor) -> Tensor:
    return x.mul_(0.7).add_(x.flip(0) * 0.3)


def mixup_of_each(x: Tensor) -> Tensor:
    share = torch.rand(len(x), 1, 1, 1)
    return share * x + (1 - share) * x.roll(1, 0)


def cutmix(x: Tensor) -> Tensor:
    return _patch(x, x.roll(1, 0))


def drawn_with_replacement(x: Tensor) -> Tensor:
    return x[torch.arange(len(x)) // 2]


MIXED: dict[str, Change] = {
    "mixup": mixup,
    "mixup in place": mixup_in_place,
    "mixup, a share for each": mixup_of_each,
    "mixup, slight": lambda x: 0.99 * x + 0.01 * x.roll(1, 0),
    "mixup, flattened": lambda x: mixup(x).flatten(1),
    "mixup, float64": lambda x: mixup(x.double()).float(),
    "cutmix": cutmix,
    "centred": lambda x: x - x.mean(0),
    "standardised": lambda x: (x - x.mean()) / x.std(),
    "every feature standardised": lambda x: (x - x.mean(0)) / (x.std(0) + 1e-5),
    "drawn with replacement": drawn_with_replacement,
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed(name: str) -> None:
    run = attach(Reads(), pictures(), N)
    x, y = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError, match="in the loop"):
        F.cross_entropy(run.model(MIXED[name](x)), y).backward()


def test_mixed_after_a_change_of_type() -> None:
    run = attach(Reads(), pictures(whole=True), N)
    x, _ = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError, match="in the loop"):
        run.model(mixup(x.float() / 255))


def test_mixed_later() -> None:
    """From the second epoch on, and not in every batch."""
    torch.manual_seed(0)
    run = attach(Reads(), pictures(), N)
    with pytest.raises(dpkit.CoupledRecordsError, match="in the loop"):  # noqa: PT012
        for epoch in range(40):
            for x, y in run.loader:
                F.cross_entropy(run.model(mixup(x) if epoch > 4 and torch.rand(()) < 0.7 else x), y).backward()
                run.optimizer.step()


def erased(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 2:5, 3:6] = 0.5
    return y


APART: dict[str, Change] = {
    "as it is": lambda x: x,
    "a copy": lambda x: x.clone(),
    "flattened": lambda x: x.flatten(1),
    "standardised by constants": lambda x: (x - 0.48) / 0.29,
    "brighter, each by its own": lambda x: x * (0.5 + torch.rand(len(x), 1, 1, 1)) + 0.1 * torch.rand(len(x), 1, 1, 1),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "mirrored": lambda x: x.flip(-1),
    "moved": lambda x: x.roll((1, 2), (2, 3)),
    "erased": erased,
    "dropped": lambda x: F.dropout(x, 0.3),
    "standardised, each by its own": lambda x: (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True),
    "powers": lambda x: x.clamp(min=0) ** 2,
    "half precision": lambda x: x.half().float(),
    "nothing": lambda x: x * 0,
    "noise alone": torch.randn_like,
}


@pytest.mark.parametrize("name", APART)
def test_apart(name: str) -> None:
    run = attach(Reads(), pictures(), N, lr=0.01)
    for _ in range(5):
        for x, y in run.loader:
            F.cross_entropy(run.model(APART[name](x)), y).backward()
            run.optimizer.step()


@pytest.mark.parametrize("name", ["as it is", "noise", "dropped", "brighter, each by its own", "powers"])
@pytest.mark.parametrize("kind", ["binary", "few features", "one-hot", "copies"])
def test_apart_where_records_are_much_alike(kind: str, name: str) -> None:
    """Sparse or narrow data, and copies of a record: chance could look like a mixture."""
    generator = torch.Generator().manual_seed(4)
    x = {
        "binary": torch.randint(2, (N, 20), generator=generator).float(),
        "few features": torch.randn(N, 3, generator=generator),
        "one-hot": torch.eye(N),
        "copies": torch.randn(2, 20, generator=generator).repeat(N // 2, 1),
    }[kind]
    run = attach(nn.Linear(x.shape[1], 1), TensorDataset(x, torch.randn(N, 1)), lr=0.01)
    change = APART[name] if name != "brighter, each by its own" else lambda x: x * (0.5 + torch.rand(len(x), 1))
    for _ in range(5):
        for x, y in run.loader:
            (run.model(change(x)) - y).square().mean().backward()
            run.optimizer.step()


class TwoTowers(nn.Module):
    """Users and items, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(50, 4), nn.Embedding(50, 4)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1)


def pairs() -> TensorDataset:
    return TensorDataset(torch.randperm(50)[:N], torch.randperm(50)[:N])


def test_other_records_as_negative_examples() -> None:
    run = attach(TwoTowers(), pairs())
    user, item = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError, match="in the loop"):
        (F.softplus(-run.model(user, item)) + F.softplus(run.model(user, item.roll(1)))).mean().backward()


def test_all_arguments_in_another_order() -> None:
    """Sorted, the labels too: rows are still one record each."""
    run = attach(TwoTowers(), pairs())
    for user, item in run.loader:
        order = user.argsort()
        F.softplus(-run.model(user[order], item[order])).mean().backward()
        run.optimizer.step()


def test_another_order_where_a_unit_has_several_rows() -> None:
    """A row would be clipped together with those of another unit."""
    x = torch.randn(N, 6)
    run = attach(nn.Linear(6, 1), TensorDataset(x), 4, privacy_unit=[k // 3 for k in range(N)])
    (x,) = next(iter(run.loader))
    with pytest.raises(dpkit.CoupledRecordsError, match="in the loop"):
        run.model(x.flip(0))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_views_of_one_unit_may_be_mixed(name: str) -> None:
    unit = torch.arange(3 * N) // 2
    run = attach(Reads(), pictures(), N, privacy_unit=unit.tolist(), lr=0.01)
    for x, y in run.loader:
        order = torch.arange(len(x)) ^ 1  # units have two rows each, one after the other
        F.cross_entropy(run.model(0.6 * x + 0.4 * x[order] if name == "mixup" else _patch(x, x[order])), y).backward()
        run.optimizer.step()


def _patch(x: Tensor, other: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 3:7, 2:6] = other[:, :, 3:7, 2:6]
    return y


def test_public_passes_are_left_alone() -> None:
    run = attach(Reads(), pictures(), N)
    x, _ = next(iter(run.loader))
    with run.engine.paused():
        run.model(mixup(x))
    with torch.no_grad():
        run.model(mixup(x))
