"""The small models of `cases.py` that are not a one-liner of torch layers; each is there for one trait."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

# --- layers that change the arithmetic of the one they derive from ---


class ScaledEmbedding(nn.Embedding):
    """An embedding times √d, as Gemma and BART have it."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * math.sqrt(self.embedding_dim)


class OffsetEmbedding(nn.Embedding):
    """A position table that adds two to its index, as OPT has it."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions + 2)


class OnePlusRMSNorm(nn.RMSNorm):
    """RMSNorm with scale (1 + w), as Gemma has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised before use."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ScaledLinear(nn.Linear):
    """A linear layer with its output doubled."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


# --- modules with parameters of their own ---


class EinsumLinear(nn.Module):
    """A bare weight and bias in an einsum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + self.bias


class GatedLinear(nn.Module):
    """A leaf with a second positional and a keyword argument, all of which matter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))

    def forward(self, x: Tensor, gate: Tensor, power: float = 1.0) -> Tensor:
        return (x * gate.abs() ** power) @ self.weight.T


class LayerScale(nn.Module):
    """One factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention from four linear layers; optionally with a table of relative-position biases [distance, head]."""

    def __init__(self, width: int, heads: int = 2, causal: bool = False, reach: int = 0) -> None:
        super().__init__()
        self.heads, self.causal, self.reach = heads, causal, reach
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.table = nn.Parameter(torch.randn(2 * reach - 1, heads) / 2) if reach else None

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value))
        bias = None
        if self.table is not None:
            place = torch.arange(t)
            bias = self.table[place[:, None] - place[None] + self.reach - 1].permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, causal: bool = False, reach: int = 0, scale: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, causal=causal, reach=reach)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale1, self.scale2 = (LayerScale(width) if scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1(self.attention(self.norm1(x)))
        return x + self.scale2(self.mlp(self.norm2(x)))


# --- whole models ---


class LanguageModel(nn.Module):
    """A causal language model; its positions have no batch dimension, its head may be the embedding."""

    def __init__(self, vocab: int = 11, width: int = 8, length: int = 9, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width)
        self.block = Block(width, causal=True)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.block(x))


class VisionTransformer(nn.Module):
    """Stray parameters at the root: a class token, a position table, LayerScale in the block."""

    def __init__(self, width: int = 8, patches: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.position_table = nn.Parameter(torch.randn(1, patches + 1, width))
        self.block = Block(width, scale=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.position_table
        return self.head(self.norm(self.block(x))[:, 0])


class BarePositions(nn.Module):
    """A position table [T, d] that is a bare parameter, added by broadcasting."""

    def __init__(self, inputs: int, width: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.table = nn.Parameter(torch.randn(length, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x) + self.table[: x.shape[1]]))


class PermutedBlock(nn.Module):
    """ConvNeXt's block: the convolution's input is a permuted view, the scale a bare parameter."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pointwise = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.0, width))

    def forward(self, x: Tensor) -> Tensor:  # x[n, h, w, c]
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.scale * F.gelu(self.pointwise(self.norm(y)))


class ChannelsLast(nn.Module):
    """Puts its input into channels_last memory format, then runs `body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(memory_format=torch.channels_last))


class TwoNames(nn.Module):
    """One module under two names, called under both."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = self.first
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class CalledTwice(nn.Module):
    """One layer on a sequence, on a part of it, and on its mean: three uses with three numbers of positions."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.norm(torch.tanh(self.layer(x)))
        part = self.norm(torch.tanh(self.layer(whole[:, :2])))
        return self.layer(whole.mean(1)) + part.sum(1)


class SharedWeight(nn.Module):
    """Two linear layers own one weight, and two norms of different kinds own another."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.down.weight = self.up.weight
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.norm2.weight = self.norm1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.down(torch.tanh(self.norm1(self.up(x)))))


