"""Hypothesis strategies: modules, batches for them, and whole clipping cases, for property-based tests.

The drawn sizes collide on purpose (as many positions, channels or features as records): what tells records from
positions by a shape that happens to be equal is found quickly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from dpkit.errors import ConfigurationError

from .loops import Loop, released

Draw = Callable[[int, Generator], Tensor]
Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]


def squared_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[n]: each record's mean squared distance to a fixed pattern times its target y [n, 1]."""
    flat = model(x).flatten(1)
    pattern = torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype))
    losses: Tensor = (flat - y * pattern).square().mean(1)
    return losses


def token_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[n]: the mean over each record's own counted tokens; y [n, t], -100 is not counted."""
    each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none", ignore_index=-100)
    return each.sum(1) / (y != -100).sum(1).clamp(min=1)


@dataclass(frozen=True)
class ModuleCase:
    """A module, how to draw inputs for it, and one loss a record.

    Args:
        build: makes the module; called under a fixed seed. It is tested in float64.
        inputs: ``inputs(n, generator)`` draws n records, [n, ...]; floating ones become float64.
        losses: ``losses(module, x, y)`` gives one loss a record [n]; by default squared errors of its outputs.
        targets: ``targets(x, generator)`` draws y; by default one number a record, [n, 1].

    >>> case = ModuleCase(lambda: nn.Linear(3, 2), lambda n, generator: torch.randn(n, 3, generator=generator))
    """

    build: Callable[[], nn.Module]
    inputs: Draw
    losses: Losses = squared_losses
    targets: Callable[[Tensor, Generator], Tensor] = field(
        default=lambda x, generator: torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
    )


# ---------------------------------------------------------------- modules


_WIDTHS = st.integers(1, 5)
_ACTIVATIONS = st.sampled_from([nn.Tanh, nn.GELU, nn.Sigmoid])


