"""What an integration is told of privacy: the arguments of `make_private` that are not the training loop's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from dpkit.engine import PrivacyEngine
from dpkit.errors import ConfigurationError

_OF_THE_LOOP = {"self", "module", "optimizer", "data_loader", "epochs", "steps"}
"""What the surrounding loop knows."""
_FIXED = {"loss_reduction", "grad_scaler", "batch_first"}
"""What the integration sees to."""


def options_of(privacy: Mapping[str, Any], *, also_fixed: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The options, if they are ones of `make_private` and name the δ that ε is reported at.

    Raises:
        ConfigurationError: an unknown name, one that the loop itself determines, or no ``target_delta``.
    """
    known = set(inspect.signature(PrivacyEngine.make_private).parameters) - _OF_THE_LOOP - _FIXED - also_fixed
    if not isinstance(privacy, Mapping) or not set(privacy) <= known:
        surplus = sorted(set(privacy) - known) if isinstance(privacy, Mapping) else type(privacy).__name__
        raise ConfigurationError(
            f"privacy has {surplus}",
            why="it is not an argument of make_private, or the training loop that dpkit joins determines it.",
            cure=f"pass some of {', '.join(sorted(known))}.",
        )
    if privacy.get("target_delta") is None:
        raise ConfigurationError(
            "privacy names no target_delta",
            why="ε, which is reported during the training, is a function of δ.",
            cure='pass target_delta, well below 1 / (number of records): privacy={"target_delta": 1e-5, ...}.',
        )
    return dict(privacy)
