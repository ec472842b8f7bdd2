"""Rows that no longer tell whose they are: by coincidence, by the data's own choice, behind a zero.

Each test is a way to credit a record's gradient to another one, with sums, shapes and first batches that look right.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import TensorDataset

import dpkit
from dpkit.probe import opened
from dpkit.records import Folded, Records, place
from tests import models as m
from tests.cases import CASES
from tests.oracle import clipped_sum, norm
from tests.stepping import private_step
from tests.training import attach, drawing


class OneExpert(nn.Module):
    """An expert that sees the tokens whose first feature is positive, from all records in one list."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.expert, self.head = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = (rows[:, 0] > 0).nonzero()[:, 0]
        y = torch.zeros_like(rows).index_add(0, chosen, torch.tanh(self.expert(rows[chosen])))
        return self.head(y.view(x.shape)).mean(1)


class Pick(nn.Module):
    """Two tokens of each record, by a mask; with other masks of as many tokens, rows change hands."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(width, width), nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x[x[..., 0] > 0])).view(len(x), -1))


def tokens(counts: list[int], length: int = 4, seed: int = 0) -> Tensor:
    """[n, t, 4]: in record i the first feature of counts[i] tokens is positive."""
    x = torch.randn(len(counts), length, 4, generator=torch.Generator().manual_seed(seed))
    for i, count in enumerate(counts):
        x[i, :, 0] = torch.where(torch.arange(length) < count, x[i, :, 0].abs(), -x[i, :, 0].abs())
    return x


def losses(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0])[:, 0] - batch[1]).square()


def data(counts: list[int]) -> TensorDataset:
    return TensorDataset(tokens(counts), torch.linspace(-1, 1, len(counts)))


def steps(model: nn.Module, dataset: TensorDataset, *draws: list[int]) -> None:
    run = attach(model, dataset)
    with drawing(*draws):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            losses(run.model, (x, y)).mean().backward()
            run.optimizer.step()


@pytest.mark.parametrize("counts", [[2, 2, 2, 2], [1, 3, 0, 2], [1, 3, 2, 2], [0, 0, 0, 0], [4, 4, 4, 4]])
def test_rows_chosen_by_the_data(counts: list[int]) -> None:
    """[1, 3, 2, 2]: leaving the last record out takes 8 rows to 6, exactly as if each record had two of them."""
    model, batch = OneExpert().double(), (tokens(counts).double(), torch.linspace(-1, 1, 4).double())
    total = clipped_sum(model, losses, batch, 4, 0.3)
    step = private_step(model, losses, batch, 0.3, loss_reduction="sum")
    assert norm({k: 4 * step[k] + total[k] for k in total}) <= 1e-10 * 0.3  # where nothing is chosen the records cancel


def test_rows_that_change_hands_later() -> None:
    """The first batch has two chosen tokens in every record, the second as many in all, but not of each."""
    with pytest.raises(dpkit.CoupledRecordsError, match="as the data of this batch say"):
        steps(Pick(), data([2, 2, 2, 2, 1, 3]), [0, 1, 2, 3], [0, 1, 4, 5])
    steps(Pick(), data([2, 2, 2, 2, 2, 2]), [0, 1, 2, 3], [0, 1, 4, 5])


def test_rows_of_another_number_later() -> None:
    """More rows than in the plan, and a move that the plan does not have."""
    with pytest.raises((dpkit.CoupledRecordsError, dpkit.UncoveredParameterError, RuntimeError)):
        steps(Pick(), data([2, 2, 2, 2, 4, 4]), [0, 1, 2, 3], [4, 5, 0, 1])


@pytest.mark.parametrize("gate", [0.0, 0.3, 1e-4, -1e-6])
def test_coupling_behind_a_gate_that_starts_at_zero(gate: float) -> None:
    """The mean over the batch enters with weight 0, or with next to nothing (LayerScale): outputs and gradients look
    independent until the gate opens."""

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
            self.gate = nn.Parameter(torch.full((1,), gate))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.layer(x))
            return self.head(y + self.gate * y.mean(0)).mean(1)

    with pytest.raises(dpkit.CoupledRecordsError, match="left out"):
        steps(Leaky(), data([1, 2, 3, 4]), [0, 1, 2, 3])


def test_wrong_rule_behind_a_gate_that_starts_at_zero() -> None:
    """On the first batch the branch has no gradient to compare with; the proof must not be taken for given."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    @dpkit.register_rule(Scale)
    def scale(layer: Scale, x: Tensor, grad: Tensor) -> Any:
        yield layer.weight, dpkit.Dense(0.5 * (grad * x).flatten(1, -2).sum(1))

    try:
        model = m.Gated()
        model.branch = nn.Sequential(nn.Linear(4, 4), Scale())
        with pytest.raises(dpkit.GradientMismatchError, match="weight"):
            steps(
                nn.Sequential(nn.Linear(4, 3), model, nn.Linear(2, 1), nn.Flatten(), nn.Linear(4, 1)),
                data([1, 2, 3, 4]),
                [0, 1, 2, 3],
            )
    finally:
        dpkit.unregister_rule(Scale)


