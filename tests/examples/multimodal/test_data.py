"""The data sets are what they say: balanced confounders, splits that do not leak, a mix with exact limits."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

for needed in ("sklearn", "PIL", "transformers"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402

from examples.multimodal import data, encoders, mix  # noqa: E402
from examples.multimodal.data import Rows  # noqa: E402
from examples.multimodal.metrics import judge, pair_consistency  # noqa: E402
from examples.multimodal.pictures import MISSING, Picture, pixels  # noqa: E402
from tests.examples.multimodal import tiny  # noqa: E402


@pytest.fixture(scope="module")
def confounders() -> Rows:
    return data.confounders()


def no_unit_crosses(rows: Rows) -> None:
    splits = [{row.unit for row in split} for split in rows.splits.values()]
    assert sum(map(len, splits)) == len(set().union(*splits))


def test_confounders_are_a_coin_toss_for_one_modality(confounders: Rows) -> None:
    sizes = {name: len(split) for name, split in confounders.splits.items()}
    assert sizes == {"train": 14976, "val": 1308, "test": 2080, "test_unseen_image": 2080}
    assert confounders.units == 6495
    for split in confounders.splits.values():
        for key in (lambda row: row.text, lambda row: row.pair):
            labels: dict[str, Counter[int]] = {}
            for row in split:
                labels.setdefault(key(row), Counter())[row.label] += 1
            assert all(counts[0] == counts[1] for counts in labels.values())  # each text, both labels
        assert sum(row.label for row in split) * 2 == len(split)
    seen = {row.picture.codes for row in confounders["train"]}
    assert not seen & {row.picture.codes for row in confounders["test_unseen_image"]}
    assert {row.picture.codes for row in confounders["test"]} <= seen
    no_unit_crosses(Rows("", {name: confounders[name] for name in ("train", "val", "test")}))
    no_unit_crosses(Rows("", {name: confounders[name] for name in ("train", "val", "test_unseen_image")}))


def test_hatemoji_keeps_pairs_whole() -> None:
    rows = data.hatemoji()
    assert {name: len(split) for name, split in rows.splits.items()} == {
        "train": 4696,
        "val": 602,
        "test": 614,
        "check": 3930,
    }
    no_unit_crosses(rows)
    pairs = Counter(row.pair for name in ("train", "val", "test") for row in rows[name])
    assert set(pairs.values()) == {2}
    kinds = Counter(row.kind for name in ("train", "val", "test") for row in rows[name])
    assert kinds["image"] == kinds["text"] == 2454


def test_groups_are_nine_and_both_styles_are_one_unit() -> None:
    rows = data.groups()
    assert len(rows.classes) == 9
    assert sum(map(len, rows.splits.values())) == 2 * 1906
    assert rows.units == len(rows["train"]) // 2
    no_unit_crosses(rows)


def test_limit_takes_whole_units(confounders: Rows) -> None:
    whole = Counter(row.unit for row in confounders["train"])
    some = data.confounders(300)
    assert 300 <= len(some["train"]) < 340
    assert all(count == whole[unit] for unit, count in Counter(row.unit for row in some["train"]).items())


def test_pictures() -> None:
    drawn = pixels([Picture(("1F600",), "twemoji", "#ff0000"), Picture(), Picture(("1F600", "1F437"))], 64)
    assert drawn.shape == (3, 3, 64, 64)
    assert drawn.dtype == torch.uint8
    assert drawn[0, :, 0, 0].tolist() == [255, 0, 0]  # the background
    assert (drawn[1] == MISSING).all()  # a missing image is grey
    assert not torch.equal(drawn[2, :, :32, :32], drawn[2, :, :32, 32:])  # a montage: two emoji beside each other
    assert (drawn[2, :, 32:] == 255).all()


def test_pictures_are_encoded_once_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "CACHE", tmp_path)
    seen: list[int] = []

    class Encoder:
        def trunk(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return images.float().mean((2, 3))[:, :, None, None]

    shown = [Picture(("1F600",), "noto", colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    maps = encoders.encode_pictures(Encoder(), shown, 32)
    again = encoders.encode_pictures(Encoder(), shown[::-1], 32)
    assert torch.equal(again, maps.flip(0))
    torch.testing.assert_close(maps[:, :, 0, 0], pixels(shown, 32).float().mean((2, 3)), atol=0, rtol=1e-3)
    assert seen == [3]


def test_texts_are_encoded_as_after_two_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is above the lower layer stands beside what is above the upper one, each as it is alone."""
    monkeypatch.setattr(encoders, "CACHE", tmp_path)

    def tokenizer(texts: list[str], **options: object) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[1, len(text), 5, 2] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, len(text) % 2, 0] for text in texts])}

    texts, bert = ["a", "bb", "ccc"], tiny.bert()
    both = encoders.encode_texts(bert, tokenizer, texts, 4, 2, 1).hidden
    each = [encoders.encode_texts(bert, tokenizer, texts, 4, layers).hidden for layers in (2, 1)]
    torch.testing.assert_close(both, torch.cat(each, dim=-1))
    assert not both[:, 3].any()  # padding that no text reaches


def test_the_image_encoder_is_the_network_in_eval_mode() -> None:
    """Whatever mode it is in, with BatchNorms folded into the trunk's convolutions and constant in the last layer."""
    efficientnet = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    net = efficientnet.EfficientNet.from_name("efficientnet-lite0").eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            for some in (module.running_mean, module.weight, module.bias):
                torch.nn.init.normal_(some, mean=0.3)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = net.extract_features((images.float() - 127) / 128)
        encoder = encoders.ImageEncoder(net)
        assert [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)] == []
        for mode in (False, True):
            torch.testing.assert_close(encoder.train(mode)(images), expected, atol=1e-4, rtol=1e-4)


