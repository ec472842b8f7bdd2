"""What is trained in the benchmarks: models, random data for them, and the batch sizes they are measured at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import models

PAPER = (16, 32, 64, 128, 256, 512)
"""The batch sizes of Yousefpour et al., "Opacus: User-Friendly Differential Privacy Library in PyTorch" (2021)."""


@dataclass(frozen=True)
class Workload:
    """A model, its inputs for n records, and the batch sizes it is measured at; the loss is cross-entropy.

    Attributes:
        batch_sizes: those of the standard run.
        all_sizes: those of the full run; by default the same.
        labels: the shape of one record's labels (a language model has one for each position).
    """

    name: str
    what: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch_sizes: tuple[int, ...]
    classes: int = 10
    all_sizes: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """n records and their labels, the same at every call."""
        torch.manual_seed(1)
        return self.inputs(n), torch.randint(0, self.classes, (n, *self.labels))

    def model(self) -> nn.Module:
        """The model with the same initial weights at every call, in train mode."""
        torch.manual_seed(0)
        return self.build().train()


def tokens(vocab: int, length: int) -> Callable[[int], Tensor]:
    """n records of ``length`` random tokens."""
    return lambda n: torch.randint(0, vocab, (n, length))


def images(channels: int, side: int) -> Callable[[int], Tensor]:
    """n random images."""
    return lambda n: torch.randn(n, channels, side, side)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("mnist-cnn", "CNN of Opacus's MNIST example", models.mnist_cnn, images(1, 28), (64, 256), 10, PAPER),
        Workload("cifar-cnn", "CNN of Opacus's CIFAR-10 benchmark", models.CIFARNet, images(3, 32), (64,), 10, PAPER),
        Workload("imdb-embedding", "mean of embeddings: vocabulary 10,000, width 16, T 256",
                 models.WordMean, tokens(10_000, 256), (64, 256), 2, PAPER),
        Workload("imdb-lstm", "embedding and LSTM: vocabulary 10,000, width 100, T 256",
                 models.WordLSTM, tokens(10_000, 256), (64,), 2, PAPER),
        Workload("mlp", "MLP 784-1024-1024-10", models.mlp, lambda n: torch.randn(n, 784), (64, 256), 10, PAPER),
        Workload("transformer", "encoder, 3 layers, d 256, T 128, vocabulary 5000",
                 models.TextClassifier, tokens(5000, 128), (8, 32)),
        Workload("resnet18-gn", "ResNet-18 with GroupNorm, 32×32", models.resnet18, images(3, 32), (16,)),
        Workload("vit-tiny", "ViT-tiny, 32×32 in patches of 4", models.ViTTiny, images(3, 32), (16,)),
        Workload("bert-128", "Hugging Face BERT, 4 layers, d 256, T 128",
                 models.bert_mini, tokens(8192, 128), (16,), 2),
        Workload("bert-512", "Hugging Face BERT, 4 layers, d 256, T 512",
                 partial(models.bert_mini, 512), tokens(8192, 512), (4,), 2),
        Workload("llama-128", "Hugging Face Llama, 4 layers, d 256, T 128, vocabulary 4096, language model",
                 models.llama_mini, tokens(4096, 128), (8,), 4096, labels=(128,)),
        Workload("llama-512", "Hugging Face Llama, 4 layers, d 256, T 512, vocabulary 4096, language model",
                 models.llama_mini, tokens(4096, 512), (2,), 4096, labels=(512,)),
        Workload("llama-lora", "LoRA of rank 8 on Hugging Face Llama's attention, T 128, language model",
                 models.llama_lora, tokens(4096, 128), (8,), 4096, labels=(128,)),
        Workload("tiny", "MLP 8-8-2: the overhead of a step", models.tiny, lambda n: torch.randn(n, 8), (8,), 2),
    )
}  # fmt: skip
