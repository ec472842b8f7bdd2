"""The Hugging Face architectures as cases: 54 models, each built from a tiny configuration, nothing downloaded.

The losses are per record (the token mean within a record), never the model's own ``.loss``, which averages over the
batch's tokens and so couples records. Two-tower models are scored on their own pairs, not contrastively.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tests.cases import ModelCase, cross_entropy, language_loss, squared, text
from tests.oracle import Losses, PyTree

__all__ = ["EXTRA", "FAST", "HF_CASES"]

VOCAB, LENGTH, SIDE, LABELS = 32, 7, 16, 3

# --- sizes; configurations that know a size by another name get it in their own line ---

SIZE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "num_labels": LABELS,
}  # fmt: skip
TEXT = {
    **SIZE, "vocab_size": VOCAB, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
IMAGE = {**SIZE, "image_size": SIDE, "patch_size": 8, "num_channels": 3}
QUIET = {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "hidden_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "summary_last_dropout": 0.0, "dropout_rate": 0.0, "seq_classif_dropout": 0.0,
    "embedding_dropout": 0.0, "mlp_dropout": 0.0, "drop_path_rate": 0.0, "pooler_dropout": 0.0,
    "classifier_dropout_prob": 0.0, "resid_dropout": 0.0,
}  # fmt: skip


def configuration(name: str, **options: Any) -> Any:
    """``transformers.<name>Config`` with `options`; its dropout, of whatever name, and its cache are off."""
    import transformers

    kind = getattr(transformers, f"{name}Config")
    config = kind(**options)
    for key, value in QUIET.items():
        if hasattr(config, key):
            setattr(config, key, value)
    for part in (config, getattr(config, "text_config", None)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def build(model: str, config: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A function that makes ``transformers.<model>(config())``."""

    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, model)(config())
        assert isinstance(made, nn.Module)
        return made

    return make


# --- batches and losses, by what the model takes and gives ---


def _labels(n: int, generator: Generator) -> Tensor:
    return torch.randint(0, LABELS, (n,), generator=generator)


def _texts(length: int | None) -> Callable[[int, Generator], PyTree]:
    return lambda n, g: text(n, n if length is None else length, VOCAB, g)


def _classified_texts(n: int, g: Generator) -> PyTree:
    return {**text(n, LENGTH, VOCAB, g), "labels": _labels(n, g)}


def _images(n: int, g: Generator) -> PyTree:
    return {"pixel_values": torch.randn(n, 3, SIDE, SIDE, generator=g), "labels": _labels(n, g)}


def _pairs(n: int, g: Generator) -> PyTree:
    return {**_images(n, g), **text(n, LENGTH, VOCAB, g), "labels": torch.randn(n, generator=g)}


def _translations(length: int | None) -> Callable[[int, Generator], PyTree]:
    def batch(n: int, g: Generator) -> PyTree:
        source, target = (text(n, n if length is None else length, VOCAB, g) for _ in range(2))
        return {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "decoder_input_ids": target["input_ids"],
            "labels": target["labels"],
        }

    return batch


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model is called with: all but the labels, so that it computes no loss of its own."""
    return {name: value for name, value in batch.items() if name != "labels"}


def classified(model: nn.Module, batch: PyTree) -> Tensor:
    """One label per record."""
    return cross_entropy(model(**_inputs(batch)).logits, batch["labels"])


def generated(model: nn.Module, batch: PyTree) -> Tensor:
    """One label per token, -100 ignored."""
    return language_loss(model(**_inputs(batch)).logits, batch["labels"])


def paired(model: nn.Module, batch: PyTree) -> Tensor:
    """Each record's own image against its own text."""
    return (model(**_inputs(batch)).logits_per_text.diagonal() - batch["labels"]).square()


def embedded(model: nn.Module, batch: PyTree) -> Tensor:
    """All that a multimodal encoder gives."""
    output = model(**_inputs(batch))
    parts = (output.image_embeddings, output.text_embeddings, output.multimodal_embeddings)
    return squared(torch.cat(parts, 1), batch["labels"])


# --- the table ---


