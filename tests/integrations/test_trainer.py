"""The Trainer of transformers, private, is the plain loop of dpkit: same weights, same ε, whatever the Trainer does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpkit
from dpkit.accountants import epsilon
from tests.integrations.stacks import (
    LABELS,
    LENGTH,
    RECORDS,
    VOCAB,
    Losses,
    Rows,
    bert,
    classes,
    flat,
    llama,
    rows,
    t5,
    token_mean,
    tokens,
    train_plainly,
)
from tests.test_refusals import refused

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dpkit.integrations.losses import token_losses  # noqa: E402
from dpkit.integrations.transformers import ENGINE, PrivateMixin, PrivateTrainer  # noqa: E402

DELTA = 1e-3
SEEDED: dict[str, Any] = {"noise_multiplier": 0.0, "target_delta": DELTA}


def arguments(folder: Path, **options: Any) -> Any:
    given = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.5, "max_grad_norm": 0.3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "data_seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**given, **options})


def trainer(folder: Path, model: Any, data: Any, *, privacy: Any = SEEDED, sgd: bool = True, **options: Any) -> Any:
    """A private Trainer with SGD; ``options`` that the TrainingArguments know are theirs."""
    own = ("losses", "engine", "eval_dataset", "compute_loss_func", "data_collator", "kind", "callbacks")
    extra = {name: options.pop(name) for name in own if name in options}
    optimizers = (torch.optim.SGD(model.parameters(), lr=options.get("learning_rate", 0.5)) if sgd else None, None)
    kind = extra.pop("kind", PrivateTrainer)
    args = arguments(folder, **options)
    return kind(model=model, args=args, train_dataset=data, privacy=privacy, optimizers=optimizers, **extra)


def pop(batch: dict[str, Tensor], *names: str) -> tuple[Any, ...]:
    batch = dict(batch)
    return (batch, *(batch.pop(name) for name in names))


# --- the losses, each written down again, record by record ---


def classified(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = pop(batch, "labels")
    return F.cross_entropy(model(**inputs).logits, labels, reduction="none")


def regressed(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = pop(batch, "labels")
    return (model(**inputs).logits[:, 0] - labels).square()


def multilabel(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = pop(batch, "labels")
    p = model(**inputs).logits.sigmoid()
    return -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(1)


def tagged(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = pop(batch, "labels")
    return token_mean(model(**inputs).logits, labels)


def continued(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = pop(batch, "labels")
    return token_mean(model(**inputs).logits[:, :-1], labels[:, 1:])


def translated(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = pop(batch, "labels")
    before = F.pad(labels[:, :-1].clamp(min=0), (1, 0))
    return token_mean(model(**inputs, decoder_input_ids=before).logits, labels)


def answered(model: nn.Module, batch: Any) -> Tensor:
    inputs, start, end = pop(batch, "start_positions", "end_positions")
    out = model(**inputs)
    pairs = ((out.start_logits, start), (out.end_logits, end))
    return sum(F.cross_entropy(logits, at, reduction="none") for logits, at in pairs) / 2  # type: ignore[return-value]


Case = tuple[Callable[[], Any], Callable[[], Rows], Losses]
CASES: dict[str, Case] = {
    "sequence": (lambda: bert("SequenceClassification", num_labels=LABELS), lambda: rows(classes), classified),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        lambda: rows(lambda g, _: {"labels": float(torch.randn((), generator=g))}),
        regressed,
    ),
    "several labels": (
        lambda: bert("SequenceClassification", num_labels=LABELS, problem_type="multi_label_classification"),
        lambda: rows(lambda g, _: {"labels": torch.randint(0, 2, (LABELS,), generator=g).float()}),
        multilabel,
    ),
    "token": (lambda: bert("TokenClassification", num_labels=LABELS), lambda: rows(tokens(LABELS)), tagged),
    "masked": (lambda: bert("MaskedLM"), lambda: rows(tokens(VOCAB)), tagged),
    "causal": (llama, lambda: rows(tokens(VOCAB)), continued),
    "encoder-decoder": (t5, lambda: rows(tokens(VOCAB)), translated),
    "question": (
        lambda: bert("QuestionAnswering"),
        lambda: rows(lambda g, _: {k: int(torch.randint(0, LENGTH, (), generator=g)) for k in _SPAN}),
        answered,
    ),
}
_SPAN = ("start_positions", "end_positions")


@pytest.mark.parametrize("name", CASES)
def test_is_the_plain_loop(name: str, tmp_path: Path) -> None:
    """σ = 0: the weights are those of the plain loop, the loss written down record by record, lr falling by step.

    C is above most norms: where all records are clipped, a loss may have any scale.
    """
    make, records, losses = CASES[name]
    data, rate = records(), 0.02 if name in ("regression", "question") else 0.2
    private = trainer(tmp_path, make(), data, max_grad_norm=3.0, learning_rate=rate)
    private.train()
    other = make()
    engine = train_plainly(
        other, data, losses, steps=10, batch_size=4, lr=lambda k: rate * (10 - k) / 10, max_grad_norm=3.0,
        noise_multiplier=0.0, collate=transformers.default_data_collator,
    )  # fmt: skip
    assert private.state.global_step == 10
    assert float((flat(make()) - flat(other)).abs().max()) > 1e-2
    torch.testing.assert_close(flat(private.model), flat(other), rtol=1e-4, atol=1e-5)
    assert private.engine.accountant.ledger == engine.accountant.ledger


@pytest.mark.parametrize(("accumulated", "size"), [(2, None), (4, None), (1, 3)])
def test_accumulation(accumulated: int, size: int | None, tmp_path: Path) -> None:
    """B is the size times the batches accumulated, the size bounds the parts; noise, draws, ε are the plain loop's."""
    make, records, losses = CASES["causal"]
    data, seen = records(), []

    def noisy() -> dict[str, Any]:
        return {"noise_multiplier": 0.8, "noise_generator": torch.Generator().manual_seed(5), "target_delta": DELTA}

    class Watched(PrivateTrainer):  # type: ignore[misc]
        def compute_losses(self, model: Any, inputs: Any) -> Tensor:
            seen.append(len(inputs["labels"]))
            return super().compute_losses(model, inputs)

    privacy = noisy() if size is None else {**noisy(), "max_physical_batch_size": size}
    batch = 4 // accumulated
    private = trainer(
        tmp_path, make(), data, kind=Watched, privacy=privacy,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    private.train()
    other = make()
    train_plainly(
        other, data, losses, steps=10, batch_size=4, lr=lambda k: 0.5 * (10 - k) / 10, max_grad_norm=0.3,
        collate=transformers.default_data_collator, **noisy(),
    )  # fmt: skip
    torch.testing.assert_close(flat(private.model), flat(other), rtol=1e-4, atol=1e-5)
    assert max(seen) == (size or batch)
    assert private.engine.get_epsilon() == pytest.approx(
        epsilon(noise_multiplier=0.8, sample_rate=4 / RECORDS, steps=10, delta=DELTA), rel=1e-4
    )
    assert [log["epoch"] for log in private.state.log_history[:-1]] == [k / 5 for k in range(1, 11)]


def test_nobody_drawn(tmp_path: Path) -> None:
    """A step on which nobody is drawn is one of the Trainer's steps: counted, logged, with its learning rate."""
    data, drawn = rows(classes), []

    def losses(model: nn.Module, batch: Any) -> Tensor:
        drawn.append(len(batch["labels"]))
        return classified(model, batch)

    private = trainer(
        tmp_path, CASES["sequence"][0](), data, privacy={**SEEDED, "noise_multiplier": 2.0}, losses=losses,
        per_device_train_batch_size=1, num_train_epochs=1,
    )  # fmt: skip
    private.train()
    logs = private.state.log_history[:-1]
    assert len(drawn) < RECORDS  # a third of the draws is empty
    assert sum(n for _, n in private.engine.accountant.ledger) == private.state.global_step == RECORDS == len(logs)
    assert [log["learning_rate"] for log in logs] == pytest.approx([0.5 * (20 - k) / 20 for k in range(20)])
    assert [log["loss"] == 0 for log in logs].count(True) == RECORDS - len(drawn)


# --- ε ---


def test_target_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The target is met at the last step; every log line and the progress bar say ε as of that step."""
    private = trainer(
        tmp_path, bert("SequenceClassification", num_labels=LABELS), rows(classes), eval_dataset=rows(classes, 4),
        privacy={"target_epsilon": 4.0, "target_delta": DELTA}, eval_strategy="epoch", max_steps=7, disable_tqdm=False,
    )  # fmt: skip
    private.train()
    assert 3.98 < private.engine.get_epsilon() <= 4.0
    spent = [log["epsilon"] for log in private.state.log_history if "loss" in log]
    sigma = private.engine.noise_multiplier
    expected = [epsilon(noise_multiplier=sigma, sample_rate=0.2, steps=k, delta=DELTA) for k in range(1, 8)]
    assert spent == pytest.approx(expected, rel=1e-4)
    assert all("epsilon" in log and "grad_norm" not in log for log in private.state.log_history)
    assert f"ε={private.engine.get_epsilon():.3f}" in capsys.readouterr().err
    with refused(dpkit.ConfigurationError, "spent budget already"):
        private.train()


def test_budget(tmp_path: Path) -> None:
    """Training ends before the step that would exceed it; the last state is saved; going on is no step."""
    options: dict[str, Any] = {
        "privacy": {"noise_multiplier": 1.0, "target_delta": DELTA, "max_epsilon": 4.0},
        "save_strategy": "steps", "save_steps": 100, "num_train_epochs": 20,
    }  # fmt: skip

    def engine() -> dpkit.PrivacyEngine:
        return dpkit.PrivacyEngine(accountant="rdp")

    private = trainer(
        tmp_path, bert("SequenceClassification", num_labels=LABELS), rows(classes), engine=engine(), **options
    )
    private.train()
    steps = private.state.global_step
    assert 3 < steps < 100
    more = epsilon(noise_multiplier=1.0, sample_rate=0.2, steps=steps + 1, delta=DELTA, accountant="rdp")
    assert private.engine.get_epsilon() <= 4.0 < more
    again = trainer(
        tmp_path, bert("SequenceClassification", num_labels=LABELS), rows(classes), engine=engine(), **options
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert torch.equal(flat(again.model), flat(private.model))
    assert again.engine.get_epsilon() == private.engine.get_epsilon()


# --- saving and resuming ---


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}])
def test_resumed_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    """From any checkpoint, in a pass and at its end, with dropout, Adam, evaluation, and no seed at all."""

    def begin() -> Any:
        return trainer(
            tmp_path, bert("SequenceClassification", num_labels=LABELS, dropout=True), rows(classes), sgd=False,
            privacy={"target_epsilon": 6.0, "target_delta": DELTA}, save_strategy="steps", save_steps=3,
            num_train_epochs=3, data_seed=None, eval_dataset=rows(classes, 4), eval_strategy="steps", eval_steps=3,
            learning_rate=0.05, engine=dpkit.PrivacyEngine(accountant="rdp"), **options,
        )  # fmt: skip

    whole = begin()
    whole.train()
    total = whole.state.max_steps
    folders = sorted((p.parent for p in tmp_path.glob(f"*/{ENGINE}")), key=lambda p: int(p.name.rpartition("-")[2]))
    assert len(folders) >= total // 3
    for folder in folders[::2]:
        again = begin()
        again.train(resume_from_checkpoint=str(folder))
        assert again.state.global_step == total
        assert torch.equal(flat(again.model), flat(whole.model))
        assert again.engine.get_epsilon() == whole.engine.get_epsilon()
        assert again.engine.accountant.ledger == whole.engine.accountant.ledger
        known = [log for log in whole.state.log_history if "loss" in log]
        assert [log for log in again.state.log_history if "loss" in log] == known


def test_resuming_what_is_not_whole(tmp_path: Path) -> None:
    """A folder that a crash left without the engine's state is passed over, or refused; so is one of other weights."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path, llama(), rows(tokens(VOCAB)), **options)
    whole.train()
    (tmp_path / "checkpoint-10" / ENGINE).unlink()
    again = trainer(tmp_path, llama(), rows(tokens(VOCAB)), **options)
    again.train(resume_from_checkpoint=True)  # from step 8
    assert torch.equal(flat(again.model), flat(whole.model))
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "other")
    (tmp_path / "other" / ENGINE).unlink()
    with refused(dpkit.CheckpointError, ENGINE, "saved as a whole"):
        trainer(tmp_path, llama(), rows(tokens(VOCAB)), **options).train(resume_from_checkpoint=str(tmp_path / "other"))
    shutil.copy(tmp_path / "checkpoint-8" / ENGINE, tmp_path / "other" / ENGINE)
    with refused(dpkit.CheckpointError, "model and optimizer"):
        trainer(tmp_path, llama(), rows(tokens(VOCAB)), **options).train(resume_from_checkpoint=str(tmp_path / "other"))


