"""The newcomer's path: a fresh virtual environment, a built wheel, the code of the README and of the tour."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BEFORE = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import dpkit

data = TensorDataset(torch.randn(200, 8), torch.randint(0, 2, (200,)))
loader = DataLoader(data, batch_size=20, shuffle=True)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
"""The loop that the README's reader has, up to where its two lines go."""
AFTER = """
for epoch in range(10):
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
epsilon = engine.get_epsilon(delta=1e-5)
assert 2.9 < epsilon <= 3.0, epsilon
assert type(model) is nn.Sequential and type(optimizer) is torch.optim.SGD
assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
"""


def blocks(page: str) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def test_the_two_lines() -> None:
    """README's first block between the two halves of an ordinary loop, as it stands there."""
    exec(BEFORE + blocks("README.md")[0] + AFTER, {"__name__": "__main__"})


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command; its output. A network that is not there skips the test."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=550, check=False)
    if done.returncode and re.search(r"Could not find a version|ConnectionError|Temporary failure", done.stderr):
        pytest.skip(f"no package registry: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_a_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    """Build, install with what it says it needs, paste, run; the command line, too. No sources lie beside it."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path / "wheels", ROOT, cwd=tmp_path)
    run(python, ROOT / "tools" / "install_torch.py", cwd=tmp_path)
    [wheel] = (tmp_path / "wheels").glob("dpkit-*.whl")
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    held = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    assert not re.search(r"^(opacus|transformers|matplotlib|scikit-learn)==", held, re.M)
    where = run(python, "-c", "import dpkit, dpkit.accountants, dpkit.layers; print(dpkit.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path))
    run(python, "-W", "error", "-c", BEFORE + blocks("README.md")[0] + AFTER, cwd=tmp_path)
    tour = run(python, "-W", "error", "-c", "\n".join(blocks("docs/index.md")), cwd=tmp_path)
    assert re.search(r"accuracy 0\.\d\d at ε = [23]\.\d\d", tour)
    assert "differentially private" in tour
    command = (tmp_path / "venv" / "bin" / "dpkit", "--help")
    assert "budget" in run(*command, cwd=tmp_path)
    answer = run(python, "-m", "dpkit.accountants", "epsilon", "--help", cwd=tmp_path)
    assert "usage" in answer
