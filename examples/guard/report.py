"""What is said of the encoder's runs: the tables, the plots, and what must be known before believing them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from .metrics import within
from .page import Part, Row, Table
from .upper import NAME

HEADLINES = {
    "XSTest": ("AUPRC", 0.444),
    "OpenAI moderation": ("AUPRC", 0.256),
    "DiaSafety responses": ("AUROC", 0.5),
    "hazard": ("accuracy", 1 / 12),
}
# What was aimed at, without privacy and at ε = 8; at any ε also 95% of the figure without privacy.
GOALS = {
    "XSTest": (0.82, 0.79),
    "OpenAI moderation": (0.50, 0.45),
    "DiaSafety responses": (0.82, 0.80),
    "hazard": (0.78, 0.65),
}
TRIED = (
    "Three folds of training and validation prompts had, with a simulation of these steps, hazards of .765 "
    "without privacy and .720, .697 and .660 at ε = 8, 3 and 1; the recipe before (no public phrases, no "
    "whitening, one rate, 220 steps of 1,024) .736, .680, .604 and .366. Tried in place of a part of it, without "
    "privacy and at ε = 8: all directions (.763, .708); hashed words beside the features (.764, .709); batches of "
    "4,096, half the steps, twice the rate (.755, .724). And with batches of 1,024, where it had .766 and .715: "
    "no whitening (.745, .697); whitening nearer to full (.753, .703); double weight on the hazards (.755, .714); "
    "twice the rate (.755, .686); the average over the last half of the steps (.761, .717). A linear layer fitted to "
    "such features by other means ends there, too; with the encoder trained on the hazards alone, one fold rose from "
    ".744 to .780. Tried since: three times as many public phrases, public requests that only sound harmful among the "
    "rows, and a policy that asks only what was learned of prompts. On the folds its hazards were better (.757 and "
    ".723 against .752 and .708), on the validation split, where two seeds of the whole run were judged at ε = 8, "
    "they were not (.674 against .688), and the simpler recipe stays. The other one's figures on the test sets, "
    "without privacy and at ε = 8, 3 and 1: XSTest .817, .808, .796, .797; OpenAI moderation .548, .530, .540, .556; "
    "DiaSafety .834, .829, .820, .799; hazard .763, .710, .700, .653."
)
TRIED_SINCE = (
    "Tried after that, on three folds of prompts and answers with noise as for all conversations (so that figures "
    "are lower). Clipping to 0.25 at four times the rate, in place of 1, was taken: the hazards at ε = 8 had .708 "
    "against .701 (better with each of three seeds), at 3 .667 both, at 1 .645 against .642; held-out answers, read "
    "by themselves under OpenAI's policy, .653 against .642, .636 against .619, .595 against .572; answers in their "
    "context the same within .002. Not taken, at ε = 8, one seed, where clipping to 1 had hazards of .700, such "
    "answers .636 and answers in context .838: 500 directions (.718, .630, .831); features of one length (.693, "
    ".641, .837); the average over the last quarter (.700, .636, .837), or over the last half at 1.5 times the rate "
    "(.702, .634, .835); clipping to 2 (.687, .616, .829); changes of the weights shrunk by their share of noise "
    "(.670, .557, .838). None of this shows how to come closer to the run without privacy on such texts: that one "
    "has .629 there."
)
TRIED_ENCODER = (
    "The encoder's last layer trained as well (--train last): four epochs of Adam over the prompts, layer and head "
    "together, from the run without privacy; the "
    "answers' questions stay with the frozen encoder, so DiaSafety's figure does. On the folds hazards rose from "
    ".738 to .757 with texts cut to half, one of them from .739 to .782 with whole ones; with the hazards' rows "
    "alone to .760 (two layers .765, biases and LayerNorms of two layers .752, no layer .740). Two layers on all "
    "prompts were the same on two folds (.776 and .749, one layer .774 and .743) at twice the cost. With privacy, "
    "one fold at the noise of ε = 8: adapters of rank 64 on the last layer's six matrices, the first factors fixed "
    "by public phrases, had .709, .703 and .695 after 60, 80 and 100 of 120 steps, where it was stopped, against "
    ".682, .697 and .684: within the error of 478 prompts, at 5.8 s a step against 1.6 s. A whole run would take "
    "half an hour for each ε and seed, and the private runs keep the frozen encoder."
)


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """What goes into the JSON file: all but the curves' points, which are drawn."""
    judged = {name: {k: v for k, v in of.items() if k != "curves"} for name, of in results["judged"].items()}
    return {k: v for k, v in results.items() if k != "spent"} | {"judged": judged}


