"""Where chance comes from outside the engine (dropout, augmentation): saved and put back, so that a run can go on.

States are plain values: tensors, numbers, strings, lists and dicts.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def capture() -> dict[str, Any]:
    """The states of torch's global generators (CPU, and CUDA where in use), Python's and, where loaded, numpy's."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        held = numpy.random.get_state(legacy=False)
        if held["bit_generator"] == "MT19937":
            key = torch.from_numpy(held["state"]["key"].astype("int64"))
            state["numpy"] = [key, int(held["state"]["pos"]), int(held["has_gauss"]), float(held["gauss"])]
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` gave."""
    torch.set_rng_state(state["torch"])
    for device, held in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(held, device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        key, pos, has_gauss, cached = state["numpy"]
        numpy.random.set_state(("MT19937", key.numpy().astype("uint32"), pos, has_gauss, cached))
