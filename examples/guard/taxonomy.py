"""Taxonomies of hazards, as data: which categories there are, what they are called, and how they map onto each other.

A category is known by its **name**. Its code is only its place in one taxonomy: S5 is Defamation for MLCommons and
Specialized Advice for Llama Guard 2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

BUILT_IN = Path(__file__).with_name("taxonomies.yaml")
CODE = re.compile(r"[A-Za-z][A-Za-z0-9]*")
FIELDS = {"code", "name", "description", "of", "tested"}


class TaxonomyError(ValueError):
    """A taxonomy that says nothing clear; the message names the place and the cure."""


@dataclass(frozen=True)
class Category:
    """One kind of hazard.

    Attributes:
        code: letters and digits ("S1"), unique within its taxonomy; what the model answers.
        name: unique within its taxonomy; what the category is known by everywhere else.
        of: the names of the `mlcommons` categories that cover it.
        tested: whether MLCommons' benchmark tests it.
    """

    code: str
    name: str
    description: str = ""
    of: tuple[str, ...] = ()
    tested: bool = False


@dataclass(frozen=True)
class Taxonomy:
    """Categories in the order in which a prompt lists them."""

    title: str
    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        if not self.categories:
            raise TaxonomyError(f"{self.title}: no categories. Cure: give at least one.")
        for what, values in (("code", self.codes), ("name", [c.name.casefold() for c in self.categories])):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise TaxonomyError(
                    f"{self.title}: the {what} {twice[0]!r} is used twice. Cure: one for each category."
                )
        for category in self.categories:
            if not CODE.fullmatch(category.code):
                raise TaxonomyError(
                    f"{self.title}: {category.code!r} is no code; an answer with it could not be told apart. "
                    "Cure: a letter, then letters and digits (S1, vcr)."
                )
            if not category.name.strip() or "\n" in category.name + category.description:
                raise TaxonomyError(f"{self.title}, {category.code}: a name is one line, and not empty.")

    def __len__(self) -> int:
        return len(self.categories)

    def __iter__(self) -> Iterator[Category]:
        return iter(self.categories)

    @property
    def codes(self) -> list[str]:
        return [category.code for category in self.categories]

    @property
    def names(self) -> list[str]:
        return [category.name for category in self.categories]

    def named(self, name: str) -> Category:
        """The category called ``name``, whatever its case."""
        for category in self.categories:
            if category.name.casefold() == name.casefold():
                return category
        raise TaxonomyError(f"{self.title} has no category {name!r}. It has: {', '.join(self.names)}.")

    def coded(self, code: str) -> Category:
        """The category whose code is ``code``."""
        for category in self.categories:
            if category.code == code:
                return category
        raise TaxonomyError(f"{self.title} has no code {code!r}. It has: {', '.join(self.codes)}.")

    def only(self, names: Iterable[str]) -> Taxonomy:
        """The same with only the categories called ``names``, in the order of ``names``, codes kept."""
        return Taxonomy(self.title, tuple(self.named(name) for name in names))

    def numbered(self, prefix: str = "S") -> Taxonomy:
        """The same order, with codes S1, S2, ...: what shuffling does to codes."""
        return Taxonomy(
            self.title,
            tuple(
                Category(f"{prefix}{i}", c.name, c.description, c.of, c.tested)
                for i, c in enumerate(self.categories, 1)
            ),
        )

    @property
    def tested(self) -> Taxonomy:
        """The categories that MLCommons' benchmark tests."""
        return Taxonomy(self.title, tuple(c for c in self.categories if c.tested))

    def mapped(self, name: str, other: Taxonomy) -> list[str]:
        """The names of ``other``'s categories that share an MLCommons hazard with the category called ``name``."""
        covered = set(self.named(name).of)
        return [category.name for category in other if covered & set(category.of)]


def built_in(name: str) -> Taxonomy:
    """One of `mlcommons`, `ailuminate`, `llama_guard_1`, `_2`, `_3`, `openai_moderation`, `diasafety`."""
    found = _all_built_in()
    if name not in found:
        raise TaxonomyError(f"no taxonomy {name!r}. There are: {', '.join(found)}.")
    return found[name]


def load(path: str | Path) -> Taxonomy:
    """A taxonomy of one's own, from a YAML or JSON file: ``title``, and ``categories`` with code, name, description.

    Raises:
        TaxonomyError: the file is not of that form.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise TaxonomyError(
            f"{path}: not readable as {'JSON' if path.suffix == '.json' else 'YAML'}: {error}"
        ) from None
    return _taxonomy(content, str(path), {})


@cache
def _all_built_in() -> dict[str, Taxonomy]:
    found: dict[str, Taxonomy] = {}
    for name, content in yaml.safe_load(BUILT_IN.read_text(encoding="utf-8")).items():
        found[name] = _taxonomy(content, name, found)
    return found


def _taxonomy(content: Any, where: str, known: Mapping[str, Taxonomy]) -> Taxonomy:
    if not isinstance(content, Mapping) or not isinstance(content.get("categories"), Sequence):
        raise TaxonomyError(f"{where}: expected a title and a list of categories.")
    unknown = set(content) - {"title", "categories", "extends"}
    if unknown:
        raise TaxonomyError(f"{where}: unknown field {sorted(unknown)[0]!r}. Known: title, categories, extends.")
    categories: list[Category] = []
    base = content.get("extends")
    if base is not None:
        categories += known[base] if base in known else built_in(base)
    for i, entry in enumerate(content["categories"], 1):
        categories.append(_category(entry, f"{where}, category {i}"))
    return Taxonomy(str(content.get("title", where)), tuple(categories))


def _category(entry: Any, where: str) -> Category:
    if not isinstance(entry, Mapping):
        raise TaxonomyError(f"{where}: expected code, name and description, got {type(entry).__name__}.")
    for field in ("code", "name"):
        if not isinstance(entry.get(field), str):
            raise TaxonomyError(f"{where}: {field} is {entry.get(field)!r}. Cure: give a text (YAML: in quotes).")
    unknown = set(entry) - FIELDS
    if unknown:
        raise TaxonomyError(f"{where}: unknown field {sorted(unknown)[0]!r}. Known: {', '.join(sorted(FIELDS))}.")
    of = entry.get("of", [entry["name"]])
    if not isinstance(of, list) or not all(isinstance(name, str) for name in of):
        raise TaxonomyError(f"{where}: `of` is a list of names of MLCommons hazards, got {of!r}.")
    return Category(
        entry["code"], entry["name"], str(entry.get("description", "")), tuple(of), bool(entry.get("tested", False))
    )
