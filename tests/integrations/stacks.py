"""Tiny models, data and the plain loop of dpkit that the integrations are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpkit

VOCAB, LENGTH, LABELS, RECORDS = 24, 6, 3, 20
SIZE = {
    "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Rows = list[dict[str, Any]]
Losses = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def bert(head: str, *, dropout: bool = False, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZE, **({} if dropout else QUIET), initializer_range=0.3, **options)
    return getattr(transformers, f"BertFor{head}")(config)


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, initializer_range=0.3, num_key_value_heads=1, num_labels=LABELS)
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


def rows(label: Callable[[torch.Generator, Tensor], Any], n: int = RECORDS) -> Rows:
    """Records of several lengths, padded on the right."""
    g = torch.Generator().manual_seed(1)
    made: Rows = []
    for _ in range(n):
        length = int(torch.randint(2, LENGTH + 1, (), generator=g))
        mask = (torch.arange(LENGTH) < length).long()
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=g) * mask
        made.append({"input_ids": ids, "attention_mask": mask, **label(g, mask)})
    return made


def classes(g: torch.Generator, _: Tensor) -> Any:
    return {"labels": int(torch.randint(0, LABELS, (), generator=g))}


def tokens(most: int) -> Callable[[torch.Generator, Tensor], Any]:
    """Some tokens have labels, others do not; in the first records none has."""
    told = iter(range(1 << 30))

    def label(g: torch.Generator, mask: Tensor) -> Any:
        kept = (torch.rand(LENGTH, generator=g) < 0.6) & mask.bool() & (next(told) % RECORDS > 1)
        return {"labels": torch.where(kept, torch.randint(0, most, (LENGTH,), generator=g), -100)}

    return label


def token_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Record by record, token by token."""
    found = []
    for i in range(len(labels)):
        own = [F.cross_entropy(logits[i, t], labels[i, t]) for t in range(labels.shape[1]) if labels[i, t] != -100]
        found.append(torch.stack(own).mean() if own else logits[i].sum() * 0)
    return torch.stack(found)


def train_plainly(
    model: nn.Module,
    data: Sequence[Any],
    losses: Losses,
    *,
    steps: int,
    batch_size: int,
    lr: Callable[[int], float],
    collate: Callable[[Any], Any] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> dpkit.PrivacyEngine:
    """The plain loop over logical batches with SGD, whose draws are seeded by 3; ``lr(k)`` for step k."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr(0))
    engine = dpkit.PrivacyEngine()
    generator = torch.Generator().manual_seed(3) if generator is None else generator
    loader: Any = DataLoader(data, batch_size=batch_size, collate_fn=collate, generator=generator)  # type: ignore[arg-type]
    _, _, private = engine.make_private(model, optimizer, loader, **options)
    model.train()
    taken = 0
    while True:
        for parts in private.logical_batches():
            for batch in parts:
                engine.backward(losses(model, batch))
            optimizer.step()
            taken += 1
            if taken == steps:
                return engine
            optimizer.param_groups[0]["lr"] = lr(taken)


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters in one vector."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