@pytest.mark.parametrize("saved", ["by a plain Trainer", "as a model only"])
def test_weights_of_unknown_cost(saved: str, tmp_path: Path) -> None:
    """True takes the last folder that there is; without the engine's state it is refused, not gone on from."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    if saved == "as a model only":
        trainer(tmp_path, llama(), rows(tokens(VOCAB)), save_only_model=True, **options).train()
    else:
        args = arguments(tmp_path, **options)
        transformers.Trainer(model=llama(), args=args, train_dataset=rows(tokens(VOCAB))).train()
    with refused(dpkit.CheckpointError, "checkpoint-10", "spent"):
        trainer(tmp_path, llama(), rows(tokens(VOCAB)), sgd=False, **options).train(resume_from_checkpoint=True)


def test_a_checkpoint_by_its_path(tmp_path: Path) -> None:
    """A Path is a name, too."""
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 4,
        "privacy": {**SEEDED, "noise_multiplier": 1.0},
    }
    whole = trainer(tmp_path, llama(), rows(tokens(VOCAB)), **options)
    whole.train()
    again = trainer(tmp_path, llama(), rows(tokens(VOCAB)), **options)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert again.engine.releases == whole.engine.releases == 10
    assert again.engine.accountant.ledger == whole.engine.accountant.ledger
    assert torch.equal(flat(again.model), flat(whole.model))


def test_settings_that_are_changed_later(tmp_path: Path) -> None:
    private = trainer(tmp_path, llama(), rows(tokens(VOCAB)))
    private.args.neftune_noise_alpha = 5.0
    with refused(dpkit.ConfigurationError, "neftune"):
        private.train()


# --- losses ---


def test_label_smoothing() -> None:
    """For one record it is the Trainer's own; of several records each has its own share."""
    smoother = transformers.trainer_pt_utils.LabelSmoother(0.2)
    logits, labels = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
    labels[0, 2:] = labels[1] = -100
    for shift in (False, True):
        ours = token_losses(logits, labels, shift=shift, smoothing=0.2)
        for i in (0, 2, 3):
            own = smoother({"logits": logits[i : i + 1]}, labels[i : i + 1], shift_labels=shift)
            torch.testing.assert_close(ours[i], own)
        assert ours[1] == 0


