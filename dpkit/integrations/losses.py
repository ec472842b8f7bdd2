"""One loss a record for the heads of transformers, whose own ``.loss`` is an average over the batch's tokens.

n record, t position, v class. Within a record the mean is taken over its own tokens; labels of -100 count for nothing,
and a record that has no others has loss 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit.errors import ConfigurationError

IGNORED = -100
_CLASSES = ("ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification")
_TOKENS = ("ForTokenClassification", "ForMaskedLM")
_GENERATION = ("ForCausalLM", "ForConditionalGeneration")


def token_losses(logits: Tensor, labels: Tensor, *, shift: bool = False, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, the mean over each record's own labels.

    Args:
        logits: [n, t, v], or [n, v] with labels [n].
        labels: [n, t]; where logits has more positions (a soft prompt), the labels are those of its last ones.
        shift: position t predicts label t + 1.
        smoothing: label smoothing as the Trainer's: that share goes to the mean over all classes.

    Returns:
        [n]
    """
    logits = logits.float()
    if logits.ndim == 2:
        logits, labels = logits.unsqueeze(1), labels.view(-1, 1)
    labels = F.pad(labels.to(logits.device), (logits.shape[1] - labels.shape[1], 0), value=IGNORED)
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    scores = -logits.log_softmax(-1)
    losses = scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * scores.mean(-1)
    return torch.where(counted, losses, 0.0).sum(1) / counted.sum(1).clamp(min=1)


def span_losses(start: Tensor, end: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Extractive question answering: the mean of the losses of the answer's first and last position.

    Args:
        start, end: logits [n, t].
        first, last: positions [n]; one outside of the t counts for nothing, and in the batch's mean for less.

    Returns:
        [n]
    """
    t = start.shape[1]
    parts = [
        F.cross_entropy(logits.float(), at.view(-1).clamp(0, t), ignore_index=t, reduction="none")
        for logits, at in ((start, first), (end, last))
    ]
    return (parts[0] + parts[1]) / 2


def target_losses(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    """Regression (squared error) or independent labels (binary cross-entropy), the mean over each record's targets.

    Args:
        logits: [n, v].
        labels: [n, v], or [n] with v = 1.

    Returns:
        [n]
    """
    labels = labels.to(logits.device).view(logits.shape)
    if problem == "regression":
        return (logits - labels).square().flatten(1).mean(1)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").flatten(1).mean(1)


def head_losses(model: Any, inputs: dict[str, Any], call: Any, *, smoothing: float = 0.0) -> Tensor:
    """The losses of a batch, by what kind of head the model has.

    Args:
        model: a model of transformers (inside its adapters), that says which kind.
        inputs: what the model is called with, labels included; they do not reach it.
        call: the model as it is to be called.
        smoothing: the Trainer's label smoothing.

    Returns:
        [n]

    Raises:
        ConfigurationError: no such kind is known, or the labels are missing.
    """
    kind, config, inputs = str(getattr(model, "loss_type", None)), model.config, dict(inputs)
    needed = ("start_positions", "end_positions") if kind == "ForQuestionAnswering" else ("labels",)
    known = (*_CLASSES, *_TOKENS, *_GENERATION, "ForQuestionAnswering")
    missing = [name for name in needed if inputs.get(name) is None]
    if kind not in known or missing:
        raise ConfigurationError(
            f"{type(model).__name__} has a loss of kind {kind}, the batch has {', '.join(inputs)}",
            why="the model's own loss is one for the whole batch, and the loss of each record is not known.",
            cure="pass losses=f, a function of (model, inputs) that returns one loss a record.",
        )
    labels, *others = (inputs.pop(name) for name in needed)
    if kind in _GENERATION and config.is_encoder_decoder and inputs.get("decoder_input_ids") is None:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    outputs = call(**inputs)
    if kind == "ForQuestionAnswering":
        return span_losses(outputs["start_logits"], outputs["end_logits"], labels, *others)
    logits = outputs["logits"]
    if kind in _CLASSES:
        problem = getattr(config, "problem_type", None) or _problem(config.num_labels, labels)
        if problem != "single_label_classification":
            return target_losses(logits, labels, problem)
    shift = kind in _GENERATION and not config.is_encoder_decoder
    return token_losses(logits, labels, shift=shift, smoothing=smoothing)


def _problem(num_labels: int, labels: Tensor) -> str:
    """What transformers takes a classification for that does not say."""
    if num_labels == 1:
        return "regression"
    whole = labels.dtype in (torch.long, torch.int)
    return "single_label_classification" if whole else "multi_label_classification"
