"""`--size minilm`: one linear layer on a frozen encoder, on prompts and responses, judged on sets it never saw."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dpkit import audit

from . import data, public, upper
from .data import Record, Source
from .encoder import ANY, Encoder, Head, Questions, find_weights, losses
from .grading import NOT_MLCOMMONS, Grades, System, reference
from .metrics import judge, one_vs_all, one_vs_benign, threshold_at_fpr
from .train import Privacy, Recipe, Run, seeds_of, train

RECIPE = Recipe(epochs=40, batch_size=2048, lr=5.0, max_grad_norm=0.25)
FPR = 0.05  # at which thresholds are set, on the validation splits


@dataclass
class Features:
    """Everything that is read, as tensors: computed once, for all runs."""

    sources: dict[str, Source]
    space: public.Space
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def records(self, source: str, split: str) -> list[Record]:
        return self.sources[source].splits[split]


def prepare(encoder: Encoder, limit: int | None, told: Callable[[str], None]) -> Features:
    """Run every text through the encoder once (kept on disk), seen as public texts lie."""
    sources = {
        "prompts": data.prompts(),
        "responses": data.responses(),
        "xstest": data.xstest(),
        "openai": data.openai_moderation(),
    }
    if limit:
        for source in sources.values():
            source.splits.update({name: data.thinned(rows, limit) for name, rows in source.splits.items()})
    sources["public"] = public.phrases()
    made = Features(sources, public.Space.of(encoder))
    for name, source in sources.items():
        for split, rows in source.splits.items():
            told(f"reading {name}, {split}: {len(rows):,} conversations")
            made.tensors[name, split] = made.space(encoder.features(rows))
    return made


def study(
    epsilons: Sequence[float],
    *,
    seeds: Sequence[int] = (0,),
    model: str | None = None,
    recipe: Recipe = RECIPE,
    max_tokens: int = 128,
    limit: int | None = None,
    cache: Path | None = None,
    resamples: int = 500,
    unfrozen: bool = False,
    told: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train without privacy and for each ε, with each seed; judge; everything that the report shows (first seed).

    ``unfrozen``: also a run without privacy that trains the encoder's last layer.
    """
    encoder = Encoder(find_weights(model), max_tokens, cache)
    features = prepare(encoder, limit, told)
    asked = Questions(features.sources["prompts"].taxonomy, features.sources["responses"].taxonomy)
    train_rows = features.records("prompts", "train") + features.records("responses", "train")
    inputs = torch.cat([features.tensors["prompts", "train"], features.tensors["responses", "train"]])
    dataset = TensorDataset(inputs, asked.targets(train_rows))
    units = [r.unit for r in train_rows]
    delta = 1 / (10 * len(set(units)))
    start = public.warm_start(asked, features.records("public", "train"), features.tensors["public", "train"])

    judged: dict[str, Any] = {}
    by_seed: dict[str, list[dict[str, float]]] = {}
    runs: list[Run] = []

    def judge_run(run: Run, logits: dict[tuple[str, str], Tensor], seed: int) -> None:
        by_seed.setdefault(run.name, []).append(headlines(asked, features, logits))
        told(f"seed {seed}, {run.name}: " + ", ".join(f"{n} {v:.3f}" for n, v in by_seed[run.name][-1].items()))
        if seed == seeds[0]:
            runs.append(run)
            judged[run.name] = judgement(asked, features, logits, resamples)

    read = {}
    if unfrozen:
        told("reading prompts up to the layers that are trained")
        keys = [key for key in features.tensors if key[0] in ("prompts", "xstest", "openai")]
        read = {key: upper.Read(encoder, asked, features.records(*key)) for key in keys}
    for seed in seeds:
        for k, epsilon in enumerate((None, *epsilons)):
            head = copy.deepcopy(start)
            privacy = None if epsilon is None else Privacy(epsilon, delta, units)
            chosen = at(recipe, epsilon)
            run = train(head, dataset, lambda m, x, t: losses(m(x), t), chosen, privacy, seeds=seeds_of(seed, k))
            with torch.no_grad():
                # In double precision: sigmoids of large logits are 1 in single, and ties have no rank.
                logits = {key: head(x).double() for key, x in features.tensors.items() if key[1] != "train"}
            judge_run(run, logits, seed)
            if unfrozen and privacy is None:
                model, run = upper.fit(encoder, features.space, head, read["prompts", "train"], seed)
                above = {k: upper.logits(model, asked, read[k], x) for k, x in logits.items() if k in read}
                judge_run(run, logits | above, seed)
    most = max(epsilons, default=None)
    return {
        "size": "minilm",
        "recipe": asdict(recipe) | {"max_tokens": max_tokens, "seeds": list(seeds)},
        "data": {
            "training rows": len(train_rows),
            "units": len(set(units)),
            "delta": delta,
            "trained parameters": inputs.shape[1] * len(asked) + len(asked),
        },
        "rows": {
            "prompt": dict(Counter(r.category for r in features.records("prompts", "train") if r.violates)),
            "response": dict(Counter(r.category for r in features.records("responses", "train") if r.unsafe)),
        },
        "runs": [asdict(replace(run, epsilons=[])) for run in runs],
        "spent": {run.name: run.epsilons for run in runs},
        "headlines": by_seed,
        "judged": judged,
        "audit": None if most is None else canaries(start, dataset, units, recipe, most, delta, seeds[0]),
    }


