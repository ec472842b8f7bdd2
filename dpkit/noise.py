"""Gaussian noise: drawn in float32 or wider, from a generator of its own. `dpkit.secure` has the cryptographic one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ConfigurationError
from .seeds import unforeseeable


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

    def state_dict(self) -> dict[str, Any]:
        """The generators' states. Whoever reads them can tell the noise, past and future: keep them as the data."""
        states = {str(device): g.get_state() for device, g in self._own.items()}
        given = None if self._given is None else self._given.get_state()
        return {"kind": "plain", "given": given, "generators": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ConfigurationError: the state is of another kind of noise, or only one of the two was seeded by hand.
        """
        if state.get("kind") != "plain" or (state["given"] is None) != (self._given is None):
            raise ConfigurationError(
                "the stored noise state is of another kind than this engine's noise",
                why="the run could not go on as it began, and its statement would be wrong about one of its parts.",
                cure="resume with the secure_mode and noise_generator that the run was started with.",
            )
        if self._given is not None:
            self._given.set_state(state["given"])
        self._own = {}
        for name, held in state["generators"].items():
            device = torch.device(name)
            self._own[device] = torch.Generator(device)
            self._own[device].set_state(held)

    def add_to(self, sums: Sequence[Tensor], std: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class NoiseSource:
    """Independent standard normal tensors.

    Args:
        generator: the user's generator, for runs that repeat exactly; by default one for each device, seeded from the
            operating system. It is never torch's global one, whose seed experiments publish.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._given = generator
        self._own: dict[torch.device, torch.Generator] = {}

    secure = False

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
            "Noise is drawn in floating point from torch's generator, in a state drawn from the operating system; it is "
            "not cryptographic (secure_mode=True is)."
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
        """The generators' states. Whoever reads them can tell the noise, past and future: keep them as the data."""
        states = {str(device): g.get_state() for device, g in self._own.items()}
        given = None if self._given is None else self._given.get_state()
        return {"kind": "plain", "given": given, "generators": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ConfigurationError: the state is of another kind of noise, or only one of the two was seeded by hand.
        """
        if state.get("kind") != "plain" or (state["given"] is None) != (self._given is None):
            raise ConfigurationError(
                "the stored noise state is of another kind than this engine's noise",
                why="the run could not go on as it began, and its statement would be wrong about one of its parts.",
                cure="resume with the secure_mode and noise_generator that the run was started with.",
            )
        if self._given is not None:
            self._given.set_state(state["given"])
        self._own = {}
        for name, held in state["generators"].items():
            device = torch.device(name)
            self._own[device] = torch.Generator(device)
            self._own[device].set_state(held)

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
