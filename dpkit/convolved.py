"""The per-sample gradient of a convolution's weight, kept as the layer's input and its output's gradient.

Letters: n record, G groups, c input channels, o output channels, k the kernel's extent, s a position of the input
(pixel), t a position of the output; sizes of all spatial dimensions are multiplied together.

These ways lead to norm and sum:

- *grouped*: all [n, o, c / G, *k] gradients by one convolution_backward in which records are groups;
- *patches*: the same by one matrix product a record, of the gradient with the input's patches;
- *ghost*: no gradient is formed. The squared norm is the sum over t, t' of (g_t·g_t')(a_t·a_t') with patches a, and the
  patches' products are sums of products of pixels, a_t·a_t' = Σ_k x_(t+k)·x_(t'+k). So the pixels' products are taken
  once, [n, s, s], in place of the patches', and no patch is ever copied. The sum over records is then the ordinary
  convolution_backward of the weighted gradient;
- *grouped twice*, *patches twice*: gradients are formed for their norms alone, some records at a time, and the sum is
  that of *ghost*.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .forms import SCRATCH, Dense, Form, Normed, Way, described, not_below, rounded, times, wide


@dataclass(frozen=True)
class Convolved(Form):
    """A convolution's uses of its weight: ``x`` [n, c, *s] and ``grad`` [n, o, *t] (for a transposed one: exchanged).

    ``shape`` is the weight's, [o, c / groups, *k]; ``padding`` is of zeros.
    """

    x: Tensor
    grad: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def n(self) -> int:
        return self.x.shape[0]

    def _wide(self) -> tuple[Tensor, Tensor]:
        return wide(self.x.to(self.grad.dtype)), wide(self.grad)

    @property
    def held(self) -> int:
        return self.x[0].numel() * self.x.element_size()

    def kind(self) -> str:
        s, t = (rounded(v[0, 0].numel()) for v in (self.x, self.grad))
        how = [*self.stride, *self.padding, *self.dilation, self.groups]
        return f"Convolved {list(self.shape)} {how} s≤{s} t≤{t} {described(self.grad)}"

    # ---- the ways

    def ways(self) -> dict[str, Way]:
        o, c, *kernel = self.shape
        k, s, t = math.prod(kernel), self.x[0, 0].numel(), self.grad[0, 0].numel()
        p, kept = o * c * k, self.held + self.grad[0].numel() * self.grad.element_size()
        dense = p * max(4, self.grad.element_size())
        # Costs in units of 10^-11 s, fitted to what 25 layers of well-known networks took on a processor.
        product, moved = 2.3 * t * p, s * c * self.groups + t * o
        pixels = self.groups * (2.0 * s * s * (c + 60) + 28.0 * t * t * k) + 3.5 * t * t * o
        dear = {"grouped": (self._grouped, product * max(1.0, 8.0 / c) + 190.0 * p + 20.0 * moved)}
        if self.groups == 1:
            dear["patches"] = (self._patches, product + 42.0 * t * c * k + 70.0 * p + 24.0 * s * c + 48.0 * t * o)
        ways = {"ghost": Way(lambda: self, product + pixels, kept)}
        for name, (formed, cost) in dear.items():
            ways[name] = Way(lambda formed=formed: Dense(formed()), cost, dense)  # type: ignore[misc]
            if dense > kept:
                twice = cost + product + 240.0 * moved
                ways[f"{name} twice"] = Way(lambda name=name: self._normed(name), twice, kept)  # type: ignore[misc]
        return ways

    def _normed(self, way: str) -> Normed:
        """With the norms of gradients that are formed for them alone, some records at a time."""
        each = max(1, _RESULT // math.prod(self.shape))
        squares: list[Tensor] = []
        lengths: list[Tensor] = []
        for k in range(0, self.n, each):
            some = replace(self, x=self.x[k : k + each], grad=self.grad[k : k + each])
            squares.append(Dense(some._patches(lengths) if way == "patches" else some._grouped()).sq_norm())
        terms = torch.cat(lengths) if lengths else self.lengths()
        return Normed(self, not_below(torch.cat(squares), terms.square()))  # the sum is rounded in another way

    def _backward(self, x: Tensor, grad: Tensor, weight: Tensor, groups: int) -> Tensor:
        nothing = [0] * (x.ndim - 2)
        mask = [False, True, False]
        found: Tensor = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, nothing, groups, mask
        )[1]
        return found

    def _grouped(self) -> Tensor:
        """[n, o, c / G, *k], some records at a time: the kernels that do it need scratch of the result's size."""
        x, grad = self._wide()
        p, out = math.prod(self.shape), None
        each = max(1, _RESULT // p)
        for k in range(0, self.n, each):
            one, other = x[k : k + each], grad[k : k + each]
            n = len(one)
            one, other = (v.reshape(1, n * v.shape[1], *v.shape[2:]) for v in (one, other))
            like = grad.new_empty(n * self.shape[0], *self.shape[1:])  # tells the shape; its values are not read
            found = self._backward(one, other, like, n * self.groups).view(n, *self.shape)
            if n == self.n:
                return found
            out = grad.new_empty(self.n, *self.shape) if out is None else out
            out[k : k + each] = found
        return grad.new_empty(0, *self.shape) if out is None else out

    def _patches(self, lengths: list[Tensor] | None = None) -> Tensor:
        """[n, o, c, *k] for one group, some records at a time: their patches stay in the processor's cache. What
        `lengths` gives for them is appended to the list."""
        x, grad = self._wide()
        (o, c, *kernel), t = self.shape, grad.shape[2:].numel()
        size = math.prod(kernel) * c
        out = grad.new_empty(self.n, o, size)
        each = max(1, _CACHED // (size * t)) if grad.device.type == "cpu" else max(self.n, 1)
        for some in (slice(k, k + each) for k in range(0, self.n, each)):
            g, patches = grad[some].flatten(2), self._patched(x[some], grad.shape[2:])
            torch.bmm(g, patches, out=out[some])
            if lengths is not None:
                products = g.square().sum(1).sqrt_() * torch.linalg.vector_norm(patches, dim=2)
                lengths.append(products.sum(1))
        return out.view(self.n, o, *kernel, c).movedim(-1, 2) if kernel else out

    def _patched(self, x: Tensor, spatial: torch.Size) -> Tensor:
        """The patches [n, t, *k · c] of ``x`` [n, c, *s]."""
        x = self._padded(x.movedim(1, -1), last=True).contiguous()
        steps, kernel = x.stride()[1:-1], self.shape[2:]
        apart = [a * b for a, b in zip(steps, self.stride, strict=True)]
        inside = [a * b for a, b in zip(steps, self.dilation, strict=True)]
        patches = x.as_strided((len(x), *spatial, *kernel, x.shape[-1]), (x.stride(0), *apart, *inside, 1))
        return patches.reshape(len(x), spatial.numel(), -1)

    def _padded(self, x: Tensor, *, last: bool = False) -> Tensor:
        """``x`` [n, c, *s], or [n, *s, c] with ``last``, with its zeros around it."""
        if not any(self.padding):
            return x
        around = [v for size in reversed(self.padding) for v in (size, size)]
        return F.pad(x, [0, 0, *around] if last else around)

    # ---- what every form offers

    def dense(self) -> Tensor:
        return self._grouped()

    def _ghost(self) -> tuple[Tensor, Tensor]:
        """[n], [n]: squared norms as they add up, and the summed lengths of their terms; some records at a time."""
        x, grad = self._wide()
        g = grad.unflatten(1, (self.groups, -1)).flatten(3)  # [n, G, o / G, t]
        x = self._padded(x)
        pixels, t = x[0, 0].numel(), g.shape[-1]
        each = max(1, SCRATCH // (self.groups * (pixels * pixels + 2 * t * t)))
        norms, lengths = g.new_empty(self.n), g.new_empty(self.n)
        for some in (slice(k, k + each) for k in range(0, self.n, each)):
            gg = (g[some].transpose(-1, -2) @ g[some]).flatten(2)  # [n, G, t·t]
            aa = self._patch_products(x[some], grad.shape[2:])
            products = gg.mul_(aa)  # added up in pairs: a dot product of so many that are alike loses digits
            norms[some] = products.flatten(1).sum(1)
            lengths[some] = products[..., :: t + 1].clamp_min(0).sqrt().sum((1, 2))
        return norms, lengths

    def _patch_products(self, x: Tensor, spatial: torch.Size) -> Tensor:
        """[n, G, t·t]: the products of all patches of ``x`` [n, c, *s] with each other, from those of its pixels."""
        pixels = x.unflatten(1, (self.groups, -1)).flatten(3)
        xx = (pixels.transpose(-1, -2) @ pixels).view(len(x), self.groups, *x.shape[2:], *x.shape[2:])
        total: Tensor | None = None
        for offsets in itertools.product(*(range(k) for k in self.shape[2:])):
            window = tuple(
                slice(k * d, k * d + s * (t - 1) + 1, s)
                for k, d, s, t in zip(offsets, self.dilation, self.stride, spatial, strict=True)
            )
            part = xx[(slice(None), slice(None), *window, *window)]
            total = part.clone(memory_format=torch.contiguous_format) if total is None else total.add_(part)
        assert total is not None
        return total.flatten(2)

    def sq_norm(self) -> Tensor:
        norms, lengths = self._ghost()
        return not_below(norms, lengths.square())

    def lengths(self) -> Tensor:
        x, grad = self._wide()
        convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        pixels, g = (v.unflatten(1, (self.groups, -1)).square().sum(2) for v in (x, grad))
        ones = x.new_ones(self.groups, 1, *self.shape[2:])
        patches = convolution(pixels, ones, None, self.stride, self.padding, self.dilation, self.groups)
        products: Tensor = (patches * g).clamp_min(0).sqrt()
        return products.flatten(1).sum(1)

    def weighted_sum(self, w: Tensor) -> Tensor:
        x, grad = self._wide()
        grad = times(w, grad)
        like = grad.new_empty(self.shape)
        return self._backward(x, grad, like, self.groups).flatten()

    def take(self, records: Tensor) -> Convolved:
        return replace(self, x=self.x[records], grad=self.grad[records])

    def scaled(self, w: Tensor) -> Convolved:
        x, grad = self._wide()
        return replace(self, x=x, grad=times(w, grad))

    def folded(self, k: int) -> Dense:
        return Dense(self.dense()).folded(k)


_RESULT = 1 << 18
"""Numbers (1 MiB in float32) of gradients that one call of the grouped convolution makes."""
_CACHED = 1 << 19
"""Numbers (2 MiB in float32) of patches that are copied at a time on a CPU."""
