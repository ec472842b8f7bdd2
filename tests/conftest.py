"""What all tests share."""

from __future__ import annotations

import torch

# The models are tiny: one thread is fastest, and tests running side by side do not wait for each other's barriers.
torch.set_num_threads(1)
