"""What is refused before any record is touched."""

from __future__ import annotations

import math
from numbers import Real

from torch import nn

from .errors import ConfigurationError, UnsupportedModuleError
from .rules import refuse_unsound


def batch_statistics(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that may normalise by statistics of the batch."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return [
        (path or type(m).__name__, m)
        for path, m in model.named_modules()
        if isinstance(m, kinds) and (isinstance(m, nn.modules.batchnorm._BatchNorm) or m.track_running_stats)
    ]


def refuse_batch_statistics(found: list[tuple[str, nn.Module]]) -> None:
    """Raise if one of them would use or update batch statistics now, trainable or not, affine or not."""
    for path, m in found:
        if m.training or (isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.track_running_stats):
            raise UnsupportedModuleError(
                f"{path} ({type(m).__name__}) normalises by statistics of the batch"
                + (" and keeps running ones" if m.track_running_stats else ""),
                why="every record's output then depends on the other records, and the running statistics are released "
                "without noise; freezing its weights or affine=False does not change that.",
                cure="replace it by nn.GroupNorm, or put it in eval mode (after every model.train()) so that it uses "
                "statistics from elsewhere.",
            )


def validate_model(model: nn.Module) -> None:
    """Raise for the first module that cannot be made private as it is."""
    refuse_batch_statistics(batch_statistics(model))
    for path, m in model.named_modules():
        if any(p.requires_grad for p in m.parameters(recurse=False)):
            refuse_unsound(m, path or type(m).__name__)


def number(name: str, value: object, *, low: float, strict: bool = True, high: float = math.inf) -> float:
    """``value`` as a float within (low, high) or [low, high]; raises `ConfigurationError` else."""
    ok = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    ok = ok and (low < float(value) < high if strict else low <= float(value) <= high)  # type: ignore[arg-type]
    if not ok:
        lower, upper = ("(", ")") if strict else ("[", "]")
        raise ConfigurationError(
            f"{name} = {value!r}",
            why=f"it has to be a finite number in {lower}{low:g}, {high:g}{upper}.",
            cure=f"pass a valid {name}.",
        )
    return float(value)  # type: ignore[arg-type]


def count(name: str, value: object) -> int:
    """``value`` as an int >= 1; raises `ConfigurationError` else."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(
            f"{name} = {value!r}", why="it has to be an integer of at least 1.", cure=f"pass a valid {name}."
        )
    return value


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    """``value`` if it is one of the known names; raises `ConfigurationError` else."""
    if value not in known:
        raise ConfigurationError(
            f"{name} = {value!r}", why="it is not known.", cure=f"use one of {', '.join(map(repr, known))}."
        )
    return str(value)
