"""Pictures of a private run, each a matplotlib Figure that needs no display. Needs ``pip install 'dpkit[plots]'``.

    from dpkit import plots
    plots.epsilon_over_steps(engine).savefig("epsilon.png")

What may be shown: `epsilon_over_steps` and `tradeoff` tell of the mechanism alone, not of the data. `gradient_norms` of
an engine's ``norm_histogram`` is covered by the run's ε; of single norms it is not, and says NON-PRIVATE. `utility`
shows what it is given: figures that were measured on private data are not covered by anything.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpkit.accountants import Accountant, TradeOff, figures

from .budget import kind_of
from .clipping import NormHistogram
from .errors import ConfigurationError
from .ledger import Ledger
from .statement import Statement, judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = float | tuple[float, float, float]


def epsilon_over_steps(source: Any, delta: float | None = None, *, max_epsilon: float | None = None) -> Figure:
    """ε after each release.

    Args:
        source: an engine, an accountant, a `Statement`, or a ledger (or its path): then one curve for each run.
        delta: by default the statement's own.
        max_epsilon: a budget to draw.

    Raises:
        ConfigurationError: a source of another kind, or no delta.
        AccountingError: nothing was released, or matplotlib is not installed.
    """
    if isinstance(source, Statement):
        delta = source.delta if delta is None else delta
    if delta is None:
        raise ConfigurationError("no delta was given", why="ε is a function of δ.", cure="pass delta=1e-5, say.")
    limit = None if max_epsilon is None else (f"budget, ε = {max_epsilon:g}", max_epsilon)
    if isinstance(source, str | os.PathLike):
        source = Ledger(source, None)
    if isinstance(source, Ledger):
        histories = {
            f"run {name}": [(release.event, 1) for release in run.releases if release.event is not None]
            for name, run in source.runs.items()
        }
        kind, adjacency = "pld", source.adjacency
    else:
        judge = _accountant_of(source)
        histories, kind, adjacency = {"ε": list(judge.ledger)}, kind_of(judge), judge.adjacency
    figure = figures.over_steps(
        histories,
        lambda judge: judge.epsilon(delta),
        f"ε at δ = {delta:g}",
        adjacency=adjacency,
        accountant=kind,
        limit=limit,
    )
    figure.axes[0].set_title("privacy loss, an upper bound", fontsize="medium")
    return figure


def tradeoff(source: Any) -> Figure:
    """What the best test for one unit's presence achieves: its true-positive rate against its false-positive rate.

    Args:
        source: an engine, an accountant, a `Statement` or a `dpkit.accountants.TradeOff`; or several by name.

    Raises:
        ConfigurationError: a source of another kind.
        AccountingError: matplotlib is not installed.
    """
    named = source if isinstance(source, Mapping) else {"this run": source}
    figure = figures.tradeoff({str(name): _curve_of(one) for name, one in named.items()})
    figure.axes[0].set_title("membership test, trade-off (f-DP)", fontsize="medium")
    return figure


def gradient_norms(norms: Any, *, max_grad_norm: float | None = None, private: bool = True) -> Figure:
    """A histogram of gradient norms, with C and the fraction clipped. The title says whether it is covered by ε.

    Args:
        norms: ``engine.norm_histogram``, noisy counts that are covered by the run's ε; or single norms [n], as
            ``engine.norms_of`` gives them.
        max_grad_norm: C, for single norms.
        private: False to draw single norms all the same; the figure is then labelled NON-PRIVATE.

    Raises:
        ConfigurationError: single norms without ``private=False`` or without C, or nothing to draw.
        AccountingError: matplotlib is not installed.
    """
    if isinstance(norms, NormHistogram):
        return _counted(norms)
    if private is not False:
        raise ConfigurationError(
            "norms of single records",
            why="a histogram of them is not covered by ε.",
            cure='pass private=False, and keep the figure to yourself; or train with clipping="histogram" and pass '
            "engine.norm_histogram.",
        )
    values = [float(v) for v in norms]
    if not values or max_grad_norm is None or not max_grad_norm > 0.0:
        raise ConfigurationError(
            f"{len(values)} norms and max_grad_norm = {max_grad_norm!r}",
            why="norms are drawn beside C.",
            cure="pass at least one norm, and the engine's max_grad_norm.",
        )
    positive = [v for v in values if 0.0 < v < math.inf] or [max_grad_norm]
    low, high = math.log2(min(*positive, max_grad_norm) * 0.9), math.log2(max(*positive, max_grad_norm) * 1.1)
    # C is an edge, so that no bin holds clipped records and others
    middle, width = math.log2(max_grad_norm), max((high - low) / 40.0, 1e-3)
    first, last = math.ceil((middle - low) / width), math.ceil((high - middle) / width)
    edges = [2.0 ** (middle + width * k) for k in range(-first, last + 1)]
    figure, axes = figures.blank()
    axes.hist([min(max(v, edges[0]), edges[-1]) for v in values], bins=edges, color="tab:red", alpha=0.6)
    clipped = sum(not v <= max_grad_norm for v in values) / len(values)
    _finish(axes, max_grad_norm, clipped, f"C = {max_grad_norm:.4g}")
    axes.set_xlabel("gradient norm of one record")
    axes.set_ylabel("records")
    axes.set_title("NON-PRIVATE: norms of single records, not covered by ε", fontsize="medium", color="tab:red")
    return figure


def utility(
    points: Mapping[float, Value],
    *,
    metric: str,
    baseline: Value | None = None,
    reference: Mapping[str, float] | None = None,
) -> Figure:
    """What privacy costs: a metric against ε, on a logarithmic axis.

    Args:
        points: by ε, the metric, or (metric, low, high) with an interval.
        metric: its name.
        baseline: the metric without privacy, which is drawn as a level.
        reference: other levels by name, e.g. {"chance": 0.5}.

    Raises:
        ConfigurationError: no points, or an ε that is not positive and finite.
        AccountingError: matplotlib is not installed.
    """
    if not points or not all(0.0 < float(epsilon) < math.inf for epsilon in points):
        raise ConfigurationError(
            f"points at epsilon {sorted(points)}",
            why="they are drawn on a logarithmic axis.",
            cure="pass {epsilon: metric} with positive, finite epsilons; the run without privacy as baseline.",
        )
    figure, axes = figures.blank()
    rising = sorted(points.items())
    parts = [value if isinstance(value, tuple) else (value, value, value) for _, value in rising]
    middle = [m for m, _, _ in parts]
    spread = [[m - low for m, low, _ in parts], [high - m for m, _, high in parts]]
    axes.errorbar([e for e, _ in rising], middle, yerr=spread, marker="o", capsize=3, label="private")
    levels: dict[str, Value] = {**({} if baseline is None else {"no privacy": baseline}), **(reference or {})}
    for k, (name, level) in enumerate(levels.items()):
        at, low, high = level if isinstance(level, tuple) else (level, level, level)
        axes.axhline(at, linestyle="--" if name == "no privacy" else ":", color=f"C{k + 1}", label=name)
        if low < high:
            axes.axhspan(low, high, color=f"C{k + 1}", alpha=0.15)
    axes.set_xscale("log")
    axes.set_xticks([e for e, _ in rising], labels=[f"{e:g}" for e, _ in rising])
    axes.minorticks_off()
    axes.set_xlabel("ε")
    axes.set_ylabel(metric)
    axes.legend()
    return figure


def _counted(histogram: NormHistogram) -> Figure:
    """Noisy counts, by their bins."""
    if not histogram.steps:
        raise ConfigurationError("a histogram of no steps", why="there is nothing to draw.", cure="train first.")
    figure, axes = figures.blank()
    inner = histogram.edges
    edges = [0.5 * inner[0], *inner, 2.0 * inner[-1]]
    colour = "tab:blue" if histogram.private else "tab:red"
    axes.bar(
        edges[:-1],
        histogram.counts,
        width=[b - a for a, b in itertools.pairwise(edges)],
        align="edge",
        color=colour,
        alpha=0.6,
        edgecolor="white",
    )
    centres = [math.sqrt(a * b) for a, b in itertools.pairwise(edges)]
    axes.errorbar(centres, histogram.counts, yerr=histogram.std, fmt="none", ecolor="0.3", capsize=2)
    _finish(axes, 1.0, histogram.fraction_clipped, "C")
    axes.set_xticks(edges[1:-1], labels=[f"{e:g}" for e in inner])
    axes.minorticks_off()
    axes.set_xlabel("gradient norm / C (the outer bins are open)")
    axes.set_ylabel(f"records, over {histogram.steps} steps")
    if histogram.private:
        title = f"private: counts with noise of ±{histogram.std:.3g}, covered by ε"
    else:
        title = "NON-PRIVATE: counts without noise"
    axes.set_title(title, fontsize="medium", color="black" if histogram.private else "tab:red")
    return figure


def _finish(axes: Any, bound: float, clipped: float, name: str) -> None:
    axes.axvline(bound, color="black", linestyle="--", label=f"{name}; {clipped:.1%} clipped")
    axes.set_xscale("log")
    axes.set_axisbelow(True)
    axes.legend()


def _accountant_of(source: Any) -> Accountant:
    if isinstance(source, Statement):
        return judged(source.events, source.adjacency)
    judge = getattr(source, "accountant", source)
    if not isinstance(judge, Accountant):
        raise ConfigurationError(
            f"a {type(source).__name__}",
            why="what was released is not known.",
            cure="pass an engine, an accountant, a Statement or a ledger.",
        )
    return judge


def _curve_of(source: Any) -> TradeOff:
    if isinstance(source, TradeOff):
        return source
    judge = _accountant_of(source)
    return TradeOff(judged(judge.ledger, judge.adjacency))
