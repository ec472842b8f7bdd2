"""A run that is saved and resumed, anywhere, is the uninterrupted run bit for bit; another run's state is refused."""

from __future__ import annotations

import copy
import enum
import hashlib
import io
import os
import pickle
import random
import stat
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpkit
from dpkit import checkpoint as files
from dpkit.state import plain
from tests.lives import Life, Noisy, begin
from tests.test_refusals import refused

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"max_physical_batch_size": 2},
    "fixed, shuffled": {"poisson_sampling": False, "loader": {"shuffle": True}},
    "fixed, in parts": {"poisson_sampling": False, "batch_size": 5, "max_physical_batch_size": 2},
    "often nobody": {"batch_size": 1},
    "units": {"privacy_unit": [k // 2 for k in range(20)], "max_rows_per_unit": 1, "max_physical_batch_size": 2},
    "learned C": {"clipping": dpkit.AdaptiveClipping(count_noise=6.0), "max_physical_batch_size": 2},
    "histogram": {"clipping": dpkit.HistogramClipping(count_noise=9.0), "max_physical_batch_size": 2},
    "per layer": {"clipping": "per_layer", "kind": torch.optim.AdamW},
}


def end(life: Life) -> tuple[Tensor, float, int]:
    return life.weights(), life.engine.get_epsilon(), life.steps


def assert_same(one: Life, other: Life) -> None:
    assert torch.equal(one.weights(), other.weights())
    assert one.engine.get_epsilon() == other.engine.get_epsilon()
    assert one.engine.accountant.ledger == other.engine.accountant.ledger
    assert one.steps == other.steps
    for a, b in zip(one.optimizer.param_groups, other.optimizer.param_groups, strict=True):
        assert a["lr"] == b["lr"]


def test_chance_is_everywhere() -> None:
    """The run that these tests repeat does depend on every generator."""
    whole = begin().train()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        life = begin()
        seed(1)
        assert not torch.equal(life.train().weights(), whole.weights())


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_after_any_batch(setting: str, tmp_path: Path) -> None:
    """Saved after every single batch: some ten of these checkpoints, all over the run, lead to the same end."""
    options = SETTINGS[setting]
    saved: list[Path] = []

    def save(life: Life) -> None:
        saved.append(tmp_path / str(life.steps))
        life.save(saved[-1])

    whole = begin(**options).train(save)
    assert_same(whole, begin(**options).train())  # saving disturbs nothing
    assert len(saved) > 10
    for path in saved[:: max(1, len(saved) // 10)]:
        life = begin(**options)
        life.load(path)
        assert_same(life.train(), whole)


@pytest.mark.parametrize("moment", ["drawn", "forward", "backward"])
def test_saved_with_a_batch_in_hand(moment: str, tmp_path: Path) -> None:
    """A batch that has not had its step is served again, with the chance that it had."""
    options = {"max_physical_batch_size": 2}
    whole = begin(**options).train()
    for at in range(1, 9):
        life = begin(**options)
        for x, y in life.loader:
            life.optimizer.zero_grad()
            if life.steps + 1 == at and moment == "drawn":
                life.save(tmp_path / "c")
            loss = life.loss(x, y)
            if life.steps + 1 == at and moment == "forward":
                life.save(tmp_path / "c")
            loss.backward()
            if life.steps + 1 == at and moment == "backward":
                life.save(tmp_path / "c")
            life.optimizer.step()
            life.scheduler.step()
            life.steps += 1
            if life.steps == at:
                break
        resumed = begin(**options)
        resumed.load(tmp_path / "c")
        assert resumed.steps == at - 1
        assert_same(resumed.train(), whole)


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_workers_run_ahead(workers: dict[str, Any], tmp_path: Path) -> None:
    """What is saved is what was served, not what the workers have fetched in advance; their chance repeats with it.

    Persistent workers keep chance of their own from pass to pass: with them, for records that draw nothing.
    """

    class Plain(Noisy):
        def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
            return self.x[k], self.y[k]

    options = {
        "dataset": Plain() if "persistent_workers" in workers else Noisy(),
        "loader": workers,
        "max_physical_batch_size": 3,
    }
    whole = begin(**options).train(lambda life: life.save(tmp_path / str(life.steps)))
    for at in (1, 2, 9):
        resumed = begin(**options)
        resumed.load(tmp_path / str(at))
        assert_same(resumed.train(), whole)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_workers_draw_differently(tmp_path: Path) -> None:
    """No two batches have the same chance, whichever worker fetched them, in whichever pass; the user's init runs."""

    class Chance(Noisy):
        def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
            drawn = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(())), 0.0])  # noqa: NPY002
            return drawn, self.y[k]

    begun = tmp_path / "begun"

    def init(worker: int) -> None:
        with begun.open("a") as file:
            file.write(f"{worker}\n")

    seen: list[Tensor] = []
    life = begin(dataset=Chance(), loader={"num_workers": 2, "worker_init_fn": init})
    for _ in range(2):
        for x, _y in life.loader:
            seen += list(x[:, :3])
            life.optimizer.step()
    drawn = torch.stack(seen)
    assert len(drawn) > 20
    for column in drawn.T:
        assert len(column.unique()) == len(column)
    assert sorted(begun.read_text().split()) == ["0", "0", "1", "1"]


