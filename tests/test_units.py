"""Privacy units of several rows: the step is the oracle's loop over units; units are what is drawn and accounted."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import dpkit
from dpkit.accountants import Gaussian, GroupOf, PLDAccountant, PoissonSampled
from dpkit.units import UnitIndex, Units
from tests.cases import CASES, ModelCase
from tests.oracle import Losses, PyTree, clip, norm, per_record_grads, size, take, trainable
from tests.training import Run, attach, data, drawing, mlp, squared_loss, weights, work

OWNERS = ["c", "a", "c", "b", "b", "b", "a", "d"]
"""Whose the eight rows of the tests are: units of 2, 2, 3 and 1 rows, not side by side."""


def unit_grads(
    model: nn.Module, losses: Losses, batch: PyTree, owners: Sequence[Hashable], reduction: str
) -> list[dict[str, Tensor]]:
    """Each unit's gradient: the mean or the sum of its rows' own gradients."""
    rows: dict[Hashable, list[dict[str, Tensor]]] = defaultdict(list)
    for owner, grad in zip(owners, per_record_grads(model, losses, batch, size(batch)), strict=True):
        rows[owner].append(grad)
    return [
        {k: torch.stack([g[k] for g in mine]).sum(0) / (len(mine) if reduction == "mean" else 1) for k in mine[0]}
        for mine in rows.values()
    ]


def private_step(case: ModelCase, batch: PyTree, max_grad_norm: float, **options: Any) -> dict[str, Tensor]:
    """What a noiseless step at learning rate 1 subtracts from each parameter, times the units that are expected."""
    model = case.model(torch.float64)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    loader = {"collate_fn": lambda rows: take(batch, list(rows))}
    run = attach(model, range(size(batch)), len(set(OWNERS)), loader=loader, max_grad_norm=max_grad_norm, **options)  # type: ignore[arg-type]
    assert run.engine.sample_rate == 1.0
    for part in run.loader:
        losses = case.losses(model, part)
        (losses.mean() if options.get("loss_reduction", "mean") == "mean" else losses.sum()).backward()
        run.optimizer.step()
    assert sum(n for _, n in run.engine.accountant.ledger) == 1
    run.engine.detach()
    return {name: (before[name] - p.detach()) * len(set(OWNERS)) for name, p in trainable(model).items()}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step_is_the_loop_over_units(case: ModelCase) -> None:
    """Every model kind, hence every form: norms with the cross terms of a unit's rows, one clipping weight for all."""
    batch, twin = case.records(len(OWNERS), dtype=torch.float64), case.model(torch.float64)
    reduction = ("mean", "sum")[len(case.name) % 2]
    grads = unit_grads(twin, case.losses, batch, OWNERS, reduction)
    bound = float(torch.stack([norm(g) for g in grads]).median())
    total = {k: torch.stack([clip(g, bound)[k] for g in grads]).sum(0) for k in grads[0]}
    try:
        step = private_step(case, batch, bound, privacy_unit=OWNERS, unit_reduction=reduction)
    except dpkit.PrivacyError as refusal:
        if "may_refuse" in case.tags and not isinstance(refusal, dpkit.GradientMismatchError):
            pytest.skip(f"refused: {type(refusal).__name__}")
        raise
    tolerance = 1e-5 if "float32_inside" in case.tags else 1e-9
    assert norm({k: step[k] - total[k] for k in total}) <= tolerance * norm(total)


MLP = next(case for case in CASES if case.name == "mlp")


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("loss_reduction", ["mean", "sum"])
@pytest.mark.parametrize("unit_reduction", ["mean", "sum"])
@pytest.mark.parametrize("physical", [None, 3, 4])
def test_options(clipping: str, loss_reduction: str, unit_reduction: str, physical: int | None) -> None:
    """Every clipping, either reduction of loss and unit, whole and in parts."""
    batch, twin = MLP.records(len(OWNERS), dtype=torch.float64), MLP.model(torch.float64)
    grads = unit_grads(twin, MLP.losses, batch, OWNERS, unit_reduction)
    total = {k: torch.stack([clip(g, 0.5, clipping)[k] for g in grads]).sum(0) for k in grads[0]}
    step = private_step(
        MLP,
        batch,
        0.5,
        privacy_unit=OWNERS,
        unit_reduction=unit_reduction,
        loss_reduction=loss_reduction,
        clipping=clipping,
        max_physical_batch_size=physical,
    )
    assert norm({k: step[k] - total[k] for k in total}) <= 1e-9 * norm(total)


