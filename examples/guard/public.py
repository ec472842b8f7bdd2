"""What the guard knows before it sees anybody's conversation, from public texts alone: it costs no ε.

They are of three kinds: the taxonomies' own descriptions, the words of the encoder's vocabulary, and phrases that were
written for this project from the hazards' published definitions (public_texts.yaml).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.data import TensorDataset

from .data import Record, Source
from .encoder import Encoder, Head, Questions, losses
from .prompt import Conversation
from .taxonomy import built_in
from .train import Recipe, train

TEXTS = Path(__file__).with_name("public_texts.yaml")
FRAMES = ("{}", "Tell me about {}", "Write a text about {}")
START = Recipe(epochs=300, batch_size=2048, lr=2.0)  # all phrases at once
DIRECTIONS = 1000


def phrases() -> Source:
    """What asks for each hazard, and what asks for nothing harmful, each phrase in three frames."""
    taxonomy = built_in("mlcommons")

    def record(phrase: str, hazard: str) -> Record:
        violated = () if hazard == "Harmless" else (taxonomy.named(hazard).name,)
        return Record(Conversation.of(phrase), "public", bool(violated), *violated, violates=violated)

    told = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    rows = [record(frame.format(p), hazard) for hazard, listed in told.items() for frame in FRAMES for p in listed]
    return Source({"train": rows}, taxonomy)


def descriptions() -> list[Record]:
    """The taxonomies' own texts."""
    return [
        Record(Conversation.of(f"{category.name}: {category.description}"), "public", False)
        for name in ("mlcommons", "openai_moderation", "diasafety", "llama_guard_1", "ailuminate")
        for category in built_in(name)
    ]


def words(encoder: Encoder) -> list[Record]:
    """Every fourth word of the encoder's vocabulary."""
    known = sorted(word for word in encoder.tokenizer.get_vocab() if word.isalpha() and len(word) > 2)
    return [Record(Conversation.of(word), "public", False) for word in known[::4]]


@dataclass(frozen=True)
class Space:
    """The directions in which public texts differ most, seen from the middle of the taxonomies' texts.

    A direction along which they have the standard deviation s is scaled by 1 / √s (half whitening), so that gradients,
    which are clipped as a whole, are not filled by the few loudest directions. Lengths are kept on average.

    Attributes:
        centre: [2 f], what is taken off the encoder's features.
        map: [f, k], what each half (the message by itself, and in its context) goes through.
    """

    centre: Tensor
    map: Tensor

    @classmethod
    def of(cls, encoder: Encoder, directions: int = DIRECTIONS) -> Space:
        centre = encoder.features(descriptions()).mean(0)
        asked, plain = (encoder.features(r) - centre for r in (phrases().splits["train"], words(encoder)))
        half = len(centre) // 2
        variance, basis = torch.linalg.eigh(torch.cat([asked, plain])[:, :half].T.cov())
        variance, basis = variance.flip(0)[:directions], basis.flip(1)[:, :directions]
        found = basis * (variance + variance[0] / 1000) ** -0.25
        shorter = (asked[:, :half] @ found).norm(dim=1).mean() / asked[:, :half].norm(dim=1).mean()
        return cls(centre, found / shorter)

    def __call__(self, features: Tensor) -> Tensor:
        """[n, 2 f] to [n, 2 k]."""
        alone, inside = (features - self.centre).chunk(2, 1)
        return torch.cat([alone @ self.map, inside @ self.map], 1)


def warm_start(asked: Questions, rows: list[Record], inputs: Tensor) -> Head:
    """The layer that all runs begin with: trained on phrases ``rows``, whose features are ``inputs``."""
    head = Head(inputs.shape[1], len(asked))
    dataset = TensorDataset(inputs, asked.targets(rows))
    train(head, dataset, lambda m, x, t: losses(m(x), t), START, seeds=(0, 0))
    return head
