"""Pages: a list of parts becomes one HTML page that needs nothing else, a Markdown page and, with the figures, JSON.

A part is a kind and its content: ("h1" | "h2" | "p" | "lead", text), ("table", (title, heads, rows)), ("details",
(title, text)), ("plots", {title: PNG}).
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Part = tuple[str, Any]
Row = Sequence[Any]
Table = tuple[str, Row, list[Row]]
STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --mark: #0969da; --back: #fff; --card: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --mark: #4493f8;
  --back: #0d1117; --card: #151b23 } img { background: #fff; border-radius: 6px } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem } h1 { line-height: 1.2 } h2 { margin-top: 2.4rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums } caption { text-align: left;
  color: var(--soft); padding-bottom: .4rem } th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line);
  text-align: right } th:first-child, td:first-child { text-align: left }
  thead th { border-bottom: 2px solid var(--line) }
.wide { overflow-x: auto } img { max-width: 100% } .note { color: var(--soft) } pre { background: var(--card);
  padding: 1rem; white-space: pre-wrap; border-radius: 6px; font-size: .85rem } .lead { border-left: 4px solid
  var(--mark); background: var(--card); padding: .8rem 1rem; border-radius: 0 6px 6px 0 } code { font-size: .9em }
"""


def write(parts: Iterable[Part], figures: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write name.json, name.md and name.html to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(parts)
    title = next(content for kind, content in parts if kind == "h1")
    body = "\n".join(_html(part) for part in parts)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )
    texts = {
        "json": json.dumps(_rounded(figures), indent=1, ensure_ascii=False) + "\n",
        "md": "\n\n".join(_markdown(part) for part in parts) + "\n",
        "html": page,
    }
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{name}.{suffix}")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def _html(part: tuple[str, Any]) -> str:
    kind, content = part
    if kind == "table":
        title, heads, rows = content
        lines = ["".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row) for tag, row in [("th", heads)]]
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        return (
            f'<div class="wide"><table><caption>{html.escape(title)}</caption>'
            f"<thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    if kind == "details":
        title, text = content
        return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
    if kind == "plots":
        return "\n".join(
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            for title, png in content.items()
        )
    text = html.escape(content)
    if kind == "lead":
        return f'<p class="lead">{text}</p>'
    while text.count("`") >= 2:
        text = text.replace("`", "<code>", 1).replace("`", "</code>", 1)
    return f"<{kind}>{text}</{kind}>" if kind != "p" else f'<p class="note">{text}</p>'


def _markdown(part: tuple[str, Any]) -> str:
    kind, content = part
    if kind == "table":
        title, heads, rows = content
        lines = [heads, ["---"] * len(heads), *rows]
        return f"{title}:\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)
    if kind == "details":
        return f"{content[0]}:\n\n```\n{content[1]}\n```"
    if kind == "plots":
        return "(Curves: in the HTML page beside this file.)"
    return {"h1": "# ", "h2": "## "}.get(kind, "") + str(content)


def _rounded(value: Any) -> Any:
    """For JSON: figures to six digits; what is not finite, as a text or null."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else ("inf" if value > 0 else None)
    return value
