"""Is a private step exact? dpkit and Opacus (hooks) on 54 tiny Hugging Face architectures, against the definition.

    python -m benchmarks.audit [--models bert vit ...]

For each model one real optimizer step is taken without noise (SGD, learning rate 1, summed loss, half of the records
clipped) and compared with the sum of clipped gradients that a batched vector-Jacobian product gives, all in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import dpkit
from benchmarks.report import RESULTS, conditions, sentence
from tests.cases import ModelCase
from tests.hf_models import HF_CASES
from tests.oracle import Losses, PyTree, batched_vjp_grads, clip, norm, size, take, trainable
from tests.stepping import private_step

EXACT = 1e-4
EXTRA = {"t5_T_equals_n", "clip_vision"}
"""Variants that are tested and are not among the 54."""


@dataclass
class Outcome:
    """What a library did with a model: "exact", "wrong", "refused" (an error of its own) or "crashed" (another)."""

    verdict: str
    error: float | None = None
    reason: str = ""


@dataclass
class Row:
    """One model."""

    name: str
    kind: str
    parameters: int
    dpkit: Outcome
    opacus: Outcome


def opacus_step(model: nn.Module, losses: Losses, batch: PyTree, max_grad_norm: float) -> dict[str, Tensor]:
    """What one noiseless step of Opacus with hooks adds to each parameter; the sum, as its loss reduction is "sum"."""
    from opacus import PrivacyEngine

    n = size(batch)
    before = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(range(n), batch_size=n, collate_fn=lambda rows: take(batch, rows)),
        noise_multiplier=0.0,
        max_grad_norm=max_grad_norm,
        loss_reduction="sum",
        poisson_sampling=False,
    )
    losses(private, batch).sum().backward()
    optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in trainable(model).items()}


def dpkit_step(model: nn.Module, losses: Losses, batch: PyTree, max_grad_norm: float) -> dict[str, Tensor]:
    """The same of dpkit, times the expected batch size that it divides by."""
    step = private_step(model, losses, batch, max_grad_norm, loss_reduction="sum")
    return {name: value * size(batch) for name, value in step.items()}


def judge(step: Callable[[], dict[str, Tensor]], total: dict[str, Tensor]) -> Outcome:
    """Compares what `step` adds to the parameters with minus the clipped sum."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change = step()
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}".split("\n")[0]
        return Outcome("refused" if is_refusal(problem) else "crashed", reason=reason[:200])
    error = (norm({name: change[name] + total[name] for name in total}) / norm(total)).item()
    return Outcome("exact" if error < EXACT else "wrong", error)


def is_refusal(problem: Exception) -> bool:
    """Whether the library says itself that it does not do this model."""
    from opacus.validators.errors import UnsupportedError

    return isinstance(problem, (dpkit.PrivacyError, UnsupportedError, NotImplementedError))


def audit(case: ModelCase) -> Row:
    """Both libraries on one model, in train mode (its dropout is 0)."""
    model, batch, n = case.model(torch.float64, train=True), case.records(dtype=torch.float64), case.n
    stacked = batched_vjp_grads(copy.deepcopy(model), case.losses, batch, n)
    grads = [{name: value[i] for name, value in stacked.items()} for i in range(n)]
    max_grad_norm = float(torch.stack([norm(grad) for grad in grads]).median())
    clipped = [clip(grad, max_grad_norm) for grad in grads]
    total = {name: torch.stack([grad[name] for grad in clipped]).sum(0) for name in stacked}
    outcomes = [
        judge(lambda step=step: step(copy.deepcopy(model), case.losses, batch, max_grad_norm), total)
        for step in (dpkit_step, opacus_step)
    ]
    return Row(case.name, type(model).__name__, sum(value[0].numel() for value in stacked.values()), *outcomes)


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """The table, its totals above it."""

    def cell(outcome: Outcome) -> str:
        if outcome.error is not None:
            return f"{outcome.verdict} ({outcome.error:.0e})"
        return f"{outcome.verdict}: {outcome.reason[:70].replace('|', '/')}"

    def totals(library: str) -> str:
        counts = Counter(getattr(row, library).verdict for row in rows)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("exact", "wrong", "refused", "crashed"))

    return "\n".join(
        [
            "# Exactness on Hugging Face architectures",
            "",
            sentence(about),
            f"In brackets the relative error of the clipped sum; exact: below {EXACT:.0e}.",
            "",
            f"- dpkit: {totals('dpkit')}",
            f"- Opacus, hooks: {totals('opacus')}",
            "",
            "| model | class | dpkit | Opacus, hooks |",
            "|---|---|---|---|",
            *(f"| {row.name} | {row.kind} | {cell(row.dpkit)} | {cell(row.opacus)} |" for row in rows),
            "",
        ]
    )


def main() -> None:
    """Audits the models and writes results/audit.json and results/audit.md."""
    cases = {case.name: case for case in HF_CASES if case.name not in EXTRA}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=cases, default=None, help="some only; nothing is written then")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in args.models or cases:
        row = audit(cases[name])
        rows.append(row)
        print(f"{name:16} dpkit {row.dpkit.verdict:8} Opacus {row.opacus.verdict:8} {row.dpkit.reason}", flush=True)
    about = conditions("benchmarks.audit")
    table = markdown(about, rows)
    print(f"\n{table}")
    if not args.models:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "audit.md").write_text(table)
        (RESULTS / "audit.json").write_text(
            json.dumps({"conditions": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