def test_between_passes_and_left_passes(tmp_path: Path) -> None:
    """After a pass, the next one begins; a pass that was left by `break` does not go on."""

    def two_passes(life: Life, save: bool) -> Life:
        for k, (x, y) in enumerate(life.loader):
            life.loss(x, y).backward()
            life.optimizer.step()
            if k == 1:
                break
        if save:
            life.save(tmp_path / "left")
        for x, y in life.loader:
            life.loss(x, y).backward()
            life.optimizer.step()
        if save:
            life.save(tmp_path / "over")
        return life

    options = {"max_physical_batch_size": 2}
    assert two_passes(begin(**options), save=True).engine.completed_passes == 1
    whole = two_passes(begin(**options), save=False).train()
    for name, passes in (("left", 0), ("over", 1)):
        life = begin(**options)
        life.load(tmp_path / name)
        assert life.engine.completed_passes == passes
        if name == "left":
            for x, y in life.loader:
                life.loss(x, y).backward()
                life.optimizer.step()
        assert_same(life.train(), whole)


def test_saved_again_before_going_on(tmp_path: Path) -> None:
    """Load, save at once, load that."""
    whole = begin().train(lambda life: life.save(tmp_path / str(life.steps)))
    once = begin()
    once.load(tmp_path / "4")
    once.save(tmp_path / "again")
    twice = begin()
    twice.load(tmp_path / "again")
    assert_same(twice.train(), whole)


def test_saved_again_in_the_middle_of_a_logical_batch(tmp_path: Path) -> None:
    """Its parts stay cut as they were when its sum was begun, whatever size another process finds: no record twice."""
    options: dict[str, Any] = {"max_physical_batch_size": "auto", "batch_size": 20, "dataset": Noisy(40)}
    begin(**options).train(lambda life: life.save(tmp_path / "c") or True)
    life = begin(**options)
    life.load(tmp_path / "c")
    life.engine._loader._batches.given = lambda: 3
    life.save(tmp_path / "again")
    states = [files.load(tmp_path / name)["state"]["loader"] for name in ("c", "again")]
    assert states[0]["place"] == states[1]["place"] == [0, 1]
    assert states[0]["limit"] == states[1]["limit"] == 8


def numbers(life: Life, steps: int | None = None) -> list[int]:
    """Train for so many steps, or the rest of the pass; the records that were served, by their number."""
    seen: list[int] = []
    for k, (x, number) in enumerate(life.loader, 1):
        life.optimizer.zero_grad()
        life.loss(x, number[:, None].float()).backward()
        life.optimizer.step()
        seen += number.tolist()
        if k == steps:
            life.save(Path(os.environ["CHECKPOINT"]))
            break
    return seen


class Numbered(Noisy):
    """Records that say which they are."""

    def __init__(self, order: list[int] | None = None) -> None:
        super().__init__()
        self.order = order or list(range(len(self)))

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.x[self.order[k]], torch.tensor(self.order[k])


ALL = list(range(20))
AHEAD = {"num_workers": 2}


