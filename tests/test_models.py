"""Architectures as they are used: dropout, padding, adapters, other heads and lengths, mixtures of experts, towers.

One noiseless private step against the batched vector-Jacobian product, in float64. `make audit` does it for all 54.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dpkit
from tests import models as m
from tests.cases import ModelCase, language_loss, normal, plain, squared
from tests.hf_models import DECODER, HF_CASES, LENGTH, TEXT, VOCAB, _classified_texts, _texts, case, classified
from tests.oracle import Losses, PyTree, batched_vjp_grads, clip, clipped_sum, norm, size
from tests.stepping import median_norm, private_step
from tests.variants import VARIANTS, variants

BY_NAME = {c.name: c for c in HF_CASES}
FAST = (
    "bert", "roberta", "distilbert", "deberta_v2", "gpt2", "opt", "llama", "gemma", "mixtral", "t5", "vit", "swin",
    "convnext", "clip", "whisper", "llava",
)  # fmt: skip


def assert_exact(model: nn.Module, losses: Losses, batch: PyTree, tolerance: float = 1e-5) -> None:
    """Fails unless the private step is the clipped sum, with half of the records clipped."""
    n = size(batch)
    stacked = batched_vjp_grads(copy.deepcopy(model), losses, batch, n)
    grads = [{name: value[i] for name, value in stacked.items()} for i in range(n)]
    bound = float(torch.stack([norm(grad) for grad in grads]).median())
    total = {k: torch.stack([clip(grad, bound)[k] for grad in grads]).sum(0) for k in stacked}
    step = private_step(model, losses, batch, bound, loss_reduction="sum")
    error = float(norm({k: n * step[k] + total[k] for k in total}) / norm(total))
    assert error <= tolerance


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("name", FAST)
def test_variants(name: str, variant: str) -> None:
    """The fast part of the audit; the plain variant is in test_exact.py."""
    for found in variants(BY_NAME[name], names=(variant,)):
        assert_exact(found.model, found.losses, found.batch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [c.name for c in HF_CASES if "coupled" not in c.tags])
def test_all_variants(name: str, variant: str) -> None:
    """All of it."""
    for found in variants(BY_NAME[name], names=(variant,)):
        try:
            assert_exact(found.model, found.losses, found.batch)
        except dpkit.ConfigurationError as error:
            assert "nan" in str(error)  # noqa: PT017  the model's own gradients are not finite (padding left in Bloom)


def test_variants_are_what_they_say() -> None:
    """Dropout drops, left padding is on the left and changes no record's tokens, B = T is so."""
    found = {v.name: v for v in variants(BY_NAME["llama"])}
    assert set(found) == set(VARIANTS)
    plain, left = found["plain"].batch, found["padding left"].batch
    assert not torch.equal(plain["attention_mask"], left["attention_mask"])
    assert bool((left["attention_mask"].diff(dim=1) >= 0).all())
    for a, b in (("input_ids", "attention_mask"), ("labels", "labels")):
        for i in range(4):
            kept, moved = plain[a][i], left[a][i]
            if a == "input_ids":
                kept, moved = kept[plain[b][i] == 1], moved[left[b][i] == 1]
            else:
                kept, moved = kept[kept != -100], moved[moved != -100]
            assert torch.equal(kept, moved)
    assert size(found["B = T"].batch) == found["B = T"].batch["input_ids"].shape[1]
    drop = found["dropout"]
    with torch.no_grad():
        one, two = (drop.losses(drop.model, drop.batch) for _ in range(2))
        assert torch.equal(one, two)
        assert not torch.equal(one, found["plain"].losses(found["plain"].model, plain))


# --- lengths and heads ---


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7])
def test_t5_at_every_length(length: int) -> None:
    """The relative bias [1, h, T, T], with 4 records."""
    base = BY_NAME["t5"]
    batch = base.records(dtype=torch.float64)
    batch = {k: v[:, :length] for k, v in batch.items()}
    batch["labels"][:, 0] = 3
    assert_exact(base.model(torch.float64), base.losses, batch)


