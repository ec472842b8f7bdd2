"""Figures, by what is drawn in them; none needs a display."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

import dpkit
from dpkit import plots
from dpkit.accountants import (
    AccountingError,
    Gaussian,
    PLDAccountant,
    PoissonSampled,
    RDPAccountant,
    TradeOff,
    dpsgd,
    figures,
)
from dpkit.clipping import NormHistogram
from dpkit.ledger import Ledger
from tests.lives import begin
from tests.test_refusals import refused
from tests.test_statement import run
from tests.training import train

ACCOUNTANT = PLDAccountant().compose(dpsgd(1.0, 0.1, 30)).compose(dpsgd(2.0, 0.1, 30))


def lines(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    """What its lines are called, and where they go."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()}


def legend(figure: Any) -> str:
    return " | ".join(text.get_text() for text in figure.axes[0].get_legend().get_texts())


# --- ε over steps ---


def test_epsilon_over_steps() -> None:
    """Each point is what the accountant says after so many releases; a schedule's bend is where it was."""
    figure = plots.epsilon_over_steps(ACCOUNTANT, 1e-5, max_epsilon=3.0)
    found = lines(figure)
    counts, values = found["ε"]
    assert (counts[0], values[0], counts[-1]) == (0, 0.0, 60)
    assert len(counts) == 41
    for k in (1, 20, 21, 40):
        judge = PLDAccountant().compose(dpsgd(1.0, 0.1, int(min(counts[k], 30))))
        judge.compose(dpsgd(2.0, 0.1, int(max(0, counts[k] - 30))))
        assert values[k] == pytest.approx(judge.epsilon(1e-5), rel=1e-3)
    assert values == sorted(values)
    assert found["budget, ε = 3"][1] == [3.0, 3.0]
    assert figure.axes[0].get_xlim()[0] == 0
    assert "1e-05" in figure.axes[0].get_ylabel()


def test_every_source_has_the_same_curve(tmp_path: Path) -> None:
    life = run(accountant="rdp")
    train(life, 3)
    engine = life.engine
    judged = lines(plots.epsilon_over_steps(engine, 1e-5))["ε"]
    assert judged[1][-1] == engine.get_epsilon()  # by the engine's own accountant
    said = engine.statement()
    tight = lines(plots.epsilon_over_steps(said))["ε"]
    assert tight[0] == judged[0]
    assert tight[1][-1] == pytest.approx(said.verify()[1], rel=1e-3)
    assert tight[1][-1] < judged[1][-1]


def test_a_ledger_has_a_curve_for_each_run(tmp_path: Path) -> None:
    for sigma in (1.0, 2.0):
        begin(ledger=tmp_path / "l", noise_multiplier=sigma).train(lambda life: life.steps == 4)
    for source in (tmp_path / "l", str(tmp_path / "l"), Ledger(tmp_path / "l", None)):
        found = lines(plots.epsilon_over_steps(source, 1e-5))
        assert set(found) == {f"run {name}" for name in Ledger(tmp_path / "l", None).runs}
        ends = [values[-1] for _, values in found.values()]
        expected = [PLDAccountant().compose(dpsgd(sigma, 0.2, 4)).epsilon(1e-5) for sigma in (1.0, 2.0)]
        assert ends == pytest.approx(expected, rel=1e-4)
        assert all(counts == [0, 1, 2, 3, 4] for counts, _ in found.values())


def test_prefixes_are_the_whole_in_order() -> None:
    events = [(Gaussian(1.0), 1), (Gaussian(2.0), 100), (Gaussian(1.0), 3), (PoissonSampled(0.1, Gaussian(1.0)), 7)]
    for points in (1, 2, 7, 40, 1000):
        done: list[tuple[Any, int]] = []
        for count, fresh in figures.prefixes(events, points):
            for event, n in fresh:
                done += [(event, 1)] * n
            assert len(done) == count
        assert done == [(event, 1) for event, n in events for _ in range(n)]
        assert sum(1 for _ in figures.prefixes(events, points)) == min(points, 111)


# --- trade-off ---


def test_tradeoff() -> None:
    """Each point is the curve's bound; guessing is the diagonal; several curves by name."""
    figure = plots.tradeoff({"all": ACCOUNTANT, "one": TradeOff(PLDAccountant().compose(Gaussian(2.0)))})
    found = lines(figure)
    rates, best = found["all: best test, at most"]
    curve = TradeOff(ACCOUNTANT)
    for k in (0, 10, 20, 30):
        assert best[k] == pytest.approx(curve.tpr(rates[k]), rel=1e-3)
    assert all(tpr >= fpr for fpr, tpr in zip(rates, best, strict=True))
    assert found["guessing"][0] == found["guessing"][1]
    one = found["one: best test, at most"][1][20]
    assert one == pytest.approx(TradeOff(PLDAccountant().compose(Gaussian(2.0))).tpr(rates[20]))
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    engine = dpkit.PrivacyEngine(accountant="rdp")
    engine.accountant.compose(Gaussian(2.0))
    assert lines(plots.tradeoff(engine))["this run: best test, at most"][1][20] == one


# --- norms ---

HISTOGRAM = NormHistogram((0.5, 1.0, 2.0), (10.0, -3.0, 50.0, 23.0), 4.0, 5, 80.0)


