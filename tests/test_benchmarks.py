"""The benchmarks run, and their tables say what they should; no claim about speed is made here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("opacus")

from benchmarks import audit, noise, steps
from benchmarks.report import conditions
from benchmarks.workloads import WORKLOADS
from tests.hf_models import HF_CASES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_steps() -> None:
    """One round on the smallest workload: a row for each contestant, ordinary training at ratio 1."""
    rows = steps.compare(WORKLOADS["mnist-cnn"], 8, rounds=2)
    assert [row.contestant for row in rows] == list(steps.CONTESTANTS)
    assert rows[0].ratio == 1.0
    assert all(row.ms > 0 and row.peak_mib > 0 for row in rows)
    assert "Opacus ghost" in steps.markdown({**conditions("benchmarks.steps"), "rounds": 2}, rows)


def test_audit() -> None:
    """A model on which both are exact, and one on which Opacus is wrong without saying so."""
    cases = {case.name: case for case in HF_CASES}
    vit, convnext = (audit.audit(cases[name]) for name in ("vit", "convnext"))
    assert (vit.dpkit.verdict, vit.opacus.verdict) == ("exact", "exact")
    assert (convnext.dpkit.verdict, convnext.opacus.verdict) == ("exact", "wrong")
    assert "1 wrong" in audit.markdown(conditions("benchmarks.audit"), [vit, convnext])


def test_noise() -> None:
    """A row with both times and their ratio."""
    pytest.importorskip("cryptography")
    row = noise.compare(5_000, torch.float32, rounds=3)
    assert row.plain_ns > 0
    assert row.ratio_quartiles[0] <= row.ratio <= row.ratio_quartiles[1]
    assert "| 5,000 | float32 |" in noise.markdown({**conditions("benchmarks.noise"), "rounds": 3}, [row])
