"""The smallest example runs, keeps within ε and learns."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from examples import trainer, two_lines


def test_two_lines_learns_within_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, epsilon = two_lines.main(["--epochs", "4", "--epsilon", "3"])
    assert accuracy > 0.5  # a guess: 0.1
    assert 2.9 < epsilon <= 3.0  # calibrated to the target, and never over it
    assert f"ε = {epsilon:.2f}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_trainer_learns_within_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, epsilon = trainer.main(["--epochs", "4", "--epsilon", "8"])
    assert accuracy > 0.2  # a guess: 0.1
    assert 7.9 < epsilon <= 8.0
    assert f"ε = {epsilon:.2f}" in capsys.readouterr().out


def test_two_lines_is_short() -> None:
    assert len(Path(two_lines.__file__).read_text(encoding="utf-8").splitlines()) <= 60
