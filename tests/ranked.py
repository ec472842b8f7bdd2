"""What the processes of tests/test_ranks.py do: run by torchrun, each rank writes what it saw to a file of its own.

torchrun --nproc-per-node 2 -m tests.ranked FOLDER SCENARIO...
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import dpkit
from tests import training
from tests.training import data, mlp, squared_loss, weights

SCENARIOS: dict[str, Callable[[Path], Any]] = {}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"max_physical_batch_size": 2},
    "small": {"batch_size": 1},  # most draws are empty, or fewer than there are ranks
    "automatic": {"clipping": "automatic", "loss_reduction": "sum"},
    "per_layer": {"clipping": "per_layer"},
    "adaptive": {"clipping": "adaptive", "max_physical_batch_size": 3},
    "units": {"privacy_unit": [k // 3 for k in range(24)], "max_rows_per_unit": 2, "max_physical_batch_size": 4},
    "fixed": {"poisson_sampling": False, "shuffle": True},
    "strict": {"strict": True},
    "workers": {"num_workers": 1, "batch_size": 2},
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def private(
    *, seed: int = 0, batch_size: int = 5, n: int = 24, ledger: Path | None = None, strict: bool = False, **options: Any
) -> tuple[dpkit.PrivacyEngine, nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """An engine on a small network; draws are seeded, so that every number of ranks draws the same."""
    loader = {k: options.pop(k) for k in ("shuffle", "num_workers", "sampler") if k in options}
    dataset, model = options.pop("dataset", data(n)), options.pop("model", None) or mlp(seed=seed)
    optimizer = options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=0.5)
    given = DataLoader(dataset, batch_size=batch_size, generator=seeded(7), **loader)
    engine = dpkit.PrivacyEngine(accountant="rdp", ledger=ledger)
    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, **options}
    return engine, *engine.make_private(module=model, optimizer=optimizer, data_loader=given, **options)


def work(
    engine: Any, model: nn.Module, optimizer: Any, batch: Any, *, strict: bool = False, by_sum: bool = False
) -> None:
    optimizer.zero_grad()
    if strict:
        engine.backward((model(batch[0]) - batch[1]).square().flatten())
    else:
        loss = squared_loss(model, batch)
        (loss * len(batch[0]) if by_sum else loss).backward()
    optimizer.step()


def trained(name: str, passes: int = 3) -> dict[str, Any]:
    """What a setting comes to: weights, C, turns of the loop, releases."""
    options = dict(SETTINGS[name])
    torch.manual_seed(3)
    engine, model, optimizer, loader = private(**options)
    how = {"strict": options.get("strict", False), "by_sum": options.get("loss_reduction") == "sum"}
    turns = 0
    for _ in range(passes):
        for batch in loader:
            work(engine, model, optimizer, batch, **how)
            turns += 1
    releases = engine._spending.released
    found = {"weights": weights(model), "C": engine.max_grad_norm, "turns": turns, "releases": releases}
    engine.detach()
    return found


def scenario(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def refusal(call: Callable[[], Any]) -> str:
    """The error that a call ends in."""
    try:
        call()
    except dpkit.PrivacyError as error:
        return f"{type(error).__name__}: {error.seen}"
    return "nothing was refused"


def _of_its_own(seed: int) -> nn.Module:
    return training.mlp(seed=dist.get_rank())


@scenario
def equal(folder: Path) -> Any:
    """Every setting, with initial weights that differ until the engine makes them the same."""
    with mock.patch(f"{__name__}.mlp", _of_its_own):
        return {name: trained(name) for name in SETTINGS}


class Norm(nn.Module):
    """A norm of a user's own: no rule, its scale is followed by a stand-in."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((d,), 1.2))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.gain = Norm(d), nn.Parameter(torch.full((d,), 0.5))
        self.mix, self.out = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.frozen = nn.Linear(d, d).requires_grad_(False)
        self.never = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.out(torch.tanh(self.mix(self.norm(x)))) + self.frozen(x)


