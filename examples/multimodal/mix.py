"""A data set made by rule, with the mix of the Hateful Memes challenge, and what is the best any model can do on it.

Kiela et al., "The Hateful Memes Challenge" (2020): 40% of the memes are hateful only as a whole, 10% by one modality
alone, 20% are benign because the text was exchanged (a text confounder), 20% because the image was, 10% at random.
Here a meme is *unkind* if its text compares somebody with what the picture shows ("you look like a pig today" is a kind
word under a picture of a fox), or if its text is unkind whatever the picture.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from fractions import Fraction

from .data import Row, Rows
from .pictures import STYLES, Picture

CONCEPTS = {
    "pig": "1F437",
    "frog": "1F438",
    "monkey": "1F435",
    "horse": "1F434",
    "chicken": "1F414",
    "snail": "1F40C",
    "octopus": "1F419",
    "fish": "1F41F",
}
COMPARES = (
    "you look like a {} today",
    "a {} comes to mind when i see you",
    "is that a {} or is it you",
    "my neighbour reminds me of a {}",
    "somebody here eats like a {}",
    "they said a {} would join us, and there you are",
)
UNKIND = (
    "nobody wants you here, go away",
    "you are useless and everyone knows it",
    "what a stupid thing to say, as always",
    "shut up, no one asked you",
)
KIND = (
    "happy birthday to you, my friend",
    "thank you all for a wonderful evening",
    "have a lovely weekend everybody",
    "so proud of you, well done",
)
BACKGROUNDS = ("#ffffff", "#f1f1f1", "#ffe5d9", "#fff3b0", "#d8f3dc", "#cfe8ff")
SHARES = {
    "hateful together": Fraction(40, 100),
    "hateful alone": Fraction(10, 100),
    "text confounder": Fraction(20, 100),
    "image confounder": Fraction(20, 100),
    "benign": Fraction(10, 100),
}

Cell = tuple[str, str, int]
"""What the text says (a concept, "unkind" or "kind"), what the picture shows, and the label."""


def joint() -> dict[Cell, Fraction]:
    """The probability of every cell, exactly."""
    cells: dict[Cell, Fraction] = defaultdict(Fraction)
    k = len(CONCEPTS)
    for shown in CONCEPTS:
        cells[shown, shown, 1] += SHARES["hateful together"] / k
        cells["unkind", shown, 1] += SHARES["hateful alone"] / k
        cells["kind", shown, 0] += SHARES["benign"] / k
        for other in CONCEPTS.keys() - {shown}:
            cells[other, shown, 0] += SHARES["text confounder"] / (k * (k - 1))
            cells[shown, other, 0] += SHARES["image confounder"] / (k * (k - 1))
    return dict(cells)


def bayes(sees: Callable[[str, str], object]) -> tuple[Fraction, Fraction]:
    """Accuracy and AUROC of the best model that sees ``sees(text, picture)``, exactly.

    >>> [float(x) for x in bayes(lambda text, picture: text)]
    [0.6, 0.68]
    """
    mass: dict[object, list[Fraction]] = defaultdict(lambda: [Fraction(), Fraction()])
    for (text, picture, label), probability in joint().items():
        mass[sees(text, picture)][label] += probability
    accuracy = sum((max(pair) for pair in mass.values()), start=Fraction())
    ranked = sorted(mass.values(), key=lambda pair: pair[1] / (pair[0] + pair[1]))
    negatives, positives = (sum((pair[label] for pair in ranked), start=Fraction()) for label in (0, 1))
    area = below = Fraction()
    i = 0
    while i < len(ranked):  # cells with the same posterior tie
        tied = [pair for pair in ranked if _posterior(pair) == _posterior(ranked[i])]
        zeros, ones = (sum((pair[label] for pair in tied), start=Fraction()) for label in (0, 1))
        area += ones * (below + zeros / 2)
        below += zeros
        i += len(tied)
    return accuracy, area / (negatives * positives)


def _posterior(pair: list[Fraction]) -> Fraction:
    return pair[1] / (pair[0] + pair[1])


def memes(sizes: dict[str, int] | None = None, seed: int = 0) -> Rows:
    """The generated data set; in each ten rows four hateful together, their four confounders, two alone.

    A hateful meme and the confounder made from it are one pair, and one unit.
    """
    sizes = sizes or {"train": 8000, "val": 1000, "test": 2000}
    rng = random.Random(seed)
    splits = {split: _split(split, count // 10, rng) for split, count in sizes.items()}
    return Rows("mix", splits, ("kind", "unkind"))


def _split(split: str, tens: int, rng: random.Random) -> list[Row]:
    rows = []
    for i in range(tens):
        for j in range(4):
            concept, other = rng.sample(sorted(CONCEPTS), 2)
            template = rng.choice(COMPARES)
            text, picture = template.format(concept), _picture(concept, rng)
            name = f"{split} {i} {j}"
            rows.append(Row(text, picture, 1, split, name, name, "hateful together"))
            if j % 2:
                rows.append(Row(template.format(other), picture, 0, split, name, name, "text confounder"))
            else:
                rows.append(Row(text, _picture(other, rng), 0, split, name, name, "image confounder"))
        for words, label, kind in ((UNKIND, 1, "hateful alone"), (KIND, 0, "benign")):
            name = f"{split} {i} {kind}"
            shown = _picture(rng.choice(sorted(CONCEPTS)), rng)
            rows.append(Row(rng.choice(words), shown, label, split, name, name, kind))
    return rows


def _picture(concept: str, rng: random.Random) -> Picture:
    return Picture((CONCEPTS[concept],), rng.choice(STYLES), rng.choice(BACKGROUNDS))


def cell(row: Row) -> Cell:
    """Which cell of `joint` a generated row is in."""
    shown = next(name for name, code in CONCEPTS.items() if (code,) == row.picture.codes)
    if row.text in UNKIND or row.text in KIND:
        return ("unkind" if row.text in UNKIND else "kind"), shown, row.label
    said = next(name for name in CONCEPTS if f" {name}" in row.text)
    return said, shown, row.label


def counted(rows: Iterable[Row]) -> dict[Cell, int]:
    """How many rows are in each cell."""
    counts: dict[Cell, int] = defaultdict(int)
    for row in rows:
        counts[cell(row)] += 1
    return dict(counts)