@pytest.mark.parametrize(
    ("saved", "loaded", "passes"),
    [({}, AHEAD, 0), (AHEAD, {}, 0), (*[{"num_workers": 1, "persistent_workers": True}] * 2, 1)],
)
@pytest.mark.parametrize("seeds", [True, False])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_shuffled_pass_takes_every_record_once(
    seeds: bool, saved: dict[str, Any], loaded: dict[str, Any], passes: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever workers the two lives have: a pass of fixed batches is paid for once."""
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "c"))
    options: dict[str, Any] = {"dataset": Numbered(), "poisson_sampling": False, "seeds": seeds}
    life = begin(**options, loader={"shuffle": True, **saved})
    for _ in range(passes):
        assert sorted(numbers(life)) == ALL
    served = numbers(life, 2)
    other = begin(**options, loader={"shuffle": True, **loaded})
    other.load(tmp_path / "c")
    assert sorted(served + numbers(other)) == ALL
    assert sum(n for _, n in other.engine.accountant.ledger) == passes + 1


@pytest.mark.parametrize("loader", [{"shuffle": False}, {"generator": torch.Generator()}])
def test_a_pass_in_another_order_does_not_go_on(
    loader: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record would be in it twice; without replay the rest is another pass, and paid for."""
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "c"))
    options: dict[str, Any] = {"dataset": Numbered(), "poisson_sampling": False, "seeds": False}
    numbers(begin(**options, loader={"shuffle": True}), 2)
    life = begin(**options, loader={"shuffle": True, **loader})
    life.load(tmp_path / "c")
    life.save(tmp_path / "again")
    life = begin(**options, loader={"shuffle": True, **loader})
    life.load(tmp_path / "again")
    with refused(dpkit.CheckpointError, "another order", "replay=False"):
        numbers(life)
    assert sorted(numbers(life)) == ALL  # a pass of its own
    assert sum(n for _, n in life.engine.accountant.ledger) == 2
    life = begin(**options, loader={"shuffle": True, **loader})
    life.load(tmp_path / "c", replay=False)
    assert len(numbers(life)) == 12
    assert sum(n for _, n in life.engine.accountant.ledger) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"poisson_sampling": False},
        {"poisson_sampling": False, "noise": dpkit.BufferedNoise(2)},
        {"noise": dpkit.BandedNoise(2)},
        {},
    ],
)
def test_data_in_another_order(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records take turns by their place, they have to keep it. Poisson draws do not ask."""
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "c"))
    numbers(begin(dataset=Numbered(), **options), 2)
    life = begin(dataset=Numbered(ALL[::-1]), **options)
    if options:
        with refused(dpkit.CheckpointError, "data set's row 0"):
            life.load(tmp_path / "c")
    else:
        life.load(tmp_path / "c")
    life = begin(dataset=Numbered(), **options)
    life.load(tmp_path / "c")
    numbers(life)


def test_data_in_another_order_within_a_logical_batch(tmp_path: Path) -> None:
    """A record of the parts that are summed up could be in the others, too: it would be in one sum twice."""
    options: dict[str, Any] = {"max_physical_batch_size": 2, "batch_size": 10}
    for at in (1, 2):
        life = begin(dataset=Numbered(), **options)
        for k, (x, number) in enumerate(life.loader, 1):
            life.loss(x, number[:, None].float()).backward()
            life.optimizer.step()
            if k == at:
                life.save(tmp_path / "c")
                break
        assert life.engine.releases == 0
        other = begin(dataset=Numbered(ALL[::-1]), **options)
        with refused(dpkit.CheckpointError, "data set's row 0"):
            other.load(tmp_path / "c")
        begin(dataset=Numbered(), **options).load(tmp_path / "c")


def test_rows_of_other_units(tmp_path: Path) -> None:
    """As many units, of other rows: ε would be about somebody else."""
    life = begin(privacy_unit=[k // 2 for k in range(20)])
    life.train(lambda life: life.save(tmp_path / "c") or True)
    with refused(dpkit.CheckpointError, "units' rows"):
        begin(privacy_unit=[k % 10 for k in range(20)]).load(tmp_path / "c")
    begin(privacy_unit=[str(k // 2) for k in range(20)]).load(tmp_path / "c")


def test_state_dict_in_memory() -> None:
    """For people with a file format of their own: plain values, safe to read, not tied to the live run."""
    states: list[Any] = []

    def keep(life: Life) -> None:
        states.append((copy.deepcopy(life.engine.state_dict()), life.scheduler.state_dict(), life.steps))

    whole = begin().train(keep)
    state, scheduler, steps = states[5]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    before = copy.deepcopy(state)
    for _ in range(2):  # the state is not used up
        life = begin()
        life.engine.load_state_dict(state)
        life.scheduler.load_state_dict(scheduler)
        life.steps = steps
        assert_same(life.train(), whole)
    assert str(before) == str(state)


def test_schedules_and_freezing_go_on(tmp_path: Path) -> None:
    """σ, C and what is frozen are those of the moment, not those that make_private was given."""

    def change(life: Life) -> None:
        life.engine.noise_multiplier = 1.0 + 0.1 * life.steps
        life.engine.max_grad_norm = 1.0 / life.steps
        life.model[0].requires_grad_(life.steps % 3 == 0)  # type: ignore[operator, index]
        life.save(tmp_path / str(life.steps))

    whole = begin().train(change)
    for at in (1, 3, 6):
        life = begin()
        life.load(tmp_path / str(at))
        assert_same(life.train(change), whole)


def test_a_learning_clipping_is_saved(tmp_path: Path) -> None:
    """A clipping with state_dict and load_state_dict goes on from where it was."""

    class Learning(dpkit.FlatClipping):
        seen = 0

        def weights(self, norms: Tensor, max_grad_norm: float) -> Tensor:
            type(self).seen += len(norms)
            return super().weights(norms, max_grad_norm) / (1 + type(self).seen)

        def state_dict(self) -> dict[str, Any]:
            return {"seen": type(self).seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            type(self).seen = state["seen"]

    whole = begin(clipping=Learning()).train(lambda life: life.save(tmp_path / str(life.steps)))
    Learning.seen = 0
    life = begin(clipping=Learning())
    life.load(tmp_path / "5")
    assert Learning.seen > 0
    assert_same(life.train(), whole)


class Skipping(nn.Sequential):
    """Layers that Python's and numpy's chance may leave out, as LayerDrop does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        if self.training:
            x = self[2](x) if random.random() < 0.5 else x
            x = x * torch.from_numpy(1.0 + np.random.rand(x.shape[1])).float()  # noqa: NPY002
        return self[3](x)


def test_a_model_with_chance_of_its_own(tmp_path: Path) -> None:
    """What is examined anew after a resume takes nothing from the generators that the model draws from."""

    def life() -> Life:
        made = begin()
        made.model.__class__ = Skipping
        return made

    whole = life().train(lambda life: life.save(tmp_path / str(life.steps)))
    for at in (2, 7):
        resumed = life()
        resumed.load(tmp_path / str(at))
        assert_same(resumed.train(), whole)


@pytest.mark.parametrize("options", [{}, {"poisson_sampling": False, "loader": {"shuffle": True}}])
def test_unseeded_runs_go_on_too(options: dict[str, Any], tmp_path: Path) -> None:
    """Generators seeded from the operating system, or drawn from torch's own, are saved as well."""
    whole = begin(seeds=False, **options).train(lambda life: life.save(tmp_path / str(life.steps)))
    for at in (3, 8):
        life = begin(seeds=False, **options)
        life.load(tmp_path / str(at))
        assert_same(life.train(), whole)


# --- other runs are refused, and nothing is loaded ---

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"width": 7}, "model's 0.weight"),
    "another optimizer": ({"kind": torch.optim.AdamW}, "optimizer"),
    "another data set": ({"dataset": Noisy(21)}, "records"),
    "another batch size": ({"batch_size": 5}, "expected_batch_size"),
    "another sigma": ({"noise_multiplier": 1.1}, "noise_multiplier"),
    "another C": ({"max_grad_norm": 2.0}, "max_grad_norm"),
    "another clipping": ({"clipping": "automatic"}, "clipping"),
    "other parts": ({"max_physical_batch_size": 3}, "max_physical_batch_size"),
    "another loss": ({"loss_reduction": "sum"}, "loss_reduction"),
    "other sampling": ({"poisson_sampling": False}, "sampling"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_run_is_refused(other: str, tmp_path: Path) -> None:
    options, word = OTHERS[other]
    begin().train(lambda life: life.steps == 3 and (life.save(tmp_path / "c") or True))
    twin, life = begin(**options).train(), begin(**options)
    with refused(dpkit.CheckpointError, word):
        life.load(tmp_path / "c")
    assert_same(life.train(), twin)


def test_half_loaded_is_not_loaded(tmp_path: Path) -> None:
    """Where a part refuses its state after others took theirs, those get back what they had."""

    class Stubborn:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise ValueError("no")

    saved = begin().train(lambda life: life.steps == 3)
    saved.engine.save_checkpoint(tmp_path / "c", also={"scheduler": saved.scheduler, "stubborn": Stubborn()})
    twin, life = begin().train(), begin()
    with refused(dpkit.CheckpointError, "stubborn", "ValueError: no"):
        life.engine.load_checkpoint(tmp_path / "c", also={"scheduler": life.scheduler, "stubborn": Stubborn()})
    assert_same(life.train(), twin)
    broken = saved.engine.state_dict()
    broken["loader"] = {**broken["loader"], "chance": {}}
    life = begin()
    with refused(dpkit.CheckpointError, "loader", "KeyError"):
        life.engine.load_state_dict(broken)
    assert_same(life.train(), twin)


@pytest.mark.parametrize("junk", [None, {}, [], {"version": 1}, {"version": 2, "configuration": {}}])
def test_junk_is_refused(junk: Any) -> None:
    with refused(dpkit.CheckpointError):
        begin().engine.load_state_dict(junk)


def test_what_belongs_to_the_run_has_to_be_there(tmp_path: Path) -> None:
    life = begin()
    life.save(tmp_path / "c")
    with refused(dpkit.CheckpointError, "scheduler"):
        life.engine.load_checkpoint(tmp_path / "c")
    life.engine.save_checkpoint(tmp_path / "c")
    with refused(dpkit.CheckpointError, "scheduler"):
        life.load(tmp_path / "c")


def test_a_used_engine_forgets_nothing(tmp_path: Path) -> None:
    """It cannot be made to take on another run's count; nor go back in its own without a ledger."""
    begin().train(lambda life: life.steps == 3 and (life.save(tmp_path / "c") or True))
    used = begin().train(lambda life: life.steps == 5)
    with refused(dpkit.CheckpointError, "another run"):
        used.load(tmp_path / "c")
    own = begin().train(lambda life: (life.steps == 3 and life.save(tmp_path / "own")) or life.steps == 5)
    spent = own.engine.get_epsilon()
    with refused(dpkit.CheckpointError, "replay=False"):
        own.load(tmp_path / "own")
    own.load(tmp_path / "own", replay=False)
    assert own.engine.get_epsilon() == spent > 0
    own.train()
    assert sum(n for _, n in own.engine.accountant.ledger) == 15 + 2


def test_without_replay_everything_is_drawn_anew(tmp_path: Path) -> None:
    """Neither draws nor noise of the life before come again, seeds or not."""
    whole = begin(max_physical_batch_size=2).train(
        lambda life: life.steps == 4 and (life.save(tmp_path / "c") or False)
    )
    ends = []
    for _ in range(2):
        life = begin(max_physical_batch_size=2)
        life.load(tmp_path / "c")
        noise, draws = (part.state_dict() for part in (life.engine._attached().noise, life.engine._loader))
        life = begin(max_physical_batch_size=2)
        life.load(tmp_path / "c", replay=False)
        assert not torch.equal(life.engine._attached().noise.state_dict()["given"], noise["given"])
        assert not torch.equal(life.engine._loader.state_dict()["origin"]["draws"], draws["origin"]["draws"])
        ends.append(life.train().weights())
        assert sum(n for _, n in life.engine.accountant.ledger) == 15
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], whole.weights())