def test_strict_door() -> None:
    """engine.backward takes one loss a row."""
    outcomes = []
    for strict in (True, False):
        run = attach(mlp(), batch_size=4, privacy_unit=OWNERS)
        for x, y in run.loader:
            losses = (run.model(x) - y).square()
            if strict:
                with pytest.raises(dpkit.DoubleUseError, match="7 losses for 8 drawn"):
                    run.engine.backward(losses[:7])
                run.engine.backward(losses)
            else:
                losses.mean().backward()
            run.optimizer.step()
        outcomes.append(weights(run.model))
    assert torch.equal(*outcomes)


# --- who is drawn, and what it costs ---


class Owned(Dataset[Any]):
    """Rows that know their own number and their owner, in several shapes."""

    def __init__(self, shape: str = "tuple") -> None:
        self.x, self.y, self.shape, self.reads = *data().tensors, shape, 0

    def __len__(self) -> int:
        return len(OWNERS)

    def __getitem__(self, k: int) -> Any:
        self.reads += 1
        row = {"index": k, "x": self.x[k], "y": self.y[k], "user": OWNERS[k]}
        return row if self.shape == "dict" else tuple(row.values())


def served(run: Run) -> list[list[int]]:
    """One pass, with a step on each batch."""
    seen = []
    for index, x, y, _ in run.loader:
        seen.append(index.tolist())
        work(run, (x, y))
    return seen


ROWS = [[0, 2], [1, 6], [3, 4, 5], [7]]
"""The rows of the units, in the order of their first row."""


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain(*batches))


def owner(row: Any) -> Any:
    return row[3]


@pytest.mark.parametrize(
    "unit",
    [OWNERS, tuple(OWNERS), np.array(OWNERS), [{"c": 1.5, "a": 2}.get(o, o) for o in OWNERS], 3, owner,
     torch.tensor([2, 0, 2, 1, 1, 1, 0, 3]), [(o, 1) for o in OWNERS], [torch.tensor(ord(o)) for o in OWNERS],
     [np.int64(ord(o)) for o in OWNERS]],
    ids=["list", "tuple", "array", "mixed", "position", "function", "tensor", "tuples", "tensors", "numpy numbers"],
)  # fmt: skip
def test_ways_to_say_whose_a_row_is(unit: Any) -> None:
    """All of them find the same units; all rows of a drawn unit come into its batch."""
    run = attach(mlp(), Owned(), 2, privacy_unit=unit, noise_multiplier=1.0)
    assert run.engine.sample_rate == 0.5
    assert run.engine.expected_batch_size == 2
    assert len(run.loader) == 2
    with drawing([0, 3], [], [2], [1, 0]):
        assert served(run) == [[0, 2, 7], [3, 4, 5], [1, 6, 0, 2]]
    assert run.engine.accountant.ledger == ((PoissonSampled(0.5, Gaussian(1.0)), 4),)


def test_columns_by_name() -> None:
    """A key of each row, or a column of a table that has whole columns (and is then not read row by row)."""
    run = attach(mlp(), Owned("dict"), 2, privacy_unit="user")
    with drawing([2]):
        [batch] = list(run.loader)
    assert batch["index"].tolist() == [3, 4, 5]

    class Table(Owned):
        column_names = ("index", "user")

        def __getitem__(self, k: Any) -> Any:
            return OWNERS if k == "user" else super().__getitem__(k)

    table = Table()
    attach(mlp(), table, 2, privacy_unit="user")
    assert table.reads <= 2 * len(OWNERS)  # a look at the order in which collate_fn gives the rows back