def test_label_smoothing_in_a_run(tmp_path: Path) -> None:
    make, records, _ = CASES["causal"]
    private = trainer(tmp_path, make(), records(), label_smoothing_factor=0.3, max_steps=4)
    private.train()

    def smoothed(model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = pop(batch, "labels")
        logits = model(**inputs).logits[:, :-1]
        uniform = torch.stack([token_mean(logits, torch.where(labels[:, 1:] < 0, -100, v)) for v in range(VOCAB)])
        return 0.7 * token_mean(logits, labels[:, 1:]) + 0.3 * uniform.mean(0)

    other = make()
    train_plainly(
        other, records(), smoothed, steps=4, batch_size=4, lr=lambda k: 0.5 * (4 - k) / 4, max_grad_norm=0.3,
        noise_multiplier=0.0, collate=transformers.default_data_collator,
    )  # fmt: skip
    torch.testing.assert_close(flat(private.model), flat(other), rtol=1e-4, atol=1e-5)


def test_a_model_with_another_loss(tmp_path: Path) -> None:
    """A head of a known kind whose own loss is another one is found out; so is a head of no known kind."""

    class WeightedForSequenceClassification(transformers.BertForSequenceClassification):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            out = super().forward(input_ids, attention_mask, labels=labels)
            if out.loss is not None:
                out.loss = 1.01 * out.loss
            return out

    config = bert("SequenceClassification", num_labels=LABELS).config
    with refused(dpkit.ConfigurationError, "for a single record", "losses=f"):
        trainer(tmp_path, WeightedForSequenceClassification(config), rows(classes)).train()
    own: dict[str, Any] = {"losses": classified, "max_steps": 1}
    trainer(tmp_path, WeightedForSequenceClassification(config), rows(classes), **own).train()
    with refused(dpkit.ConfigurationError, "BertForNextSentencePrediction", "losses=f"):
        trainer(tmp_path, bert("NextSentencePrediction"), rows(classes)).train()
    with refused(dpkit.ConfigurationError, "BertForMaskedLM", "the batch has input_ids, attention_mask"):
        trainer(tmp_path, bert("MaskedLM"), rows(lambda g, _: {})).train()


def test_a_loss_for_the_whole_batch(tmp_path: Path) -> None:
    with refused(dpkit.ConfigurationError, "losses has shape []"):
        trainer(tmp_path, llama(), rows(tokens(VOCAB)), losses=lambda m, batch: m(**batch).loss).train()

    def coupled(model: nn.Module, batch: Any) -> Tensor:
        losses = continued(model, batch)
        return losses * losses.mean()

    with refused(dpkit.CoupledRecordsError, "another record"):
        trainer(tmp_path, llama(), rows(tokens(VOCAB)), losses=coupled).train()


# --- what else a Trainer is ---


def test_other_trainers(tmp_path: Path) -> None:
    """The mixin before another Trainer; its own evaluation stays."""

    class Private(PrivateMixin, transformers.Seq2SeqTrainer):  # type: ignore[misc, name-defined]
        pass

    args = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, per_device_train_batch_size=4, max_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", generation_max_length=4,
    )  # fmt: skip
    data = rows(tokens(VOCAB))
    private = Private(model=t5(), args=args, train_dataset=data, privacy={**SEEDED, "noise_multiplier": 1.0})
    private.train()
    assert private.engine.get_epsilon() > 0
    before = private.engine.accountant.ledger
    assert private.predict(data[:4]).predictions.shape[0] == 4
    assert private.engine.accountant.ledger == before