def at(recipe: Recipe, epsilon: float | None) -> Recipe:
    """The recipe at ε: the rate is ε itself, but at most the recipe's. The more noise, the shorter the way.

    It is counted in clipping norms, for noise and most gradients have the norm's length.
    """
    return recipe if epsilon is None else replace(recipe, lr=min(recipe.lr, epsilon) / recipe.max_grad_norm)


def headlines(asked: Questions, features: Features, logits: dict[tuple[str, str], Tensor]) -> dict[str, float]:
    """The four figures that a run is known by."""
    moderation = features.sources["openai"].taxonomy
    found = {
        "XSTest": logits["xstest", "test"][:, asked.column("User", ANY)],
        "OpenAI moderation": asked.any_of(moderation, logits["openai", "test"]),
    }
    rows = {"XSTest": features.records("xstest", "test"), "OpenAI moderation": features.records("openai", "test")}
    figures = {
        name: judge([r.unsafe for r in rows[name]], s.sigmoid() if name == "XSTest" else s, resamples=0).auprc
        for name, s in found.items()
    }
    answers = logits["responses", "test"][:, asked.column("Agent", ANY)].sigmoid()
    unsafe = [r.unsafe for r in features.records("responses", "test")]
    figures["DiaSafety responses"] = judge(unsafe, answers, resamples=0).auroc
    names = asked.taxonomies["User"].names
    columns = [asked.column("User", name) for name in names]
    known = [k for k, r in enumerate(features.records("prompts", "test")) if r.violates]
    guessed = logits["prompts", "test"][known][:, columns].argmax(1).tolist()
    right = [names[g] == features.records("prompts", "test")[k].category for g, k in zip(guessed, known, strict=True)]
    figures["hazard"] = float(np.mean(right)) if right else math.nan
    return figures


