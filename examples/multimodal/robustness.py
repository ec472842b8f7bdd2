"""The experiments on a missing modality: curves for each fusion layer, modality dropout, the search for the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dpkit.accountants import make_accountant

from . import data, mix
from .data import Rows
from .experiments import Setup
from .missing import curve
from .private import class_weights
from .records import Records
from .results import Curve, Results
from .search import search, with_final_run
from .small import LAYERS, prepare_small, small_mmbt
from .train import Recipe, evaluate, train

SMALL = Recipe(batch_size=32, epochs=4, lr={"heads": 2e-3, "project": 1e-3, "text": 1e-3})
SMALL_PRIVATE = Recipe(
    batch_size=400,
    epochs=10,
    lr={"heads": 1e-2, "project": 4e-3, "text": 4e-3},
    clipping="automatic",
    max_rows_per_unit=2,
)
DROPOUT = 0.5


def on_missing(setup: Setup, results: Results, name: str, layers: Sequence[int] = (0, LAYERS)) -> None:
    """Curves over the available share, for redundant modalities ("groups") or for confounders ("mix")."""
    rows, epochs = (data.groups(setup.limit), 6) if name == "groups" else (_memes(setup), 2)
    records = prepare_small(rows, setup.images, setup.bert(), setup.tokenizer, 16)
    for dropout in (0.0, DROPOUT):
        for layer in layers:
            recipe = setup.shortened(SMALL.but(epochs=epochs, dropout=dropout))
            _curves(setup, results, rows, records, recipe, layer)
    recipe = setup.shortened(SMALL.but(epochs=epochs, dropout=DROPOUT, tasks=True))
    _curves(setup, results, rows, records, recipe, layers[0])
    _dropout_goals(results, name)


def _memes(setup: Setup) -> Rows:
    return mix.memes() if setup.limit is None else mix.memes(dict.fromkeys(("train", "val", "test"), setup.limit))


def _curves(
    setup: Setup, results: Results, rows: Rows, records: dict[str, Records], recipe: Recipe, layer: int
) -> None:
    model = small_mmbt(setup.bert(), len(rows.classes), setup.seed, fusion=layer, tasks=recipe.tasks)
    train(model, records["train"], recipe, seed=setup.seed + 100 + layer)
    for missing in ("text", "image"):
        found = curve(model, records["test"], missing)
        values = {ratio: m.accuracy for ratio, m in found.items()}
        results.curves.append(Curve(rows.name, missing, layer, recipe.dropout, math.inf, values, tasks=recipe.tasks))
        if missing == "text":
            heads = ", task heads" if recipe.tasks else ""
            line = " ".join(f"{value:.3f}" for value in values.values())
            setup.say(f"{rows.name}: fused at {layer}, dropout {recipe.dropout:.0%}{heads}: {line}")


def _dropout_goals(results: Results, name: str) -> None:
    """What modality dropout does where the text is gone."""
    at = {
        (c.fusion, c.dropout): c.values[0.0]
        for c in results.curves
        if c.data == name and c.missing == "text" and not c.tasks
    }
    gains = {layer: at[layer, DROPOUT] - at[layer, 0.0] for layer, dropout in at if dropout}
    told = ", ".join(f"{100 * gain:+.1f} (fused at {layer})" for layer, gain in gains.items())
    if name == "groups":
        ok = max(gains.values()) >= 0.05
        what = "Modality dropout lifts the point without text by 5 points or more on redundant data"
    else:
        ok = all(value <= 0.55 for value in at.values())
        what = "It cannot on confounders (the image alone is at 0.50, whatever the training): the negative control"
    results.pieces.append(f"{'Reached' if ok else 'MISSED'}: {what}: {told} points.")


def on_weights(setup: Setup, results: Results) -> None:
    """Class weights from noisy counts, inside one ε with the training."""
    rows = data.groups(setup.limit)
    records = prepare_small(rows, setup.images, setup.bert(), setup.tokenizer, 16)
    some = records["train"]
    weights, event = class_weights(
        some.labels.tolist(), some.units, len(rows.classes), 5.0, np.random.default_rng((setup.seed, 4))
    )
    counts = np.bincount(some.labels.numpy(), minlength=len(rows.classes))
    for name, w, beside in (("none", None, None), ("from noisy counts", torch.tensor(weights).float(), event)):
        model = small_mmbt(setup.bert(), len(rows.classes), setup.seed, fusion=0)
        recipe = setup.shortened(SMALL_PRIVATE.but(batch_size=256, epochs=6))
        run = train(model, some, recipe, epsilon=8.0, seed=setup.seed + 200, weights=w, beside=beside)
        judged = evaluate(model, records["test"])
        results.pieces.append(
            f"Class weights, {name}: the nine emoji groups have {counts.min()} to {counts.max()} training rows; "
            f"small MMBT, ε = {run.epsilon:.2f} in all (σ = {run.noise_multiplier:.3f}): {judged.accuracy:.3f} right."
        )
    delta = 1 / (10 * rows.units)
    alone = make_accountant("pld").compose(event).epsilon(delta)
    results.pieces.append(
        f"The noisy class counts alone (an emoji counts once, noise 5) cost ε = {alone:.3f} at δ = {delta:.2g}; they "
        "are inside the ε above, and the training's σ is larger for it."
    )


def on_search(setup: Setup, results: Results, epsilon: float = 8.0, final: bool = False) -> None:
    """The fusion layer, searched privately on confounders and on redundant data.

    Args:
        final: train once more with the layer that was chosen; otherwise the supernet at that layer is what is kept.
    """
    for rows, changes in ((_memes(setup), {}), (data.groups(setup.limit), {"batch_size": 256, "epochs": 10})):
        records = prepare_small(rows, setup.images, setup.bert(), setup.tokenizer, 16)
        model = small_mmbt(setup.bert(), len(rows.classes), setup.seed)
        recipe = setup.shortened(SMALL_PRIVATE.but(**changes))
        candidates = tuple(range(LAYERS + 1))
        found = search(
            model, records["train"], records["val"], candidates, recipe, epsilon=epsilon, seed=setup.seed + 300
        )
        cost = found.cost
        test = evaluate(model, records["test"]).accuracy
        told = ", ".join(f"{layer}: {value:.3f}" for layer, value in found.accuracy.items())
        lines = [
            f"chosen: layer {found.chosen} of 0 (early) to {LAYERS} (late)",
            f"test accuracy of the supernet at that layer: {test:.3f}",
        ]
        if final:
            again = small_mmbt(setup.bert(), len(rows.classes), setup.seed, fusion=found.chosen)
            run = train(again, records["train"], recipe, epsilon=epsilon, seed=setup.seed + 301)
            lines.append(f"test accuracy of the final run: {evaluate(again, records['test']).accuracy:.3f}")
            cost = with_final_run(cost, run)
        lines += [*cost.lines(), f"validation accuracy by layer, which is not released: {told}"]
        results.searches.append({"data": rows.name, "chosen": found.chosen, "lines": lines, "epsilon": cost.epsilon})
        setup.say(f"search on {rows.name}: " + "; ".join(lines))
