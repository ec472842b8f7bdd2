"""The frozen Llama with adapters: exact gradients of the adapters alone; one token runs as in the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

for needed in ("sklearn", "PIL"):
    pytest.importorskip(needed)
transformers = pytest.importorskip("transformers")

from examples.multimodal import adapters, encoders  # noqa: E402
from examples.multimodal.adapters import LlamaWithAdapters, encode_for_llama, last_token, unpack  # noqa: E402
from tests.examples.multimodal import tiny  # noqa: E402
from tests.oracle import clipped_sum  # noqa: E402
from tests.stepping import median_norm, private_step  # noqa: E402

T, BELOW = 6, 1


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tiny.WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaModel(config).eval()


def tokenizer(texts: str | list[str], truncation: bool = False, max_length: int | None = None) -> dict[str, object]:
    """Words are numbers; the question is two tokens."""
    if isinstance(texts, str):
        return {"input_ids": [1, 2]}
    return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}


def rows(n: int = 5) -> tiny.Batch:
    batch = tiny.batch(n=n, t=T, below=True)
    return batch._replace(image=torch.randn(n, tiny.CHANNELS, 3, 3), text=torch.randn(n, 16 + 2 * T * 2 * 8))


@pytest.fixture
def model() -> LlamaWithAdapters:
    made = LlamaWithAdapters(llama(), tiny.CHANNELS, 2, below=BELOW, heads=4).eval()
    torch.nn.init.normal_(made.head.weight, std=0.3)
    return made


def test_the_last_token_alone_runs_as_in_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "CACHE", tmp_path)
    model = llama()
    texts = ["3 4 5 6 7 8 9 10 11", "12", "13 14 15"]  # the first one is cut
    made = encode_for_llama(model, tokenizer, texts, T, BELOW)
    assert made.mask.sum(1).tolist() == [6, 2, 4]
    hidden, states = unpack(model, made.hidden, T, BELOW)
    for k, before in zip(range(BELOW, 3), states, strict=True):
        hidden = last_token(model, k, hidden, before, made.mask)
    for said, ids in zip(hidden, ([3, 4, 5, 6, 7, 1, 2], [12, 1, 2], [13, 14, 15, 1, 2]), strict=True):
        whole = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(model.norm(said), whole, atol=5e-3, rtol=5e-3)  # kept in half precision


def test_only_adapters_and_head_are_trained_and_exactly(model: LlamaWithAdapters) -> None:
    batch = rows()
    threshold = median_norm(model, tiny.losses, batch)
    expected = clipped_sum(model, tiny.losses, batch, 5, threshold)
    assert {name.split(".")[0] for name in expected} == {"adapters", "head"}
    got = private_step(model, tiny.losses, batch, threshold)
    scale = max(float(value.norm()) for value in expected.values()) / 5
    for name, value in expected.items():
        torch.testing.assert_close(-got[name], value / 5, atol=2e-4 * scale, rtol=2e-4)


def test_what_is_seen_depends_on_the_text(model: LlamaWithAdapters) -> None:
    """Of a single image token a softmax would take all, whatever the text."""
    adapter, image, text = model.adapters[0], torch.randn(1, 16).expand(2, -1), torch.randn(2, 16)
    torch.nn.init.normal_(adapter.out.weight)
    found = adapter(text, image) - text
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_it_is_prepared_on_the_catalogue(model: LlamaWithAdapters, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Centres and lengths are those of what the adapters get; what is to be unseen is not looked at."""
    monkeypatch.setattr(encoders, "CACHE", tmp_path)
    some = [{"hexcode": str(i), "label": f"{3 + i}", "tags": []} for i in range(8)]
    monkeypatch.setattr(adapters, "catalogue", lambda: some)
    monkeypatch.setattr(adapters, "catalogue_features", lambda images: torch.randn(16, tiny.CHANNELS))

    def words(texts: str | list[str], **options: object) -> dict[str, object]:
        if not isinstance(texts, str):
            texts = [text.replace(",", "") for text in texts]
        return tokenizer(texts, **options)  # type: ignore[arg-type]

    model.align(None, words, T, without={"7"})
    texts = encode_for_llama(model.llama, words, [f"{3 + i}, " for i in range(7)], T, BELOW)
    hidden, _ = unpack(model.llama, texts.hidden, T, BELOW)
    seen = torch.nn.functional.normalize(hidden, dim=-1)
    torch.testing.assert_close(model.adapters[0].centre, seen.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        float(model.adapters[0].length), float(hidden.norm(dim=1).mean()) / 4, atol=1e-3, rtol=1e-3
    )
