"""What all tests share."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# The models are tiny: one thread is fastest, and tests running side by side do not wait for each other's barriers.
torch.set_num_threads(1)

# `make test` tries the same examples everywhere, so that what passes here passes there; `make fuzz` tries new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("fuzz", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, in whatever order it runs."""
    torch.manual_seed(0)
