"""The same guard through transformers' Trainer: a causal language model, adapters, and `PrivateTrainer` for `Trainer`.

python -m examples.guard.with_trainer --model PATH_OR_HUB_ID --epsilon 8     # Llama-Guard-3-1B and the like
python -m examples.guard.with_trainer --limit 200                            # the installed SmolLM2-135M, a quick try
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dpkit.integrations.transformers import PrivateTrainer

from . import data
from .augment import Augmentation
from .language_model import METHODS, Conversations, Reader, choose_trained, load, losses, scores
from .metrics import judge
from .prompt import FULL, SHORT
from .train import seeds_of


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Tune on prompts, judge on XSTest, save the model; returns (and prints) AUPRC before and after, and ε."""
    parser = argparse.ArgumentParser(prog="python -m examples.guard.with_trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="135m", help="a folder or hub id; by default the installed SmolLM2-135M")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--train", choices=METHODS, default="lora")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=256, help="expected records a step")
    parser.add_argument(
        "--physical-batch-size", type=int, default=16, help="records that go through the model together"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--short", action="store_true", help="a policy of names only, without instructions")
    parser.add_argument("--limit", type=int, help="about this many rows of each split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "trained")
    args = parser.parse_args(argv)

    transformers.set_seed(args.seed)
    source = data.prompts()
    records = data.thinned(source.splits["train"], args.limit)
    test = data.thinned(data.xstest().splits["test"], args.limit)
    model, tokenizer = load(args.model)
    reader = Reader(tokenizer, SHORT if args.short else FULL, args.max_tokens)
    unsafe = [r.unsafe for r in test]
    before = judge(unsafe, scores(model, reader, source.taxonomy, test, batch=args.physical_batch_size), resamples=0)
    model = choose_trained(model, args.train)

    policies = torch.Generator().manual_seed(seeds_of(args.seed, 0)[0])
    dataset = Conversations(records, source.taxonomy, reader, Augmentation(), policies)

    def collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        return dict(zip(("input_ids", "attention_mask", "labels"), reader.collate(rows), strict=True))

    def by_record(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return losses(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])

    trainer = PrivateTrainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(args.out),
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=dataset,
        data_collator=collate,
        losses=by_record,
        privacy={
            "target_epsilon": args.epsilon,
            "target_delta": 1 / (10 * len(records)),
            "max_grad_norm": 1.0,
            "max_physical_batch_size": args.physical_batch_size,
        },
    )
    trainer.train()
    after = judge(unsafe, scores(model, reader, source.taxonomy, test, batch=args.physical_batch_size), resamples=0)
    found = {"before": before.auprc, "after": after.auprc, "prevalence": after.prevalence}
    found["epsilon"] = trainer.engine.get_epsilon()
    print(trainer.engine.statement())
    print(f"XSTest AUPRC {before.auprc:.3f} before, {after.auprc:.3f} after; a guess {after.prevalence:.3f}")
    trainer.engine.detach()
    model.save_pretrained(args.out)
    return found


if __name__ == "__main__":
    main()
