"""The site: built with warnings as errors, complete, and fetching nothing from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
for needed in ("material", "mkdocstrings_handlers"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {
    "dpkit": "dpkit",
    "dpkit.accountants": "accountants",
    "dpkit.layers": "layers",
    "dpkit.audit": "audit",
    "dpkit.testing": "testing",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    out = tmp_path_factory.mktemp("site")
    shutil.rmtree(ROOT / "build" / "docs-sources", ignore_errors=True)  # as in a fresh clone
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=quiet)
    assert done.returncode == 0, done.stderr
    return out


def pages(site: Path) -> list[Path]:
    found = sorted(site.rglob("*.html"))
    assert len(found) > 15
    return found


@pytest.mark.parametrize("module", REFERENCE)
def test_reference_has_every_public_name(site: Path, module: str) -> None:
    """A heading for each name in ``__all__``, and none for others."""
    html = (site / "reference" / f"{REFERENCE[module]}.html").read_text(encoding="utf-8")
    public = set(importlib.import_module(module).__all__) - {"__version__"}
    headings = {name for found in re.findall(r"<h2[^>]*>(.*?)</h2>", html, re.S) for name in re.findall(r"\w+", found)}
    assert public - headings == set()
    anchors = {name.split(".")[-1] for name in re.findall(rf'<h2 id="({re.escape(module)}\.\w+)"', html)}
    assert anchors - public == set()


def test_every_page_and_result_is_in_the_navigation(site: Path) -> None:
    """Pages of docs/ and results of the benchmarks."""
    index = (site / "index.html").read_text(encoding="utf-8")
    linked = {link.removeprefix("./") for link in re.findall(r'href="([^"#:]+\.html)"', index)}
    written = [p.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    results = [f"benchmarks/{p.stem}.html" for p in (ROOT / "benchmarks" / "results").glob("*.md")]
    assert len(results) > 5
    assert {*written, *results} - linked <= {"index.html"}


def test_doctests_are_code(site: Path) -> None:
    """None is left as text, or was taken for a quotation."""
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
        assert "&gt;&gt;&gt;" not in prose, page
        assert "<blockquote>" not in prose or "/reference/" not in page.as_posix(), page
    assert 'class="gp"' in (site / "reference" / "accountants.html").read_text(encoding="utf-8")  # a prompt in a block


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """No font, style, script or picture by a full address."""
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"', text)
        for link in re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|preload|icon)"[^>]*>', text):
            fetched += re.findall(r'href="([^"]+)"', link)
        fetched += re.findall(r"url\(([^)]+)\)", text)
        assert not [address for address in fetched if re.match(r"[\"']?(https?:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?(https?:)?//", style.read_text(encoding="utf-8")), style
