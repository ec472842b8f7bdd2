"""One module on one batch: are its per-record gradients those of a loop over single records?"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector as vector

from dpkit.errors import PrivacyError
from dpkit.forms import Form
from dpkit.joined import joined
from dpkit.optional import register_optional
from dpkit.rules import Rule, rule_for
from dpkit.tape import Tape
from dpkit.trees import leaves, tree_map

from .loops import released

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Relative to the largest gradient of any record."""

Grads = dict[str, Tensor]


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` found.

    Attributes:
        module: the module's class.
        how: "its rule", "followed" (no rule; the engine follows the parameters) or "one record at a time".
        records: how many there were.
        errors: per parameter, the largest relative error of any record's gradient.
        sensitivity: the most that leaving out one record moved the clipped sum, as a share of the bound; at most 1.
    """

    module: str
    how: str
    records: int
    errors: dict[str, float]
    sensitivity: float

    def __str__(self) -> str:
        lines = [f"{self.module}: {self.how}, {self.records} records"]
        lines += [f"  {name}: relative error {error:.1e}" for name, error in self.errors.items()]
        lines += [f"  one record moves the clipped sum by {self.sensitivity:.4f} of the bound"]
        return "\n".join(lines)


def check_rule(module: nn.Module, *inputs: Any, **kwargs: Any) -> RuleReport:
    """Compare a module's per-record gradients with a loop over single records; by its rule, and through the engine.

    Args:
        module: any module with trainable parameters. It is copied; the copy runs in eval mode, so that there is no
            chance in it.
        inputs, kwargs: what it is called with. Tensors with as many rows as the first one carry records (n >= 2);
            others are shared by all records.

    Returns:
        What was found, to print.

    Raises:
        AssertionError: a gradient is wrong, goes to the wrong record, is missing, or a record's clipped contribution is
            not bounded; the report says which record and parameter. Also when the engine refuses the module.

    >>> import torch
    >>> report = check_rule(torch.nn.Linear(4, 3), torch.randn(5, 2, 4))
    >>> report.how, report.records
    ('its rule', 5)
    """
    module = copy.deepcopy(module).eval()
    register_optional(module)
    arguments = (inputs, kwargs)
    first = next((v for v in leaves(arguments) if isinstance(v, Tensor)), None)
    if first is None or first.ndim == 0 or first.shape[0] < 2:
        raise ValueError("check_rule needs a tensor with at least two records in its first dimension")
    n = first.shape[0]
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not names:
        raise ValueError(f"{type(module).__name__} has no trainable parameter")
    whole = _call(module, arguments)
    if not whole.is_floating_point() or whole.shape[:1] != (n,):
        raise ValueError(f"the module returned {list(whole.shape)} for {n} records: rows of records were expected")
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(whole.shape, generator=generator, dtype=torch.float32).to(whole)
    truth = [_alone(module, names, _take(arguments, n, i), weights[i : i + 1]) for i in range(n)]
    tolerance = TOLERANCE.get(whole.dtype, 1e-4)
    what = type(module).__name__
    rule = rule_for(module)
    errors: dict[str, float] = {}
    if rule is not None:
        errors = _compare(f"the rule of {what}", _by_rule(module, rule, names, arguments, weights), truth, tolerance)
    how, ours = _through_the_tape(module, names, arguments, weights, n)
    through = _compare(f"{what} in the engine", ours, truth, tolerance)
    errors = {k: max(e, errors.get(k, 0.0)) for k, e in through.items()}
    return RuleReport(what, how, n, errors, _sensitivity(module, arguments, weights, truth, n))


def _call(module: nn.Module, arguments: Any) -> Tensor:
    args, kwargs = arguments
    out = module(*args, **kwargs)
    found = [v for v in leaves(out) if isinstance(v, Tensor) and v.is_floating_point()]
    if not found:
        raise ValueError(f"{type(module).__name__} returned no floating tensor")
    return found[0]


def _take(arguments: Any, n: int, i: int) -> Any:
    return tree_map(
        lambda v: v[i : i + 1] if isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == n else v, arguments
    )


def _alone(module: nn.Module, names: dict[str, nn.Parameter], arguments: Any, weights: Tensor) -> Grads:
    """One record's gradient: a forward and a backward of that record alone."""
    value = (_call(module, arguments) * weights).sum()
    grads = torch.autograd.grad(value, list(names.values()), allow_unused=True)
    return {
        k: torch.zeros_like(p) if g is None else g.to_dense() for (k, p), g in zip(names.items(), grads, strict=True)
    }


def _by_rule(
    module: nn.Module, rule: Rule, names: dict[str, nn.Parameter], arguments: Any, weights: Tensor
) -> dict[str, Form]:
    """The forms that the rule itself gives."""
    tensors = tuple(v for v in leaves(arguments) if isinstance(v, Tensor))
    given: Any = tensors if rule.all_inputs else tensors[0]
    found: dict[str, list[Form]] = {}
    own = {p: k for k, p in names.items()}
    for parameter, form in rule.function(module, given, weights):
        if isinstance(parameter, nn.Parameter) and parameter in own:
            found.setdefault(own[parameter], []).append(form)
    return {k: joined(forms) for k, forms in found.items()}


def _through_the_tape(
    module: nn.Module, names: dict[str, nn.Parameter], arguments: Any, weights: Tensor, n: int
) -> tuple[str, dict[str, Form]]:
    """How the engine treats the module, and the forms that it finds."""
    tape = Tape(module)
    try:
        tape.open(n)
        (_call(module, arguments) * weights).sum().backward()
        batch = tape.close()
    except PrivacyError as refusal:
        raise AssertionError(f"dpkit refuses {type(module).__name__}: {refusal}") from refusal
    finally:
        tape.detach()
        module.zero_grad()
    assert batch is not None
    if batch.passive:
        raise AssertionError(f"dpkit leaves {type(module).__name__} alone: {batch.passive}")
    how = "one record at a time" if tape.apiece else "its rule" if tape.rules[module] is not None else "followed"
    return how, {k: joined(batch.forms[p]) for k, p in names.items() if p in batch.forms}


def _compare(what: str, ours: dict[str, Form], truth: list[Grads], tolerance: float) -> dict[str, float]:
    """The largest relative error of each parameter; raises with a table if one is too large."""
    largest = max(float(vector([g.double() for g in grads.values()]).norm()) for grads in truth)
    errors, wrong = {}, []
    for name in truth[0]:
        expected = torch.stack([grads[name] for grads in truth]).double()
        form = ours.get(name)
        if form is not None and form.n != len(truth):
            raise AssertionError(f"{what}: {name} has gradients for {form.n} records, there are {len(truth)}")
        dense = torch.zeros_like(expected) if form is None else form.dense().detach().double()
        if dense.numel() != expected.numel():
            raise AssertionError(f"{what}: {name} {list(expected.shape[1:])} has gradients of {list(dense.shape[1:])}")
        gaps = (dense.reshape(expected.shape) - expected).flatten(1).norm(dim=1)
        errors[name] = float(gaps.max()) / max(largest, 1e-30)
        if not errors[name] <= tolerance:
            i = int(gaps.argmax()) if bool(torch.isfinite(gaps).all()) else int((~torch.isfinite(gaps)).int().argmax())
            missing = "" if form is not None else " (no gradient was found)"
            size = float(dense.reshape(len(truth), -1)[i].norm())
            wrong.append(f"  {name}, record {i}: norm {size:.4g}, should be {float(expected[i].norm()):.4g}{missing}")
        elif form is not None:
            norms, exact = form.sq_norm().double().sqrt(), dense.reshape(len(truth), -1).norm(dim=1)
            low = (exact - norms) > tolerance * largest
            if bool(low.any()):
                wrong.append(
                    f"  {name}: sq_norm() of record {int(low.int().argmax())} is below the gradient's own norm"
                )
    if wrong:
        raise AssertionError("\n".join([f"{what} gives other gradients than a loop over single records:", *wrong]))
    return errors


def _sensitivity(module: nn.Module, arguments: Any, weights: Tensor, truth: list[Grads], n: int) -> float:
    """The most that leaving out one record moves the clipped sum, over the bound; raises if that is more than 1."""
    norms = sorted(float(vector([g.double() for g in grads.values()]).norm()) for grads in truth)
    bound = norms[n // 2] / 2 or 1.0  # about half of the records, and more, are clipped

    def losses(model: nn.Module, index: Tensor) -> Tensor:
        rows = tree_map(lambda v: v[index] if isinstance(v, Tensor) and v.ndim and v.shape[0] == n else v, arguments)
        return (_call(model, rows) * weights[index]).flatten(1).sum(1)

    def loop(engine: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
        for (index,) in loader:
            losses(model, index).sum().backward()
            optimizer.step()

    records = torch.utils.data.TensorDataset(torch.arange(n))
    whole = released(module, records, loop, max_grad_norm=bound, loss_reduction="sum")
    moved = []
    for x in range(n):
        rest = torch.utils.data.Subset(records, [i for i in range(n) if i != x])
        moved.append(float((whole - released(module, rest, loop, max_grad_norm=bound, loss_reduction="sum")).norm()))
    worst = max(moved) / bound
    slack = 1e-5 if weights.dtype == torch.float64 else 1e-2
    if worst > 1 + slack:
        x, what = moved.index(max(moved)), type(module).__name__
        raise AssertionError(f"record {x} moves the clipped sum of {what} by {worst:.4f} times its bound")
    return worst
