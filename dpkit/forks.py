"""What a forked process must not share with its parent: noise, and the draw of records.

Two processes that go on from one state would release two sums with one noise, whose difference is exact. So in the
child every source of chance that nobody seeded by hand begins anew.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, Protocol


class Forked(Protocol):
    """What has to begin anew in a child process."""

    def forked(self) -> None:
        """Called in the child, right after the fork."""
        ...


_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(source: Forked) -> None:
    """Call its ``forked()`` in every child process that this one forks, as long as it lives."""
    _watched.add(source)


def _renew() -> None:
    for source in list(_watched):
        source.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
