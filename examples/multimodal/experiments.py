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
from .adapters import LlamaWithAdapters, encode_for_llama, load_llama
from .align import align
from .data import Rows
from .encoders import ImageEncoder, load_bert, load_image_encoder
from .frozen import HeadOnly, alone, featured
from .mmbt import IMAGE, MMBT, TEXT
from .private import validation
from .records import Records, prepare
from .results import Results, Shown, Table
from .train import Recipe, Run, evaluate, predict, train

BELOW = 5
"""MiniLM's layers that run once for each text; the sixth sees both modalities."""
LOWER = 3
"""The heads also see what these layers make of a text: others than the sixth add more to it than the fifth does."""

MODELS: dict[str, dict[str, Any]] = {
    "text only": {"modalities": ("text",), "head": "mlp"},
    "image only": {"modalities": ("image",), "head": "mlp"},
    "late fusion": {"fusion": 6, "head": "linear"},
    "concatenation": {"fusion": 6, "head": "mlp"},
    "MMBT": {"fusion": BELOW, "head": "product"},
}
"""One class, five models: which modalities are looked at, where they meet, and by which head."""


@dataclass
class Setup:
    """The pre-trained parts, and how much is to be done.

    Attributes:
        limit: about this many rows of a split: a quick try.
        frozen: leave out what trains more than heads.
    """

    seed: int = 0
    limit: int | None = None
    frozen: bool = False
    say: Callable[[str], None] = print
    images: ImageEncoder = field(default_factory=load_image_encoder)

    def __post_init__(self) -> None:
        self._bert, self.tokenizer = load_bert()

    def bert(self) -> transformers.BertModel:
        """A fresh MiniLM."""
        return copy.deepcopy(self._bert)

    def shortened(self, recipe: Recipe) -> Recipe:
        """The recipe; on a quick try, two epochs of it at most."""
        if self.limit is None:
            return recipe
        return recipe.but(epochs=min(2, recipe.epochs), batch_size=min(self.limit // 8, recipe.batch_size))

    def model(
        self, name: str, outputs: int, without: Sequence[str] = (), prepared: bool = True, **options: Any
    ) -> MMBT:
        """A fresh model by its name in `MODELS`, its image side ``prepared`` on the public catalogue."""
        torch.manual_seed(self.seed)
        options = {"below": BELOW, "lower": LOWER, "segments": (1, 0), "skip": True, **MODELS[name], **options}
        model = MMBT(self.bert(), 1280, outputs, **options)
        if prepared:
            align(model, self.images, self.tokenizer, without=without)
        return model

    def fit(self, table: Table, model: Any, records: dict[str, Records], recipe: Recipe, **options: Any) -> Run:
        """Train, judge on the table's splits, and put the run into the table."""
        run = train(model, records["train"], self.shortened(recipe), seed=self.seed + 10 * len(table.runs), **options)
        run.metrics = {split: evaluate(model, records[split]) for split in table.splits}
        table.runs.append(run)
        found = ", ".join(f"{split} {m.auroc or m.accuracy:.3f}" for split, m in run.metrics.items())
        self.say(
            f"{table.key}: {run.name}: {found} (ε = {run.epsilon:.2f}, {run.steps} steps, {run.seconds:.0f} CPU s)"
        )
        return run


FREE = Recipe(batch_size=64, epochs=6, lr={"heads": 1e-3}, weight_decay=10.0, max_rows_per_unit=2)
"""Without privacy, the head alone. Batches are of rows. Decay is strong: few pictures are to stand for all others."""

UNFROZEN = Recipe(
    batch_size=64,
    epochs=2,
    lr={"heads": 2e-3, "project": 1e-4, "text": 3e-4},
    weight_decay=5.0,
    unfreeze={"text": 0.1},
)
"""Without privacy, the fused layer and the image projection as well, after a tenth of the steps."""

PRIVATE = Recipe(
    batch_size=600, epochs=20, lr={"heads": 5e-3}, weight_decay=2.0, max_rows_per_unit=2, clipping="automatic"
)
"""With privacy, the head alone, in few large batches of units (the noise is added once a batch)."""

Judged = dict[str, tuple[Any, Records]]
"""A model by its name, with the test rows as it takes them."""


def compare(
    setup: Setup,
    table: Table,
    records: dict[str, Records],
    epsilons: Sequence[float],
    *,
    without: Sequence[str] = (),
    free: Recipe = FREE,
    private: Recipe = PRIVATE,
    unfrozen: Recipe | None = UNFROZEN,
    judged: str = "test",
) -> Judged:
    """All of `MODELS`, then the MMBT with privacy, then, without, with its fused layer trained."""
    late, early = (setup.model(name, 2, without) for name in ("late fusion", "MMBT"))
    apart = {split: featured(late, records[split]) for split in ("train", *table.splits)}
    fused = {split: featured(early, records[split]) for split in ("train", "val", *table.splits)}
    models: Judged = {}

    def add(name: str, of: str, seen: dict[str, Records], recipe: Recipe, epsilon: float | None = None) -> None:
        model = HeadOnly(copy.deepcopy(early) if of == "MMBT" else setup.model(of, 2, prepared=False))
        setup.fit(table, model, seen, recipe, name=name, epsilon=epsilon)
        models[name] = (model, seen[judged])

    for name, which in (("text only", TEXT), ("image only", IMAGE)):
        add(name, name, {split: alone(some, which, late.centre.shape[1]) for split, some in apart.items()}, free)
    for name in ("late fusion", "concatenation"):
        add(name, name, apart, free)
    add("MMBT", "MMBT", fused, free)
    for epsilon in epsilons:
        add(f"MMBT, ε = {epsilon:g}", "MMBT", fused, private, epsilon=epsilon)
    if "val" in fused and f"MMBT, ε = {epsilons[0]:g}" in models:
        models["validated"] = (models[f"MMBT, ε = {epsilons[0]:g}"][0], fused["val"])
    if unfrozen is not None and not setup.frozen:
        model = setup.model("MMBT", 2, without, stride=4)
        setup.fit(table, model, records, unfrozen, name="MMBT, unfrozen")
        models["MMBT, unfrozen"] = (model, records[judged])
    return models


def on_confounders(setup: Setup, results: Results, epsilons: Sequence[float]) -> None:
    """The headline."""
    rows = data.confounders(setup.limit)
    records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=BELOW, lower=LOWER, max_tokens=32)
    unseen = sorted({row.picture.codes[0] for row in rows["test_unseen_image"]})
    table = Table(
        "confounders",
        "Confounders: does the picture agree with the words?",
        f"20,444 rows: a real sentence (happy or unhappy) and an emoji (happy or unhappy); the label says whether they "
        f"differ, so one modality alone is a coin toss. The unit of privacy is the document it is from: "
        f"{rows.units:,} of them in the training rows, with up to dozens of rows each. The MMBT's head multiplies "
        f"a few readings of the text by readings of the image, and adds; that of the concatenation has a hidden layer.",
        {"test": "test", "test_unseen_image": "unseen emoji"},
    )
    results.tables.append(table)
    models = compare(setup, table, records, epsilons, without=unseen)
    results.statement = next((run.statement for run in table.runs if run.statement), "")
    named = {run.name: run.metrics for run in table.runs}
    free, unseen_free = (_auroc(named["MMBT"][split]) for split in ("test", "test_unseen_image"))
    late = _auroc(named["late fusion"]["test"])
    for name in ("text only", "image only"):
        value = _auroc(named[name]["test"])
        table.goals.append((f"{name}: AUROC within 0.03 of 0.50", abs(value - 0.5) <= 0.03, f"{value:.3f}"))
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
                table.goals.append(("ε = 8 keeps 0.95 of the MMBT without privacy", value >= 0.95 * free, how))
    results.shown += _examples(rows, models, ("text only", "late fusion", "MMBT", "MMBT, ε = 8", "MMBT, unfrozen"))
    _validate_privately(setup, results, models)


def on_hatemoji(setup: Setup, results: Results, epsilons: Sequence[float]) -> None:
    """Hate in which the emoji takes part."""
    rows = data.hatemoji(setup.limit)
    records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=BELOW, lower=LOWER, max_tokens=40)
    table = Table(
        "hatemoji",
        "Hatemoji: hateful or not, in matched pairs",
        f"Sentences labelled by people; their emoji are shown as a picture. Of a pair, one is hateful and the "
        f"other not, mostly by changing the emoji alone or the text alone. The unit of privacy is the pair "
        f"({rows.units:,}). HatemojiCheck is a test suite by the same authors that no run was trained on.",
        {"test": "test", "check": "HatemojiCheck"},
    )
    results.tables.append(table)
    models = compare(setup, table, records, epsilons, free=FREE.but(epochs=12), private=PRIVATE.but(epochs=30))
    named = {run.name: _auroc(run.metrics["test"]) for run in table.runs}
    free = named["MMBT"]
    table.goals.append(("MMBT without privacy: AUROC ≥ 0.74", free >= 0.74, f"{free:.3f}"))
    if "MMBT, ε = 8" in named:
        value = named["MMBT, ε = 8"]
        table.goals.append(("MMBT, ε = 8: AUROC ≥ 0.69", value >= 0.69, f"{value:.3f}"))
    results.shown += _examples(rows, models, ("text only", "MMBT", "MMBT, ε = 8", "MMBT, unfrozen"), hide=True)


