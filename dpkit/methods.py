"""The choice among the ways to a layer's norms and sums: by a cost model, or by timing them on the data at hand.

Which way is fastest depends on shapes, processor and libraries by factors of ten, so it is measured where the model is
not sure: once for each kind of layer, when it is first met, and remembered for the run. All ways are exact; they differ
in rounding alone. So that a run with a given noise generator repeats bit for bit, it follows the model unless told
otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import choice
from .errors import ConfigurationError
from .forms import Form, Way, affordable

MODES = ("auto", "measured", "model")
CLEAR = 0.4
"""In "auto", a way whose modelled cost is below this share of every other's is taken without timing."""
HOPELESS = 6.0
"""A way whose modelled cost exceeds the least by this factor is never timed."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one kind of form; ``seconds`` per record for each way that was timed."""

    way: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Line:
    """A parameter's line in `Profile`.

    Attributes:
        parameter: its name in the model.
        form: the kind and sizes of its per-sample gradients.
        method: the way taken.
        measured: whether by timing (else by the cost model, or because there is one way only).
        milliseconds: of the way taken, for the last batch's norms and sum, from the timing; None without one.
        bytes: kept for the last batch until the norms were known.
    """

    parameter: str
    form: str
    method: str
    measured: bool
    milliseconds: float | None
    bytes: int


@dataclass(frozen=True)
class Profile:
    """What is done for each trainable parameter; printed, a table."""

    lines: tuple[Line, ...]

    @property
    def bytes(self) -> int:
        """All that is kept for the last batch, if nothing is shared."""
        return sum(line.bytes for line in self.lines)

    def __str__(self) -> str:
        head = ("parameter", "form", "method", "ms", "MiB")
        rows = [
            (
                line.parameter,
                line.form,
                line.method + ("" if line.measured else " (model)" if line.method != "only" else ""),
                "" if line.milliseconds is None else f"{line.milliseconds:.3f}",
                f"{line.bytes / 2**20:.2f}",
            )
            for line in self.lines
        ]
        widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        return "\n".join("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows))


class Methods:
    """Chooses for every form the way to its norms and sum.

    Args:
        mode: "model": the cost model alone; "measured": whatever is within the memory bound is timed; "auto": timed
            where the model is not clear.
    """

    def __init__(self, mode: str = "auto") -> None:
        self.mode = choice("method", mode, MODES)
        self._chosen: dict[str, Choice] = {}
        self._seen: dict[Tensor, tuple[str, str, int, int]] = {}

    def settle(self, form: Form, parameter: Tensor) -> Form:
        """The form that goes the chosen way."""
        ways = affordable(form.ways()) if form.n else {}
        kind = signature(form)
        way = "only"
        if ways:
            way = next(iter(ways)) if len(ways) == 1 else self._choose(kind, form, ways)
            form = ways[way].take()
        self._seen[parameter] = (kind, way, form.n, size_of(form))
        return form

    def _choose(self, kind: str, form: Form, ways: dict[str, Way]) -> str:
        known = self._chosen.get(kind)
        if known is not None and known.way in ways:
            return known.way
        cheapest = min(ways, key=lambda name: ways[name].cost)
        least = ways[cheapest].cost
        others = [way.cost for name, way in ways.items() if name != cheapest]
        if self.mode == "model" or form.n < 2 or (self.mode == "auto" and least < CLEAR * min(others)):
            return cheapest
        candidates = {name: way for name, way in ways.items() if way.cost <= HOPELESS * least}
        seconds = {name: _seconds(way, form) / form.n for name, way in candidates.items()}
        best = min(seconds, key=lambda name: seconds[name])
        self._chosen[kind] = Choice(best, seconds)
        return best

    def profile(self, names: Mapping[Any, str]) -> Profile:
        """What was done for the parameters of the last batches; ``names``: parameters with their names."""
        lines = []
        for p, name in names.items():
            if p not in self._seen:
                continue
            kind, way, n, size = self._seen[p]
            known = self._chosen.get(kind)
            measured = known is not None and known.way == way
            seconds = known.seconds[way] if known is not None and way in known.seconds else None
            lines.append(Line(name, kind, way, measured, None if seconds is None else 1e3 * n * seconds, size))
        return Profile(tuple(lines))

    def state_dict(self) -> dict[str, Any]:
        """The choices, so that a resumed run rounds as the first one did."""
        return {"mode": self.mode, "chosen": {k: {"way": c.way, "seconds": dict(c.seconds)} for k, c in self._chosen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over choices that `state_dict` has saved.

        Raises:
            ConfigurationError: it is not such a state.
        """
        try:
            mode = choice("method", state["mode"], MODES)
            chosen = {k: Choice(str(c["way"]), dict(c["seconds"])) for k, c in state["chosen"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"the state of the method choice lacks {error}",
                why="without the choices a resumed run would round differently.",
                cure="pass what state_dict() gave.",
            ) from error
        self.mode, self._chosen = mode, chosen


def signature(form: Form) -> str:
    """Kind, sizes of one record, dtype and device: what forms share that are made the same way."""
    parts = [type(form).__name__]
    for name, v in vars(form).items():
        if isinstance(v, Tensor):
            parts.append(f"{name}[{'×'.join(map(str, v.shape[1:]))}]")
            dtype, device = v.dtype, v.device.type
        elif isinstance(v, tuple) and all(isinstance(k, int) for k in v) or isinstance(v, int):
            parts.append(f"{name}={v}")
        elif isinstance(v, tuple):  # joined
            return " + ".join(signature(f) for f in v)
    return " ".join([*parts, str(dtype).removeprefix("torch."), device])


def size_of(form: Form) -> int:
    """Bytes that a form keeps."""
    size = 0
    for v in vars(form).values():
        if isinstance(v, Tensor):
            size += v.numel() * v.element_size()
        elif isinstance(v, tuple):
            size += sum(size_of(f) for f in v if isinstance(f, Form))
    return size


def _seconds(way: Way, form: Form, repeats: int = 3) -> float:
    """The least time of several for form, norms and sum."""
    device = next(v.device for v in vars(form).values() if isinstance(v, Tensor))
    weights = torch.ones(form.n, device=device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = _now(device)
        taken = way.take()
        taken.sq_norm()
        taken.weighted_sum(weights)
        del taken
        best = min(best, _now(device) - start)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
