"""Adapters of peft: added before or after, saved by peft as ever, merged exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dpkit
from dpkit.accountants import epsilon
from tests.integrations.stacks import LABELS, RECORDS, VOCAB, bert, classes, flat, llama, rows, tokens, train_plainly
from tests.integrations.test_trainer import DELTA, SEEDED, continued, trainer
from tests.oracle import clipped_sum, size
from tests.test_refusals import refused

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.24 by an older name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def adapted(kind: str) -> Any:
    torch.manual_seed(2)
    return peft.get_peft_model(llama(), KINDS[kind]())


def generated(model: nn.Module, batch: Any) -> torch.Tensor:
    """`continued` for models that put virtual tokens before the text."""
    labels = batch["labels"]
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    padded = torch.nn.functional.pad(labels, (out.shape[1] - labels.shape[1], 0), value=-100)

    def logits(**_: Any) -> Any:
        return type("Out", (), {"logits": out})

    return continued(logits, {"labels": padded})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_trainer(kind: str, tmp_path: Path) -> None:
    """The Trainer takes the steps of the plain loop; the base is untouched; what peft saves loads as ever."""
    data = rows(tokens(VOCAB))
    private = trainer(tmp_path, adapted(kind), data, save_strategy="epoch", num_train_epochs=2, learning_rate=1.0)
    frozen = {name: p.clone() for name, p in private.model.named_parameters() if not p.requires_grad}
    start = flat(private.model)
    private.train()
    other = adapted(kind)
    train_plainly(
        other, data, generated, steps=10, batch_size=4, lr=lambda k: (10 - k) / 10, max_grad_norm=0.3,
        noise_multiplier=0.0, collate=transformers.default_data_collator,
    )  # fmt: skip
    assert float((flat(private.model) - start).abs().max()) > 1e-2
    torch.testing.assert_close(flat(private.model), flat(other), rtol=1e-5, atol=1e-6)
    for name, p in private.model.named_parameters():
        assert p.requires_grad or torch.equal(p, frozen[name])
    private.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "saved"))
    for folder in ("saved", "checkpoint-10"):
        held = {p.name for p in (tmp_path / folder).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= held
        assert "model.safetensors" not in held
    batch = transformers.default_data_collator(data[:3])
    private.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, private.model(**batch).logits)
    again = trainer(tmp_path, adapted(kind), data, num_train_epochs=2, learning_rate=1.0, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(flat(again.model), flat(private.model))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_merging(kind: str, tmp_path: Path) -> None:
    """While the engine is attached or not; the merged model is the trained one."""
    private = trainer(tmp_path, adapted(kind), rows(tokens(VOCAB)), max_steps=3, learning_rate=1.0)
    private.train()
    batch = transformers.default_data_collator(rows(tokens(VOCAB))[:3])
    model = private.model.eval()
    with torch.no_grad():
        before = model(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, before, rtol=1e-4, atol=1e-5)
        bare = llama().eval()(**batch).logits
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert float((before - bare).abs().max()) > 1e-2


def attach(model: nn.Module, data: Any, **options: Any) -> tuple[dpkit.PrivacyEngine, Any, Any]:
    engine = dpkit.PrivacyEngine()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    collate = transformers.default_data_collator
    loader: Any = DataLoader(data, batch_size=len(data), collate_fn=collate)
    return engine, *engine.make_private(model, optimizer, loader, max_grad_norm=0.3, **options)[1:]


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_added(when: str) -> None:
    """Before make_private, or after it (the new parameters go to the optimizer): the step is the oracle's."""
    data = rows(tokens(VOCAB))[2:8]
    if when == "before":
        model = adapted("lora").double()
        engine, optimizer, loader = attach(model, data, noise_multiplier=0.0)
    else:
        model = llama().double()
        engine, optimizer, loader = attach(model, data, noise_multiplier=0.0)
        torch.manual_seed(2)
        model = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model).double()
        optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    batch = transformers.default_data_collator(data)
    expected = clipped_sum(model, continued, batch, size(batch), 0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for drawn in loader:
        engine.backward(continued(model, drawn))
        optimizer.step()
    assert expected
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(before[name] - p.detach(), expected[name] / len(data), rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(p, before[name])


def test_epsilon_of_adapters(tmp_path: Path) -> None:
    """A classifier with LoRA and a new head: both are trained, and ε is that of the steps."""
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(bert("SequenceClassification", num_labels=LABELS), config)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in start)
    private = trainer(
        tmp_path, model, rows(classes), privacy={"target_epsilon": 5.0, "target_delta": DELTA}, num_train_epochs=1
    )
    private.train()
    sigma = private.engine.noise_multiplier
    expected = epsilon(noise_multiplier=sigma, sample_rate=4 / RECORDS, steps=5, delta=DELTA)
    assert 4.99 < private.engine.get_epsilon() <= 5.0
    assert private.engine.get_epsilon() == pytest.approx(expected, rel=1e-4)
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start)


def test_a_whole_batch_loss_of_adapters(tmp_path: Path) -> None:
    """peft's own forward returns the batch's average as well."""
    with refused(dpkit.ConfigurationError, "losses has shape []"):
        trainer(
            tmp_path, adapted("lora"), rows(tokens(VOCAB)), privacy=SEEDED, losses=lambda m, batch: m(**batch).loss
        ).train()
