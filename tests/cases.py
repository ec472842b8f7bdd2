"""The model kinds every claim about gradients is tested on: one line each.

A case builds a model, draws a batch of n records, and says what each record's loss is. Dropout is 0 everywhere, so
train and eval mode compute the same. ``tests/hf_models.py`` has the Hugging Face architectures in the same form.

Tags: "loop_only": the second oracle (batched VJP) does not apply. "may_refuse": a stated refusal is as good as the
exact answer. "recurrent", "bag", "hard", "checkpoint": kinds of model. "apiece": runs on one record at a time.
"time_first": inside, the batch is the second dimension.
"float32_inside": the model itself casts to float32, so float64 cannot agree to 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

import dpkit.layers
from tests import models as m
from tests.oracle import Losses, PyTree

__all__ = ["CASES", "ModelCase", "cross_entropy", "language_loss", "select", "squared"]


@dataclass(frozen=True)
class ModelCase:
    """A model kind: how to build it, how to draw n records, and one loss per record."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, Generator], PyTree]
    losses: Losses
    tags: frozenset[str] = frozenset()
    n: int = 5
    """How many records the tests draw by default."""

    def model(self, dtype: torch.dtype = torch.float32, train: bool = False) -> nn.Module:
        """The model with its fixed initial weights, some of which are shaken so that no gradient is trivially 0."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.to(dtype).train(train)

    def records(self, n: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> PyTree:
        """A batch of n records; floating tensors in `dtype`."""
        batch = self.batch(self.n if n is None else n, Generator().manual_seed(seed))
        return pytree.tree_map_only(Tensor, lambda v: v.to(dtype) if v.is_floating_point() else v, batch)


# --- losses, one per record [n] ---


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Mean square distance of each record's outputs [n, ...] to a fixed pattern times its target [n]."""
    flat = output.flatten(1)
    pattern = torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype))
    return (flat - target[:, None] * pattern).square().mean(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of one label per record: logits [n, c], labels [n]."""
    return F.cross_entropy(logits, labels, reduction="none")


def language_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The mean over each record's own counted tokens: logits [n, t, v], labels [n, t]."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=ignore_index)
    return losses.sum(1) / (labels != ignore_index).sum(1).clamp(min=1)


# --- batches ---


def normal(*shape: int) -> Callable[[int, Generator], Tensor]:
    """Standard normal records of `shape`."""
    return lambda n, generator: torch.randn(n, *shape, generator=generator)


def tokens(length: int, vocab: int) -> Callable[[int, Generator], Tensor]:
    """Token records with repetitions; token 0 (padding, where a model has it) occurs."""
    return lambda n, generator: torch.randint(0, vocab, (n, length), generator=generator)


def text(n: int, length: int, vocab: int, generator: Generator) -> dict[str, Tensor]:
    """Right-padded sequences of various lengths: input_ids, attention_mask, and next-token labels (-100 ignored)."""
    length = max(length, 2)
    ids = torch.randint(1, vocab, (n, length), generator=generator)
    lengths = torch.randint(2, length + 1, (n, 1), generator=generator)
    mask = torch.arange(length) < lengths
    ids = torch.where(mask, ids, 0)
    labels = torch.where(mask, ids, -100).roll(-1, 1)
    labels[:, -1] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


# --- ways to make a case ---


def plain(
    name: str, build: Callable[[], nn.Module], *inputs: Callable[..., Tensor], tags: str = "", n: int = 5
) -> ModelCase:
    """A model called on its inputs in order, with the squared loss."""

    def batch(n: int, generator: Generator) -> tuple[Tensor, ...]:
        return (*(draw(n, generator) for draw in inputs), torch.randn(n, generator=generator))

    def losses(model: nn.Module, batch: PyTree) -> Tensor:
        return squared(model(*batch[:-1]), batch[-1])

    return ModelCase(name, build, batch, losses, frozenset(tags.split()), n)


def dims(d: int, inputs: int = 3) -> tuple[int, ...]:
    """The shape of an input with `inputs` channels and d spatial dimensions."""
    return (inputs, *(11, 7, 5)[:d]) if d == 1 else (inputs, *(7, 6, 5)[:d])


def convolution(name: str, d: int, build: Callable[[], nn.Module], channels: int = 3) -> ModelCase:
    """One convolution over d dimensions, then tanh."""
    return plain(name, lambda: nn.Sequential(build(), nn.Tanh()), normal(*dims(d, channels)))


# --- the cases ---


def _linear() -> list[ModelCase]:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))

    return [
        ModelCase(
            "mlp",
            mlp,
            lambda n, g: (torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g)),
            lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        ),
        plain("linear-3d", mlp, normal(6, 4)),
        plain("linear-4d", mlp, normal(2, 3, 4)),
        plain("linear-4d-leading-n", mlp, normal(5, 5, 4)),
        plain("linear-1-output", lambda: nn.Linear(4, 1), normal(4)),
        plain("linear-subclass", lambda: nn.Sequential(m.ScaledLinear(4, 5), nn.Tanh(), nn.Linear(5, 2)), normal(4)),
        plain("prelu", lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3), nn.PReLU()), normal(4)),
    ]


def _convolutions() -> list[ModelCase]:
    conv, transposed = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    cases = []
    for d in (1, 2, 3):
        C, T = conv[d - 1], transposed[d - 1]
        options: dict[str, dict[str, Any]] = {
            "": {"out_channels": 5, "kernel_size": 3},
            "-stride-dilation": {"out_channels": 5, "kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2},
            "-groups": {"out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 3, "bias": False},
            "-depthwise": {"out_channels": 3, "kernel_size": 3, "padding": 1, "groups": 3},
            "-same": {"out_channels": 4, "kernel_size": 4, "padding": "same", "dilation": 1},
            "-circular": {"out_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
            "-reflect": {"out_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            "-replicate": {"out_channels": 4, "kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
            "-same-circular": {
                "out_channels": 4,
                "kernel_size": 3,
                "padding": "same",
                "padding_mode": "circular",
                "dilation": 2,
            },
        }
        for suffix, option in options.items():
            cases.append(convolution(f"conv{d}d{suffix}", d, lambda C=C, option=option: C(3, **option)))
        options = {
            "": {"out_channels": 5, "kernel_size": 3},
            "-stride": {"out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
            "-groups-dilation": {"out_channels": 6, "kernel_size": 2, "groups": 3, "dilation": 2, "bias": False},
        }
        for suffix, option in options.items():
            cases.append(convolution(f"conv-transpose{d}d{suffix}", d, lambda T=T, option=option: T(3, **option)))

    def cnn() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.GroupNorm(2, 6),
            nn.Conv2d(6, 4, (3, 1), dilation=(1, 2)), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 1 * 2, 3),
        )  # fmt: skip

    image = normal(3, 8, 8)
    return [
        *cases,
        plain("cnn", cnn, image),
        plain("cnn-channels-last", lambda: m.ChannelsLast(cnn()), image, tags="loop_only"),
        plain(
            "cnn-channels-last-weights",
            lambda: cnn().to(memory_format=torch.channels_last),
            image,
            tags="loop_only",
        ),
        plain("conv-permuted-input", lambda: nn.Sequential(m.PermutedBlock(), m.PermutedBlock()), normal(5, 6, 4)),
        plain("conv-subclass", lambda: nn.Sequential(m.StandardisedConv2d(3, 4, 3), nn.Tanh()), image),
    ]


def _embeddings() -> list[ModelCase]:
    def embed(*args: Any, **options: Any) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(nn.Embedding(*args, **options), nn.Tanh(), nn.Linear(args[1], 2))

    return [
        plain("embedding", embed(6, 4), tokens(9, 6)),
        plain("embedding-1-token", lambda: nn.Sequential(nn.Embedding(6, 4), nn.Tanh()), tokens(1, 6)),
        plain("embedding-no-time", embed(6, 4), lambda n, g: torch.randint(0, 6, (n,), generator=g)),
        plain("embedding-2d-tokens", embed(6, 4), lambda n, g: torch.randint(0, 6, (n, 3, 2), generator=g)),
        plain("embedding-padding", embed(6, 4, padding_idx=0), tokens(9, 6)),
        plain("embedding-sparse", embed(6, 4, sparse=True), tokens(9, 6), tags="loop_only may_refuse"),
        plain("embedding-frequency", embed(6, 4, scale_grad_by_freq=True), tokens(9, 6), tags="loop_only may_refuse"),
        plain(
            "embedding-scaled", lambda: nn.Sequential(m.ScaledEmbedding(6, 4, padding_idx=0), nn.Tanh()), tokens(9, 6)
        ),
        plain("embedding-offset", lambda: nn.Sequential(m.OffsetEmbedding(8, 4), nn.Tanh()), tokens(9, 6)),
        plain("bag-sum", lambda: m.Bag("sum"), tokens(9, 7), tags="bag"),
        plain("bag-mean", lambda: m.Bag("mean"), tokens(9, 7), tags="bag"),
        plain("bag-max", lambda: m.Bag("max"), tokens(9, 7), tags="bag"),
    ]


def _norms() -> list[ModelCase]:
    def after(width: int, norm: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), norm, nn.Tanh(), nn.Linear(width, 2))

    def not_affine() -> nn.Module:
        return nn.Sequential(nn.Conv1d(6, 4, 1), nn.GroupNorm(2, 4, affine=False))

    def affine(norm: nn.Module) -> nn.Module:
        return nn.Sequential(norm, nn.Tanh())

    return [
        plain("layer-norm", lambda: after(6, nn.LayerNorm(6)), normal(6)),
        plain("layer-norm-3d", lambda: after(6, nn.LayerNorm(6)), normal(4, 6)),
        plain("layer-norm-no-bias", lambda: after(6, nn.LayerNorm(6, bias=False)), normal(4, 6)),
        plain("layer-norm-not-affine", lambda: after(6, nn.LayerNorm(6, elementwise_affine=False)), normal(4, 6)),
        plain("layer-norm-2-dims", lambda: affine(nn.LayerNorm((4, 6))), normal(3, 4, 6)),
        plain("group-norm", lambda: affine(nn.GroupNorm(2, 6)), normal(6, 4, 3)),
        plain("group-norm-2d", lambda: after(6, nn.GroupNorm(3, 6)), normal(6)),
        plain("group-norm-not-affine", not_affine, normal(6, 5)),
        plain("instance-norm-1d", lambda: affine(nn.InstanceNorm1d(4, affine=True)), normal(4, 7)),
        plain("instance-norm-2d", lambda: affine(nn.InstanceNorm2d(4, affine=True)), normal(4, 5, 3)),
        plain("instance-norm-3d", lambda: affine(nn.InstanceNorm3d(4, affine=True)), normal(4, 3, 3, 2)),
        plain("frozen-batch-norm", lambda: affine(dpkit.layers.FrozenBatchNorm(4)), normal(4, 5, 3)),
        plain("rms-norm", lambda: after(6, nn.RMSNorm(6)), normal(4, 6)),
        plain("rms-norm-2-dims", lambda: affine(nn.RMSNorm((4, 6))), normal(3, 4, 6)),
        plain("rms-norm-one-plus", lambda: after(6, m.OnePlusRMSNorm(6)), normal(4, 6)),
    ]  # fmt: skip


def _transformers() -> list[ModelCase]:
    def language(name: str, length: Callable[[int], int], tied: bool = True) -> ModelCase:
        return ModelCase(
            name,
            lambda: m.LanguageModel(tied=tied),
            lambda n, g: text(n, length(n), 11, g),
            lambda model, batch: language_loss(model(batch["input_ids"]), batch["labels"]),
        )

    def padding(n: int, generator: Generator) -> Tensor:
        return torch.arange(6) >= torch.randint(2, 7, (n, 1), generator=generator)

    return [
        language("lm-tied", lambda n: 7),
        language("lm-tied-T-equals-n", lambda n: n),
        language("lm-untied-T-equals-n", lambda n: n, tied=False),
        plain("encoder-layer", lambda: m.Encoder(), normal(6, 4)),
        plain("encoder-layer-T-equals-n", lambda: m.Encoder(norm_first=True), normal(5, 4)),
        plain("encoder-layer-padding", lambda: m.Encoder(), normal(6, 4), padding),
        plain("encoder-layer-time-first", lambda: m.Encoder(batch_first=False), normal(6, 4), tags="time_first"),
        plain("vision-transformer", m.VisionTransformer, normal(3, 8, 8)),
        plain("translator", m.Translates, normal(6, 4), normal(3, 4), padding),
        plain("translator-T-equals-n", m.Translates, normal(6, 4), normal(5, 4), padding),
        plain("relative-bias", lambda: nn.Sequential(m.Block(6, reach=7)), normal(7, 6)),
        plain("relative-bias-T-equals-n", lambda: nn.Sequential(m.Block(6, reach=5)), normal(5, 6)),
    ]


def _shared() -> list[ModelCase]:
    return [
        plain("two-names", m.TwoNames, normal(5)),
        plain("two-names-3d", m.TwoNames, normal(4, 5)),
        plain("called-twice", m.CalledTwice, normal(6, 5)),
        plain("shared-weight", m.SharedWeight, normal(3, 4)),
        plain("tied-autoencoder", m.TiedAutoencoder, normal(6)),
        plain("never-called", m.NeverCalled, normal(4, 5)),
    ]


def _several_forwards() -> list[ModelCase]:
    """The model runs more than once before the backward."""

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def pair(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 4, generator=generator), torch.randn(n, 4, generator=generator)

    def siamese(model: nn.Module, batch: PyTree) -> Tensor:
        return (model(batch[0]) - model(batch[1]) - 0.3).square().sum(1)

    def fixed_target(model: nn.Module, batch: PyTree) -> Tensor:
        with torch.no_grad():
            target = model(batch[1])
        return (model(batch[0]) - target).square().sum(1)

    def one_ignored(model: nn.Module, batch: PyTree) -> Tensor:
        model(batch[1])
        return (model(batch[0]) - 0.3).square().sum(1)

    return [
        ModelCase("two-forwards", mlp, pair, siamese),
        ModelCase("no-grad-forward-first", mlp, pair, fixed_target),
        ModelCase("ignored-forward-first", mlp, pair, one_ignored),
    ]


def _stray() -> list[ModelCase]:
    return [
        plain("einsum", lambda: nn.Sequential(m.EinsumLinear(4, 5), nn.Tanh(), m.EinsumLinear(5, 3)), normal(4)),
        plain("einsum-3d", lambda: nn.Sequential(m.EinsumLinear(4, 5), nn.Tanh(), m.EinsumLinear(5, 3)), normal(5, 4)),
        plain("bare-positions", lambda: m.BarePositions(3, 4, 8), normal(6, 3)),
        plain("bare-positions-T-equals-n", lambda: m.BarePositions(3, 4, 5), normal(5, 3)),
        plain("layer-scale", lambda: nn.Sequential(nn.Linear(4, 5), m.LayerScale(5)), normal(3, 4)),
        plain("layer-scale-width-equals-n", lambda: nn.Sequential(nn.Linear(4, 5), m.LayerScale(5)), normal(4)),
        plain("logit-scale", m.LogitScale, normal(5), normal(5)),
        plain("weight-norm", m.weight_normed_mlp, normal(4)),
    ]


def _interfaces() -> list[ModelCase]:
    return [
        ModelCase(
            "keyword-only-dict-output",
            m.KeywordOnly,
            lambda n, g: {
                "tokens": torch.randint(0, 7, (n, 5), generator=g),
                "mask": (torch.rand(n, 5, generator=g) < 0.7).float(),
                "labels": torch.randint(0, 3, (n,), generator=g),
            },
            lambda model, batch: cross_entropy(
                model(tokens=batch["tokens"], mask=batch["mask"])["logits"], batch["labels"]
            ),
        ),
        plain("second-argument", m.SecondArgument, normal(5), normal(5)),
        plain("checkpoint", lambda: m.Checkpointed(reentrant=False), normal(4, 6), tags="checkpoint loop_only"),
        plain(
            "checkpoint-reentrant", lambda: m.Checkpointed(reentrant=True), normal(4, 6), tags="checkpoint loop_only"
        ),
        ModelCase(
            "two-heads",
            m.TwoHeads,
            lambda n, g: (torch.randn(n, 4, generator=g), torch.randn(n, generator=g)),
            lambda model, batch: squared(torch.cat(model(batch[0]), 1), batch[1]),
        ),
        plain("in-place", m.InPlace, normal(3, 6, 6)),
        plain("fused-projection", m.FusedProjection, normal(5, 4)),
        plain("nested", m.Nested, normal(5)),
        plain("unused", m.Unused, normal(4)),
        plain("frozen", m.frozen_mlp, normal(4)),
        plain("lora", lambda: nn.Sequential(m.LoRA(nn.Linear(4, 5)), nn.Tanh(), m.LoRA(nn.Linear(5, 3))), normal(6, 4)),
        plain("bias-only", m.bias_only, normal(3, 8, 8)),
    ]


def _hard() -> list[ModelCase]:
    def padding(n: int, generator: Generator) -> Tensor:
        return torch.arange(6) >= torch.randint(1, 7, (n, 1), generator=generator)

    rnn = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
    return [
        *(
            plain(
                name,
                lambda kind=kind: m.Recurrent(kind(3, 4, batch_first=True)),
                normal(6, 3),
                tags="recurrent",
            )
            for name, kind in rnn.items()
        ),
        plain(
            "lstm-2-layers-both-ways",
            lambda: m.Recurrent(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)),
            normal(6, 3),
            tags="recurrent",
        ),
        *(
            plain(f"{name}-cell", lambda kind=kind: m.Cells(kind(3, 4)), normal(6, 3), tags="recurrent")
            for name, kind in {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}.items()
        ),
        plain("cross-attention", m.CrossAttention, normal(3, 8), normal(4, 6), normal(4, 5), tags="hard"),
        plain("shared-row", m.SharedRow, normal(6, 4), tags="hard"),
        plain("shared-row-T-equals-n", m.SharedRow, normal(5, 4), tags="hard"),
        plain("learned-queries", m.LearnedQueries, normal(6, 4), tags="hard"),
        plain("windows", m.Windows, normal(6, 3), tags="hard"),
        plain("flattened", m.Flattened, normal(6, 3), tags="hard"),
        plain("experts", m.Experts, normal(6, 3), tags="hard apiece"),
        plain("expert-list", m.ExpertList, normal(6, 3), tags="hard apiece"),
        plain("shuffled", m.Shuffled, normal(6, 3), tags="hard apiece"),
        plain("unpadded", m.Unpadded, normal(6, 3), padding, tags="hard apiece"),
        plain("by-hand", m.ByHand, normal(4), tags="hard apiece loop_only"),
        plain("looping", m.Looping, normal(6, 3), padding, tags="hard apiece"),
    ]


CASES: tuple[ModelCase, ...] = (
    *_linear(), *_convolutions(), *_embeddings(), *_norms(), *_transformers(), *_shared(), *_several_forwards(),
    *_stray(), *_interfaces(), *_hard(),
)  # fmt: skip


def select(*, without: str = "", tags: str = "") -> list[ModelCase]:
    """The cases that have all of `tags` and none of `without`."""
    wanted, unwanted = frozenset(tags.split()), frozenset(without.split())
    return [case for case in CASES if wanted <= case.tags and not unwanted & case.tags]


assert len({case.name for case in CASES}) == len(CASES), "case names must be unique"
