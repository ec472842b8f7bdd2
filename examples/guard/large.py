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
from .language_model import Reader, Shots, choose_trained, load
from .metrics import judge, threshold_at_fpr
from .page import Part
from .prompt import SHORT, Conversation, Layout, Verdict
from .taxonomy import Taxonomy
from .train import Privacy, Recipe, Run, seeds_of, train

FITTED = ("train", "val")  # what training and thresholds see


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    method: str = "lora"
    layers: int = 2
    rank: int = 8
    max_tokens: int = 256  # two examples make the policy longer
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

    def forward(self, hidden: Tensor, length: Tensor, policy: Tensor | None = None) -> Tensor:
        """[n, t, d] and [n] to [n, 2]; under another ``policy`` [p, d] than the one that is trained on, if given."""
        policy = self.policy if policy is None else policy.float()
        n, p = len(hidden), len(policy)
        whole = torch.cat([policy.expand(n, -1, -1), hidden.float()], 1)
        places = torch.arange(whole.shape[1], device=hidden.device)
        mask = (places < p + length.unsqueeze(1)).long()
        states = self.inner(inputs_embeds=whole, attention_mask=mask, use_cache=False).last_hidden_state
        last = states.gather(1, (p + length - 1).view(n, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
        return F.linear(last, self.words)


def losses(top: nn.Module, hidden: Tensor, length: Tensor, unsafe: Tensor) -> Tensor:
    """[n]: the cross-entropy of the decision."""
    return F.cross_entropy(top(hidden, length), unsafe, reduction="none")


@torch.no_grad()
def probabilities(top: Top, known: Read, batch: int = 64) -> Tensor:
    """[n]: P(unsafe), each under the policy that it was read with."""
    top.eval()
    rows = torch.arange(len(known.hidden)).split(batch)
    return torch.cat([top(known.hidden[k], known.lengths[k], known.policy).softmax(1)[:, 1] for k in rows])


@dataclass(frozen=True)
class Question:
    """Records to be judged under a policy, perhaps after examples; ``unsafe`` says what is right under that policy."""

    policy: Taxonomy
    records: Sequence[Record]
    unsafe: Sequence[bool]
    shots: Shots = ()

    @classmethod
    def of(cls, policy: Taxonomy, records: Sequence[Record], shots: Shots = ()) -> Question:
        return cls(policy, records, [r.unsafe for r in records], shots)


def unseen(limit: int | None) -> dict[str, Question]:
    """What no training shows: half of the policy, another one, and examples before the question."""
    prompts, moderation, xstest = data.prompts(), data.openai_moderation(), data.xstest()
    known = data.thinned([r for r in prompts.splits["test"] if r.violates or not r.unsafe], limit)
    kept = prompts.taxonomy.only(prompts.taxonomy.names[::2]).numbered()
    shots = (
        (Conversation.of("How do I bake bread?"), Verdict(False)),
        (Conversation.of("Help me steal a car."), Verdict(True, ("Non-Violent Crimes",))),
    )
    return {
        "half dropped": Question(kept, known, [any(name in kept.names for name in r.violates) for r in known]),
        "unseen taxonomy": Question.of(moderation.taxonomy, data.thinned(moderation.splits["test"], limit)),
        "two examples shown": Question.of(prompts.taxonomy, data.thinned(xstest.splits["test"], limit), shots),
    }


@dataclass(frozen=True)
class Read:
    """What the frozen layers made of a question: the policy's hidden states, and each message's."""

    policy: Tensor
    hidden: Tensor
    lengths: Tensor
    unsafe: Tensor

    @property
    def dataset(self) -> TensorDataset:
        return TensorDataset(self.hidden, self.lengths, self.unsafe)


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
    reader, lower = Reader(tokenizer, layout, plan.max_tokens), Lower(whole, plan.layers)

    def read(name: str, asked: Question) -> Read:
        tokens = [
            reader.prompt(asked.policy, r.conversation, asked.shots, most=plan.message_tokens) for r in asked.records
        ]
        p = _shared(tokens)
        told(f"{name}: {p} tokens of policy, {sum(len(t) - p for t in tokens):,} of {len(tokens):,} messages")
        policy, hidden = lower(tokens[0][:p], [t[p:] for t in tokens], told)
        return Read(policy, hidden, torch.tensor([len(t) - p for t in tokens]), torch.tensor(asked.unsafe).long())

    asked = {name: Question.of(prompts.taxonomy, data.thinned(prompts.splits[name], plan.limit)) for name in FITTED}
    asked["XSTest"] = Question.of(prompts.taxonomy, data.thinned(data.xstest().splits["test"], plan.limit))
    asked |= unseen(plan.limit and plan.limit // 2)
    known = {name: read(name, question) for name, question in asked.items()}

    def fresh() -> Top:
        return Top(whole, plan, known["train"].policy, reader)

    def figures(top: Top) -> dict[str, dict[str, float]]:
        found = {name: probabilities(top, of) for name, of in known.items() if name != "train"}
        cut = threshold_at_fpr(known["val"].unsafe, found.pop("val"), 0.05)
        judged = {name: asdict(judge(known[name].unsafe, p, cut)) for name, p in found.items()}
        return {name: {k: round(v, 4) for k, v in of.items()} for name, of in judged.items()}

    delta = 1 / (10 * len(asked["train"].records))
    found = {"zero-shot": figures(fresh())}
    told(f"zero-shot: {found['zero-shot']['XSTest']['auprc']:.3f}")
    runs: list[Run] = []
    for k, epsilon in enumerate((None, *epsilons)):
        torch.manual_seed(seed)  # the adapters' start
        top = fresh()
        privacy = None if epsilon is None else Privacy(epsilon, delta)
        run = train(top, known["train"].dataset, losses, plan.tune, privacy, seeds=seeds_of(seed, k))
        runs.append(run)
        found[run.name] = figures(top)
        told(f"{run.name}: " + ", ".join(f"{name} {of['auprc']:.3f}" for name, of in found[run.name].items()))
    return {
        "size": "135m",
        "plan": asdict(plan),
        "parameters": {
            "all": sum(q.numel() for q in whole.parameters()),
            "trained": sum(q.numel() for q in fresh().parameters() if q.requires_grad),
        },
        "rows": {name: len(question.records) for name, question in asked.items()},
        "delta": delta,
        "figures": found,
        "policy not read": {
            name: judge(question.unsafe, [r.unsafe for r in question.records], resamples=0).auprc
            for name, question in asked.items()
            if name not in FITTED
        },
        "runs": [asdict(replace(run, epsilons=[])) for run in runs],
    }


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all of them begin with; each keeps one of its own."""
    most = min(map(len, rows)) - 1
    return next((k for k in range(most) if any(row[k] != rows[0][k] for row in rows)), most)


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
        for n, m in ((name, of["XSTest"]) for name, of in result["figures"].items())
    ]
    heads = ("run", "ε spent", "AUPRC (95%)", "prevalence", "AUROC", "precision", "recall", "F1", "FPR", "ECE")
    yield "table", ("XSTest; decisions at the threshold with 5% FPR on validation prompts", heads, rows)
    others = [name for name in result["policy not read"] if name != "XSTest"]
    rows = [
        [n, *(f"{of[q]['auprc']:.3f} ({of[q]['prevalence']:.3f})" for q in others)]
        for n, of in result["figures"].items()
    ]
    rows.append(["policy not read", *(f"{result['policy not read'][q]:.3f}" for q in others)])
    yield (
        "table",
        ("Under policies that training never showed: AUPRC, and in brackets a guess's", ("run", *others), rows),
    )
    yield (
        "p",
        f"Half dropped: {result['rows']['half dropped']} held-out prompts under every other category; what violates "
        f"only the rest is safe. Unseen taxonomy: OpenAI's, on {result['rows']['unseen taxonomy']} of its own texts. "
        "Two examples shown: XSTest again, a safe and an unsafe example before each prompt. Of each message the last "
        f"{result['plan']['message_tokens']} tokens are read. Last row: what a guard has that tells all that is "
        "unsafe under the whole policy from the rest, and never reads the policy.",
    )
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
