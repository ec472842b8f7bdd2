"""torch.compile, before or after `make_private`: the same private steps as without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.training import attach, data, squared_loss, train, weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Scale(nn.Module):
    """A parameter without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).tanh()


class Positions(nn.Module):
    """A layer whose rule is of no use, since its input is not of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).repeat(len(x), 1)
        found: Tensor = self.out((x.unsqueeze(-1) * self.table(places)).tanh().mean(1))
        return found


def with_positions() -> nn.Module:
    torch.manual_seed(0)
    return Positions()


def with_rules() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 1))


def without_rules() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), Scale(), nn.Linear(5, 1))


def trained(build: Callable[[], nn.Module], when: str, backend: str) -> tuple[Tensor, Tensor]:
    """The weights before and after three private steps."""
    model = build()
    before = weights(model)
    run = attach(torch.compile(model, backend=backend) if when == "before" else model, data(), method="model")
    if when == "in place":
        model.compile(backend=backend)
    if when == "after":
        called = torch.compile(model, backend=backend)
        for _ in range(3):
            for batch in run.loader:
                squared_loss(called, batch).backward()
                run.optimizer.step()
    else:
        train(run, 3)
    return before, weights(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("when", ["before", "after", "in place"])
@pytest.mark.parametrize("build", [with_rules, without_rules, with_positions])
def test_compiled_models_take_the_same_steps(build: Callable[[], nn.Module], when: str, backend: str) -> None:
    """Whether or not the layers have rules."""
    _, expected = trained(build, "never", backend)
    before, found = trained(build, when, backend)
    assert (found - before).norm() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
