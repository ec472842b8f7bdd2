"""Differentially private training in two lines, on scikit-learn's handwritten digits.

    python examples/two_lines.py

An ordinary PyTorch loop; the two added lines are marked. One image is one record: ε speaks of images, not of writers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpkit


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train, print and return (test accuracy, ε)."""
    parser = argparse.ArgumentParser(description="Private training in two lines.")
    parser.add_argument("--epsilon", type=float, default=3.0, help="the privacy budget")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args(argv)

    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(digits.target)
    train, test = slice(None, 1437), slice(1437, None)
    delta = 1e-4  # well below 1 / (number of training records)

    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=256, shuffle=True)
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    engine = dpkit.PrivacyEngine()  # ← the first added line, and the second:
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader,
        target_epsilon=args.epsilon, target_delta=delta, epochs=args.epochs, max_grad_norm=1.0,
    )  # fmt: skip

    for _ in range(args.epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    epsilon = engine.get_epsilon(delta=delta)
    print(f"test accuracy {accuracy:.3f} at ε = {epsilon:.2f}, δ = {delta:g}")
    return accuracy, epsilon


if __name__ == "__main__":
    main()