class TiedAutoencoder(nn.Module):
    """The decoder is the transposed weight of the encoder, used without calling it."""

    def __init__(self, inputs: int = 6, hidden: int = 3) -> None:
        super().__init__()
        self.encode = nn.Linear(inputs, hidden)
        self.bias = nn.Parameter(torch.zeros(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.T, self.bias)


class NeverCalled(nn.Module):
    """A linear layer whose weight is used and which is never called."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.store = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.store.weight, self.store.bias)))


class LogitScale(nn.Module):
    """A scalar parameter and a scalar gate."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 4), nn.Linear(width, 4)
        self.logit_scale = nn.Parameter(torch.tensor(0.3))
        self.gate = nn.Parameter(torch.zeros(1) + 0.2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        left, right = F.normalize(self.left(x), dim=-1), F.normalize(self.right(z), dim=-1)
        return self.logit_scale.exp() * left * right + torch.tanh(self.gate) * left


class KeywordOnly(nn.Module):
    """A forward that takes keywords only and returns a dict."""

    def __init__(self, vocab: int = 7, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, 3)

    def forward(self, *, tokens: Tensor, mask: Tensor) -> dict[str, Any]:
        x = self.embed(tokens) * mask[..., None]
        return {"logits": self.head(torch.tanh(x.sum(1))), "hidden": (x,)}


class SecondArgument(nn.Module):
    """Calls leaves with a second positional argument and a keyword."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.gated = GatedLinear(width)
        self.bilinear = nn.Bilinear(width, width, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.bilinear(torch.tanh(self.gated(torch.tanh(self.embed(x)), z, power=2.0)), z)


class Checkpointed(nn.Module):
    """A block under activation checkpointing."""

    def __init__(self, reentrant: bool, width: int = 6) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Linear(width, width)
        self.block = Block(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.embed(x), use_reentrant=self.reentrant).mean(1))


class Nested(nn.Module):
    """Blocks within blocks, one of them in a ModuleDict, with a residual around each."""

    def __init__(self, width: int = 5, depth: int = 2) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(width, width), nn.Tanh())})
        self.deeper = Nested(width, depth - 1) if depth else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.deeper(x + self.inner["mlp"](x))


class Unused(nn.Module):
    """A layer and a parameter that no forward touches."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(width, width), nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class LoRA(nn.Module):
    """A frozen linear layer and a trainable update of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Encoder(nn.Module):
    """torch's own encoder layer, whose attention uses ``out_proj.weight`` without calling ``out_proj``."""

    def __init__(self, width: int = 8, norm_first: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(4, width)
        self.layer = nn.TransformerEncoderLayer(
            width, 2, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:  # x[n, t, i]
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.head(self.layer(self.embed(x), src_key_padding_mask=padding))
        return y if self.batch_first else y.transpose(0, 1)


class Recurrent(nn.Module):
    """torch's recurrent layer with a linear head on its outputs."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Cells(nn.Module):
    """A recurrent cell in a loop over time, from zero states, with a head on its last output."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Translates(nn.Module):
    """``nn.Transformer``: an encoder with padding, a causal decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True, activation="gelu")

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        t = target.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(t, dtype=target.dtype)
        ignored = torch.zeros(padding.shape, dtype=target.dtype).masked_fill(padding, float("-inf"))
        return self.transformer(
            source, target, tgt_mask=causal, tgt_is_causal=True,
            src_key_padding_mask=ignored, memory_key_padding_mask=ignored,
        )  # fmt: skip


class Windows(nn.Module):
    """Folds windows into the leading dimension, the record being the outer factor, as Swin does."""

    def __init__(self, width: int = 4, windows: int = 2) -> None:
        super().__init__()
        self.windows = windows
        self.embed, self.inside, self.head = nn.Linear(3, width), Block(width, reach=3), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.inside(self.embed(x).reshape(n * self.windows, t // self.windows, -1))
        return self.head(y.reshape(n, t, -1))


class Flattened(nn.Module):
    """Runs a layer on all tokens of all records as one list [n·t, d], as OPT does."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.flat, self.norm = nn.Linear(3, width), nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return y + self.norm(torch.tanh(self.flat(y.reshape(-1, y.shape[-1])))).reshape(y.shape)


class Experts(nn.Module):
    """A mixture of two experts; each sees the tokens routed to it, gathered over all records."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(3, width), nn.Linear(width, 2)
        self.experts = nn.Parameter(torch.randn(2, width, width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        tokens = y.reshape(-1, y.shape[-1])
        share, choice = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for e in range(2):
            rows = (choice == e).nonzero()[:, 0]
            out = out.index_add(0, rows, share[rows, None] * (tokens[rows] @ self.experts[e]))
        return out.reshape(y.shape)


class ExpertList(nn.Module):
    """Experts that are layers with a rule; an expert may see no token at all."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(3, width), nn.Linear(width, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, width)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        tokens = y.flatten(0, 1)
        share, choice = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows = (choice == e).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, share[rows, None] * expert(tokens[rows]))
        return out.view(y.shape)


class Shuffled(nn.Module):
    """A layer on all tokens of all records in an order of its own, put back afterwards."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        rows = y.flatten(0, 1)
        order = rows.detach().sum(-1).argsort()
        z = torch.empty_like(rows).index_copy(0, order, torch.tanh(self.inner(rows[order])))
        return self.head(z.view(y.shape)).mean(1)


class Unpadded(nn.Module):
    """Runs its middle on the tokens that are no padding, packed into one list, as ModernBERT's fused path does."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        self.middle = nn.Sequential(nn.Linear(width, width), LayerScale(width), nn.LayerNorm(width))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = torch.tanh(self.embed(x))
        z = torch.zeros_like(y)
        z[~padding] = self.middle(y[~padding])
        return self.head(z).mean(1)


class Looping(nn.Module):
    """Goes through its records in a Python loop, each cut to its own length, as models of images of all sizes do."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.table, self.head = (
            nn.Linear(3, width),
            nn.Parameter(torch.randn(6, width)),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        rows = []
        for one, hidden in zip(x, padding, strict=True):
            kept = self.embed(one[~hidden])
            rows.append(torch.tanh(kept + self.table[: len(kept)]).mean(0))
        return self.head(torch.stack(rows))


class Triples(torch.autograd.Function):
    """3 x weight, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 3 * x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return 3 * grad * weight, (3 * grad * x).sum(0)


class ByHand(nn.Module):
    """A parameter that enters a function with a hand-written backward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Triples.apply(x, self.weight)
        return self.head(y)


class Gated(nn.Module):
    """A branch behind a gate that starts at zero: on the first batch it has no gradient to be proven with."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.branch, self.head = nn.Linear(3, width), branch(width), nn.Linear(width, 2)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y + torch.tanh(self.gate) * self.branch(y))


def branch(width: int) -> nn.Module:
    """A branch with a layer and a stray parameter."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), LayerScale(width))


class Bag(nn.Module):
    """An EmbeddingBag on a list of tokens per record, with a head."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode=mode)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens))


class InPlace(nn.Module):
    """Changes layers' outputs in place, as ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)
        self.relu = nn.ReLU(inplace=True)
        self.mlp, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x))).mean((2, 3))
        z = self.mlp(y)
        z += y
        return self.head(self.relu(z))


class FusedProjection(nn.Module):
    """Splits one layer's output into views that go different ways."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v) + q.tanh()


class SharedRow(nn.Module):
    """A layer runs on the records and on a table of batch size one, as in DeBERTa."""

    def __init__(self, width: int = 4, length: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(length, width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        places = self.project(self.table(torch.arange(x.shape[1]))[None])
        return torch.tanh(self.project(x)) * places


class LearnedQueries(nn.Module):
    """A layer runs on a parameter; the records come in afterwards, by attention."""

    def __init__(self, width: int = 4, queries: int = 3) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(self.queries).expand(x.shape[0], -1, -1)
        return F.scaled_dot_product_attention(q, self.key(x), x)


class CrossAttention(nn.Module):
    """torch's attention with every parameter that it can have."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.head(self.attention(query, key, value, need_weights=False)[0])


class TwoHeads(nn.Module):
    """Two outputs; used in another order than registered, one head from a ParameterList."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.right = nn.Linear(width, 2)
        self.tables = nn.ParameterList([torch.randn(width, 3) / 2, torch.randn(3)])
        self.body = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.body(x))
        return x @ self.tables[0] + self.tables[1], self.right(x)


def weight_normed_mlp() -> nn.Module:
    """Weights that are functions of the parameters (direction and length)."""
    return nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 2)))


def frozen_mlp() -> nn.Module:
    """A frozen lower layer, a frozen bias above it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def bias_only() -> nn.Module:
    """BiTFiT: only biases are trained."""
    model = VisionTransformer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model