def tagged(model: nn.Module, batch: PyTree) -> Tensor:
    """One label of three for each token that is no padding."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return language_loss(logits, (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100))


def _with_end(n: int, g: torch.Generator) -> PyTree:
    """Texts with one end token each, as BART's and T5's classifiers need them."""
    batch = _classified_texts(n, g)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 2, 3)
    ids[torch.arange(n), batch["attention_mask"].sum(1) - 1] = 2
    return {**batch, "input_ids": ids}


BART = {
    **TEXT, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
HEADS = [
    case("bert-tokens", "BertForTokenClassification", "Bert", TEXT, _texts(LENGTH), tagged),
    case("distilbert-tokens", "DistilBertForTokenClassification", "DistilBert",
         {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "vocab_size": VOCAB, "num_labels": 3},
         _texts(LENGTH), tagged),
    case("llama-tokens", "LlamaForTokenClassification", "Llama", DECODER, _texts(LENGTH), tagged),
    case("roberta-mlm", "RobertaForMaskedLM", "Roberta", TEXT, _texts(LENGTH),
         lambda model, batch: language_loss(
             model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])),
    case("bart-classifier", "BartForSequenceClassification", "Bart", BART, _with_end, classified),
]  # fmt: skip


@pytest.mark.parametrize("head", HEADS, ids=lambda c: c.name)
def test_heads(head: ModelCase) -> None:
    """Token classification, masked language models; BART's classifier picks its token by a mask."""
    assert_exact(head.model(torch.float64), head.losses, head.records(dtype=torch.float64))


# --- mixtures of experts ---


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts(name: str, implementation: str) -> None:
    """By one rule, whichever way the forward goes; no module runs on one record at a time."""
    base, dtype = BY_NAME[name], torch.float32 if implementation == "grouped_mm" else torch.float64  # its kernel's
    model = base.model(dtype, train=True)
    model.config._experts_implementation = implementation
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = implementation
    assert_exact(model, base.losses, base.records(dtype=dtype), 1e-4 if dtype == torch.float32 else 1e-5)


def test_experts_go_by_their_rule(caplog: pytest.LogCaptureFixture) -> None:
    base = BY_NAME["mixtral"]
    private_step(base.model(), base.losses, base.records(), 1.0)
    assert "one record at a time" not in caplog.text


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "gate.weight"])
def test_experts_partly_frozen(frozen: str) -> None:
    base = BY_NAME["qwen3_moe"]
    model = base.model(torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name)
    assert_exact(model, base.losses, base.records(dtype=torch.float64))


def test_all_tokens_to_all_experts() -> None:
    """Every token has the same set of experts: the index does not tell its rows' order, the tokens do."""
    base = BY_NAME["mixtral"]
    model = base.model(torch.float64)
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = 4
    assert_exact(model, base.losses, base.records(dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 0.01])
@pytest.mark.parametrize("strict", [False, True])
def test_balancing_loss_of_the_router(share: float, strict: bool) -> None:
    """It is a function of the whole batch's routes. Computed and not used, it is no matter."""
    base = BY_NAME["mixtral"]

    def losses(model: nn.Module, batch: PyTree) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        out = model(**inputs, output_router_logits=True)
        each = language_loss(out.logits, batch["labels"])
        return each + share * out.aux_loss if share else each

    if not share:
        assert_exact(base.model(torch.float64), losses, base.records(dtype=torch.float64))
        return
    with pytest.raises(dpkit.CoupledRecordsError, match="aux_loss balances the experts"):
        private_step(base.model(), losses, base.records(), 1.0, strict=strict)


# --- two towers ---


def embeds(name: str) -> Losses:
    def losses(model: nn.Module, batch: PyTree) -> Tensor:
        out = model(**{k: v for k, v in batch.items() if k != "labels"})
        if name == "towers":
            return squared(torch.cat([out.image_embeds, out.text_embeds], 1), batch["labels"])
        own = (out.image_embeds * out.text_embeds).sum(1) - batch["labels"]
        return own.square() if name == "own pair" else (out.logits_per_image.diagonal() - batch["labels"]).square()

    return losses


@pytest.mark.parametrize("what", ["towers", "own pair", "own score"])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers(name: str, what: str) -> None:
    """Embeddings and each record's own pair, with n × n scores computed beside them."""
    model, batch = BY_NAME[name].model(torch.float64), BY_NAME[name].records(dtype=torch.float64)
    if what != "own score":  # the scale of the scores has no gradient then
        for key, p in model.named_parameters():
            p.requires_grad_("logit" not in key)
    assert_exact(model, embeds(what), batch)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_contrastive_losses(name: str) -> None:
    """Records against each other: refused when it is back-propagated, whoever computes it."""

    def contrastive(model: nn.Module, batch: PyTree) -> Tensor:
        scores = model(**{k: v for k, v in batch.items() if k != "labels"}).logits_per_text
        return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")

    def own(model: nn.Module, batch: PyTree) -> Tensor:
        loss: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}, return_loss=True).loss
        return loss.expand(len(batch["labels"]))

    base = BY_NAME[name]
    with pytest.raises(dpkit.CoupledRecordsError, match="each pair of records"):
        private_step(base.model(), contrastive, base.records(), 1.0)
    with pytest.raises(dpkit.CoupledRecordsError, match="the loss that"):
        private_step(base.model(), own, base.records(), 1.0)


