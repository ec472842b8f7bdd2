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
        self._before: Any = stream.state()  # of the lot in hand, or of the next one where none is
        self._lot: Tensor | None = None
        self._used = 0
        self._next: _Drawing | None = None
        self._spare: Tensor | None = None

    def prepare(self) -> None:
        """Have the next lot drawn, if it is not."""
        if self._next is None:
            flat = torch.empty(self.size) if self._spare is None else self._spare
            self._next, self._spare = _Drawing(self._stream, flat), None

    def take(self, count: int) -> Tensor:
        """The next numbers [count], at most a lot; they stay what they are until the next call.

        What is left of a lot and not enough is never used.
        """
        if self._lot is None or self._used + count > self.size:
            self.prepare()
            assert self._next is not None
            drawing, self._next = self._next, None
            self._spare, self._lot = self._lot, None
            self._before, self._used = drawing.before, 0
            self._lot = drawing.take()
        taken = self._lot[self._used : self._used + count]
        self._used += count
        if self._used == self.size == count:  # a large model's: its memory is not held from step to step
            self._lot, self._before = None, self._stream.state()
        return taken

    def sized(self, size: int) -> Lots:
        """The stream's next numbers, in lots of another size."""
        if self._next is not None:
            self._next.take()
        return Lots(self._stream, size)

    def state(self) -> dict[str, Any]:
        """Where it stands, in plain values."""
        return {"before": self._before, "size": self.size, "used": 0 if self._lot is None else self._used}

    @classmethod
    def at(cls, stream: Normals, state: dict[str, Any]) -> Lots:
        """Go on where ``state()`` was taken; ``stream`` begins with the lot that was in hand."""
        lots = cls(stream, state["size"])
        if state["used"]:
            lots.take(state["used"])
        return lots


class _Drawing:
    """A lot that is drawn: by a thread of its own if that pays, or else when it is asked for.

    Attributes:
        before: the stream's state before.
    """

    def __init__(self, stream: Normals, flat: Tensor) -> None:
        self.before = stream.state()
        self._stream, self._flat = stream, flat
        self._error: BaseException | None = None
        self._done: threading.Event | None = None
        if _PROCESSORS > 1 and len(flat) >= _BESIDE:
            self._done = threading.Event()
            _thread.start_new_thread(self._draw, ())  # threading.Thread waits until it runs: a tenth of a millisecond

    def _draw(self) -> None:
        try:
            self._stream.fill(self._flat)
        except BaseException as error:  # it is raised where the numbers are asked for
            self._error = error
        finally:
            if self._done is not None:
                self._done.set()

    def take(self) -> Tensor:
        if self._done is None:
            self._draw()
        else:
            self._done.wait()
        if self._error is not None:
            raise self._error
        return self._flat


def size_for(count: int) -> int | None:
    """The lot for steps that need ``count`` numbers; None where each step's are better drawn when they are added."""
    steps = min(STEPS, LOT // max(count, 1))
    if steps < 2:
        return count if _PROCESSORS > 1 else None
    return steps * count
