"""Composite operations of torch that are taken apart when they meet a `StandIn`, and the functions that do so.

``nn.MultiheadAttention``, ``nn.LSTM`` and the like hand all their parameters to one function of torch. Run on n copies
of each parameter it would cost n times the memory. `dpkit.layers` has the same functions in terms of linear maps and
table look-ups, whose per-sample gradients are cheap (`Outer`, `Rows`). The user's module stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from dpkit.layers import multi_head_attention

TAKEN_APART: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: multi_head_attention}
