"""Gaussian noise: drawn in float32 or wider, from a generator of its own. `dpkit.secure` has the cryptographic one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ConfigurationError
from .keystream import Keystream, available
from .lots import LOT, Lots, size_for
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
        self._ahead: Normals | None = None  # what lots are of; it begins when the CPU's own stream does
        self._lots: Lots | None = None
        self._prepared = False

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
            else:
                self._own[device] = _fresh(device)
                if device.type == "cpu":
                    self._ahead = _fresh(device, _TOGETHER)
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
            "own": {str(device): stream.state() for device, stream in self._own.items()},
            "lots": self._drawn_ahead(),
        }

    def _drawn_ahead(self) -> dict[str, Any] | None:
        if self._ahead is None:
            return None
        return {"before": self._ahead.state(), "size": 0, "used": 0} if self._lots is None else self._lots.state()

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
        held = state["lots"]
        ahead = None if held is None else _resumed("cpu", held["before"], _TOGETHER)
        lots = Lots.at(ahead, held) if ahead is not None and held["size"] else None
        if self._given is not None:
            self._given.set_state(state["given"])
        self._own, self._ahead, self._lots = own, ahead, lots  # a batch that is in hand stays prepared for

    def reseed(self) -> None:
        """Go on with fresh streams: what was drawn before and may have been released is never drawn again."""
        if self._given is not None:
            scramble(self._given)
        self._own, self._ahead, self._lots, self._prepared = {}, None, None, False

    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Begin to draw the next noise for these parameters, beside the user's forward and backward.

        Only what nobody has a hand in: not from the user's generator, and not for other devices.
        """
        count = sum(p.numel() for p in parameters)
        size = size_for(count) if _plain(parameters) and not self.seeded else None
        self._prepared = size is not None
        if size is None:
            return
        if self._lots is None:
            self.stream(torch.device("cpu"))
            assert self._ahead is not None
            self._lots = Lots(self._ahead, size)
        elif not count <= self._lots.size <= max(size, LOT):
            self._lots = self._lots.sized(size)
        self._lots.prepare()

    def add_to(self, sums: Sequence[Tensor], std: float) -> None:
        """Add independent N(0, std²) to every entry of flat float32 or float64 tensors, in place."""
        if std == 0.0 or not sums:
            return
        prepared, self._prepared = self._prepared, False
        sizes = [s.numel() for s in sums]
        if prepared and self._lots is not None and sum(sizes) <= self._lots.size and _plain(sums):
            noise = self._lots.take(sum(sizes)).split_with_sizes(sizes)
            torch._foreach_add_([s.view(-1) for s in sums], noise, alpha=std)
            return
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for s in sums:
            kinds.setdefault((s.device, s.dtype), []).append(s if s.ndim == 1 else s.view(-1))
        for (device, _), flat in kinds.items():
            _add(flat, std, self.stream(device))


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are float32 on a CPU."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def _fresh(device: torch.device, together: int = 1) -> Normals:
    """A stream that nobody knows."""
    if device.type == "cpu" and available():
        return Encrypted(Keystream(), together)
    return Generated(unforeseeable(device))


def _resumed(device: str, state: Any, together: int = 1) -> Normals:
    """The stream that goes on from a state."""
    if isinstance(state, Tensor):
        generator = torch.Generator(device)
        generator.set_state(state)
        return Generated(generator)
    return Encrypted(Keystream.at(state), together)


def _add(sums: list[Tensor], std: float, stream: Normals) -> None:
    """Add fresh numbers to flat tensors of one kind."""
    small, large = [s for s in sums if s.numel() < _FEW], [s for s in sums if s.numel() >= _FEW]
    if small:  # together: for few numbers a call takes as long as for thousands
        sizes = [s.numel() for s in small]
        noise = stream.fill(small[0].new_empty(sum(sizes)))
        torch._foreach_add_(small, torch.split_with_sizes(noise, sizes), alpha=std)
    for s in large:
        # On a CPU in pieces that stay in its cache: a fresh buffer of the parameters' size costs as much again.
        size = PIECE if s.device.type == "cpu" else len(s)
        noise = s.new_empty(min(size, len(s)))
        for piece in s.split(size):
            piece.add_(stream.fill(noise[: len(piece)]), alpha=std)


_FEW = 1 << 13
_TOGETHER = LOT // PIECE


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
