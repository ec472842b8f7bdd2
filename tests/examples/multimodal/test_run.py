"""Whole runs on tiny random parts: training within ε, the search, the curves, the files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

for needed in ("sklearn", "PIL", "matplotlib"):
    pytest.importorskip(needed)
pytest.importorskip("transformers")

from dpkit.accountants import Gaussian  # noqa: E402
from examples.multimodal import encoders, page  # noqa: E402
from examples.multimodal.__main__ import main  # noqa: E402
from examples.multimodal.frozen import Supernet, at_each_layer  # noqa: E402
from examples.multimodal.missing import curve, presence  # noqa: E402
from examples.multimodal.mmbt import MMBT  # noqa: E402
from examples.multimodal.pictures import Picture  # noqa: E402
from examples.multimodal.records import Collate, Records  # noqa: E402
from examples.multimodal.results import Curve, Results, Shown, Table  # noqa: E402
from examples.multimodal.search import search, with_final_run  # noqa: E402
from examples.multimodal.train import Recipe, Run, evaluate, predict, seeds_of, train  # noqa: E402
from tests.examples.multimodal import tiny  # noqa: E402

RECIPE = Recipe(batch_size=20, epochs=8, lr={"heads": 1e-2, "project": 1e-2, "text": 3e-3})


@pytest.fixture(scope="module")
def records() -> dict[str, Records]:
    return tiny.xor_records(tiny.xor_rows(400, 200))


SEARCH = Recipe(batch_size=100, epochs=20, lr={"heads": 3e-2, "project": 3e-2, "text": 1e-2}, clipping="automatic")


def model(**options: object) -> MMBT:
    torch.manual_seed(0)
    return MMBT(tiny.bert(), tiny.CHANNELS, 2, below=1, special=(1, 2), **({"head": "mlp"} | options)).eval()


@pytest.mark.parametrize(
    ("options", "learns"),
    [({}, True), ({"fusion": 3, "head": "linear"}, False), ({"modalities": ("text",)}, False)],
)
def test_only_fused_models_solve_confounders(records: dict[str, Records], options: dict, learns: bool) -> None:
    some = model(**options)
    train(some, records["train"], RECIPE)
    metrics = evaluate(some, records["test"])
    assert (metrics.auroc > 0.9) == learns
    assert learns or abs(metrics.auroc - 0.5) < 0.1
    assert (metrics.pairs > 0.8) == learns


def test_a_private_run_stays_within_epsilon(records: dict[str, Records]) -> None:
    beside = Gaussian(2.0)
    runs = [train(model(), records["train"], RECIPE.but(epochs=2), epsilon=3.0, beside=beside)]
    for run in runs:
        assert run.curve == sorted(run.curve)
        assert len(run.curve) == run.steps == 20
        assert 2.99 < run.epsilon <= 3.0  # both together, and not less
        assert run.delta == 1 / (10 * 200)  # units, not rows
        assert "adding or removing one privacy_unit" in run.statement
    alone = train(model(), records["train"], RECIPE.but(epochs=2), epsilon=3.0)
    assert alone.noise_multiplier < runs[0].noise_multiplier  # what was released beside it is paid for


def test_parts_unfreeze_on_schedule(records: dict[str, Records]) -> None:
    some = model()
    recipe = RECIPE.but(epochs=1, unfreeze={"text": 0.5, "project": 2.0})
    seen: list[tuple[bool, bool]] = []
    start = {name: p.detach().clone() for name, p in some.named_parameters()}

    def look(step: int) -> None:
        seen.append((some.trained("text")[0].requires_grad, some.trained("project")[0].requires_grad))

    train(some, records["train"], recipe, epsilon=8.0, before_step=look)
    assert seen == [(step >= 5, False) for step in range(10)]
    moved = {name for name, p in some.named_parameters() if not torch.equal(p, start[name])}
    assert any(name.startswith("bert.encoder.layer.2") for name in moved)
    assert not any("project" in name or "embeddings" in name or "layer.0" in name for name in moved)


def test_modality_dropout_takes_its_share(records: dict[str, Records]) -> None:
    collate = Collate(records["train"].tables, 0.6, torch.Generator().manual_seed(0))
    present = torch.cat([collate([records["train"][k] for k in range(100)]).present for _ in range(30)])
    assert present.any(1).all()  # never both
    assert (~present).float().mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.03)


def test_curves_fall_to_what_one_modality_knows(records: dict[str, Records]) -> None:
    some = model(tasks=True)
    train(some, records["train"], RECIPE.but(tasks=True))
    for missing in ("text", "image"):
        values = [m.accuracy for m in curve(some, records["test"], missing, (1.0, 0.5, 0.0)).values()]
        assert values[0] > 0.9
        assert 0.6 < values[1] < 0.9
        assert 0.4 <= values[2] <= 0.6  # the information is gone: a coin toss
    few, more = presence(50, 0.2, "text"), presence(50, 0.6, "text")
    assert few[:, 1].sum() == 10
    assert (few <= more).all()
    assert few[:, 0].all()


def test_the_search_picks_early_fusion_and_is_paid_for(records: dict[str, Records]) -> None:
    some = model(head="linear")
    found = search(some, records["train"], records["test"], (1, 2, 3), SEARCH, epsilon=20.0)
    assert found.chosen == some.fusion < 3
    assert found.accuracy[3] < 0.65 < max(found.accuracy.values())  # late fusion adds votes: a coin toss
    assert set(found.accuracy) == {1, 2, 3}
    assert found.cost.epsilon == pytest.approx(found.supernet.epsilon, rel=1e-3)
    final = train(model(fusion=found.chosen), records["train"], RECIPE.but(epochs=2), epsilon=2.0, seed=9)
    whole = with_final_run(found.cost, final)
    assert found.cost.epsilon < whole.epsilon < found.cost.epsilon + final.epsilon
    with pytest.raises(ValueError, match="units are in both sets"):
        search(some, records["train"], records["train"], (1, 2), RECIPE, epsilon=8.0)


def test_a_supernets_layers_are_the_models_own(records: dict[str, Records], tmp_path: Path, monkeypatch) -> None:
    """Its features at a layer, computed once for each text with each picture, are those of a model fused there."""
    monkeypatch.setattr(encoders, "CACHE", tmp_path)
    seen = at_each_layer(model(head="linear"), records["test"])
    supernet = Supernet(model(head="linear"))
    torch.nn.init.normal_(supernet.trained("heads")[0])
    said = {}
    for layer in (1, 2, 3):
        supernet.fusion, supernet.model.fusion = layer, 1
        said[layer] = predict(supernet, seen)
        supernet.model.fusion = layer
        torch.testing.assert_close(said[layer], predict(supernet.model, records["test"]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(said[1], said[2], atol=1e-2)
    assert not torch.allclose(said[2], said[3], atol=1e-2)


def test_the_heads_alone_decay(records: dict[str, Records]) -> None:
    """A decay that takes all of a weight in a step leaves the heads what a step adds, and the layers what they were."""
    some = model()
    layers = [p.detach().clone() for p in some.trained("text")]
    train(some, records["train"], RECIPE.but(epochs=1, lr={"heads": 1e-3, "text": 1e-6}, weight_decay=1e3, warmup=1e-9))
    assert max(float(p.detach().abs().max()) for p in some.trained("heads")) < 5e-3
    for p, before in zip(some.trained("text"), layers, strict=True):
        torch.testing.assert_close(p, before, atol=1e-4, rtol=0)


def test_no_two_streams_are_the_same() -> None:
    seeds = [some for seed in range(5) for some in seeds_of(seed)]
    assert len(set(seeds)) == len(seeds)


def test_files_hold_the_results_and_the_page_needs_nothing_else(records: dict[str, Records], tmp_path: Path) -> None:
    some = model()
    run = train(some, records["train"], RECIPE.but(epochs=1), name="MMBT, ε = 3", epsilon=3.0)
    run.metrics = {"test": evaluate(some, records["test"])}
    table = Table("toy", "A <toy>", "about", {"test": "test"}, [run], [("AUROC ≥ 2", False, "no")])
    curves = [
        Curve(name, "text", layer, dropout, math.inf, {1.0: 0.9, 0.0: 0.5})
        for name in ("groups", "mix")
        for layer in (0, 2)
        for dropout in (0.0, 0.5)
    ]
    shown = [Shown("toy", "a <b>", Picture(("1F600",)), "1", {"MMBT": ("0", 0.7)})]
    found = [{"data": "toy", "chosen": 0, "lines": ["one & two"], "epsilon": 1.0}]
    results = Results(0, "here", [table], curves, found, [("weights", "piece")], shown, run.statement, ["note"])
    results.commands = {"toy": ("run toy", 60.0), "weights": ("run weights", 30.0), "llama": ("run llama", 1.0)}
    results.write(tmp_path)
    page.write(results, tmp_path / "multimodal.html")
    stored = json.loads((tmp_path / "multimodal.json").read_text(encoding="utf-8"))
    assert stored["tables"][0]["runs"][0]["metrics"]["test"]["auroc"] == pytest.approx(
        run.metrics["test"].auroc, abs=1e-4
    )
    assert stored["curves"][0]["epsilon"] is None  # no privacy
    markdown = (tmp_path / "multimodal.md").read_text(encoding="utf-8")
    assert "| MMBT, ε = 3 | 3.00 |" in markdown
    assert "MISSED: AUROC ≥ 2" in markdown
    assert "toy: `run toy`, seed 0\n" in markdown
    assert "weights: `run weights`, seed 0\n" in markdown
    assert "run llama" not in markdown  # no row is by it
    html = (tmp_path / "multimodal.html").read_text(encoding="utf-8")
    assert "A &lt;toy&gt;" in html
    assert "a &lt;b&gt;" in html
    assert html.count("data:image/png;base64,") == 4
    assert 'src="http' not in html
    assert "href=" not in html
    assert run.statement.splitlines()[0] in html


def test_no_part_that_is_not_there_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "confounders", "hate"])
    assert "--only hate: of confounders, hatemoji" in capsys.readouterr().err


def test_the_llama_needs_a_table_to_go_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said at once, not after minutes of encoding."""
    with pytest.raises(SystemExit):
        main(["--only", "llama", "--add", "--out", str(tmp_path)])
    assert "table of confounders" in capsys.readouterr().err