# --- adapters ---


def adapted(base: str, config: Any, shake: bool) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = BY_NAME[base].model(torch.float64, train=True)
    made: nn.Module = peft.get_peft_model(model, config).double()
    if shake:  # adapters start at zero
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn_like(p))
    return made


def generated(model: nn.Module, batch: PyTree) -> Tensor:
    """Language loss; virtual tokens come before the text."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return language_loss(logits[:, -batch["labels"].shape[1] :], batch["labels"])


ADAPTERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lora": ("llama", lambda peft: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")),
    "lora on Conv1D": (
        "gpt2",
        lambda peft: peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    ),
    "lora on an embedding": (
        "llama",
        lambda peft: peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    ),
    "dora": (
        "llama",
        lambda peft: peft.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True, task_type="CAUSAL_LM"),
    ),
    "ia3": (
        "llama",
        lambda peft: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    ),
    "prompt": ("llama", lambda peft: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt as long as the batch": (
        "llama",
        lambda peft: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ),
    "prefix": ("llama", lambda peft: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shake", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name: str, shake: bool) -> None:
    """peft's adapters on frozen models, fresh (LoRA's B is zero) and trained."""
    peft = pytest.importorskip("peft")
    base, config = ADAPTERS[name]
    model = adapted(base, config(peft), shake)
    assert 0 < sum(p.requires_grad for p in model.parameters()) < sum(1 for _ in model.parameters())
    assert_exact(model, generated, BY_NAME[base].records(dtype=torch.float64))


# --- vision ---


class Residual(nn.Module):
    """torchvision's BasicBlock, with its norm layer as an argument."""

    def __init__(self, i: int, o: int, stride: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), norm_layer(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), norm_layer(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm_layer(o)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def resnet() -> nn.Module:
    def groups(width: int) -> nn.Module:
        return nn.GroupNorm(2, width)

    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1, bias=False), groups(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Residual(4, 4, 1, groups), Residual(4, 6, 2, groups), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


class Symmetric(nn.Module):
    """A parametrisation: only symmetric weights."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def symmetric() -> nn.Module:
    layer = nn.Linear(5, 5)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.utils.parametrizations.orthogonal(nn.Linear(5, 5)), nn.Linear(5, 2))


class Whole(nn.Module):
    """A user's own: bare parameters at the root, a leaf with a second argument and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.token = nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(1, 1, 4))
        self.gated, self.head = m.GatedLinear(4), nn.Linear(4, 2)

    def forward(self, x: Tensor, gate: Tensor, *, power: float = 2.0) -> Tensor:
        y = torch.cat([self.token.expand(len(x), -1, -1), x * self.scale], 1)
        return self.head(self.gated(y, torch.cat([gate[:, :1], gate], 1), power=power))


OWN = [
    plain("resnet-group-norm", resnet, normal(3, 16, 16)),
    plain("parametrised", symmetric, normal(5)),
    plain("parametrised-positions", symmetric, normal(5, 5)),
    plain("bare-second-keyword", Whole, normal(3, 4), normal(3, 4)),
    plain("bare-second-keyword-T-equals-n", Whole, normal(4, 4), normal(4, 4)),
    plain("gated-branch", m.Gated, normal(6, 3)),
]


@pytest.mark.parametrize("own", OWN, ids=lambda c: c.name)
def test_own_models(own: ModelCase) -> None:
    assert_exact(own.model(torch.float64, train=True), own.losses, own.records(dtype=torch.float64))


@pytest.mark.parametrize("name", ["convnext", "vit", "resnet-group-norm"])
def test_channels_last(name: str) -> None:
    """Inputs and weights in channels_last memory format."""
    own = {**BY_NAME, **{c.name: c for c in OWN}}[name]
    model = own.model(torch.float64).to(memory_format=torch.channels_last)

    def formatted(batch: PyTree) -> PyTree:
        if isinstance(batch, dict):
            return {**batch, "pixel_values": batch["pixel_values"].contiguous(memory_format=torch.channels_last)}
        return (batch[0].contiguous(memory_format=torch.channels_last), *batch[1:])

    def losses(model: nn.Module, batch: PyTree) -> Tensor:
        return own.losses(model, formatted(batch))

    batch, reference = own.records(dtype=torch.float64), own.model(torch.float64)
    n, bound = size(batch), median_norm(own.model(torch.float64), own.losses, own.records(dtype=torch.float64))
    total = clipped_sum(reference, own.losses, batch, n, bound)
    step = private_step(model, losses, batch, bound, loss_reduction="sum")
    assert norm({k: n * step[k] + total[k] for k in total}) <= 1e-10 * norm(total)
