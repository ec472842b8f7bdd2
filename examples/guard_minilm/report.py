"""How good each run is, and what its numbers mean: the table, the plot and the files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from .data import Prompts

if TYPE_CHECKING:
    from .train import Recipe, Run

JUDGED = {"test": "held-out prompts (same sources)", "xstest": "XSTest (other authors, matched style)"}
FILES = ("guard.json", "guard.md", "guard.png")


@dataclass(frozen=True)
class Metrics:
    """How well scores rank unsafe above safe, and how well the threshold 0.5 decides."""

    auprc: float
    auprc_pm: float  # half the width of a 95% bootstrap interval over the judged prompts
    auroc: float
    f1: float


def judge(labels: list[int], scores: list[float], resamples: int = 500) -> Metrics:
    """Metrics of ``scores`` (P(unsafe)) against ``labels`` (1 is unsafe)."""
    y, p = np.array(labels), np.array(scores)
    draws = np.random.default_rng(0).integers(len(y), size=(resamples, len(y)))
    low, high = np.quantile([average_precision_score(y[i], p[i]) for i in draws], [0.025, 0.975])
    decided = f1_score(y, p > 0.5, zero_division=0.0)
    return Metrics(average_precision_score(y, p), (high - low) / 2, roc_auc_score(y, p), decided)


class Bar(Progress):
    """A progress bar for each run, with the loss and the ε spent so far."""

    def __init__(self, console: Console) -> None:
        fields = ("loss {task.fields[loss]:.3f}", "ε {task.fields[epsilon]}")
        columns = (BarColumn(), MofNCompleteColumn(), *map(TextColumn, fields), TimeElapsedColumn())
        super().__init__("{task.description}", *columns, console=console)

    def begin(self, name: str, steps: int) -> None:
        """A new run begins."""
        self.current = self.add_task(f"{name:<10}", total=steps, loss=math.nan, epsilon="-")

    def count(self, loss: float, epsilon: float) -> None:
        """One more step is done."""
        self.update(self.current, advance=1, loss=loss, epsilon="∞" if math.isinf(epsilon) else f"{epsilon:.2f}")


@dataclass
class Report:
    """All runs, judged."""

    prompts: dict[str, Prompts]
    delta: float
    recipe: Recipe
    seed: int
    runs: list[Run] = field(default_factory=list)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    metrics: dict[str, dict[str, Metrics]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The yardstick that learns nothing: flag every prompt."""
        self._score("flag all", {split: [1.0] * len(self.prompts[split].labels) for split in JUDGED})

    def add(self, run: Run, scores: dict[str, list[float]]) -> None:
        """Judge ``run`` by its scores on each split."""
        self.runs.append(run)
        self._score(run.name, scores)

    def _score(self, name: str, scores: dict[str, list[float]]) -> None:
        self.scores[name] = scores
        self.metrics[name] = {split: judge(self.prompts[split].labels, some) for split, some in scores.items()}

    @property
    def notes(self) -> list[str]:
        """What a reader must know before believing the table."""
        train, test = self.prompts["train"], self.prompts["test"]
        short = roc_auc_score(test.labels, [-len(text) for text in test.texts])
        recipe = ", ".join(f"{name} {value:g}" for name, value in asdict(self.recipe).items())
        return [
            f"ε holds at δ = 1/(10 n) = {self.delta:.2g} for adding or removing one of the n = {len(train.labels):,} "
            "training prompts: a prompt is one record, not its writer. Each private run is judged by itself; "
            "who is given several of them is given the sum of their ε.",
            "XSTest is the headline. The held-out prompts are easy: safe and unsafe ones come from different sources, "
            f"and their length alone has AUROC {short:.2f}.",
            f"XSTest has {len(self.prompts['xstest'].labels)} prompts: ± is a 95% bootstrap interval, and two runs "
            "closer than that are not told apart.",
            f"One recipe for all runs: {recipe}; threshold 0.5, seed {self.seed}. It was fixed before these runs, and "
            "nothing is chosen or computed from the data (no class weights, no early stopping; the "
            "validation split is unused). It was found by trials on these same prompts, XSTest included, while the "
            "example was written: that search is not in ε, and favours the numbers a little.",
            "The pre-trained weights saw public web text: ε covers the fine-tuning prompts only. The loss on the "
            "progress bar is computed on private records without noise: it is for your eyes and is not written.",
            "The seed makes the draw and the noise repeatable, so known to whoever knows it: to release a model, give "
            "neither generator.",
        ]

    def rows(self) -> list[list[str]]:
        """The table's cells."""
        spent = {run.name: f"{run.epsilons[-1]:.2f}" if run.epsilons else "∞" for run in self.runs}
        return [
            [name, spent.get(name, "0")]
            + [
                cell
                for m in (of[split] for split in JUDGED)
                for cell in (f"{m.auprc:.3f} ± {m.auprc_pm:.3f}", f"{m.auroc:.3f}", f"{m.f1:.3f}")
            ]
            for name, of in self.metrics.items()
        ]

    @property
    def titles(self) -> list[str]:
        """What the two groups of columns are judged on, with the prevalence: the AUPRC of a guess."""
        return [f"{title}: {self.prompts[split].prevalence:.3f} unsafe" for split, title in JUDGED.items()]

    def print(self, console: Console) -> None:
        """The table and the notes."""
        for i, title in enumerate(self.titles):
            table = Table("run", "ε spent", "AUPRC", "AUROC", "F1", title=title, title_justify="left")
            for row in self.rows():
                table.add_row(*row[:2], *row[2 + 3 * i : 5 + 3 * i])
            console.print(table)
        for note in self.notes:
            console.print(f"· {note}")

    def write(self, folder: Path) -> None:
        """guard.json, guard.md and guard.png."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "guard.json").write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "guard.md").write_text(self.as_markdown(), encoding="utf-8")
        self.plot(folder / "guard.png")

    def as_dict(self) -> dict[str, object]:
        """Everything but the prompts and the scores."""
        return {
            "recipe": asdict(self.recipe) | {"seed": self.seed},
            "train_prompts": len(self.prompts["train"].labels),
            "prevalence": {split: self.prompts[split].prevalence for split in JUDGED},
            "runs": [asdict(run) for run in self.runs],
            "metrics": {name: {split: asdict(m) for split, m in of.items()} for name, of in self.metrics.items()},
            "notes": self.notes,
        }

    def as_markdown(self) -> str:
        """The table and the notes."""
        heads = ["run", "ε spent"] + [f"{split} {metric}" for split in JUDGED for metric in ("AUPRC", "AUROC", "F1")]
        lines = [heads, ["---"] * len(heads), *self.rows()]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        notes = "\n".join(f"- {note}" for note in [*self.titles, *self.notes])
        return f"# A prompt guard, privately fine-tuned\n\n{table}\n\n![ε and precision-recall](guard.png)\n\n{notes}\n"

    def plot(self, path: Path) -> None:
        """ε against steps, and precision-recall on XSTest."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, run in enumerate(self.runs):
            colour = f"C{i}"
            if run.epsilons:
                left.plot(range(1, len(run.epsilons) + 1), run.epsilons, color=colour, label=run.name)
            labels, scores = self.prompts["xstest"].labels, self.scores[run.name]["xstest"]
            precision, recall, _ = precision_recall_curve(labels, scores)
            auprc = self.metrics[run.name]["xstest"].auprc
            right.plot(recall, precision, color=colour, label=f"{run.name}: AUPRC {auprc:.3f}")
        prevalence = self.prompts["xstest"].prevalence
        right.axhline(prevalence, color="grey", linestyle=":", label=f"a guess: {prevalence:.3f}")
        left.set(xlabel="step", ylabel=f"ε spent at δ = {self.delta:.2g}", ylim=(0, None), title="Privacy spent")
        left.xaxis.get_major_locator().set_params(integer=True)
        right.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="XSTest")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