class Recurrent(nn.Module):
    """An LSTM whose output is no view (torch warns of those)."""

    def __init__(self, *sizes: int, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(*sizes, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lstm(x)[0])


class Reader(nn.Module):
    """Embedding with a tied head, positions, blocks, a recurrent layer: what parameters are used in different ways."""

    def __init__(self, d: int = 6, words: int = 11) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(words, d), nn.Parameter(torch.randn(5, d) * 0.1)
        self.blocks = nn.ModuleList(Block(d) for _ in range(2))
        self.memory, self.norm = Recurrent(d, d, batch_first=True), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position
        for block in self.blocks:
            h = block(h)
        h = self.norm(self.memory(h))
        return torch.nn.functional.linear(h, self.embed.weight)


def dealt(model: Any) -> Any:
    """Sharded over the ranks, blocks by themselves; as it is in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for m in model.modules():
            if isinstance(m, Block | Recurrent):
                fully_shard(m)
        fully_shard(model)
    return model


def all_weights(model: nn.Module) -> Tensor:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().double().flatten() for p in parts])


SHARDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"max_physical_batch_size": 2},
    "small": {"batch_size": 1},
    "per_layer": {"clipping": "per_layer"},
    "adaptive": {"clipping": "adaptive", "max_physical_batch_size": 3},
    "strict": {"strict": True},
}


def sharded_run(name: str) -> dict[str, Any]:
    """Two passes of a reader of sequences."""
    options = dict(SHARDED[name])
    strict = options.pop("strict", False)
    torch.manual_seed(1)
    model = dealt(Reader())
    texts = TensorDataset(torch.randint(11, (24, 5), generator=seeded(2)))
    engine, model, optimizer, loader = private(dataset=texts, model=model, optimizer=torch.optim.Adam, **options)
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        for (x,) in loader:
            optimizer.zero_grad()
            losses = torch.nn.functional.cross_entropy(model(x).transpose(1, 2), x.flip(1), reduction="none").mean(1)
            if strict:
                engine.backward(losses)
            else:
                losses.mean().backward()
            optimizer.step()
            with torch.no_grad():
                model(x[:1])  # an evaluation in between
    found = {"weights": all_weights(model), "C": engine.max_grad_norm, "releases": engine._spending.released}
    engine.detach()
    return found


@scenario
def sharded(folder: Path) -> Any:
    """The same model in a single process, and dealt out over the ranks."""
    return {name: sharded_run(name) for name in list(SHARDED)[: 6 if dist.get_world_size() == 2 else 3]}


@scenario
def sharded_noise(folder: Path) -> Any:
    """Steps of a sharded model whose gradient is zero; what is counted, and what is refused."""
    model = nn.Linear(10, 3001, bias=False)
    model.weight.data.zero_()
    fully_shard(model)
    dataset = TensorDataset(torch.zeros(24, 10))
    ledger = folder / f"sharded{dist.get_world_size()}"
    engine, model, optimizer, loader = private(
        dataset=dataset, model=model, batch_size=6, noise_multiplier=1.5, max_grad_norm=0.5, ledger=ledger
    )
    seen = [all_weights(model)]
    optimizer.register_step_post_hook(lambda *_: seen.append(all_weights(model)))
    for (x,) in loader:
        model(x).sum().backward()
        optimizer.step()
    held = None if engine.ledger is None else sum(engine.ledger.totals().values())
    found = {"steps": [2 * (b - a) for a, b in pairwise(seen)], "held": held}
    found["rows"] = model.weight.to_local().shape[0]
    found["epsilon"] = engine.get_epsilon(1e-5)
    engine.detach()
    for name, options in REFUSED_SHARDED.items():
        found[name] = refusal(lambda options=options: private(model=dealt(Reader()), **options))  # type: ignore[misc]
    parts = mlp()
    fully_shard(parts[0])
    found["parts"] = refusal(lambda: private(model=parts))
    return found


REFUSED_SHARDED: dict[str, dict[str, Any]] = {
    "noise_generator": {"noise_generator": seeded(0)},
    "correlated noise": {"noise": dpkit.BandedNoise(2)},
    "auto": {"max_physical_batch_size": "auto"},
}


@scenario
def sampler(folder: Path) -> Any:
    """A DistributedSampler, as scripts for torchrun have it: its batch size is of each rank."""
    sampled = DistributedSampler(data(24))
    engine, model, optimizer, loader = private(sampler=sampled, batch_size=2)
    for batch in loader:
        work(engine, model, optimizer, batch)
    wrong = DistributedSampler(data(24), num_replicas=dist.get_world_size(), rank=0)
    found = {"B": engine.expected_batch_size, "weights": weights(model)}
    engine.detach()
    if dist.get_rank() == 1:
        found["wrong"] = refusal(lambda: dpkit.sampling.checked(DataLoader(data(24), 2, sampler=wrong), dpkit_ranks()))
    return found


def dpkit_ranks() -> Any:
    """This rank, without a group of its own."""
    ranks = dpkit.ranks.Ranks.__new__(dpkit.ranks.Ranks)
    ranks.rank, ranks.size = dist.get_rank(), dist.get_world_size()
    return ranks


@scenario
def noise(folder: Path) -> Any:
    """The steps of a model whose gradient is zero: nothing but noise."""

    def steps(secure: bool, **options: Any) -> list[Tensor]:
        model = nn.Linear(10, 3000, bias=False)
        nn.init.zeros_(model.weight)
        model.weight.data[0, 0] = 1.0
        engine = dpkit.PrivacyEngine(accountant="rdp", secure_mode=secure)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loader = DataLoader(TensorDataset(torch.zeros(24, 10)), batch_size=6)
        engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.5, max_grad_norm=0.5, **options
        )
        seen = [model.weight.detach().clone()]
        optimizer.register_step_post_hook(lambda *_: seen.append(model.weight.detach().clone()))
        for (x,) in engine._loader:
            model(x).sum().backward()
            optimizer.step()
        engine.detach()
        return [seen[1] - seen[0], seen[2] - seen[1]]

    return {"plain": steps(False), "secure": steps(True), "adaptive": steps(False, clipping="adaptive")}


@scenario
def ledger(folder: Path) -> Any:
    """One ledger, written by rank 0; where it cannot be written nobody takes the step."""
    path = folder / "ledger"
    engine, model, optimizer, loader = private(ledger=path, noise_multiplier=1.0)
    for batch in loader:
        work(engine, model, optimizer, batch)
    found: dict[str, Any] = {"epsilon": engine.get_epsilon(1e-5), "kept": engine.ledger is not None}
    before = weights(model)

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def more() -> None:
        for batch in loader:
            work(engine, model, optimizer, batch)

    with mock.patch("os.write", fail):
        found["error"] = refusal(more)
    found["again"] = refusal(more)
    found["moved"] = float((weights(model) - before).norm())
    found["releases"] = engine._spending.released
    engine.detach()
    return found


@scenario
def budget(folder: Path) -> Any:
    """All ranks end at the same step."""
    engine, model, optimizer, loader = private(noise_multiplier=1.0, max_epsilon=6.0, target_delta=1e-5, batch_size=3)
    for _ in range(20):
        for batch in loader:
            work(engine, model, optimizer, batch)
    found = {"releases": engine._spending.released, "spent": engine.budget_spent, "epsilon": engine.get_epsilon()}
    engine.detach()
    return found


@scenario
def differ(folder: Path) -> dict[str, str]:
    """Ranks that do not do the same."""
    rank, found = dist.get_rank(), {}

    def loop(meddle: Callable[[Any, Any, Any, int], None], **options: Any) -> str:
        engine, model, optimizer, loader = private(**options)

        def run() -> None:
            for k, batch in enumerate(loader):
                meddle(engine, model, optimizer, k)
                work(engine, model, optimizer, batch)

        said = refusal(run)
        engine.detach()
        return said

    def on_1(act: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any, int], None]:
        return lambda engine, model, optimizer, k: act(engine, model, optimizer) if rank == 1 and k == 1 else None

    def bend(engine: Any, model: Any, optimizer: Any) -> None:
        with torch.no_grad():
            model[0].weight[0, 0] += 1e-6

    mixed = TensorDataset(*(t[torch.randperm(24, generator=seeded(rank))] for t in data(24).tensors))
    found["data"] = refusal(lambda: private(dataset=mixed))
    found["argument"] = refusal(lambda: private(noise_multiplier=1.0 + rank))
    found["model"] = refusal(lambda: private(model=mlp(width=4 + rank)))
    found["lr"] = loop(on_1(lambda e, m, o: o.param_groups[0].update(lr=0.25)))
    found["C"] = loop(on_1(lambda e, m, o: setattr(e, "max_grad_norm", 0.1)), max_physical_batch_size=100)
    found["frozen"] = loop(on_1(lambda e, m, o: m[0].bias.requires_grad_(False)))
    with mock.patch("dpkit.ranks.Ranks.compared_every", 1):
        found["weights"] = loop(on_1(bend))
    engine, model, optimizer, loader = private()

    def leave() -> None:
        for _ in range(2):
            for k, batch in enumerate(loader):
                if rank == 1 and k == 1:
                    break
                work(engine, model, optimizer, batch)

    found["left"] = refusal(leave)
    engine.detach()
    engine, model, optimizer, loader = private()

    def fail() -> None:
        for _ in loader:
            if rank == 1:
                model[0].weight.grad = torch.ones_like(model[0].weight)
            optimizer.step()

    found["failed"] = refusal(fail)
    engine.detach()
    wrapped = nn.parallel.DistributedDataParallel(mlp())
    found["wrapped"] = refusal(lambda: private(model=wrapped))
    engine, model, optimizer, loader = private()
    around = nn.parallel.DistributedDataParallel(model)
    found["wrapped later"] = refusal(lambda: around(next(iter(loader))[0]))
    engine.detach()
    return found


CHECKPOINTS = (1, 2, 5)  # turns of the loop; the first is in the middle of a logical batch for one rank and for two


def interrupted(folder: Path, at: int) -> str:
    """A run that is saved at its k-th turn and left there; all ranks save, rank 0 writes."""
    engine, model, optimizer, loader = private(max_physical_batch_size=2, optimizer=torch.optim.Adam)
    for k, batch in enumerate(loader):
        work(engine, model, optimizer, batch)
        if k == at:
            engine.save_checkpoint(folder / f"at{at}.ckpt", extra=k)
            break
    engine.detach()
    return f"at{at}.ckpt"


def resumed(path: Path | None) -> dict[str, Any]:
    """The same run to its end, from a checkpoint or from its beginning."""
    engine, model, optimizer, loader = private(max_physical_batch_size=2, optimizer=torch.optim.Adam, seed=1)
    if path is None:
        model.load_state_dict(mlp(seed=0).state_dict())
    else:
        engine.load_checkpoint(path)
    for _ in range(engine.completed_passes, 2):
        for batch in loader:
            work(engine, model, optimizer, batch)
    found = {"weights": weights(model), "releases": engine._spending.released}
    engine.detach()
    return found


@scenario
def save(folder: Path) -> Any:
    return [interrupted(folder, at) for at in CHECKPOINTS]


@scenario
def resume(folder: Path) -> Any:
    """The checkpoints of whatever number of ranks."""
    return [resumed(folder / f"at{at}.ckpt") for at in CHECKPOINTS]


@scenario
def replay(folder: Path) -> Any:
    """Releases after the checkpoint are in the ledger, and are repeated bit for bit by as many ranks."""
    ledger, path = folder / "replayed", folder / "replayed.checkpoint"
    lives = []
    for life in range(2):
        engine, model, optimizer, loader = private(ledger=ledger, noise_multiplier=1.0)
        if life:
            engine.load_checkpoint(path)
        for k, batch in enumerate(loader):
            work(engine, model, optimizer, batch)
            if k == 1 and not life:
                engine.save_checkpoint(path)
        lives.append({"weights": weights(model), "epsilon": engine.get_epsilon(1e-5)})
        engine.detach()
    engine, model, optimizer, loader = private(ledger=ledger, noise_multiplier=1.0)
    engine.load_checkpoint(path, replay=False)
    for batch in loader:
        work(engine, model, optimizer, batch)
    lives.append({"weights": weights(model), "epsilon": engine.get_epsilon(1e-5)})
    engine.detach()
    return lives


def reader(**options: Any) -> tuple[dpkit.PrivacyEngine, nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """An engine on a reader of sequences, dealt out over the ranks."""
    torch.manual_seed(1)
    texts = TensorDataset(torch.randint(11, (24, 5), generator=seeded(2)))
    engine, model, optimizer, loader = private(
        dataset=texts, model=dealt(Reader()), optimizer=torch.optim.Adam, max_physical_batch_size=2, **options
    )
    optimizer.param_groups[0]["lr"] = 0.01
    return engine, model, optimizer, loader


def read(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x).transpose(1, 2), x.flip(1)).backward()
    optimizer.step()


def sharded_resumed(path: Path | None, **how: Any) -> dict[str, Any]:
    """Two passes to their end, from a checkpoint or from the beginning."""
    engine, model, optimizer, loader = reader()
    if path is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)  # what is loaded is seen
        engine.load_checkpoint(path, **how)
    for _ in range(engine.completed_passes, 2):
        for (x,) in loader:
            read(model, optimizer, x)
    found = {"weights": all_weights(model), "releases": engine.releases}
    engine.detach()
    return found


@scenario
def sharded_saved(folder: Path) -> Any:
    """Runs of a sharded model, saved and left: in the middle of a logical batch, and at its end."""
    for at in CHECKPOINTS:
        engine, model, optimizer, loader = reader()
        for k, (x,) in enumerate(loader):
            read(model, optimizer, x)
            if k == at:
                engine.save_checkpoint(folder / f"sharded{at}.ckpt")
                break
        engine.detach()


@scenario
def sharded_went_on(folder: Path) -> Any:
    """The checkpoints of whatever number of ranks."""
    return [sharded_resumed(folder / f"sharded{at}.ckpt") for at in CHECKPOINTS]


@scenario
def sharded_replay(folder: Path) -> Any:
    """Releases after the checkpoint are repeated bit for bit, with every rank's own noise, by as many ranks only."""
    ledger, path = folder / "sharded.ledger", folder / "sharded.replayed"
    lives, first = [], not path.exists()
    for life in range(0 if first else 1, 3):
        engine, model, optimizer, loader = reader(ledger=ledger, noise_multiplier=1.0)
        if life:
            said = refusal(lambda engine=engine, life=life: engine.load_checkpoint(path, replay=life == 1))
            if said.startswith("CheckpointError"):
                lives.append({"error": said, "releases": engine.releases})
                engine.detach()
                continue
        for k, (x,) in enumerate(loader):
            read(model, optimizer, x)
            if k == 1 and not life:
                engine.save_checkpoint(path)
        lives.append({"weights": all_weights(model), "epsilon": engine.get_epsilon(1e-5), "releases": engine.releases})
        engine.detach()
    return lives


@scenario
def sharded_beside(folder: Path) -> Any:
    """The engine's state alone, beside weights that somebody else has saved."""
    path, found = folder / f"beside{dist.get_world_size()}", {}
    engine, model, optimizer, loader = reader(noise_multiplier=1.0)
    for (x,) in loader:
        read(model, optimizer, x)
    engine.save_checkpoint(path, weights=False)
    own = [p.to_local().clone() if isinstance(p, DTensor) else p.clone() for p in model.state_dict().values()]
    moments = optimizer.state_dict()
    epsilon = engine.get_epsilon(1e-5)
    engine.detach()
    engine, model, optimizer, loader = reader(noise_multiplier=1.0)
    found["others"] = refusal(lambda: engine.load_checkpoint(path))
    with torch.no_grad():
        for p, held in zip(model.state_dict().values(), own, strict=True):
            (p.to_local() if isinstance(p, DTensor) else p).copy_(held)
    optimizer.load_state_dict(moments)
    engine.load_checkpoint(path)
    found["epsilon"] = (epsilon, engine.get_epsilon(1e-5))
    engine.detach()
    return found


@scenario
def page(folder: Path) -> Any:
    """The script of docs/many_devices.md."""
    script = (Path(__file__).parent.parent / "docs" / "many_devices.md").read_text().split("```python\n")[1]
    names: dict[str, Any] = {}
    with mock.patch("torch.distributed.init_process_group"), mock.patch("torch.save"):
        exec(script.split("```")[0], names)
    engine = names["engine"]
    return {"weights": weights(names["model"]), "epsilon": engine.get_epsilon(), "statement": str(engine.statement())}


@scenario
def death(folder: Path) -> Any:
    """Rank 1 dies in the middle of a pass, without a word."""
    engine, model, optimizer, loader = private(ledger=folder / "death", noise_multiplier=1.0, batch_size=2)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))

    def run() -> None:
        for batch in loader:
            if dist.get_rank() == 1 and len(steps) == 3:
                os._exit(1)
            work(engine, model, optimizer, batch)

    start = datetime.datetime.now()
    said = refusal(run)
    seconds = (datetime.datetime.now() - start).total_seconds()
    assert engine.ledger is not None
    held = sum(engine.ledger.totals().values())
    return {"error": said, "seconds": seconds, "steps": len(steps), "held": held, "again": refusal(run)}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=40))
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = SCENARIOS[name](folder)
        except Exception:  # its own tests fail by it, the others' do not
            found[name] = traceback.format_exc()
    torch.save(found, folder / f"{dist.get_world_size()}-{dist.get_rank()}.pt")
    if "death" in names:
        os._exit(0)  # gloo may abort when it takes a group apart of which a rank has died
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
