"""`--size 135m`: real pre-trained weights (SmolLM2, or --model), adapters on the top layers, on prompts and XSTest.

Every prompt begins with the same policy, and the lower layers never change. So the policy goes through them once, each
message once, and training starts from what they said. Only the decision is learned: the output layer is cut to the two
words that it is read off from, as in Llama Guard 3 1B, whose output layer is cut to the tokens it ever emits.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from . import data
from .data import Record
from .language_model import Reader, choose_trained, load
from .metrics import judge, threshold_at_fpr
from .page import Part
from .prompt import SHORT, Layout
from .train import Privacy, Recipe, Run, seeds_of, train


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    method: str = "lora"
    layers: int = 2
    rank: int = 8
    max_tokens: int = 160
    message_tokens: int = 32
    limit: int | None = None
    tune: Recipe = field(default_factory=lambda: Recipe(epochs=10, batch_size=512, lr=2e-3, optimizer="adam"))


class Lower(nn.Module):
    """The frozen layers, in bfloat16: tokens to hidden states, the policy's once for all."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.base = copy.deepcopy(model.model)
        self.base.layers = self.base.layers[:-layers]
        self.base.norm = nn.Identity()
        self.base.to(torch.bfloat16).eval()

    @torch.no_grad()
    def forward(
        self, policy: list[int], messages: list[list[int]], told: Callable[[str], None]
    ) -> tuple[Tensor, Tensor]:
        """The policy's hidden states [p, d], and the messages' [n, t, d], padded on the right."""
        first = self.base(input_ids=torch.tensor([policy]), use_cache=True)
        given = inspect.signature(self.base.forward).parameters
        name = "cache" if "cache" in given else "past_key_values"  # renamed in transformers 5
        width = max(map(len, messages))
        known = first.last_hidden_state
        hidden = torch.zeros(len(messages), width, known.shape[-1], dtype=known.dtype)
        chunks = torch.tensor([len(m) for m in messages]).argsort().split(32)
        for k, chunk in enumerate(chunks):
            t = max(len(messages[i]) for i in chunk)
            tokens = torch.tensor([messages[i] + [0] * (t - len(messages[i])) for i in chunk])
            cache = copy.deepcopy(first.past_key_values)
            cache.batch_repeat_interleave(len(chunk))
            mask = torch.ones(len(chunk), len(policy) + t, dtype=torch.long)  # causal: what is padded comes later
            found = self.base(input_ids=tokens, attention_mask=mask, use_cache=True, **{name: cache})
            hidden[chunk, :t] = found.last_hidden_state
            if k % 20 == 0:
                told(f"  frozen layers: {k + 1} of {len(chunks)} batches")
        return known[0], hidden


