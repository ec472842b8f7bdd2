"""The state of a whole made of parts: collected from all, given back to all or to none."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .errors import CheckpointError, PrivacyError


@runtime_checkable
class Stateful(Protocol):
    """What can be saved: a model, an optimizer, a scheduler, a part of the engine."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Part:
    """A `Stateful` from two functions."""

    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], Any]


def collect(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Every part's state, by name."""
    return {name: part.state_dict() for name, part in parts.items()}


def give_back(parts: Mapping[str, Stateful], state: Mapping[str, Any]) -> None:
    """Load every part's state in order; where one refuses, those before it get back what they had.

    Raises:
        CheckpointError: the parts are others, or one did not understand its state.
    """
    if set(parts) != set(state):
        missing, surplus = sorted(set(parts) - set(state)), sorted(set(state) - set(parts))
        raise CheckpointError(
            f"the saved state has {surplus or 'nothing'} beyond, and lacks {missing or 'nothing'} of, what is here",
            why="what is not loaded starts anew, and the run is another one.",
            cure="save and load with the same objects.",
        )
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    done: list[str] = []
    try:
        for name, part in parts.items():
            done.append(name)
            part.load_state_dict(state[name])
    except BaseException as error:
        for name in done:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                parts[name].load_state_dict(before[name])
        if isinstance(error, PrivacyError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"the saved state of {done[-1]} could not be loaded ({type(error).__name__}: {error})",
            why="it was saved from something else, or by other code. Nothing was loaded.",
            cure="build model, optimizer and data as in the run that was saved.",
        ) from error


def refuse_others(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise unless two configurations are the same."""
    names = [name for name in {**here, **saved} if here.get(name) != saved.get(name)]
    if names:
        told = "; ".join(f"{name} is {here.get(name)!r} here, {saved.get(name)!r} in it" for name in names[:4])
        raise CheckpointError(
            f"the checkpoint is of another run: {told}",
            why="going on would be neither that run nor this one. Nothing was loaded.",
            cure="call make_private as in the run that was saved; noise and clipping bound may be set after loading.",
        )


def plain(value: Any, path: str = "state") -> Any:
    """The same in values that can be read back without running code: tensors, numbers, strings, None, and lists, tuples
    and dicts of them. Numbers and strings of other kinds (numpy's floats, members of an enum) become Python's own.

    Raises:
        CheckpointError: it holds something else.
    """
    if value is None or type(value) in (bool, int, float, str, Tensor):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return "".join(value) if isinstance(value, str) else kind(value)
    if type(value) in (list, tuple):
        items = [plain(item, f"{path}[{k}]") for k, item in enumerate(value)]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) in (dict, OrderedDict, Counter):
        pairs = [(plain(k, f"a key of {path}"), plain(item, f"{path}[{k!r}]")) for k, item in value.items()]
        if all(a is c and b is d for (a, b), (c, d) in zip(pairs, value.items(), strict=True)):
            return value
        made = type(value)(dict(pairs))
        if type(value) is not dict:
            vars(made).update(vars(value))  # a module's state has its version there
        return made
    raise CheckpointError(
        f"{path} is a {type(value).__name__}",
        why="reading it back would run code from the file; checkpoints hold plain values only.",
        cure="save it as tensors, numbers, strings, lists or dicts.",
    )
