"""The contestants: ordinary training, the same with noise, dpkit, Opacus with hooks and with ghost clipping, each on
the same workload; ordinary training and dpkit compiled as well, where asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from .workloads import Workload

AUTOCAST = False
"""Whether forwards run in bfloat16 (set by ``--bf16``)."""
NOISE_MULTIPLIER, MAX_GRAD_NORM, LEARNING_RATE = 1.0, 1.0, 0.01

Batch = tuple[Tensor, Tensor]


@dataclass
class Runner:
    """A contestant set up on a workload: an endless stream of batches and the step to take on each."""

    batches: Iterator[Batch]
    step: Callable[[Batch], None]

    def seconds(self, repeats: int) -> float:
        """The mean time of a step (forward, backward, noise, update, zero_grad); fetching the batch is not counted."""
        total = 0.0
        for _ in range(repeats):
            batch = next(self.batches)
            start = time.perf_counter()
            self.step(batch)
            total += time.perf_counter() - start
        return total / repeats


def forever(batch: Batch) -> Iterator[Batch]:
    """The same pre-made batch again and again."""
    while True:
        yield batch


def train_step(model: nn.Module, optimizer: Any, criterion: Callable[..., Any]) -> Callable[[Batch], None]:
    """The training step that every contestant takes."""

    def step(batch: Batch) -> None:
        inputs, labels = batch
        with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
            loss = criterion(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trained(model: nn.Module) -> SGD:
    """Plain SGD on what is not frozen."""
    return SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def ordinary(workload: Workload, n: int) -> Runner:
    """Training without privacy."""
    model = workload.model()
    return Runner(forever(workload.batch(n)), train_step(model, trained(model), nn.CrossEntropyLoss()))


def noisy(workload: Workload, n: int) -> Runner:
    """Ordinary training that adds dpkit's noise to its gradients: what no private training can do without, whatever
    its clipping costs. The noise is drawn in the step, on the same thread."""
    from dpkit.noise import NoiseSource

    model, source = workload.model(), NoiseSource()
    optimizer = trained(model)

    @torch.no_grad()
    def add(*_: Any) -> None:
        grads = [p.grad.view(-1) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        source.add_to(grads, NOISE_MULTIPLIER * MAX_GRAD_NORM / n)

    optimizer.register_step_pre_hook(add)
    return Runner(forever(workload.batch(n)), train_step(model, optimizer, nn.CrossEntropyLoss()))


def compiled(workload: Workload, n: int) -> Runner:
    """Ordinary training of the model compiled by ``torch.compile``."""
    model = workload.model()
    step = train_step(torch.compile(model), trained(model), nn.CrossEntropyLoss())
    return Runner(forever(workload.batch(n)), step)


def dpkit(workload: Workload, n: int, *, compiled: bool = False) -> Runner:
    """dpkit; n records at sample rate 1, so that every Poisson draw is the same whole batch."""
    import dpkit as library

    model, batch = workload.model(), workload.batch(n)
    model, optimizer, loader = library.PrivacyEngine().make_private(
        module=model,
        optimizer=trained(model),
        data_loader=DataLoader(range(n), batch_size=n, collate_fn=lambda rows: batch),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=MAX_GRAD_NORM,
    )

    def epochs() -> Iterator[Batch]:
        while True:
            yield from loader

    called = torch.compile(model) if compiled else model
    return Runner(epochs(), train_step(called, optimizer, nn.CrossEntropyLoss()))


def replaced(model: nn.Module) -> nn.Module:
    """The model with the layers that Opacus has for those of torch that it cannot train."""
    from opacus.layers import DPRNN
    from opacus.validators import ModuleValidator

    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.RNN:  # its validator leaves it as it is
                setattr(parent, name, DPRNN(layer.input_size, layer.hidden_size, batch_first=layer.batch_first))
    return model if ModuleValidator.is_valid(model) else ModuleValidator.fix(model).train()


def _by_position(criterion: Any) -> Callable[[Tensor, Tensor], Any]:
    """Opacus's ghost loss of a language model wants logits [n·t, v], labels [n·t], and the shape [n, t]."""

    def loss(logits: Tensor, labels: Tensor) -> Any:
        return criterion(logits.transpose(1, 2).flatten(0, 1), labels.flatten(), shape=labels.shape)

    return loss


def opacus(mode: str) -> Callable[[Workload, int], Runner]:
    """Opacus in `mode`, "hooks" or "ghost"; fed the batch directly, since it does not check where batches come from."""

    def prepare(workload: Workload, n: int) -> Runner:
        from opacus import PrivacyEngine

        model, batch = replaced(workload.model()), workload.batch(n)
        parts = PrivacyEngine().make_private(
            module=model,
            optimizer=trained(model),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(TensorDataset(*batch), batch_size=n),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        criterion = parts[2] if mode == "ghost" else nn.CrossEntropyLoss()
        if mode == "ghost" and workload.labels:
            criterion = _by_position(criterion)
        return Runner(forever(batch), train_step(parts[0], parts[1], criterion))

    return prepare


CONTESTANTS: dict[str, Callable[[Workload, int], Runner]] = {
    "ordinary": ordinary,
    "ordinary + noise": noisy,
    "dpkit": dpkit,
    "Opacus hooks": opacus("hooks"),
    "Opacus ghost": opacus("ghost"),
}
COMPILED: dict[str, Callable[[Workload, int], Runner]] = {
    "ordinary, compiled": compiled,
    "dpkit, compiled": partial(dpkit, compiled=True),
}
"""Need a C++ compiler on a CPU."""
