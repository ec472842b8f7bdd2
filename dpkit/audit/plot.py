"""What an audit found, beside what is claimed. Needs matplotlib (``pip install dpkit[plots]``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpkit.errors import ConfigurationError

from .bounds import LowerBound

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(bounds: Mapping[str, LowerBound], claimed: float | Mapping[str, float], axes: Axes | None = None) -> Axes:
    """Draw each audit's lower bound beside the ε that is claimed; a refuted claim is red.

    Args:
        bounds: lower bounds by the audit's name.
        claimed: ε as claimed; one for all, or one for each name.

    Returns:
        The axes drawn on; new ones unless given.
    """
    if not bounds or not all(isinstance(b, LowerBound) for b in bounds.values()):
        raise ConfigurationError(
            "bounds holds no lower bounds by name", why="there is nothing to draw.", cure="pass {name: LowerBound}."
        )
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(layout="constrained").subplots()
    for k, (name, bound) in enumerate(bounds.items()):
        claim = claimed[name] if isinstance(claimed, Mapping) else claimed
        colour = "tab:red" if bound.refutes(claim) else "tab:green"
        axes.barh(k, bound.epsilon, color=colour)
        axes.plot([claim, claim], [k - 0.45, k + 0.45], color="black", label="claimed ε" if k == 0 else None)
    first = next(iter(bounds.values()))
    described: dict[str, Any] = {"labels": list(bounds)}
    axes.set_yticks(range(len(bounds)), **described)
    axes.set_xlabel(f"ε at δ = {first.delta:g}; bars: lower bound at {first.confidence:.1%} confidence")
    axes.legend()
    return axes
