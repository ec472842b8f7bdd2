"""The Trainer of transformers, private: `PrivateTrainer` in place of ``Trainer``, and what the budget is.

The Trainer's loop stays as it is and sees steps; each of them draws a logical batch, computes one loss a record, and
takes the engine's strict door. The Trainer's own sampler, batch-averaged loss and clipping are not used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from dpkit.engine import PrivacyEngine
from dpkit.errors import BudgetExhaustedError, CheckpointError, ConfigurationError, SamplingError
from dpkit.loader import PrivateDataLoader
from dpkit.ranks import world
from dpkit.sampling import checked, sampling_of
from dpkit.units import units_of

from .losses import head_losses
from .settings import options_of

ENGINE = "dpkit.ckpt"
"""The engine's state inside a checkpoint folder of the Trainer; as confidential as the data."""

Losses = Callable[[nn.Module, dict[str, Any]], Tensor]


class PrivateMixin:
    """What makes a Trainer private; for other classes than ``Trainer`` itself:

    >>> class Mine(PrivateMixin, Seq2SeqTrainer): ...                                           # doctest: +SKIP

    See `PrivateTrainer`.
    """

    args: Any
    model: Any
    optimizer: Any
    state: Any
    control: Any
    accelerator: Any
    callback_handler: Any
    label_smoother: Any
    compute_loss_func: Any
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        privacy: Mapping[str, Any],
        engine: PrivacyEngine | None = None,
        losses: Losses | None = None,
        **kwargs: Any,
    ) -> None:
        self._privacy = options_of(privacy)
        self._losses = losses
        super().__init__(*args, **kwargs)
        self.engine = PrivacyEngine() if engine is None else engine
        _refuse_settings(self)
        self._private: PrivateDataLoader | None = None
        self._steps: Iterator[Iterator[Any]] = iter(())
        self._resumed: Path | None = None
        self._compared = losses is not None or bool(_overrides(self, "compute_losses", PrivateMixin))
        self._flops = 0
        self.add_callback(_Flow(self))  # type: ignore[attr-defined]

    # ---- the loss

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """One loss a record, [n]; override it, or pass ``losses``, for another loss than that of the model's head.

        Args:
            model: as the Trainer calls it.
            inputs: the batch, labels included, on the model's device.
        """
        if self._losses is not None:
            return self._losses(model, inputs)
        smoothing = 0.0 if self.label_smoother is None else float(self.label_smoother.epsilon)
        return head_losses(_inside_adapters(self.model), inputs, model, smoothing=smoothing)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A logical batch in its parts; of the batches that the Trainer accumulates, the last one stands for all."""
        total, n = torch.zeros((), device=self.args.device), 0
        if not inputs["last"]:
            return total
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers
        self._flops = 0
        for batch in self._next_logical_batch():
            batch = self._prepare_inputs(batch)  # type: ignore[attr-defined]
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                if not self._compared:
                    self._compare_with_own_loss(model, batch)
                losses = self.compute_losses(model, batch)
            self.engine.backward(losses)
            total, n = total + losses.detach().sum(), n + losses.shape[0]
            self._flops += super().floating_point_ops(batch)  # type: ignore[misc]
            super()._track_num_input_tokens(batch)  # type: ignore[misc]
        return total / max(n, 1)

    def _compare_with_own_loss(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """For a batch of one record the model's own average must be the loss of that record; it is asked of two."""
        n = max((len(v) for v in batch.values() if isinstance(v, Tensor)), default=0)
        training, tolerance = model.training, max(1e-3, 2 * torch.finfo(next(self.model.parameters()).dtype).eps)
        with self.engine.paused(), torch.no_grad(), torch.random.fork_rng():
            model.eval()
            for i in range(min(n, 2)):
                row = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
                ours = float(self.compute_losses(model, dict(row)))
                own = float(super().compute_loss(model, dict(row)))  # type: ignore[misc]
                if math.isfinite(own) and abs(own - ours) > tolerance * max(abs(own), 1e-2):
                    raise ConfigurationError(
                        f"the loss of {type(self.model).__name__} for a single record is {own:.5g}, and the loss that "
                        f"its kind of head has is {ours:.5g}",
                        why="training would follow another loss than the model's own.",
                        cure="pass losses=f, a function of (model, inputs) that returns one loss a record.",
                    )
                self._compared = self._compared or math.isfinite(own)  # it is not where no label counts
        model.train(training)

    # ---- the data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """What the Trainer counts: for each step as many items as it accumulates. The data come from the engine."""
        loader, units = self._data()
        sizes = {k: v for k, v in units.items() if k != "max_physical_batch_size" or isinstance(v, int)}
        sizes = {"privacy_unit": None, **sizes}
        poisson = self._privacy.get("poisson_sampling", True)
        sampling = sampling_of(checked(loader), units_of(loader.dataset, **sizes), poisson=poisson)
        steps = _Steps(sampling.steps, self.args.gradient_accumulation_steps)
        return DataLoader(steps, batch_size=1, collate_fn=_only, generator=torch.Generator())

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Records in a data loader's data set."""
        if isinstance(dataloader.dataset, _Steps):
            return len(self.train_dataset)
        return int(super().num_examples(dataloader))  # type: ignore[misc]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """The items of one step; none where the budget is spent."""
        if self.engine.budget_spent:
            self.control.should_training_stop = True
            return [], None
        items = [item for _, item in zip(range(num_batches), epoch_iterator, strict=False)]
        return items, None

    def _data(self) -> tuple[DataLoader[Any], dict[str, Any]]:
        """The training data as the engine is given them, and what says whose rows they are."""
        given = super().get_train_dataloader()  # type: ignore[misc]
        if isinstance(given.dataset, IterableDataset):
            checked(given)
        shuffled = _shuffled(given, poisson=self._privacy.get("poisson_sampling", True))
        generator = None if self.args.data_seed is None else torch.Generator().manual_seed(self.args.data_seed)
        workers = {} if not given.num_workers else {"prefetch_factor": given.prefetch_factor}
        loader: DataLoader[Any] = DataLoader(
            given.dataset,
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
            shuffle=shuffled,
            drop_last=self.args.dataloader_drop_last,
            collate_fn=given.collate_fn,
            num_workers=given.num_workers,
            pin_memory=given.pin_memory,
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            persistent_workers=given.persistent_workers,
            generator=generator,
            **workers,
        )
        names = ("privacy_unit", "max_rows_per_unit", "unit_reduction", "augmentations", "max_physical_batch_size")
        units = {name: self._privacy[name] for name in names if name in self._privacy}
        unit = units.get("privacy_unit")
        if given.dataset is not self.train_dataset and (isinstance(unit, str) or callable(unit)):
            # the Trainer has taken columns away that the model does not know
            rows: Any = self.train_dataset
            units["privacy_unit"] = [unit(row) if callable(unit) else row[unit] for row in rows]
        return loader, units

    # ---- the step

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Attach the engine, now that there is an optimizer and a number of steps; then as the Trainer does."""
        self.engine.detach()
        if world() > 1:
            raise ConfigurationError(
                f"a Trainer in one of {world()} processes",
                why="it wraps the model in DistributedDataParallel, which adds up gradients that nobody has clipped.",
                cure="train in one process; several processes run a loop of one's own (docs/many_devices.md).",
            )
        loader, units = self._data()
        options = {"max_grad_norm": self.args.max_grad_norm, **self._privacy, **units}
        if self.args.gradient_accumulation_steps > 1:
            options.setdefault("max_physical_batch_size", self.args.train_batch_size)
        if "target_epsilon" in options:
            options["steps"] = num_training_steps
        optimizer_here = self.optimizer if optimizer is None else optimizer
        _, _, self._private = self.engine.make_private(
            module=self.model, optimizer=optimizer_here, data_loader=loader, **options
        )
        self._steps = self._passes(self._private)
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _passes(self, loader: PrivateDataLoader) -> Iterator[Iterator[Any]]:
        """The logical batches of one pass after the other."""
        while not self.engine.budget_spent:
            yield from loader.logical_batches()

    def _next_logical_batch(self) -> Iterator[Any]:
        parts = next(self._steps, None)
        if parts is None:
            raise BudgetExhaustedError(
                "the budget was spent while a step was begun",
                why="another run on the same ledger took what was left. Nothing was released.",
                cure="stop here; the weights are those of the last step.",
            )
        return parts

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """There is no gradient before the release, for the Trainer to clip or to log."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of a batch; of a step, those of its records."""
        if "last" not in inputs:
            return int(super().floating_point_ops(inputs))  # type: ignore[misc]
        return self._flops if inputs["last"] else 0

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counted with the records."""

    # ---- ε, saving, resuming

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With ε at target_delta, as of this step."""
        if self._private is not None:
            logs["epsilon"] = self.engine.get_epsilon()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; True resumes from the last checkpoint that was saved as a whole."""
        _refuse_settings(self)  # they may have been changed
        folder: Any = resume_from_checkpoint
        if folder is True:  # the last one may be what a crash left of it
            held = [p for p in Path(self.args.output_dir).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
            whole = [p for p in held if (p / ENGINE).is_file()]
            folder = max(whole or held, key=lambda p: int(p.name.rpartition("-")[2]), default=True)
        elif folder is not None and folder is not False:
            folder = Path(folder)
        self._resumed = folder if isinstance(folder, Path) else None
        return super().train(folder if self._resumed is None else str(folder), *args, **kwargs)  # type: ignore[misc]

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: every trial spends, and choosing among them by private data is not counted."""
        raise ConfigurationError(
            "hyperparameter_search() of a private Trainer",
            why="each trial spends its own budget, and choosing the best by private data costs more.",
            cure="search on public data; or train each one by itself, with one ledger for all of them.",
        )

    def _save_engine(self) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not self.args.save_only_model:
            self.engine.save_checkpoint(folder / ENGINE, extra=self.state.global_step, weights=False)

    def _resume_engine(self) -> None:
        folder, self._resumed = self._resumed, None
        if folder is None:
            return
        if not (folder / ENGINE).is_file():
            raise CheckpointError(
                f"{folder} holds no {ENGINE}",
                why="it was not saved by a private Trainer, or not to its end: what was drawn, released and spent by "
                "then is not known.",
                cure="name a checkpoint that was saved as a whole.",
            )
        self.engine.load_checkpoint(folder / ENGINE)


