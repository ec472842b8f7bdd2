"""Norms' forms are made some records at a time; how many never matters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpkit import rules
from dpkit.rules import rule_for

NORMS = {
    "layer": (nn.LayerNorm(6), (5, 4, 6)),
    "layer of two dimensions": (nn.LayerNorm((4, 6)), (5, 4, 6)),
    "rms": (nn.RMSNorm(6), (5, 4, 6)),
    "group": (nn.GroupNorm(2, 6), (5, 6, 3, 3)),
    "group without positions": (nn.GroupNorm(2, 6), (5, 6)),
    "instance": (nn.InstanceNorm1d(6, affine=True), (5, 6, 4)),
    "batch, in eval mode": (nn.BatchNorm2d(6).eval(), (5, 6, 3, 3)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("cached", [1, 40, 1 << 17])
def test_some_records_at_a_time(name: str, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record's gradients are those of autograd on that record alone."""
    layer, shape = NORMS[name]
    torch.manual_seed(0)
    x, grad = torch.randn(shape), torch.randn(shape)
    monkeypatch.setattr(rules, "_CACHED", cached)
    rule = rule_for(layer)
    assert rule is not None
    found = {p: form.dense() for p, form in rule.function(layer, x, grad)}
    assert set(found) == set(layer.parameters())
    for k in range(len(x)):
        alone = torch.autograd.grad(layer(x[k : k + 1]), list(found), grad[k : k + 1])
        for p, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(found[p][k].view_as(p), expected)
