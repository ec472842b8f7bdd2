"""Modules that are run on one record at a time, because inside them the rows no longer tell whose they are.

Mixtures of experts gather tokens by expert, models of images and text loop over records, a user's own module may sort
or pack. What enters such a module and what leaves it still has its records in a measured place. So a private forward
splits the call: the module runs once for each record, on that record's arguments and on that record's own copy of the
parameters, and the results are put together again. It is the definition itself, and holds for any arithmetic; it costs
one call of the module, and one copy of its gradients, a record.

Only modules that the probe could not follow otherwise are run so (`dpkit.examine`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import CoupledRecordsError, UncoveredParameterError
from .records import Records
from .rules import trains
from .standin import StandIn
from .trees import leaves, tree_map

if TYPE_CHECKING:
    from .live import Live
    from .probe import Site


class Apiece:
    """One call of a module, made into n calls.

    Args:
        module, path: the module and its name.
        router: the private forward that it is part of.
        site: where the records are in its arguments and outputs.
        arguments: (args, kwargs) of the call.
    """

    def __init__(self, module: nn.Module, path: str, router: Live, site: Site, arguments: Any) -> None:
        self.module, self.path, self.n, self.site = module, path, router.n, site
        self._arguments = arguments
        self._parts = [self._split(v, k, router) for k, v in enumerate(leaves(arguments))]
        self._slots: list[tuple[dict[str, Any], str, Any]] = []
        for m in module.modules():
            for name, p in m._parameters.items():
                if p is not None:
                    origin = p.origin if isinstance(p, StandIn) else p
                    own = router.apiece(origin) if isinstance(origin, nn.Parameter) and trains(origin) else origin
                    self._slots.append((m._parameters, name, own))

    def entries(self) -> list[tuple[dict[str, Any], str, Any]]:
        """The parameter entries that `put` changes, with what they hold now."""
        return [(entries, name, entries[name]) for entries, name, _ in self._slots]

    def _split(self, v: Any, k: int, router: Live) -> Any:
        """One argument as the n values that the records have of it; anything else stays whole."""
        if isinstance(v, StandIn):
            return router.copies(v).unbind(0)
        if isinstance(v, Tensor):
            r = self.site.arguments[k]
            return r.split(v).unbind(0) if isinstance(r, Records) else v
        rows = self.site.numbers[k] if k < len(self.site.numbers) else None
        return v if rows is None or type(v) is not int else rows

    def put(self, i: int) -> Any:
        """Give the module record i's copies of its parameters; returns record i's (args, kwargs)."""
        for entries, name, own in self._slots:
            entries[name] = own[i] if isinstance(own, tuple) else own
        parts = iter(self._parts)

        def one(_: Any) -> Any:
            v = next(parts)
            return v[i] if isinstance(v, tuple) else v

        return tree_map(one, self._arguments)

    def join(self, outputs: list[Any]) -> Any:
        """The records' outputs as the batch's."""
        found = [leaves(out) for out in outputs]
        if len({len(f) for f in found}) != 1:
            raise UncoveredParameterError(
                f"{self.path} returns something else for each record",
                why="it is run on one record at a time, and its results have to be put together again.",
                cure="return the same number of values whatever the record.",
            )
        numbers = iter(range(len(found[0])))

        def one(v: Any) -> Any:
            k = next(numbers)
            if not isinstance(v, Tensor):
                return v
            values = [f[k] for f in found]
            r = self.site.outputs[k] if k < len(self.site.outputs) else None
            if isinstance(r, Records):
                if len({x.shape for x in values}) != 1:
                    raise UncoveredParameterError(
                        f"{self.path} is run on one record at a time, and its output {k} has another size for each: "
                        f"{sorted({tuple(x.shape) for x in values})}",
                        why="the results have to be put together again.",
                        cure="bring the records to one size (pad them) before they enter the model.",
                    )
                return r.join(torch.stack(values))
            if any(x.requires_grad for x in values) or not all(torch.equal(x, v) for x in values):
                raise CoupledRecordsError(
                    f"output {k} of {self.path} comes from the batch but has no dimension of records",
                    why="it was reduced over the records, so it mixes them.",
                    cure="reduce over the records only in the loss.",
                )
            return v

        return tree_map(one, outputs[0])
