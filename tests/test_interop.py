"""What real Opacus objects save, loaded here: weights, moments, history; and nothing where something does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.accountants import PLDAccountant, dpsgd

opacus = pytest.importorskip("opacus")
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention  # noqa: E402
from opacus.schedulers import ExponentialNoise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = TensorDataset(torch.randn(40, 5, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)


class Net(nn.Module):
    """Recurrent layers, torch's or Opacus's. [n, 5, 4] -> [n, 3]"""

    def __init__(self, lstm: Any = nn.LSTM, gru: Any = nn.GRU, rnn: Any = nn.RNN) -> None:
        super().__init__()
        self.lstm = lstm(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.rnn = rnn(12, 5, batch_first=True)
        self.gru = gru(5, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x)
        h, _ = self.rnn(h)
        h, _ = self.gru(h)
        return h[:, -1]


def theirs() -> Net:
    return Net(DPLSTM, DPGRU, DPRNN)


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3))


def trained(build: Callable[[], nn.Module], path: Path, momentum: float = 0.9, **saved: Any) -> nn.Module:
    """Two epochs with Opacus, saved as it saves; returns the model. 10 steps at rate 0.2, σ = 1.1."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    engine = opacus.PrivacyEngine(accountant="rdp")
    wrapped, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(DATA, batch_size=8), noise_multiplier=1.1,
        max_grad_norm=1.0,
    )  # fmt: skip
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    scheduler = ExponentialNoise(optimizer, gamma=0.9)
    engine.save_checkpoint(path=path, module=wrapped, optimizer=optimizer, noise_scheduler=scheduler, **saved)
    return model


def test_weights_and_history_of_other_layers(tmp_path: Path) -> None:
    """Opacus's recurrent layers become torch's: the same function, and what was spent is counted."""
    source = trained(theirs, tmp_path / "run.pt", checkpoint_dict={"mine": 7})
    engine, model = dpkit.PrivacyEngine(), Net()
    rest = dpkit.load_opacus_checkpoint(tmp_path / "run.pt", engine, model)
    x = DATA.tensors[0]
    torch.testing.assert_close(model(x), source(x))
    assert engine.get_epsilon(1e-5) == PLDAccountant().compose(dpsgd(1.1, 0.2, 10)).epsilon(1e-5) > 0
    assert rest["mine"] == 7
    assert rest["noise_scheduler_state_dict"]["gamma"] == 0.9


def test_training_goes_on(tmp_path: Path) -> None:
    """Model and momentum of the same layers, then more steps here: ε is of both together, and a budget knows it."""
    source = trained(plain, tmp_path / "run.pt")
    engine, model = dpkit.PrivacyEngine(), plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dpkit.load_opacus_checkpoint(tmp_path / "run.pt", engine, model, optimizer)
    torch.testing.assert_close(model.state_dict(), source.state_dict())
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["optimizer_state_dict"]["state"]
    for k, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], saved[k]["momentum_buffer"])
    before = engine.get_epsilon(1e-5)
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(DATA, batch_size=8), noise_multiplier=1.1,
        max_grad_norm=1.0, max_epsilon=before + 1.0, target_delta=1e-5,
    )  # fmt: skip
    for _ in range(8):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    steps = sum(n for _, n in engine.accountant.ledger)
    assert 10 < steps < 50  # it stopped
    assert engine.get_epsilon() == pytest.approx(
        PLDAccountant().compose(dpsgd(1.1, 0.2, steps)).epsilon(1e-5), rel=1e-4
    )
    assert before < engine.get_epsilon() <= before + 1.0


