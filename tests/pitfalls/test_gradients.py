"""The pitfalls by their numbers: ways to wrong gradients, lost steps and crashes. `test_privacy.py` has the others."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dpkit
from dpkit.accountants import Gaussian
from tests.cases import CASES, ModelCase
from tests.hf_models import HF_CASES
from tests.oracle import clipped_sum
from tests.test_exact import assert_exact
from tests.training import Run, attach, data, drawing, mlp, squared_loss, train, weights, work


def case(name: str) -> ModelCase:
    return next(c for c in (*CASES, *HF_CASES) if c.name == name)


def released(run: Run, batch: Any, losses: Callable[[Any], Tensor] | None = None) -> Tensor:
    """How far one step on this batch of the loader moves the weights."""
    before = weights(run.model)
    (squared_loss(run.model, batch) if losses is None else losses(batch)).backward()
    run.optimizer.step()
    return weights(run.model) - before


@pytest.mark.parametrize("name", ["two-names", "two-names-3d", "called-twice", "shared-weight", "t5"])
def test_pitfall_15_one_module_under_two_names(name: str) -> None:
    assert_exact(case(name), torch.float64)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_pitfall_16_embedding_options(option: dict[str, Any]) -> None:
    """padding_idx is exact; what updates weights or couples records is refused."""
    assert_exact(case("embedding-padding"), torch.float64)
    with pytest.raises(dpkit.UnsupportedModuleError, match=next(iter(option))):
        attach(nn.Sequential(nn.Embedding(5, 4, **option), nn.Linear(4, 1)))


@pytest.mark.parametrize(
    "name", ["conv2d-circular", "conv2d-reflect", "conv1d-replicate", "cnn-channels-last", "conv-permuted-input"]
)
def test_pitfall_17_convolutions(name: str) -> None:
    assert_exact(case(name), torch.float64)


@pytest.mark.parametrize("name", ["bag-sum", "bag-mean", "bag-max"])
def test_pitfall_18_embedding_bags(name: str) -> None:
    """Tokens are drawn with repetitions: duplicates count as often as they occur."""
    assert_exact(case(name), torch.float64)


def test_pitfall_19_arguments_and_dropout() -> None:
    """Second arguments and keywords count; a layer without a rule sees the dropout that the forward saw."""
    assert_exact(case("second-argument"), torch.float64)
    assert_exact(case("keyword-only-dict-output"), torch.float64)

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(F.dropout(x, 0.5, self.training) * self.scale, 0.5, self.training))

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.scale = nn.Parameter(torch.randn(3, 1, 2)), nn.Parameter(torch.ones(2))
            self.head = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv1d(x.unsqueeze(1), self.kernel, stride=3, padding=1)
            return self.head(F.layer_norm(y, (2,), weight=self.scale, eps=0.5).flatten(1))

    for kind in (Dropped, Keywords):
        model = kind()
        twin = copy.deepcopy(model)
        run = attach(model, max_grad_norm=1e6)
        for batch in run.loader:
            torch.manual_seed(7)
            moved = released(run, batch)
            torch.manual_seed(7)
            squared_loss(twin, batch).backward()
        gradient = torch.cat([p.grad.flatten() for p in twin.parameters()])  # type: ignore[union-attr]
        torch.testing.assert_close(moved, -gradient.double(), rtol=1e-4, atol=1e-6)


def test_pitfall_20_two_backwards_before_a_step() -> None:
    """Both count: they are two parts of each record's loss."""
    once, twice = attach(mlp().double(), double()), attach(mlp().double(), double())
    train(once)
    for batch in twice.loader:
        for _ in range(2):
            (squared_loss(twice.model, batch) / 2).backward()
        twice.optimizer.step()
    torch.testing.assert_close(weights(once.model), weights(twice.model))


def double() -> TensorDataset:
    return TensorDataset(*(v.double() for v in data().tensors))


def test_pitfall_21_a_parameter_that_this_step_does_not_use() -> None:
    """Its last norm does not linger: the step is the oracle's on what was used."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other, self.use_other = mlp(), nn.Linear(4, 1), True

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + (100.0 * self.other(x) if self.use_other else 0.0)

    model = Branches().double()
    run = attach(model, double(), max_grad_norm=0.1)
    train(run)
    model.use_other = False
    twin = copy.deepcopy(model)
    total = clipped_sum(twin, lambda net, b: (net(b[0]) - b[1]).square().mean(1), double().tensors, 8, 0.1)
    for batch in run.loader:
        moved = released(run, batch)
    torch.testing.assert_close(moved, -torch.cat([v.flatten() for v in total.values()]) / 8)


def test_pitfall_22_leaving_a_logical_batch() -> None:
    """What was begun is dropped; the next pass takes every one of its steps."""
    run, fresh = (attach(mlp(), data(), 4, max_physical_batch_size=2) for _ in range(2))
    with drawing([0, 1, 2, 3, 4], [5]):
        for batch in run.loader:
            work(run, batch)
            break
        assert run.engine.accountant.ledger == ()
        moved = [bool((released(run, batch) != 0).any()) for batch in run.loader]
        train(fresh)
    assert torch.equal(weights(run.model), weights(fresh.model))
    assert moved == [False, False, True, True]
    assert sum(n for _, n in run.engine.accountant.ledger) == 2


def test_pitfall_23_the_loss_scale_is_undone_before_clipping() -> None:
    """A GradScaler's factor of 2^16 does not bring every record to the bound; the step is that without it."""
    steps = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)):
        run = attach(mlp(), max_grad_norm=100.0, grad_scaler=scaler)
        for batch in run.loader:
            loss = squared_loss(run.model, batch)
            if scaler is None:
                loss.backward()
                run.optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(run.optimizer)
                scaler.update()
        steps.append(weights(run.model))
    torch.testing.assert_close(steps[1], steps[0])