def test_zero_gradients_prove_nothing() -> None:
    """A parameter is compared with autograd until its gradient is not zero."""
    model = nn.Sequential(nn.Linear(3, 4), m.LayerScale(4), nn.Linear(4, 1))
    with torch.no_grad():
        model[2].weight.zero_()
    run = attach(model, TensorDataset(torch.randn(6, 3), torch.randn(6, 1)))
    seen = []
    for _ in range(2):
        for x, y in run.loader:
            run.optimizer.zero_grad()
            (run.model(x) - y).square().mean().backward()
            run.optimizer.step()
            seen.append(model[0].weight in run.engine._attached().tape.proven)
    assert seen == [False, True]


@pytest.mark.parametrize("reset", [False, True])
def test_shaken_weights_are_put_back(reset: bool) -> None:
    """Values, identity and version of every parameter are as before; autocast has not kept the shaken ones."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = [(p, p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    x = torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.Sequential(*(nn.Linear(4, 4) for _ in range(1)))  # another model: its cache is no concern
        del expected
        with opened(model):
            shaken = model(x)
            assert not any(torch.equal(p, value) for p, *_, value in before)
            if reset:
                model.zero_grad()
        after = model(x)
    assert not torch.equal(shaken, after)
    for p, pointer, version, value in before:
        assert (p.data_ptr(), p._version) == (pointer, version)
        assert torch.equal(p, value)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), after, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["experts", "expert-list", "shuffled", "unpadded", "looping"])
def test_one_record_at_a_time_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is slow, so the user hears of it once, with the reason; a model that does not need it says nothing."""
    case = next(c for c in CASES if c.name == name)
    with caplog.at_level(logging.WARNING, logger="dpkit"):
        private_step(case.model(), case.losses, case.records(), 1.0)
    assert "one record at a time" in caplog.text
    caplog.clear()
    private_step(
        m.Flattened(), case.losses if name in ("experts", "expert-list", "shuffled") else losses_of_two, flat(), 1.0
    )
    assert not caplog.text


def flat() -> Any:
    return torch.randn(5, 6, 3), torch.randn(5)


def losses_of_two(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).flatten(1).sum(1) - batch[1]).square()


class Ragged(nn.Module):
    """Adds positions to each record's own tokens, and pads to the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        kept = [one[~hidden] + self.table[: int((~hidden).sum())] for one, hidden in zip(x, padding, strict=True)]
        return nn.utils.rnn.pad_sequence(kept, batch_first=True)


class AroundRagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ragged, self.head = Ragged(), nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.ragged(x, padding)).sum(1)


@pytest.mark.parametrize("lengths", [[4, 4, 2, 4, 4, 4], [4, 4, 4, 4, 4, 2]])
def test_outputs_of_several_sizes(lengths: list[int]) -> None:
    """Results of several lengths cannot be put together. On the first batch a wider module is taken; later it is an
    error that says so."""
    padding = torch.arange(4) >= torch.tensor(lengths)[:, None]
    dataset = TensorDataset(tokens([1, 2, 3, 4, 1, 1]), padding, torch.randn(6, 1))
    run = attach(AroundRagged(), dataset)

    def fit() -> None:
        for x, hidden, y in run.loader:
            (run.model(x, hidden) - y).square().mean().backward()
            run.optimizer.step()

    with drawing([0, 1, 2, 3], [0, 1, 4, 5]):
        if lengths[2] == 2:
            fit()
        else:
            with pytest.raises(dpkit.UncoveredParameterError, match="another size for each"):
                fit()


class Sorted(nn.Module):
    """Sorts its records by length for a recurrent layer: by torch's own packing, or by hand."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer, self.head = how, nn.GRU(4, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[..., 0] > 0).sum(1).clamp(min=1)
        if self.how == "packed":
            return self.head(self.layer(pack_padded_sequence(x, lengths, True, enforce_sorted=False))[1][0])
        order = lengths.argsort(descending=True, stable=True)
        if self.how == "moved":  # no parameter meets them in between
            return self.head(self.layer(x[order][order.argsort()])[1][0])
        last = self.layer(pack_padded_sequence(x[order], lengths[order], True))[1][0]
        return self.head(last[order.argsort()])


