"""A supervised multimodal bitransformer: image tokens and text tokens in one BERT.

Kiela, Bhooshan, Firooz, Perez, Testuggine, "Supervised Multimodal Bitransformers for Classifying Images and Text"
(2019); attention masks for a missing modality, fusion layers and task heads follow Ma, Ren, Zhao, Testuggine, Peng,
"Are Multimodal Transformers Robust to Missing Modality?" (2022).

Letters: n record, t text token, N image token, s position in the joint sequence, d width, c channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

SHAPES = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 5: (5, 1), 6: (3, 2), 7: (7, 1), 8: (4, 2), 9: (3, 3)}
"""N image tokens: to which height and width an image's map is pooled."""

IMAGE, TEXT, BELOW = 0, 1, 2
"""Columns of ``present``; and rows of ``centre``, the text below the layers that are run having one of its own."""


class ImageEmbeddings(nn.Module):
    """An image's map as the tokens [CLS] image × N [SEP], with segment and positions of their own.

    The tables and the norm are the text's own modules, under a second name: what both modalities send through them is
    one gradient of one parameter.
    """

    def __init__(self, embeddings: nn.Module, norm: nn.Module, image_dim: int, tokens: int, special: tuple[int, int]):
        super().__init__()
        if tokens not in SHAPES:
            raise ValueError(f"tokens={tokens}: an image is pooled to 1 to 9 tokens")
        self.word_embeddings = embeddings.word_embeddings
        self.position_embeddings = embeddings.position_embeddings
        self.token_type_embeddings = embeddings.token_type_embeddings
        self.norm = norm
        self.project = nn.Linear(image_dim, self.word_embeddings.embedding_dim)
        self.tokens, self.special = tokens, special

    def forward(self, maps: Tensor, segment: int) -> Tensor:
        """Maps [n, c, h, w] to embeddings [n, N + 2, d]."""
        pooled = F.adaptive_avg_pool2d(maps, SHAPES[self.tokens]).flatten(2).transpose(1, 2)
        image = self.project(pooled)
        ends = torch.tensor(self.special, device=maps.device).expand(len(maps), 2)
        cls, sep = self.word_embeddings(ends).split(1, dim=1)
        tokens = torch.cat([cls, image, sep], dim=1)
        positions = torch.arange(tokens.shape[1], device=maps.device).expand(tokens.shape[:2])
        segments = torch.full_like(positions, segment)
        return self.norm(tokens + self.position_embeddings(positions) + self.token_type_embeddings(segments))