def judgement(
    asked: Questions, features: Features, logits: dict[tuple[str, str], Tensor], resamples: int
) -> dict[str, Any]:
    """One run's tables: binary, by category, by kind of prompt, grades, and examples."""
    moderation = features.sources["openai"].taxonomy
    any_prompt, any_answer = asked.column("User", ANY), asked.column("Agent", ANY)

    def unsafe(source: str, split: str = "test") -> list[bool]:
        return [r.unsafe for r in features.records(source, split)]

    def p(source: str, split: str = "test") -> Tensor:
        if source == "openai":
            return asked.any_of(moderation, logits[source, split])
        return logits[source, split][:, any_answer if source == "responses" else any_prompt].sigmoid()

    # Thresholds come from the validation splits, which are taken to be public: they are no part of what ε covers.
    cut = {s: threshold_at_fpr(unsafe(s, "val"), p(s, "val"), FPR) for s in ("prompts", "responses")}
    cut |= {"xstest": cut["prompts"], "openai": cut["prompts"]}
    binary = {
        name: {
            "at 0.5": asdict(judge(unsafe(s), p(s), 0.5, resamples)),
            "at 5% FPR on val": asdict(judge(unsafe(s), p(s), cut[s], resamples)),
        }
        for s, name in (
            ("xstest", "XSTest"),
            ("openai", "OpenAI moderation"),
            ("responses", "DiaSafety responses"),
            ("prompts", "held-out prompts"),
        )
    }

    def by_category(source: str, names: Sequence[str], found: Tensor) -> dict[str, dict[str, Any]]:
        rows = features.records(source, "test")
        violated = [[name in r.violates for name in names] for r in rows]
        everything = one_vs_all(violated, found, names, resamples=2 * resamples // 5)
        benign = one_vs_benign(violated, found, names, [not r.unsafe for r in rows], resamples=0)
        return {
            name: {"one-vs-all": asdict(everything[name]), "one-vs-benign": asdict(benign[name])}
            for name in names
            if any(name in r.violates for r in rows)
        }

    def own(source: str, role: Any) -> dict[str, dict[str, Any]]:
        names = asked.taxonomies[role].names
        columns = [asked.column(role, name) for name in names]
        return by_category(source, names, logits[source, "test"][:, columns].sigmoid())

    kinds: dict[str, list[bool]] = {}
    for record, flagged in zip(features.records("xstest", "test"), (p("xstest") >= 0.5).tolist(), strict=True):
        kinds.setdefault(f"{'unsafe' if record.unsafe else 'safe'}: {record.category}", []).append(flagged)
    return {
        "thresholds": cut,
        "binary": binary,
        "hazards": {
            "prompt": own("prompts", "User"),
            "response": own("responses", "Agent"),
            "OpenAI moderation, zero-shot": by_category(
                "openai", moderation.names, asked.under(moderation, logits["openai", "test"])
            ),
        },
        "XSTest by kind": {kind: float(np.mean(flags)) for kind, flags in sorted(kinds.items())},
        "system": protected(features, p("responses"), cut["responses"], p("prompts"), cut["prompts"]),
        "curves": {
            "XSTest": (unsafe("xstest"), p("xstest").tolist()),
            "OpenAI moderation": (unsafe("openai"), p("openai").tolist()),
        },
        "examples": examples(features.records("xstest", "test"), p("xstest")),
    }


def protected(features: Features, answers: Tensor, cut: float, asked: Tensor, cut_asked: float) -> dict[str, Any]:
    """Two systems behind the guard: the chatbots whose answers were labelled, and one that obeys every request."""
    rows = features.records("responses", "test")
    chatbots = System(tuple(str(r.category) for r in rows), tuple(r.unsafe for r in rows))
    itself = reference([chatbots.counts()])
    grades, benign = chatbots.protected(answers, cut, itself)
    known = [
        (r.category, bool(s >= cut_asked)) for r, s in zip(features.records("prompts", "test"), asked, strict=True)
    ]
    obedient = {
        name: float(np.mean([not blocked for category, blocked in known if category == name]))
        for name in features.sources["prompts"].taxonomy.names
        if any(category == name for category, _ in known)
    }
    return {
        "note": NOT_MLCOMMONS,
        "chatbots": grades.as_dict(),
        "chatbots, unguarded": Grades(chatbots.counts(), itself).as_dict(),
        "safe answers blocked": benign,
        "curve": chatbots.curve(answers, 41),
        "obedient": obedient,
    }


def examples(records: Sequence[Record], p: Tensor, each: int = 3) -> dict[str, list[tuple[str, float]]]:
    """The clearest hits and misses, shortened: an unsafe request is shown by its first words alone."""

    def some(unsafe: bool, most: bool) -> list[tuple[str, float]]:
        rows = sorted((float(s), k) for k, s in enumerate(p) if records[k].unsafe == unsafe)
        chosen = rows[::-1][:each] if most else rows[:each]
        return [(shortened(records[k]), round(s, 3)) for s, k in chosen]

    return {
        "unsafe and found": some(True, True),
        "unsafe and missed": some(True, False),
        "safe and let through": some(False, False),
        "safe and refused": some(False, True),
    }


def shortened(record: Record) -> str:
    """A safe text's first 80 characters; of an unsafe one the first four words."""
    if record.unsafe:
        return " ".join(record.message.split()[:4]) + " …"
    return record.message if len(record.message) <= 80 else record.message[:79] + "…"


def canaries(
    start: Head,
    dataset: TensorDataset,
    units: Sequence[str],
    recipe: Recipe,
    epsilon: float,
    delta: float,
    seed: int,
    count: int = 500,
) -> dict[str, float]:
    """An audit of the recipe: the same run with canaries, half of them in by a coin, that an attacker tells apart.

    A canary's features are a random direction, and its one label is a coin, too; the attacker scores it by how far the
    trained weights answer as labelled. The bound holds with 95% confidence; it can refute a claim and never prove one.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = dataset.tensors
    planted = torch.randn(count, inputs.shape[1], generator=generator)
    planted *= inputs.norm(dim=1).mean() / planted.norm(dim=1, keepdim=True)
    sides = torch.randint(2, (count,), generator=generator).float()
    wanted = torch.full((count, targets.shape[1]), math.nan)
    wanted[:, 0] = sides
    coins = audit.flip(count, generator)
    head = copy.deepcopy(start)
    both = TensorDataset(torch.cat([inputs, planted[coins]]), torch.cat([targets, wanted[coins]]))
    who = [*units, *(f"canary {k}" for k in range(int(coins.sum())))]
    privacy = Privacy(epsilon, delta, who)
    chosen = at(recipe, epsilon)
    run = train(head, both, lambda m, x, t: losses(m(x), t), chosen, privacy, seeds=seeds_of(seed, 99))
    moved = (planted @ (head.linear.weight - start.linear.weight)[0].detach()) * (2 * sides - 1)
    bound = audit.one_run(coins, moved, delta=delta)
    return {"claimed": run.epsilon, "lower bound": bound.epsilon, "canaries": count, "confidence": 0.95}
