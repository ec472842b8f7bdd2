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
    from .clipping import (
        AdaptiveClipping,
        AutomaticClipping,
        Clipping,
        FlatClipping,
        HistogramClipping,
        NormHistogram,
        PerLayerClipping,
    )
    from .correlated import BandedNoise, BufferedNoise
    from .engine import PrivacyEngine
    from .errors import (
        BudgetExhaustedError,
        CheckpointError,
        ConfigurationError,
        CoupledRecordsError,
        DoubleUseError,
        FoldedBatchError,
        GradientMismatchError,
        LedgerError,
        NonPrivateGradientError,
        NotAttachedError,
        PrivacyError,
        RanksError,
        ReplayError,
        SamplingError,
        UncoveredParameterError,
        UnfinishedStepError,
        UnsupportedModuleError,
    )
    from .facts import statement_of
    from .forms import Dense, Outer, Routed, Rows
    from .interop import load_opacus_checkpoint, opacus_state_dict
    from .rules import register_rule, unregister_rule
    from .statement import Statement

_HOMES = {
    "clipping": [
        "AdaptiveClipping",
        "AutomaticClipping",
        "Clipping",
        "FlatClipping",
        "HistogramClipping",
        "NormHistogram",
        "PerLayerClipping",
    ],
    "correlated": ["BandedNoise", "BufferedNoise"],
    "engine": ["PrivacyEngine"],
    "errors": [
        "BudgetExhaustedError",
        "CheckpointError",
        "ConfigurationError",
        "CoupledRecordsError",
        "DoubleUseError",
        "FoldedBatchError",
        "GradientMismatchError",
        "LedgerError",
        "NonPrivateGradientError",
        "NotAttachedError",
        "PrivacyError",
        "RanksError",
        "ReplayError",
        "SamplingError",
        "UncoveredParameterError",
        "UnfinishedStepError",
        "UnsupportedModuleError",
    ],
    "facts": ["statement_of"],
    "forms": ["Dense", "Outer", "Routed", "Rows"],
    "interop": ["load_opacus_checkpoint", "opacus_state_dict"],
    "rules": ["register_rule", "unregister_rule"],
    "statement": ["Statement"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "BandedNoise",
    "BudgetExhaustedError",
    "BufferedNoise",
    "CheckpointError",
    "Clipping",
    "ConfigurationError",
    "CoupledRecordsError",
    "Dense",
    "DoubleUseError",
    "FlatClipping",
    "FoldedBatchError",
    "GradientMismatchError",
    "HistogramClipping",
    "LedgerError",
    "NonPrivateGradientError",
    "NormHistogram",
    "NotAttachedError",
    "Outer",
    "PerLayerClipping",
    "PrivacyEngine",
    "PrivacyError",
    "RanksError",
    "ReplayError",
    "Routed",
    "Rows",
    "SamplingError",
    "Statement",
    "UncoveredParameterError",
    "UnfinishedStepError",
    "UnsupportedModuleError",
    "__version__",
    "load_opacus_checkpoint",
    "opacus_state_dict",
    "register_rule",
    "statement_of",
    "unregister_rule",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"dpkit.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'dpkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
