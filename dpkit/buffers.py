"""A model's memory while it runs aside: kept, put back, and refused where it takes in what the records are.

A buffer that is part of the ``state_dict`` is released with the model. Running statistics, codebooks or counters that
the forward updates from the batch would be released without clipping and without noise, whatever the weights do. Other
memory (buffers that are not saved, tensors that are plain attributes) may hold what it likes, but no later batch may
follow from it.
"""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModuleError
from .trees import leaves


class Buffers:
    """The buffers of a model as they are now; and its modules' plain attributes: numbers (a counter of steps),
    generators of random numbers, tensors and containers of them."""

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[str, dict[str, Tensor | None], str, bool]] = []
        self._kept: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
        self._numbers: list[tuple[str, dict[str, Any], str, Any]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._attributes = [
            (path, vars(m), {k: _Kept(v) for k, v in vars(m).items() if k not in _MODULES and _holds(v)})
            for path, m in model.named_modules()
            if not type(m).__module__.startswith("torch.")
        ]
        for path, module in model.named_modules():
            for name, b in module._buffers.items():
                released = name not in module._non_persistent_buffers_set
                self._places.append((_joined(path, name), module._buffers, name, released))
                if b is not None:
                    self._kept.append((module._buffers, name, b, b.detach().clone()))
            for name, v in vars(module).items():
                if type(v) in (int, float, bool) and name != "training":
                    self._numbers.append((_joined(path, name), vars(module), name, v))
                elif isinstance(v, torch.Generator | random.Random) or _numpys(v):
                    self._generators.append((v, _state(v)))

    def put_back(self, *, but: Collection[str] = ()) -> None:
        """Every buffer and attribute, but these, is the object that it was, with the value that it had."""
        left = {(id(home), name) for path, home, name, _ in self._places if path in but}
        with torch.no_grad():
            for home, name, b, value in self._kept:
                if (id(home), name) not in left:
                    home[name] = b
                    if not _equal(b, value):
                        b.copy_(value)
            for path, own, kept in self._attributes:
                for name in [k for k, v in own.items() if k not in _MODULES and _holds(v)]:
                    if _joined(path, name) not in but and name not in kept and any(map(_is_memory, _inside(own[name]))):
                        del own[name]
                for name, one in kept.items():
                    if _joined(path, name) not in but:
                        own[name] = one.put_back()
        for path, attributes, name, number in self._numbers:
            if path not in but:
                attributes[name] = number
        for generator, state in self._generators:
            _restore(generator, state)

    def generators(self) -> list[Any]:
        """The states of the modules' own generators."""
        return [_state(generator) for generator, _ in self._generators]

    @property
    def drawn(self) -> bool:
        """Whether a module has drawn from a generator of its own."""
        return self.generators_moved([state for _, state in self._generators])

    def generators_moved(self, states: list[Any]) -> bool:
        """Whether they are in other states than these."""
        return not all(map(_same, self.generators(), states))

    def released(self) -> dict[str, Tensor]:
        """Copies of what the buffers that are released hold now, by their names."""
        found = ((path, home.get(name)) for path, home, name, released in self._places if released)
        return {path: b.detach().clone() for path, b in found if b is not None}

    def others(self) -> dict[str, Any]:
        """What else is remembered, as `released`: buffers that are not, tensors and numbers that are attributes."""
        found: dict[str, Any] = {path: own.get(name) for path, own, name, _ in self._numbers}
        for path, home, name, released in self._places:
            if not released:
                found[path] = [home.get(name)]
        for path, own, _ in self._attributes:
            found |= {_joined(path, k): _inside(v) for k, v in own.items() if k not in _MODULES and _holds(v)}
        return {k: [_copied(x) for x in v] if isinstance(v, list) else v for k, v in found.items()}

    def reached(self, taint: Any, *, released: bool = True) -> set[str]:
        """The names of those (that are released, or not) which ``taint`` says hold what is computed from the batch."""
        found = {path for path, home, name, r in self._places if r == released and taint.has(home.get(name))}
        for path, own, _ in self._attributes if not released else ():
            held = {k: v for k, v in own.items() if k not in _MODULES and _holds(v)}
            found |= {_joined(path, k) for k, v in held.items() if taint.has(_inside(v))}
        return found


class _Kept:
    """An attribute's value as it is now."""

    def __init__(self, value: Any) -> None:
        self.value = value
        held = [v for v in _inside(value) if _is_memory(v) and v.numel() <= _LARGE]
        self._tensors = [(v, v._version, v.detach().clone()) for v in held]
        self._items = None if value is None or isinstance(value, Tensor) else value.copy()

    def put_back(self) -> Any:
        for v, version, before in self._tensors:
            if v._version != version:
                v.detach().copy_(before)
        if self._items is not None:
            self.value.clear()
            (self.value.update if isinstance(self.value, dict) else self.value.extend)(self._items)
        return self.value


def _holds(v: Any) -> bool:
    """Whether a forward may keep tensors there."""
    return v is None or type(v) in (list, dict, OrderedDict, defaultdict, deque) or _is_memory(v)


def _inside(v: Any) -> list[Any]:
    return leaves(list(v) if isinstance(v, deque) else v)


def _is_memory(v: Any) -> bool:
    return isinstance(v, Tensor) and not isinstance(v, nn.Parameter) and not v.is_inference()


_MODULES = vars(nn.Module()).keys()
"""What torch itself keeps in a module."""
_LARGE = 1 << 26
"""Tensors of more numbers are not copied: what is written into them stays there."""


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _numpys(v: Any) -> bool:
    """Whether it is a numpy.random.Generator."""
    return type(v).__module__.startswith("numpy.random") and hasattr(v, "bit_generator")


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return pickle.dumps(generator.bit_generator.state if _numpys(generator) else generator.getstate())


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif _numpys(generator):
        generator.bit_generator.state = pickle.loads(state)
    else:
        generator.setstate(pickle.loads(state))


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The names of the buffers that differ."""
    both = one.keys() & other.keys()
    return (one.keys() ^ other.keys()) | {path for path in both if not _equal(one[path], other[path])}


def refuse_written(paths: set[str]) -> None:
    """Raise if there are buffers that take in what the records are."""
    if paths:
        raise UnsupportedModuleError(
            f"the forward writes what the records are into the buffer {', '.join(sorted(paths))}",
            why="it is part of the state_dict and is released with the model, without clipping or noise.",
            cure="stop the update (eval mode, if it stops then), keep the statistic out of the model, or take it from "
            "public data.",
        )


def refuse_remembered(paths: set[str]) -> None:
    """Raise for what carries what the records are into the next batch, where outputs follow from it."""
    raise UnsupportedModuleError(
        f"the forward writes what the records are into {', '.join(sorted(paths))}, and uses it in the next batch",
        why="a record would act in steps that it was not drawn for, through the other records' gradients.",
        cure="stop the update, or take the statistic from public data; clear at the beginning of the forward what is "
        "for one batch alone.",
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or (type(one) is type(other) and type(one) in (int, float, bool, str) and one == other)


def _copied(v: Any) -> Any:
    """A leaf as it is now; what is no tensor and no number says nothing."""
    if _is_memory(v) and v.numel() <= _LARGE:
        return v.detach().clone()
    return v if type(v) in (int, float, bool, str) else None
