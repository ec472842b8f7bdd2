"""The choice among the ways to a layer's norms and sums: by a cost model or by timing, within a bound on memory.

Which way is fastest depends on shapes, processor and libraries by factors of ten, so it is measured where the model is
not sure: once for each kind of form, when it is first met, and remembered for the run. All ways are exact; they differ
in rounding alone. In the first batch no way is taken that keeps more than the form itself; from then on memory is spent
where it saves most time, as long as the estimated peak of a step stays within `ROOM` times what the ordinary forward
keeps for its backward.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import choice
from .errors import ConfigurationError
from .forms import Form, Way

MODES = ("auto", "measured", "model")
ROOM = 1.25
"""The peak may be estimated at so many times ordinary training's."""
SLACK = 1.05
"""Or, where the ways that keep least exceed that already, at so many times theirs."""
CLEAR = 0.4
"""In "auto", a way whose modelled cost is below this share of every other's is taken without timing."""
HOPELESS = 6.0
"""A way whose modelled cost exceeds the least by this factor is never timed."""
_FIRST = 8
"""Records in the first physical batch, from which the size of the others is found."""
_SURPLUS = 1.2
"""What a step takes beyond the estimate: gradients of activations, scratch."""
_SECONDS = 1e-11
"""What the model takes for the time of a floating-point operation where modelled and measured costs meet."""


@dataclass(slots=True)
class _Arrival:
    """A form of one batch, in the order of the backward; sizes in bytes for one record."""

    parameter: str
    kind: str
    way: str
    n: int
    held: int  # by the layer's input
    kept: Mapping[str, int]
    seconds: Mapping[str, float]
    around: int = 0  # taken for a moment, in ordinary training too: gradients at output and input, a kernel's scratch


