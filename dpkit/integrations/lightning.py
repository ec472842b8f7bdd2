"""Lightning, private: `PrivacyCallback` among the Trainer's callbacks; module and data stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder

from dpkit.engine import PrivacyEngine
from dpkit.errors import CheckpointError, ConfigurationError
from dpkit.loader import PrivateDataLoader

from .settings import options_of


class PrivacyCallback(Callback):
    """Makes ``Trainer.fit`` differentially private, under automatic optimization.

    Guarantee: that of `dpkit.PrivacyEngine`. ``training_step`` has to return the mean of one loss a record; a module
    that overrides ``backward(self, losses)`` by ``engine.backward(losses)`` has that checked.

    The data loader's batch size is the expected one of a Poisson draw; a step sees a whole logical batch. Where nobody
    was drawn the noisy step is taken, counted and followed by the learning rate schedule, and ``training_step`` is not
    called (Lightning warns, once, of a batch that is None). ε is logged as "epsilon" and shown in the progress bar;
    ``max_epsilon`` ends the training. Lightning's checkpoints hold the engine's state, are then as confidential as the
    data, and resume bit for bit.

    Args:
        privacy: the arguments of `dpkit.PrivacyEngine.make_private`: ``max_grad_norm``, ``target_delta``, and
            ``target_epsilon`` (at the end of the training) or ``noise_multiplier``.
        engine: with a ledger, in secure mode, or of another accountant; ``callback.engine`` afterwards.

    >>> trainer = Trainer(max_epochs=3, callbacks=[PrivacyCallback(                              # doctest: +SKIP
    ...     {"target_epsilon": 3.0, "target_delta": 1e-5, "max_grad_norm": 1.0})])
    """

    def __init__(self, privacy: Mapping[str, Any], engine: PrivacyEngine | None = None) -> None:
        self._privacy = options_of(privacy, also_fixed=frozenset(["max_physical_batch_size", "memory_budget"]))
        self.engine = PrivacyEngine() if engine is None else engine
        self._planned: int | None = None
        self._attached = self._resuming = False
        self._held: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raise before a Tuner's trials, in which no callback but its own takes part."""
        for callback in trainer.callbacks:
            if isinstance(callback, LearningRateFinder | BatchSizeFinder):
                raise ConfigurationError(
                    f"{type(callback).__name__} beside PrivacyCallback",
                    why="it trains on the private data without noise, and what it chooses by that is not counted.",
                    cure="choose the learning rate, and the batch size, by hand or on public data.",
                )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise for what would break the guarantee before anything is drawn."""
        _refuse_settings(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the engine, and put its draws in the place of the data loader's."""
        self.engine.detach()
        loop = trainer.fit_loop
        given, optimizer = trainer.train_dataloader, trainer.optimizers[0]
        planned = trainer.estimated_stepping_batches
        options = dict(self._privacy)
        if "target_epsilon" in options:
            options["steps"] = planned
        _, _, private = self.engine.make_private(pl_module, optimizer, given, **options)
        if len(private) != trainer.num_training_batches:
            self.engine.detach()
            raise ConfigurationError(
                f"an epoch has {trainer.num_training_batches} batches, and a pass {len(private)} steps",
                why="the number of steps, and so ε, would not be what was planned.",
                cure="leave limit_train_batches and overfit_batches out, count units in the batch size, and set "
                "max_steps to end early.",
            )
        self._attached, self._planned = True, planned if isinstance(planned, int) else None
        loop._combined_loader.flattened = [_Steps(private, optimizer, self.engine)]
        iter(loop._data_fetcher)
        if self._held is not None:
            held, self._held = self._held, None
            self.engine.load_state_dict(held)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log ε; stop where the budget is spent, or the planned steps are taken."""
        if batch is None:  # nobody was drawn: Lightning counts it as begun, too, or loses its place on resuming
            trainer.fit_loop.epoch_loop.batch_progress.increment_started()
        pl_module.log("epsilon", self.engine.get_epsilon(), prog_bar=True, batch_size=1)
        if self.engine.budget_spent or (self._planned is not None and self.engine.releases >= self._planned):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """The engine's state, for Lightning's checkpoints; nothing before the training."""
        return self.engine.state_dict(weights=False) if self._attached else {}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Raise where training would go on from weights of which nobody knows what they have cost."""
        self._resuming = trainer.state.fn == "fit"
        if self._resuming and not checkpoint["callbacks"].get(self.state_key):
            raise CheckpointError(
                f"{trainer.ckpt_path} holds no engine's state",
                why="it was saved without PrivacyCallback: what its weights have cost would be forgotten.",
                cure="go on from a checkpoint that was saved with it. Weights of a training on public data are loaded "
                "before fit: module.load_state_dict(torch.load(path)['state_dict']).",
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the engine is attached; Lightning has restored model and optimizer by then."""
        self._held = state_dict if self._resuming else None  # else somebody looks at the weights: test(ckpt_path=...)


class _Steps:
    """The private batches as Lightning goes through them; where its epochs begin and end is no concern of theirs."""

    def __init__(self, loader: PrivateDataLoader, optimizer: Any, engine: PrivacyEngine) -> None:
        self._loader, self._optimizer, self._engine = loader, optimizer, engine
        self._passes = self._run()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        while (parts := next(self._passes, None)) is not None:
            batch = next(parts, None)
            if batch is None:
                self._optimizer.step()  # nobody was drawn
            yield batch

    def _run(self) -> Iterator[Iterator[Any]]:
        while not self._engine.budget_spent:
            yield from self._loader.logical_batches()


def _refuse_settings(trainer: Any) -> None:
    reasons = [
        (
            trainer.world_size > 1,
            f"{trainer.world_size} processes",
            "each would draw, add noise and count by itself.",
            "train in one (devices=1).",
        ),
        (
            trainer.accumulate_grad_batches != 1,
            f"accumulate_grad_batches = {trainer.accumulate_grad_batches}",
            "a record could enter one step through several draws, each clipped by itself.",
            "make the data loader's batch size that of the whole step.",
        ),
        (
            bool(trainer.gradient_clip_val),
            f"gradient_clip_val = {trainer.gradient_clip_val}",
            "it clips the gradient of the batch; each record's is clipped by itself.",
            "leave it out, and set max_grad_norm.",
        ),
        (
            str(trainer.precision).startswith("16"),
            f"precision={trainer.precision!r}",
            "its loss scaling skips steps by whether some record overflows, which tells of it without noise.",
            'use precision="bf16-mixed".',
        ),
        (
            trainer.reload_dataloaders_every_n_epochs > 0,
            "reload_dataloaders_every_n_epochs",
            "the new loader's draws would not be the engine's.",
            "leave it out.",
        ),
        (
            len(trainer.optimizers) != 1,
            f"{len(trainer.optimizers)} optimizers",
            "one engine keeps one optimizer's steps.",
            "train with one.",
        ),
    ]
    for applies, seen, why, cure in reasons:
        if applies:
            raise ConfigurationError(seen, why=why, cure=cure)
