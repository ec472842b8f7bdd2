"""The experiments: which models are trained on which data, by which recipes, and what was hoped for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from dpkit.accountants import make_accountant

from . import data, mix
from .align import align
from .data import Rows
from .encoders import ImageEncoder, load_bert, load_image_encoder
from .mmbt import MMBT
from .private import validation
from .records import Records, prepare
from .results import Results, Shown, Table
from .train import Recipe, Run, evaluate, predict, train

BELOW = 5
"""MiniLM's layers that stay frozen and run once for each text; the sixth is trained, and sees both modalities."""

MODELS: dict[str, dict[str, Any]] = {
    "text only": {"modalities": ("text",), "head": "mlp"},
    "image only": {"modalities": ("image",), "head": "mlp"},
    "late fusion": {"fusion": 6, "head": "linear"},
    "concatenation": {"fusion": 6, "head": "mlp"},
    "MMBT": {"fusion": BELOW, "head": "mlp"},
}
"""One class, five models: which modalities are looked at, where they meet, and by which head."""


@dataclass
class Setup:
    """The pre-trained parts, and how much is to be done.

    Attributes:
        limit: about this many rows of a split: a quick try.
    """

    seed: int = 0
    limit: int | None = None
    say: Callable[[str], None] = print
    images: ImageEncoder = field(default_factory=load_image_encoder)

    def __post_init__(self) -> None:
        self._bert, self.tokenizer = load_bert()

    def bert(self) -> transformers.BertModel:
        """A fresh MiniLM."""
        return copy.deepcopy(self._bert)

    def shortened(self, recipe: Recipe) -> Recipe:
        """The recipe; on a quick try, two epochs of it at most."""
        return recipe if self.limit is None else recipe.but(epochs=min(2, recipe.epochs))

    def model(self, name: str, outputs: int, without: Sequence[str] = (), **options: Any) -> MMBT:
        """A fresh model by its name in `MODELS`, its image side prepared on the public catalogue."""
        torch.manual_seed(self.seed)
        options = {"below": BELOW, "segments": (1, 0), **MODELS[name], **options}
        model = MMBT(self.bert(), 1280, outputs, **options)
        align(model, self.images, self.tokenizer, without=without)
        return model

    def fit(self, table: Table, model: MMBT, records: dict[str, Records], recipe: Recipe, **options: Any) -> Run:
        """Train, judge on the table's splits, and put the run into the table."""
        run = train(model, records["train"], self.shortened(recipe), seed=self.seed + 10 * len(table.runs), **options)
        run.metrics = {split: evaluate(model, records[split]) for split in table.splits}
        table.runs.append(run)
        found = ", ".join(f"{split} {m.auroc or m.accuracy:.3f}" for split, m in run.metrics.items())
        self.say(f"{table.key}: {run.name}: {found} (ε = {run.epsilon:.2f}, {run.steps} steps, {run.seconds:.0f} s)")
        return run


FREE = Recipe(batch_size=32, epochs=3, lr={"heads": 2e-3, "project": 1e-4, "text": 3e-4}, unfreeze={"text": 0.1})
"""Without privacy. Batches are of units: 32 documents are some 75 rows."""

PRIVATE = Recipe(batch_size=512, epochs=12, lr={"heads": 3e-3, "project": 3e-4, "text": 1e-3}, max_rows_per_unit=2)
"""With privacy: large batches (the noise is added once a batch), fewer of them."""