@pytest.mark.parametrize("how", ["packed", "moved", "by hand"])
@pytest.mark.parametrize("counts", [[4, 3, 2, 1], [1, 4, 2, 3]])
def test_records_sorted_by_their_data(how: str, counts: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """What torch's packing does is followed; by hand, a parameter meets other records than its place says."""
    model, batch = Sorted(how).double(), (tokens(counts).double(), torch.linspace(-1, 1, 4).double())
    total = clipped_sum(model, losses, batch, 4, 0.3)
    step = private_step(model, losses, batch, 0.3, loss_reduction="sum")
    assert norm({k: 4 * step[k] + total[k] for k in total}) <= 1e-10 * norm(total)
    assert ("one record at a time" in caplog.text) == (how == "by hand" and counts[0] == 1)


def test_records_sorted_by_their_data_later() -> None:
    """The first batch happens to be in order, the second is not."""
    dataset = data([4, 3, 2, 1, 2, 4])
    for how in ("packed", "moved"):
        steps(Sorted(how), dataset, [0, 1, 2, 3], [2, 3, 4, 5])
    with pytest.raises(dpkit.CoupledRecordsError, match="stand in another order"):
        steps(Sorted("by hand"), dataset, [0, 1, 2, 3], [2, 3, 4, 5])


def test_records_sorted_twice() -> None:
    """By hand, and by the packing: the layer puts back what the packing did, and no more."""

    class Twice(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            lengths = (x[..., 0] > 0).sum(1).clamp(min=1)
            order = lengths.argsort(stable=True)
            packed = pack_padded_sequence(x[order], lengths[order], True, enforce_sorted=False)
            return self.head(self.layer(packed)[1][0][order.argsort()])

    with pytest.raises(dpkit.CoupledRecordsError, match="stand in another order"):
        steps(Twice("twice"), data([1, 2, 3, 4, 1, 3]), [0, 1, 2, 3], [2, 3, 4, 5])


class Moving(nn.Module):
    """Adds chosen rows to the rows ``shift`` further on: first to themselves, later to those of the next record."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head, self.shift = nn.Parameter(torch.ones(4)), nn.Linear(4, 1), [0]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1) * self.scale
        chosen = (x.flatten(0, 1)[:, 0] > 0).nonzero()[:, 0]
        rows = rows.index_add(0, (chosen + self.shift[0]) % len(rows), rows[chosen])
        return self.head(torch.tanh(rows).view(x.shape)).mean(1)


def test_chosen_rows_that_go_elsewhere_later() -> None:
    """On the first batch they stay with their records, in numbers that are not the same for all: not to be trusted."""
    model, dataset = Moving(), data([1, 3, 0, 2])
    run = attach(model, dataset, loss_reduction="sum", max_grad_norm=0.3)
    for shift in (0, 4):
        model.shift[0] = shift  # no flag, after which it would be examined anew
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        oracle = copy.deepcopy(model)
        total = clipped_sum(oracle, losses, dataset.tensors, 4, 0.3)  # each record by itself
        for batch in run.loader:
            run.optimizer.zero_grad()
            losses(run.model, batch).sum().backward()
            run.optimizer.step()
        moved = {k: (before[k] - p.detach()) * 4 for k, p in model.named_parameters()}
        assert norm({k: moved[k] - total[k] for k in total}) <= 1e-4 * norm(total)


class Positional(nn.Module):
    """Adds one to whatever stands first: on one record at a time that is everybody."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = m.Shuffled(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x[..., :3])
        first = (torch.arange(len(y)) == 0).to(y)[:, None]
        z = y.flatten()[y.detach().flatten().argsort().argsort().argsort()]  # by the data: not to be followed
        return (z - z).view(y.shape) + y + first


def test_another_function_on_one_record() -> None:
    with pytest.raises(dpkit.PrivacyError):
        steps(Positional(), data([1, 2, 3, 4]), [0, 1, 2, 3])


class Counting(m.Shuffled):
    """Rows in an order of its own, and how many inputs are large: no record's value."""

    def __init__(self) -> None:
        super().__init__(4)
        self.embed = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), (x[:, 0, 1] > 50).sum()


@pytest.mark.parametrize("large", [0.0, 100.0])
def test_outputs_of_nobody(large: float) -> None:
    """The same for every record on the first batch, and not on the second."""
    dataset = data([1, 2, 3, 4])
    run = attach(Counting(), dataset)

    def fit() -> None:
        for k, (x, y) in enumerate(run.loader):
            x[0, 0, 1] += large * k
            (run.model(x)[0] - y[:, None]).square().mean().backward()
            run.optimizer.step()

    with drawing([0, 1, 2, 3], [0, 1, 2, 3]):
        if large:
            with pytest.raises(dpkit.CoupledRecordsError, match="no dimension of records"):
                fit()
        else:
            fit()


def test_hook_after_the_call_was_split() -> None:
    """A forward pre-hook of the user's that is registered later sees record 0 alone: refused where it changes it."""
    model = OneExpert()
    run = attach(model, data([1, 3, 0, 2]))
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x, _ = next(iter(run.loader))
    with pytest.raises(dpkit.UncoveredParameterError, match="pre-hook"):
        run.model(x)


# --- where the records are, from two shapes ---


@pytest.mark.parametrize(
    ("full", "part", "expected"),
    [
        ((5, 3), (4, 3), Records(0)),
        ((3, 5), (3, 4), Records(1)),
        ((5, 5), (5, 5), None),  # positions as many as records
        ((5, 7), (4, 6), Records(0)),  # the longest record was left out
        ((7, 5), (6, 4), Records(1)),
        ((5, 5), (4, 4), Folded(0, 1.0)),  # which of the two?
        ((5, 5, 7), (4, 4, 6), Folded(0, 1.0)),
        ((11, 7), (9, 6), Folded(0, 11 / 5)),  # a packed list
        ((0, 3), (0, 3), None),
    ],
)
def test_place(full: tuple[int, ...], part: tuple[int, ...], expected: Any) -> None:
    """Told by what shrank; what could be two things is neither."""
    assert place(full, part, 5, 4) == expected


class Cut(nn.Module):
    """Cuts its sequences to the batch's longest, then works on time first or on a packed list beside them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer, self.scale, self.head = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 1)
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(lengths.max())
        x = x[:, :longest]
        y = self.layer(x.transpose(0, 1)).transpose(0, 1) if self.how == "time first" else self.layer(x)
        if self.how == "packed":
            kept = torch.arange(longest) < lengths[:, None]
            rows = y[kept] * self.scale
            y = torch.zeros_like(y).masked_scatter(kept[..., None], rows)
        y = torch.tanh(y * self.scale + self.table[:longest])
        return self.head(y).sum(1)


def test_coupling_by_the_longest_record() -> None:
    """The number of padded positions is that of the longest record, and the last one, which is left out, is short."""

    class Longest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x[:, : int((x[..., 0] > 0).sum(1).max())])).mean(1)

    with pytest.raises(dpkit.CoupledRecordsError, match="left out"):
        steps(Longest(), data([4, 3, 2, 1]), [0, 1, 2, 3])


@pytest.mark.parametrize("how", ["plain", "time first", "packed"])
@pytest.mark.parametrize(
    "lengths", [[3, 2, 4, 1, 5], [5, 5, 5, 5, 5], [4, 4, 4, 4, 5], [1, 2, 3, 4, 6], [5, 4, 3, 2, 1]]
)
def test_lengths_that_shrink_with_the_records(how: str, lengths: list[int]) -> None:
    """The longest record is the one left out, and lengths fall from n to n - 1 as the records do: exact, or refused."""
    generator = torch.Generator().manual_seed(0)
    batch = (torch.randn(5, 8, 3, generator=generator).double(), torch.tensor(lengths), torch.randn(5).double())
    model = Cut(how).double()

    def of(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0], batch[1])[:, 0] - batch[2]).square()

    total = clipped_sum(model, of, batch, 5, 0.3)
    try:
        step = private_step(model, of, batch, 0.3, loss_reduction="sum")
    except dpkit.PrivacyError as refusal:
        assert isinstance(refusal, dpkit.FoldedBatchError | dpkit.CoupledRecordsError)  # noqa: PT017
        return
    assert norm({k: 5 * step[k] + total[k] for k in total}) <= 1e-10 * norm(total)