def test_private_norms_say_that_they_are() -> None:
    figure = plots.gradient_norms(HISTOGRAM)
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [10.0, -3.0, 50.0, 23.0]
    starts = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert starts == [(0.25, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0)]
    assert "covered by ε" in axes.get_title()
    assert "NON-PRIVATE" not in axes.get_title()
    assert "±4" in axes.get_title()
    assert "91.2% clipped" in legend(figure) or "91.3% clipped" in legend(figure)
    assert lines(figure)["C; 91.2% clipped"][0] == [1.0, 1.0]


def test_counts_without_noise_are_not_called_private() -> None:
    axes = plots.gradient_norms(NormHistogram((1.0,), (1.0, 3.0), 0.0, 1, 4.0)).axes[0]
    assert "NON-PRIVATE" in axes.get_title()
    assert "covered by ε" not in axes.get_title()


def test_single_norms_are_labelled_non_private() -> None:
    norms = torch.tensor([0.1, 0.5, 0.999, 1.0, 1.001, 3.0, 0.0, math.inf])
    figure = plots.gradient_norms(norms, max_grad_norm=1.0, private=False)
    axes = figure.axes[0]
    assert "NON-PRIVATE" in axes.get_title()
    assert "37.5% clipped" in legend(figure)  # 1.001, 3 and the infinite one
    assert sum(bar.get_height() for bar in axes.patches) == 8
    below = sum(bar.get_height() for bar in axes.patches if bar.get_x() + bar.get_width() <= 1.0 + 1e-9)
    assert below == 4  # 0, 0.1, 0.5, 0.999: C is an edge, and the bin above it begins with C itself
    for same in ([0.3, 0.3], [1.0], [0.0]):
        assert plots.gradient_norms(same, max_grad_norm=1.0, private=False).axes[0].patches


def test_a_look_without_privacy_has_to_be_asked_for() -> None:
    with refused(dpkit.ConfigurationError, "norms of single records", "private=False"):
        plots.gradient_norms([0.5, 1.0], max_grad_norm=1.0)
    with refused(dpkit.ConfigurationError, "max_grad_norm = None"):
        plots.gradient_norms([0.5, 1.0], private=False)
    with refused(dpkit.ConfigurationError, "0 norms"):
        plots.gradient_norms([], max_grad_norm=1.0, private=False)
    with refused(dpkit.ConfigurationError, "no steps"):
        plots.gradient_norms(NormHistogram((1.0,), (0.0, 0.0), 0.0, 0, 0.0))


def test_from_a_run() -> None:
    """What an engine counted under its ε, and what it says without, side by side."""
    life = run(clipping="histogram")
    train(life)
    told = life.engine.norm_histogram
    figure = plots.gradient_norms(told)
    assert [bar.get_height() for bar in figure.axes[0].patches] == list(told.counts)
    assert "over 2 steps" in figure.axes[0].get_ylabel()
    norms = life.engine.norms_of(lambda m, b: (m(b[0]) - b[1]).square().mean(1), next(iter([life.loader.dataset[:]])))
    assert plots.gradient_norms(norms, max_grad_norm=life.engine.max_grad_norm, private=False)


# --- utility ---


def test_utility() -> None:
    figure = plots.utility(
        {8.0: (0.9, 0.85, 0.95), 1.0: 0.7, 3.0: 0.8},
        metric="accuracy",
        baseline=(0.93, 0.92, 0.94),
        reference={"chance": 0.5},
    )
    axes = figure.axes[0]
    [container] = axes.containers
    assert list(container.lines[0].get_xdata()) == [1.0, 3.0, 8.0]
    assert list(container.lines[0].get_ydata()) == [0.7, 0.8, 0.9]
    [bars] = container.lines[2]
    ends = [float(end[1]) for segment in bars.get_segments() for end in segment]
    assert ends == pytest.approx([0.7, 0.7, 0.8, 0.8, 0.85, 0.95])
    assert lines(figure)["no privacy"][1] == [0.93, 0.93]
    assert lines(figure)["chance"][1] == [0.5, 0.5]
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "3", "8"]
    assert axes.get_ylabel() == "accuracy"
    for bad in ({}, {0.0: 1.0}, {math.inf: 1.0}, {-1.0: 0.5}):
        with refused(dpkit.ConfigurationError, "logarithmic"):
            plots.utility(bad, metric="accuracy")


# --- manners ---


def test_refusals() -> None:
    with refused(dpkit.ConfigurationError, "no delta"):
        plots.epsilon_over_steps(ACCOUNTANT)
    with refused(dpkit.ConfigurationError, "a dict", "pass an engine"):
        plots.epsilon_over_steps({}, 1e-5)
    with refused(dpkit.ConfigurationError, "a float"):
        plots.tradeoff(3.0)
    with pytest.raises(AccountingError, match="nothing was released"):
        plots.epsilon_over_steps(RDPAccountant(), 1e-5)
    with pytest.raises(AccountingError, match="no curves"):
        plots.tradeoff({})


def test_no_display_no_pyplot_and_no_matplotlib(tmp_path: Path) -> None:
    """A figure is a Figure, whatever is installed besides; without matplotlib the extra is named."""
    code = (
        "import sys\n"
        "from dpkit import plots\n"
        "from dpkit.accountants import PLDAccountant, Gaussian\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figure = plots.epsilon_over_steps(PLDAccountant().compose(Gaussian(1.0), 3), 1e-5)\n"
        f"figure.savefig({str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "for name in [m for m in sys.modules if m.partition('.')[0] == 'matplotlib']: sys.modules[name] = None\n"
        "try: plots.utility({1.0: 0.5}, metric='x')\n"
        "except Exception as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "Cure: pip install 'dpkit[plots]'" in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 1000