def test_users_as_units(tmp_path: Path) -> None:
    """Steps and q count users; the column that says whose a row is does not reach the model."""
    data = [{**row, "user": k // 2} for k, row in enumerate(rows(classes))]
    private = trainer(
        tmp_path, bert("SequenceClassification", num_labels=LABELS), data, num_train_epochs=1,
        privacy={**SEEDED, "noise_multiplier": 1.0, "privacy_unit": "user"},
    )  # fmt: skip
    private.train()
    assert private.state.global_step == 3  # of 10 users, 4 at a time
    assert private.engine.sample_rate == 0.4


def test_bfloat16(tmp_path: Path) -> None:
    """Autocast by Accelerate."""
    make, records, _ = CASES["causal"]
    private = trainer(tmp_path, make(), records(), bf16=True, max_steps=3)
    private.train()
    other = trainer(tmp_path, make(), records(), max_steps=3)
    other.train()
    moved = flat(other.model) - flat(make())
    assert 0 < float((flat(private.model) - flat(other.model)).norm()) < 0.1 * float(moved.norm())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"neftune_noise_alpha": 5.0}, ("neftune", "longest record")),
        ({"auto_find_batch_size": True}, ("auto_find_batch_size", "sampling rate")),
        ({"optim": "lomo"}, ("lomo", "during the backward")),
        ({"enable_jit_checkpoint": True}, ("enable_jit_checkpoint", "save_steps")),
        ({"push_to_hub": True, "hub_strategy": "all_checkpoints"}, ("hub_strategy", "noise can be taken off")),
        ({"compute_loss_func": lambda *_, **__: 0}, ("compute_loss_func", "losses=f")),
        ({"privacy": {"target_epsilon": 3.0}}, ("no target_delta", "target_delta")),
        ({"privacy": {**SEEDED, "steps": 3}}, ("['steps']", "determines it")),
        ({"privacy": {**SEEDED, "sigma": 3}}, ("['sigma']", "noise_multiplier")),
    ],
)
def test_refused_settings(options: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    if options.get("push_to_hub"):
        options = {**options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "init_hf_repo", lambda self, *_: None)
        with refused(dpkit.ConfigurationError, *words):
            trainer(tmp_path, llama(), rows(tokens(VOCAB)), **options)


def test_refused_objects(tmp_path: Path) -> None:
    """Losses in the user's own methods, devices, mixed precision, searches, samplers, streams."""

    class Own(PrivateTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    with refused(dpkit.ConfigurationError, "Own has a compute_loss of its own", "compute_losses"):
        trainer(tmp_path, llama(), rows(tokens(VOCAB)), kind=Own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.TrainingArguments, "n_gpu", 2)
        with refused(dpkit.ConfigurationError, "2 devices", "CUDA_VISIBLE_DEVICES"):
            trainer(tmp_path, llama(), rows(tokens(VOCAB)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
        with refused(dpkit.ConfigurationError, "fp16", "bf16=True"):
            trainer(tmp_path, llama(), rows(tokens(VOCAB)))
    with refused(dpkit.ConfigurationError, "hyperparameter_search", "own budget"):
        trainer(tmp_path, llama(), rows(tokens(VOCAB))).hyperparameter_search()
    for strategy, name in (("group_by_length", "LengthGroupedSampler"), ("sequential", "SequentialSampler")):
        with refused(dpkit.SamplingError, name, "random"):
            trainer(tmp_path, llama(), rows(tokens(VOCAB)), train_sampling_strategy=strategy).train()

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(rows(tokens(VOCAB)))

    with refused(dpkit.SamplingError, "IterableDataset"):
        trainer(tmp_path, llama(), Stream(), max_steps=2).train()
    with refused(dpkit.ConfigurationError, "classes", "smooth"):
        model = bert("SequenceClassification", num_labels=1)
        trainer(tmp_path, model, rows(classes), label_smoothing_factor=0.1)
