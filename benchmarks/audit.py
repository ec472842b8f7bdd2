"""Is a private step exact? dpkit and Opacus (hooks) on 54 tiny Hugging Face architectures, against the definition.

    python -m benchmarks.audit [--models bert vit ...]

For each model one real optimizer step is taken without noise (SGD, learning rate 1, summed loss, half of the records
clipped) and compared with the sum of clipped gradients that a batched vector-Jacobian product gives, all in float64.
dpkit does so in every variant of `tests.variants` that applies to the model: dropout off and on (the same draw), texts
padded on either side, as many records as positions. Opacus does the plain one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import dpkit
from benchmarks.report import RESULTS, conditions, sentence
from tests.cases import ModelCase
from tests.hf_models import EXTRA, HF_CASES
from tests.oracle import Losses, PyTree, batched_vjp_grads, clip, norm, size, take, trainable
from tests.stepping import private_step
from tests.variants import VARIANTS, Variant, variants

VERDICTS = ("exact", "wrong", "refused", "crashed", "undefined")
EXACT = 1e-4
"""The largest relative error that counts as exact."""


@dataclass
class Outcome:
    """What a library did with a model: "exact", "wrong", "refused" (an error of its own) or "crashed" (another);
    "undefined" where there is nothing to compare with."""

    verdict: str
    error: float | None = None
    reason: str = ""


@dataclass
class Row:
    """One model. `variants` are dpkit's outcomes in the others than the plain one."""

    name: str
    kind: str
    parameters: int
    dpkit: Outcome
    opacus: Outcome
    variants: dict[str, Outcome]


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


def clipped(variant: Variant) -> tuple[dict[str, Tensor], float]:
    """The sum of clipped gradients, and the threshold that clips half of the records."""
    stacked = batched_vjp_grads(copy.deepcopy(variant.model), variant.losses, variant.batch, variant.n)
    grads = [{name: value[i] for name, value in stacked.items()} for i in range(variant.n)]
    max_grad_norm = float(torch.stack([norm(grad) for grad in grads]).median())
    each = [clip(grad, max_grad_norm) for grad in grads]
    return {name: torch.stack([grad[name] for grad in each]).sum(0) for name in stacked}, max_grad_norm


def audit(case: ModelCase) -> Row:
    """Both libraries on one model, in train mode; dpkit in every variant."""
    found: dict[str, Outcome] = {}
    for variant in variants(case):
        total, max_grad_norm = clipped(variant)
        if not math.isfinite(max_grad_norm):
            found[variant.name] = Outcome("undefined", reason="the model's own gradients are not finite")
            continue
        steps = [dpkit_step, opacus_step] if variant.name == "plain" else [dpkit_step]
        given = (variant.losses, variant.batch, max_grad_norm)
        outcomes = [judge(partial(step, copy.deepcopy(variant.model), *given), total) for step in steps]
        found[variant.name] = outcomes[0]
        if variant.name == "plain":
            opacus, kind = outcomes[1], type(variant.model).__name__
            parameters = sum(value.numel() for value in total.values())
    return Row(case.name, kind, parameters, found.pop("plain"), opacus, found)


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """The table, its totals above it."""
    others = VARIANTS[1:]

    def cell(outcome: Outcome | None, length: int = 70) -> str:
        if outcome is None:
            return "–"
        if outcome.error is not None:
            return f"{outcome.verdict} ({outcome.error:.0e})"
        return f"{outcome.verdict}: {outcome.reason[:length].replace('|', '/')}" if length else outcome.verdict

    def totals(outcomes: list[Outcome]) -> str:
        counts = Counter(outcome.verdict for outcome in outcomes)
        return ", ".join(
            f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict] or verdict != "undefined"
        )

    def of(name: str) -> list[Outcome]:
        return [row.variants[name] for row in rows if name in row.variants]

    return "\n".join(
        [
            "# Exactness on Hugging Face architectures",
            "",
            sentence(about),
            f"In brackets the relative error of the clipped sum; exact: below {EXACT:.0e}. –: does not apply, or no "
            "same draw of dropout can be made (ViLT); undefined: the model's own gradients are not finite.",
            "",
            f"- dpkit: {totals([row.dpkit for row in rows])}",
            *(f"- dpkit, {name}: {totals(of(name))}" for name in others),
            f"- Opacus, hooks: {totals([row.opacus for row in rows])}",
            "",
            "| model | class | dpkit | " + " | ".join(others) + " | Opacus, hooks |",
            "|---|---|---|" + "---|" * len(others) + "---|",
            *(
                f"| {row.name} | {row.kind} | {cell(row.dpkit)} | "
                + " | ".join(cell(row.variants.get(name), 0) for name in others)
                + f" | {cell(row.opacus)} |"
                for row in rows
            ),
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
        rest = ", ".join(f"{k}: {v.verdict} {v.reason}".strip() for k, v in row.variants.items())
        print(f"{name:16} {row.dpkit.verdict:8} ({rest}) Opacus {row.opacus.verdict:8} {row.dpkit.reason}", flush=True)
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
