"""What a step frees is kept for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, torch
from torch import nn
from tests.training import attach, mlp

torch.set_num_threads(1)
attach(mlp())
convolve = [nn.Conv2d(1, 16, 5), nn.ReLU(), nn.Conv2d(16, 16, 5), nn.ReLU()]
model = nn.Sequential(*convolve, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(400, 1))
x = torch.randn(64, 1, 28, 28)

def step():
    model(x).sum().backward()
    model.zero_grad()

for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other ways")
def test_pages_are_not_taken_anew_in_every_step() -> None:
    """In a process in which something is private, an ordinary step of another network. (Else it takes some 1,500.)"""
    run = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200
