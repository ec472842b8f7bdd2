"""Checkpoint files: written whole or not at all, checked before anything is believed, read without running code.

One line ``dpkit-checkpoint <version> <bytes> <sha256>``, then an ordinary ``torch.save`` of plain values (torch's own
checks miss changed bits). A new file takes the old one's place only once it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import torch

from .errors import CheckpointError
from .files import sync, sync_directory
from .state import plain

VERSION = 1
_MAGIC = b"dpkit-checkpoint"
_HEADER = len(_MAGIC) + 1 + 4 + 1 + 20 + 1 + 64 + 1


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``; whoever reads the path finds the old file or the new one, at any moment.

    The file is readable for its owner only: see `dpkit.PrivacyEngine.save_checkpoint`.

    Raises:
        CheckpointError: the state holds more than plain values, or cannot be written.
    """
    state = plain(state)
    target = Path(path)
    mine = f".{target.name}.{platform.node()}."
    partial = target.parent / f"{mine}{os.getpid()}.partial"
    try:
        _clear(target.parent, mine)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b") as file:
            file.write(b" " * _HEADER)
            hashed = _Hashing(file)
            torch.save(state, cast(BinaryIO, hashed))
            file.seek(0)
            file.write(_header(hashed.size, hashed.digest.hexdigest()))
            file.flush()
            sync(file.fileno())
        os.replace(partial, target)
        sync_directory(target.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{target} could not be written ({error})",
            why="the checkpoint that was there before, if any, is untouched.",
            cure="make room, or name another path.",
        ) from error


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` wrote, tensors on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, of another version, or damaged.
    """
    target = Path(path)
    try:
        with open(target, "rb") as file:
            return _read(target, file)
    except OSError as error:
        _refuse(f"{target} cannot be read ({error.strerror})", "there is nothing to go on from.", "name a checkpoint.")


def _read(target: Path, file: BinaryIO) -> dict[str, Any]:
    first = file.read(_HEADER)
    fields = first.split()
    if not first.startswith(_MAGIC + b" ") or len(fields) != 4:
        _refuse(f"{target} is not a checkpoint", "its first line says so.", "name a file that save_checkpoint wrote.")
    if fields[1] != f"{VERSION:04d}".encode():
        _refuse(
            f"{target} is of checkpoint version {fields[1].decode('latin1')}",
            f"this release reads version {VERSION} only.",
            "load it with the dpkit release that wrote it.",
        )
    digest, size = hashlib.sha256(), 0
    while part := file.read(1 << 22):
        digest.update(part)
        size += len(part)
    if first != _header(size, digest.hexdigest()):
        _refuse(
            f"{target} is damaged: its {size} bytes are not those that were written",
            "a state that has changed by itself is not the run's. Nothing was loaded.",
            "use an older checkpoint.",
        )
    file.seek(_HEADER)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's reader raises: the bytes are right, so another torch wrote them
        _refuse(f"{target} is not understood by this torch ({error})", "nothing was loaded.", "use the torch it is of.")
    if not isinstance(state, dict) or set(state) != {"state", "also", "extra"}:
        _refuse(f"{target} does not hold an engine's state", "other code wrote it.", "name another file.")
    return state


def _header(size: int, digest: str) -> bytes:
    return b"%s %04d %020d %s\n" % (_MAGIC, VERSION, size, digest.encode())


class _Hashing(io.RawIOBase):
    """A file that is only written to, from here on, with the hash of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        return self._file.write(view)


def _clear(folder: Path, mine: str) -> None:
    """Remove what processes of this machine that are no more have left unfinished."""
    for left in folder.glob(f"{mine}*.partial"):
        owner = left.name[len(mine) : -len(".partial")]
        if owner.isdigit() and int(owner) != os.getpid() and not _alive(int(owner)):
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _refuse(seen: str, why: str, cure: str) -> NoReturn:
    raise CheckpointError(seen, why=why, cure=cure)
