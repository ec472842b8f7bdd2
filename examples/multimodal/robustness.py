"""The experiments on a missing modality: curves for each fusion layer, modality dropout, the search for the layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dpkit.accountants import make_accountant

from . import data, mix
from .data import Rows
from .experiments import PRIVATE, Setup
from .frozen import Supernet, at_each_layer
from .missing import curve
from .mmbt import MMBT
from .private import class_weights, least_units
from .records import Records, prepare
from .results import Curve, Results
from .search import search, with_final_run
from .small import LAYERS, prepare_small, small_mmbt
from .train import Recipe, evaluate, predict, train

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
    results.pieces.append((f"missing-{name}", f"{'Reached' if ok else 'MISSED'}: {what}: {told} points."))


def on_weights(setup: Setup, results: Results) -> None:
    """Class weights from noisy counts, inside one ε with the training."""
    rows = data.groups(setup.limit)
    records = prepare_small(rows, setup.images, setup.bert(), setup.tokenizer, 16)
    some = records["train"]
    weights, event = class_weights(
        some.labels.tolist(), some.units, len(rows.classes), 5.0, np.random.default_rng((setup.seed, 4))
    )
    counts = np.bincount(some.labels.numpy(), minlength=len(rows.classes))
    both = (("none", None, None), ("from noisy counts", torch.tensor(weights).float(), event))
    results.pieces.append(
        ("weights", f"Class weights: the nine emoji groups have {counts.min()} to {counts.max()} training rows.")
    )
    for clipping, bound in (("automatic", 1.0), ("flat", 5.0)):
        for name, w, beside in both:
            model = small_mmbt(setup.bert(), len(rows.classes), setup.seed, fusion=0)
            recipe = SMALL_PRIVATE.but(batch_size=256, epochs=6, clipping=clipping, max_grad_norm=bound)
            run = train(
                model, some, setup.shortened(recipe), epsilon=8.0, seed=setup.seed + 200, weights=w, beside=beside
            )
            said, truth = predict(model, records["test"]).argmax(1), records["test"].labels
            recalls = [float((said[truth == label] == label).float().mean()) for label in truth.unique()]
            told = (
                f"{clipping} clipping to {bound:g}, weights {name}: small MMBT, ε = {run.epsilon:.2f} in all "
                f"(σ = {run.noise_multiplier:.3f}): {float((said == truth).float().mean()):.3f} right; recall "
                f"{np.mean(recalls):.3f} in the mean of the groups, {min(recalls):.3f} in the worst."
            )
            results.pieces.append(("weights", told))
            setup.say(told)
    told = (
        "A weight is a factor of a record's gradient: automatic clipping, which divides by the norm, takes it out "
        "again, and so does flat clipping from all gradients longer than its bound."
    )
    results.pieces.append(("weights", told))
    delta = 1 / (10 * rows.units)
    alone = make_accountant("pld").compose(event).epsilon(delta)
    told = (
        f"The noisy class counts alone (an emoji counts once, noise 5) cost ε = {alone:.3f} at δ = {delta:.2g}; they "
        "are inside the ε above, and the training's σ is larger for it."
    )
    results.pieces.append(("weights", told))


SEARCHED = 3
"""MiniLM's layer from which on the search tries to fuse: at 3, 4, 5, or 6 (late)."""


def on_search(setup: Setup, results: Results, epsilon: float = 8.0, final: bool = False) -> None:
    """The fusion layer, searched privately on confounders and on redundant data, with a linear head on a frozen MiniLM.

    Args:
        final: train once more with the layer that was chosen; otherwise the supernet at that layer is what is kept.
    """
    for rows in (_memes(setup), data.groups(setup.limit)):
        records = prepare(rows, setup.images, setup.bert(), setup.tokenizer, below=SEARCHED, max_tokens=16)

        def fresh(rows: Rows = rows, **options: bool) -> MMBT:
            shape = {"below": SEARCHED, "lower": None, "fusion": SEARCHED, "head": "linear", "skip": False}
            return setup.model("MMBT", len(rows.classes), **shape, **options)

        frozen = fresh()
        seen = {split: at_each_layer(frozen, some) for split, some in records.items()}
        model = Supernet(fresh(prepared=False))
        candidates = tuple(range(SEARCHED, seen["train"].tables.maps.shape[1] + SEARCHED))
        recipe = setup.shortened(PRIVATE.but(epochs=40))
        found = search(model, seen["train"], seen["val"], candidates, recipe, epsilon=epsilon, seed=setup.seed + 300)
        cost = found.cost
        test = evaluate(model, seen["test"]).accuracy
        told = ", ".join(f"{layer}: {value:.3f}" for layer, value in found.accuracy.items())
        lines = [
            f"chosen: layer {found.chosen} of {candidates[0]} (early) to {candidates[-1]} (late)",
            f"test accuracy of the supernet at that layer: {test:.3f}",
        ]
        if rows.name == "mix":
            late = candidates[-1]
            lead = (max(found.accuracy.values()) - found.accuracy[late]) * len(set(records["val"].units))
            least = least_units(0.5, len(candidates))
            ok = found.chosen < late and lead >= least
            lines.append(
                f"{'reached' if ok else 'MISSED'}: a layer before late fusion is chosen where both modalities are "
                f"needed, and not by chance: the best one leads late fusion by {lead:.0f} units; the noise asks for "
                f"{least:.0f}"
            )
        if final:
            again = Supernet(fresh(prepared=False))
            again.fusion = found.chosen
            run = train(again, seen["train"], recipe, epsilon=epsilon, seed=setup.seed + 301)
            lines.append(f"test accuracy of the final run: {evaluate(again, seen['test']).accuracy:.3f}")
            cost = with_final_run(cost, run)
        lines += [*cost.lines(), f"validation accuracy by layer, which is not released: {told}"]
        results.searches.append({"data": rows.name, "chosen": found.chosen, "lines": lines, "epsilon": cost.epsilon})
        setup.say(f"search on {rows.name}: " + "; ".join(lines))
