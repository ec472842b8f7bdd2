"""A tensor that stands in for a parameter wherever it is used without a rule.

Class tokens, position tables, layer scales, relative-position biases, norms and routers of a user's own: their
parameters meet the data in arbitrary expressions. During the forward a `StandIn` takes the parameter's place. It looks
like the parameter and carries n copies of it; an operation among stand-ins runs on all copies at once (``vmap``), and
one that meets the batch pairs copy i with record i, as if the model ran on single records. From there on the result is
an ordinary tensor, autograd does the rest, and the gradient of copy i is the gradient of record i. Nothing is run
twice, so dropout is the same draw.

Which dimension of a tensor carries the records is never guessed from a shape that happens to equal n: the probe
(`dpkit.probe`) has measured it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_METADATA = frozenset(
    "size dim ndimension numel nelement stride storage_offset is_contiguous is_floating_point is_complex get_device "
    "element_size __len__ is_pinned is_shared is_inference is_signed is_same_size has_names data_ptr untyped_storage "
    "is_floating_point is_complex is_tensor item tolist __bool__ __float__ __int__ __index__ __repr__ __format__ "
    "__hash__ numpy __contains__ __deepcopy__ __reduce_ex__ equal allclose".split()
)
_COMPUTED_ATTRIBUTES = frozenset(["T", "mT", "H", "mH", "real", "imag"])
_CONSTANTS = frozenset(["detach", "data"])


class Router(Protocol):
    """What decides how an operation on stand-ins runs (the probe or the live forward)."""

    def operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class StandIn(Tensor):
    """A parameter's logical value, and n copies of it, one for each record.

    Attributes:
        origin: the parameter it came from.
        record: the dimension of the logical value that carries records, or None. Such a stand-in is data already.
        copies: [n, *logical shape], with size 1 at ``record``; None while probing.
    """

    origin: nn.Parameter
    record: int | None
    copies: Tensor | None
    router: Router
    root: bool

    @staticmethod
    def of(
        value: Tensor,
        origin: nn.Parameter,
        router: Router,
        *,
        copies: Tensor | None = None,
        record: int | None = None,
        root: bool = False,
    ) -> StandIn:
        self: StandIn = torch.Tensor._make_subclass(StandIn, value.detach())
        self.origin, self.router, self.copies, self.record, self.root = origin, router, copies, record, root
        return self

    @property
    def value(self) -> Tensor:
        """The logical value as a plain tensor without gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).detach()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _COMPUTED_ATTRIBUTES and name not in _CONSTANTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        if name in _CONSTANTS:
            return args[0].value
        if name in _METADATA:
            plain = [a.value if isinstance(a, StandIn) else a for a in args]
            return func(*plain, **kwargs)
        owner = next(s for s in _standins(args, kwargs))
        return owner.router.operate(func, args, kwargs)


def _standins(args: Any, kwargs: Any) -> list[StandIn]:
    from .trees import leaves

    return [v for v in leaves((args, kwargs)) if isinstance(v, StandIn)]


def as_data(copies: Tensor, record: int) -> Tensor:
    """[n, ..., 1 at record, ...] (one batch of one for each record) as one batch: [..., n at record, ...]."""
    return copies.squeeze(record + 1).movedim(0, record)


def as_copies(data: Tensor, record: int) -> Tensor:
    """One batch [..., n at record, ...] as n batches of one: [n, ..., 1, ...]."""
    return data.movedim(record, 0).unsqueeze(record + 1)
