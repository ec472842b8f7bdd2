"""What is refused before any record is touched."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dpkit.layers import problems, validate

from .errors import ConfigurationError, CoupledRecordsError, FoldedBatchError, UnsupportedModuleError
from .trees import leaves


def with_problems_in_training(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that would have a problem in train mode, which a ``model.train()`` may bring at any time."""
    named = [(path or type(m).__name__, m) for path, m in model.named_modules()]
    return [(path, m) for path, m in named if any(problems(m, path, training=True))]


def refuse_problems(modules: list[tuple[str, nn.Module]]) -> None:
    """Raise for the first of the modules that has a problem now; `dpkit.layers.validate` lists them all."""
    for path, m in modules:
        for problem in problems(m, path):
            raise UnsupportedModuleError(problem.seen, why=problem.why, cure=problem.cure)


def refuse_packed(path: str, arguments: Iterable[object]) -> None:
    """Raise if the model itself is called on a packed sequence, in which no dimension is the records'."""
    if any(isinstance(v, PackedSequence) for v in arguments):
        raise FoldedBatchError(
            f"{path} is given a PackedSequence",
            why="it holds as many rows for each record as the record is long; whose they are cannot be measured by "
            "leaving records out.",
            cure="give the model the padded batch and the lengths, and call pack_padded_sequence in its forward.",
        )


def refuse_returned(path: str, arguments: list[Tensor], earlier: Container[int]) -> None:
    """Raise if a model is given what it gave for an earlier batch, detached or not: ``earlier``, its memory."""
    if any(v.layout == torch.strided and v.untyped_storage()._cdata in earlier for v in arguments):
        raise CoupledRecordsError(
            f"{path} is given what a forward on an earlier batch returned (a state that is carried over?)",
            why="a record would act in steps that it was not drawn for, through the other records' gradients.",
            cure="begin every batch with a state of its own (zeros, a parameter); what belongs together is one record.",
        )


def refuse_loose_bags(path: str, entries: Tensor, others: list[Any], reached: Callable[[Any], bool]) -> None:
    """Raise where bags laid end to end come into the model as they are: the batch ``reached`` the offsets, of which a
    record can be left out, and not the entries."""
    if reached(entries) or not reached(others):
        return
    raise FoldedBatchError(
        f"{path} is given offsets, and entries [Σ lengths] that come into the model laid end to end",
        why="there are as many entries for each record as its bag is long; whose they are cannot be measured by "
        "leaving records out.",
        cure="give the model one row for each record, padded [n, t] (padding_idx leaves the padding out), or such rows "
        "and the lengths, and lay them end to end in its forward.",
    )


def validate_model(model: nn.Module) -> None:
    """Raise for the first module that cannot be made private as it is; the error says how many more there are."""
    found = validate(model)
    if found:
        first, others = found[0], [p.path for p in found[1:]]
        more = f" Likewise {', '.join(others)}: dpkit.layers.validate(model) lists them." if others else ""
        raise UnsupportedModuleError(first.seen, why=first.why, cure=first.cure + more)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if a wrapper would reduce or gather gradients that are not clipped yet."""
    for path, m in model.named_modules():
        if type(m).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            named = f"{path} is" if path else "the model is"
            raise ConfigurationError(
                f"{named} wrapped in {type(m).__name__}",
                why="it adds up the ranks' ordinary gradients, before anything is clipped per record.",
                cure="pass the model itself (model.module), and call that: among several processes the engine adds up "
                "their clipped sums. Start them with torchrun, one process a device.",
            )


def refuse_inside_wrapper(path: str) -> None:
    """Raise if the model is called by a DistributedDataParallel that somebody has put around it since."""
    if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise ConfigurationError(
            f"{path} is called by a DistributedDataParallel around it",
            why="it adds up the ranks' ordinary gradients, before anything is clipped per record.",
            cure="call the model itself: among several processes the engine adds up their clipped sums.",
        )


def refuse_bypassed(paths: Mapping[nn.Module, str]) -> None:
    """Raise if a module's ``forward`` is running that was not called through the module."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
        if (
            isinstance(module, nn.Module)
            and module in paths
            and frame.f_code is getattr(type(module).forward, "__code__", None)
        ):
            raise ConfigurationError(
                f"{paths[module]}.forward was called, and not the module itself",
                why="hooks run where the module itself is called: what it does between its layers is not looked at.",
                cure="call the module: model(x) in place of model.forward(x).",
            )
        frame = frame.f_back  # type: ignore[assignment]


def number(name: str, value: object, *, low: float, strict: bool = True, high: float = math.inf) -> float:
    """``value`` as a float within (low, high) or [low, high]; raises `ConfigurationError` else."""
    try:
        x = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        x = math.inf
    if not (math.isfinite(x) and (low < x < high if strict else low <= x <= high)):
        lower, upper = ("(", ")") if strict else ("[", "]")
        raise ConfigurationError(
            f"{name} = {_short(value)}",
            why=f"it has to be a finite number in {lower}{low:g}, {high:g}{upper}.",
            cure=f"pass a valid {name}.",
        )
    return x


def count(name: str, value: object) -> int:
    """``value`` as an int from 1 to 2^31 - 1; raises `ConfigurationError` else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigurationError(
            f"{name} = {_short(value)}", why="it has to be an integer of at least 1.", cure=f"pass a valid {name}."
        )
    return value


def flag(name: str, value: object) -> bool:
    """``value`` if it is True or False; raises `ConfigurationError` else (0 and None would say False by accident)."""
    if not isinstance(value, bool):
        raise ConfigurationError(
            f"{name} = {_short(value)}", why="the guarantee depends on it.", cure="pass True or False."
        )
    return value


def choice(name: str, value: object, known: tuple[str, ...]) -> str:
    """``value`` if it is one of the known names; raises `ConfigurationError` else."""
    if not isinstance(value, str) or value not in known:
        raise ConfigurationError(
            f"{name} = {_short(value)}", why="it is not known.", cure=f"use one of {', '.join(map(repr, known))}."
        )
    return str(value)


def physical_batch_size(size: int | str | None, memory_budget: int | None) -> int | None:
    """The number given as ``max_physical_batch_size``; None without one, and with "auto".

    Raises:
        ConfigurationError: no such size, or a memory budget where the size does not follow from it.
    """
    if memory_budget is not None:
        count("memory_budget", memory_budget)
        if size != "auto":
            raise ConfigurationError(
                f"memory_budget={memory_budget} with max_physical_batch_size={size!r}",
                why="the budget is what the size is found from.",
                cure='give max_physical_batch_size="auto", or leave memory_budget out.',
            )
    if isinstance(size, str):
        choice("max_physical_batch_size", size, ("auto",))
        return None
    return None if size is None else count("max_physical_batch_size", size)


def _short(value: object) -> str:
    """A value as an error can show it."""
    try:
        shown = repr(value)
    except ValueError:  # integers of more than 4,300 digits
        shown = f"an {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def length_of(batch: object) -> int:
    """How many records a batch holds: the length of its first tensor."""
    tensors = [v for v in leaves(batch) if isinstance(v, Tensor) and v.ndim]
    if not tensors:
        raise ConfigurationError(
            f"the batch is a {type(batch).__name__} without tensors",
            why="how many records it holds is not known.",
            cure="pass records=...",
        )
    return len(tensors[0])
