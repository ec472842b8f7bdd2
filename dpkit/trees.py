"""Tensors inside nested containers: mappings, sequences, named tuples and dataclasses, of the user's own kinds too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``fn`` applied to every leaf (tensors, numbers, strings, objects of unknown kinds)."""
    if isinstance(tree, Mapping):
        changed = {k: tree_map(fn, v) for k, v in tree.items()}
        if type(tree) is dict:
            return changed
        if dataclasses.is_dataclass(tree) or not hasattr(tree, "copy"):  # transformers' ModelOutput
            return type(tree)(**changed) if dataclasses.is_dataclass(tree) else type(tree)(changed)  # type: ignore[call-arg]
        other = tree.copy()
        other.update(changed)
        return other
    if isinstance(tree, torch.Size):
        return tuple(fn(v) for v in tree)
    if isinstance(tree, tuple):
        items = [tree_map(fn, v) for v in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [tree_map(fn, v) for v in tree]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: tree_map(fn, getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **fields)
    return fn(tree)


_PLAIN = (Tensor, int, float, str, type(None))
"""What is surely no container; asked first, since that is quick."""


def leaves(tree: Any) -> list[Any]:
    """All leaves of ``tree``, in a fixed order."""
    found: list[Any] = []
    _collect((tree,), found)
    return found


def _collect(values: Iterable[Any], found: list[Any]) -> None:
    for v in values:
        if isinstance(v, _PLAIN):
            found.append(v)
        elif isinstance(v, list | tuple):
            _collect(v, found)
        elif isinstance(v, Mapping):
            _collect(v.values(), found)
        elif dataclasses.is_dataclass(v) and not isinstance(v, type):
            _collect((getattr(v, f.name) for f in dataclasses.fields(v) if f.init), found)
        else:
            found.append(v)


def holders(tree: Any) -> list[dict[str, Any]]:
    """The attributes of every object of an unknown kind in ``tree`` (a distribution, say), and of those that they hold
    in turn."""
    waiting, known = leaves(tree), set()
    found: list[dict[str, Any]] = []
    for v in waiting:
        if not isinstance(v, _NO_HOLDER) and hasattr(v, "__dict__") and id(v) not in known and len(found) < _MOST:
            known.add(id(v))
            found.append(vars(v))
            waiting += leaves(list(vars(v).values()))
    return found


_NO_HOLDER = (*_PLAIN, torch.nn.Module, type, FunctionType, MethodType, ModuleType)
_MOST = 256


def within(tree: Any) -> list[Any]:
    """All leaves of ``tree``, and then those that its `holders` hold."""
    return leaves([tree, *(list(attributes.values()) for attributes in holders(tree))])


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two calls must share for one plan to serve both: names, kinds and ranks of what they are given; and what
    flags, modes and small numbers are, since they may choose another function."""
    found: list[Any] = []
    for v in args:
        found.append(flag(v))
        _describe(v, found)
    for name, v in kwargs.items():
        found += [name, flag(v)]
        _describe(v, found)
    return tuple(found)


def flag(v: Any, among: int = 16) -> Any:
    """What may choose another function: a bool, a short name, a number below ``among``; of others whether it is 0."""
    kind = type(v)
    if kind is bool:
        return v
    if kind is str:
        return v if len(v) <= 32 else None
    if kind is int and 0 <= v < among:
        return v
    return v == 0 if kind in (int, float) else None


def _describe(v: Any, found: list[Any]) -> None:
    if isinstance(v, Tensor):
        found.append((type(v).__name__, v.ndim))
    elif isinstance(v, list | tuple):
        for one in v:
            _describe(one, found)
    elif isinstance(v, Mapping):
        for name, one in v.items():
            found.append(name)
            _describe(one, found)
    elif dataclasses.is_dataclass(v) and not isinstance(v, type):
        for f in dataclasses.fields(v):
            if f.init:
                _describe(getattr(v, f.name), found)
    else:
        found.append(v if isinstance(v, bool) else type(v).__name__)


def row_bytes(x: Tensor) -> list[bytes]:
    """What each row of ``x`` [n, ...] is, as something to look up."""
    rows = (x.flatten(1) if x.ndim > 1 else x[:, None]).detach().cpu().contiguous().view(torch.uint8)
    return [row.tobytes() for row in rows.numpy()]