# ------------------------------------------------------------------- what is said: ("h2", text), ("p", text), ...


def sections(results: dict[str, Any], command: str) -> Iterable[Part]:
    """The page, as a sequence of parts; each is a kind and its content."""
    runs = {run["name"]: run for run in results["runs"]}
    first = results["judged"]
    yield "h1", "A safety guard, privately fine-tuned"
    data, recipe = results["data"], results["recipe"]
    yield (
        "lead",
        f"A frozen MiniLM and {data['trained parameters']:,} trained weights, fitted to {data['training rows']:,} "
        f"labelled prompts and chatbot answers of {data['units']:,} conversations; without privacy, and so that "
        "nobody can tell whether any one conversation was among them."
        + (f' "{NAME}" goes on from there and trains the last layer, on the prompts.' if NAME in runs else ""),
    )
    yield (
        "p",
        f"Command: `{command}`. Seeds {', '.join(map(str, recipe['seeds']))}; tables below the first are of the first.",
    )
    yield "h2", "What privacy costs"
    yield "table", headline_table(results, runs)
    yield (
        "p",
        "XSTest: 450 prompts in matched style, 44.4% unsafe; nothing of it was trained on. OpenAI moderation: its "
        "policy is met by mapping its categories by name, with nothing trained for it; rows about minors are left "
        "out, so that the figures do not compare with published ones (for orientation, on the full set: Llama Guard "
        ".847, OpenAI's API .856). DiaSafety: answers to prompts of which none was trained on. Hazard: which of 12 "
        "an unsafe held-out prompt violates. Where several seeds ran: the mean, and in brackets the range.",
    )
    if "ε = 8" in results["headlines"]:
        yield "table", goal_table(results)
        yield "p", TRIED
        yield "p", TRIED_SINCE
        yield "p", TRIED_ENCODER
    yield "plots", plots(results)
    yield "h2", "What is promised"
    for run in results["runs"]:
        if run["statement"]:
            yield "details", (f"{run['name']}: the engine's statement", run["statement"])
    yield (
        "p",
        f"δ = 1/(10 units) = {data['delta']:.2g}. The unit is a conversation: all answers to one prompt together. "
        "Each private run is judged by itself; who is given several of them is given the sum of their ε. The seeds "
        "are known, so that the runs can be repeated: to release a model, give no generators. Thresholds come from "
        "the validation splits, which are taken to be public. What all runs begin with (the space, the start) comes "
        "from public texts alone. The recipe was chosen by cross-validation on the training and validation prompts; "
        "that choice is not in ε. XSTest, OpenAI moderation, DiaSafety's test split and the hazards of "
        "the test prompts had been looked at in earlier, exploratory runs, the first two while features and the "
        "policy's mapping were chosen: this favours the four figures by an unknown amount.",
    )
    if results.get("audit"):
        found = results["audit"]
        yield (
            "p",
            f"Audit: {found['canaries']} canaries were planted in one more run at ε = {found['claimed']:.2f}. The "
            f"attacker who sees the weights proves ε ≥ {found['lower bound']:.2f} (95% confidence): below what is "
            "claimed. An audit can refute a claim, and never prove one.",
        )
    yield "h2", "By hazard"
    yield (
        "p",
        "Under privacy the rare hazards suffer first, and an overall number hides it. A guess has the prevalence "
        "as AUPRC.",
    )
    for which in next(iter(first.values()))["hazards"]:
        yield "table", hazard_table(results, which)
    yield "h2", "Decisions"
    yield "table", decision_table(results)
    yield "table", kinds_table(results)
    yield "h2", "The system behind the guard"
    yield "lead", next(iter(first.values()))["system"]["note"]
    yield "table", grade_table(results)
    yield (
        "p",
        "The system: the chatbots whose answers DiaSafety labelled (test split), and itself, unguarded, as the "
        "reference. A guard blocks an answer at the threshold that blocks 5% of safe validation answers.",
    )
    yield "table", obedient_table(results)
    yield "h2", "Hits and misses"
    yield "p", "XSTest, at the first private run; unsafe prompts are shown by their first words."
    chosen = next((name for name, run in runs.items() if math.isfinite(run["epsilon"])), "no privacy")
    for title, rows in first[chosen]["examples"].items():
        yield "table", (f"{title} ({chosen})", ("prompt", "P(unsafe)"), [(text, f"{p:.3f}") for text, p in rows])
    yield "h2", "What it took"
    yield "table", cost_table(results)
    told = ", ".join(f"{key} {value}" for key, value in recipe.items())
    yield (
        "p",
        f"One recipe for all runs: {told}. Momentum 0.9, rate falling linearly; with privacy from lr, or ε where that "
        "is less, over max_grad_norm.",
    )


