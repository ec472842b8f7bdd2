"""The models that are trained in the benchmarks, where possible built so that Opacus can train them too."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def tiny() -> nn.Module:
    """Two layers that cost nothing: what is left is the overhead of a step."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def mnist_cnn() -> nn.Module:
    """The network of Opacus's MNIST example, 26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


class CIFARNet(nn.Module):
    """The network of Opacus's CIFAR-10 benchmark, 605,226 parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 128, 128, 256, 10)
        convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths)]
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        for k, conv in enumerate(self.convs):
            x = conv(x)
            if k < 7:
                x = F.relu(x)
            if k in (1, 3, 5):
                x = F.avg_pool2d(x, 2)
        return x.mean((2, 3))


class WordMean(nn.Module):
    """The embedding network of Opacus's IMDb benchmark: 16 numbers a word, their mean, a linear map."""

    def __init__(self, vocab: int = 10_000, width: int = 16) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(vocab, width), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


class WordLSTM(nn.Module):
    """The LSTM network of Opacus's IMDb benchmark, 1,081,002 parameters."""

    def __init__(self, vocab: int = 10_000, width: int = 100) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(vocab, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(tokens))[0].mean(1))


class Block(nn.Module):
    """A pre-norm encoder block; its attention is four linear layers, so that module hooks see every weight."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (layer(y).view(n, t, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextClassifier(nn.Module):
    """A small transformer encoder; the positions are repeated for every record, as Opacus needs them."""

    def __init__(
        self, vocab: int = 5000, width: int = 256, length: int = 128, depth: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, heads=4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]).repeat(len(tokens), 1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ViTTiny(nn.Module):
    """ViT-tiny (width 192, 12 blocks, 3 heads) on 32×32 images in patches of 4; positions as an embedding."""

    def __init__(self, width: int = 192, depth: int = 12, patch: int = 4, side: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Embedding((side // patch) ** 2, width)
        self.blocks = nn.ModuleList([Block(width, heads=3) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = y + self.positions(torch.arange(y.shape[1]).repeat(len(y), 1))
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y).mean(1))


class Residual(nn.Module):
    """ResNet's basic block with GroupNorm."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(32, o), nn.GroupNorm(32, o)
        same = stride == 1 and i == o
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.GroupNorm(32, o))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


def resnet18() -> nn.Module:
    """ResNet-18 with GroupNorm and the small stem for 32×32 images."""
    blocks: list[nn.Module] = []
    i = 64
    for o, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Residual(i, o, stride), Residual(o, o, 1)]
        i = o
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


class Logits(nn.Module):
    """A Hugging Face model that returns its logits alone; [n, t, v] becomes [n, v, t], as cross-entropy wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits.transpose(1, 2) if logits.ndim == 3 else logits


def bert_mini(length: int = 128) -> nn.Module:
    """Hugging Face BERT: width 256, 4 layers, 4 heads, vocabulary 8192, two classes; no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        max_position_embeddings=length, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    return Logits(BertForSequenceClassification(config))


def llama_mini(vocab: int = 4096) -> nn.Module:
    """Hugging Face Llama as a language model: width 256, 4 layers, 4 heads (2 for keys)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=688, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config))


class LoRA(nn.Module):
    """A frozen linear layer and a trained update of rank r (Hu et al. 2021, "LoRA")."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def llama_lora(rank: int = 8) -> nn.Module:
    """`llama_mini` with LoRA on all projections of the attention; the rest is frozen."""
    model: Any = llama_mini().requires_grad_(False)
    for layer in model.model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, LoRA(getattr(attention, name), rank))
    return model
