"""What Opacus has saved, loaded here. Nothing of it is imported: keys and plain values are enough.

Accountants' histories alone are read by `dpkit.accountants.from_opacus`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpkit.accountants import from_opacus

from .engine import PrivacyEngine
from .errors import CheckpointError

_PARTS = {"module_state_dict", "privacy_accountant_state_dict"}
_CELL = re.compile(r"l(\d+)(_reverse)?\.(ih|hh)\.(weight|bias)")


def opacus_state_dict(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A ``state_dict`` of Opacus's wrapped model with the keys that ``module``, the model itself, has.

    ``_module.`` (and the ``module.`` of a distributed wrapper) is taken off. Where ``module`` has torch's LSTM, GRU,
    RNN or MultiheadAttention in the place of Opacus's DPLSTM, DPGRU, DPRNN or DPMultiheadAttention, their parameters
    are put together as torch's have them. (With ``batch_first=True``, Opacus 1.6's attention mixes heads and positions:
    its weights then mean another function in torch's.)

    >>> opacus_state_dict({"_module.weight": torch.zeros(1, 2), "_module.bias": torch.zeros(1)}, nn.Linear(2, 1)).keys()
    dict_keys(['weight', 'bias'])

    Raises:
        CheckpointError: keys or shapes that are not the module's; some are named.
    """
    mine = module.state_dict()
    held = _unwrapped(state, mine)
    for path, part in module.named_modules():
        at = f"{path}." if path else ""
        if isinstance(part, nn.RNNBase):
            _recurrent(held, at)
        elif isinstance(part, nn.MultiheadAttention):
            _attention(held, at)
    missing, unknown = sorted(set(mine) - set(held)), sorted(set(held) - set(mine))
    other = [
        f"{key} {list(held[key].shape)} instead of {list(mine[key].shape)}"
        for key in sorted(set(mine) & set(held))
        if isinstance(mine[key], Tensor) and held[key].shape != mine[key].shape
    ]
    if missing or unknown or other:
        found = [("missing: ", missing), ("unknown: ", unknown), ("", other)]
        raise CheckpointError(
            f"the saved model is another one ({'; '.join(what + _some(keys) for what, keys in found if keys)})",
            why="its weights have no place in this module. Nothing was loaded.",
            cure="build the model that was saved, with torch's own layers where Opacus's were.",
        )
    return held


def load_opacus_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    engine: PrivacyEngine,
    module: nn.Module,
    optimizer: Optimizer | None = None,
) -> dict[str, Any]:
    """Go on from what Opacus's ``PrivacyEngine.save_checkpoint`` wrote: weights, moments, and what was spent.

    Call it before `PrivacyEngine.make_private`. Opacus's history is counted by ``engine.accountant``, so that
    ``get_epsilon``, ``max_epsilon`` and dpkit's own checkpoints include it (a ledger file does not: it holds dpkit's
    releases).

    Guarantee: none for the steps that Opacus took. They are counted as its history says; where that history is not
    true (``poisson_sampling=False``, gradients that were wrong), neither is the sum.

    Args:
        checkpoint: the file, read without running code; or its content.
        engine: whose accountant is to count the history.
        module: the model, not wrapped; `opacus_state_dict` says which layers may differ.
        optimizer: the model's optimizer, of the kind that was saved. Without it, the optimizer starts afresh, which
            costs no privacy.

    Returns:
        What else the checkpoint holds: the states of noise and clipping schedulers, entries of your own.

    Raises:
        CheckpointError: no such file, or not what is expected; nothing was loaded.
        AccountingError: a history that is not understood; nothing was loaded.
    """
    held = dict(checkpoint) if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if not set(held) >= _PARTS:
        raise CheckpointError(
            f"a checkpoint with the keys {sorted(map(str, held))}",
            why=f"Opacus's save_checkpoint writes {' and '.join(sorted(_PARTS))}; without the history, what was spent "
            "would be forgotten.",
            cure="for weights alone use module.load_state_dict(dpkit.opacus_state_dict(state, module)).",
        )
    saved, moments = held.pop("module_state_dict"), held.pop("optimizer_state_dict", None)
    history = from_opacus(held.pop("privacy_accountant_state_dict"))
    weights = opacus_state_dict(saved, module)
    if optimizer is not None:
        mine = module.state_dict()
        moments = _fitting(moments, optimizer, list(_unwrapped(saved, mine)) == list(mine))
    engine.accountant.compose(history)
    module.load_state_dict(weights)
    if optimizer is not None and moments is not None:
        optimizer.load_state_dict(moments)
    return held


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"{os.fspath(path)} cannot be read ({error.strerror})",
            why="there is nothing to go on from.",
            cure="name a file that Opacus's save_checkpoint wrote.",
        ) from error
    except Exception as error:  # whatever torch's reader raises
        raise CheckpointError(
            f"{os.fspath(path)} holds more than plain values, or is damaged ({str(error).splitlines()[0]})",
            why="reading it would run code that the file brings along.",
            cure="if you trust the file, pass torch.load(path, weights_only=False) instead of its name.",
        ) from error
    return dict(held) if isinstance(held, Mapping) else {}