def test_weights_alone() -> None:
    """The state_dict of a wrapped model, distributed or not, and of one that was not wrapped."""
    model = plain()
    state = model.state_dict()
    wrapped = opacus.GradSampleModule(plain().requires_grad_(True))
    assert list(dpkit.opacus_state_dict(wrapped.state_dict(), model)) == list(state)
    for prefix in ("", "_module.", "_module.module."):
        other = dpkit.opacus_state_dict({prefix + key: value for key, value in state.items()}, model)
        assert all(torch.equal(other[key], state[key]) for key in state)
    lstm, alone = DPLSTM(3, 4, num_layers=2), nn.LSTM(3, 4, num_layers=2)
    alone.load_state_dict(dpkit.opacus_state_dict(lstm.state_dict(), alone))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(alone(x)[0], lstm(x)[0])
    kept = theirs()  # a model that keeps Opacus's layers
    assert list(dpkit.opacus_state_dict(opacus.GradSampleModule(kept).state_dict(), theirs())) == list(
        kept.state_dict()
    )


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 3, "vdim": 5}, {"bias": False}], ids=str)
def test_attention(options: dict[str, Any]) -> None:
    """Opacus's three projections are torch's packed one. Not batch first: there Opacus mixes heads and times."""
    saved, mine = DPMultiheadAttention(4, 2, **options), nn.MultiheadAttention(4, 2, **options)
    for parameter in saved.parameters():
        nn.init.normal_(parameter)
    state = opacus.GradSampleModule(nn.ModuleDict({"inner": saved})).state_dict()
    nn.ModuleDict({"inner": mine}).load_state_dict(dpkit.opacus_state_dict(state, nn.ModuleDict({"inner": mine})))
    q, k, v = torch.randn(5, 2, 4), torch.randn(6, 2, mine.kdim), torch.randn(6, 2, mine.vdim)
    torch.testing.assert_close(mine(q, k, v)[0], saved(q, k, v)[0])


def test_cells_without_their_flat_names() -> None:
    """Where only Opacus's inner names are there, they are put into torch's."""
    lstm, alone = DPLSTM(3, 4, bidirectional=True), nn.LSTM(3, 4, bidirectional=True)
    inner = {k: v for k, v in opacus.GradSampleModule(lstm).state_dict().items() if ".l0" in k}
    assert len(inner) == 8
    alone.load_state_dict(dpkit.opacus_state_dict(inner, alone))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(alone(x)[0], lstm(x)[0])


def refused(match: str, checkpoint: Any, optimizer: bool = False, model: nn.Module | None = None) -> None:
    """The checkpoint is refused, and neither weights nor moments nor what was spent have changed."""
    engine, model = dpkit.PrivacyEngine(), model or plain()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mine = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(dpkit.CheckpointError, match=match):
        dpkit.load_opacus_checkpoint(checkpoint, engine, model, mine if optimizer else None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not mine.state
    assert engine.get_epsilon(1e-5) == 0.0


def test_what_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    trained(plain, tmp_path / "run.pt")
    held = torch.load(tmp_path / "run.pt", weights_only=True)
    refused("missing: gru.bias_hh_l0, .* more; unknown: 1.bias", held, model=Net())
    wide = nn.Sequential(nn.Flatten(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 3))
    refused(r"1\.weight \[6, 20\] instead of \[7, 20\]", held, model=wide)
    refused("no optimizer's state", {k: v for k, v in held.items() if k != "optimizer_state_dict"}, optimizer=True)
    refused("a checkpoint with the keys", held["module_state_dict"])
    refused("cannot be read", tmp_path / "none.pt")
    broken = {**held, "privacy_accountant_state_dict": {"history": [(1.1, 0.2, 2.5)]}}
    with pytest.raises(ValueError, match=r"steps is 2\.5"):
        dpkit.load_opacus_checkpoint(broken, dpkit.PrivacyEngine(), plain())


def test_moments_in_another_order_are_refused(tmp_path: Path) -> None:
    """Opacus's LSTM has weights and biases in another order than torch's, at the same number of parameters."""

    def small(kind: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(1, 1), kind(4, 4, batch_first=True))

    class Last(nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.rnn = small(kind)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0][:, -1]

    trained(lambda: Last(DPLSTM), tmp_path / "run.pt")
    refused("in the order of Opacus's layers", tmp_path / "run.pt", optimizer=True, model=Last(nn.LSTM))
    trained(lambda: Last(DPLSTM), tmp_path / "plain.pt", momentum=0.0)  # without moments there is no order
    model = Last(nn.LSTM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    dpkit.load_opacus_checkpoint(tmp_path / "plain.pt", dpkit.PrivacyEngine(), model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_files_that_bring_code_are_refused(tmp_path: Path) -> None:
    """A σ that was a numpy scalar is pickled as more than a plain value; the content can be passed instead."""
    trained(plain, tmp_path / "run.pt")
    held = torch.load(tmp_path / "run.pt", weights_only=True)
    held["privacy_accountant_state_dict"]["history"] = [(np.float64(1.1), 0.2, 10)]
    torch.save(held, tmp_path / "numpy.pt")
    refused("more than plain values", tmp_path / "numpy.pt")
    engine = dpkit.PrivacyEngine()
    dpkit.load_opacus_checkpoint(torch.load(tmp_path / "numpy.pt", weights_only=False), engine, plain())
    assert engine.get_epsilon(1e-5) > 0
