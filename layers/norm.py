"""What takes BatchNorm's place: normalisations of one record by itself.

Letters: n record, c channel, G groups.

BatchNorm in train mode computes, over all records and positions of a channel, ``y = (x − mean) / √(var + ε) · weight +
bias``: a record's output depends on the other records, and the running statistics are released with the model. Two
functions of one record alone can take its place, with the same ``weight`` and ``bias`` [c]:

- `group_norm`: mean and variance over the positions and the c / G channels of a group *of one record* (Wu and He,
  "Group Normalization", 2018). Another function: the model has to be trained or tuned with it.
- `FrozenBatchNorm`: the running mean and variance as constants: BatchNorm's function in eval mode, whatever the mode.
  For models whose statistics come from public data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def groups_for(channels: int, at_most: int = 32) -> int:
    """The largest G ≤ ``at_most`` that divides the channels and leaves at least two of them in a group.

    Two, because a group of one channel without positions ([n, c] inputs) would always give 0.

    >>> [groups_for(c) for c in (1, 3, 16, 64, 96, 100)]
    [1, 1, 8, 32, 32, 25]
    """
    if at_most < 1:
        raise ValueError(f"at least one group, not {at_most}")
    return max(g for g in range(1, min(at_most, max(channels // 2, 1)) + 1) if channels % g == 0)


def group_norm(norm: _BatchNorm, groups: int = 32) -> nn.GroupNorm:
    """A ``nn.GroupNorm`` with the BatchNorm's own ``weight`` and ``bias`` (the same objects), ε, and train flag.

    Args:
        norm: any BatchNorm whose channels are known.
        groups: the most groups; see `groups_for`.
    """
    new = nn.GroupNorm(groups_for(norm.num_features, groups), norm.num_features, norm.eps, affine=False)
    new.affine, new.weight, new.bias = norm.affine, norm.weight, norm.bias
    return new.train(norm.training)


class FrozenBatchNorm(nn.Module):
    """BatchNorm by constant statistics: what ``nn.BatchNorm1d``, ``2d``, ``3d`` compute in eval mode, in either mode.

    Same ``state_dict`` keys. ``weight`` and ``bias`` may be trained; the statistics never change. They are part of the
    model: let them come from public data.

    Args:
        num_features, eps, affine: as BatchNorm's.

    >>> norm = nn.BatchNorm2d(3).eval()
    >>> frozen = FrozenBatchNorm(3)
    >>> _ = frozen.load_state_dict(norm.state_dict())
    >>> x = torch.randn(2, 3, 4, 4)
    >>> bool(torch.allclose(frozen(x), norm(x)))
    True
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(ones) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(ones)) if affine else None)
        self.register_buffer("running_mean", torch.zeros_like(ones))
        self.register_buffer("running_var", ones.clone())
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    @staticmethod
    def of(norm: _BatchNorm) -> FrozenBatchNorm:
        """A frozen one with the BatchNorm's own parameters and statistics (the same objects), ε, and train flag.

        Raises:
            ValueError: it keeps no statistics.
        """
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            raise ValueError("a BatchNorm without running statistics has nothing to be frozen at; use group_norm")
        new = FrozenBatchNorm(norm.num_features, norm.eps, affine=False)
        new.affine, new.weight, new.bias = norm.affine, norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        return new.train(norm.training)

    def normalised(self, x: Tensor) -> Tensor:
        """(x − mean) / √(var + ε): [n, c, ...]."""
        shape = (-1, *[1] * (x.dim() - 2))
        scale = (self.running_var + self.eps).rsqrt()
        return (x - self.running_mean.view(shape)) * scale.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, ...] to the same shape."""
        y = self.normalised(x)
        if self.weight is not None and self.bias is not None:
            shape = (-1, *[1] * (x.dim() - 2))
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"
