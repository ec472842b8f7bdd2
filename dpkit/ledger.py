"""The durable ledger: every release of every run on a data set, on disk before anybody sees what it contains.

A file of JSON lines that only grows. The first says what it is; then, for each run, one line that it begins, and one
for each release: its number in the run, its event (null where an earlier one paid for it) and a fingerprint of what was
released. Each line ends in a checksum over itself and the line before, so that a changed, lost or exchanged line shows.
Processes take turns by a lock on the file.

A line is written in one piece, newline last, and forced to the disk before the release is handed out. A last line
without its newline is therefore of a release that nobody has seen: it is dropped, unless all of it is there but the
end. Any other damage is an error, and the file is left as it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dpkit.accountants import Event

from .errors import LedgerError
from .files import sync, sync_directory

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_HEADER = b'{"dpkit_ledger":1,'
_CHECK = b',"check":"'


@dataclass(frozen=True, slots=True)
class Release:
    """One line: what was done (None: an earlier release paid for it), its fingerprint, and the line's checksum."""

    event: Event | None
    fingerprint: str
    check: str


@dataclass
class Run:
    """What the ledger holds of one run.

    Attributes:
        about: what the run said of itself when it began.
        releases: all of its releases, in order.
        totals: how often each event was released.
    """

    about: dict[str, Any]
    releases: list[Release] = field(default_factory=list)
    totals: dict[Event, int] = field(default_factory=dict)


