"""`convert`: the drop-ins of this package put into a model in place, and BatchNorm replaced where that is asked for.

dpkit's engine takes torch's attention and recurrent layers apart by itself inside a private forward, so for it only
BatchNorm has to be converted. The rest is for other libraries that see a layer's parameters through linear maps only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .attention import MultiheadAttention
from .cells import GRUCell, LSTMCell, RNNCell
from .embedding import EmbeddingBag
from .norm import FrozenBatchNorm, group_norm
from .recurrent import GRU, LSTM, RNN
from .validation import Problem, validate

_DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    kind.__bases__[-1]: kind for kind in (MultiheadAttention, LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell, EmbeddingBag)
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BOOKKEEPING = frozenset(
    """
    __init__ __module__ __doc__ __qualname__ __firstlineno__ __static_attributes__ __annotations__ __annotate__
    __annotate_func__ __annotations_cache__ __constants__ __parameters__ __orig_bases__ extra_repr reset_parameters
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Change:
    """One module that was converted: its path, what it was and what it is now, and why."""

    path: str
    before: str
    after: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} → {self.after} ({self.why})"


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        changed: the modules that were converted, each with the reason.
        left: modules that look like one that is converted and were left alone: (path, reason).
        problems: what `validate` finds in the model now.
    """

    changed: tuple[Change, ...]
    left: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        lines = [f"changed {len(self.changed)}", *(f"  {c}" for c in self.changed)]
        if self.left:
            lines += [f"left alone {len(self.left)}", *(f"  {path}: {why}" for path, why in self.left)]
        lines.append(f"problems left {len(self.problems)}")
        lines += ["  " + str(p).replace("\n", "\n  ") for p in self.problems]
        return "\n".join(lines)

    __repr__ = __str__


def convert(model: nn.Module, *, batch_norm: str | None = None, groups: int = 32) -> Conversion:
    """Put drop-ins into ``model`` in place. Every parameter stays the same object, so that an optimizer made before
    still holds it; ``state_dict`` keys, hooks, train flags and, except for BatchNorm, results stay too.

    ``nn.MultiheadAttention``, ``LSTM``, ``GRU``, ``RNN``, their cells and ``EmbeddingBag`` stay the same objects and
    become of this package's class of the same name, a subclass of their own. A subclass that may compute something else
    is left alone.

    Args:
        batch_norm: None leaves BatchNorm as it is. "group" replaces it by ``nn.GroupNorm`` with its weight and bias:
            another function, see `group_norm`. "frozen" keeps its running statistics as constants: the function it has
            in eval mode, see `FrozenBatchNorm`; they must come from public data.
        groups: the most groups of a GroupNorm; see `groups_for`.

    Returns:
        What was changed and why, what was left, and the problems that remain.

    Raises:
        ValueError: another ``batch_norm``, or the model itself is a BatchNorm, which has no place to be replaced in.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> convert(model, batch_norm="group")
    changed 1
      1: BatchNorm2d → GroupNorm (normalises each record by itself, in 2 groups of 2 channels; weight and bias kept)
    problems left 0
    """
    if batch_norm not in (None, "group", "frozen"):
        raise ValueError(f'batch_norm={batch_norm!r}: use "group", "frozen" or None')
    if batch_norm is not None and isinstance(model, _BatchNorm):
        raise ValueError("the model itself is a BatchNorm: use group_norm(model) or FrozenBatchNorm.of(model)")
    changed: list[Change] = []
    left: list[tuple[str, str]] = []
    replaced: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        name = path or type(module).__name__
        kind = next((k for k in type(module).__mro__ if k in _DROP_INS), None)
        if isinstance(module, tuple(_DROP_INS.values())):
            continue
        if kind is not None:
            if (reason := _differs(module, kind)) is None:
                before, module.__class__ = type(module).__name__, _DROP_INS[kind]
                after = f"dpkit.layers.{_DROP_INS[kind].__name__}"
                changed.append(Change(name, before, after, "the same function by linear maps and look-ups"))
            else:
                left.append((name, reason))
        elif isinstance(module, _BatchNorm) and batch_norm is not None:
            made = _replacement(module, batch_norm, groups)
            if isinstance(made, str):
                left.append((name, made))
                continue
            replaced[module], why = made
            changed.append(Change(name, type(module).__name__, type(made[0]).__name__, why))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    return Conversion(tuple(changed), tuple(left), tuple(validate(model)))


def _differs(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a module may compute something else than its torch class ``kind``; None: it does not."""
    if "forward" in vars(module):
        return "its forward was replaced"
    for cls in type(module).__mro__[: type(module).__mro__.index(kind)]:
        own = sorted(set(vars(cls)) - _BOOKKEEPING)
        if own:
            return f"{cls.__name__} defines {', '.join(own)} of its own"
    return None


def _replacement(norm: _BatchNorm, how: str, groups: int) -> tuple[nn.Module, str] | str:
    """What takes a BatchNorm's place and why, or why nothing does."""
    kind = next((k for k in type(norm).__mro__ if k in _BATCH_NORMS), None)
    if kind is None:
        return f"{type(norm).__name__} is no BatchNorm of torch's"
    if is_lazy(norm.weight) or norm.num_features == 0:
        return "it has no shape yet: run the model once on made-up input"
    if (reason := _differs(norm, kind)) is not None:
        return reason
    if how == "frozen":
        if norm.running_mean is None:
            return "it keeps no running statistics to be frozen at"
        new, why = _hooked(FrozenBatchNorm.of(norm), norm), "its running statistics are constants from now on"
        return new, why
    made = group_norm(norm, groups)
    wide = norm.num_features // made.num_groups
    return _hooked(made, norm), (
        f"normalises each record by itself, in {made.num_groups} groups of {wide} channels; weight and bias kept"
    )


def _hooked(new: nn.Module, old: nn.Module) -> nn.Module:
    """The new module with the old one's hooks."""
    for name, value in vars(old).items():
        if "hook" in name:
            vars(new)[name] = value
    return new
