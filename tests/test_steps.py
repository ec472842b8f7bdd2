"""Several steps in a row, each compared with the oracle: batches of other sizes, other lengths.

What an engine learns about a model on its first batch must not be mistaken for a property of every batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dpkit
from tests.cases import CASES, ModelCase, text
from tests.hf_models import HF_CASES
from tests.oracle import PyTree, clipped_sum, norm, size, take, trainable
from tests.stepping import median_norm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # an even kernel pads unevenly: on purpose

RECORDS, EXPECTED, EPOCHS = 8, 2, 2
LENGTHS = {"lm-tied", "lm-untied-T-equals-n", "bert", "roberta", "gpt2", "gpt2_cls", "llama", "llama_tied", "t5"}


def compare_steps(case: ModelCase, batch: PyTree, crop: Callable[[PyTree], PyTree] = lambda part: part) -> None:
    """Fails unless every step over Poisson draws from `batch` is the oracle's on the records that were drawn."""
    model = case.model(torch.float64)
    twin = copy.deepcopy(model)
    max_grad_norm = median_norm(twin, case.losses, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(
        range(RECORDS),
        batch_size=EXPECTED,
        collate_fn=lambda rows: crop(take(batch, list(rows))),
        generator=torch.Generator().manual_seed(1),
    )
    tolerance = 1e-5 if "float32_inside" in case.tags else 1e-9
    sizes = []
    try:
        model, optimizer, loader = dpkit.PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=0.0,
            max_grad_norm=max_grad_norm,
            batch_first="time_first" not in case.tags,
        )
        for _ in range(EPOCHS):
            for part in loader:
                n = size(part)
                sizes.append(n)
                before = {name: value.detach().clone() for name, value in trainable(model).items()}
                twin.load_state_dict(model.state_dict())
                optimizer.zero_grad()
                case.losses(model, part).mean().backward()
                optimizer.step()
                total = clipped_sum(twin, case.losses, part, n, max_grad_norm)
                change = {name: (value.detach() - before[name]) / 0.1 for name, value in trainable(model).items()}
                error = norm({name: change[name] + total[name] / EXPECTED for name in total})
                assert error <= tolerance * norm(total) / EXPECTED, f"step {len(sizes)}, {n} records: {error:.2e}"
    except dpkit.PrivacyError as refusal:
        if "may_refuse" in case.tags and not isinstance(refusal, dpkit.GradientMismatchError):
            pytest.skip(f"refused: {type(refusal).__name__}: {refusal}")
        raise
    assert len(set(sizes)) > 1, "the draws should differ in size"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_poisson_draws(case: ModelCase) -> None:
    """Draws of various sizes, one record included."""
    compare_steps(case, case.records(RECORDS, dtype=torch.float64))


@pytest.mark.parametrize(
    "case", [case for case in (*CASES, *HF_CASES) if case.name in LENGTHS], ids=lambda case: case.name
)
def test_lengths_vary(case: ModelCase) -> None:
    """Dynamic padding: every batch is cropped to its own longest sequence."""

    def crop(part: PyTree) -> PyTree:
        length = int(part["attention_mask"].sum(1).max())
        return {name: value[:, :length] if value.ndim == 2 else value for name, value in part.items()}

    batch = text(RECORDS, 7, 11, torch.Generator().manual_seed(0))
    drawn = case.records(RECORDS)
    if drawn["labels"].ndim == 1:
        batch["labels"] = drawn["labels"]
    if "decoder_input_ids" in drawn:
        batch["decoder_input_ids"] = batch["input_ids"]
    compare_steps(case, batch, crop)


@pytest.mark.parametrize("records", [1, 3, RECORDS])
@pytest.mark.parametrize("name", ["vision-transformer", "lm-tied", "encoder-layer", "cnn", "called-twice"])
def test_evaluation_between_steps(name: str, records: int) -> None:
    """Evaluating other data, of any number of records, while a batch is being worked on changes nothing."""
    case = next(case for case in CASES if case.name == name)
    held_out = case.records(records, dtype=torch.float64, seed=2)

    def losses(model: nn.Module, batch: PyTree) -> torch.Tensor:
        with torch.no_grad():
            case.losses(model.eval(), held_out)
        return case.losses(model.train(), batch)

    evaluating = replace(case, losses=losses)
    compare_steps(evaluating, case.records(RECORDS, dtype=torch.float64))