def test_without_replay_a_pass_is_paid_for_again(tmp_path: Path) -> None:
    """Fixed batches: records may have been released in this pass already, by the life before."""
    options = {"poisson_sampling": False}
    begin(**options).train(lambda life: life.steps == 2 and (life.save(tmp_path / "c") or True))
    for replay, passes in ((True, 3), (False, 4)):
        life = begin(**options)
        life.load(tmp_path / "c", replay=replay)
        assert sum(n for _, n in life.train().engine.accountant.ledger) == passes


def test_an_older_loop_does_not_go_on(tmp_path: Path) -> None:
    """An iterator from before the loading belongs to another life."""
    life = begin()
    batches = iter(life.loader)
    next(batches)
    life.save(tmp_path / "c")
    life.load(tmp_path / "c")
    with pytest.raises(dpkit.SamplingError):
        next(batches)
    assert_same(life.train(), begin().train())


# --- files ---


def test_only_plain_values(tmp_path: Path) -> None:
    """What would need code to be read back is refused when it is saved, and never run when it is found in a file."""
    life = begin()
    life.save(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    for what, word in ((object(), "object"), ({"a": [1, {2}]}, "set"), (nn.Linear(1, 1), "Linear")):
        with refused(dpkit.CheckpointError, "extra", word):
            life.engine.save_checkpoint(tmp_path / "c", extra=what)
    assert (tmp_path / "c").read_bytes() == before

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "hacked"),))

    payload = io.BytesIO()
    with warnings.catch_warnings():
        torch.save({"state": Evil()}, payload)
    for body in (payload.getvalue(), pickle.dumps(Evil())):
        header = files._header(len(body), hashlib.sha256(body).hexdigest())
        (tmp_path / "evil").write_bytes(header + body)
        with refused(dpkit.CheckpointError):
            life.load(tmp_path / "evil")
    assert not (tmp_path / "hacked").exists()
    extra = {"a": (1, None, 2.5), "b": OrderedDict(c=torch.ones(2)), "d": True}
    life.engine.save_checkpoint(tmp_path / "c", extra=extra)
    back = life.engine.load_checkpoint(tmp_path / "c")
    assert back["a"] == (1, None, 2.5)
    assert torch.equal(back["b"]["c"], torch.ones(2))


