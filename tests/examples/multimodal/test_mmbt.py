"""The bitransformer: its gradients are the loop's, its masks hold, its parts unfreeze."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

for needed in ("sklearn", "PIL"):
    pytest.importorskip(needed)
pytest.importorskip("transformers")

from torch.nn.functional import binary_cross_entropy_with_logits  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import dpkit  # noqa: E402
from examples.multimodal import align  # noqa: E402
from examples.multimodal.encoders import Texts  # noqa: E402
from examples.multimodal.mmbt import MMBT, SHAPES, Product  # noqa: E402
from examples.multimodal.records import Batch  # noqa: E402
from tests.examples.multimodal import tiny  # noqa: E402
from tests.oracle import clipped_sum  # noqa: E402
from tests.stepping import median_norm, private_step  # noqa: E402

Losses = Callable[[torch.nn.Module, tuple], torch.Tensor]


def exact(model: MMBT, rows: Batch, losses: Losses = tiny.losses) -> None:
    """One private step, with the engine, is the loop over single records."""
    n, threshold = len(rows.label), median_norm(model, losses, rows)
    expected = clipped_sum(model, losses, rows, n, threshold)
    got = private_step(model, losses, rows, threshold)
    scale = max(float(value.norm()) for value in expected.values()) / n
    for name, value in expected.items():
        near = {"atol": 2e-4 * scale, "rtol": 2e-4}
        torch.testing.assert_close(-got[name], value / n, **near, msg=lambda m, k=name: f"{k}: {m}")


OPTIONS = [
    {},
    {"tokens": 4, "image_first": False, "readout": "mean", "stride": 2},
    {"fusion": 1, "tasks": True, "skip": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_loops_with_the_shared_tables(options: dict) -> None:
    """The image's tables are the text's: both uses of each are one gradient, counted once."""
    model = tiny.mmbt(**options)
    assert model.image_embeddings.word_embeddings is model.bert.embeddings.word_embeddings
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sum(name.endswith("word_embeddings.weight") for name in names) == 2
    exact(model, tiny.batch())


def test_gradients_are_the_loops_through_the_pooler() -> None:
    exact(tiny.mmbt(readout="cls", head="mlp", tokens=2), tiny.batch())


def test_gradients_are_the_loops_above_cached_layers() -> None:
    exact(tiny.mmbt(below=2, tokens=9, head="mlp"), tiny.batch(below=True))


@pytest.mark.parametrize("options", [{}, {"skip": True, "tasks": True}])
def test_gradients_are_the_loops_through_products(options: dict) -> None:
    exact(tiny.mmbt(head="product", **options), tiny.batch())


def test_a_product_is_of_one_modality_by_the_other() -> None:
    """Linear in each, and neither is taken for the other; at first it says nothing."""
    parts = (3, 5, 2, 4)
    head = Product(parts, outputs=4, rank=6)
    image, text, shown, below = features = torch.randn(14).split(parts)

    def said(*of: torch.Tensor) -> torch.Tensor:
        return head(torch.cat(of)[None])[0].detach()

    assert not said(*features).any()
    torch.nn.init.normal_(head.image.weight)
    torch.nn.init.zeros_(head.text.bias)
    torch.testing.assert_close(said(image, 2 * text, shown, 2 * below), 2 * said(*features))
    torch.testing.assert_close(said(3 * image, text, 3 * shown, below), 3 * said(*features))
    assert not said(image, 0 * text, shown, 0 * below).any()
    assert not said(0 * image, text, 0 * shown, below).any()
    assert said(0 * image, text, shown, 0 * below).any()  # the map alone counts
    assert said(image, 0 * text, 0 * shown, below).any()  # and so does the text below
    head.requires_grad_(False).image.weight.zero_()
    torch.nn.init.normal_(head.add.weight)
    one, other = said(image, 0 * text, shown, 0 * below), said(0 * image, text, 0 * shown, below)
    assert one.any()
    assert other.any()
    torch.testing.assert_close(said(*features), one + other)  # what adds does not multiply


def test_a_product_starts_by_reading_what_tells_the_catalogues_names_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readings of the names, seen alone as heads see them, are uncorrelated and equally spread."""
    n = 60
    torch.manual_seed(0)
    names = Texts(torch.randn(n, 4, tiny.WIDTH), torch.ones(n, 4, dtype=torch.long))
    maps = torch.randn(2 * n, tiny.CHANNELS)
    some = [{"hexcode": str(i), "label": "", "tags": []} for i in range(n)]
    monkeypatch.setattr(align, "catalogue", lambda: some)
    monkeypatch.setattr(align, "catalogue_features", lambda images, size: maps)
    monkeypatch.setattr(align, "encode_texts", lambda *args: names)
    model = MMBT(tiny.bert(), tiny.CHANNELS, 2, below=1, head="product", skip=True, special=(1, 2)).eval()
    align.align(model, None, None)
    seen = model.features(maps[:n, :, None, None], *names, align.apart(n, 1))
    head = model.heads["full"]
    _, text, _, below = seen.split(head.parts, dim=1)
    readings = head.text(torch.cat([text, below], dim=1))
    torch.testing.assert_close(torch.cov(readings.T), torch.eye(8) / 3, atol=1e-4, rtol=1e-4)


