"""Gaussian noise: drawn in float32 or wider, in bulk, from a generator of its own."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor


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

    def add_to(self, sums: Sequence[Tensor], std: float) -> None:
        """Add independent N(0, std²) to every entry of flat float32 or float64 tensors, in place."""
        if std == 0.0:
            return
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for s in sums:
            kinds.setdefault((s.device, s.dtype), []).append(s)
        for (device, dtype), same in kinds.items():
            size = sum(s.numel() for s in same)
            noise = torch.randn(size, generator=self.generator(device), device=device, dtype=dtype)
            parts = noise.split([s.numel() for s in same])
            torch._foreach_add_([s.view(-1) for s in same], list(parts), alpha=std)
