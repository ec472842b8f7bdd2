"""Gaussian noise: drawn in float32 or wider, from a generator of its own."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError


class NoiseSource:
    """Independent standard normal tensors.

    Args:
        generator: the user's generator, for runs that repeat exactly; by default one for each device, seeded from the
            operating system. It is never torch's global one, whose seed experiments publish.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self._given = generator
        self._own: dict[torch.device, torch.Generator] = {}

    @property
    def seeded(self) -> bool:
        """Whether the noise repeats with a seed that somebody chose."""
        return self._given is not None

    def generator(self, device: torch.device) -> torch.Generator:
        if self._given is not None and self._given.device.type == device.type:
            return self._given
        if device not in self._own:
            made = torch.Generator(device)
            seed = secrets.randbits(63)
            if self._given is not None:  # the user's seed, carried over to another device
                seed = int(torch.randint(1 << 62, (), generator=self._given, device=self._given.device))
            self._own[device] = made.manual_seed(seed)
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
            "seeded": self.seeded,
            "given": None if self._given is None else self._given.get_state(),
            "own": {str(device): generator.get_state() for device, generator in self._own.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the streams that `state_dict` gave."""
        if self._given is not None and state["given"] is not None:
            self._given.set_state(state["given"])
        self._own = {}
        for name, held in state["own"].items():
            self._own[torch.device(name)] = torch.Generator(name)
            self._own[torch.device(name)].set_state(held)

    def reseed(self) -> None:
        """Go on with fresh streams: what was drawn before and may have been released is never drawn again."""
        if self._given is not None:
            self._given.manual_seed(secrets.randbits(63))
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
