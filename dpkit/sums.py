"""The clipped sum of one logical batch: what is released, before noise. Its sensitivity travels with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .clipping import Clipping, Learning, learns, noises_of, refuse_excess
from .forms import Form
from .sharded import Shards
from .units import Units


class ClippedSum:
    """Σ over units (records) of weight · gradient, gathered over the physical batches of one logical batch.

    Guarantee: adding or removing one unit moves all totals together by at most ``sensitivity``.

    Args:
        clipping: how a record's weight follows from its norms.
        noise_multiplier, max_grad_norm: σ and C of this logical batch, fixed when its first part was handed out.
        expected_batch_size: B, by which a clipping that learns C judges its count.
        shards: where parameters are sharded, the totals are this rank's rows of what all ranks' batches add up to.
    """

    def __init__(
        self,
        clipping: Clipping,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        shards: Shards | None = None,
    ) -> None:
        self.clipping, self.noise_multiplier, self.max_grad_norm = clipping, noise_multiplier, max_grad_norm
        self.expected_batch_size = expected_batch_size
        self._observed: Tensor | None = None  # [m], of the records so far
        self._learning: Learning | None = clipping if learns(clipping) else None
        self._shards = shards
        self._totals: dict[nn.Parameter, Tensor] = {}

    @property
    def sensitivity(self) -> float:
        return self.clipping.sensitivity(self.max_grad_norm)

    @property
    def std(self) -> float:
        """The standard deviation of the noise that is due."""
        return noises_of(self.clipping, self.noise_multiplier, self.expected_batch_size)[0] * self.sensitivity

    @property
    def observed_std(self) -> float:
        """The standard deviation of the noise that is due to what is observed beside the sum."""
        return noises_of(self.clipping, self.noise_multiplier, self.expected_batch_size)[1]

    def add(self, forms: dict[nn.Parameter, Form], columns: dict[nn.Parameter, int], units: Units, scale: float) -> int:
        """Clip the units (records) of one physical batch and add them up.

        Args:
            forms: the gradients of the batch's rows, per parameter; emptied on the way.
            columns: every trainable parameter's column in the norms [u, k].
            units: whose the rows are.
            scale: what the loss was divided by: a row's gradient is ``scale`` times its form.

        Returns:
            How many units were left out because their gradient is not finite.
        """
        norms = _columns([units.sq_norm(forms[p]) if p in forms else None for p in columns]).sqrt_().mul_(scale)
        left_out = 0
        if not math.isfinite(float(norms.sum())):
            finite = torch.isfinite(norms).all(1)
            left_out, keep = int((~finite).sum()), finite.nonzero().flatten()
            units, rows = units.take(keep)
            forms, norms = {p: f.take(rows) for p, f in forms.items()}, norms[keep]
        if self._learning is not None:
            self._observe(self._learning, norms)
        weights = self.clipping.weights(norms, self.max_grad_norm)
        if not type(self.clipping).__module__.startswith("dpkit."):
            refuse_excess(weights, norms, self.sensitivity)
        weights = weights * scale
        shared = units.spread(weights) if weights.ndim == 1 else None
        for p in list(forms) if self._shards is None else columns:
            total = None
            if p in forms:
                form = forms.pop(p)  # let go as soon as it is summed up
                w = units.spread(weights[:, columns[p]]) if shared is None else shared
                total = form.weighted_sum(w.to(p.device))
                del form
            self._add(p, total)
        return left_out

    def add_nothing(self, columns: dict[nn.Parameter, int]) -> None:
        """This rank has nothing to add in this physical batch; where parameters are sharded, others may."""
        if self._shards is not None:
            for p in columns:
                self._add(p, None)

    def _add(self, p: nn.Parameter, total: Tensor | None) -> None:
        mine = total if self._shards is None else self._shards.scattered(p, total)
        assert mine is not None
        held = self._totals.get(p)
        self._totals[p] = mine if held is None else held.add_(mine)

    def _observe(self, learning: Learning, norms: Tensor) -> Tensor:
        """Add what a clipping that learns observes of some records; returns what it has observed of all [m]."""
        answers = learning.observed(norms, self.max_grad_norm)
        seen = (answers if answers.ndim == 2 else answers[:, None]).sum(0, dtype=torch.float64).cpu()
        self._observed = seen if self._observed is None else self._observed + seen
        return self._observed

    def take_observed(self) -> list[Tensor]:
        """What a clipping that learns has observed [m] (float64); nothing for the others."""
        return [self._observe(self._learning, torch.zeros(0, 1))] if self._learning is not None else []

    def learned(self, observed: Tensor) -> float:
        """C of the next logical batch, from what was observed, with its noise."""
        assert self._learning is not None
        return self._learning.learned(self.max_grad_norm, observed, self.expected_batch_size)

    def take(self, parameters: dict[nn.Parameter, int]) -> list[Tensor]:
        """The totals [numel], float32 or wider, zero where a parameter had no gradient; they are the caller's now."""
        totals, self._totals = self._totals, {}
        like = {p: p if self._shards is None else self._shards.local(p) for p in parameters}
        return [
            totals[p] if p in totals else torch.zeros(mine.numel(), device=mine.device, dtype=_wide(mine))
            for p, mine in like.items()
        ]

    def state_dict(self, names: dict[nn.Parameter, str]) -> dict[str, Any]:
        """σ, C, what was observed, and the totals by parameter name."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "observed": self._observed,
            "totals": {names[p]: total.clone() for p, total in self._totals.items()},
        }

    def load_state_dict(self, state: dict[str, Any], parameters: dict[str, nn.Parameter]) -> None:
        """What `state_dict` gave, for a model whose parameters have the same names."""
        self.noise_multiplier, self.max_grad_norm = state["noise_multiplier"], state["max_grad_norm"]
        self._observed = state["observed"]
        self._totals = {
            parameters[name]: total.to(parameters[name].device, copy=True) for name, total in state["totals"].items()
        }


def _columns(found: list[Tensor | None]) -> Tensor:
    """[n, k] from k columns [n], None for zeros; where the first is, in the widest of their dtypes."""
    known = [s for s in found if s is not None]
    like, kinds = known[0], {(s.dtype, s.device) for s in known}
    if len(known) == len(found) and len(kinds) == 1:
        return torch.stack(known, 1)
    wide, nothing = max((s.dtype for s in known), key=lambda d: torch.finfo(d).bits), torch.zeros_like(like)
    return torch.stack([(nothing if s is None else s).to(like.device, wide) for s in found], 1)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)