def on_confounders(setup: Setup, results: Results, epsilons: Sequence[float]) -> dict[str, MMBT]:
    """The headline: five models, then the MMBT with privacy. Returns the models, by name."""
    rows = data.confounders(setup.limit)
    records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=BELOW, max_tokens=32)
    unseen = sorted({row.picture.codes[0] for row in rows["test_unseen_image"]})
    table = Table(
        "confounders",
        "Confounders: does the picture agree with the words?",
        f"20,444 rows: a real sentence (happy or unhappy) and an emoji (happy or unhappy); the label says whether they "
        f"differ, so one modality alone is a coin toss. The unit of privacy is the document it is from: "
        f"{rows.units:,} of them in the training rows, with up to dozens of rows each.",
        {"test": "test", "test_unseen_image": "unseen emoji"},
    )
    results.tables.append(table)
    models = {}
    for name in MODELS:
        models[name] = setup.model(name, 2, unseen)
        few = FREE.but(epochs=1) if name.endswith("only") or name.startswith("late") else FREE
        setup.fit(table, models[name], records, few, name=name)
    for epsilon in epsilons:
        name = f"MMBT, ε = {epsilon:g}"
        models[name] = setup.model("MMBT", 2, unseen)
        run = setup.fit(table, models[name], records, PRIVATE, name=name, epsilon=epsilon)
        results.statement = results.statement or run.statement
    named = {run.name: run.metrics for run in table.runs}
    free = _auroc(named["MMBT"]["test"])
    for name in ("text only", "image only"):
        value = _auroc(named[name]["test"])
        table.goals.append((f"{name}: AUROC within 0.03 of 0.50", abs(value - 0.5) <= 0.03, f"{value:.3f}"))
    unseen_free = _auroc(named["MMBT"]["test_unseen_image"])
    late = _auroc(named["late fusion"]["test"])
    table.goals += [
        ("MMBT without privacy: AUROC ≥ 0.94", free >= 0.94, f"{free:.3f}"),
        ("MMBT without privacy, unseen emoji ≥ 0.82", unseen_free >= 0.82, f"{unseen_free:.3f}"),
        ("late fusion clearly below MMBT", late < free - 0.1, f"{late:.3f} against {free:.3f}"),
    ]
    for epsilon, goal in ((8.0, 0.90), (3.0, 0.88)):
        if f"MMBT, ε = {epsilon:g}" in named:
            value = _auroc(named[f"MMBT, ε = {epsilon:g}"]["test"])
            table.goals.append((f"MMBT, ε = {epsilon:g}: AUROC ≥ {goal:.2f}", value >= goal, f"{value:.3f}"))
            if epsilon == 8.0:
                how = f"{value:.3f} = {value / free:.3f} × {free:.3f}"
                table.goals.append(("ε = 8 keeps 0.95 of it", value >= 0.95 * free, how))
    results.shown += _examples(rows, records, models, ("text only", "late fusion", "MMBT", "MMBT, ε = 8"))
    _validate_privately(setup, results, records["val"], models)
    return models


def on_hatemoji(setup: Setup, results: Results, epsilons: Sequence[float]) -> None:
    """Hate in which the emoji takes part."""
    rows = data.hatemoji(setup.limit)
    records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=BELOW, max_tokens=40)
    table = Table(
        "hatemoji",
        "Hatemoji: hateful or not, in matched pairs",
        f"Sentences labelled by people; their emoji are shown as a picture. Of a pair, one is hateful and the "
        f"other not, mostly by changing the emoji alone or the text alone. The unit of privacy is the pair "
        f"({rows.units:,}). HatemojiCheck is a test suite by the same authors that no run was trained on.",
        {"test": "test", "check": "HatemojiCheck"},
    )
    results.tables.append(table)
    free = FREE.but(batch_size=32, epochs=4)
    private = PRIVATE.but(batch_size=256, epochs=6)
    models = {}
    for name in MODELS:
        models[name] = setup.model(name, 2)
        setup.fit(table, models[name], records, free, name=name)
    for epsilon in epsilons:
        name = f"MMBT, ε = {epsilon:g}"
        models[name] = setup.model("MMBT", 2)
        setup.fit(table, models[name], records, private, name=name, epsilon=epsilon)
    named = {run.name: run.metrics["test"] for run in table.runs}
    table.goals.append(
        ("MMBT without privacy: AUROC ≥ 0.74", _auroc(named["MMBT"]) >= 0.74, f"{named['MMBT'].auroc:.3f}")
    )
    if "MMBT, ε = 8" in named:
        value = _auroc(named["MMBT, ε = 8"])
        table.goals.append(("MMBT, ε = 8: AUROC ≥ 0.69", value >= 0.69, f"{value:.3f}"))
    results.shown += _examples(rows, records, models, ("text only", "MMBT", "MMBT, ε = 8"), hide=True)


