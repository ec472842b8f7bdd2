"""Standard normal numbers in lots: of many steps at once where a step needs few, and drawn beside the user's code.

For few numbers a call takes as long as for thousands; and a thread that draws few at a time makes the others wait for
the interpreter's lock again and again. Which numbers a step gets depends on neither.
"""

from __future__ import annotations

import _thread
import os
import threading
from typing import Any

import torch
from torch import Tensor

from .normals import Normals

LOT = 1 << 20
"""So many float32 numbers (4 MiB) are drawn at a time, unless one step needs more than half of them."""
STEPS = 64
"""For so many steps at most."""
_BESIDE = 1 << 17  # fewer numbers are drawn faster than a thread begins
_PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Lots:
    """The float32 numbers of a stream, in order: one lot in hand, the next one drawn meanwhile.

    Args:
        stream: where they come from; nobody else draws from it.
        size: of a lot.
    """

    def __init__(self, stream: Normals, size: int) -> None:
        self.size, self._stream = size, stream
        self._lot: _Drawing | None = None
        self._next: _Drawing | None = None
        self._spare: Tensor | None = None

    def prepare(self) -> None:
        """Have the next lot drawn, if it is not."""
        if self._next is None:
            spare, self._spare = self._spare, None
            self._next = _Drawing(self._stream, torch.empty(self.size) if spare is None else spare)
            self._next.begin()

    def take(self, count: int) -> Tensor:
        """The next numbers [count], at most a lot; they stay what they are until the next call.

        What is left of a lot and not enough is never used. Wherever it is interrupted (by the user's Ctrl-C, say), no
        number comes twice, and no two threads draw from the stream.
        """
        if self._lot is None or self._lot.used + count > self.size:
            self.prepare()
            drawing, spent = self._next, self._lot
            assert drawing is not None
            drawing.wait()  # until it is done, it stays the next one
            self._next, self._lot = None, None
            self._spare = None if spent is None else spent.flat
            drawing.check()
            self._lot = drawing
        lot, start = self._lot, self._lot.used
        lot.used += count
        if lot.used == self.size == count:  # a large model's: its memory is not held from step to step
            self._lot = None
        return lot.flat[start : start + count]

    def sized(self, size: int) -> Lots:
        """The stream's next numbers, in lots of another size."""
        if self._next is not None:
            self._next.wait()
        return Lots(self._stream, size)

    def state(self) -> dict[str, Any]:
        """Where it stands, in plain values."""
        if self._lot is not None:
            return {"before": self._lot.before, "size": self.size, "used": self._lot.used}
        before = self._stream.state() if self._next is None else self._next.before
        return {"before": before, "size": self.size, "used": 0}

    @classmethod
    def at(cls, stream: Normals, state: dict[str, Any]) -> Lots:
        """Go on where ``state()`` was taken; ``stream`` begins with the lot that was in hand."""
        lots = cls(stream, state["size"])
        if state["used"]:
            lots.take(state["used"])
        return lots


class _Drawing:
    """A lot that is drawn: by a thread of its own if that pays, or else when it is waited for.

    Attributes:
        flat: its numbers.
        before: the stream's state before.
        used: how many numbers were handed out.
    """

    def __init__(self, stream: Normals, flat: Tensor) -> None:
        self.flat, self.before, self.used = flat, stream.state(), 0
        self._stream = stream
        self._error: BaseException | None = None
        self._claim, self._done = threading.RLock(), threading.Event()

    def begin(self) -> None:
        """In a thread, if that pays."""
        if _PROCESSORS > 1 and len(self.flat) >= _BESIDE:
            _thread.start_new_thread(self._draw, ())  # threading.Thread waits until it runs: a tenth of a millisecond

    def _draw(self) -> None:
        if not self._claim.acquire(blocking=False) or self._done.is_set():
            return  # somebody does it, or did
        try:  # who was interrupted before this line has the lock, and begins anew when he waits again
            self.before = self._stream.state()
            self._stream.fill(self.flat)
        except BaseException as error:  # it is raised where the numbers are asked for
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Until it is drawn, here if nobody began, and the stream is free again."""
        self._draw()
        self._done.wait()

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error


def size_for(count: int) -> int | None:
    """The lot for steps that need ``count`` numbers; None where each step's are better drawn when they are added."""
    steps = min(STEPS, LOT // max(count, 1))
    if steps < 2:
        return count if _PROCESSORS > 1 else None
    return steps * count
