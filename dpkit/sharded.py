"""Parameters that torch's ``fully_shard`` (FSDP2) has dealt out: each rank holds some rows of every one.

Each rank's forward and backward see whole parameters, a group of layers at a time, and its own records. So norms are
exact where they are computed; what is different is the sum: each parameter's is scattered over the ranks as soon as it
is there, and every rank adds the noise of its own rows, from a generator of its own.

Torch gathers parameters by hooks of its own, in which all ranks have to take part in the same order. The examination of
a model runs it a number of times that depends on the batch; meanwhile the whole model is gathered on every rank, and
torch's hooks are put aside.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ConfigurationError, UncoveredParameterError
from .ranks import Ranks
from .state import Part
from .trees import tree_map

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Shards:
    """A model after ``fully_shard(model)``.

    Attributes:
        modules: those that were sharded each by itself, the whole model first.

    Raises:
        ConfigurationError: parameters that are dealt out in another way.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.root = ranks, model
        self._owned: dict[tuple[nn.Module, str], Any] = {
            (m, name): p
            for m in model.modules()
            for name, p in m._parameters.items()
            if p is not None and holds_rows(p)
        }
        for path, p in model.named_parameters():
            self._check(path, p)
        if not _is_sharded(model):
            _refuse("parts of the model are sharded, the model itself is not", "call fully_shard(model) last, too.")
        self.modules: list[FSDPModule] = [m for m in self.root.modules() if _is_sharded(m)]
        self._origins: dict[Any, nn.Parameter] = {}  # of the gathered parameters

    def _check(self, path: str, p: nn.Parameter) -> None:
        if not holds_rows(p):
            if p.requires_grad:
                _refuse(f"{path} is whole on every rank and others are sharded", "leave no parameter out.")
            return
        mesh, placements = p.device_mesh, p.placements
        if mesh.ndim != 1 or mesh.size() != self.ranks.size:
            _refuse(
                f"{path} is sharded over a mesh of shape {list(mesh.shape)}, and there are {self.ranks.size} processes",
                "shard over all of them in one dimension: fully_shard(model).",
            )
        if len(placements) != 1 or not (placements[0].is_shard(0)):
            _refuse(f"{path} is placed by {placements}", "shard by rows (Shard(0)), as fully_shard does by itself.")
        if mesh.get_local_rank() != self.ranks.rank:
            _refuse(f"{path} is sharded in another order than that of the ranks", "use the default mesh.")

    def __contains__(self, module: object) -> bool:
        return _is_sharded(module)

    def origin(self, parameter: Any) -> Any:
        """The sharded parameter that a gathered one is of; what is neither comes back."""
        return self._origins.get(parameter, parameter)

    @contextlib.contextmanager
    def whole(self, needed: bool) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
        """Every rank's model whole, and torch's hooks put aside, if any rank needs it; all ranks have to ask.

        Gives the gathered parameter of each sharded one; nothing, if nobody needs it.
        """
        if not self.ranks.any(needed):
            yield {}
            return
        for sharded in self.modules:
            sharded.unshard()
        now: dict[nn.Parameter, nn.Parameter] = {}
        for (m, name), p in self._owned.items():
            gathered = m._parameters[name]
            assert gathered is not None
            now[p] = gathered
            self._origins[gathered] = p
        kept = [self._aside(sharded) for sharded in self.modules]
        try:
            yield now
        finally:
            for hooks in kept:
                for held, entries in hooks:
                    held.clear()
                    held.update(entries)
            for sharded in self.modules[1:]:  # the whole model's own are needed by the call that goes on
                sharded.reshard()

    def dealt_out(self) -> None:
        """Let go of what is gathered: it is old after the step (a forward without backward leaves the outermost's)."""
        for sharded in self.modules:
            sharded.reshard()

    @staticmethod
    def _aside(module: Any) -> list[tuple[dict[int, Any], dict[int, Any]]]:
        state = module._get_fsdp_state()
        hooks = [(held, dict(held)) for held in (module._forward_pre_hooks, module._forward_hooks)]
        for held, entries in hooks:
            own = [k for k, hook in entries.items() if getattr(hook, "__self__", None) is state]
            if not own:
                _refuse("several modules were sharded together, fully_shard([a, b])", "shard them one by one.")
            for k in own:
                del held[k]
        return hooks

    def refuse_repeated(self, modules: set[nn.Module]) -> None:
        """Raise if a module that runs on one record at a time has sharded ones inside: ranks would part."""
        for m in modules:
            if any(_is_sharded(inner) for inner in m.modules() if inner is not m):
                raise UncoveredParameterError(
                    f"{type(m).__name__} runs on one record at a time, and has modules in it that are sharded",
                    why="ranks with different numbers of records would gather parameters differently often, and wait "
                    "for each other for ever.",
                    cure="call fully_shard on that module and not on those in it, or register a rule for it.",
                )

    # ---- sums

    def scattered(self, p: nn.Parameter, total: Tensor | None) -> Tensor:
        """This rank's rows [numel] of the sum of all ranks' totals [numel of the whole]; None is zero."""
        rows, n = p.shape[0], self.ranks.size
        width, each = p.numel() // max(rows, 1), -(-rows // n)
        wide = torch.promote_types(p.dtype, torch.float32) if total is None else total.dtype
        padded = torch.zeros(n * each * width, dtype=wide, device=p.device)
        if total is not None:
            padded[: total.numel()] = total
        mine = padded.new_empty(each * width)
        self.ranks.scatter(mine, padded)
        return mine[: self.local(p).numel()]

    @staticmethod
    def local(p: Tensor) -> Tensor:
        """This rank's rows of a parameter."""
        assert holds_rows(p)
        return p.to_local()

    def as_gradient(self, p: Tensor, rows: Tensor) -> Tensor:
        """This rank's rows, flat, as the gradient of the sharded parameter."""
        assert holds_rows(p)
        return self._dealt(rows.view(p.to_local().shape).to(p.dtype), p)

    # ---- state

    def model(self) -> Part:
        """The model's state, whole on every rank's CPU: any number of ranks can go on from it. All have to ask."""

        def load(state: dict[str, Any]) -> None:
            here = self.root.state_dict()
            self.root.load_state_dict({k: self._rows(v, here.get(k)) for k, v in state.items()})

        return Part(lambda: self._whole(self.root.state_dict()), load)

    def optimizer(self, optimizer: Optimizer) -> Part:
        """The same of an optimizer on the model's parameters."""

        def load(state: dict[str, Any]) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            own = {
                k: {name: self._rows(v, parameters[k]) for name, v in held.items()}
                for k, held in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": own})

        return Part(lambda: self._whole(optimizer.state_dict()), load)

    @staticmethod
    def _whole(state: dict[str, Any]) -> dict[str, Any]:
        gathered: dict[str, Any] = tree_map(lambda v: whole(v).cpu() if holds_rows(v) else v, state)
        return gathered

    def _rows(self, value: Any, like: Tensor | None) -> Any:
        """This rank's rows of a whole tensor, where ``like`` holds the rows of such a one; anything else as it is."""
        if not holds_rows(like) or not isinstance(value, Tensor) or value.shape != like.shape:
            return value
        mine = like.to_local()
        first = min(self.ranks.rank * -(-len(value) // self.ranks.size), len(value))
        return self._dealt(value[first : first + len(mine)].to(mine.device), like)

    @staticmethod
    def _dealt(rows: Tensor, like: DTensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        made: Tensor = DTensor.from_local(
            rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return made


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor that is dealt out, for which all ranks have to ask; any other as it is."""
    return tensor.full_tensor() if holds_rows(tensor) else tensor


def holds_rows(parameter: object) -> TypeGuard[DTensor]:
    """Whether that is some rows of a parameter, not gathered now."""
    found = sys.modules.get("torch.distributed.tensor")  # takes long to import; where nobody has, there are none
    kind = getattr(found, "DTensor", None)
    return kind is not None and isinstance(parameter, kind)


def _is_sharded(module: object) -> TypeGuard[FSDPModule]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def shards_of(model: nn.Module, ranks: Ranks) -> Shards | None:
    """How the model is dealt out over the ranks; None if every rank has the whole of it."""
    return Shards(model, ranks) if any(holds_rows(p) for p in model.parameters()) else None


def _refuse(seen: str, cure: str) -> NoReturn:
    raise ConfigurationError(
        seen,
        why="which rows of the sum, and of the noise, are whose has to be known.",
        cure=f"{cure} Tensor and pipeline parallelism are not supported.",
    )