def case(
    name: str,
    model: str,
    config: str,
    sizes: dict[str, Any],
    batch: Callable[[int, Generator], PyTree],
    losses: Losses,
    *,
    tags: str = "",
    **options: Any,
) -> ModelCase:
    """One architecture: ``transformers.<model>`` from ``transformers.<config>Config(**sizes, **options)``."""
    make = build(model, lambda: configuration(config, **{**sizes, **options}))
    return ModelCase(name, make, batch, losses, frozenset(f"hf {tags}".split()), n=4)


def classifier(name: str, config: str, sizes: dict[str, Any] = TEXT, *, tags: str = "", **options: Any) -> ModelCase:
    """A sequence classifier."""
    return case(
        name, f"{config}ForSequenceClassification", config, sizes, _classified_texts, classified, tags=tags, **options
    )


def language(
    name: str,
    config: str,
    sizes: dict[str, Any] = DECODER,
    *,
    length: int | None = LENGTH,
    tags: str = "",
    **options: Any,
) -> ModelCase:
    """A causal language model; `length` None makes every sequence as long as the batch has records."""
    model = "GPT2LMHeadModel" if config == "GPT2" else f"{config}ForCausalLM"
    return case(name, model, config, sizes, _texts(length), generated, tags=tags, **options)


def vision(name: str, config: str, sizes: dict[str, Any] = IMAGE, *, tags: str = "", **options: Any) -> ModelCase:
    """An image classifier."""
    return case(name, f"{config}ForImageClassification", config, sizes, _images, classified, tags=tags, **options)


def translation(name: str, config: str, *, length: int | None = LENGTH, tags: str = "", **options: Any) -> ModelCase:
    """An encoder and a decoder."""
    return case(
        name, f"{config}ForConditionalGeneration", config, TEXT, _translations(length), generated, tags=tags,
        decoder_start_token_id=1, **options,
    )  # fmt: skip


def _text_models() -> list[ModelCase]:
    deberta = {
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "max_relative_positions": 8,
        "position_buckets": 4,
        "share_att_key": True,
    }
    gpt2 = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 24,
        "n_positions": 24,
        "vocab_size": VOCAB,
        "num_labels": LABELS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    distil = {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "vocab_size": VOCAB,
        "max_position_embeddings": 24,
        "num_labels": LABELS,
    }
    t5 = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 6,
    }
    moe = {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
        "tags": "float32_inside",
    }
    half = "float32_inside"
    return [
        classifier("bert", "Bert"),
        case("bert_mlm", "BertForMaskedLM", "Bert", TEXT, _texts(LENGTH), generated),
        classifier("roberta", "Roberta"),
        classifier("xlm_roberta", "XLMRoberta"),
        classifier("albert", "Albert", embedding_size=8),
        classifier("distilbert", "DistilBert", distil),
        classifier("deberta_v2", "DebertaV2", tags="hard", **deberta),
        classifier("deberta_v2_conv", "DebertaV2", tags="hard", conv_kernel_size=3, conv_act="gelu", **deberta),
        classifier("electra", "Electra", embedding_size=8),
        classifier(
            "modernbert", "ModernBert", cls_token_id=1, sep_token_id=2, local_attention=4, global_attn_every_n_layers=2
        ),
        language("gpt2", "GPT2", gpt2),
        classifier("gpt2_cls", "GPT2", gpt2),
        language("opt", "OPT", TEXT, word_embed_proj_dim=16, ffn_dim=24),
        language("gpt_neox", "GPTNeoX", TEXT),
        language("bloom", "Bloom", TEXT, n_layer=2, n_head=2, tags=half),
        language("falcon", "Falcon", TEXT, new_decoder_architecture=False, multi_query=True),
        language("llama", "Llama", tags=half),
        language("llama_tied", "Llama", tie_word_embeddings=True, length=None, tags=half),
        classifier("llama_cls", "Llama", DECODER, tags=half),
        language("mistral", "Mistral", sliding_window=4, tags=half),
        language("qwen2", "Qwen2", tags=half),
        language("qwen3", "Qwen3", tags=half),
        language("gemma", "Gemma", tags=half),
        language("gemma2", "Gemma2", query_pre_attn_scalar=8, sliding_window=16, tags=half),
        case(
            "gemma3",
            "Gemma3ForCausalLM",
            "Gemma3Text",
            DECODER,
            _texts(LENGTH),
            generated,
            query_pre_attn_scalar=8,
            tags=half,
        ),
        language("vaultgemma", "VaultGemma", query_pre_attn_scalar=8, sliding_window=16, tags=half),
        language("phi3", "Phi3", tags=half),
        language("smollm3", "SmolLM3", tags=half),
        language("olmo2", "Olmo2", tags=half),
        language("mixtral", "Mixtral", **moe),
        language("qwen3_moe", "Qwen3Moe", moe_intermediate_size=12, **moe),
        language(
            "gpt_oss", "GptOss", sliding_window=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **moe
        ),
        translation("t5", "T5", **t5, tags=half),
        translation("t5_T_equals_n", "T5", **t5, length=None, tags=half),
        translation("t5_gated", "T5", **t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, tags=half),
        translation(
            "bart",
            "Bart",
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            scale_embedding=True,
        ),
        language(
            "mamba",
            "Mamba",
            TEXT,
            state_size=4,
            conv_kernel=3,
            expand=2,
            time_step_rank=2,
            tags=f"hard {half}",
        ),
        language(
            "mamba2",
            "Mamba2",
            TEXT,
            state_size=4,
            conv_kernel=3,
            expand=2,
            num_heads=4,
            head_dim=8,
            n_groups=1,
            chunk_size=4,
            tags=f"hard {half}",
        ),
    ]