def on_mix(setup: Setup, results: Results, epsilons: Sequence[float]) -> None:
    """The generated mix, where the limits are known."""
    rows = mix.memes() if setup.limit is None else mix.memes(dict.fromkeys(("train", "val", "test"), setup.limit))
    records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=BELOW, max_tokens=16)
    limits = {"text": mix.bayes(lambda text, picture: text), "image": mix.bayes(lambda text, picture: picture)}
    table = Table(
        "mix",
        "The Hateful Memes mix, generated",
        f"40% unkind only as a whole, 10% by the text alone, 20% + 20% made kind by exchanging text or picture. "
        f"Exact limits: from the text alone accuracy {float(limits['text'][0]):.3f} and AUROC "
        f"{float(limits['text'][1]):.3f}, from the image alone {float(limits['image'][0]):.3f} and "
        f"{float(limits['image'][1]):.3f}, from both 1. The unit is a meme with its confounder ({rows.units:,}).",
        {"test": "test"},
    )
    results.tables.append(table)
    for name in ("text only", "image only", "late fusion", "MMBT"):
        setup.fit(table, setup.model(name, 2), records, FREE.but(epochs=2), name=name)
    for epsilon in epsilons:
        private = PRIVATE.but(batch_size=400, epochs=10)
        setup.fit(table, setup.model("MMBT", 2), records, private, name=f"MMBT, ε = {epsilon:g}", epsilon=epsilon)
    named = {run.name: _auroc(run.metrics["test"]) for run in table.runs}
    limit = float(limits["text"][1])
    table.goals += [
        (
            f"text only ≤ its limit + 0.02 = {limit + 0.02:.2f}",
            named["text only"] <= limit + 0.02,
            f"{named['text only']:.3f}",
        ),
        ("MMBT without privacy ≥ 0.95", named["MMBT"] >= 0.95, f"{named['MMBT']:.3f}"),
    ]
    if "MMBT, ε = 8" in named:
        table.goals.append(("MMBT, ε = 8 ≥ 0.95", named["MMBT, ε = 8"] >= 0.95, f"{named['MMBT, ε = 8']:.3f}"))


def _auroc(metrics: Any) -> float:
    return float(metrics.auroc)


def _examples(
    rows: Rows, records: dict[str, Records], models: dict[str, MMBT], names: Sequence[str], hide: bool = False
) -> list[Shown]:
    """Two confounder pairs of the test set, and what the models said of them."""
    test = records["test"]
    pairs: dict[str, list[int]] = {}
    for k, row in enumerate(test.rows):
        if len(row.text) < 110 and row.picture.codes:
            pairs.setdefault(row.pair, []).append(k)
    chosen = [k for _, group in [item for item in pairs.items() if len(item[1]) == 2][3:6] for k in group]
    said: dict[int, dict[str, tuple[str, float]]] = {k: {} for k in chosen}
    for name in names:
        if name in models:
            sure = predict(models[name], test)[chosen].softmax(1)
            for k, p in zip(chosen, sure, strict=True):
                said[k][name] = (rows.classes[int(p.argmax())], float(p.max()))
    return [
        Shown(
            rows.name,
            data.masked(test.rows[k].text) if hide else test.rows[k].text,
            test.rows[k].picture,
            rows.classes[test.rows[k].label],
            said[k],
        )
        for k in chosen
    ]


def _validate_privately(setup: Setup, results: Results, records: Records, models: dict[str, MMBT]) -> None:
    """What the accuracy on the validation units is, told with noise."""
    if "MMBT, ε = 8" not in models:
        return
    right = (predict(models["MMBT, ε = 8"], records).argmax(1) == records.labels).numpy()
    noisy, event = validation(right, records.units, 10.0, np.random.default_rng((setup.seed, 3)))
    delta = 1 / (10 * len(set(records.units)))
    spent = make_accountant("pld").compose(event).epsilon(delta)
    results.pieces.append(
        f"Private validation: the ε = 8 MMBT's accuracy on the {len(set(records.units))} validation documents of "
        f"confounders is {noisy:.3f}, told with Gaussian noise of 10 documents; a validation document pays "
        f"ε = {spent:.3f} at δ = {delta:.2g} for it, a training document nothing. (Exactly: {right.mean():.3f}, which "
        "would not be told.)"
    )