def _some(keys: list[str], most: int = 6) -> str:
    more = len(keys) - most
    return ", ".join(keys[:most]) + (f" and {more} more" if more > 0 else "")


def _unwrapped(state: Mapping[str, Tensor], mine: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state without the wrappers' prefixes, in its own order."""
    held = dict(state)
    for prefix in ("_module.", "module."):
        if held and all(key.startswith(prefix) for key in held) and not any(key.startswith(prefix) for key in mine):
            held = {key.removeprefix(prefix): value for key, value in held.items()}
    return held


def _recurrent(held: dict[str, Tensor], at: str) -> None:
    """Opacus's cells as torch's flat parameters, in place; where both are there (they are the same), the flat ones."""
    for key in [key for key in held if key.startswith(at)]:
        found = _CELL.fullmatch(key.removeprefix(at))
        if found is not None:
            layer, reverse, way, what = found.groups()
            value = held.pop(key)
            held.setdefault(f"{at}{what}_{way}_l{layer}{reverse or ''}", value)


def _attention(held: dict[str, Tensor], at: str) -> None:
    """Opacus's three projections as torch's packed one (or three, where their widths differ), in place."""
    if f"{at}qlinear.weight" not in held:
        return
    weights = [held.pop(f"{at}{name}linear.weight") for name in "qkv"]
    if all(weight.shape == weights[0].shape for weight in weights):
        held[f"{at}in_proj_weight"] = torch.cat(weights)
    else:
        held.update({f"{at}{name}_proj_weight": weight for name, weight in zip("qkv", weights, strict=True)})
    biases = [held.pop(f"{at}{name}linear.bias", None) for name in "qkv"]
    present = [bias for bias in biases if bias is not None]
    if len(present) == 3:
        held[f"{at}in_proj_bias"] = torch.cat(present)
    for name in "kv":
        if f"{at}seq_bias_{name}.bias" in held:
            held[f"{at}bias_{name}"] = held.pop(f"{at}seq_bias_{name}.bias").view(1, 1, -1)


def _fitting(moments: Any, optimizer: Optimizer, same: bool) -> dict[str, Any]:
    """The optimizer's state, if it is one for these parameters; ``same``: their names were in this order."""
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    seen = None
    if not isinstance(moments, Mapping) or not {"state", "param_groups"} <= set(moments):
        seen = "the checkpoint holds no optimizer's state"
    elif sum(len(group["params"]) for group in moments["param_groups"]) != len(mine):
        seen = "the optimizer that was saved has another number of parameters"
    elif moments["state"] and not same:
        seen = "the optimizer's moments are in the order of Opacus's layers, the model has torch's"
    else:
        order = [k for group in moments["param_groups"] for k in group["params"]]
        for k, parameter in zip(order, mine, strict=True):
            for name, value in moments["state"].get(k, {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    seen = f"{name} of parameter {k} is {list(value.shape)} instead of {list(parameter.shape)}"
    if seen is not None:
        raise CheckpointError(
            seen,
            why="moments of other parameters would drive these. Nothing was loaded.",
            cure="leave the optimizer out: it then starts afresh, which costs no privacy.",
        )
    return dict(moments)
