"""Several processes that train one model together, on torch.distributed (torchrun): what they tell each other.

Every rank holds the whole data set, draws the same logical batch from the same generator state, and works on its share
of it (`dpkit.shares`). The clipped sums are added up on rank 0, which alone adds noise, writes the ledger, and then
hands the noisy gradient out. So there is one noise, one count and one release, as in a single process; a rank that
fails before leaves nothing that anybody has seen, and one that fails after leaves a release that is counted.

Before each exchange the ranks compare in a few bytes what they are about to do. Where they differ all of them raise.
Messages have groups of their own, so that the user's collectives cannot meet them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors
from .errors import ConfigurationError, PrivacyError, RanksError

_FEW = 1 << 16  # smaller tensors travel together
_ROOM = 1 << 12  # bytes of a message that need no second one
_FAILED = -1


def world() -> int:
    """How many processes there are; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the only process, or rank 0."""
    return world() == 1 or dist.get_rank() == 0


class Ranks:
    """The processes of the run, made by all of them at once; a single one says everything to itself.

    Attributes:
        rank, size: which one this is, of how many.
        compared_every: the ranks' weights are compared at the first release and at every so manieth after it.
    """

    compared_every = 100

    def __init__(self) -> None:
        self.size, self.rank = world(), 0
        self._broken = self._inside = False
        self._words: Any = None
        self._numbers: dict[str, Any] = {}
        if self.size > 1:
            self.rank = dist.get_rank()
            with self._talking("make_private"):
                self._words = dist.new_group(backend="gloo", timeout=_timeout())

    @property
    def first(self) -> bool:
        """Whether this rank adds the noise and keeps the ledger."""
        return self.rank == 0

    def refuse_change(self) -> None:
        """Raise if processes have joined since, or the group is gone."""
        if world() != self.size:
            raise ConfigurationError(
                f"there are {world()} processes now, and there were {self.size} when the model was made private",
                why="each would draw, add noise and count for itself, while all of them release.",
                cure="call init_process_group before make_private.",
            )

    # ---- words

    def agree(self, what: str, **values: Any) -> None:
        """Raise on every rank unless all ranks are about to do ``what``, with the same plain values."""
        if self.size > 1:
            self._compare(json.dumps({"what": what, **values}, default=str), failed=False)
            self._inside = True

    def done(self) -> None:
        """What was agreed on has been done."""
        self._inside = False

    def give_up(self, error: BaseException) -> None:
        """Tell the others that this rank has failed, where they next agree, so that they need not wait for it."""
        if self.size == 1 or self._broken or self._inside or not isinstance(error, Exception):
            self._broken = self._broken or self.size > 1
            return
        with contextlib.suppress(RanksError):
            self._compare(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", failed=True)
        self._broken = True

    def decide(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on rank 0, plain values; or the error that it raises there, on every rank."""
        if self.size == 1:
            return work()
        if not self.first:
            said = json.loads(self._from_first(None))
            if "error" in said:
                self._broken = True
                kind, *lines = said["error"]
                known = getattr(errors, kind, None)
                raise (known if isinstance(known, type) and issubclass(known, PrivacyError) else RanksError)(
                    f"rank 0: {lines[0]}", why=lines[1], cure=lines[2]
                )
            return said["answer"]
        try:
            answer = work()
        except Exception as error:
            lines = [getattr(error, name, "") for name in ("seen", "why", "cure")]
            self._from_first(json.dumps({"error": [type(error).__name__, lines[0] or repr(error), *lines[1:]]}))
            self._broken = True
            raise
        self._from_first(json.dumps({"answer": answer}))
        return answer

    def any(self, yes: bool) -> bool:
        """Whether any rank says yes; all of them have to ask."""
        if self.size == 1:
            return yes
        with self._talking("the ranks' answers"):
            return any(bool(f) for f in self._gather(torch.tensor([int(yes)])))

    def collect(self, number: int) -> list[int]:
        """Every rank's number (64 bits, signed), in their order."""
        if self.size == 1:
            return [number]
        with self._talking("the ranks' numbers"):
            return [int(f) for f in self._gather(torch.tensor([number]))]

    def each(self, value: Any) -> list[Any]:
        """Every rank's plain value, in their order."""
        found = [value] * self.size
        if self.size > 1:
            with self._talking("the ranks' states"):
                dist.all_gather_object(found, value, group=self._words)
        return found

    def share(self, generator: torch.Generator) -> torch.Generator:
        """Put the generator into the state that rank 0's is in, in place."""
        if self.size > 1:
            held = self.decide(lambda: generator.get_state().tolist())
            generator.set_state(torch.tensor(held, dtype=torch.uint8))
        return generator

    def _compare(self, text: str, *, failed: bool) -> None:
        mine = _FAILED if failed else int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        with self._talking("the ranks' agreement"):
            found = self._gather(torch.tensor([mine]))
            if all(int(f) == mine for f in found) and not failed:
                return
            raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            sizes = [int(s) for s in self._gather(torch.tensor([len(raw)]))]
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(raw)] = raw
            texts = [bytes(t[:s].tolist()).decode() for t, s in zip(self._gather(padded), sizes, strict=True)]
        self._broken = True
        _refuse_difference(texts, [int(f) == _FAILED for f in found])

    def _gather(self, mine: Tensor) -> list[Tensor]:
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._words)
        return found

    def _from_first(self, text: str | None) -> str:
        with self._talking("rank 0's answer"):
            raw = b"" if text is None else text.encode()
            head = torch.zeros(_ROOM, dtype=torch.uint8)
            if text is not None:
                head[:8] = _bytes(len(raw).to_bytes(8, "big"))
                head[8 : 8 + len(raw)] = _bytes(raw[: _ROOM - 8])
            dist.broadcast(head, 0, group=self._words)
            size, begin = int.from_bytes(bytes(head[:8].tolist()), "big"), bytes(head[8:].tolist())
            rest = torch.zeros(max(0, size - (_ROOM - 8)), dtype=torch.uint8)
            if len(rest):
                if text is not None:
                    rest[:] = _bytes(raw[_ROOM - 8 :])
                dist.broadcast(rest, 0, group=self._words)
            return (begin[:size] + bytes(rest.tolist())).decode()

    # ---- numbers

    def gather(self, tensors: Sequence[Tensor]) -> None:
        """Add every rank's tensors up on rank 0, in place; what the others hold afterwards means nothing."""
        if self.size > 1:
            self._send(tensors, lambda t, group: dist.reduce(t, 0, group=group, async_op=True), raw=False)

    def hand_out(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank what rank 0 has, bit for bit, in place."""
        if self.size > 1:
            self._send(tensors, lambda t, group: dist.broadcast(t, 0, group=group, async_op=True), raw=True)

    def scatter(self, mine: Tensor, whole: Tensor) -> None:
        """Add every rank's ``whole`` [W k] up and put this rank's part [k] into ``mine``."""
        if self.size == 1:
            mine.copy_(whole)
            return
        with self._talking("the sums"):
            dist.reduce_scatter_single(mine, whole, group=self._group(whole.device))

    def _send(self, tensors: Sequence[Tensor], call: Callable[[Tensor, Any], Any], *, raw: bool) -> None:
        """One call for each large tensor, and one for the small ones of a kind together."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for t in tensors:
            kinds.setdefault((t.device, t.dtype), []).append(t.detach().view(-1))
        with self._talking("the sums"):
            for (device, _), flat in kinds.items():
                group = self._group(device)
                small, large = [t for t in flat if len(t) < _FEW], [t for t in flat if len(t) >= _FEW]
                joined = torch.cat(small) if small else None
                whole = [*large, *([] if joined is None else [joined])]
                works = [call(t.view(torch.uint8) if raw else t, group) for t in whole if len(t)]
                for work in works:
                    work.wait()
                if joined is not None:
                    torch._foreach_copy_(small, list(joined.split([len(t) for t in small])))

    def _group(self, device: torch.device) -> Any:
        """The group for tensors of that device; it is made when it is first needed, by all ranks at once."""
        if device.type == "cpu":
            return self._words
        if device.type not in self._numbers:
            self._numbers[device.type] = dist.new_group(timeout=_timeout())
        return self._numbers[device.type]

    @contextlib.contextmanager
    def _talking(self, what: str) -> Iterator[None]:
        """Turn a rank that does not answer into an error, once and for all."""
        if self._broken:
            raise RanksError(
                "the ranks of this run have parted before",
                why="one of them failed or did something else; there is nobody to go on with.",
                cure="start all of them again, from a checkpoint.",
            )
        try:
            yield
        except RuntimeError as error:  # torch.distributed's own errors are all of this kind
            self._broken = True
            raise RanksError(
                f"rank {self.rank} waited for {what}, and another rank did not answer "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})",
                why="it died, hangs, or left the loop; what is not handed out was not released, what may have been is "
                "counted.",
                cure="look at the other ranks' errors, and start all of them again from a checkpoint. How long to wait "
                "is init_process_group(timeout=...).",
            ) from error


