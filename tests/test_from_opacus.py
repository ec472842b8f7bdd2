"""docs/from_opacus.md names everything public of the Opacus that is installed, and what it points to exists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dpkit
import dpkit.accountants
import dpkit.layers
import dpkit.testing

opacus = pytest.importorskip("opacus")
from benchmarks import char_lstm, mnist  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "from_opacus.md").read_text(encoding="utf-8")
WITH_METHODS = [  # what users call; the other classes' methods are inner parts
    "AbstractGradSampleHooks", "AbstractGradSampleModule", "BatchMemoryManager", "DPDataLoader", "DPOptimizer",
    "IAccountant", "ModuleValidator", "PrivacyEngine",
]  # fmt: skip
CONSTANTS = {"ModuleValidator.VALIDATORS", "ModuleValidator.FIXERS"}


def rows() -> list[tuple[str, str]]:
    """The two columns of every table row in "Every public name"."""
    part = PAGE.split("## Every public name")[1].split("## Schedules")[0]
    found = re.findall(r"^\| (.*?) \| (.*) \|$", part, re.M)
    return [(left, right) for left, right in found if left != "Opacus"]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def modules() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield opacus
        for found in pkgutil.walk_packages(opacus.__path__, "opacus."):
            if not found.name.startswith("opacus.tests"):
                yield importlib.import_module(found.name)


def public() -> set[str]:
    """Classes and functions without an underscore, wherever in Opacus they are, and what users call of them."""
    names: set[str] = set()
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if not value.__module__.startswith("opacus"):
                continue
            names.add(value.__name__)
            if value.__name__ in WITH_METHODS:
                own = {f"{value.__name__}.{member}" for member in vars(value) if not member.startswith("_")}
                names |= own - CONSTANTS
    engine = opacus.PrivacyEngine
    given: set[str] = set()
    for label, function in (
        ("PrivacyEngine", engine.__init__),
        ("make_private", engine.make_private),
        ("make_private_with_epsilon", engine.make_private_with_epsilon),
    ):
        arguments = set(inspect.signature(function).parameters) - {"self", "kwargs"} - given
        given |= arguments if label == "make_private" else set()
        names |= {f"{label}({argument}=)" for argument in arguments}
    return names


def test_every_public_name_is_there() -> None:
    """A new release of Opacus with a new name fails here."""
    named = set().union(*(quoted(left) for left, _ in rows()))
    assert public() - named == set()
    assert named - public() == set()  # and nothing that Opacus does not have
    assert len(named) > 200


def test_what_it_points_to_exists() -> None:
    """Each `dpkit...` name resolves, each `engine...` is one of the engine's, each argument one of make_private's."""
    targets = set().union(*(quoted(right) for _, right in rows())) | quoted(PAGE.split("## Every public name")[0])
    for target in sorted(targets):
        found = re.fullmatch(r"(dpkit|engine)((?:\.\w+)+)(\(.*\))?", target)
        if found is None:
            continue
        value: Any = dpkit if found[1] == "dpkit" else dpkit.PrivacyEngine
        if "integrations" in target:  # each needs the library that it is named after
            home, _, name = target.rpartition(".")
            value = pytest.importorskip(home, exc_type=ImportError)
            assert hasattr(value, name), target
            continue
        for part in found[2].split(".")[1:]:
            value = getattr(value, part)
    arguments = set(inspect.signature(dpkit.PrivacyEngine.make_private).parameters)
    kept = {m[1] for left, right in rows() if right.startswith("the same") for m in re.finditer(r"\((\w+)=\)", left)}
    assert kept - {"accountant", "secure_mode"} <= arguments
    assert {"accountant", "secure_mode"} <= set(inspect.signature(dpkit.PrivacyEngine).parameters)


def test_figures_are_what_the_judges_say() -> None:
    """The page's ε, in the order of their settings, computed again; the committed results have the same."""
    runs = [(s.sigma, 0.004, s.epochs * 250, mnist.DELTA, s.epsilon) for s in mnist.SETTINGS if s.sigma is not None]
    runs.append((char_lstm.SIGMA, char_lstm.RATE, char_lstm.STEPS, char_lstm.DELTA, char_lstm.PUBLISHED["private"][1]))
    for sigma, rate, steps, delta, published in runs:
        e = mnist.epsilons(sigma, rate, steps, delta)
        row = f"| **{e.dpkit:.3f}** | {published} | {e.opacus_rdp:.3f} | {e.opacus_prv:.3f} |"
        assert f"σ {sigma} {row}" in PAGE