def test_the_mix_has_its_exact_limits() -> None:
    """The limits of the challenge's design: by text alone 60% and 0.68, by the image alone a coin toss, by both all."""
    assert sum(mix.joint().values()) == 1
    assert mix.bayes(lambda text, picture: text) == (Fraction(3, 5), Fraction(17, 25))
    assert mix.bayes(lambda text, picture: picture) == (Fraction(1, 2), Fraction(1, 2))
    assert mix.bayes(lambda text, picture: (text, picture)) == (1, 1)
    assert mix.bayes(lambda text, picture: None) == (Fraction(1, 2), Fraction(1, 2))


def test_the_generator_makes_that_mix() -> None:
    rows = mix.memes({"train": 20000, "test": 2000})
    assert data.shares(rows["train"]) == {kind: float(share) for kind, share in mix.SHARES.items()}
    joint, counts = mix.joint(), mix.counted(rows["train"])
    assert set(counts) == set(joint)
    for cell, probability in joint.items():
        expected = 20000 * float(probability)
        assert abs(counts[cell] - expected) < 6 * expected**0.5, cell
    no_unit_crosses(rows)
    # the best model that reads the text, on the rows: as the limits say
    posterior = {"unkind": 1.0, "kind": 0.0}
    said = [mix.cell(row)[0] for row in rows["test"]]
    labels = [row.label for row in rows["test"]]
    assert roc_auc_score(labels, [posterior.get(text, 0.5) for text in said]) == pytest.approx(0.68, abs=1e-9)
    both = [float(mix.cell(row)[0] in (mix.cell(row)[1], "unkind")) for row in rows["test"]]
    assert roc_auc_score(labels, both) == 1.0


def test_bayes_is_the_best_auroc_of_all_orders() -> None:
    """On a small joint distribution, no ranking beats the one by posterior."""
    rng = np.random.default_rng(0)
    cells = list(mix.joint().items())
    labels = [label for (_, _, label), _ in cells]
    weights = [float(p) for _, p in cells]
    best = float(mix.bayes(lambda text, picture: (text == "pig", picture))[1])
    for _ in range(50):
        score = {key: rng.random() for key in {(text == "pig", picture) for (text, picture, _), _ in cells}}
        scores = [score[text == "pig", picture] for (text, picture, _), _ in cells]
        assert roc_auc_score(labels, scores, sample_weight=weights) <= best + 1e-9


def folder(path: Path, lines: list[dict[str, object]]) -> Path:
    (path / "img").mkdir()
    for line in lines:
        Image.new("RGB", (20, 12), (int(line["id"]) % 255, 10, 10)).save(path / str(line["img"]))
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, lines[:3])) + "\n", encoding="utf-8")
    (path / "dev.jsonl").write_text(json.dumps(lines[3]), encoding="utf-8")
    (path / "test.jsonl").write_text(json.dumps({k: v for k, v in lines[4].items() if k != "label"}), encoding="utf-8")
    return path


LINES = [
    {"id": 1, "img": "img/01.png", "label": 0, "text": "look who came"},
    {"id": 2, "img": "img/02.png", "label": 1, "text": "Look who came"},
    {"id": 3, "img": "img/03.png", "label": 0, "text": "so nice"},
    {"id": 4, "img": "img/04.png", "label": 1, "text": "not nice"},
    {"id": 5, "img": "img/05.png", "label": 1, "text": "hidden"},
]


def test_a_folder_of_hateful_memes(tmp_path: Path) -> None:
    rows = data.hateful_memes(folder(tmp_path, LINES))
    assert {name: len(split) for name, split in rows.splits.items()} == {"train": 3, "dev": 1}  # no label, no row
    first, second, third = rows["train"]
    assert (first.text, first.label) == ("look who came", 0)
    assert first.unit == second.unit != third.unit
    drawn = pixels([first.picture, second.picture], 16)
    assert drawn.shape == (2, 3, 16, 16)
    assert drawn[:, 0, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"label": 2}, ValueError, "line 1: the label is 2"),
        ({"img": "img/none.png"}, FileNotFoundError, "line 1"),
        ({"text": None}, ValueError, "line 1: no text"),
    ],
)
def test_a_broken_folder_is_refused(
    tmp_path: Path, change: dict[str, object], error: type[Exception], match: str
) -> None:
    folder(tmp_path, LINES)
    line = {k: v for k, v in (LINES[0] | change).items() if v is not None}
    (tmp_path / "train.jsonl").write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(error, match=match):
        data.hateful_memes(tmp_path)


def test_masked_texts_cannot_be_read() -> None:
    assert data.masked("what a Lovely day!") == "wh·· a Lo···· da·!"


def test_pair_consistency_wants_all_of_a_pair() -> None:
    right = np.array([True, True, True, False, False, True])
    assert pair_consistency(right, ["a", "a", "b", "b", "c", "d"]) == 0.5  # c and d are no pairs
    assert pair_consistency(right[:1], ["a"]) is None


def test_metrics_are_scikit_learns() -> None:
    logits = torch.randn(60, 2)
    labels = torch.randint(2, (60,)).tolist()
    found = judge(logits, labels, [str(k // 2) for k in range(60)])
    assert found.auroc == pytest.approx(roc_auc_score(labels, logits.softmax(1)[:, 1].numpy()))
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == torch.tensor(labels)).float().mean()))
    assert found.auroc_pm is not None
    assert 0.05 < found.auroc_pm < 0.3
    assert judge(torch.randn(10, 3), [0] * 10).auroc is None
