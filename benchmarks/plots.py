"""The pictures of the results; without matplotlib there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measure import Row

COLOURS = {
    "ordinary": "#999999",
    "ordinary + noise": "#bbbbbb",
    "dpkit": "#1f77b4",
    "Opacus hooks": "#ff7f0e",
    "Opacus ghost": "#d62728",
}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def bars(rows: list[Row], path: Path) -> None:
    """Ratio to ordinary training for each workload and contestant, on a logarithmic axis."""
    plt = _pyplot()
    if plt is None:
        return
    places = list(dict.fromkeys((row.workload, row.batch_size) for row in rows))
    names = [name for name in COLOURS if name != "ordinary" and any(row.contestant == name for row in rows)]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(places) + 1.2))
    for k, name in enumerate(names):
        for row in rows:
            if row.contestant == name and row.ratio is not None and row.ratio_quartiles is not None:
                y = places.index((row.workload, row.batch_size)) + (k - len(names) / 2 + 0.5) * 0.8 / len(names)
                low, high = row.ratio_quartiles
                error = [[max(row.ratio - low, 0.0)], [max(high - row.ratio, 0.0)]]
                axes.barh(y, row.ratio, 0.75 / len(names), color=COLOURS[name], xerr=error, error_kw={"lw": 0.7})
        axes.barh(0, 0, color=COLOURS[name], label=name)
    axes.axvline(1.0, color=COLOURS["ordinary"], lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(places)), [f"{name}, {n}" for name, n in places])
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step, ratio to ordinary training")
    axes.legend(loc="best", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(groups: dict[str, list[tuple[int, Row]]], path: Path) -> None:
    """Time and peak memory against what grows, one column for each."""
    plt = _pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(2, len(groups), figsize=(3.2 * len(groups), 5.6), squeeze=False)
    for column, (what, points) in enumerate(groups.items()):
        for name, colour in COLOURS.items():
            mine = [(x, row) for x, row in points if row.contestant == name and row.ms is not None]
            if mine:
                xs = [x for x, _ in mine]
                axes[0][column].plot(xs, [row.ms for _, row in mine], "o-", color=colour, label=name, ms=3)
                axes[1][column].plot(xs, [row.peak_mib for _, row in mine], "o-", color=colour, ms=3)
        for axis, label in zip((axes[0][column], axes[1][column]), ("ms per step", "peak MiB"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(what)
            if column == 0:
                axis.set_ylabel(label)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
