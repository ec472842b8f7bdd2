"""What all tests share."""

from __future__ import annotations

import pytest
import torch

# The models are tiny: one thread is fastest, and tests running side by side do not wait for each other's barriers.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, in whatever order it runs."""
    torch.manual_seed(0)
