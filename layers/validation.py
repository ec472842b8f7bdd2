"""What of a model stands in the way of private training: one `Problem` each, with its cure.

All modules are looked at, frozen ones and those without parameters too: what a module keeps of the records, or does to
a record by what the others are, does not depend on whether its weights train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way.

    Attributes:
        path: the module's path in the model.
        seen: what it is, with its path.
        why: why the guarantee would not hold.
        cure: what to do about it.
    """

    path: str
    seen: str
    why: str
    cure: str

    def __str__(self) -> str:
        return f"{self.seen}\n  Why: {self.why}\n  Cure: {self.cure}"


def validate(model: nn.Module) -> list[Problem]:
    """All problems of ``model`` as it is now (train flags count); none: an empty list.

    A model without problems may still be refused later, for what only a run can show: records that depend on each
    other through the model's own arithmetic.

    >>> [problem.path for problem in validate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))]
    ['1']
    >>> validate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    []
    """
    return [p for path, m in model.named_modules() for p in problems(m, path or type(m).__name__)]


def problems(module: nn.Module, path: str, training: bool | None = None) -> Iterator[Problem]:
    """The problems of one module by itself; ``training``: as if its train flag were so."""
    training = module.training if training is None else training
    named = f"{path} ({type(module).__name__})"
    if isinstance(module, _BatchNorm) and (training or not module.track_running_stats):
        yield Problem(
            path,
            f"{named} normalises by statistics of the batch"
            + (" and keeps running ones" if module.track_running_stats else ""),
            "every record's output then depends on the other records, and the running statistics are released without "
            "noise; freezing its weights or affine=False does not change that.",
            'replace it by nn.GroupNorm: dpkit.layers.convert(model, batch_norm="group"); or, if its statistics come '
            'from public data, keep them fixed: batch_norm="frozen", or eval mode after every model.train().',
        )
    if isinstance(module, _InstanceNorm) and module.track_running_stats and training:
        yield Problem(
            path,
            f"{named} normalises by statistics of the batch's records and keeps running ones",
            "the running statistics are released without noise.",
            "build it with track_running_stats=False, or put it in eval mode (after every model.train()) so that it "
            "uses statistics from elsewhere.",
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield from _table(module, path, named)
    lazy = [name for name, p in module.named_parameters(recurse=False) if is_lazy(p)]
    if lazy:
        yield Problem(
            path,
            f"{named} has no shape yet ({', '.join(lazy)})",
            "it takes its shape, and draws its weights, when it meets the first batch.",
            "run the model once on made-up input of the records' shape before make_private.",
        )


def _table(module: nn.Embedding | nn.EmbeddingBag, path: str, named: str) -> Iterator[Problem]:
    if module.max_norm is not None:
        yield Problem(
            path,
            f"{named} has max_norm={module.max_norm}",
            "the forward pass rescales the rows that the batch's records name, frozen or not: an update without noise.",
            "build it with max_norm=None.",
        )
    weight: Tensor = module.weight
    if module.scale_grad_by_freq and weight.requires_grad:
        yield Problem(
            path,
            f"{named} has scale_grad_by_freq=True",
            "each record's gradient is divided by a count over the whole batch, so records are coupled.",
            "build it with scale_grad_by_freq=False.",
        )