class Mode(str, enum.Enum):
    QUICK = "quick"


class Level(enum.IntEnum):
    HIGH = 3


def test_numbers_of_other_kinds(tmp_path: Path) -> None:
    """numpy's floats are floats to isinstance, and code to a reader: a schedule in numpy, a mean in ``extra``."""

    def scheduled() -> Life:
        life = begin()
        life.scheduler = torch.optim.lr_scheduler.LambdaLR(life.optimizer, lambda k: np.exp(-k / 10))
        return life

    life = scheduled()
    whole = life.train(lambda life: life.steps == 4 and life.save(tmp_path / "c"))
    assert type(whole.optimizer.param_groups[0]["lr"]) is np.float64
    again = scheduled()
    again.load(tmp_path / "c")
    assert_same(again.train(), whole)
    life = scheduled()
    extra = {"loss": np.float64(0.1), "name": np.str_("x"), Mode.QUICK: [Mode.QUICK, Level.HIGH], "n": (np.float64(2),)}
    life.engine.save_checkpoint(tmp_path / "c", extra=extra)
    back = scheduled().engine.load_checkpoint(tmp_path / "c")
    assert back == {"loss": 0.1, "name": "x", "quick": ["quick", 3], "n": (2.0,)}
    assert [type(v) for v in (back["loss"], back["name"], *back["quick"], *back["n"])] == [float, str, str, int, float]
    state = OrderedDict(a=np.float64(1.0))
    state._metadata = {"version": 2}  # type: ignore[attr-defined]
    assert vars(plain(state)) == {"_metadata": {"version": 2}}


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    """It holds what would undo the noise."""
    begin().save(tmp_path / "c")
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600


