"""Opacus's examples, our way: they learn, spend what their accountant says, and stay as short as an ordinary loop."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dpkit.accountants import PLDAccountant, dpsgd
from examples import char_lstm, mnist

pytest.importorskip("opacus")
import benchmarks.char_lstm
import benchmarks.mnist


def test_mnist(capsys: pytest.CaptureFixture[str]) -> None:
    """A quick form: 2,000 images, 27 steps."""
    result = mnist.main(["--limit", "2000", "--epochs", "3", "--sigma", "0.6", "--lr", "0.5", "--seed", "0"])
    assert result.accuracy > 0.25  # a guess: 0.1; draws and noise are not seeded
    assert result.steps == 27
    assert result.epsilon == pytest.approx(PLDAccountant().compose(dpsgd(0.6, 0.12, 27)).epsilon(1e-5), rel=1e-4)
    assert f"ε = {result.epsilon:.3f}" in capsys.readouterr().out


def test_mnist_without_privacy(capsys: pytest.CaptureFixture[str]) -> None:
    result = mnist.main(["--limit", "2000", "--epochs", "2", "--lr", "0.2", "--disable-dp", "--seed", "0"])
    assert (result.epsilon, result.steps) == (None, 18)
    assert result.accuracy > 0.2
    assert "no privacy" in capsys.readouterr().out


def test_char_lstm() -> None:
    """2,000 names, little noise: names are told better than by always saying the commonest language, a fifth."""
    options = ["--limit", "2000", "--batch-size", "200", "--epochs", "2", "--sigma", "0.5", "--seed", "0"]
    result = char_lstm.main(options)
    assert result.accuracy > 0.3
    assert result.epsilon == pytest.approx(PLDAccountant().compose(dpsgd(0.5, 0.1, 20)).epsilon(8e-5), rel=1e-4)


def test_the_networks_are_opacus_s() -> None:
    """Sizes as in Opacus's examples."""
    assert sum(p.numel() for p in mnist.ConvNet().parameters()) == 26_010
    assert mnist.ConvNet()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    model = char_lstm.CharClassifier()
    assert model.embedding.weight.shape == (259, 64)
    assert (model.rnn.input_size, model.rnn.hidden_size, model.rnn.num_layers) == (64, 128, 1)


def test_a_name_does_not_depend_on_the_others() -> None:
    """Every name has the same length, whatever the batch; Opacus's example pads to the longest of a batch."""
    assert {len(char_lstm.encode(name)) for name in ("A", "Ślusàrski", "x" * 100)} == {char_lstm.LENGTH}
    assert char_lstm.encode("Ab") == [char_lstm.PAD] * 20 + [256, 65, 98, 257]


def test_data_is_what_its_attribution_says() -> None:
    assert [len(mnist.load(split)) for split in ("train", "test")] == [60_000, 3_000]
    assert [len(char_lstm.load(split)) for split in ("train", "test")] == [14_931, 3_812]
    assert set(char_lstm.load("train").tensors[1].tolist()) == set(range(16))
    x, y = mnist.load("train").tensors
    assert abs(float(x.mean())) < 1e-3  # the mean and deviation that everybody uses
    assert abs(float(x.std()) - 1) < 1e-3
    assert torch.bincount(y).tolist()[:3] == [5923, 6742, 5958]  # MNIST's own


@pytest.mark.parametrize("example", [mnist, char_lstm], ids=["mnist", "char_lstm"])
def test_the_loop_is_an_ordinary_one(example: ModuleType) -> None:
    """Between the epochs and the steps no line knows of privacy: engine and make_private appear outside of the loop."""
    tree = ast.parse(Path(str(example.__file__)).read_text(encoding="utf-8"))
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For) and ast.unparse(node.iter) == "loader"]
    assert len(loops) == 1
    assert "engine" not in ast.unparse(loops[0])
    assert [line for line in ast.unparse(loops[0]).splitlines() if "backward" in line] == ["    loss.backward()"]


def test_published_epsilons_are_those_of_the_accountant_of_that_time() -> None:
    """The RDP conversion of Mironov 2017 gives what Opacus's README files print; so they are of the runs we repeat."""
    for setting in benchmarks.mnist.SETTINGS:
        if setting.sigma is not None:
            then = benchmarks.mnist.published(setting.sigma, 0.004, setting.epochs * 250)
            assert then == pytest.approx(setting.epsilon, abs=0.006)
            now = benchmarks.mnist.epsilons(setting.sigma, 0.004, setting.epochs * 250)
            assert now.dpkit_lower <= now.dpkit < now.opacus_prv < now.opacus_rdp < then
    there = benchmarks.char_lstm
    then = benchmarks.mnist.published(there.SIGMA, there.RATE, there.STEPS, there.DELTA)
    assert then == pytest.approx(there.PUBLISHED["private"][1], abs=0.006)


def test_tables_of_results() -> None:
    """Rows that were stored come back, and the table shows them."""
    rows = benchmarks.mnist.stored()
    assert [row.setting for row in rows] == list(benchmarks.mnist.SETTINGS)[: len(rows)]
    assert len(rows) >= 2
    for row in rows:
        if row.epsilons is not None:
            assert row.spent == pytest.approx(row.epsilons.dpkit, rel=1e-4)  # the engine's own answer
    table = (benchmarks.mnist.RESULTS / "mnist.md").read_text(encoding="utf-8")
    for line in benchmarks.mnist.markdown(benchmarks.mnist.conditions("benchmarks.mnist"), rows).splitlines():
        assert line in table or line.startswith("`python")
