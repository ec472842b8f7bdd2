"""Milliseconds per training step of single layers: ordinary training with torch's layer, dpkit, Opacus with hooks.

    python -m benchmarks.layers [--workloads mha lstm gru ...] [--rounds 9] [--quick]

dpkit trains torch's own layer as it is; Opacus needs its own replacement of attention, LSTM, GRU and RNN, and has none
for a cell in a loop or for an EmbeddingBag of more than one word. Measured as `benchmarks.steps` does.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import steps
from benchmarks.report import RESULTS, conditions
from benchmarks.workloads import Workload


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention and a head on its mean."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x, x, x, need_weights=False)[0].mean(1))


class Loop(nn.Module):
    """A recurrent cell in a loop over time, and a head on its last output."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Words(nn.Module):
    """A large table of words and a head on their mean."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x)
        return self.head(y.mean(1) if y.ndim == 3 else y)


class Positions(nn.Module):
    """A layer on [n, t, d], and a head on the mean over positions."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Pixels(nn.Module):
    """A layer on [n, c, h, w], and a head on the mean over pixels."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).square().mean((2, 3)))


def sequences(n: int) -> Tensor:
    return torch.randn(n, 128, 100)


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            "mha", "nn.MultiheadAttention, width 256, 4 heads, T 128",
            lambda: Attention(nn.MultiheadAttention(256, 4, batch_first=True)),
            lambda n: torch.randn(n, 128, 256), (32,),
        ),
        *(
            Workload(name, f"nn.{kind.__name__}, 100 to 100, T 128",
                     lambda kind=kind: Recurrent(kind(100, 100, batch_first=True)), sequences, (64,))
            for name, kind in (("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN))
        ),
        *(
            Workload(name, f"nn.{kind.__name__} in a loop, 100 to 100, T 32",
                     lambda kind=kind: Loop(kind(100, 100)), lambda n: torch.randn(n, 32, 100), (64,))
            for name, kind in (("lstm-cell", nn.LSTMCell), ("gru-cell", nn.GRUCell))
        ),
        Workload("embedding", "nn.Embedding, vocabulary 20000, width 100, T 128",
                 lambda: Words(nn.Embedding(20000, 100)), lambda n: torch.randint(0, 20000, (n, 128)), (64,)),
        Workload("embedding-bag", "nn.EmbeddingBag (mean), vocabulary 20000, width 100, bags of 128",
                 lambda: Words(nn.EmbeddingBag(20000, 100)), lambda n: torch.randint(0, 20000, (n, 128)), (64,)),
        Workload("linear", "nn.Linear, 256 to 256, T 64",
                 lambda: Positions(nn.Linear(256, 256), 256), lambda n: torch.randn(n, 64, 256), (64,)),
        Workload("layernorm", "nn.LayerNorm, width 256, T 64",
                 lambda: Positions(nn.LayerNorm(256), 256), lambda n: torch.randn(n, 64, 256), (64,)),
        Workload("conv", "nn.Conv2d, 16 to 32 channels, 3 x 3, 32 x 32 pixels",
                 lambda: Pixels(nn.Conv2d(16, 32, 3), 32), lambda n: torch.randn(n, 16, 32, 32), (64,)),
        *(
            Workload(name, f"nn.{type(build()).__name__}, 32 channels, 32 x 32 pixels",
                     lambda build=build: Pixels(build(), 32), lambda n: torch.randn(n, 32, 32, 32), (64,))
            for name, build in (
                ("groupnorm", lambda: nn.GroupNorm(8, 32)),
                ("instancenorm", lambda: nn.InstanceNorm2d(32, affine=True)),
            )
        ),
    )
}  # fmt: skip


WITHOUT_OPACUS = ("lstm-cell", "gru-cell", "embedding-bag")


def opacus(workload: Workload, n: int) -> steps.Runner:
    """Opacus with hooks, on its own replacements of the layers."""
    from opacus.layers import DPRNN
    from opacus.validators import ModuleValidator

    def fixed() -> nn.Module:
        model = workload.build()
        if isinstance(model, Recurrent) and isinstance(model.layer, nn.RNN):  # its validator leaves nn.RNN as it is
            model.layer = DPRNN(100, 100, batch_first=True)
        return ModuleValidator.fix(model)

    return steps.opacus("hooks")(replace(workload, build=fixed), n)


def main() -> None:
    """Runs the comparison and writes results/layers.json and results/layers.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="2 rounds; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    steps.WORKLOADS = WORKLOADS
    rounds = 2 if args.quick else args.rounds
    rows: list[steps.Row] = []
    for name in args.workloads:
        steps.CONTESTANTS = {"ordinary": steps.ordinary, "dpkit": steps.dpkit}
        if name not in WITHOUT_OPACUS:
            steps.CONTESTANTS["Opacus hooks"] = opacus
        rows += steps.compare(WORKLOADS[name], WORKLOADS[name].batch_sizes[0], rounds)
    about: dict[str, Any] = {**conditions("benchmarks.layers"), "rounds": rounds}
    table = steps.markdown(about, rows).replace("# Training steps", "# Training steps of single layers")
    print(f"\n{table}")
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "layers.md").write_text(table)
        (RESULTS / "layers.json").write_text(
            json.dumps({"conditions": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
