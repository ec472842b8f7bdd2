"""Lightning's Trainer with the callback is the plain loop of dpkit: same weights, same ε."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpkit
from dpkit.accountants import epsilon
from tests.integrations.stacks import flat, train_plainly
from tests.test_refusals import refused
from tests.training import data, mlp

pl = pytest.importorskip("pytorch_lightning")

from dpkit.integrations.lightning import PrivacyCallback  # noqa: E402

DELTA, RECORDS = 1e-3, 20
PRIVACY: dict[str, Any] = {"noise_multiplier": 1.0, "target_delta": DELTA, "max_grad_norm": 0.5}

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:train_dataloader yielded None:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square()


class Fitted(pl.LightningModule):  # type: ignore[misc, name-defined]
    """A user's module."""

    def __init__(self, *, adam: bool = False, chance: bool = False) -> None:
        super().__init__()
        self.net, self.adam = mlp(), adam
        self.dropout = nn.Dropout(0.3 if chance else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(x))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = squared(self, batch).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", squared(self, batch).mean())

    def configure_optimizers(self) -> Any:
        kind = torch.optim.Adam if self.adam else torch.optim.SGD
        optimizer = kind(self.parameters(), lr=0.5 if not self.adam else 0.05)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, module: Any, callback: Any, *, batch_size: int = 4, **options: Any) -> Any:
    given = {
        "max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": str(folder),
    }  # fmt: skip
    trainer = pl.Trainer(**{**given, **options}, callbacks=[callback])
    trainer.fit(module, _loader(batch_size), DataLoader(data(5), 5))
    return trainer


def _loader(batch_size: int, *, seeded: bool = True) -> Any:
    return DataLoader(data(RECORDS), batch_size, generator=torch.Generator().manual_seed(3) if seeded else None)


def _iterated_once() -> torch.Generator:
    """As Lightning leaves the loader's generator: it makes an iterator of the user's loader before training starts."""
    generator = torch.Generator().manual_seed(3)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator


def test_is_the_plain_loop(tmp_path: Path) -> None:
    """σ = 0: the same weights, the schedule in steps; the module's and the optimizer's objects are the user's."""
    module, callback = Fitted(), PrivacyCallback({**PRIVACY, "noise_multiplier": 0.0})
    start = flat(module)
    trainer = fit(tmp_path, module, callback)
    other = Fitted()
    engine = train_plainly(
        other, data(RECORDS), squared, steps=15, batch_size=4, lr=lambda k: 0.5 * (1 - k / 40),
        noise_multiplier=0.0, max_grad_norm=0.5, generator=_iterated_once(),
    )  # fmt: skip
    assert trainer.global_step == 15
    assert float((flat(module) - start).abs().max()) > 1e-2
    torch.testing.assert_close(flat(module), flat(other), rtol=1e-6, atol=1e-7)
    assert callback.engine.accountant.ledger == engine.accountant.ledger
    assert type(trainer.optimizers[0]) is torch.optim.SGD


def test_target_and_log(tmp_path: Path) -> None:
    """The target is met at the last step, and ε is among what is logged."""
    callback = PrivacyCallback({"target_epsilon": 3.0, "target_delta": DELTA, "max_grad_norm": 0.5})
    trainer = fit(tmp_path, Fitted(), callback)
    sigma = callback.engine.noise_multiplier
    expected = epsilon(noise_multiplier=sigma, sample_rate=4 / RECORDS, steps=15, delta=DELTA)
    assert 2.99 < callback.engine.get_epsilon() <= 3.0
    assert callback.engine.get_epsilon() == pytest.approx(expected, rel=1e-4)
    assert float(trainer.callback_metrics["epsilon"]) == pytest.approx(expected, rel=1e-4)
    assert "val_loss" in trainer.callback_metrics


def test_nobody_drawn(tmp_path: Path) -> None:
    """Steps on which nobody is drawn are counted, and followed by the schedule; max_steps plans all of them."""
    callback = PrivacyCallback(PRIVACY)
    trainer = fit(tmp_path, Fitted(), callback, batch_size=1, max_epochs=1)
    assert callback.engine.releases == sum(n for _, n in callback.engine.accountant.ledger) == RECORDS
    assert trainer.global_step < RECORDS  # Lightning counts those that had a batch
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * (1 - RECORDS / 40))
    callback = PrivacyCallback({"target_epsilon": 3.0, "target_delta": DELTA, "max_grad_norm": 0.5})
    fit(tmp_path, Fitted(), callback, batch_size=1, max_epochs=-1, max_steps=30)
    assert callback.engine.releases == 30
    assert callback.engine.get_epsilon() <= 3.0


def test_budget(tmp_path: Path) -> None:
    callback = PrivacyCallback({**PRIVACY, "max_epsilon": 3.0})
    fit(tmp_path, Fitted(), callback, max_epochs=50)
    steps = callback.engine.releases
    more = epsilon(noise_multiplier=1.0, sample_rate=4 / RECORDS, steps=steps + 1, delta=DELTA)
    assert 3 < steps < 250
    assert callback.engine.get_epsilon() <= 3.0 < more


