"""Milliseconds per training step of single layers: ordinary training with torch's layer, dpkit, Opacus.

    python -m benchmarks.layers [--workloads linear conv lstm ...] [--full] [--rounds 9] [--quick]

dpkit trains torch's own layer as it is; Opacus needs its own replacement of attention, LSTM, GRU and RNN, and has none
for a cell in a loop or for an EmbeddingBag of more than one word. Measured as `benchmarks.steps` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import plots
from .contestants import CONTESTANTS
from .measure import Row, compare
from .report import RESULTS, conditions, write
from .steps import markdown, quiet
from .workloads import PAPER, Workload, tokens


class Layer(nn.Module):
    """A layer and a head on the mean of its outputs over all positions."""

    def __init__(self, layer: nn.Module, width: int, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call, self.head = layer, call, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.layer, x))


def _plain(layer: nn.Module, x: Tensor) -> Tensor:
    """[n, width] or the mean over [n, t, width]."""
    y: Tensor = layer(x)
    return y if y.ndim == 2 else y.mean(1)


def _image(layer: nn.Module, x: Tensor) -> Tensor:
    """The mean over the pixels of [n, c, h, w]; squared, since a norm's own mean tells nothing."""
    y: Tensor = layer(x)
    return y.square().mean((2, 3))


def _attention(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x, x, x, need_weights=False)[0]
    return y.mean(1)


def _loop(layer: nn.Module, x: Tensor) -> Tensor:
    """The last state of a recurrent cell in a loop over time."""
    state: Any = None
    for step in x.unbind(1):
        state = layer(step, state)
    last: Tensor = state[0] if isinstance(state, tuple) else state
    return last


def _last(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)[0]
    return y[:, -1]


def _layer(
    name: str,
    what: str,
    build: Callable[[], nn.Module],
    width: int,
    inputs: Callable[[int], Tensor],
    n: int,
    call: Callable[[nn.Module, Tensor], Tensor] = _plain,
) -> Workload:
    return Workload(name, what, lambda: Layer(build(), width, call), inputs, (n,), all_sizes=PAPER)


def _random(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        _layer("linear", "nn.Linear, 512 to 512", lambda: nn.Linear(512, 512), 512, _random(512), 64),
        _layer("linear-128", "nn.Linear, 512 to 512, T 128", lambda: nn.Linear(512, 512), 512, _random(128, 512), 16),
        _layer("conv", "nn.Conv2d, 64 to 64, 3×3, 16×16 pixels",
               lambda: nn.Conv2d(64, 64, 3, padding=1), 64, _random(64, 16, 16), 64, _image),
        _layer("layernorm", "nn.LayerNorm, width 256, T 128", lambda: nn.LayerNorm(256), 256, _random(128, 256), 64,
               lambda layer, x: layer(x).square().mean(1)),
        _layer("instancenorm", "nn.InstanceNorm2d, affine, 64 channels, 16×16 pixels",
               lambda: nn.InstanceNorm2d(64, affine=True), 64, _random(64, 16, 16), 64, _image),
        _layer("groupnorm", "nn.GroupNorm, 8 groups, 64 channels, 16×16 pixels",
               lambda: nn.GroupNorm(8, 64), 64, _random(64, 16, 16), 64, _image),
        _layer("embedding", "nn.Embedding, vocabulary 20000, width 100, T 128",
               lambda: nn.Embedding(20000, 100), 100, tokens(20000, 128), 64),
        _layer("mha", "nn.MultiheadAttention, width 256, 4 heads, T 128",
               lambda: nn.MultiheadAttention(256, 4, batch_first=True), 256, _random(128, 256), 32, _attention),
        *(
            _layer(name, f"nn.{kind.__name__}, 100 to 100, T 128",
                   lambda kind=kind: kind(100, 100, batch_first=True), 100, _random(128, 100), 64, _last)
            for name, kind in (("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM))
        ),
        *(
            _layer(name, f"nn.{kind.__name__} in a loop, 100 to 100, T 32",
                   lambda kind=kind: kind(100, 100), 100, _random(32, 100), 64, _loop)
            for name, kind in (("gru-cell", nn.GRUCell), ("lstm-cell", nn.LSTMCell))
        ),
        _layer("bag", "nn.EmbeddingBag, vocabulary 20000, width 100, 128 words",
               lambda: nn.EmbeddingBag(20000, 100), 100, tokens(20000, 128), 64),
    )
}  # fmt: skip


WITHOUT_OPACUS = ("gru-cell", "lstm-cell", "bag")
"""What it has no layer for; its general way through them gives other gradients, so its time would say nothing."""


def contestants(name: str) -> dict[str, Any]:
    """Those that train the layer."""
    return {k: v for k, v in CONTESTANTS.items() if name not in WITHOUT_OPACUS or not k.startswith("Opacus")}


def main() -> None:
    """Runs the comparison and writes results/layers.json, layers.md and layers.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--full", action="store_true", help="batch sizes 16 to 512 in place of one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="2 rounds; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    rounds = 2 if args.quick else args.rounds
    about = {**conditions("benchmarks.layers"), "rounds": rounds}
    name = "layers-full" if args.full else "layers"
    rows: list[Row] = []
    for key in args.workloads:
        for n in WORKLOADS[key].all_sizes if args.full else WORKLOADS[key].batch_sizes:
            rows += compare(WORKLOADS[key], n, rounds, contestants(key))
        if not args.quick:
            write(name, about, rows, markdown(about, rows, "Training steps of single layers", WORKLOADS))
            plots.bars(rows, RESULTS / f"{name}.png")
    print(f"\n{markdown(about, rows, 'Training steps of single layers', WORKLOADS)}")


if __name__ == "__main__":
    main()
