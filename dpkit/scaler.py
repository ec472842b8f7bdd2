"""fp16 training: the factor by which a GradScaler multiplies the loss is undone before clipping, and held constant.

A GradScaler lowers its factor, and skips the step, when a gradient overflows. Under privacy it may not: whether a
record's gradient overflowed would be told without noise, and the factor would carry it into every later step, where it
decides which other records overflow. So the release is always taken; a record that overflows is left out of it, as
any record that is not finite is (and counted in ``engine.nonfinite_records``); and the factor stays what it is. Where
too many overflow, start with a smaller one (``torch.amp.GradScaler(init_scale=...)``).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .errors import ConfigurationError

_NEVER = 2**31 - 1


class LossScale:
    """The factor of the user's GradScaler.

    Args:
        scaler: it is asked for its factor, and its growth interval is set so that it never grows; `release` puts that
            back.

    Raises:
        ConfigurationError: not a GradScaler.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        if not isinstance(scaler, torch.amp.GradScaler):
            raise ConfigurationError(
                f"grad_scaler is a {type(scaler).__name__}",
                why="it is asked for the factor that has to be undone before clipping.",
                cure="pass the torch.amp.GradScaler that scales the loss.",
            )
        self._scaler = scaler
        self._interval = scaler.get_growth_interval() if scaler.is_enabled() else 0

    def current(self) -> float:
        """The factor of the losses that are back-propagated from now on; it does not grow any more.

        Raises:
            ConfigurationError: it is zero or not finite.
        """
        if self._scaler.is_enabled() and self._scaler.get_growth_interval() != _NEVER:
            self._scaler.set_growth_interval(_NEVER)
        value = float(self._scaler.get_scale())
        if not (math.isfinite(value) and value > 0.0):
            raise ConfigurationError(
                f"the GradScaler's factor is {value}",
                why="it cannot be undone before clipping.",
                cure="make a new one: torch.amp.GradScaler(init_scale=2.0**10), say.",
            )
        return value

    def release(self) -> None:
        """Let the factor grow again as it did before."""
        if self._scaler.is_enabled():
            self._scaler.set_growth_interval(self._interval)


def placeholders(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The smallest parameter of each device: zeros in their ``grad`` are what the scaler inspects, and finds finite."""
    smallest: dict[torch.device, nn.Parameter] = {}
    for p in sorted(parameters, key=lambda p: p.numel()):
        smallest.setdefault(p.device, p)
    return list(smallest.values())
