"""DP-compatible layers: torch only. Imported as ``dpkit.layers``.

Drop-ins for torch's layers, with the same constructors, ``state_dict`` keys and results, whose parameters meet the data
in linear maps and table look-ups only.
"""

from .attention import MultiheadAttention, multi_head_attention

__all__ = ["MultiheadAttention", "multi_head_attention"]
