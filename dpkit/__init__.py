"""dpkit: differentially private PyTorch training in two lines.

The public names load on first use, so that ``import dpkit.accountants`` never loads torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the two leaf packages stand beside this one; in an installed wheel they lie inside it.
_here = Path(__file__).resolve().parent
if not (_here / "accountants").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from .clipping import AutomaticClipping, Clipping, FlatClipping, PerLayerClipping
    from .engine import PrivacyEngine
    from .errors import (
        ConfigurationError,
        CoupledRecordsError,
        DoubleUseError,
        FoldedBatchError,
        GradientMismatchError,
        NonPrivateGradientError,
        NotAttachedError,
        PrivacyError,
        SamplingError,
        UncoveredParameterError,
        UnfinishedStepError,
        UnsupportedModuleError,
    )
    from .forms import Dense, Outer, Rows
    from .rules import register_rule, unregister_rule

_HOMES: dict[str, str] = {
    "PrivacyEngine": "engine",
    **dict.fromkeys(("AutomaticClipping", "Clipping", "FlatClipping", "PerLayerClipping"), "clipping"),
    **dict.fromkeys(
        (
            "ConfigurationError",
            "CoupledRecordsError",
            "DoubleUseError",
            "FoldedBatchError",
            "GradientMismatchError",
            "NonPrivateGradientError",
            "NotAttachedError",
            "PrivacyError",
            "SamplingError",
            "UncoveredParameterError",
            "UnfinishedStepError",
            "UnsupportedModuleError",
        ),
        "errors",
    ),
    **dict.fromkeys(("Dense", "Outer", "Rows"), "forms"),
    **dict.fromkeys(("register_rule", "unregister_rule"), "rules"),
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"dpkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dpkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