class Top(nn.Module):
    """The layers that are tuned: hidden states to the logits of (safe, unsafe)."""

    def __init__(self, model: Any, plan: Plan, policy: Tensor, reader: Reader) -> None:
        super().__init__()
        inner = copy.deepcopy(model.model).float()
        inner.layers = inner.layers[-plan.layers :]
        inner.embed_tokens = nn.Embedding(1, 1)  # not used: the input is hidden states
        for k, layer in enumerate(inner.layers):
            layer.self_attn.layer_idx = k
        inner.config.num_hidden_layers = plan.layers
        self.inner = choose_trained(inner, plan.method, plan.layers, plan.rank)
        for name, parameter in self.inner.named_parameters():
            if "embed_tokens" in name:
                parameter.requires_grad_(False)
        self.register_buffer("policy", policy.float())
        words = model.lm_head.weight[[reader.safe, reader.unsafe]].detach().float().clone()
        self.words = nn.Parameter(words, requires_grad=plan.method == "full")

    def forward(self, hidden: Tensor, length: Tensor) -> Tensor:
        """[n, t, d] and [n] to [n, 2]."""
        n, p = len(hidden), len(self.policy)
        whole = torch.cat([self.policy.expand(n, -1, -1), hidden.float()], 1)
        places = torch.arange(whole.shape[1], device=hidden.device)
        mask = (places < p + length.unsqueeze(1)).long()
        states = self.inner(inputs_embeds=whole, attention_mask=mask, use_cache=False).last_hidden_state
        last = states.gather(1, (p + length - 1).view(n, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
        return F.linear(last, self.words)


def losses(top: nn.Module, hidden: Tensor, length: Tensor, unsafe: Tensor) -> Tensor:
    """[n]: the cross-entropy of the decision."""
    return F.cross_entropy(top(hidden, length), unsafe, reduction="none")


@torch.no_grad()
def probabilities(top: nn.Module, tensors: tuple[Tensor, ...], batch: int = 64) -> Tensor:
    """[n]: P(unsafe)."""
    top.eval()
    hidden, length = tensors[:2]
    rows = torch.arange(len(hidden)).split(batch)
    return torch.cat([top(hidden[k], length[k]).softmax(1)[:, 1] for k in rows])


def study(
    plan: Plan,
    epsilons: Sequence[float],
    *,
    seed: int = 0,
    model: str = "135m",
    layout: Layout = SHORT,
    told: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Judge the model as it is, then tuned without privacy and for each ε; all figures."""
    prompts = data.prompts()
    whole, tokenizer = load(model)
    reader = Reader(tokenizer, layout, plan.max_tokens)
    splits = {name: data.thinned(prompts.splits[name], plan.limit) for name in ("train", "val")}
    splits["xstest"] = data.thinned(data.xstest().splits["test"], plan.limit)
    told_tokens = {
        name: [reader.prompt(prompts.taxonomy, r.conversation, most=plan.message_tokens) for r in rows]
        for name, rows in splits.items()
    }
    everything = [tokens for rows in told_tokens.values() for tokens in rows]
    p = _shared(everything)
    told(f"{p} tokens of policy, {sum(len(t) - p for t in everything):,} tokens of {len(everything):,} messages")
    policy, hidden = Lower(whole, plan.layers)(everything[0][:p], [t[p:] for t in everything], told)
    lengths, unsafe = torch.tensor([len(t) - p for t in everything]), torch.tensor(_unsafe(splits))
    at, tensors = 0, {}
    for name, rows in splits.items():
        tensors[name] = tuple(x[at : at + len(rows)] for x in (hidden, lengths, unsafe))
        at += len(rows)

    def figures(top: Top) -> dict[str, float]:
        p_val, p_xs = probabilities(top, tensors["val"]), probabilities(top, tensors["xstest"])
        cut = threshold_at_fpr(tensors["val"][2], p_val, 0.05)
        judged = judge(tensors["xstest"][2], p_xs, cut)
        return {k: round(v, 4) for k, v in asdict(judged).items()}

    delta = 1 / (10 * len(splits["train"]))
    found = {"zero-shot": figures(Top(whole, plan, policy, reader))}
    told(f"zero-shot: {found['zero-shot']['auprc']:.3f}")
    runs: list[Run] = []
    for k, epsilon in enumerate((None, *epsilons)):
        torch.manual_seed(seed)  # the adapters' start
        top = Top(whole, plan, policy, reader)
        privacy = None if epsilon is None else Privacy(epsilon, delta)
        run = train(top, TensorDataset(*tensors["train"]), losses, plan.tune, privacy, seeds=seeds_of(seed, k))
        runs.append(run)
        found[run.name] = figures(top)
        told(f"{run.name}: XSTest AUPRC {found[run.name]['auprc']:.3f}")
    trained = sum(q.numel() for q in Top(whole, plan, policy, reader).parameters() if q.requires_grad)
    return {
        "size": "135m",
        "plan": asdict(plan),
        "parameters": {"all": sum(q.numel() for q in whole.parameters()), "trained": trained},
        "rows": {name: len(rows) for name, rows in splits.items()},
        "delta": delta,
        "figures": found,
        "runs": [asdict(replace(run, epsilons=[])) for run in runs],
    }


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with; each keeps one of its own."""
    most = min(map(len, rows)) - 1
    return next((k for k in range(most) if any(row[k] != rows[0][k] for row in rows)), most)


def _unsafe(splits: dict[str, list[Record]]) -> list[int]:
    return [int(r.unsafe) for rows in splits.values() for r in rows]


def sections(result: dict[str, Any], command: str) -> Iterable[Part]:
    """The page."""
    yield "h1", "A pre-trained language model as a guard, privately tuned"
    yield (
        "lead",
        f"{result['parameters']['all']:,} weights, of which {result['parameters']['trained']:,} are tuned "
        f"({result['plan']['method']}, top {result['plan']['layers']} layers) on {result['rows']['train']:,} prompts.",
    )
    yield "p", f"Command: `{command}`. δ = {result['delta']:.2g}; the unit is one prompt. Judged on XSTest."
    spent = {run["name"]: run["epsilon"] for run in result["runs"]}
    rows = [
        [
            n,
            f"{spent[n]:.2f}" if n in spent else "0",
            f"{m['auprc']:.3f} ({m['auprc_low']:.3f} to {m['auprc_high']:.3f})",
        ]
        + [f"{m[k]:.3f}" for k in ("prevalence", "auroc", "precision", "recall", "f1", "fpr", "ece")]
        for n, m in result["figures"].items()
    ]
    heads = ("run", "ε spent", "AUPRC (95%)", "prevalence", "AUROC", "precision", "recall", "F1", "FPR", "ECE")
    yield "table", ("XSTest; decisions at the threshold with 5% FPR on validation prompts", heads, rows)
    for run in result["runs"]:
        if run["statement"]:
            yield "details", (f"{run['name']}: the engine's statement", run["statement"])
    cost = [
        [r["name"], r["steps"], f"{1000 * r['seconds_per_step']:.0f}", f"{r['peak_mib']:.0f}"] for r in result["runs"]
    ]
    yield (
        "table",
        ("Processor time of a step, and the process's largest memory", ("run", "steps", "ms a step", "MiB"), cost),
    )