def headline_table(results: dict[str, Any], runs: dict[str, Any]) -> Table:
    heads = ["run", "ε spent", *(f"{name} {metric}" for name, (metric, _) in HEADLINES.items())]
    rows: list[Row] = [["a guess", "0", *(f"{base:.3f}" for _, base in HEADLINES.values())]]
    for name, seeds in results["headlines"].items():
        cells = []
        for title in HEADLINES:
            values = [one[title] for one in seeds]
            spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        epsilon = runs[name]["epsilon"]
        rows.append([name, "∞" if math.isinf(epsilon) else f"{epsilon:.2f}", *cells])
    return "Trained on prompts and responses, judged elsewhere", heads, rows


def goal_table(results: dict[str, Any]) -> Table:
    means = {
        run: {name: float(np.mean([one[name] for one in seeds])) for name in HEADLINES}
        for run, seeds in results["headlines"].items()
    }
    free, private, trained = means["no privacy"], means["ε = 8"], means.get(NAME)
    close = within(private, free)

    def said(reached: bool, figure: str) -> str:
        return f"{figure}, {'reached' if reached else 'MISSED'}"

    rows: list[Row] = []
    for name, (goal, goal_at_8) in GOALS.items():
        alone = said(free[name] >= goal, f"≥ {goal:.2f}: {free[name]:.3f}")
        at_8 = said(private[name] >= goal_at_8, f"≥ {goal_at_8:.2f}: {private[name]:.3f}")
        row: Row = [name, alone, at_8, said(close[name], f"≥ 95%: {private[name] / free[name]:.1%}")]
        if trained is not None:
            row.insert(2, said(trained[name] >= goal, f"≥ {goal:.2f}: {trained[name]:.3f}"))
        rows.append(row)
    heads = ["figure", "no privacy", *([NAME] if trained is not None else []), "ε = 8", "ε = 8 of no privacy"]
    return "Goals", heads, rows


def hazard_table(results: dict[str, Any], which: str) -> Table:
    trained = results["rows"].get(which, {})
    judged = {run: of["hazards"][which] for run, of in results["judged"].items()}
    free = next(iter(judged.values()))
    heads = [
        "category",
        *(["training rows"] if trained else []),
        "test rows",
        "prevalence",
        *judged,
        "vs benign",
        "95% of the first",
    ]
    rows = []
    for name, of in sorted(free.items(), key=lambda item: -trained.get(item[0], 0)):
        one = of["one-vs-all"]
        cells = [f"{hazards[name]['one-vs-all']['auprc']:.3f}" for hazards in judged.values()]
        private = list(judged.values())[-1][name]["one-vs-benign"]["auprc"]
        benign = f"{of['one-vs-benign']['auprc']:.3f} → {private:.3f}"
        interval = f"{one['auprc_low']:.2f} to {one['auprc_high']:.2f}"
        count = [trained.get(name, 0)] if trained else []
        rows.append(
            [name, *count, round(one["n"] * one["prevalence"]), f"{one['prevalence']:.3f}", *cells, benign, interval]
        )
    return f"{which}: AUPRC one-vs-all; and one-vs-benign, without privacy → the last run", heads, rows


def decision_table(results: dict[str, Any]) -> Table:
    heads = (
        "judged on",
        "run",
        "threshold",
        "prevalence",
        "AUPRC (95%)",
        "AUROC",
        "precision",
        "recall",
        "F1",
        "FPR",
        "ECE",
    )
    rows: list[Row] = []
    for where in next(iter(results["judged"].values()))["binary"]:
        for run, of in results["judged"].items():
            for at, m in of["binary"][where].items():
                interval = f"{m['auprc']:.3f} ({m['auprc_low']:.3f} to {m['auprc_high']:.3f})"
                numbers = [f"{m[k]:.3f}" for k in ("auroc", "precision", "recall", "f1", "fpr", "ece")]
                rows.append([where, run, f"{m['threshold']:.3f}, {at}", f"{m['prevalence']:.3f}", interval, *numbers])
    return "Binary decisions (held-out prompts are easy: their sources give them away)", heads, rows


