"""What a file needs beyond being written to be there after a crash."""

from __future__ import annotations

import os


def sync_directory(folder: str | os.PathLike[str]) -> None:
    """Force a folder's entries to the disk: a new or renamed file is safe only then."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