def test_every_unit_is_drawn_alike_however_many_rows_it_has() -> None:
    """Units of 1 to 40 rows at q = 1/4 over 400 draws (5 standard errors: fails for 1e-5 of the seeds)."""
    owners = [u for u in range(8) for _ in range(1 + 5 * u)]
    run = attach(
        mlp(),
        TensorDataset(torch.tensor(owners)),
        2,
        privacy_unit=owners,
        noise_multiplier=1.0,
        loader={"generator": torch.Generator().manual_seed(0)},
    )
    counts, together = np.zeros(8), 0
    for _ in range(100):
        for (batch,) in run.loader:
            ids, rows = batch.unique(return_counts=True)
            assert all(rows == 1 + 5 * ids)
            counts[ids.numpy()] += 1
            together += len(ids)
    assert (abs(counts - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()


def test_at_most_k_rows_drawn_anew() -> None:
    """max_rows_per_unit: exactly k of a larger unit's rows, each of them as often as the others, none twice."""
    owners = [0] * 10 + [1] * 2
    run = attach(
        mlp(),
        TensorDataset(torch.arange(12)),
        2,
        privacy_unit=owners,
        max_rows_per_unit=4,
        loader={"generator": torch.Generator().manual_seed(1)},
    )
    counts = np.zeros(12)
    for _ in range(400):
        for (rows,) in run.loader:
            assert len(set(rows.tolist())) == len(rows) == 6
            counts[rows.numpy()] += 1
    assert (counts[10:] == 400).all()
    assert (abs(counts[:10] - 160) < 5 * np.sqrt(400 * 0.4 * 0.6)).all()


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_physical_batches_hold_whole_units(size: int) -> None:
    run = attach(mlp(), Owned(), 4, privacy_unit=OWNERS, max_physical_batch_size=size)
    parts = served(run)
    assert flat(parts) == flat(ROWS)
    assert all(len(part) <= size for part in parts)
    for unit in ROWS:
        assert sum(bool(set(unit) & set(part)) for part in parts) == 1
    assert sum(n for _, n in run.engine.accountant.ledger) == 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_fixed_batches_of_units(shuffle: bool) -> None:
    """Without Poisson sampling every unit is in one batch of a pass, which costs one full Gaussian."""
    run = attach(
        mlp(),
        Owned(),
        3,
        privacy_unit=OWNERS,
        poisson_sampling=False,
        noise_multiplier=1.0,
        loader={"shuffle": shuffle},
    )
    for k in (1, 2):
        batches = served(run)
        assert len(batches) == 2
        assert sorted(flat(batches)) == list(range(8))
        for unit in ROWS:
            assert sum(bool(set(unit) & set(batch)) for batch in batches) == 1
        assert run.engine.accountant.ledger == ((Gaussian(1.0), k),)


def test_a_unit_may_own_a_row_twice() -> None:
    """A Subset that repeats rows is refused for records; within a unit they are rows like others."""
    repeated = Subset(data(), [0, 1, 1, 2])
    with pytest.raises(dpkit.SamplingError, match="several times"):
        attach(mlp(), repeated, 2)
    attach(mlp(), repeated, 2, privacy_unit=[0, 1, 1, 2])


# --- augmentation ---


def test_augmentations_are_one_record() -> None:
    """Each drawn record is read k times, through the data set's own transform; its views' mean is clipped to C."""

    class Jittered(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, k: int) -> tuple[int, Tensor]:
            return k, torch.full((3,), float(k)) + torch.rand(3)

    run = attach(nn.Linear(3, 1), Jittered(), augmentations=3, noise_multiplier=0.0, loss_reduction="sum")
    twin = copy.deepcopy(run.model)
    for index, x in run.loader:
        assert index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert len(x.unique(dim=0)) == 12
        grads = unit_grads(twin, lambda net, b: net(b[1]).square().sum(1), (index, x), index.tolist(), "mean")
        run.model(x).square().sum().backward()
        run.optimizer.step()
    total = {k: torch.stack([clip(g, 1.0)[k] for g in grads]).sum(0) for k in grads[0]}
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p, twin.get_parameter(name) - total[name] / 4)
    assert run.engine.sample_rate == 1.0


def test_augmentations_of_units_rows() -> None:
    run = attach(mlp(), Owned(), 4, privacy_unit=OWNERS, augmentations=2, max_rows_per_unit=1)
    [rows] = served(run)
    assert len(rows) == 8
    assert rows[::2] == rows[1::2]


def test_views_in_a_dimension_of_their_own() -> None:
    """[n, k, ...] batches: flattened inside the model, where the order is measured, or one forward for each view."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    x, y = torch.randn(6, 3, 4), torch.randn(6, 1)
    inside, forwards = attach(Views(), TensorDataset(x, y)), attach(mlp(), TensorDataset(x, y))
    outputs = lambda model, v: model(v).square().mean()  # noqa: E731
    for v, _ in inside.loader:
        inside.model.body(v.flatten(0, 1)).detach()  # looks only
        outputs(inside.model, v).backward()
        inside.optimizer.step()
    for v, _ in forwards.loader:
        (sum(forwards.model(v[:, k]) for k in range(3)) / 3).square().mean().backward()  # type: ignore[union-attr]
        forwards.optimizer.step()
    torch.testing.assert_close(weights(inside.model), weights(forwards.model))


# --- groups ---


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_group_privacy(accountant: str) -> None:
    """ε for k units that come and go together: the accountants' `GroupOf`, of everything in the ledger."""
    run = attach(mlp(), data(100), 10, noise_multiplier=1.2, accountant=accountant)
    assert run.engine.get_epsilon(1e-5, group_size=3) == 0.0
    with drawing(*[[0, 1]] * 7):
        for batch in run.loader:
            work(run, batch)
    one, three = run.engine.get_epsilon(1e-5), run.engine.get_epsilon(1e-5, group_size=3)
    assert run.engine.get_epsilon(1e-5, group_size=1) == one
    assert three == PLDAccountant().compose(GroupOf(3, PoissonSampled(0.1, Gaussian(1.2))), 7).epsilon(1e-5)
    assert three > 2 * one
    for bad in (0, -1, 2.0, "2", True, None):
        with pytest.raises(dpkit.ConfigurationError, match="group_size"):
            run.engine.get_epsilon(1e-5, group_size=bad)  # type: ignore[arg-type]


# --- not finite ---


def test_a_unit_with_a_row_that_is_not_finite_is_left_out_whole() -> None:
    """The step is that of the other units."""
    x, y = data().tensors
    spoilt = x.clone()
    spoilt[4] = float("nan")
    run = attach(mlp(), TensorDataset(spoilt, y), 4, privacy_unit=OWNERS)
    other = attach(mlp(), TensorDataset(x, y), 4, privacy_unit=OWNERS)
    with drawing([0, 1, 2, 3]):
        for batch in run.loader:
            work(run, batch)
    with drawing([0, 1, 3]):
        for batch in other.loader:
            work(other, batch)
    assert run.engine.nonfinite_records == 1
    torch.testing.assert_close(weights(run.model), weights(other.model))


# --- refusals ---


def sort_by_length(rows: list[Tensor]) -> Tensor:
    return pad_sequence(sorted(rows, key=len, reverse=True), batch_first=True)


def test_collate_that_reorders_rows() -> None:
    """Rows would be clipped as another unit's."""
    lengths = [torch.arange(1.0, 2.0 + k % 5) for k in range(8)]
    with pytest.raises(dpkit.SamplingError, match="another order"):
        attach(mlp(), lengths, 4, privacy_unit=OWNERS, loader={"collate_fn": sort_by_length})  # type: ignore[arg-type]
    with pytest.raises(dpkit.SamplingError, match="another order"):
        attach(mlp(), lengths, 4, augmentations=2, loader={"collate_fn": sort_by_length})  # type: ignore[arg-type]
    attach(mlp(), lengths, 4, loader={"collate_fn": sort_by_length})  # type: ignore[arg-type]

    def columns(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        return pad_sequence(sorted(rows, key=len)), torch.ones(2, len(lengths))

    with pytest.raises(dpkit.SamplingError, match="another order"):  # [t, n]
        attach(mlp(), lengths, 4, privacy_unit=OWNERS, loader={"collate_fn": columns}, batch_first=False)  # type: ignore[arg-type]

    def kept_columns(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        return pad_sequence(rows), torch.arange(2.0 * len(lengths)).view(2, -1)

    attach(mlp(), lengths, 4, privacy_unit=OWNERS, loader={"collate_fn": kept_columns}, batch_first=False)  # type: ignore[arg-type]

    def kept(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        return pad_sequence(rows, batch_first=True), torch.rand(len(rows))

    attach(mlp(), lengths, 4, privacy_unit=OWNERS, loader={"collate_fn": kept})  # type: ignore[arg-type]


def test_looking_at_collate_draws_nothing_from_the_global_generator() -> None:
    def drawing_collate(rows: list[Any]) -> Any:
        return torch.rand(len(rows))

    state = torch.get_rng_state()
    attach(mlp(), data(), 4, privacy_unit=OWNERS, loader={"collate_fn": drawing_collate})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"privacy_unit": OWNERS[:7]}, "7 ids, the data set 8 rows"),
        ({"privacy_unit": [*OWNERS[:7], None]}, "row 7 has the unit None"),
        ({"privacy_unit": [float("nan"), *range(7)]}, "row 0 has the unit nan"),
        ({"privacy_unit": torch.tensor([0.0, float("nan")] * 4)}, "row 1 has the unit nan"),
        ({"privacy_unit": [{} for _ in OWNERS]}, "row 0 is a dict"),
        ({"privacy_unit": lambda row: None}, "row 0 has the unit None"),
        ({"privacy_unit": "user"}, "row 0 of the data set has no column 'user'"),
        ({"privacy_unit": 2}, "row 0 of the data set has no column 2"),
        ({"privacy_unit": 1.5}, "privacy_unit is a float"),
        ({"privacy_unit": True}, "privacy_unit is a bool"),
        ({"privacy_unit": dict.fromkeys(range(8))}, "privacy_unit is a dict"),
        ({"privacy_unit": b"ccabbbad"}, "privacy_unit is a bytes"),
        ({"privacy_unit": torch.tensor(3)}, "0 ids"),
        ({"privacy_unit": OWNERS, "unit_reduction": "max"}, "unit_reduction = 'max'"),
        ({"privacy_unit": OWNERS, "max_rows_per_unit": 0}, "max_rows_per_unit = 0"),
        ({"max_rows_per_unit": 2}, "max_rows_per_unit without privacy_unit"),
        ({"augmentations": 0}, "augmentations = 0"),
        ({"augmentations": 2.0}, "augmentations = 2.0"),
        ({"augmentations": 4, "max_physical_batch_size": 3}, "a unit brings 4 rows, a physical batch holds 3"),
        ({"privacy_unit": OWNERS, "max_physical_batch_size": 2}, "a unit brings 3 rows, a physical batch holds 2"),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], words: str) -> None:
    model = mlp()
    with pytest.raises(dpkit.ConfigurationError) as caught:
        attach(model, batch_size=2, **options)
    assert words in str(caught.value)
    assert caught.value.why
    assert caught.value.cure
    attach(model)  # nothing was left behind


