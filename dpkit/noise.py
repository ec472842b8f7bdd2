"""Gaussian noise: drawn in float32 or wider, from a generator of its own. `dpkit.secure` has the cryptographic one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ConfigurationError
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

    def add_to(self, sums: Sequence[Tensor], std: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def reseed(self) -> None: ...


class NoiseSource:
    """Independent standard normal tensors.

    Args:
        generator: the user's generator, for runs that repeat exactly; by default one for each device, seeded from the
            operating system. It is never torch's global one, whose seed experiments publish.
    """

    secure = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._given = generator
        self._own: dict[torch.device, torch.Generator] = {}

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
        return (
            "Noise is drawn in floating point from torch's generator, in a state drawn from the operating system. That "
            "is not a cryptographic generator (secure_mode=True has one)."
        )

    def generator(self, device: torch.device) -> torch.Generator:
        if self._given is not None and self._given.device.type == device.type:
            return self._given
        if device not in self._own:
            if self._given is None:
                self._own[device] = unforeseeable(device)
            else:  # the user's seed, carried over to another device
                seed = int(torch.randint(1 << 62, (), generator=self._given, device=self._given.device))
                self._own[device] = torch.Generator(device).manual_seed(seed)
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
            "own": {str(device): generator.get_state() for device, generator in self._own.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the streams that `state_dict` gave.

        Raises:
            ConfigurationError: they are of secure noise, or only one of the two runs was seeded by hand.
        """
        if state["kind"] != "plain" or (state["given"] is None) == self.seeded:
            raise ConfigurationError(
                "the stored state is of another kind of noise than this engine's",
                why="the run would not go on as it began, and its statement would be untrue of one of its parts.",
                cure="resume with the secure_mode and noise_generator that the run was started with.",
            )
        if self._given is not None:
            self._given.set_state(state["given"])
        self._own = {}
        for name, held in state["own"].items():
            self._own[torch.device(name)] = torch.Generator(name)
            self._own[torch.device(name)].set_state(held)

    def reseed(self) -> None:
        """Go on with fresh streams: what was drawn before and may have been released is never drawn again."""
        if self._given is not None:
            scramble(self._given)
        self._own = {}

    def add_to(self, sums: Sequence[Tensor], std: float) -> None:
        """Add independent N(0, std²) to every entry of flat float32 or float64 tensors, in place."""
        if std == 0.0:
            return
        for s in sums:
            generator, flat = self.generator(s.device), s.view(-1)
            # On a CPU in pieces that stay in its cache: a fresh buffer of the parameters' size costs as much again.
            size = _PIECE if s.device.type == "cpu" else flat.numel()
            noise = torch.empty(min(size, flat.numel()), device=s.device, dtype=s.dtype)
            for piece in flat.split(size):
                piece.add_(noise[: len(piece)].normal_(generator=generator), alpha=std)


_PIECE = 1 << 16


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
