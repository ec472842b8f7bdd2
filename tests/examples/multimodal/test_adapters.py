"""The frozen Llama with adapters: exact gradients of the adapters, nothing else moves, the halves are the whole."""

from __future__ import annotations

import pytest
import torch

for needed in ("sklearn", "PIL"):
    pytest.importorskip(needed)
transformers = pytest.importorskip("transformers")

from examples.multimodal.adapters import LlamaWithAdapters, run_llama  # noqa: E402
from tests.examples.multimodal import tiny  # noqa: E402
from tests.oracle import clipped_sum  # noqa: E402
from tests.stepping import median_norm, private_step  # noqa: E402


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


def rows() -> tiny.Batch:
    batch = tiny.batch(n=5, below=True)
    return batch._replace(image=torch.randn(5, tiny.CHANNELS, 3, 3))


def test_the_layers_are_llamas_own() -> None:
    model = llama()
    tokens, mask = torch.randint(3, tiny.WORDS, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    whole = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    lower = run_llama(model, model.embed_tokens(tokens), mask, range(2))
    halves = model.norm(run_llama(model, lower, mask, range(2, 3)))
    torch.testing.assert_close(halves[mask.bool()], whole[mask.bool()])


def test_only_adapters_are_trained_and_exactly() -> None:
    model = LlamaWithAdapters(llama(), tiny.CHANNELS, 2, below=1, tokens=4, inner=16).eval()
    for p in model.head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    batch = rows()
    threshold = median_norm(model, tiny.losses, batch)
    expected = clipped_sum(model, tiny.losses, batch, 5, threshold)
    assert expected
    assert not any(name.startswith("llama") for name in expected)
    got = private_step(model, tiny.losses, batch, threshold)
    scale = max(float(value.norm()) for value in expected.values()) / 5
    for name, value in expected.items():
        torch.testing.assert_close(-got[name], value / 5, atol=2e-4 * scale, rtol=2e-4)


def test_a_closed_gate_lets_nothing_through() -> None:
    model = LlamaWithAdapters(llama(), tiny.CHANNELS, 2, below=1, inner=16)
    text, image = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    adapter = model.adapters[0]
    assert not torch.equal(adapter(text, image), text)
    torch.nn.init.zeros_(adapter.gate)
    assert torch.equal(adapter(text, image), text)
