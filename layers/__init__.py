"""DP-compatible layers: torch only. Imported as ``dpkit.layers``."""
