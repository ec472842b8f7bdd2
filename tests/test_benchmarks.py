"""The benchmarks run, and their tables say what they should; no claim about speed is made here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("opacus")

from benchmarks import audit, growth, layers, measure, noise, steps
from benchmarks.contestants import CONTESTANTS, Runner
from benchmarks.report import conditions
from benchmarks.workloads import WORKLOADS
from tests.hf_models import HF_CASES

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_steps() -> None:
    """One round on the smallest workload: a row for each contestant, ordinary training at ratio 1."""
    rows = measure.compare(WORKLOADS["mnist-cnn"], 8, rounds=2)
    assert [row.contestant for row in rows] == list(CONTESTANTS)
    assert rows[0].ratio == 1.0
    assert all(row.ms and row.peak_mib for row in rows)
    assert any("that adds the noise" in line for line in measure.summary(rows))
    assert any("dpkit / ordinary" in line for line in measure.summary(rows))
    assert "Opacus ghost" in steps.markdown({**conditions("benchmarks.steps"), "rounds": 2}, rows)


def test_a_contestant_that_fails_has_its_reason_in_the_table() -> None:
    """The others are measured all the same."""

    def broken(workload: object, n: int) -> Runner:
        raise ValueError("not for me")

    rows = measure.compare(WORKLOADS["tiny"], 8, 2, {**CONTESTANTS, "Opacus ghost": broken})
    assert [row.fails for row in rows] == [None] * 4 + ["ValueError: not for me"]
    assert rows[1].ms
    assert "- tiny, 8, Opacus ghost: ValueError: not for me" in measure.table(rows)


@pytest.mark.parametrize("name", list(layers.WORKLOADS))
def test_layers(name: str) -> None:
    """Every layer can be trained ordinarily and by dpkit."""
    contestants = {k: CONTESTANTS[k] for k in ("ordinary", "dpkit")}
    assert all(row.ms for row in measure.compare(layers.WORKLOADS[name], 4, 1, contestants))


def test_growth() -> None:
    """The size that grows is the model's."""
    assert growth.workload("width", 64).build().head.in_features == 64
    assert growth.workload("length", 32).inputs(3).shape == (3, 32)


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
