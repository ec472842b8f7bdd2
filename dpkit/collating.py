"""What a ``collate_fn`` may not do: make a row of several records (mixup, cutmix, a mean over the batch taken away)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import randomness
from .errors import SamplingError
from .trees import leaves, row_bytes

_LOOKS, _DRAWS, _ROWS = 2, 4, 16


class Collates:
    """The user's ``collate_fn``, looked at in the first batches of each process, on copies of some of their rows.

    With the same chance, and one record replaced by another, one row may be another one. In which order the rows come
    is for the function to say (sequences sorted by their lengths).
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate, self._looks = collate, _LOOKS

    def __call__(self, rows: list[Any]) -> Any:
        if self._looks and len(rows) > 1:
            self._looks -= 1
            self._look(rows[:_ROWS])
        return self.collate(rows)

    def _look(self, rows: list[Any]) -> None:
        chance = randomness.capture()
        try:
            for _ in range(_DRAWS):  # mixup may leave a record in its place
                found = self._mixed(rows)
                if found is not None:
                    raise SamplingError(
                        f"collate_fn makes rows of several records (tensor {found}): when one record is replaced by "
                        "another, more rows than its own change",
                        why="a record (by mixup, cutmix, a mean over the batch) then acts through other rows, each of "
                        "which is clipped by itself.",
                        cure="make each row of its own record alone; mix views of one record, or leave it out.",
                    )
        except SamplingError:
            raise
        except Exception:  # the user's own error will come where the user sees it
            return
        finally:
            randomness.restore(chance)

    def _mixed(self, rows: list[Any]) -> int | None:
        """The number of a tensor in which more rows than one are others when a record is; None if there is none."""
        chance = randomness.capture()
        one = self._collated(rows)
        drawn = randomness.capture()
        randomness.restore(chance)
        again = self._collated(rows)
        randomness.restore(chance)
        other = self._collated([*rows[:-1], rows[0]])
        if randomness.drawn_since(drawn):
            return None  # the records say how much is drawn
        for k, (x, y, z) in enumerate(zip(leaves(one), leaves(again), leaves(other), strict=False)):
            if not all(isinstance(v, Tensor) and v.shape[:1] == (len(rows),) for v in (x, y, z)):
                continue
            if x.shape == z.shape and torch.equal(x, y):  # else padded to another length, or by a chance of its own
                known = set(row_bytes(x))
                if sum(row not in known for row in row_bytes(z)) > 1:
                    return k
        return None

    def _collated(self, rows: list[Any]) -> Any:
        return self.collate([copy.deepcopy(row) for row in rows])
