"""`--size tiny`: grow a small Llama from nothing on the public part, fine-tune it privately on hazards it never saw.

What it shows is not language but the method: a guard that reads its policy, whose policy changes inside the privacy
unit, and what privacy costs on hazards that are new.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from . import toy
from .augment import Augmentation
from .data import Record
from .language_model import Conversations, Reader, choose_trained, load, losses, scores
from .metrics import judge, one_vs_all, one_vs_benign
from .page import Part
from .prompt import SHORT, Conversation, Verdict
from .taxonomy import Category, Taxonomy
from .train import Privacy, Recipe, Run, seeds_of, train


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    public: int = 6000
    private: int = 3000
    test: int = 400
    grow: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=96, lr=3e-3, optimizer="adam"))
    tune: Recipe = field(default_factory=lambda: Recipe(epochs=3, batch_size=256, lr=3e-3, optimizer="adam"))
    width: int = 64
    layers: int = 2
    method: str = "full"


def study(
    plan: Plan,
    epsilons: Sequence[float],
    *,
    seed: int = 0,
    model: str | None = None,
    told: Callable[[str], None] = print,
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

    result: dict[str, Any] = {
        "size": "tiny",
        "plan": asdict(plan),
        "parameters": sum(p.numel() for p in grown.parameters()),
    }
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
    result["delta"], result["runs"] = delta, [asdict(replace(run, epsilons=[])) for run in runs]
    return result


def sections(result: dict[str, Any], command: str) -> Iterable[Part]:
    """The page."""
    figures, runs = result["figures"], {run["name"]: run for run in result["runs"]}

    def cell(one: dict[str, float]) -> str:
        return f"{one['auprc']:.3f} ({one['prevalence']:.3f})"

    yield "h1", "A guard that reads its policy, grown from nothing and privately fine-tuned"
    yield (
        "lead",
        f"A Llama of {result['parameters']:,} weights, pre-trained on a public part in which only "
        f"{', '.join(toy.PUBLIC)} are violated, then tuned on private conversations with {', '.join(toy.PRIVATE)}. "
        "A made-up world: it shows the method, not language.",
    )
    yield "p", f"Command: `{command}`. AUPRC, and in brackets the prevalence, which a guess reaches."
    heads = ["run", "ε spent", "whole policy", "half dropped", "unseen taxonomy", "two examples shown", "F1 at 0.5"]
    questions = ("overall", "dropped", "zero-shot", "few-shot")
    rows = [
        [
            name,
            f"{runs[name]['epsilon']:.2f}" if name in runs else "",
            *(cell(of[q]) for q in questions),
            of["overall"]["f1"],
        ]
        for name, of in figures.items()
    ]
    yield "table", ("Judged under the whole policy, and under policies that training never showed", heads, rows)
    first = next(iter(figures.values()))["hazards"]
    rows = [
        [hazard, "public" if hazard in toy.PUBLIC else "private", f"{first[hazard]['prevalence']:.3f}"]
        + [
            f"{of['hazards'][hazard]['one-vs-all']:.3f}, {of['hazards'][hazard]['one-vs-benign']:.3f}"
            for of in figures.values()
        ]
        for hazard in first
    ]
    yield (
        "table",
        (
            "By hazard, the policy listing it alone: AUPRC one-vs-all, one-vs-benign",
            ("hazard", "violated in", "prevalence", *figures),
            rows,
        ),
    )
    for run in result["runs"]:
        if run["statement"]:
            yield "details", (f"{run['name']}: the engine's statement", run["statement"])
    cost = [
        [r["name"], r["steps"], f"{1000 * r['seconds_per_step']:.0f}", f"{r['peak_mib']:.0f}"] for r in result["runs"]
    ]
    yield (
        "table",
        (
            "Processor time of a step, and the process's largest memory until then",
            ("run", "steps", "ms a step", "MiB"),
            cost,
        ),
    )
    yield (
        "p",
        "Policies are drawn anew each time a conversation is read (categories dropped, all violated ones dropped, "
        "order and codes shuffled). Nothing is copied, so the unit stays one conversation and ε what it is without; "
        f"δ = {result['delta']:.2g}.",
    )


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
