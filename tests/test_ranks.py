"""Several processes that train one model (torchrun, gloo), against a single one."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dpkit
from dpkit.shares import shared
from tests import ranked

SHARDED = ("sharded", "sharded_noise", "sharded_went_on", "sharded_replay", "sharded_beside")
ROOT = Path(__file__).resolve().parent.parent


def started(world: int, folder: Path, *names: str) -> list[dict[str, Any]]:
    """What each rank saw; one launch for many scenarios, since starting processes is what takes the time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", free()]
    command += ["-m", "tests.ranked", str(folder), *names]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Found(torch.load(folder / f"{world}-{rank}.pt")) for rank in range(world)]


class Found(dict[str, Any]):
    """What a rank saw, by scenario; one that crashed fails where it is asked for."""

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        assert not isinstance(found, str), found
        return found


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def free() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return started(
        2,
        folder,
        "equal",
        "sampler",
        "noise",
        "ledger",
        "budget",
        "differ",
        "save",
        "resume",
        "replay",
        "page",
        "sharded_saved",
        *SHARDED,
    )


@pytest.fixture(scope="module")
def three(folder: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """They also resume what two have saved."""
    return started(3, folder, "equal", "resume", "noise", *SHARDED)


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return {name: ranked.trained(name) for name in ranked.SETTINGS}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("name", list(ranked.SETTINGS))
def test_as_a_single_process(
    name: str, one: dict[str, Any], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    """The same weights, C and releases; bit for bit the same on all ranks, in as many turns of the loop."""
    for ranks in (two, three):
        found = [rank["equal"][name] for rank in ranks]
        assert close(found[0]["weights"], one[name]["weights"])
        assert found[0]["C"] == pytest.approx(one[name]["C"], rel=1e-9)
        for other in found:
            assert torch.equal(other["weights"], found[0]["weights"])
            assert (other["C"], other["turns"]) == (found[0]["C"], found[0]["turns"])
            assert other["releases"] == one[name]["releases"]
    if name in ("parts", "adaptive", "units"):
        assert three[0]["equal"][name]["turns"] < one[name]["turns"]


def test_a_distributed_sampler_gives_the_batch_size_of_a_rank(two: list[dict[str, Any]]) -> None:
    assert two[0]["sampler"]["B"] == two[1]["sampler"]["B"] == 4.0
    assert torch.equal(two[0]["sampler"]["weights"], two[1]["sampler"]["weights"])
    assert "for rank 0 of 2" in two[1]["sampler"]["wrong"]


@pytest.mark.parametrize("name", ["plain", "secure", "adaptive"])
def test_noise_is_added_once(name: str, two: list[dict[str, Any]], three: list[dict[str, Any]]) -> None:
    """σ C / B, whatever the number of ranks; the same numbers on all of them, and others at the next step."""
    for ranks in (two, three):
        first, second = ranks[0]["noise"][name]
        for rank in ranks[1:]:
            assert torch.equal(rank["noise"][name][0], first)
            assert torch.equal(rank["noise"][name][1], second)
        n = first.numel()
        expected = 1.5 * 0.5 / 6 * (1.0033 if name == "adaptive" else 1.0)  # the count's share of σ
        assert float(first.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * n))
        assert abs(float((first * second).mean())) < 5 * float(first.std() * second.std()) / math.sqrt(n)


def test_the_ledger_is_rank_0s(two: list[dict[str, Any]], folder: Path) -> None:
    first, other = (rank["ledger"] for rank in two)
    assert (first["kept"], other["kept"]) == (True, False)
    assert first["epsilon"] == other["epsilon"] > 0
    assert first["error"].startswith("LedgerError")
    assert other["error"].startswith("LedgerError: rank 0")
    for found in (first, other):
        assert found["moved"] == 0.0
        assert "parted before" in found["again"]
    lines = [json.loads(line) for line in (folder / "ledger").read_text().splitlines()]
    assert sum("release" in line for line in lines) == first["releases"] == other["releases"] == 5


def test_all_ranks_keep_the_budget(two: list[dict[str, Any]]) -> None:
    torch.manual_seed(3)
    alone = ranked.budget(Path())
    assert two[0]["budget"] == two[1]["budget"]
    assert two[0]["budget"]["releases"] == alone["releases"] > 10
    assert two[0]["budget"]["spent"]
    assert two[0]["budget"]["epsilon"] <= 6.0


DIFFERENCES = {
    "data": "differ in row 0",
    "argument": "differ in noise_multiplier: rank 0 has 1.0, rank 1 has 2.0",
    "model": r"differ in model's 0.weight: rank 0 has 'torch.float32 \[4, 4\]'",
    "lr": "differ in optimizer",
    "C": "differ in max_grad_norm: rank 0 has 0.3, rank 1 has 0.1",
    "frozen": "differ in trained",
    "weights": "differ in weights",
    "left": "rank 0 has 'a release', rank 1 has 'a pass over the data'",
}


@pytest.mark.parametrize("name", list(DIFFERENCES))
def test_ranks_that_differ_are_refused(name: str, two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert re.match(f"RanksError: .*{DIFFERENCES[name]}", rank["differ"][name]), rank["differ"][name]


def test_a_rank_that_fails_is_heard_by_the_others(two: list[dict[str, Any]]) -> None:
    assert two[1]["differ"]["failed"].startswith("NonPrivateGradientError: 0.weight")
    assert two[0]["differ"]["failed"].startswith("RanksError: another rank has failed (rank 1: NonPrivateGradientError")


def test_wrapped_models_are_refused(two: list[dict[str, Any]]) -> None:
    assert "wrapped in DistributedDataParallel" in two[0]["differ"]["wrapped"]
    assert "called by a DistributedDataParallel around it" in two[1]["differ"]["wrapped later"]
    with pytest.raises(dpkit.ConfigurationError, match="wrapped in DataParallel"):
        ranked.private(model=torch.nn.DataParallel(ranked.mlp()))


def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    two: list[dict[str, Any]], three: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    """2 → 2, 2 → 3, 2 → 1, saved in the middle of a logical batch, and at its end."""
    whole = ranked.resumed(None)
    for resumed in (two[0]["resume"], two[1]["resume"], three[0]["resume"], three[2]["resume"], ranked.resume(folder)):
        for found in resumed:
            assert close(found["weights"], whole["weights"])
            assert found["releases"] == whole["releases"] == 10


def test_releases_are_repeated_bit_for_bit(two: list[dict[str, Any]]) -> None:
    first, second, fresh = two[0]["replay"]
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(two[1]["replay"][1]["weights"], second["weights"])
    assert first["epsilon"] == second["epsilon"] < fresh["epsilon"]
    assert not torch.equal(fresh["weights"], second["weights"])
    assert [life["epsilon"] for life in two[1]["replay"]] == [life["epsilon"] for life in two[0]["replay"]]


def test_a_rank_that_dies_is_an_error(tmp_path: Path) -> None:
    """Not a hang; and everything that was handed out is in the ledger."""
    port = free()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranked", str(tmp_path), "death"],
            cwd=ROOT,
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in range(2)
    ]
    try:
        assert [p.wait(timeout=120) for p in processes] == [0, 1]
    finally:
        for p in processes:
            p.kill()
    found = torch.load(tmp_path / "2-0.pt")["death"]
    assert "another rank did not answer" in found["error"]
    assert found["seconds"] < 30
    assert found["held"] == found["steps"] >= 3
    assert "parted before" in found["again"]


@pytest.mark.parametrize("name", list(ranked.SHARDED))
def test_sharded_parameters_as_a_single_process(
    name: str, two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    """fully_shard, with parameters that are used in all kinds of ways, and forwards without gradient in between."""
    alone = ranked.sharded_run(name)
    for ranks in (two, three):
        for found in (rank["sharded"][name] for rank in ranks if name in rank["sharded"]):
            assert close(found["weights"], alone["weights"])
            assert found["C"] == pytest.approx(alone["C"], rel=1e-9)
            assert found["releases"] == alone["releases"]


def test_every_rank_adds_the_noise_of_its_own_rows(two: list[dict[str, Any]], three: list[dict[str, Any]]) -> None:
    """σ C / B on every row, no two ranks' alike; one count of it."""
    for ranks in (two, three):
        steps = ranks[0]["sharded_noise"]["steps"]
        sizes = [rank["sharded_noise"]["rows"] * 10 for rank in ranks]
        assert sum(sizes) == 30010
        assert [rank["sharded_noise"]["held"] for rank in ranks] == [len(steps), *[None] * (len(ranks) - 1)]
        assert len({rank["sharded_noise"]["epsilon"] for rank in ranks}) == 1
        rows = [part for step in steps[:2] for part in step.split(sizes)]
        for k, one in enumerate(rows):
            n = len(one)
            assert float(one.std()) == pytest.approx(1.5 * 0.5 / 6, rel=5 / math.sqrt(2 * n))
            for other in rows[:k]:
                m = min(n, len(other))
                correlation = float((one[:m] * other[:m]).mean() / (one.std() * other.std()))
                assert abs(correlation) < 5 / math.sqrt(m)


def test_what_is_refused_where_parameters_are_sharded(two: list[dict[str, Any]]) -> None:
    found = two[1]["sharded_noise"]
    for name in ("noise_generator", "correlated noise"):
        assert found[name].startswith(f"ConfigurationError: {name} with parameters that are sharded")
    assert found["auto"].startswith('ConfigurationError: max_physical_batch_size="auto" with parameters that')
    assert "whole on every rank" in found["parts"]


def test_a_sharded_checkpoint_goes_on_with_another_number_of_ranks(
    two: list[dict[str, Any]], three: list[dict[str, Any]], folder: Path
) -> None:
    """2 → 2, 2 → 3, and 2 → 1, whole."""
    uninterrupted = ranked.sharded_resumed(None)
    ranks = [rank["sharded_went_on"] for rank in (*two, three[0], three[2])]
    for resumed in (*ranks, ranked.sharded_went_on(folder)):
        assert len(resumed) == len(ranked.CHECKPOINTS)
        for found in resumed:
            assert close(found["weights"], uninterrupted["weights"])
            assert found["releases"] == uninterrupted["releases"] == 10


def test_sharded_releases_are_repeated_by_as_many_ranks(
    two: list[dict[str, Any]], three: list[dict[str, Any]], folder: Path
) -> None:
    """Bit for bit; by another number of ranks not at all, since their noise is another one."""
    for rank in two:
        first, second, fresh = rank["sharded_replay"]
        assert torch.equal(first["weights"], second["weights"])
        assert first["epsilon"] == second["epsilon"] < fresh["epsilon"]
        assert not torch.equal(fresh["weights"], second["weights"])
        assert [life["releases"] for life in (first, second, fresh)] == [5, 5, 9]
    for others in (three[0], three[2], {"sharded_replay": ranked.sharded_replay(folder)}):
        refused, fresh = others["sharded_replay"]
        assert "with noise that cannot be repeated" in refused["error"]
        assert fresh["epsilon"] > two[0]["sharded_replay"][0]["epsilon"]


def test_the_engines_state_beside_sharded_weights(two: list[dict[str, Any]], three: list[dict[str, Any]]) -> None:
    """``weights=False``: the same weights are asked for, on every rank."""
    for rank in (*two, *three):
        found = rank["sharded_beside"]
        assert found["others"].startswith("CheckpointError: model and optimizer are not in the state")
        before, after = found["epsilon"]
        assert before == after > 0


def test_the_page_on_many_devices(two: list[dict[str, Any]]) -> None:
    """Its script, by two ranks."""
    first, second = (rank["page"] for rank in two)
    assert torch.equal(first["weights"], second["weights"])
    assert 0 < first["epsilon"] == second["epsilon"] <= 3.0
    assert "all processes hold the same data in the same order" in first["statement"]


class Rank:
    """A rank without a process."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("limit", [None, 1, 3, 4])
def test_shares(size: int, limit: int | None) -> None:
    """Every unit that was drawn counts on one rank, once; all ranks serve as many parts, none of them empty."""
    generator = torch.Generator().manual_seed(size)
    for drawn in range(20):
        rows = iter(range(1000))
        most = 1 if limit in (None, 1) else 3
        sizes = torch.randint(1, most + 1, (drawn,), generator=generator).tolist()
        units = [[next(rows) for _ in range(k)] for k in sizes]
        every = [shared(units, limit, Rank(rank, size)) for rank in range(size)]  # type: ignore[arg-type]
        counting = [unit for parts, count in every for part in parts[:count] for unit in part]
        assert sorted(counting) == units
        assert len({len(parts) for parts, _ in every}) == 1
        for parts, count in every:
            assert all(part for part in parts) or not units
            assert limit is None or all(sum(map(len, part)) <= limit for part in parts)
            assert all(unit in units for part in parts[count:] for unit in part)
            assert sum(len(part) for part in parts[:count]) in (drawn // size, -(-drawn // size))
