"""Gaussian noise: drawn in float32 or wider, from a generator of its own. `dpkit.secure` has the cryptographic one."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ConfigurationError
from .keystream import Keystream, available
from .normals import PIECE, Encrypted, Generated, Normals
from .secure import SecureNoise
from .seeds import scramble, unforeseeable


class Source(Protocol):
    """Where noise comes from: every call adds fresh, independent Gaussian noise.

    Attributes:
        seeded: whether the noise repeats with a seed that somebody chose.
        secure: whether it is cryptographic and safe against attacks on floating point.
    """

    @property
    def seeded(self) -> bool: ...

    @property
    def secure(self) -> bool: ...

    def describe(self) -> str: ...

    def prepare(self, parameters: Sequence[Tensor]) -> None: ...

    def add_to(self, sums: Sequence[Tensor], std: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def reseed(self) -> None: ...


class NoiseSource:
    """Independent standard normal tensors.

    Args:
        generator: the user's generator, for runs that repeat exactly; by default a stream for each device, begun by the
            operating system: on a CPU from AES-256 (where the package ``cryptography`` is installed), else torch's. It
            is never torch's global generator, whose seed experiments publish.
    """

    secure = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._given = generator
        self._own: dict[torch.device, Normals] = {}
        self._ahead: Ahead | None = None

    @property
    def seeded(self) -> bool:
        """Whether the noise repeats with a seed that somebody chose."""
        return self._given is not None

    def describe(self) -> str:
        """One sentence for the statement."""
        if self.seeded:
            return (
                "Noise is drawn from a generator that was seeded by hand: the guarantee holds against those only who "
                "do not know the seed."
            )
        torchs = "torch's generator, in a state drawn from the operating system"
        if available():
            return (
                "Noise is drawn in floating point, whose last bits can tell more than real numbers would "
                "(secure_mode=True rounds them away): on a CPU from AES-256 in counter mode with a key of the "
                f"operating system's, elsewhere from {torchs}, which is not cryptographic."
            )
        return (
            f"Noise is drawn in floating point from {torchs}. That is not a cryptographic generator (secure_mode=True "
            "has one)."
        )

    def stream(self, device: torch.device) -> Normals:
        """Where the numbers for a device come from."""
        if self._given is not None and self._given.device.type == device.type:
            return Generated(self._given)
        if device not in self._own:
            if self._given is not None:  # the user's seed, carried over to another device
                seed = int(torch.randint(1 << 62, (), generator=self._given, device=self._given.device))
                self._own[device] = Generated(torch.Generator(device).manual_seed(seed))
            elif device.type == "cpu" and available():
                self._own[device] = Encrypted(Keystream())
            else:
                self._own[device] = Generated(unforeseeable(device))
        return self._own[device]

    def refuse_shared(self, draws: torch.Generator | None) -> None:
        """Raise if the sampling draws from the noise's stream: whoever is drawn would then be told by the noise."""
        if self._given is None or draws is None:
            return
        if draws is self._given or torch.equal(draws.get_state(), self._given.get_state()):
            raise ConfigurationError(
                "noise_generator and the data loader's generator are the same stream of random numbers",
                why="the noise would depend on who was drawn, while the guarantee takes the two as independent.",
                cure="seed two generators differently, or leave noise_generator out.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand. Who knows it can take the noise out of what was and will be released."""
        return {
            "kind": "plain",
            "given": None if self._given is None else self._given.get_state(),
            "own": {str(device): self._state(stream) for device, stream in self._own.items()},
        }

    def _state(self, stream: Normals) -> Any:
        """Where a stream stands, as if nothing had been drawn ahead."""
        ahead = self._ahead
        return ahead.before if ahead is not None and ahead.stream is stream else stream.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the streams that `state_dict` gave.

        Raises:
            ConfigurationError: they are of secure noise, or only one of the two runs was seeded by hand; or the package
                that they come from is missing.
        """
        if state["kind"] != "plain" or (state["given"] is None) == self.seeded:
            raise ConfigurationError(
                "the stored state is of another kind of noise than this engine's",
                why="the run would not go on as it began, and its statement would be untrue of one of its parts.",
                cure="resume with the secure_mode and noise_generator that the run was started with.",
            )
        own = {torch.device(name): _resumed(name, held) for name, held in state["own"].items()}
        if self._given is not None:
            self._given.set_state(state["given"])
        self._own, self._ahead = own, None

    def reseed(self) -> None:
        """Go on with fresh streams: what was drawn before and may have been released is never drawn again."""
        if self._given is not None:
            scramble(self._given)
        self._own, self._ahead = {}, None

    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Begin to draw the next noise for these parameters, beside the user's forward and backward.

        Only what nobody has a hand in: not from the user's generator, and not for other devices.
        """
        cpu = torch.device("cpu")
        fitting = all(p.device == cpu and p.dtype == torch.float32 for p in parameters)
        sizes = [p.numel() for p in parameters]
        if not self.seeded and self._ahead is None and fitting and sum(sizes) >= _MANY and _PROCESSORS > 1:
            self._ahead = Ahead(self.stream(cpu), sizes)

    def add_to(self, sums: Sequence[Tensor], std: float) -> None:
        """Add independent N(0, std²) to every entry of flat float32 or float64 tensors, in place."""
        if std == 0.0:
            return
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            drawn = ahead.take()
            if ahead.sizes == [s.numel() for s in sums] and all(s.dtype == torch.float32 for s in sums):
                _add([s.view(-1) for s in sums], std, ahead.stream, drawn)
                return
            cpu = torch.device("cpu")  # other parameters are trained now
            self._own[cpu] = _resumed("cpu", ahead.before)
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for s in sums:
            kinds.setdefault((s.device, s.dtype), []).append(s if s.ndim == 1 else s.view(-1))
        for (device, _), flat in kinds.items():
            _add(flat, std, self.stream(device))


def _resumed(device: str, state: Any) -> Normals:
    """The stream that goes on from a state."""
    if isinstance(state, Tensor):
        generator = torch.Generator(device)
        generator.set_state(state)
        return Generated(generator)
    return Encrypted(Keystream.at(state))


def _add(sums: list[Tensor], std: float, stream: Normals, drawn: Sequence[Tensor] | None = None) -> None:
    """Add noise to flat tensors of one kind: what was ``drawn`` ahead, else fresh numbers in the same order."""
    small, large = [s for s in sums if s.numel() < _FEW], [s for s in sums if s.numel() >= _FEW]
    if small:  # together: for few numbers a call takes as long as for thousands
        sizes = [s.numel() for s in small]
        noise = stream.fill(small[0].new_empty(sum(sizes))) if drawn is None else drawn[0]
        torch._foreach_add_(small, torch.split_with_sizes(noise, sizes), alpha=std)
    for k, s in enumerate(large, 1):
        if drawn is not None:
            s.add_(drawn[k], alpha=std)
            continue
        # On a CPU in pieces that stay in its cache: a fresh buffer of the parameters' size costs as much again.
        size = PIECE if s.device.type == "cpu" else len(s)
        noise = s.new_empty(min(size, len(s)))
        for piece in s.split(size):
            piece.add_(stream.fill(noise[: len(piece)]), alpha=std)


class Ahead:
    """Standard normal numbers that a thread of its own draws meanwhile, the same as would be drawn later.

    Attributes:
        sizes: of the float32 tensors that they are for.
        before: the stream's state before they are drawn.
    """

    def __init__(self, stream: Normals, sizes: list[int]) -> None:
        self.stream, self.sizes, self.before = stream, sizes, stream.state()
        together = sum(size for size in sizes if size < _FEW)
        self._drawn = [torch.empty(size) for size in (together, *(size for size in sizes if size >= _FEW))]
        self._error: BaseException | None = None
        self._done = threading.Event()
        _thread.start_new_thread(self._draw, ())  # threading.Thread waits until it runs: a tenth of a millisecond

    def _draw(self) -> None:
        try:
            for flat in self._drawn:
                self.stream.fill(flat)
        except BaseException as error:  # it is raised where the noise is asked for
            self._error = error
        finally:
            self._done.set()

    def take(self) -> list[Tensor]:
        """The numbers, first those of all small tensors together; they are the caller's."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._drawn


_FEW = 1 << 13
_MANY = 1 << 17  # fewer numbers are drawn faster than a thread begins
_PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_of(secure: SecureNoise | None, given: torch.Generator | None, draws: torch.Generator | None) -> Source:
    """The engine's noise.

    Args:
        secure: the cryptographic source, where secure_mode was asked for.
        given: the user's generator for the noise.
        draws: the user's generator for the draw of records.

    Raises:
        ConfigurationError: secure mode together with a seed, or one stream for noise and draw.
    """
    if given is not None and not isinstance(given, torch.Generator):
        raise ConfigurationError(
            f"noise_generator is a {type(given).__name__}",
            why="the noise would not be drawn from it.",
            cure="pass a torch.Generator, or leave it out.",
        )
    if secure is None:
        plain = NoiseSource(given)
        plain.refuse_shared(draws)
        return plain
    if given is not None or draws is not None:
        name = "noise_generator" if given is not None else "a data loader with a generator of its own"
        raise ConfigurationError(
            f"secure_mode=True together with {name}",
            why="whoever knows the seed could repeat the noise or the draw, and secure mode says that nobody can.",
            cure="leave the generator out, or use secure_mode=False for a run that repeats.",
        )
    return secure