class MMBT(nn.Module):
    """Classifies an image and a text together, or one of them where the other is missing.

    Up to layer ``fusion`` each modality attends to itself alone, from there on to both. With ``fusion`` at the number
    of layers they meet in the head only: late fusion (a linear head adds their votes), or, with an "mlp" head, the
    concatenation baseline.

    Args:
        bert: the transformer. Its ``below`` lowest layers are not run here: texts come as hidden states above them.
        lower: fewer layers: texts come with the hidden states above these, too (see `encoders.Texts`), for ``skip``.
        image_dim: c, the channels of what ``image_encoder`` returns.
        outputs: how many classes, or labels that are not exclusive.
        image_encoder: from what comes as image to maps [n, c, h, w]; by default maps come.
        tokens: N, 1 to 9.
        fusion: the first layer that sees both modalities; by default the lowest that is run.
        image_first: the order of the two segments.
        segments: which row of the segment table is the image's, which the text's.
        modalities: what the model looks at: ("image",), ("text",), or both.
        head: "linear", "mlp", or "product": see `Product`.
        tasks: a head each for full, image-only and text-only records, instead of one for all.
        readout: what the heads see: "mean", over each segment's tokens; "first", each segment's [CLS]; or "cls", as
            published, the first token of the sequence through BERT's pooler.
        stride: with "mean", every how-manieth text token is read. What the last layer would say of tokens that are not
            read is not computed, which saves most of it.
        skip: the heads also see what comes in, past the layers that are run: the image's map and the text (means), as
            it is above the ``lower`` layers, or else above the ``below``.
        special: the ids of [CLS] and [SEP].
    """

    def __init__(
        self,
        bert: transformers.BertModel,
        image_dim: int,
        outputs: int,
        *,
        image_encoder: nn.Module | None = None,
        below: int = 0,
        lower: int | None = None,
        tokens: int = 1,
        fusion: int | None = None,
        image_first: bool = True,
        segments: tuple[int, int] = (0, 1),
        modalities: tuple[str, ...] = ("image", "text"),
        head: str = "linear",
        tasks: bool = False,
        readout: str = "mean",
        stride: int = 1,
        skip: bool = False,
        special: tuple[int, int] = (101, 102),
    ) -> None:
        super().__init__()
        layers, width = bert.config.num_hidden_layers, bert.config.hidden_size
        self.fusion = below if fusion is None else fusion
        if not below <= self.fusion <= layers:
            raise ValueError(f"fusion={fusion}: between {below} (the lowest layer run) and {layers} (late)")
        if lower is not None and not (skip and 0 <= lower < below):
            raise ValueError(f"lower={lower}: of below={below} layers, for skip=True")
        self.bert, self.below, self.lower = bert, below, lower
        self.image_encoder = nn.Identity() if image_encoder is None else image_encoder
        norm = bert.encoder.layer[below - 1].output.LayerNorm if below else bert.embeddings.LayerNorm
        self.image_embeddings = ImageEmbeddings(bert.embeddings, norm, image_dim, tokens, special)
        self.image_first, self.segments, self.modalities = image_first, segments, modalities
        self.readout, self.stride = readout, stride
        self.skip = skip
        self.register_buffer("centre", torch.zeros(3, width))  # of what heads see of each modality; from public data
        self.register_buffer("map_mean", torch.zeros(image_dim))
        self.register_buffer("map_scale", torch.ones(image_dim))
        if head == "product" and readout == "cls":
            raise ValueError('head="product" multiplies image by text, and readout="cls" does not tell them apart')
        parts = (0 if readout == "cls" else width, width, *((image_dim, width) if skip else (0, 0)))  # of `features`
        names = ("full", "image", "text") if tasks else ("full",)
        self.heads = nn.ModuleDict({name: _head(head, parts, outputs) for name in names})

    def forward(self, image: Tensor, text: Tensor, mask: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits [n, outputs].

        Args:
            image: what ``image_encoder`` takes.
            text: token ids [n, t]; with ``below``, hidden states [n, t, d]; with ``lower``, [n, t, 2d].
            mask: [n, t], 1 on tokens and 0 on padding.
            present: [n, 2], whether the image and the text are there; by default they are.
        """
        return self.classify(self.features(image, text, mask, present), present)

    def features(self, image: Tensor, text: Tensor, mask: Tensor, present: Tensor | None = None) -> Tensor:
        """What heads see: [n, 2d], of each modality a vector of length √d, 0 where missing, or [n, d]; what skips."""
        there = self._there(present, len(text), text.device)
        if "text" not in self.modalities:
            text, mask = text[:, :1], mask[:, :1]  # not looked at: one token stands for it
        maps = self.image_encoder(image)
        image, (text, below) = self.image_embeddings(maps, self.segments[IMAGE]), self._text(text)
        parts = [image, text]
        masks = [torch.ones(parts[0].shape[:2], device=text.device, dtype=torch.bool), mask.bool()]
        past = []
        if self.skip:
            said = self._mean(below, masks[TEXT] & there[:, TEXT, None], BELOW)
            past = [self._past(maps) * there[:, IMAGE, None], said]
        order = (IMAGE, TEXT) if self.image_first else (TEXT, IMAGE)
        hidden = torch.cat([parts[which] for which in order], dim=1)
        whose = torch.cat([torch.full((parts[which].shape[1],), which, device=text.device) for which in order])
        real = torch.cat([masks[which] & there[:, which, None] for which in order], dim=1)
        if self.readout == "cls":
            return torch.cat([self.bert.pooler(self._encode(hidden, real, whose, read=[0])), *past], dim=1)
        read = self._read(whose)
        hidden, real, whose = self._encode(hidden, real, whose, read), real[:, read], whose[read]
        means = [self._mean(hidden, real & (whose == which), which) for which in (IMAGE, TEXT)]
        return torch.cat([*means, *past], dim=1)

    def _read(self, whose: Tensor) -> list[int]:
        """The positions that are read."""
        image, text = ((whose == which).nonzero().flatten().tolist() for which in (IMAGE, TEXT))
        return sorted([image[0], text[0]] if self.readout == "first" else [*image, *text[:: self.stride]])

    def _mean(self, hidden: Tensor, chosen: Tensor, which: int) -> Tensor:
        """The direction [n, d] in which the mean of the chosen positions is from ``centre``; 0 where none is chosen.

        It is of length √d, so that an entry is about 1, as a head's initialisation expects.
        """
        mean = F.normalize((hidden * chosen[..., None]).sum(1), dim=-1) - self.centre[which]
        return F.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5 * chosen.any(1, keepdim=True)

    def classify(self, features: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits [n, outputs], from the head of each record's task."""
        full = self.heads["full"](features)
        if len(self.heads) == 1 or present is None:
            return full
        alone = torch.where(present[:, IMAGE, None], self.heads["image"](features), self.heads["text"](features))
        return torch.where(present.all(1)[:, None], full, alone)

    def _past(self, maps: Tensor) -> Tensor:
        """The mean of maps [n, c, h, w], standardised and of length √d: [n, c]."""
        standard = (maps.mean((2, 3)) - self.map_mean) / self.map_scale
        return F.normalize(standard, dim=-1) * self.centre.shape[1] ** 0.5

    def _text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [n, t, d]: those that go into the layers that are run, and those that ``skip`` shows."""
        if self.lower is not None:
            return tuple(text.chunk(2, dim=-1))
        if not self.below:
            text = self.bert.embeddings(text, token_type_ids=torch.full_like(text, self.segments[TEXT]))
        return text, text

    def _encode(self, hidden: Tensor, real: Tensor, whose: Tensor, read: list[int] | None = None) -> Tensor:
        """Hidden states [n, s, d] through the layers, at the positions ``read``; ``real`` [n, s], ``whose`` [s].

        A token attends to the tokens that are there and, below the fusion layer, of its own modality; and to itself, so
        that a row of attention is never empty. A missing modality's tokens are attended to by nobody else.
        """
        itself = torch.eye(len(whose), dtype=torch.bool, device=hidden.device)
        together = real[:, None, :] | itself
        apart = together & (whose[:, None] == whose)
        layers = list(self.bert.encoder.layer)
        for i, layer in enumerate(layers[self.below :], self.below):
            allowed = together if i >= self.fusion else apart
            queries = hidden
            if read is not None and layer is layers[-1]:
                queries, allowed = hidden[:, read], allowed[:, read]
            hidden = run_layer(layer, queries, hidden, allowed)
        return hidden if layers[self.below :] or read is None else hidden[:, read]

    def _there(self, present: Tensor | None, n: int, device: torch.device) -> Tensor:
        """[n, 2]: what is there and looked at."""
        looked = torch.tensor([name in self.modalities for name in ("image", "text")], device=device)
        return looked.expand(n, 2) if present is None else present.bool() & looked

    def trained(self, what: str) -> list[nn.Parameter]:
        """The parameters of a part: "heads", "project", "text" (the layers that are run), "image" or "tables"."""
        parts: dict[str, list[Any]] = {
            "heads": [self.heads, *([self.bert.pooler] if self.readout == "cls" else [])],
            "project": [self.image_embeddings.project],
            "text": list(self.bert.encoder.layer[self.below :]),
            "image": [self.image_encoder],
            "tables": [self.bert.embeddings],
        }
        return [p for part in parts[what] for p in part.parameters()]


def run_layer(layer: nn.Module, queries: Tensor, hidden: Tensor, allowed: Tensor) -> Tensor:
    """A BERT layer's output [n, q, d] for the ``queries`` [n, q, d], which are some of ``hidden`` [n, s, d].

    ``allowed`` [n, q, s] says which may attend to which. Where all are queries, this is what the layer computes.
    """
    attention = layer.attention.self
    q, k, v = (
        each.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for each in (attention.query(queries), attention.key(hidden), attention.value(hidden))
    )
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    attended = layer.attention.output(mixed.transpose(1, 2).flatten(2), queries)
    return layer.output(layer.intermediate(attended), attended)


class Product(nn.Module):
    """A head that multiplies: a few readings of the text, each times a reading of the image; and that adds.

    Logits are Σ_r (A text + a)_r (B image + b)_rc + (C both + c)_c. Whether two things agree is a product, which a
    hidden layer would have to learn from both; and of 40,000 parameters noise has less to spoil than of half a million.
    It starts by knowing nothing: B, b, C and c are zero.

    Args:
        parts: the widths of what comes: image, text, the image's map, the text below.
    """

    def __init__(self, parts: tuple[int, ...], outputs: int, rank: int = 8) -> None:
        super().__init__()
        self.parts = parts
        self.text = nn.Linear(parts[1] + parts[3], rank)
        self.image = _zero(nn.Linear(parts[0] + parts[2], rank * outputs))
        self.add = _zero(nn.Linear(sum(parts), outputs))

    @torch.no_grad()
    def read(self, axes: Tensor) -> None:
        """Start from these readings of the text: ``axes`` [width of the text, rank], along which it has variance 1."""
        self.text.weight.copy_(axes.T / 3**0.5)  # as spread as what the layer starts from by itself

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, sum of parts] to logits [n, outputs]."""
        image, text, shown, said = features.split(self.parts, dim=1)
        of_text, of_image = self.text(torch.cat([text, said], dim=1)), self.image(torch.cat([image, shown], dim=1))
        multiplied = (of_text[:, :, None] * of_image.unflatten(1, (of_text.shape[1], -1))).sum(1)
        return multiplied + self.add(features)


def _head(kind: str, parts: tuple[int, ...], outputs: int) -> nn.Module:
    """A head that starts by knowing nothing: its last layer is zero."""
    if kind == "linear":
        return _zero(nn.Linear(sum(parts), outputs))
    if kind == "mlp":
        return nn.Sequential(nn.Linear(sum(parts), 256), nn.ReLU(), _zero(nn.Linear(256, outputs)))
    if kind == "product":
        return Product(parts, outputs)
    raise ValueError(f'head={kind!r}: "linear", "mlp" or "product"')


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
