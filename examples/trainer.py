"""A Hugging Face Trainer made private, on scikit-learn's handwritten digits.

    python examples/trainer.py

A small vision transformer is trained from nothing, so that nothing has to be downloaded; the two added lines are
marked. One image is one record.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from dpkit.integrations.transformers import PrivateTrainer  # ← instead of transformers.Trainer


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train, print and return (test accuracy, ε)."""
    parser = argparse.ArgumentParser(description="A private Trainer.")
    parser.add_argument("--epsilon", type=float, default=8.0, help="the privacy budget")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args(argv)

    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=True)]
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=128, num_labels=10, initializer_range=0.1,
        )
    )  # fmt: skip
    delta = 1e-4  # well below 1 / (number of training records)

    def accuracy(judged: Any) -> dict[str, float]:
        return {"accuracy": float((judged.predictions.argmax(-1) == judged.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        trainer = PrivateTrainer(
            model=model,
            args=TrainingArguments(
                folder, num_train_epochs=args.epochs, learning_rate=5e-3, lr_scheduler_type="constant",
                per_device_train_batch_size=64, gradient_accumulation_steps=4, max_grad_norm=1.0,
                logging_strategy="epoch", save_strategy="no", report_to=[],
            ),
            train_dataset=rows[:1437],
            eval_dataset=rows[1437:],
            compute_metrics=accuracy,
            privacy={"target_epsilon": args.epsilon, "target_delta": delta},  # ← and this
        )  # fmt: skip
        trainer.train()
        reached = trainer.evaluate()["eval_accuracy"]
    epsilon = trainer.engine.get_epsilon()
    print(f"test accuracy {reached:.3f} at ε = {epsilon:.2f}, δ = {delta:g}")
    return reached, epsilon


if __name__ == "__main__":
    main()
