"""Dropout that is no module (of attention weights), and gradients that are rounding alone, refuse no sound model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from tests.integrations.stacks import LABELS, VOCAB, bert
from tests.training import attach, data, squared_loss

pytest.importorskip("transformers")


def start(model: nn.Module, batch_size: int) -> tuple[Any, Any, Any]:
    ids = torch.randint(1, VOCAB, (12, 3), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(ids, torch.arange(12) % LABELS)
    engine = dpkit.PrivacyEngine(accountant="rdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    loader: Any = DataLoader(data, batch_size=batch_size, generator=generator)
    _, _, loader = engine.make_private(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    return engine, optimizer, loader


@pytest.mark.parametrize("spread", [0.02, 0.4])
def test_dropout_of_attention(spread: float) -> None:
    """Its draws are the same where the gradients are compared; that they change outputs is no coupling of records."""
    model = bert("SequenceClassification", num_labels=LABELS, dropout=True).train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=spread)
    for seed in range(8):
        torch.manual_seed(seed)
        engine, optimizer, loader = start(model, 1 if spread > 0.1 else 6)
        for ids, labels in loader:
            engine.backward(F.cross_entropy(model(input_ids=ids).logits, labels, reduction="none"))
            optimizer.step()
        engine.detach()


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("seed", [158, 218, 586])
def test_slim_chance(seed: int, coupled: bool) -> None:
    """It shows in one forward of 67: when a record was left out, and in none of the next 32 on the same records."""

    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x) + (x.mean() if coupled and self.training else 0.0)
            return y * (1.0 + 0.1 * (torch.rand(()) < 0.015)) if self.training else y

    torch.manual_seed(0)
    run = attach(Rare(), data(8), 8)
    for batch in run.loader:
        torch.manual_seed(seed)
        if coupled:  # in train mode alone, and run again it stays
            with pytest.raises(dpkit.CoupledRecordsError):
                run.model(batch[0])
            continue
        squared_loss(run.model, batch).backward()
        run.optimizer.step()


def test_rounding_is_judged_beside_the_largest_gradient() -> None:
    """Two weights whose gradients cancel but for rounding, met alone after all others were proven."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.shift, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids) + self.shift(torch.ones(*ids.shape, 8))).squeeze(-1).softmax(1)

    torch.manual_seed(0)
    model = Shifted()
    engine, optimizer, loader = start(model, 4)
    factor = 1e-3  # at first, it cannot be told from rounding of the sum that is released
    for _ in range(6):
        for ids, labels in loader:
            engine.backward(-factor * model(ids).log().gather(1, labels[:, None])[:, 0])
            optimizer.step()
            factor = 10.0