def _other_models() -> list[ModelCase]:
    clip_text = {**TEXT, "projection_dim": 8}
    clip = {"text_config": clip_text, "vision_config": {**IMAGE, "projection_dim": 8}, "projection_dim": 8}
    siglip = {"text_config": TEXT, "vision_config": IMAGE}
    llama = {**DECODER, "model_type": "llama"}
    image_token = VOCAB - 1

    def questions(n: int, g: Generator) -> PyTree:
        return {**_images(n, g), **text(n, LENGTH, VOCAB, g), "labels": _labels(n, g)}

    def with_regions(n: int, g: Generator) -> PyTree:
        return {**_classified_texts(n, g), "visual_embeds": torch.randn(n, 3, 12, generator=g)}

    def llava_prompts(n: int, g: Generator) -> PyTree:
        prompt = text(n, LENGTH, image_token, g)
        patches = torch.full((n, (SIDE // 8) ** 2), image_token)
        return {
            "pixel_values": torch.randn(n, 3, SIDE, SIDE, generator=g),
            "input_ids": torch.cat([patches, prompt["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones_like(patches), prompt["attention_mask"]], 1),
            "labels": torch.cat([torch.full_like(patches, -100), prompt["labels"]], 1),
        }

    def mllama_prompts(n: int, g: Generator) -> PyTree:
        return {
            "pixel_values": torch.randn(n, 1, 2, 3, SIDE, SIDE, generator=g),
            "aspect_ratio_ids": torch.full((n, 1), 2),
            "aspect_ratio_mask": torch.ones(n, 1, 2, dtype=torch.long),
            "cross_attention_mask": torch.ones(n, LENGTH, 1, 2, dtype=torch.long),
            **text(n, LENGTH, VOCAB, g),
        }

    def speech(n: int, g: Generator) -> PyTree:
        target = text(n, LENGTH, VOCAB, g)
        features = torch.randn(n, 8, 20, generator=g)
        return {"input_features": features, "decoder_input_ids": target["input_ids"], "labels": target["labels"]}

    def waves(n: int, g: Generator) -> PyTree:
        return {"input_values": torch.randn(n, 120, generator=g), "labels": _labels(n, g)}

    return [
        vision("vit", "ViT"),
        vision("deit", "DeiT"),
        vision("beit", "Beit", use_relative_position_bias=True, layer_scale_init_value=0.5, tags="hard"),
        vision("dinov2", "Dinov2"),
        vision(
            "swin",
            "Swin",
            {
                "image_size": SIDE,
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [2, 1],
                "num_heads": [2, 2],
                "window_size": 4,
                "num_labels": LABELS,
            },
            tags="hard",
        ),
        vision(
            "convnext",
            "ConvNext",
            {"patch_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "num_labels": LABELS},
        ),
        vision(
            "resnet",
            "ResNet",
            {
                "embedding_size": 8,
                "hidden_sizes": [8, 12],
                "depths": [1, 1],
                "layer_type": "basic",
                "num_labels": LABELS,
            },
            tags="coupled may_refuse",
        ),
        case("clip", "CLIPModel", "CLIP", clip, _pairs, paired, tags="hard"),
        case("clip_vision", "CLIPForImageClassification", "CLIP", {**clip, "num_labels": LABELS}, _images, classified),
        case("siglip", "SiglipModel", "Siglip", siglip, _pairs, paired, tags="hard"),
        case(
            "siglip_imgcls",
            "SiglipForImageClassification",
            "Siglip",
            {**siglip, "num_labels": LABELS},
            _images,
            classified,
        ),
        case(
            "vilt",
            "ViltForQuestionAnswering",
            "Vilt",
            {**TEXT, **IMAGE, "max_image_length": -1},
            questions,
            classified,
            tags="hard apiece",
        ),
        case(
            "visual_bert",
            "VisualBertForQuestionAnswering",
            "VisualBert",
            {**TEXT, "visual_embedding_dim": 12},
            with_regions,
            classified,
            tags="hard",
        ),
        case(
            "flava",
            "FlavaModel",
            "Flava",
            {
                "text_config": TEXT,
                "image_config": IMAGE,
                "multimodal_config": SIZE,
                "hidden_size": 16,
                "projection_dim": 8,
            },
            _pairs,
            embedded,
            tags="hard",
        ),
        case(
            "whisper",
            "WhisperForConditionalGeneration",
            "Whisper",
            {
                **TEXT,
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "decoder_ffn_dim": 24,
                "num_mel_bins": 8,
                "max_source_positions": 10,
                "max_target_positions": 24,
                "decoder_start_token_id": 1,
            },
            speech,
            generated,
        ),
        case(
            "wav2vec2",
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2",
            {
                **SIZE,
                "vocab_size": VOCAB,
                "conv_dim": [8, 8],
                "conv_stride": [3, 2],
                "conv_kernel": [5, 3],
                "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
                "classifier_proj_size": 8,
                "layerdrop": 0.0,
                "apply_spec_augment": False,
                "feat_proj_dropout": 0.0,
                "feat_quantizer_dropout": 0.0,
                "final_dropout": 0.0,
                "mask_time_prob": 0.0,
            },
            waves,
            classified,
            tags="hard",
        ),
        case(
            "llava",
            "LlavaForConditionalGeneration",
            "Llava",
            {
                "text_config": llama,
                "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
                "image_token_id": image_token,
                "vision_feature_layer": -2,
            },
            llava_prompts,
            generated,
            tags="hard float32_inside",
        ),
        case(
            "mllama",
            "MllamaForConditionalGeneration",
            "Mllama",
            {
                "text_config": {
                    **DECODER,
                    "cross_attention_layers": [1],
                    "num_hidden_layers": 2,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                },
                "vision_config": {
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_global_layers": 1,
                    "attention_heads": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 24,
                    "image_size": SIDE,
                    "patch_size": 8,
                    "max_num_tiles": 2,
                    "vision_output_dim": 32,
                    "intermediate_layers_indices": [0],
                    "supported_aspect_ratios": [[1, 1], [1, 2]],
                },
                "image_token_index": VOCAB - 1,
            },
            mllama_prompts,
            generated,
            tags="hard float32_inside",
        ),
    ]


HF_CASES: tuple[ModelCase, ...] = (*_text_models(), *_other_models())

FAST = (
    "bert", "roberta", "distilbert", "gpt2", "gpt2_cls", "opt", "llama", "llama_tied", "qwen2", "t5", "t5_T_equals_n",
    "vit", "beit", "swin", "convnext", "clip_vision", "deberta_v2",
)  # fmt: skip
"""The subset of the default test run."""

EXTRA = frozenset({"t5_T_equals_n", "clip_vision"})
"""Cases that are tested and are not among the 54."""