def on_mix(setup: Setup, results: Results, epsilons: Sequence[float]) -> None:
    """The generated mix, where the limits are known."""
    rows = mix.memes() if setup.limit is None else mix.memes(dict.fromkeys(("train", "val", "test"), setup.limit))
    records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=BELOW, lower=LOWER, max_tokens=16)
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
    compare(setup, table, records, epsilons, private=PRIVATE.but(epochs=30), unfrozen=None)
    named = {run.name: _auroc(run.metrics["test"]) for run in table.runs}
    limit, text = float(limits["text"][1]), named["text only"]
    table.goals += [
        (f"text only ≤ its limit + 0.02 = {limit + 0.02:.2f}", text <= limit + 0.02, f"{text:.3f}"),
        ("MMBT without privacy ≥ 0.95", named["MMBT"] >= 0.95, f"{named['MMBT']:.3f}"),
    ]
    if "MMBT, ε = 8" in named:
        table.goals.append(("MMBT, ε = 8 ≥ 0.95", named["MMBT, ε = 8"] >= 0.95, f"{named['MMBT, ε = 8']:.3f}"))


LLAMA = FREE.but(epochs=3, lr={"heads": 1e-3, "text": 1e-3}, weight_decay=0.0)
LLAMA_PRIVATE = PRIVATE.but(epochs=10, lr={"heads": 2e-2, "text": 2e-3})