def kinds_table(results: dict[str, Any]) -> Table:
    kinds = next(iter(results["judged"].values()))["XSTest by kind"]
    rows = [
        [kind, *(f"{of['XSTest by kind'][kind]:.2f}" for of in results["judged"].values())] for kind in sorted(kinds)
    ]
    return (
        "XSTest: share flagged at 0.5, by kind of prompt (flagged safe ones are over-refusals)",
        ["kind", *results["judged"]],
        rows,
    )


def grade_table(results: dict[str, Any]) -> Table:
    heads = ("system", "v0.5", "v1.0", "v1.0 at 95%", "unsafe answers that pass", "safe answers blocked")
    plain = next(iter(results["judged"].values()))["system"]["chatbots, unguarded"]

    def row(name: str, graded: dict[str, Any], blocked: float) -> Row:
        items, unsafe = (sum(h[key] for h in graded["hazards"]) for key in ("items", "unsafe"))
        ends = " to ".join(dict.fromkeys(graded["v1.0 at the ends of the interval"]))
        return [
            name,
            graded["v0.5"],
            graded["v1.0"],
            ends,
            f"{unsafe} of {items} ({unsafe / items:.1%})",
            f"{blocked:.1%}",
        ]

    rows = [row("no guard", plain, 0.0)]
    for run, of in results["judged"].items():
        rows.append(row(f"guard, {run}", of["system"]["chatbots"], of["system"]["safe answers blocked"]))
    return "Grades by MLCommons' formulas (v0.5: the worst hazard; v1.0: all items)", heads, rows


def obedient_table(results: dict[str, Any]) -> Table:
    runs = results["judged"]
    names = next(iter(runs.values()))["system"]["obedient"]
    rows = [[n, "1.00", *(f"{of['system']['obedient'][n]:.2f}" for of in runs.values())] for n in names]
    return (
        "A system that obeys every request: share of unsafe held-out prompts that pass the guard",
        ["hazard", "no guard", *runs],
        rows,
    )


def cost_table(results: dict[str, Any]) -> Table:
    rows, free = [], results["runs"][0]["seconds_per_step"]
    for run in results["runs"]:
        sigma = "" if run["noise_multiplier"] is None else f"{run['noise_multiplier']:.3f}"
        ms = 1000 * run["seconds_per_step"]
        ratio = f"{run['seconds_per_step'] / free:.2f}" if free else ""
        rows.append([run["name"], sigma, run["steps"], f"{ms:.1f}", ratio, f"{run['peak_mib']:.0f}"])
    return (
        "Processor time of a step, and the process's largest memory until then",
        ("run", "σ", "steps", "ms a step", "ratio", "MiB"),
        rows,
    )


# ------------------------------------------------------------------------------------------------------ drawing


def plots(results: dict[str, Any]) -> dict[str, bytes]:
    """The figures, as PNG."""
    runs = results["judged"]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, (name, of) in enumerate(runs.items()):
        for axes, where in ((left, "XSTest"), (middle, "OpenAI moderation")):
            labels, scores = of["curves"][where]
            precision, recall, _ = precision_recall_curve(labels, scores)
            axes.plot(recall, precision, color=f"C{k}", label=name)
            axes.set(title=where, xlabel="recall", ylabel="precision", ylim=(0, 1.02))
            if k == 0:
                axes.axhline(np.mean(labels), color="grey", linestyle=":", label="a guess")
        blocked, passed = zip(*of["system"]["curve"], strict=True)
        right.plot(blocked, passed, color=f"C{k}", label=name)
    right.set(title="Chatbots behind the guard", xlabel="safe answers blocked", ylabel="unsafe answers that pass")
    found = {"precision and recall; violations against false refusals": figure}
    spent = {name: values for name, values in results["spent"].items() if values}
    if spent:
        second = Figure(figsize=(6, 3.2), layout="constrained")
        axes = second.subplots()
        for name, values in spent.items():
            axes.plot(range(1, len(values) + 1), values, label=name)
        axes.set(title="Privacy spent", xlabel="step", ylabel="ε", ylim=(0, None))
        found["ε against steps"] = second
    drawn = {}
    for title, one in found.items():
        for axes in one.axes:
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        one.savefig(buffer, format="png", dpi=110)
        drawn[title] = buffer.getvalue()
    return drawn