def test_an_ordinary_torch_file_behind_one_line(tmp_path: Path) -> None:
    begin().save(tmp_path / "c")
    with (tmp_path / "c").open("rb") as file:
        assert file.readline().startswith(b"dpkit-checkpoint")
        held = torch.load(io.BytesIO(file.read()), weights_only=True)
    assert set(held) == {"state", "also", "extra"}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = begin()
    life.save(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    life.train(lambda life: life.steps == 2)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with refused(dpkit.CheckpointError, "could not be written"):
            life.save(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c").read_bytes() == before


def test_unfinished_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    life = begin()
    name = f".c.{__import__('platform').node()}."
    for owner in ("999999999", str(os.getppid()), "x"):
        (tmp_path / f"{name}{owner}.partial").write_text("")
    life.save(tmp_path / "c")
    assert {p.name for p in tmp_path.iterdir()} == {"c", f"{name}{os.getppid()}.partial", f"{name}x.partial"}


def test_no_such_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "cannot be read"), (Path(__file__), "not a checkpoint")):
        with refused(dpkit.CheckpointError, words):
            begin().load(path)
    with pytest.raises(dpkit.NotAttachedError):
        dpkit.PrivacyEngine().load_checkpoint(tmp_path / "c")
    with pytest.raises(dpkit.NotAttachedError):
        dpkit.PrivacyEngine().save_checkpoint(tmp_path / "c")


def test_loading_into_a_loader_of_another_shape(tmp_path: Path) -> None:
    """The saved place makes sense for this loader only."""
    begin().save(tmp_path / "c")
    other = begin(loader={"drop_last": True}, dataset=Noisy(22))
    with refused(dpkit.CheckpointError, "records"):
        other.load(tmp_path / "c")
    assert isinstance(other.loader, DataLoader)
