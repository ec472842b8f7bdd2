"""The page: one HTML file that needs nothing else, with tables, curves, a heat map, examples and the statement."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .results import Curve, Results, Shown, Table

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def write(results: Results, path: Path) -> None:
    """The page, at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    """The page's HTML."""
    parts = [
        "<h1>Image and text together, privately</h1>",
        "<p class=lead>A multimodal bitransformer, trained with differential privacy on data that need both modalities "
        "(confounders), and on data where one of them is missing.</p>",
        f"<p class=note>By <code>{_text(results.command)}</code>, seed {results.seed}; {_text(results.machine)}; "
        f"{results.seconds / 60:.0f} minutes of processor time in all.</p>",
    ]
    for table in results.tables:
        parts += [f"<h2>{_text(table.title)}</h2>", f"<p>{_text(table.about)}</p>", _table(table), _goals(table)]
    if any(run.curve for table in results.tables for run in table.runs):
        parts += ["<h2>Utility against ε</h2>", _image(utility(results.tables), "utility against epsilon")]
    if results.curves:
        parts += [
            "<h2>A modality is missing</h2>",
            "<p>Trained with both; tested with the modality in a share of the rows only.</p>",
            _image(missing_curves(results.curves), "accuracy against the available share"),
            _image(heat_map(results.curves), "accuracy by fusion layer and available share"),
        ]
    for found in results.searches:
        lines = "".join(f"<li>{_text(line)}</li>" for line in found["lines"])
        parts += [f"<h2>The search for the fusion layer: {_text(found['data'])}</h2>", f"<ul>{lines}</ul>"]
    if results.pieces:
        parts += ["<h2>Private pieces</h2><ul>", *(f"<li>{_text(piece)}</li>" for piece in results.pieces), "</ul>"]
    if results.shown:
        parts += [
            "<h2>Rows of the test set</h2>",
            "<p>Real rows and what the models said, with the probability they gave it. Texts that may be hateful are "
            "masked.</p><div class=cards>",
            *map(_card, results.shown),
            "</div>",
        ]
    parts += ["<h2>To know before believing</h2><ul>", *(f"<li>{_text(note)}</li>" for note in results.notes), "</ul>"]
    parts += ["<h2>The engine's statement</h2>", f"<pre>{_text(results.statement)}</pre>"]
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>Image and text together, privately</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def utility(tables: Sequence[Table]) -> Figure:
    """AUROC against ε, with a dashed line for no privacy, and ε against steps."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, table in enumerate(tables):
        split = next(iter(table.splits))
        named = [
            (run, run.metrics[split]) for run in table.runs if run.name.startswith("MMBT") and split in run.metrics
        ]
        private = sorted((run.epsilon, m.auroc or m.accuracy) for run, m in named if math.isfinite(run.epsilon))
        free = [m.auroc or m.accuracy for run, m in named if math.isinf(run.epsilon)]
        if private:
            left.plot(*zip(*private, strict=True), "o-", color=f"C{i}", label=table.key)
        if free:
            left.axhline(max(free), color=f"C{i}", linestyle="--", alpha=0.6)
        for run, _ in named:
            if run.curve:
                right.plot(range(1, len(run.curve) + 1), run.curve, color=f"C{i}", label=f"{table.key}, {run.name}")
    left.set(xlabel="ε", ylabel="AUROC on test", title="MMBT (dashed: no privacy)")
    right.set(xlabel="step", ylabel="ε spent", title="Privacy spent", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


def missing_curves(curves: Sequence[Curve]) -> Figure:
    """One panel a data set and missing modality: the measure against the available share."""
    panels = list(dict.fromkeys((c.data, c.missing) for c in curves))
    figure = Figure(figsize=(10, 3.6 * math.ceil(len(panels) / 2)), layout="constrained")
    grid = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        for c in curves:
            if (c.data, c.missing) == panel:
                name = f"fused at {c.fusion}" + (", task heads" if c.tasks else "")
                name += "" if math.isinf(c.epsilon) else f", ε = {c.epsilon:.1f}"
                axes.plot(
                    [100 * ratio for ratio in c.values],
                    list(c.values.values()),
                    color=f"C{c.fusion}",
                    linestyle="-" if c.dropout else ":",
                    marker="o",
                    markersize=3,
                    label=f"{name}, dropout {c.dropout:.0%}",
                )
        axes.set(xlabel=f"{panel[1]} available, %", ylabel="accuracy", title=f"{panel[0]}: {panel[1]} missing")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=6)
    for axes in list(grid):
        axes.set_visible(False)
    figure.get_layout_engine().set(hspace=0.06)
    return figure


def heat_map(curves: Sequence[Curve]) -> Figure:
    """Fusion layer by available share, a panel for each data set and share of modality dropout (no task heads)."""
    some = [c for c in curves if not c.tasks and math.isinf(c.epsilon) and c.missing == "text"]
    panels = list(dict.fromkeys((c.data, c.dropout) for c in some))
    figure = Figure(figsize=(10, 3.0 * math.ceil(len(panels) / 2)), layout="constrained")
    grid = iter(figure.subplots(math.ceil(max(1, len(panels)) / 2), 2, squeeze=False).flat)
    for panel in panels:
        axes = next(grid)
        rows = sorted((c for c in some if (c.data, c.dropout) == panel), key=lambda c: c.fusion)
        ratios = list(rows[0].values)
        values = [list(c.values.values()) for c in rows]
        axes.imshow(values, vmin=0.3, vmax=1.0, aspect="auto", cmap="viridis")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                axes.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.75 else "k"
                )
        axes.set_xticks(range(len(ratios)), [f"{ratio:.0%}" for ratio in ratios])
        axes.set_yticks(range(len(rows)), [str(c.fusion) for c in rows])
        axes.set(xlabel="text available", ylabel="fused at layer", title=f"{panel[0]}, dropout {panel[1]:.0%}")
    for axes in grid:
        axes.set_visible(False)
    figure.get_layout_engine().set(hspace=0.06)
    return figure


def _table(table: Table) -> str:
    heads = "".join(f"<th>{_text(head)}</th>" for head in table.heads)
    rows = "".join(
        f"<tr{' class=private' if math.isfinite(run.epsilon) else ''}>"
        f"{''.join(f'<td>{_text(c)}</td>' for c in cells)}</tr>"
        for run, cells in zip(table.runs, table.cells(), strict=True)
    )
    return f"<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"


def _goals(table: Table) -> str:
    items = "".join(
        f"<li><span class={'ok' if ok else 'missed'}>{'reached' if ok else 'missed'}</span> "
        f"{_text(what)}: {_text(how)}</li>"
        for what, ok, how in table.goals
    )
    return f"<ul class=goals>{items}</ul>" if items else ""


def _card(shown: Shown) -> str:
    said = "".join(
        f"<dt>{_text(name)}</dt><dd class={'ok' if label == shown.label else 'missed'}>{_text(label)} {p:.0%}</dd>"
        for name, (label, p) in shown.said.items()
    )
    image = shown.picture.draw(72)
    held = io.BytesIO()
    image.save(held, "PNG")
    source = base64.b64encode(held.getvalue()).decode()
    return (
        f'<div class=card><img alt="the picture" src="data:image/png;base64,{source}"><b>{_text(shown.data)}</b><br>'
        f"{_text(shown.text)}<dl><dt>truth</dt><dd>{_text(shown.label)}</dd>{said}</dl></div>"
    )


def _image(figure: Figure, what: str) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    return f'<img class=plot alt="{what}" src="data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}">'


def _text(value: str) -> str:
    return html.escape(value)