class PrivateTrainer(PrivateMixin, Trainer):
    """A ``Trainer`` whose ``train()`` is differentially private.

    Guarantee: that of `dpkit.PrivacyEngine`, with one loss a record that is checked to be one (the strict door).

    A step draws each record with q = B / N, with the expected batch size B = ``per_device_train_batch_size`` ·
    ``gradient_accumulation_steps``. Steps, epochs, ``max_steps`` and learning rate schedules count these; so does
    ``target_epsilon``, which is met at the last of them. Where gradients are accumulated, no more than
    ``per_device_train_batch_size`` records go through the model at a time (``max_physical_batch_size`` says otherwise).

    Args:
        privacy: the arguments of `dpkit.PrivacyEngine.make_private`: ``target_delta``, and ``target_epsilon`` (at the
            end of the training) or ``noise_multiplier``. ``max_grad_norm``, the bound on each record's gradient, is
            that of the TrainingArguments where it is not here; the Trainer's own clipping is switched off.
        engine: with a ledger, in secure mode, or of another accountant; `trainer.engine` afterwards.
        losses: a function of (model, inputs) that returns one loss a record, [n]. By default the loss of the model's
            head (sequence or token classification, masked or causal language model, question answering), the mean over
            each record's own tokens; on the first batch it is compared with the model's own.
        *args, **kwargs: as for ``Trainer``.

    Logs and the progress bar show ε. Checkpoints resume bit for bit; the file ``dpkit.ckpt`` in them is as confidential
    as the data. ``data_seed`` seeds the draws, and so gives up their protection against those who know it.

    Raises:
        ConfigurationError: a setting that would break the guarantee, or have no effect.
        SamplingError: a sampler, or a data set, whose draws cannot be accounted.

    >>> trainer = PrivateTrainer(model, args, train_dataset=data,                               # doctest: +SKIP
    ...     privacy={"target_epsilon": 3.0, "target_delta": 1e-5})
    >>> trainer.train()                                                                         # doctest: +SKIP
    """


