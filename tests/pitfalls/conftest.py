"""What is shown here is shown of the rules themselves: no module may have been run one record at a time instead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_slow_way(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A wrong rule would else be hidden: where a rule's gradients are not autograd's, the engine goes the slow way."""
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if "one record at a time" in r.getMessage()]