def with_llama(setup: Setup, results: Results, epsilons: Sequence[float], below: int = 16, layers: int = 18) -> None:
    """Beyond: a frozen Llama with cross-attention adapters, in the table of the confounders."""
    llama, tokenizer = load_llama(layers)
    rows = data.confounders(setup.limit)
    records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=BELOW, lower=LOWER, max_tokens=32)
    tables = records["train"].tables
    tables.texts = encode_for_llama(llama, tokenizer, sorted(tables.text_of), 32, below)
    unseen = {row.picture.codes[0] for row in rows["test_unseen_image"]}
    table = results.table("confounders")
    for epsilon in (None, *epsilons):
        torch.manual_seed(setup.seed)
        model = LlamaWithAdapters(llama, 1280, 2, below=below)
        model.align(setup.images, tokenizer, 32, without=unseen)
        name = "frozen Llama, adapters" + ("" if epsilon is None else f", ε = {epsilon:g}")
        recipe = LLAMA if epsilon is None else LLAMA_PRIVATE
        setup.fit(table, model, records, recipe, name=name, epsilon=epsilon)


def _auroc(metrics: Any) -> float:
    return float(metrics.auroc)


def _examples(rows: Rows, models: Judged, names: Sequence[str], hide: bool = False) -> list[Shown]:
    """Three confounder pairs of the test set, the same ones whatever the models say of them."""
    test = rows["test"]
    pairs: dict[str, list[int]] = {}
    for k, row in enumerate(test):
        if len(row.text) < 110 and row.picture.codes:
            pairs.setdefault(row.pair, []).append(k)
    chosen = [k for group in [group for group in pairs.values() if len(group) == 2][3:6] for k in group]
    said: dict[int, dict[str, tuple[str, float]]] = {k: {} for k in chosen}
    for name in names:
        if name in models:
            sure = predict(*models[name])[chosen].softmax(1)
            for k, p in zip(chosen, sure, strict=True):
                said[k][name] = (rows.classes[int(p.argmax())], float(p.max()))
    return [
        Shown(
            rows.name,
            data.masked(test[k].text) if hide else test[k].text,
            test[k].picture,
            rows.classes[test[k].label],
            said[k],
        )
        for k in chosen
    ]


def _validate_privately(setup: Setup, results: Results, models: Judged) -> None:
    """What the accuracy on the validation units is, told with noise."""
    if "validated" not in models:
        return
    model, records = models["validated"]
    right = (predict(model, records).argmax(1) == records.labels).numpy()
    noisy, event = validation(right, records.units, 10.0, np.random.default_rng((setup.seed, 3)))
    units = len(set(records.units))
    delta = 1 / (10 * units)
    spent = make_accountant("pld").compose(event).epsilon(delta)
    told = (
        f"Private validation: the first private MMBT's accuracy on the {units} validation documents of confounders is "
        f"{noisy:.3f}, told with Gaussian noise of 10 documents; a validation document pays ε = {spent:.3f} at "
        f"δ = {delta:.2g} for it, a training document nothing. (Exactly: {right.mean():.3f}, which would not be told.)"
    )
    results.pieces.append(("confounders", told))
