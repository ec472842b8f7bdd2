"""What mkdocs asks of the repository; called by it (``hooks`` in mkdocs.yml).

Lays the three packages out as the wheel does (in build/docs-sources), so that the reference finds ``dpkit.accountants``
and ``dpkit.layers``, and makes a page of every results file of the benchmarks. `Examples` shows a docstring's doctests
as code.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "build" / "docs-sources"
RESULTS = ROOT / "benchmarks" / "results"


def on_startup(**_: Any) -> None:
    """Sources as in the wheel; before mkdocstrings is configured, which leaves out a folder that is not there."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "*.pyi")
    shutil.copytree(ROOT / "dpkit", SOURCES / "dpkit", ignore=skip)
    for package in ("accountants", "layers"):
        shutil.copytree(ROOT / package, SOURCES / "dpkit" / package, ignore=skip)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The benchmarks in the navigation."""
    shown = ["benchmarks/README.md", *(f"benchmarks/{path.name}" for path in sorted(RESULTS.glob("*.md")))]
    config.nav = [{"Benchmarks": shown} if "Benchmarks" in entry else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The benchmarks' README and results, their pictures and reports, as pages and files below benchmarks/."""
    for path in [
        RESULTS.parent / "README.md",
        *(p for kind in ("md", "png", "html") for p in RESULTS.glob(f"*.{kind}")),
    ]:
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    for path in RESULTS.glob("*.html"):  # apart, where no page of the same name is
        files.append(File.generated(config, f"benchmarks/html/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links into benchmarks/results as they are in the repository lead to the generated pages here."""
    if page.file.src_uri.startswith("benchmarks/"):
        return re.sub(r"\]\(([\w.-]+\.html)\)", r"](html/\1)", markdown)
    return re.sub(r"\]\(\.\./benchmarks/results/", "](benchmarks/", markdown)


class Examples(griffe.Extension):
    """Doctests anywhere in a docstring become blocks of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """The docstring with a fence around each run of lines from ``>>>`` to the next empty one."""
    lines: list[str] = []
    inside = False
    for line in [*docstring.splitlines(), ""]:
        if not inside and line.lstrip().startswith(">>> "):
            indent = line[: len(line) - len(line.lstrip())]
            lines += ["", f"{indent}```pycon"]
            inside = True
        elif inside and not line.strip():
            lines.append(f"{indent}```")
            inside = False
        lines.append(line.split("  # doctest:")[0].rstrip() if inside else line)
    return "\n".join(lines[:-1])
