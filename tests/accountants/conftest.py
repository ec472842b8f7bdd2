"""Ground truth shared by the accountants' tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TRUTH: dict[str, Any] = json.loads((Path(__file__).parent / "truth.json").read_text())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", TRUTH["cases"], ids=[case["id"] for case in TRUTH["cases"]])


@pytest.fixture(scope="session")
def truth() -> dict[str, Any]:
    return TRUTH
