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
from torch.nn.utils import parametrize

from .apart import TAKEN_APART, is_packed, take_apart
from .records import Records
from .trees import leaves

_METADATA = frozenset(
    """
    size dim ndimension numel nelement stride storage_offset is_contiguous is_floating_point is_complex get_device
    element_size __len__ is_pinned is_shared is_inference is_signed is_same_size has_names data_ptr untyped_storage
    is_tensor _is_view is_conj is_neg item tolist __bool__ __float__ __int__ __index__ __repr__ __format__ __hash__
    numpy __contains__ __deepcopy__ __reduce_ex__ equal allclose
    """.split()  # noqa: SIM905
)
_COMPUTED_ATTRIBUTES = frozenset(["T", "mT", "H", "mH", "real", "imag"])
_CONSTANTS = frozenset(["detach", "data"])


def forget_cached() -> None:
    """What stand-ins gave is one forward's, where parametrisations are cached (``parametrize.cached``)."""
    parametrize._cache.clear()


class Router(Protocol):
    """What decides how an operation on stand-ins runs (the probe or the live forward).

    Attributes:
        order: where each record is in the packed sequence that a recurrent module was called with last.
        quiet: above 0 where rows are moved by operations that are known to keep them with their records.
    """

    order: Tensor | None
    quiet: int

    def operate(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def without_order(self) -> None:
        """A recurrent function is given packed data, and no order of the records is known."""


class StandIn(Tensor):
    """A parameter's logical value, and n copies of it, one for each record.

    Attributes:
        origin: the parameter it came from.
        records: where the logical value carries records, or None; if it does, it is data already.
        copies: [n, ...], the value as each record alone has it; None while probing, and before it is first needed.
        root: whether it is the whole parameter itself.
    """

    origin: nn.Parameter
    records: Records | None
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
        records: Records | None = None,
        root: bool = False,
    ) -> StandIn:
        self: StandIn = torch.Tensor._make_subclass(StandIn, value.detach())
        self.origin, self.router, self.copies, self.records, self.root = origin, router, copies, records, root
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
        router = next(v for v in leaves((args, kwargs)) if isinstance(v, StandIn)).router
        if func in TAKEN_APART:
            if router.order is None and is_packed(func, args):
                router.without_order()
            router.quiet += 1
            try:
                return take_apart(func, args, kwargs, router.order)
            finally:
                router.quiet -= 1
        return router.operate(func, args, kwargs)