def test_strict_door(tmp_path: Path) -> None:
    """A module whose ``backward`` takes the strict door returns one loss a record."""

    class Strict(Fitted):
        engine: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return squared(self, batch)[:, 0]

        def backward(self, loss: Tensor) -> None:
            Strict.engine.backward(loss)

    plain, strict = Fitted(), Strict()
    privacy = {**PRIVACY, "noise_multiplier": 0.0}
    fit(tmp_path, plain, PrivacyCallback(privacy))
    callback = PrivacyCallback(privacy)
    Strict.engine = callback.engine
    fit(tmp_path, strict, callback)
    torch.testing.assert_close(flat(strict), flat(plain))
    assert callback.engine._step is not None
    assert callback.engine._step.strictly_examined


@pytest.mark.parametrize("batch_size", [4, 1])
def test_resumed_bit_for_bit(batch_size: int, tmp_path: Path) -> None:
    """From Lightning's own checkpoints, in an epoch and at its end, with dropout and Adam, without a seed."""

    def begin(ckpt: Path | None = None) -> tuple[Any, Any]:
        keep = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / "whole", every_n_train_steps=2, save_top_k=-1)
        callback = PrivacyCallback(PRIVACY, dpkit.PrivacyEngine(accountant="rdp"))
        module = Fitted(adam=True, chance=True)
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=str(tmp_path), max_epochs=3, callbacks=[callback, keep],
        )  # fmt: skip
        trainer.fit(module, _loader(batch_size, seeded=False), ckpt_path=ckpt)
        return module, callback

    module, callback = begin()
    saved = sorted((tmp_path / "whole").iterdir(), key=lambda p: int(p.stem.rpartition("=")[2]))
    assert len(saved) >= 6
    for path in saved[:: len(saved) // 3]:
        again, other = begin(path)
        assert other.engine.releases == callback.engine.releases
        assert torch.equal(flat(again), flat(module))
        assert other.engine.get_epsilon() == callback.engine.get_epsilon()
        assert other.engine.accountant.ledger == callback.engine.accountant.ledger


def test_weights_of_unknown_cost(tmp_path: Path) -> None:
    """A checkpoint without the engine's state does not go on; one is saved before the training, too, and is none."""
    plain = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path), enable_checkpointing=False,
    )  # fmt: skip
    plain.fit(Fitted(), _loader(4))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback = PrivacyCallback(PRIVACY)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path), enable_checkpointing=False, callbacks=[callback],
    )  # fmt: skip
    trainer.validate(Fitted(), DataLoader(data(5), 5), verbose=False)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    for name in ("plain", "early"):
        with refused(dpkit.CheckpointError, "no engine's state", "forgotten"):
            trainer.fit(Fitted(), _loader(4), ckpt_path=tmp_path / f"{name}.ckpt")
    assert callback.engine.releases == 0


def test_looking_at_a_checkpoint_is_not_resuming(tmp_path: Path) -> None:
    """fit, validate an older checkpoint, and fit on: what was spent adds up."""
    callback, module = PrivacyCallback(PRIVACY), Fitted()
    trainer = fit(tmp_path, module, callback)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, _loader(4))
    trainer.validate(module, DataLoader(data(5), 5), verbose=False, ckpt_path=tmp_path / "c.ckpt")
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, _loader(4))
    assert callback.engine.releases == 25
    assert sum(n for _, n in callback.engine.accountant.ledger) == 25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 2}, ("accumulate_grad_batches", "batch size")),
        ({"gradient_clip_val": 1.0}, ("gradient_clip_val", "max_grad_norm")),
        ({"limit_train_batches": 2}, ("an epoch has 2 batches", "max_steps")),
        ({"reload_dataloaders_every_n_epochs": 1}, ("reload_dataloaders", "draws")),
    ],
)
def test_refused_settings(options: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    with refused(dpkit.ConfigurationError, *words):
        fit(tmp_path, Fitted(), PrivacyCallback(PRIVACY), **options)


def test_tuners_are_refused(tmp_path: Path) -> None:
    """They train without the callback, and choose by what they see."""
    module = Fitted()
    module.lr, module.batch_size = 0.1, 4
    module.train_dataloader = lambda: _loader(module.batch_size)
    module.val_dataloader = lambda: DataLoader(data(5), 5)
    for finder in (pl.callbacks.LearningRateFinder(), pl.callbacks.BatchSizeFinder()):
        callbacks = [PrivacyCallback(PRIVACY), finder]
        trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=callbacks, default_root_dir=str(tmp_path))
        with refused(dpkit.ConfigurationError, type(finder).__name__, "not counted"):
            trainer.fit(module)
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[PrivacyCallback(PRIVACY)])
    with refused(dpkit.ConfigurationError, "LearningRateFinder", "not counted"):
        pl.tuner.Tuner(trainer).lr_find(module)


def test_refused_arguments() -> None:
    for name in ("max_physical_batch_size", "epochs", "sigma"):
        with refused(dpkit.ConfigurationError, name, "pass some of"):
            PrivacyCallback({**PRIVACY, name: 4})
    with refused(dpkit.ConfigurationError, "target_delta"):
        PrivacyCallback({"noise_multiplier": 1.0})
