"""Tests for your own layers, rules and training loops: is each record's contribution what it should be, and bounded?

    from dpkit.testing import check_rule, check_loop

    check_rule(MyLayer(4), torch.randn(6, 3, 4))              # its rule, and dpkit's engine around it, on one batch
    check_loop(model, dataset, loop, max_grad_norm=1.0)       # adding or removing a record moves the step by at most C

and, with hypothesis (the extra ``test``), strategies for property-based tests:

    from dpkit.testing import ModuleCase, batches, clipping_cases, modules

    @given(clipping_cases(modules=modules()))
    def test_sensitivity(case):
        case.check()

All raise `AssertionError` with a report that names the record and the parameter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .loops import check_loop, released
from .rules import RuleReport, check_rule

if TYPE_CHECKING:
    from .strategies import ClippingCase, ModuleCase, batches, clipping_cases, modules

_WITH_HYPOTHESIS = ("ClippingCase", "ModuleCase", "batches", "clipping_cases", "modules")

__all__ = [
    "ClippingCase",
    "ModuleCase",
    "RuleReport",
    "batches",
    "check_loop",
    "check_rule",
    "clipping_cases",
    "modules",
    "released",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_HYPOTHESIS:
        raise AttributeError(f"module 'dpkit.testing' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("dpkit.testing.strategies"), name)
    except ModuleNotFoundError as missing:
        if missing.name != "hypothesis":
            raise
        raise ImportError(f"dpkit.testing.{name} needs hypothesis: pip install 'dpkit[test]'") from missing
