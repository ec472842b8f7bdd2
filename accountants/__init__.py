"""Privacy accountants: numpy and scipy only. Imported as ``dpkit.accountants``."""