def test_an_experiment_that_is_run_again_takes_the_place_of_what_it_found() -> None:
    table = Table("confounders", "", "", {"test": "test"}, [Run("MMBT", 0), Run("frozen Llama, adapters", 0)])
    curves = [Curve(name, "text", 0, 0.0, math.inf, {1.0: 0.9}) for name in ("groups", "mix")]
    shown = [Shown(name, "", Picture(("1F600",)), "", {}) for name in ("confounders", "hatemoji")]
    pieces = [("weights", "a"), ("missing-mix", "b")]
    parts = ("confounders", "hatemoji", "missing-groups", "missing-mix", "weights", "search", "llama")
    results = Results(0, "here", [table], curves, [{"data": "mix"}], pieces, shown)
    results.commands = dict.fromkeys(parts, ("run", 1.0))
    for part in ("llama", "missing-mix", "search"):
        results.forget(part)
    assert [run.name for run in table.runs] == ["MMBT"]
    assert [curve.data for curve in results.curves] == ["groups"]
    assert (results.pieces, results.searches) == ([("weights", "a")], [])
    assert set(results.commands) == {"confounders", "hatemoji", "missing-groups", "weights"}
    results.forget("confounders")
    assert results.tables == []
    assert [one.data for one in results.shown] == ["hatemoji"]
