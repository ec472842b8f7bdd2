"""`--size tiny`: grow a small Llama from nothing on the public part, fine-tune it privately on hazards it never saw.

What it shows is not language but the method: a guard that reads its policy, whose policy changes inside the privacy unit,
and what privacy costs on hazards that are new.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import toy
from .augment import NONE, Augmentation
from .data import Record
from .language_model import Conversations, Reader, choose_trained, load, losses, scores
from .metrics import judge, one_vs_all, one_vs_benign
from .prompt import SHORT, Conversation, Verdict
from .taxonomy import Category, Taxonomy
from .train import Privacy, Recipe, Run, seeds_of, train


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    public: int = 6000
    private: int = 6000
    test: int = 600
    grow: Recipe = Recipe(epochs=14, batch_size=96, lr=3e-3, optimizer="adam")
    tune: Recipe = Recipe(epochs=8, batch_size=512, lr=2e-3, optimizer="adam")
    width: int = 64
    layers: int = 2
    method: str = "full"


def rehearse(
    plan: Plan, epsilons: Sequence[float], *, seed: int = 0, model: str | None = None, told: Callable[[str], None] = print
) -> dict[str, Any]:
    """Grow (unless ``model``, a folder, is given), tune without privacy and for each ε, judge; all figures."""
    whole, augmentation = toy.taxonomy(), Augmentation()
    public = toy.conversations(plan.public, toy.PUBLIC, seed)
    private = toy.conversations(plan.private, toy.PRIVATE, seed + 1000)
    test = toy.conversations(plan.test, tuple(toy.DEEDS), seed + 2000)

    with TemporaryDirectory() as folder:
        grown, tokenizer = load(model or str(toy.fresh(Path(folder), width=plan.width, layers=plan.layers, seed=seed)))
    reader = Reader(tokenizer, SHORT, max_tokens=160)

    def dataset(records: Sequence[Record], stream: int) -> Conversations:
        return Conversations(records, whole, reader, augmentation, torch.Generator().manual_seed(stream))

    result: dict[str, Any] = {"plan": asdict(plan), "parameters": sum(p.numel() for p in grown.parameters())}
    if model is None:
        drawn, noise = seeds_of(seed, 0)
        grow = train(grown, dataset(public, drawn), losses, plan.grow, seeds=(drawn, noise), collate=reader.collate)
        told(f"grown on the public part: {grow.steps} steps, {grow.seconds_per_step * grow.steps:.0f} s of processor")
    result["figures"] = {"before": figures(grown, reader, whole, test)}
    delta = 1 / (10 * len(private))
    runs: list[Run] = []
    for k, epsilon in enumerate((None, *epsilons), 1):
        tuned = choose_trained(copy.deepcopy(grown), plan.method, layers=1)
        drawn, noise = seeds_of(seed, k)
        run = train(
            tuned,
            dataset(private, drawn + 1),
            losses,
            plan.tune,
            None if epsilon is None else Privacy(epsilon, delta),
            seeds=(drawn, noise),
            collate=reader.collate,
        )
        runs.append(run)
        result["figures"][run.name] = figures(tuned, reader, whole, test)
        told(f"{run.name}: {result['figures'][run.name]['overall']}")
    result["runs"] = [asdict(replace(run, epsilons=[])) for run in runs]
    return result


def figures(model: torch.nn.Module, reader: Reader, whole: Taxonomy, test: Sequence[Record]) -> dict[str, Any]:
    """AUPRC (and what a guess reaches) overall, by hazard, under policies that were never seen, and with examples."""
    unsafe = [r.unsafe for r in test]

    def pair(labels: Sequence[bool], found: torch.Tensor) -> dict[str, float]:
        judged = judge(labels, found, resamples=0)
        return {"auprc": round(judged.auprc, 4), "prevalence": round(judged.prevalence, 4), "f1": round(judged.f1, 4)}

    full = scores(model, reader, whole, test)
    one = torch.stack([scores(model, reader, whole.only([name]).numbered(), test) for name in whole.names], 1)
    violated = [[name in r.violates for name in whole.names] for r in test]
    alone = one_vs_all(violated, one, whole.names, resamples=0)
    benign = one_vs_benign(violated, one, whole.names, resamples=0)
    # Half of the hazards dropped from the policy: what violates only them is safe under it.
    kept = whole.only(whole.names[::2]).numbered()
    dropped = scores(model, reader, kept, test)
    # A taxonomy that no training listed: fewer and broader categories, named in other words.
    broad = Taxonomy("broad", (Category("S1", "Crimes and Violence"), Category("S2", "Hate and Privacy")))
    named = {"Violent Crimes", "Non-Violent Crimes", "Hate", "Privacy"}
    other = scores(model, reader, broad, test)
    shots = [
        (Conversation.of("who wrote the book on arson"), Verdict(False)),
        (Conversation.of("please help me plan arson"), Verdict(True, ("Violent Crimes",))),
    ]
    asked = [r for r in test if r.conversation.judged == "User"]
    shown = scores(model, reader, whole, asked, shots)
    return {
        "overall": pair(unsafe, full),
        "dropped": pair([any(n in kept.names for n in r.violates) for r in test], dropped),
        "zero-shot": pair([bool(set(r.violates) & named) for r in test], other),
        "few-shot": pair([r.unsafe for r in asked], shown),
        "hazards": {
            name: {
                "one-vs-all": round(alone[name].auprc, 4),
                "one-vs-benign": round(benign[name].auprc, 4),
                "prevalence": round(alone[name].prevalence, 4),
            }
            for name in whole.names
        },
    }


__all__ = ["NONE", "Plan", "figures", "rehearse"]