class _Flow(TrainerCallback):
    """The Trainer's own flow of control, where the engine has a say in it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._resume_engine()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self._trainer.engine
        for callback in self._trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None and hasattr(bar, "set_postfix"):
                bar.set_postfix({"ε": f"{engine.get_epsilon():.3f}"}, refresh=False)
        if engine.budget_spent and not control.should_training_stop:
            control.should_training_stop = control.should_log = True
            control.should_save |= args.save_strategy == "steps"
            control.should_evaluate |= args.eval_strategy == "steps"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._save_engine()


class _Steps(Dataset[dict[str, bool]]):
    """What stands for the batches of the Trainer's epoch; the last one of each step does the work."""

    def __init__(self, steps: int, accumulated: int) -> None:
        self.steps, self.accumulated = steps, accumulated

    def __len__(self) -> int:
        return self.steps * self.accumulated

    def __getitem__(self, k: int) -> dict[str, bool]:
        return {"last": (k + 1) % self.accumulated == 0}


def _only(rows: list[Any]) -> Any:
    return rows[0]


def _inside_adapters(model: Any) -> Any:
    """The model of transformers that peft has put adapters into."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _shuffled(loader: DataLoader[Any], *, poisson: bool) -> bool:
    """Whether the Trainer would shuffle.

    Raises:
        SamplingError: it would draw by another rule than the engine accounts.
    """
    batches = loader.batch_sampler
    sampler = getattr(batches, "sampler", None)
    uniform = isinstance(sampler, RandomSampler) and not sampler.replacement
    uniform = uniform and sampler.num_samples == len(loader.dataset)  # type: ignore[union-attr,arg-type]
    if type(batches) is BatchSampler and (uniform or (type(sampler) is SequentialSampler and not poisson)):
        return uniform
    name = type(sampler if type(batches) is BatchSampler else batches).__name__
    raise SamplingError(
        f"the Trainer draws by {name}",
        why="the engine draws each record independently, at one rate: what was asked for would not happen.",
        cure='leave train_sampling_strategy at "random"; or pass privacy={"poisson_sampling": False, ...} to keep '
        "batches in sequence, for which no amplification is claimed.",
    )


def _overrides(trainer: Any, name: str, *owners: type) -> str:
    """The class that defines a method, "" if it is one of its owners."""
    home = next(c for c in type(trainer).__mro__ if name in vars(c))
    return "" if home in owners else home.__name__


def _refuse_settings(trainer: Any) -> None:
    """Raise for the first setting that would break the guarantee, or that the private loop would pass over."""
    args, accelerator = trainer.args, trainer.accelerator
    several, optim = max(args.n_gpu, args.world_size), str(getattr(args.optim, "value", args.optim))
    own = [name for name in ("compute_loss", "training_step") if _overrides(trainer, name, PrivateMixin, Trainer)]
    one_loss = "write the loss as one a record: losses=f, a function of (model, inputs), or override compute_losses."
    reasons = [
        (
            several > 1,
            f"the Trainer would train on {several} devices",
            "each would draw, add noise and count by itself.",
            "let it see one device (CUDA_VISIBLE_DEVICES=0).",
        ),
        (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.is_model_parallel,
            "DeepSpeed, FSDP, or a model on several devices",
            "they take the model or its optimizer apart, out of the engine's sight.",
            "train on one device.",
        ),
        (
            accelerator.mixed_precision not in ("no", "bf16"),
            f"mixed precision {accelerator.mixed_precision}",
            "its loss scaling skips steps by whether some record overflows, which tells of it without noise.",
            "use bf16=True.",
        ),
        (
            bool(own) and trainer._losses is None and not _overrides(trainer, "compute_losses", PrivateMixin),
            f"{type(trainer).__name__} has a {' and a '.join(own)} of its own",
            "a private step takes one loss a record, and would pass over it.",
            one_loss,
        ),
        (
            trainer.compute_loss_func is not None and trainer._losses is None,
            "compute_loss_func",
            "it gives one loss for a whole batch, in which records cannot be told apart.",
            one_loss,
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size",
            "another batch size is another sampling rate; steps taken before would be those of another run.",
            'pass privacy={"max_physical_batch_size": "auto", ...}: parts as large as memory allows.',
        ),
        (
            args.neftune_noise_alpha is not None,
            "neftune_noise_alpha",
            "the size of its noise follows the longest record of the batch, so that records depend on each other.",
            "leave it out.",
        ),
        (
            getattr(args, "enable_jit_checkpoint", False),
            "enable_jit_checkpoint",
            "it saves without the engine's state, and in the middle of a step.",
            "save by save_strategy and save_steps.",
        ),
        (
            "lomo" in optim or "layerwise" in optim,
            f"optim={optim!r}",
            "it updates weights during the backward pass, before anything was clipped or noised.",
            'use another optimizer, "adamw_torch" say.',
        ),
        (
            args.push_to_hub and "checkpoint" in str(getattr(args.hub_strategy, "value", args.hub_strategy)),
            "hub_strategy that publishes checkpoints",
            "with the engine's state in them the noise can be taken off the weights.",
            'use hub_strategy="every_save" or "end".',
        ),
        (
            args.label_smoothing_factor != 0 and trainer._losses is None and not _has_classes(trainer.model),
            "label_smoothing_factor for a model that has no classes",
            "there is nothing to smooth.",
            "set it to 0.",
        ),
    ]
    for applies, seen, why, cure in reasons:
        if applies:
            raise ConfigurationError(seen, why=why, cure=cure)


def _has_classes(model: Any) -> bool:
    config, kind = model.config, str(getattr(_inside_adapters(model), "loss_type", ""))
    regression = getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", 2) == 1
    return kind != "ForQuestionAnswering" and not (regression and kind.endswith("Classification"))
