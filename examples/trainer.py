"""A Hugging Face Trainer made private: a small BERT tells which of scikit-learn's digits a row of pixels shows.

    python examples/trainer.py

The pixels' seventeen grey values are the words, so that nothing has to be downloaded; the two added lines are marked.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from dpkit.integrations.transformers import PrivateTrainer  # ← instead of transformers.Trainer


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Train, print and return (test accuracy, ε)."""
    parser = argparse.ArgumentParser(description="A private Trainer.")
    parser.add_argument("--epsilon", type=float, default=8.0, help="the privacy budget")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args(argv)

    digits = load_digits()
    rows = [
        {"input_ids": torch.tensor(pixels, dtype=torch.long), "labels": int(label)}
        for pixels, label in zip(digits.data, digits.target, strict=True)
    ]
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=17, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    delta = 1e-4  # well below 1 / (number of training records)

    def accuracy(judged: Any) -> dict[str, float]:
        return {"accuracy": float((judged.predictions.argmax(-1) == judged.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        trainer = PrivateTrainer(
            model=model,
            args=TrainingArguments(
                folder, num_train_epochs=args.epochs, learning_rate=3e-3, lr_scheduler_type="constant",
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
