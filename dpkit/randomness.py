"""Where chance comes from outside the engine (dropout, augmentation): saved and put back, so that a run can go on.

States are plain values: tensors, numbers, strings, lists and dicts.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import get_worker_info

from .trees import leaves


class Chance:
    """The states of torch's global generators (CPU, and CUDA where in use), Python's and, where loaded, numpy's.

    Taken in every batch and written down in few of them, so they are held as they come.
    """

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state(legacy=False)

    def plain(self) -> dict[str, Any]:
        """In plain values."""
        version, words, gauss = self._python
        python = [version, torch.tensor(words, dtype=torch.int64), gauss]
        state = {"torch": self._torch, "cuda": self._cuda, "python": python}
        held = self._numpy
        if held is not None and held["bit_generator"] == "MT19937":
            key = torch.from_numpy(held["state"]["key"].astype("int64"))
            state["numpy"] = [key, int(held["state"]["pos"]), int(held["has_gauss"]), float(held["gauss"])]
        return state


def capture() -> dict[str, Any]:
    """What `Chance` holds now, in plain values."""
    return Chance().plain()


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


def apart(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """Other chance than ``state``, the same whenever it is made from it: for another rank."""
    before = capture()
    restore(state)
    seed = int(torch.randint(1 << 31, ())) + rank
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % (1 << 32))
    made = capture()
    restore(before)
    return made


def drawn_since(state: dict[str, Any]) -> bool:
    """Whether anything was drawn from any of them since `capture` gave ``state``."""
    now, before = leaves(capture()), leaves(state)
    return len(now) != len(before) or any(
        not torch.equal(a, b) if isinstance(a, torch.Tensor) else a != b for a, b in zip(now, before, strict=True)
    )


class BatchChance:
    """Collates as the user does, and makes what a worker process draws at random depend on the batch alone.

    A batch's chance is then the same whichever worker fetches it, and whenever: a pass that was interrupted goes on as
    it would have. It holds for workers that are begun anew with every pass; persistent ones draw on from where they
    are.

    Args:
        collate: the user's ``collate_fn``.
        init: the user's ``worker_init_fn``.

    Attributes:
        first: the number in its pass of the first batch that the workers will fetch.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], init: Callable[[int], None] | None) -> None:
        self.collate, self.init, self.first = collate, init, 0
        self._number = 0

    def begin(self, worker: int) -> None:
        """The ``worker_init_fn``."""
        if self.init is not None:
            self.init(worker)
        self._number = self.first + worker
        self._seed()

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        about = get_worker_info()
        if about is not None:
            self._number += about.num_workers  # workers take turns
            self._seed()
        return batch

    def _seed(self) -> None:
        about = get_worker_info()
        assert about is not None
        seed = (about.seed - about.id + 0x9E3779B97F4A7C15 * (self._number + 1)) % (1 << 63)
        torch.manual_seed(seed)
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed % (1 << 32))