def test_pitfall_24_a_new_sigma_keeps_the_history() -> None:
    run = attach(mlp(), noise_multiplier=2.0)
    spent = []
    for sigma in (2.0, 1.0, 4.0):
        run.engine.noise_multiplier = sigma
        train(run)
        spent.append(run.engine.get_epsilon(1e-5))
    assert spent == sorted(spent)
    assert run.engine.accountant.ledger == tuple((Gaussian(s), 1) for s in (2.0, 1.0, 4.0))


def test_pitfall_25_the_optimizer_stays_an_optimizer() -> None:
    """Copied, hooked, given more parameters; and LBFGS is refused, not broken."""
    model = mlp()
    model[0].requires_grad_(False)
    steps: list[str] = []
    run = attach(model, optimizer=torch.optim.SGD(model[2].parameters(), lr=1.0))
    copy.deepcopy(run.optimizer).step()
    run.optimizer.register_step_post_hook(lambda *_: steps.append("after"))
    train(run)
    model[0].requires_grad_(True)
    run.optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.detach().clone()
    train(run)
    assert steps == ["after"] * 2
    assert not torch.equal(model[0].weight, before)
    other = mlp()
    with pytest.raises(dpkit.ConfigurationError, match="LBFGS"):
        attach(other, optimizer=torch.optim.LBFGS(other.parameters()))


def test_pitfall_26_ordinary_models_and_loops_run() -> None:
    """Norms without bias, 4-D inputs, keywords, checkpointing, idle forwards, a graph used twice, empty draws."""
    for name in ("layer-norm-no-bias", "linear-4d", "keyword-only-dict-output", "checkpoint", "checkpoint-reentrant"):
        assert_exact(case(name), torch.float64)
    idle, again = attach(mlp().double(), double()), attach(mlp().double(), double())
    for x, y in idle.loader:
        idle.model(x[:3])
        idle.model(x)
        work(idle, (x, y))
    for batch in again.loader:
        loss = squared_loss(again.model, batch) / 2
        loss.backward(retain_graph=True)
        loss.backward()
        again.optimizer.step()
    torch.testing.assert_close(weights(idle.model), weights(again.model))

    rows = [{"x": x, "y": y} for x, y in zip(*data().tensors, strict=True)]
    run = attach(mlp(), rows, 4)  # type: ignore[arg-type]
    with drawing([], [1, 2]):
        for batch in run.loader:
            work(run, (batch["x"], batch["y"]))
    assert sum(n for _, n in run.engine.accountant.ledger) == 2


def test_pitfall_27_logging_and_checkpoints() -> None:
    """Importing everything sets up no logging; what is saved loads without pickled code."""
    code = (
        "import logging, dpkit, dpkit.accountants, dpkit.layers, dpkit.audit; dpkit.PrivacyEngine; "
        "assert not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
    assert logging.getLogger("dpkit").handlers == []
    run = attach(mlp(), noise_multiplier=1.0)
    train(run)
    stream = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=True)["model"].keys() == run.model.state_dict().keys()


def test_pitfall_27_checkpoints_of_the_engine(tmp_path: Any) -> None:
    """The engine's own file is read back without unpickling anything."""
    run = attach(mlp(), noise_multiplier=1.0)
    train(run)
    run.engine.save_checkpoint(tmp_path / "run")
    held = (tmp_path / "run").read_bytes()
    assert b"c__builtin__" not in held
    assert b"cposix" not in held
    other = attach(mlp(seed=1), noise_multiplier=1.0)
    other.engine.load_checkpoint(tmp_path / "run")
    assert torch.equal(weights(other.model), weights(run.model))


@pytest.mark.parametrize("masked", [False, True])
def test_pitfall_32_attention(masked: bool) -> None:
    """torch's own module stays in place: the same numbers, batch first, masks and all; and the step is exact."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            causal = torch.full((5, 5), float("-inf"), dtype=x.dtype).triu(1)
            masks: dict[str, Any] = {"attn_mask": causal, "key_padding_mask": padding} if masked else {}
            return self.head(self.attention(x, x, x, need_weights=False, **masks)[0].mean(1))

    model = Attends().double()
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    padding = torch.zeros(6, 5, dtype=torch.float64)
    padding[:, 4] = float("-inf")
    expected = model(x, padding).detach()
    twin = copy.deepcopy(model)
    run = attach(model, TensorDataset(x, padding), max_grad_norm=0.05)
    before = weights(model)
    for rows, mask in run.loader:
        output = model(rows, mask)
        torch.testing.assert_close(output.detach(), expected)
        output.square().mean().backward()
        run.optimizer.step()
    total = clipped_sum(twin, lambda net, b: net(*b).square().mean(1), (x, padding), 6, 0.05)
    torch.testing.assert_close(weights(model) - before, -torch.cat([v.flatten() for v in total.values()]) / 6)