def test_batches_larger_than_the_units() -> None:
    with pytest.raises(dpkit.SamplingError, match="batch_size 5 exceeds the 4 units"):
        attach(mlp(), batch_size=5, privacy_unit=OWNERS)


def test_a_collate_that_makes_other_rows_than_it_was_given() -> None:
    """More rows than were drawn are nobody's."""

    def doubled(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(v) for v in zip(*rows, strict=True))
        return torch.cat([x, x]), torch.cat([y, y])

    run = attach(mlp(), batch_size=4, privacy_unit=OWNERS, loader={"collate_fn": doubled})
    batch = next(iter(run.loader))
    squared_loss(run.model, batch).backward()
    with pytest.raises(dpkit.NonPrivateGradientError, match=r"\[16\].* 8 records"):
        run.optimizer.step()


def test_workers_and_empty_draws() -> None:
    """Workers run ahead; empty draws of units are steps."""
    run = attach(mlp(), Owned(), 2, privacy_unit=OWNERS, loader={"num_workers": 2}, noise_multiplier=1.0)
    with drawing([], [2, 0], [], [3], []):
        assert served(run) == [[3, 4, 5, 0, 2], [7]]
    assert run.engine.accountant.ledger == ((PoissonSampled(0.5, Gaussian(1.0)), 5),)


# --- the values themselves ---


def test_padding_is_bounded() -> None:
    """One unit of 1,000 rows among units of one: norms are computed from less than twice the rows there are."""
    seen = 0

    class Counting(dpkit.Dense):
        def take(self, records: Tensor) -> dpkit.Dense:
            nonlocal seen
            seen += len(records)
            return super().take(records)

    units = Units((1,) * 500 + (1000,) + (3, 5, 7) * 50)
    value = torch.randn(units.rows, 2, dtype=torch.float64)
    squares = units.sq_norm(Counting(value))
    assert seen < 2 * units.rows
    expected = torch.stack([part.mean(0).square().sum() for part in value.split(list(units.sizes))])
    torch.testing.assert_close(squares, expected)


def test_index_of_records_costs_nothing() -> None:
    """A million records need no table of their rows."""
    index = UnitIndex(1_000_000)
    assert index.rows is None
    assert index.most == 1
    assert index.drawn(range(3), torch.Generator()) == [[0], [1], [2]]


def test_loader_of_units_is_a_data_loader() -> None:
    run = attach(mlp(), Owned(), 2, privacy_unit=OWNERS)
    assert isinstance(run.loader, DataLoader)
