"""What the engine says of itself follows what was done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dpkit
from tests.training import attach, data, mlp, train, work


def run(**options: Any) -> Any:
    return attach(mlp(), data(), 4, **{"noise_multiplier": 1.0, "target_delta": 1e-5, **options})


def test_the_numbers() -> None:
    """ε at the δ that is asked for, how many releases, σ and C of now."""
    trained = run()
    train(trained, 2)
    trained.engine.noise_multiplier, trained.engine.max_grad_norm = 2.5, 0.25
    said = trained.engine.statement()
    assert (said.epsilon, said.delta) == (trained.engine.get_epsilon(1e-5), 1e-5)
    assert trained.engine.statement(1e-3).epsilon == trained.engine.get_epsilon(1e-3) < said.epsilon
    assert "4 releases by Poisson sampling at rate 0.5" in said.mechanism
    assert "FlatClipping" in said.mechanism
    assert "σ now 2.5" in said.mechanism
    assert "C (now 0.25)" in said.mechanism
    text = str(said)
    for part in (said.neighbours, said.mechanism, said.noise, *said.assumptions, *said.left_out):
        assert part in text
    assert "adding or removing one record" in text
    assert "upper bound" in text


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("draws", [False, True])
def test_what_was_seeded_by_hand_is_labelled(noise: bool, draws: bool) -> None:
    """Of noise and draws, whichever was; and nothing where nothing was."""
    options: dict[str, Any] = {"noise_generator": torch.Generator().manual_seed(1)} if noise else {}
    if draws:
        options["loader"] = {"generator": torch.Generator().manual_seed(2)}
    said = run(**options).engine.statement()
    assert said.seeded == ("noise",) * noise + ("draws",) * draws
    assert ("SEEDED BY HAND" in str(said)) == (noise or draws)
    assert "SEEDED BY HAND: noise and draws" in str(said) or not (noise and draws)


def test_other_samplings_and_units() -> None:
    fixed = run(poisson_sampling=False, loader={"generator": torch.Generator().manual_seed(0)}).engine.statement()
    assert "zeroing out one record" in fixed.neighbours
    assert "fixed batches, each" in fixed.mechanism
    assert not fixed.seeded  # who is in a batch is no secret there
    ordered = run(poisson_sampling=False, noise=dpkit.BufferedNoise()).engine.statement()
    assert "zeroing out" in ordered.neighbours
    assert "BufferedNoise" in ordered.noise
    turns = run(noise=dpkit.BandedNoise(2)).engine.statement()
    assert "adding or removing" in turns.neighbours
    assert "cyclic Poisson" in turns.mechanism
    units = run(privacy_unit=[0, 0, 1, 1, 2, 2, 3, 3]).engine
    assert units.statement().neighbours == f"differ by adding or removing one {units._loader.units.name}"
    assert units._loader.units.name != "record"


def test_assumptions_follow_what_was_checked() -> None:
    plain = run()
    train(plain)
    strict = run()
    for x, y in strict.loader:
        strict.engine.backward((strict.model(x) - y).square().mean(1))
        strict.optimizer.step()
    said = {name: "\n".join(r.engine.statement().assumptions) for name, r in {"plain": plain, "strict": strict}.items()}
    assert "would check it" in said["plain"]
    assert "as was seen" in said["strict"]
    assert "last bits" in said["plain"]
    assert "ledger" in said["plain"]


def test_secure_mode_and_ledger_take_less_for_granted(tmp_path: Any) -> None:
    engine = dpkit.PrivacyEngine(accountant="rdp", secure_mode=True, ledger=tmp_path / "ledger")
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(data(), batch_size=4)
    engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    said = engine.statement(1e-5)
    assert "AES-256" in said.noise
    assert not any("last bits" in a or "ledger" in a for a in said.assumptions)


def test_needs_a_delta_and_a_model() -> None:
    trained = attach(mlp(), noise_multiplier=1.0)
    with pytest.raises(dpkit.ConfigurationError, match="delta"):
        trained.engine.statement()
    for batch in trained.loader:
        work(trained, batch)
    trained.engine.detach()
    with pytest.raises(dpkit.NotAttachedError):
        trained.engine.statement(1e-5)
