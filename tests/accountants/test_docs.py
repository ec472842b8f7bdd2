"""Every example in a docstring runs, and every module keeps to numpy, scipy and its own folder."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

import dpkit.accountants

FOLDER = Path(dpkit.accountants.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = dpkit.accountants if name == "__init__" else importlib.import_module(f"dpkit.accountants.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_imports_stay_inside(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = {(node.module or "").split(".")[0]}
        else:
            continue
        assert not roots & {"torch", "dpkit", "layers", "accountants", "opacus", "dp_accounting"}


def test_public_names_exist() -> None:
    for name in dpkit.accountants.__all__:
        assert hasattr(dpkit.accountants, name)
