"""The program `dpkit`: its answers are the library's, its errors say what to do, and it does not wait for torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dpkit
import dpkit.__main__ as program
from dpkit.accountants import PLDAccountant, TradeOff, calibrate, dpsgd, epsilon, rounding
from tests.lives import begin
from tests.test_statement import run
from tests.training import train

COMMON = ["--noise-multiplier", "1.1", "--sample-rate", "0.01", "--steps", "500"]
JUDGE = PLDAccountant().compose(dpsgd(1.1, 0.01, 500))
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a command in this process: (exit code, standard output, standard error)."""

    def asked(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = program.main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return asked


def python(*arguments: str, blocked: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, in which some packages cannot be imported."""
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    code += "from dpkit.__main__ import main\nsys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def figures_of(text: str, name: str) -> list[float]:
    """The numbers in the table's row that begins with ``name``."""
    [row] = [line for line in text.splitlines() if line.strip().startswith(name)]
    return [float(x) for x in re.findall(r"\d[\d.]*(?:e-?\d+)?", row.strip().removeprefix(name))]


# --- the accountants' commands ---


def test_epsilon_is_shown_with_what_it_means(ask: Ask) -> None:
    code, text, _ = ask("epsilon", *COMMON, "--delta", "1e-5")
    told = json.loads(ask("epsilon", *COMMON, "--delta", "1e-5", "--json")[1])
    assert code == 0
    assert (told["epsilon_lower"], told["epsilon"]) == JUDGE.epsilon_bounds(1e-5)
    assert told["strength"]["tpr"]["0.01"] == pytest.approx(TradeOff(JUDGE).tpr(0.01), rel=1e-4)
    assert told["strength"]["advantage"] == pytest.approx(TradeOff(JUDGE).advantage, rel=1e-2)  # both are bounds
    high, low, delta = figures_of(text, "epsilon")
    assert (high, low, delta) == (
        float(rounding.up(told["epsilon"], 6)),
        float(rounding.down(told["epsilon_lower"], 6)),
        1e-5,
    )
    assert low <= told["epsilon_lower"] <= told["epsilon"] <= high
    assert figures_of(text, "advantage")[0] >= told["strength"]["advantage"]
    assert figures_of(text, "TPR at 1% FPR")[0] >= told["strength"]["tpr"]["0.01"]


def test_the_quick_accountant_is_bounded_by_the_tight_one(ask: Ask) -> None:
    told = json.loads(ask("epsilon", *COMMON, "--delta", "1e-5", "--accountant", "rdp", "--json")[1])
    assert told["epsilon"] == epsilon(noise_multiplier=1.1, sample_rate=0.01, steps=500, delta=1e-5, accountant="rdp")
    assert told["epsilon_lower"] == JUDGE.epsilon_bounds(1e-5)[0] < told["epsilon"]


def test_the_rate_from_batch_size_and_records(ask: Ask) -> None:
    other = ["--noise-multiplier", "1.1", "--batch-size", "5", "--records", "500", "--epochs", "5", "--delta", "1e-5"]
    assert ask("epsilon", *other) == ask("epsilon", *COMMON, "--delta", "1e-5")
    for bad in (
        ["--batch-size", "5"],
        ["--records", "9"],
        ["--batch-size", "5", "--records", "9", "--sample-rate", "1"],
    ):
        code, _, err = ask("epsilon", "--noise-multiplier", "1", "--steps", "3", "--delta", "1e-5", *bad)
        assert code == 2
        assert "--batch-size with --records" in err
    code, _, err = ask("epsilon", *other[:3], "501", *other[4:])
    assert code == 2
    assert "probability" in err


@pytest.mark.parametrize(
    ("given", "unknown"),
    [
        (["--sample-rate", "0.01", "--steps", "500"], "noise_multiplier"),
        (["--noise-multiplier", "1.1", "--steps", "500"], "sample_rate"),
        (["--noise-multiplier", "1.1", "--sample-rate", "0.01"], "steps"),
        (["--noise-multiplier", "1.1", "--epochs", "4"], "sample_rate"),
    ],
)
def test_calibrate_finds_what_is_missing(ask: Ask, given: list[str], unknown: str) -> None:
    asked = ["calibrate", *given, "--target-epsilon", "1", "--delta", "1e-5"]
    code, text, _ = ask(*asked)
    told = json.loads(ask(*asked, "--json")[1])
    assert code == 0
    assert 0.98 < told["epsilon"] <= 1.0
    shown = figures_of(text, unknown)[0]
    assert shown >= told[unknown] if unknown == "noise_multiplier" else shown <= told[unknown]
    assert shown == pytest.approx(told[unknown], rel=1e-6)
    setting = {k: told[k] for k in ("noise_multiplier", "sample_rate", "steps")}
    assert epsilon(**setting, delta=1e-5) == pytest.approx(told["epsilon"], rel=1e-4)
    if unknown == "noise_multiplier":
        assert told[unknown] == calibrate(target_epsilon=1.0, delta=1e-5, sample_rate=0.01, steps=500)


def test_tradeoff(ask: Ask) -> None:
    code, text, _ = ask("tradeoff", *COMMON, "--fpr", "0.001", "0.05")
    told = json.loads(ask("tradeoff", *COMMON, "--fpr", "0.001", "0.05", "--json")[1])
    assert code == 0
    for fpr in ("0.001", "0.05"):
        low, high = TradeOff(JUDGE).tpr_bounds(float(fpr))
        assert told["tpr"][fpr] == pytest.approx(high, rel=1e-4)
        assert told["tpr_lower"][fpr] == pytest.approx(low, rel=1e-3)
        assert figures_of(text, f"TPR at {100 * float(fpr):g}% FPR")[0] >= told["tpr"][fpr]
    assert "mu =" in text
    assert float(rounding.up(told["gdp_mu"], 4)) == figures_of(text, "Gaussian DP")[0]


def test_no_noise_is_told_as_it_is(ask: Ask) -> None:
    arguments = ["--noise-multiplier", "0", "--sample-rate", "0.01", "--steps", "10", "--delta", "1e-5"]
    told = json.loads(ask("epsilon", *arguments, "--json")[1])
    assert (told["epsilon"], told["epsilon_lower"]) == ("inf", "inf")
    assert told["strength"]["advantage"] == pytest.approx(1 - 0.99**10)
    assert "epsilon  at most inf" in ask("epsilon", *arguments)[1]


# --- files ---


def test_budget_exceeded_is_an_exit_code(tmp_path: Path, ask: Ask) -> None:
    for sigma in (1.0, 2.0):
        begin(ledger=tmp_path / "l", noise_multiplier=sigma).train(lambda life: life.steps == 3)
    code, text, _ = ask("budget", str(tmp_path / "l"))
    told = json.loads(ask("budget", str(tmp_path / "l"), "--json")[1])
    assert code == 0
    assert figures_of(text, "all 2 together")[0] >= told["epsilon"]
    assert told["epsilon"] == PLDAccountant().compose(dpsgd(1.0, 0.2, 3)).compose(dpsgd(2.0, 0.2, 3)).epsilon(1e-5)
    assert 0.0 < told["strength"]["advantage"] < 1.0
    within, over = (str(told["epsilon"] * factor) for factor in (1.001, 0.999))
    assert ask("budget", str(tmp_path / "l"), "--max-epsilon", within)[0] == 0
    code, text, _ = ask("budget", str(tmp_path / "l"), "--max-epsilon", over)
    assert code == 1
    assert "exceeded" in text
    assert ask("budget", str(tmp_path / "l"), "--max-epsilon", over, "--json")[0] == 1


def test_statement_of_a_checkpoint(tmp_path: Path, ask: Ask) -> None:
    life = run()
    train(life)
    life.engine.save_checkpoint(tmp_path / "c")
    said = life.engine.statement()
    checkpoint = str(tmp_path / "c")
    assert ask("statement", checkpoint) == (0, f"{said}\n", "")
    assert ask("statement", checkpoint, "--format", "markdown")[1].strip() == said.markdown().strip()
    assert ask("statement", checkpoint, "--format", "card")[1].startswith("---\ntags:")
    assert json.loads(ask("statement", checkpoint, "--json")[1]) == said.to_dict()
    assert json.loads(ask("statement", checkpoint, "--json", "--delta", "1e-3")[1])["guarantee"]["delta"] == 1e-3
    code, text, _ = ask("statement", checkpoint, "--format", "json")
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    stored = str(tmp_path / "s.json")
    assert (code, ask("statement", stored)[1]) == (0, f"{said}\n")
    assert ask("statement", stored, "--delta", "1e-5")[0] == 0
    assert "at delta 1e-05" in ask("statement", stored, "--delta", "1e-3")[2]
    (tmp_path / "s.json").write_text(replace(said, epsilon=0.5).json(), encoding="utf-8")
    code, text, err = ask("statement", stored)
    assert (code, text) == (2, "")
    assert "costs at least" in err
    (tmp_path / "junk").write_bytes(b"{\xff\x00")
    (tmp_path / "other").write_bytes(b"other")
    for name, word in (("junk", "no JSON"), ("other", "not a checkpoint"), ("none", "cannot be read")):
        code, text, err = ask("statement", str(tmp_path / name))
        assert (code, text) == (2, "")
        assert word in err


# --- manners ---


def test_every_command_has_an_example_that_runs(tmp_path: Path, ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    """What --help ends in is run as it stands there."""
    life = begin(ledger=tmp_path / "run.ledger")
    life.train(lambda life: life.steps == 1)
    life.save(tmp_path / "run.checkpoint")
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    [names] = re.findall(r"\{([\w,]+)\}", capsys.readouterr().out.split("positional")[0])
    assert names.split(",") == ["epsilon", "delta", "calibrate", "tradeoff", "budget", "statement"]
    for name in names.split(","):
        with pytest.raises(SystemExit, match="0"):
            program.main([name, "--help"])
        example = capsys.readouterr().out.rpartition("example:")[2].strip()
        first, *arguments = shlex.split(example)
        assert (first, arguments[0]) == ("dpkit", name)
        arguments = [str(tmp_path / a) if a.startswith("run.") else a for a in arguments]
        code, out, err = ask(*arguments)
        assert (code, err) == (0, "")
        assert out.strip()


@pytest.mark.parametrize(
    ("bad", "saw", "cure"),
    [
        (["epsilon", *COMMON, "--delta", "2"], "delta is 2.0", "pass a delta"),
        (["epsilon", *COMMON[2:], "--delta", "1e-5"], "--noise-multiplier is missing", "pass --noise-multiplier"),
        (["epsilon", *COMMON, "--epochs", "3", "--delta", "1e-5"], "both given", "pass one"),
        (["calibrate", *COMMON, "--target-epsilon", "1"], "", ""),
        (["budget", "/nowhere/l"], "cannot be opened", "name a file"),
        (["statement", "/nowhere/c"], "cannot be read", "name a checkpoint"),
    ],
)
def test_errors_say_what_why_and_how(ask: Ask, bad: list[str], saw: str, cure: str) -> None:
    code, out, err = ask(*bad)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert saw in err
    assert "Why: " in err
    assert f"Cure: {cure}" in err
    code, out, err = ask(*bad, "--json")
    told = json.loads(out)
    assert (code, err) == (2, "")
    assert set(told) == {"error", "saw", "why", "cure"}
    assert saw in told["saw"]
    assert told["why"]
    assert told["cure"].startswith(cure)


def test_torch_is_not_waited_for(tmp_path: Path) -> None:
    """All commands but the statement of a checkpoint run where torch cannot be imported."""
    begin(ledger=tmp_path / "l").train(lambda life: life.steps == 1)
    life = run()
    train(life)
    (tmp_path / "s.json").write_text(life.engine.statement().json(), encoding="utf-8")
    for arguments in (
        ["epsilon", *COMMON, "--delta", "1e-5"],
        ["tradeoff", *COMMON],
        ["budget", str(tmp_path / "l")],
        ["statement", str(tmp_path / "s.json")],
    ):
        done = python(*arguments, blocked=("torch", "matplotlib", "transformers"))
        assert done.returncode == 0, done.stderr
    assert "PLDAccountant" in done.stdout or "RDPAccountant" in done.stdout


def test_plots_need_their_extra(tmp_path: Path) -> None:
    done = python("epsilon", *COMMON, "--delta", "1e-5", "--plot", str(tmp_path / "a.png"), blocked=("matplotlib",))
    assert done.returncode == 2
    assert "Cure: pip install 'dpkit[plots]'" in done.stderr
    assert not done.stdout


def test_plots_are_written(tmp_path: Path, ask: Ask) -> None:
    pytest.importorskip("matplotlib")
    life = begin(ledger=tmp_path / "l")
    life.train(lambda life: life.steps == 3)
    life.save(tmp_path / "c")
    asked: list[list[str]] = [
        ["epsilon", *COMMON, "--delta", "1e-5"],
        ["delta", *COMMON, "--epsilon", "1"],
        ["tradeoff", *COMMON],
        ["calibrate", *COMMON[2:], "--target-epsilon", "2", "--delta", "1e-5"],
        ["calibrate", *COMMON[2:], "--target-advantage", "0.2"],
        ["budget", str(tmp_path / "l"), "--max-epsilon", "8"],
        ["statement", str(tmp_path / "c")],
    ]
    for k, arguments in enumerate(asked):
        figure = tmp_path / f"{k}.png"
        code, out, err = ask(*arguments, "--plot", str(figure))
        assert (code, err) == (0, "")
        assert out
        assert figure.read_bytes().startswith(b"\x89PNG")
        code, out, err = ask(*arguments, "--plot", "/nowhere/a.png")
        assert (code, out) == (2, "")
        assert "writable file name" in err


def test_plain_terminals(tmp_path: Path) -> None:
    """Where Greek letters cannot be printed, their names are."""
    life = run()
    train(life)
    life.engine.save_checkpoint(tmp_path / "c")
    done = python("statement", str(tmp_path / "c"), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "epsilon, lower bound" in done.stdout
    assert "sigma = 1, q = 0.5" in done.stdout
    assert "?" not in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--version"])
    assert capsys.readouterr().out == f"dpkit {dpkit.__version__}\n"


def test_unknown_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    bad: list[Any]
    for bad in (["epsilom"], ["epsilon", *COMMON], ["epsilon", *COMMON, "--delta", "small"], []):
        with pytest.raises(SystemExit, match="2"):
            program.main(bad)
        assert "usage: dpkit" in capsys.readouterr().err