class Ledger:
    """The ledger in the file ``path``, which is made if it is not there.

    Args:
        path: the file.
        adjacency: what neighbouring data sets are, for a file that is made; None reads an existing file only and never
            writes to it.

    Attributes:
        id: the file's own name for itself, wherever it is moved to.
        runs: what it holds, by run.
        torn: whether the file ended in the beginning of a line, whose release does not count.

    Raises:
        LedgerError: the file is damaged or no ledger, cannot be opened or locked, or is for another adjacency.
    """

    def __init__(self, path: str | os.PathLike[str], adjacency: str | None) -> None:
        self.path = Path(path)
        self.id, self.adjacency = "", ""
        self.runs: dict[str, Run] = {}
        self.torn = False
        self._writes, self._process = adjacency is not None, os.getpid()
        self._size, self._last = 0, ""
        self._events: dict[str, Event | None] = {}
        if fcntl is None:
            _refuse(
                f"{self.path}: this system has no file locks (fcntl)",
                "two runs that write at once would lose releases.",
                "keep the ledger on Linux or macOS.",
            )
        try:
            self._file = self._open(os.O_CREAT if self._writes else 0)
        except OSError as error:
            _refuse(f"{self.path} cannot be opened: {error.strerror}", "releases are written there.", "name a file.")
        try:
            with self._locked():
                self._read()
                if adjacency is not None and not self.id:
                    self._write(f'{_HEADER.decode()}"id":"{secrets.token_hex(8)}","adjacency":{json.dumps(adjacency)}')
                    sync_directory(self.path.parent)
        except BaseException:
            self.close()
            raise
        if not self.id:
            self.close()
            _refuse(f"{self.path} is empty", "there is no ledger in it.", "name the file that PrivacyEngine wrote.")
        if adjacency not in (None, self.adjacency):
            self.close()
            _refuse(
                f"{self.path} is for adjacency {self.adjacency!r}, this run for {adjacency!r}",
                "the same noise gives another epsilon under another adjacency.",
                "use another ledger.",
            )

    def _open(self, create: int = 0) -> int:
        flags = os.O_RDWR | os.O_APPEND if self._writes else os.O_RDONLY
        return os.open(self.path, flags | create | os.O_CLOEXEC, 0o600)

    def _part(self) -> None:
        """In a forked process: go on with an open file of its own, since a lock is the open file's; `_read` refuses
        another file that lies there now."""
        own = self._open()
        try:
            if os.path.samestat(os.fstat(own), os.fstat(self._file)):
                os.dup2(own, self._file, inheritable=False)
                self._process = os.getpid()
        finally:
            os.close(own)

    def close(self) -> None:
        """Give the file back."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    # ---- what it tells

    def totals(self) -> dict[Event, int]:
        """How often each event was released, by all runs together."""
        totals: dict[Event, int] = {}
        for run in self.runs.values():
            for event, n in run.totals.items():
                totals[event] = totals.get(event, 0) + n
        return totals

    # ---- writing

    def append(
        self,
        name: str,
        event: Event | None,
        fingerprint: str,
        *,
        number: int,
        about: dict[str, Any],
        admit: Callable[[], None] | None = None,
    ) -> Release:
        """Write one release; it is on the disk when this returns.

        Args:
            name: the run.
            number: how many releases the caller knows of in this run.
            about: what to say of the run where this is its first release.
            admit: called once the other runs' latest releases are known and before anything is written; may refuse.

        Raises:
            LedgerError: it could not be written, or another process goes on with the same run.
        """
        with self._locked():
            self._read()
            held = len(self.runs[name].releases) if name in self.runs else 0
            if held != number:
                _refuse(
                    f"{self.path} holds {held} releases of run {name}, this process knows of {number}",
                    "another process goes on with the same run, and both would draw the same noise.",
                    "let one process alone resume a run.",
                )
            if admit is not None:
                admit()
            if name not in self.runs:
                begins = {**about, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
                self._write(f'{{"run":{json.dumps(name)},"begins":{_dumps(begins)}')
            what = "null" if event is None else _dumps(event.to_json())
            self._write(f'{{"run":{json.dumps(name)},"release":{number},"event":{what},"print":"{fingerprint}"')
            return self.runs[name].releases[-1]

    def _write(self, body: str) -> None:
        line = self._line(body.encode())
        try:
            if os.write(self._file, line + b"\n") <= len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise LedgerError(
                f"{self.path} cannot be written: {error.strerror}",
                why="a release has to be on the disk before anybody sees it; this one is not, and was not handed out.",
                cure="make room, and go on from the last checkpoint.",
            ) from error
        self._take(line)

    def _line(self, body: bytes) -> bytes:
        """The whole line, its newline apart, that holds ``body`` after the lines known so far."""
        return body + _CHECK + hashlib.sha256(self._last.encode() + body).hexdigest()[:24].encode() + b'"}'

    # ---- reading

    def read(self) -> None:
        """Take in what other runs have written since."""
        with self._locked():
            self._read()

    def _read(self) -> None:
        """Read from where we stopped. The lock is held, so a last line without newline is nobody's work in progress."""
        there = os.fstat(self._file)
        try:
            moved = os.stat(self.path).st_ino != there.st_ino
        except OSError:
            moved = True
        if moved or there.st_size < self._size:
            _refuse(
                f"{self.path} was {'moved or replaced' if moved else 'cut off'} while this run writes to it",
                "releases that it held would be forgotten.",
                "put the file back and start again from the last checkpoint.",
            )
        data = b""
        while len(data) < there.st_size - self._size:
            part = os.pread(self._file, 1 << 24, self._size + len(data))
            if not part:
                break
            data += part
        *lines, tail = data.split(b"\n")
        for line in lines:
            self._take(line)
        self.torn = False
        if tail:
            self._recover(tail)

    def _recover(self, tail: bytes) -> None:
        """A last line without its newline, as a crash leaves it: the beginning of a line, and nothing else.

        Where all but a part of the checksum is there, the release counts. Where less is there nobody has seen it, and
        it is dropped.
        """
        body, mark, _ = tail.rpartition(_CHECK)
        whole = self._line(body) if mark else b""
        begins = b'{"run":"' if self.id else _HEADER
        plain = tail.isascii() and tail.decode().isprintable() and tail.count(b'{"run":') <= 1
        if tail[:-1] != whole and not (
            whole.startswith(tail) if mark else plain and begins.startswith(tail[: len(begins)])
        ):
            if not self.id:
                _refuse(f"{self.path} is no ledger", "it would be overwritten.", "name another file.")
            self._refuse_damaged("it has no end, and is not the beginning of a line either")
        if self._writes:
            try:
                os.ftruncate(self._file, self._size)
                os.write(self._file, whole + b"\n" if whole else b"")
                sync(self._file)
            except OSError as error:
                _refuse(f"{self.path}: {error.strerror}", "its last line is torn.", "make the file writable.")
        if whole:
            self._take(whole)
        self.torn = not whole

    def _is_whole(self, line: bytes) -> bool:
        return line == self._line(line.rpartition(_CHECK)[0])

    def _take(self, line: bytes) -> None:
        """One whole line, without its newline."""
        if not self._is_whole(line):
            self._refuse_damaged("its checksum does not match")
        body = line.rpartition(_CHECK)[0]
        check = line[len(body) + len(_CHECK) : -2].decode()
        try:
            self._understand(json.loads(body + b"}"), check)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # AccountingError is a ValueError
            self._refuse_damaged(f"it is not understood ({error})")
        self._size += len(line) + 1
        self._last = check

    def _understand(self, entry: dict[str, Any], check: str) -> None:
        if not self.id:
            if entry["dpkit_ledger"] != 1:
                raise ValueError("another version")
            self.id, self.adjacency = entry["id"], entry["adjacency"]
        elif "begins" in entry:
            self.runs.setdefault(entry["run"], Run(entry["begins"]))
        else:
            run = self.runs[entry["run"]]
            if entry["release"] != len(run.releases):
                raise ValueError(f"release {entry['release']} after {len(run.releases)}")
            key = _dumps(entry["event"])
            if key not in self._events:
                self._events[key] = None if entry["event"] is None else Event.from_json(entry["event"])
            event = self._events[key]
            run.releases.append(Release(event, entry["print"], check))
            if event is not None:
                run.totals[event] = run.totals.get(event, 0) + 1

    def _refuse_damaged(self, how: str) -> NoReturn:
        number = 1 + bool(self.id) + sum(1 + len(run.releases) for run in self.runs.values())
        _refuse(
            f"{self.path}, line {number}, is damaged: {how}",
            "what it says of the budget spent cannot be relied on. The file was left as it is.",
            "restore it from a copy; without one, take the whole budget as spent. If it is the last line, and the "
            "machine lost power: cut the file at the end of the line before, nobody has seen that release.",
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            if self._process != os.getpid():
                with contextlib.suppress(FileNotFoundError):  # moved: `_read` says so
                    self._part()
            fcntl.flock(self._file, fcntl.LOCK_EX if self._writes else fcntl.LOCK_SH)
        except OSError as error:
            raise LedgerError(
                f"{self.path} cannot be locked: {error.strerror}",
                why="two runs that write at once would lose releases.",
                cure="keep the ledger on a file system with locks (a local disk).",
            ) from error
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _refuse(seen: str, why: str, cure: str) -> NoReturn:
    raise LedgerError(seen, why=why, cure=cure)