class Scale(nn.Module):
    """One factor a feature: a bare parameter without a rule."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _normal(*shape: int) -> Draw:
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


@st.composite
def _mlps(draw: st.DrawFn) -> ModuleCase:
    """Linear layers over 0 to 2 dimensions of positions, norms and stray parameters in between."""
    widths = draw(st.lists(_WIDTHS, min_size=2, max_size=4))
    bias, act = draw(st.booleans()), draw(_ACTIVATIONS)
    norm = draw(st.sampled_from([nn.Identity, nn.LayerNorm, nn.RMSNorm, Scale]))

    def build() -> nn.Module:
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for i, o in itertools.pairwise(widths[1:]):
            layers += [norm(i), act(), nn.Linear(i, o, bias=bias)]
        return nn.Sequential(*layers)

    return ModuleCase(build, _normal(*draw(st.sampled_from([(), (3,), (2, 3)])), widths[0]))


@st.composite
def _convolutions(draw: st.DrawFn) -> ModuleCase:
    """Convolutions of 1 or 2 dimensions, with group or instance norm."""
    d, groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, stride, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    side, transposed, act = draw(st.integers(3, 6)), draw(st.booleans()), draw(_ACTIVATIONS)
    conv: Any = ((nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d))[d - 1]
    instance: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d)[d - 1]
    how = draw(st.sampled_from(["none", "group", "instance"]))

    def build() -> nn.Module:
        width = 2 * groups
        norms = {"none": nn.Identity(), "group": nn.GroupNorm(2, width), "instance": instance(width, affine=True)}
        first = conv(channels * groups, width, kernel, stride, padding, groups=groups)
        second = (nn.Conv1d, nn.Conv2d)[d - 1](width, 2, 1)
        return nn.Sequential(first, nn.Identity() if side < 5 else norms[how], act(), second)

    return ModuleCase(build, _normal(channels * groups, *[side] * d))


class TokenModel(nn.Module):
    """Tokens, learned positions (a table, an embedding or none), a class token, attention, a head that may be tied."""

    def __init__(
        self, vocab: int, width: int, length: int, positions: str, token: bool, tied: bool, bias: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width, padding_idx=0 if bias else None)
        self.table = nn.Parameter(torch.randn(length, width)) if positions == "table" else None
        self.embedded = nn.Embedding(length, width) if positions == "embedding" else None
        self.cls_token = nn.Parameter(torch.randn(1, 1, width)) if token else None
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.relative = nn.Parameter(torch.randn(2 * (length + token) - 1)) if bias else None
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.table is not None:
            x = x + self.table
        if self.embedded is not None:
            x = x + self.embedded(torch.arange(tokens.shape[1]))
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self._attended(x)
        logits: Tensor = self.head(x if self.cls_token is None else x[:, 1:])
        return logits

    def _attended(self, x: Tensor) -> Tensor:
        bias, t = None, x.shape[1]
        if self.relative is not None:
            place = torch.arange(t)
            bias = self.relative[place[:, None] - place + t - 1]
        q, k, v = (layer(x) for layer in (self.query, self.key, self.value))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None))
        return y


@st.composite
def _sequences(draw: st.DrawFn) -> ModuleCase:
    """Token models; as many positions as records, or not."""
    length, vocab, width = draw(st.integers(1, 6)), draw(st.integers(2, 7)), draw(st.integers(1, 4))
    positions = draw(st.sampled_from(["table", "embedding", "none"]))
    token, tied, bias = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())

    def targets(x: Tensor, generator: Generator) -> Tensor:
        return x.roll(-1, 1).masked_fill(torch.rand(x.shape, generator=generator) < 0.3, -100)

    return ModuleCase(
        lambda: TokenModel(vocab, width, length, positions, token, tied, bias),
        lambda n, generator: torch.randint(0, vocab, (n, length), generator=generator),
        token_losses,
        targets,
    )


_KINDS: dict[str, Callable[[], st.SearchStrategy[ModuleCase]]] = {
    "mlp": _mlps,
    "convolution": _convolutions,
    "sequence": _sequences,
}


def modules(*kinds: str) -> st.SearchStrategy[ModuleCase]:
    """Models of torch's layers and of stray parameters, as `ModuleCase`.

    Args:
        kinds: of "mlp", "convolution", "sequence"; all by default.
    """
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown:
        raise ConfigurationError(
            f"modules{tuple(unknown)}", why="it is not known.", cure=f"use {', '.join(map(repr, _KINDS))}."
        )
    return st.one_of(*(_KINDS[kind]() for kind in kinds or _KINDS))


# ---------------------------------------------------------------- batches and cases


def batches(case: ModuleCase, least: int = 1, most: int = 6) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """least to most records for the module: inputs and targets."""

    def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = Generator().manual_seed(seed)
        x = case.inputs(n, generator)
        x = x.double() if x.is_floating_point() else x
        return x, case.targets(x, generator)

    return st.builds(batch, st.integers(least, most), st.integers(0, 2**16))


@dataclass(frozen=True)
class ClippingCase:
    """A module, records, one loss a record, and how to clip them.

    Attributes:
        scales: [n], what each record's loss is multiplied by: tiny, huge, zero.
        options: arguments of `PrivacyEngine.make_private`.
        strict: whether the loop uses ``engine.backward(losses)``.
    """

    module: ModuleCase
    inputs: Tensor
    targets: Tensor
    scales: Tensor
    options: dict[str, Any]
    strict: bool
    seed: int

    @property
    def n(self) -> int:
        return len(self.inputs)

    @property
    def max_grad_norm(self) -> float:
        bound: float = self.options["max_grad_norm"]
        return bound

    def model(self) -> nn.Module:
        """The module with its fixed initial weights, in float64."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return self.module.build().to(torch.float64)

    @property
    def loop(self) -> Loop:
        """The training loop on these records."""

        def loop(engine: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
            for x, y, s in loader:
                optimizer.zero_grad()
                losses = self.module.losses(model, x, y) * s
                if self.strict:
                    engine.backward(losses)
                else:
                    (losses.mean() if self.options.get("loss_reduction", "mean") == "mean" else losses.sum()).backward()
                optimizer.step()

        return loop

    def sum(self, records: Sequence[int]) -> Tensor:
        """f(D), flat [p]: the sum of clipped gradients that one real step on these records releases; see `released`."""

        def collate(rows: list[int]) -> tuple[Tensor, ...]:
            return self.inputs[rows], self.targets[rows], self.scales[rows]

        chosen: Any = list(records)
        return released(self.model(), chosen, self.loop, collate_fn=collate, **self.options)

    def check(self, record: int | None = None) -> float:
        """‖f(D ∪ {x}) − f(D)‖ / C for one record x (all by default); raises `AssertionError` if it is above 1."""
        whole, worst = self.sum(range(self.n)), 0.0
        for x in range(self.n) if record is None else [record]:
            others = [k for k in range(self.n) if k != x]
            rest = self.sum(others) if others else torch.zeros_like(whole)
            worst = max(worst, float((whole - rest).norm()) / self.max_grad_norm)
            assert worst <= 1 + 1e-5, f"record {x} moves the step by {worst:.6g} times max_grad_norm"
        return worst


@st.composite
def clipping_cases(
    draw: st.DrawFn,
    /,
    modules: st.SearchStrategy[ModuleCase] | None = None,
    least: int = 1,
    most: int = 6,
    wild: bool = True,
    **options: Any,
) -> ClippingCase:
    """Modules, records and clippings together.

    Args:
        modules: the modules to draw from (`modules()` by default; ``st.just(ModuleCase(...))`` for your own).
        least, most: how many records.
        wild: some records' losses are scaled by up to a million, or to zero.
        options: arguments of `PrivacyEngine.make_private` that are fixed instead of drawn; your own clipping, say.
    """
    module = draw(_modules() if modules is None else modules)
    x, y = draw(batches(module, least, most))
    sizes = st.sampled_from([1.0, 0.0, 1e-9, 1e-3, 1e3, 1e6, -1e6]) if wild else st.just(1.0)
    scales = torch.tensor(draw(st.lists(sizes, min_size=len(x), max_size=len(x))), dtype=torch.float64)
    drawn = {
        "clipping": draw(st.sampled_from(["flat", "automatic", "per_layer"])),
        "loss_reduction": draw(st.sampled_from(["mean", "sum"])),
        "max_physical_batch_size": draw(st.sampled_from([None, None, 1, 2, 3])),
        "max_grad_norm": draw(st.sampled_from([1.0, 0.01, 30.0])),
    }
    seed = draw(st.integers(0, 2**16))
    return ClippingCase(module, x, y, scales, {**drawn, **options}, draw(st.booleans()), seed)


_modules = modules
