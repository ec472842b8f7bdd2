"""What a file needs beyond being written to be there after a crash."""

from __future__ import annotations

import os

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


def sync(file: int) -> None:
    """Force what was written to an open file to the disk itself; on macOS ``fsync`` alone stops at its cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(file)
    else:
        fcntl.fcntl(file, full)


def sync_directory(folder: str | os.PathLike[str]) -> None:
    """Force a folder's entries to the disk: a new or renamed file is safe only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