@dataclass(frozen=True)
class Line:
    """A parameter's line in `Profile`.

    Attributes:
        parameter: its name in the model.
        form: the kind of its per-sample gradients.
        method: the way taken ("only": there is no other).
        measured: whether it was timed, or taken by the cost model.
        milliseconds: its norms and sum for the last batch, from the timing; None without one.
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
    """What was done for each use of a trainable parameter in the last batch; printed, a table."""

    lines: tuple[Line, ...]

    def __str__(self) -> str:
        rows = [("parameter", "form", "method", "chosen by", "ms", "MiB")]
        for line in self.lines:
            by = "" if line.method == "only" else "timing" if line.measured else "model"
            ms = "" if line.milliseconds is None else f"{line.milliseconds:.3f}"
            rows.append((line.parameter, line.form, line.method, by, ms, f"{line.bytes / 2**20:.2f}"))
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        return "\n".join("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Methods:
    """Chooses for every form the way to its norms and sum.

    Args:
        mode: "model": by the cost model alone; "measured": every way that is not hopeless is timed; "auto": timed where
            the model is not clear.
        names: of the model's parameters.

    Attributes:
        activations: bytes that the ordinary forward keeps for one record, where known.
        left: those of them that are still kept in the backward when a parameter's turn comes, by its name.
    """

    def __init__(self, mode: str = "auto", names: Mapping[Any, str] | None = None) -> None:
        self.mode = choice("method", mode, MODES)
        self.activations = 0.0
        self.left: dict[str, float] = {}
        self._estimate = 0.0  # the peak of a step, bytes a record
        self._names = {} if names is None else names
        self._seconds: dict[str, dict[str, float]] = {}
        self._plan: dict[tuple[str, str], str] = {}
        self._arrivals: list[_Arrival] = []
        self._last: list[_Arrival] = []

    def begin(self) -> None:
        """A batch begins: the last one's forms, if there were new ones, are planned for."""
        self._extend()
        if self._arrivals:
            self._last, self._arrivals = self._arrivals, []

    def _extend(self) -> None:
        if any(len(a.kept) > 1 and (a.parameter, a.kind) not in self._plan for a in self._arrivals):
            self._plan.update(self._planned(self._arrivals))
        ways = [self._plan.get((a.parameter, a.kind), a.way) for a in self._arrivals]
        if ways:
            self._estimate = max(self._estimate, self._peak(self._arrivals, ways))

    def most_records(self, budget: float) -> int:
        """How many records a physical batch may have so that the estimated peak of a step stays within so many bytes;
        few as long as no batch was seen."""
        if not self._estimate:
            return _FIRST
        fixed = 8.0 * sum(p.numel() for p in self._names if p.requires_grad)  # the sum, and the noise or a total
        return max(1, int((budget - fixed) / (_SURPLUS * self._estimate)))

    def settle(self, form: Form, parameter: Tensor) -> Form:
        """The form that goes the chosen way."""
        if not form.n:
            return form
        n, ways, kind, name = form.n, form.ways(), form.kind(), self._names.get(parameter, "")
        if not ways:
            self._arrivals.append(_Arrival(name, kind, "only", n, 0, {"only": form.bytes // n}, {}))
            return form
        kept, around = {k: way.kept for k, way in ways.items()}, form.bytes // n + form.held
        seconds = self._costs(kind, form, ways)
        way = self._plan.get((name, kind), "")
        if way not in ways:
            way = _frugal(kept, seconds)
        self._arrivals.append(_Arrival(name, kind, way, n, form.held, kept, seconds, around))
        return ways[way].take()

    def _costs(self, kind: str, form: Form, ways: dict[str, Way]) -> dict[str, float]:
        """Seconds a record, for each way that may be taken."""
        if kind in self._seconds:
            return self._seconds[kind]
        model = {name: way.cost * _SECONDS for name, way in ways.items()}
        first, second = sorted(model.values())[:2] if len(model) > 1 else (0.0, 1.0)
        if self.mode == "model" or form.n < 2 or (self.mode == "auto" and first < CLEAR * second):
            return model
        self._seconds[kind] = {
            name: _timed(way, form) / form.n for name, way in ways.items() if model[name] <= HOPELESS * first
        }
        if next(iter(ways)) not in self._seconds[kind]:
            self._seconds[kind][next(iter(ways))] = model[next(iter(ways))]
        return self._seconds[kind]

    def _planned(self, arrivals: list[_Arrival]) -> dict[tuple[str, str], str]:
        """A way for each parameter and kind of form: the fastest, while the peak of the step has room."""
        ways = [_frugal(a.kept, a.seconds) if a.seconds else a.way for a in arrivals]
        ordinary = max([self.left.get(a.parameter, 0.0) + a.around for a in arrivals], default=0.0)
        room = ROOM * max(self.activations, sum(a.held for a in arrivals), ordinary)
        room = max(room, SLACK * self._peak(arrivals, ways))
        better = [
            ((a.seconds[ways[k]] - seconds) / (a.kept[way] - a.kept[ways[k]]), k, way)
            for k, a in enumerate(arrivals)
            for way, seconds in a.seconds.items()
            if seconds < a.seconds[ways[k]] and way in a.kept
        ]
        for _, k, way in sorted(better, reverse=True):
            if arrivals[k].seconds[way] < arrivals[k].seconds[ways[k]]:
                before, ways[k] = ways[k], way
                if self._peak(arrivals, ways) > room:
                    ways[k] = before
        return {(a.parameter, a.kind): way for a, way in zip(arrivals, ways, strict=True)}

    def _peak(self, arrivals: list[_Arrival], ways: list[str]) -> float:
        """The most bytes for one record at a time in the backward; activations of which it is not known until when they
        are kept are taken to be let go evenly on the way."""
        inputs = float(sum(a.held for a in arrivals))
        others = max(self.activations - inputs, 0.0)
        shared, kept, done, peak, last = 0, 0.0, 0.0, self.activations, -1.0
        for a, way in zip(arrivals, ways, strict=True):
            done += a.held
            kept += a.kept[way]
            left = self.left.get(a.parameter)
            if left is None:
                rest = 1.0 - done / inputs if inputs else 0.0
                peak = max(peak, others * rest + inputs - done + kept)
                continue
            shared = shared if left == last else 0  # the module's input, among what is left and what is kept
            shared += a.held if a.kept[way] == next(iter(a.kept.values())) else 0
            peak, last = max(peak, left + a.around + kept - shared), left
        return peak

    def profile(self) -> Profile:
        """What was done in the last batch."""
        lines = []
        for a in self._arrivals or self._last:
            measured = a.way in self._seconds.get(a.kind, {})
            milliseconds = 1e3 * a.n * self._seconds[a.kind][a.way] if measured else None
            lines.append(Line(a.parameter, a.kind, a.way, measured, milliseconds, a.n * a.kept[a.way]))
        return Profile(tuple(lines))

    def state_dict(self) -> dict[str, Any]:
        """The choices, so that a resumed run rounds as the first one did."""
        self._extend()
        return {
            "mode": self.mode,
            "activations": self.activations,
            "left": dict(self.left),
            "estimate": self._estimate,
            "seconds": {kind: dict(found) for kind, found in self._seconds.items()},
            "plan": [[parameter, kind, way] for (parameter, kind), way in self._plan.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the choices that `state_dict` gave.

        Raises:
            ConfigurationError: it is not such a state.
        """
        try:
            mode = choice("method", state["mode"], MODES)
            activations, estimate = float(state["activations"]), float(state["estimate"])
            left = {str(name): float(v) for name, v in state["left"].items()}
            seconds = {
                str(k): {str(way): float(v) for way, v in found.items()} for k, found in state["seconds"].items()
            }
            plan = {(str(parameter), str(kind)): str(way) for parameter, kind, way in state["plan"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"the saved choice of methods cannot be read ({error!r})",
                why="without the choices a resumed run would round differently.",
                cure="pass what state_dict() gave.",
            ) from error
        self.mode, self.activations, self._seconds, self._plan = mode, activations, seconds, plan
        self._arrivals, self._last, self._estimate, self.left = [], [], estimate, left


class Kept:
    """Counts the bytes that autograd keeps for a backward, the parameters' own aside, within ``with kept.counting``.

    Attributes:
        bytes: so many so far.
        left: as many after the last call of the module that owns a parameter, where `note` is its hook.
    """

    def __init__(self, parameters: Mapping[Any, str]) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in parameters}
        self._names, self.bytes = parameters, 0
        self.left: dict[str, int] = {}
        self.counting = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def note(self, module: nn.Module, *_: Any) -> None:
        """Hook after a module's forward."""
        self.left.update({self._names[p]: self.bytes for p in module._parameters.values() if p in self._names})

    def _pack(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.layout == torch.strided:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
        return x


def _frugal(kept: Mapping[str, int], seconds: Mapping[str, float]) -> str:
    """The fastest way of those that keep no more than the form itself (the first)."""
    most = next(iter(kept.values()))
    return min((way for way in seconds if kept.get(way, most + 1) <= most), key=lambda way: seconds[way])


def _timed(way: Way, form: Form, repeats: int = 3) -> float:
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


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
