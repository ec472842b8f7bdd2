"""A small bitransformer whose every layer is trained, for what needs many runs: curves, class weights.

Its word table is MiniLM's, and its picture features are EfficientNet's, both reduced to their principal components over
public words and public emoji, and frozen. What is learned from private data is the transformer, from scratch.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .align import catalogue_features, components, pooled
from .data import Rows
from .encoders import ImageEncoder, Texts, encode_pictures
from .mmbt import MMBT
from .records import Records, Tables

LAYERS, WIDTH, HEADS = 4, 96, 4


@torch.no_grad()
def prepare_small(
    rows: Rows, images: ImageEncoder, bert: transformers.BertModel, tokenizer: Any, max_tokens: int
) -> dict[str, Records]:
    """The splits of ``rows``: texts as token ids, pictures as WIDTH principal components (maps [n, c, 1, 1])."""
    every = [row for split in rows.splits.values() for row in split]
    pictures, texts = sorted({row.picture for row in every}, key=repr), sorted({row.text for row in every})
    mean, axes = components(catalogue_features(images), WIDTH)
    maps = (pooled(images, encode_pictures(images, pictures)) - mean) @ axes
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    tables = Tables(
        maps[:, :, None, None],
        Texts(batch["input_ids"], batch["attention_mask"]),
        {picture: i for i, picture in enumerate(pictures)},
        {text: i for i, text in enumerate(texts)},
    )
    return {name: Records(split, tables) for name, split in rows.splits.items()}


@torch.no_grad()
def small_mmbt(bert: transformers.BertModel, outputs: int, seed: int = 0, layers: int = LAYERS, **options: Any) -> MMBT:
    """A bitransformer of ``layers`` layers from scratch, on the principal components of ``bert``'s word table."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=bert.config.vocab_size,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config)
    words = bert.embeddings.word_embeddings.weight
    mean, axes = components(words, WIDTH)
    model.embeddings.word_embeddings.weight.copy_((words - mean) @ axes)
    return MMBT(model, WIDTH, outputs, **options)