def test_several_labels() -> None:
    """A multi-label head: one loss a row, with weights of the labels."""

    def losses(model: torch.nn.Module, rows: tuple) -> torch.Tensor:
        rows = Batch(*rows)
        logits = model(rows.image, rows.text, rows.mask, rows.present)
        label = torch.stack([rows.label, 1 - rows.label, rows.label], 1).float()
        return binary_cross_entropy_with_logits(logits, label, pos_weight=torch.ones(3) * 2, reduction="none").sum(1)

    exact(tiny.mmbt(outputs=3), tiny.batch(), losses)


@pytest.mark.parametrize("tokens", sorted(SHAPES))
def test_any_number_of_image_tokens(tokens: int) -> None:
    model, rows = tiny.mmbt(tokens=tokens), tiny.batch(n=2)
    embedded = model.image_embeddings(model.image_encoder(rows.image), 0)
    assert embedded.shape == (2, tokens + 2, tiny.WIDTH)
    assert SHAPES[tokens][0] * SHAPES[tokens][1] == tokens
    assert model(rows.image, rows.text, rows.mask).shape == (2, 2)


@pytest.mark.parametrize("fusion", [0, 1, 3])
@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("gone", [0, 1])
def test_a_missing_modality_has_no_influence_and_no_gradient(fusion: int, tasks: bool, gone: int) -> None:
    model, rows = tiny.mmbt(fusion=fusion, tasks=tasks, skip=tasks), tiny.batch(n=4)
    present = torch.ones(4, 2, dtype=torch.bool)
    present[:, gone] = False
    image, states = rows.image.clone().requires_grad_(), []

    def keep(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        states.append(output)

    model.bert.embeddings.register_forward_hook(keep)
    logits = model(image, rows.text, rows.mask, present)
    logits.sum().backward()
    other = rows.image * 0 + 7 if gone == 0 else rows.image
    words = (rows.text + 1) % tiny.WORDS if gone == 1 else rows.text
    assert torch.equal(model(other, words, rows.mask, present), logits)
    seen, unseen = (states[0].grad, image.grad) if gone == 0 else (image.grad, states[0].grad)
    assert torch.equal(unseen, torch.zeros_like(unseen))
    assert seen.abs().sum() > 0
    assert not torch.equal(model(other, words, rows.mask), model(rows.image, rows.text, rows.mask))


@pytest.mark.parametrize("readout", ["first", "mean", "cls"])
def test_layers_are_berts_own(readout: str) -> None:
    """Layers run on what is read alone give what BERT's own layers give on everything."""
    model, rows = tiny.mmbt(fusion=0, readout=readout), tiny.batch(n=3)
    tokens = torch.cat([model.image_embeddings(model.image_encoder(rows.image), 0), model._text(rows.text)[0]], 1)
    real = torch.cat([torch.ones(3, 3), rows.mask], 1).bool()
    allowed = real[:, None, :] | torch.eye(real.shape[1], dtype=torch.bool)
    for layer in model.bert.encoder.layer:
        tokens = layer(tokens, torch.where(allowed[:, None], 0.0, torch.finfo(torch.float32).min))
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    scale, text = tiny.WIDTH**0.5, tokens[:, 3:] * rows.mask[..., None]
    expected = {
        "first": unit(torch.stack([tokens[:, 0], tokens[:, 3]], 1)) * scale,
        "mean": unit(torch.stack([tokens[:, :3].sum(1), text.sum(1)], 1)) * scale,
        "cls": model.bert.pooler(tokens),
    }
    torch.testing.assert_close(model.features(rows.image, rows.text, rows.mask), expected[readout].flatten(1))
    model.stride = 2
    if readout == "mean":
        every = unit(torch.stack([tokens[:, :3].sum(1), text[:, ::2].sum(1)], 1)) * scale
        torch.testing.assert_close(model.features(rows.image, rows.text, rows.mask), every.flatten(1))


def test_a_lower_layer_is_seen_past_the_others() -> None:
    """Texts come as after two layers and after one: those that are run see the one, the heads the other as well."""
    options, rows = {"below": 2, "skip": True, "image_encoder": tiny.image_encoder()}, tiny.batch(n=3, below=True)
    model, plain = tiny.mmbt(lower=1, **options), tiny.mmbt(**options)
    other = torch.randn_like(rows.text)
    seen = model.features(rows.image, torch.cat([rows.text, other], -1), rows.mask)
    assert torch.equal(seen[:, : -tiny.WIDTH], plain.features(rows.image, rows.text, rows.mask)[:, : -tiny.WIDTH])
    assert torch.equal(seen[:, -tiny.WIDTH :], plain.features(rows.image, other, rows.mask)[:, -tiny.WIDTH :])


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def test_padding_has_no_influence() -> None:
    model, rows = tiny.mmbt(), tiny.batch()
    wide = torch.cat([rows.text, torch.full((6, 3), 5)], 1)
    mask = torch.cat([rows.mask, torch.zeros(6, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(
        model(rows.image, wide, mask, rows.present), model(rows.image, rows.text, rows.mask, rows.present)
    )


def test_late_fusion_adds_and_early_fusion_does_not() -> None:
    """Late, the logits are a sum of one part a modality: no interaction of the two can be expressed."""
    rows = tiny.batch(n=2)
    for fusion, additive in ((tiny.LAYERS, True), (0, False), (1, False), (2, False)):
        model = tiny.mmbt(fusion=fusion)
        both = [[model(rows.image[[i]], rows.text[[j]], rows.mask[[j]]) for j in (0, 1)] for i in (0, 1)]
        interaction = both[0][0] - both[0][1] - both[1][0] + both[1][1]
        assert (interaction.abs().max() < 1e-5) == additive, fusion


def test_published_order_and_segments() -> None:
    """[CLS] image [SEP] with segment 0 and positions from 0, then the text with segment 1 and its own positions."""
    model, rows = tiny.mmbt(tokens=3), tiny.batch(n=2)
    seen: dict[str, list[list[int]]] = {"position": [], "segment": []}
    tables = model.bert.embeddings
    tables.position_embeddings.register_forward_hook(lambda m, i, o: seen["position"].append(i[0][0].tolist()))
    tables.token_type_embeddings.register_forward_hook(lambda m, i, o: seen["segment"].append(i[0][0].tolist()))
    model(rows.image, rows.text, rows.mask)
    assert seen == {"position": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], "segment": [[0] * 5, [1] * 5]}


def test_the_engine_follows_gradual_unfreezing() -> None:
    """A frozen part is bitwise untouched (no noise reaches it), a part that was unfrozen moves; ε only grows."""
    model = tiny.mmbt(below=1)
    rows = tiny.batch(n=8, below=True)
    items = [tuple(value[k] for value in rows) for k in range(8)]
    loader = DataLoader(items, batch_size=4, collate_fn=lambda held: Batch(*map(torch.stack, zip(*held, strict=True))))
    model.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dpkit.PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    stages = (("heads",), ("heads", "project"), ("heads", "project", "text", "image"))
    spent = [0.0]
    for parts in stages:
        for part in ("heads", "project", "text", "image"):
            for p in model.trained(part):
                p.requires_grad_(part in parts)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for part in loader:
            engine.backward(tiny.losses(model, part))
            optimizer.step()
            optimizer.zero_grad()
        moving = {id(p) for part in parts for p in model.trained(part)}
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (id(p) not in moving), (parts, name)
        spent.append(engine.get_epsilon(1e-5))
    assert spent == sorted(spent)
    assert len(set(spent)) == 4


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 9 tokens"):
        tiny.mmbt(tokens=10)
    with pytest.raises(ValueError, match="between 0"):
        tiny.mmbt(fusion=4)
    with pytest.raises(ValueError, match="of below=2 layers"):
        tiny.mmbt(below=2, lower=2, skip=True)
    with pytest.raises(ValueError, match="of below=2 layers"):
        tiny.mmbt(below=2, lower=1)
    with pytest.raises(ValueError, match="linear"):
        tiny.mmbt(head="deep")
    with pytest.raises(ValueError, match="does not tell them apart"):
        tiny.mmbt(head="product", readout="cls")