def _refuse_difference(texts: Sequence[str], failed: Sequence[bool]) -> None:
    if any(failed):
        told = "; ".join(f"rank {r}: {t}" for r, (t, f) in enumerate(zip(texts, failed, strict=True)) if f)
        raise RanksError(
            f"another rank has failed ({told})",
            why="a step is taken by all ranks or by none; nothing of this one was released.",
            cure="mend what it says.",
        )
    said = [json.loads(t) for t in texts]
    for name in {k: None for s in said for k in s}:
        other = next((r for r, s in enumerate(said) if s.get(name) != said[0].get(name)), None)
        if other is not None:
            raise RanksError(
                f"the ranks differ in {name}: rank 0 has {said[0].get(name)!r}, rank {other} has "
                f"{said[other].get(name)!r}",
                why="they would not take the same step on the same model, and what they release together would not be "
                "what is accounted. Nothing was released.",
                cure="run the same script with the same data and arguments on every rank, and leave loops together.",
            )
    raise RanksError("the ranks differ", why="they would not take the same step.", cure="run the same script on all.")


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)


def _timeout() -> timedelta | None:
    """The timeout that the user gave to init_process_group, for our own groups."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):  # the default group has no backend for it
            backend: Any = dist.group.WORLD._get_backend(torch.device(device))  # type: ignore[union-attr]
            held: timedelta = backend.options._timeout
            return held
    return None
