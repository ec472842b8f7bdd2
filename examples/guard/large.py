"""`--size 135m`: real pre-trained weights (SmolLM2, or --model), adapters on the top layers, on prompts and XSTest.

Adapters change what the last token makes of the others, never the others: their keys and values stay what the frozen
model made of them. So each policy goes through it once, each message once, and a step of training takes one token a
record. Only the decision is learned: the output layer is cut to the two words that it is read off from, as in Llama
Guard 3 1B, whose output layer is cut to the tokens it ever emits. Training begins with public phrases, and reads under
policies that were drawn before any data was seen.

ε holds when a prompt is added or removed: which policy a prompt is read under depends on its own text alone, and so
does what the frozen model makes of it, to the last bit. How many prompts there are is taken to be public (the sampling
rate, the number of steps and δ follow from it), and so are the recipe and the validation prompts, which set thresholds.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from . import data, public
from .data import Record
from .encoder import batches
from .language_model import Reader, Shots, choose_trained, load
from .metrics import judge, threshold_at_fpr
from .page import Part
from .prompt import SHORT, Conversation, Layout, Verdict
from .taxonomy import Taxonomy
from .train import Privacy, Recipe, Run, seeds_of, train

FITTED = ("train", "val")  # what training and thresholds see
ROWS = 16  # of a batch of the frozen model


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    method: str = "lora"
    layers: int = 6
    rank: int = 8
    max_tokens: int = 256  # two examples make the policy longer
    message_tokens: int = 32
    limit: int | None = None
    begin: Recipe = field(default_factory=lambda: Recipe(epochs=30, batch_size=256, lr=2e-3, optimizer="adam"))
    tune: Recipe = field(
        default_factory=lambda: Recipe(
            epochs=5, batch_size=640, lr=1e-3, optimizer="adam", max_grad_norm=0.25, average=True
        )
    )


@dataclass(frozen=True)
class Policies:
    """What the frozen model holds of policies in the upper layers, one after the other, and whose each token is.

    Attributes:
        states: keys and values [l, p, 2, k].
        owner: [p], the policy that a token belongs to.
        lengths: how many tokens each policy has.
    """

    states: Tensor
    owner: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, states: Sequence[Tensor]) -> Policies:
        lengths = torch.tensor([s.shape[1] for s in states])
        return cls(torch.cat(list(states), 1).float(), torch.arange(len(states)).repeat_interleave(lengths), lengths)


class Frozen:
    """The whole model as it came, in bfloat16: what its upper layers need of a prompt to go on with the last token.

    That is the last token's state below them, and the keys and values of all tokens before it. Each policy goes through
    it once, each message once; kept on disk if ``cache`` says where.

    Guarantee: what it makes of a message depends on the policy and that message alone. A batch has the shape that a
    message's own length asks for, whoever else is in it: in bfloat16 another shape rounds otherwise.
    """

    def __init__(self, model: Any, layers: int, cache: Path | None = None) -> None:
        self.base = copy.deepcopy(model.model).to(torch.bfloat16).eval()
        self.layers, self.cache = layers, cache
        given = inspect.signature(self.base.forward).parameters
        self.name = "cache" if "cache" in given else "past_key_values"  # renamed in transformers 5
        self.weights = hashlib.sha256()
        for name, value in self.base.state_dict().items():
            self.weights.update(name.encode())
            self.weights.update(value.contiguous().view(torch.uint8).numpy())

    def __call__(
        self, policy: list[int], messages: list[list[int]], told: Callable[[str], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's keys and values [l, p, 2, k], last tokens' states [n, d], the others' [n, l, t, 2, k]."""
        held = None
        if self.cache is not None:
            found = self.weights.copy()
            found.update(repr((ROWS, self.layers, policy, messages)).encode())
            held = self.cache / f"{found.hexdigest()[:20]}.pt"
            if held.exists():
                kept: tuple[Tensor, Tensor, Tensor] = torch.load(held, weights_only=True)
                return kept
        made = self._run(policy, messages, told)
        if held is not None:
            held.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made, held)
        return made

    @torch.no_grad()
    def _run(
        self, policy: list[int], messages: list[list[int]], told: Callable[[str], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = self.base(input_ids=torch.tensor([policy]), use_cache=True).past_key_values
        known = self._upper(first, 0)[0].clone()
        width = max(map(len, messages)) - 1
        last = torch.zeros(len(messages), self.base.config.hidden_size, dtype=torch.bfloat16)
        others = torch.zeros(len(messages), len(known), width, *known.shape[2:], dtype=torch.bfloat16)
        chunks = batches([len(m) for m in messages], ROWS)
        for k, (t, chunk) in enumerate(chunks):
            lengths = torch.tensor([len(messages[i]) for i in chunk])
            rows = [messages[i] for i in chunk] + [[0]] * (ROWS - len(chunk))
            tokens = torch.tensor([row + [0] * (t - len(row)) for row in rows])
            cache = copy.deepcopy(first)
            cache.batch_repeat_interleave(ROWS)
            mask = torch.ones(ROWS, len(policy) + t, dtype=torch.long)  # causal: what is padded comes later
            found = self.base(
                input_ids=tokens, attention_mask=mask, use_cache=True, output_hidden_states=True, **{self.name: cache}
            )
            below = found.hidden_states[len(self.base.layers) - self.layers]
            last[chunk] = below[torch.arange(len(chunk)), lengths - 1].to(last.dtype)
            before = self._upper(found.past_key_values, len(policy))[: len(chunk), :, :width]
            others[chunk, :, : before.shape[2]] = before.to(last.dtype)
            if k % 20 == 19:
                told(f"  frozen layers: {k + 1} of {len(chunks)} batches")
        return known, last, others

    def _upper(self, cache: Any, start: int) -> Tensor:
        """[n, l, t, 2, k]: what a cache holds of the upper layers from the token ``start`` on."""
        both = [torch.stack([layer.keys, layer.values], 3) for layer in cache.layers[-self.layers :]]
        return torch.stack(both, 1)[:, :, :, start:].transpose(2, 3).transpose(3, 4).flatten(4)


class Top(nn.Module):
    """The layers that are tuned, on the last token alone: its state to the logits of (safe, unsafe).

    The tokens before it stay what the frozen model made of them, so that a step takes one token a record. As the
    adapters start, this is the whole model.
    """

    def __init__(self, model: Any, plan: Plan, policies: Policies, reader: Reader) -> None:
        super().__init__()
        inner = copy.deepcopy(model.model).float()
        inner.layers = inner.layers[-plan.layers :]
        inner.embed_tokens = nn.Embedding(1, 1)  # not used: the input is a state
        choose_trained(inner, plan.method, plan.layers, plan.rank)  # adapters are put in where they are
        inner.embed_tokens.requires_grad_(False)
        self.inner, self.policies = inner, policies
        self.words = nn.Linear(inner.config.hidden_size, 2)
        with torch.no_grad():
            self.words.weight.copy_(model.lm_head.weight[[reader.safe, reader.unsafe]])
            self.words.bias.zero_()

    def forward(
        self, last: Tensor, others: Tensor, length: Tensor, which: Tensor, policies: Policies | None = None
    ) -> Tensor:
        """Logits [n, 2] from `Frozen`'s [n, d] and [n, l, t, 2, k], lengths [n] and the policy that each is under."""
        policies = policies or self.policies
        hidden = last.float()
        rotary = self.inner.rotary_emb(hidden, (policies.lengths[which] + length - 1).unsqueeze(1))
        of_policy = policies.owner == which.unsqueeze(1)
        of_message = torch.arange(others.shape[2]) < (length - 1).unsqueeze(1)
        allowed = torch.cat([of_policy, of_message, torch.ones(len(hidden), 1, dtype=torch.bool)], 1)
        for k, layer in enumerate(self.inner.layers):
            hidden = _last_token(layer, hidden, policies.states[k], others[:, k].float(), allowed, rotary)
        return self.words(self.inner.norm(hidden))


def _last_token(
    layer: Any, hidden: Tensor, policy: Tensor, others: Tensor, allowed: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """A Llama layer on one token [n, d] that attends to shared [p, 2, k] and to its own record's [n, t, 2, k]."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    q, k, v = (
        project(normed).unflatten(1, (-1, 1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    q = q.reshape(len(q), k.shape[1], -1, attention.head_dim)  # [n, groups, heads of a group, d]
    (shared_k, shared_v), (own_k, own_v) = (
        each.unflatten(-1, (-1, attention.head_dim)).transpose(-2, -3).unbind(-4)
        for each in (policy.transpose(0, 1), others.transpose(1, 2))
    )
    own_k, own_v = torch.cat([own_k, k], 2), torch.cat([own_v, v], 2)  # [n, groups, t + 1, d]
    fits = torch.cat([torch.einsum("ngqd,gpd->ngqp", q, shared_k), q @ own_k.transpose(2, 3)], 3)
    fits = (fits * attention.scaling).masked_fill(~allowed[:, None, None], -torch.inf).softmax(3)
    of_policy, of_message = fits.split([shared_k.shape[1], own_k.shape[2]], 3)
    mixed = torch.einsum("ngqp,gpd->ngqd", of_policy, shared_v) + of_message @ own_v
    hidden = hidden + attention.o_proj(mixed.flatten(1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def losses(top: nn.Module, last: Tensor, others: Tensor, length: Tensor, which: Tensor, unsafe: Tensor) -> Tensor:
    """[n]: the cross-entropy of the decision."""
    return F.cross_entropy(top(last, others, length, which), unsafe, reduction="none")


@torch.no_grad()
def probabilities(top: Top, known: Read, batch: int = 256) -> Tensor:
    """[n]: P(unsafe), each under the policy that it was read with."""
    top.eval()
    rows = TensorDataset(*known.dataset.tensors[:-1])
    parts = torch.arange(len(rows)).split(batch)
    return torch.cat([top(*rows[k], known.policies).softmax(1)[:, 1] for k in parts])


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
        "unseen taxonomy": Question.of(
            moderation.taxonomy, data.thinned(moderation.splits["test"], limit or len(moderation.splits["test"]) // 3)
        ),
        "two examples shown": Question.of(prompts.taxonomy, data.thinned(xstest.splits["test"], limit), shots),
    }


@dataclass(frozen=True)
class Read:
    """What the frozen model made of messages, each under one of ``policies``."""

    policies: Policies
    last: Tensor
    others: Tensor
    lengths: Tensor
    which: Tensor
    unsafe: Tensor

    @property
    def dataset(self) -> TensorDataset:
        return TensorDataset(self.last, self.others, self.lengths, self.which, self.unsafe)


WHOLE, PARTIAL = 4, 12  # policies that list everything, and about half of it


def drawn_policies(taxonomy: Taxonomy) -> list[Taxonomy]:
    """Policies to train under, whatever the data: some list everything, others about half of it, in drawn orders."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(WHOLE + PARTIAL):
        order = torch.randperm(len(taxonomy), generator=generator).tolist()
        kept = order if k < WHOLE else order[: len(order) // 2]
        found.append(taxonomy.only(taxonomy.names[i] for i in kept).numbered())
    return found


def drawn(text: str, turn: int, n: int) -> int:
    """A number below ``n`` that a text draws, in each turn another one: no other text has a say."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=f"turn {turn}".encode()).digest()
    return int.from_bytes(digest, "big") % n


def readings(records: Sequence[Record], policies: Sequence[Taxonomy], turn: int = 0) -> tuple[list[int], list[bool]]:
    """For each record the policy that its text draws, and whether it is unsafe under that one.

    What is unsafe, but nobody said of which category, is always read under a whole policy: no other may judge it.

    Guarantee: whoever comes or leaves, the others are read as they were.
    """
    which, unsafe = [], []
    for record in records:
        draw = drawn(str(record.conversation), turn, 2 * PARTIAL)  # half of them whole
        unnamed = record.unsafe and not record.violates
        place = draw % WHOLE if unnamed or draw >= PARTIAL else WHOLE + draw
        which.append(place)
        unsafe.append(unnamed or any(name in policies[place].names for name in record.violates))
    return which, unsafe


def read_under(
    name: str,
    policies: Sequence[Taxonomy],
    records: Sequence[Record],
    which: Sequence[int],
    unsafe: Sequence[bool],
    *,
    reader: Reader,
    frozen: Frozen,
    most: int,
    shots: Shots = (),
    told: Callable[[str], None] = print,
) -> Read:
    """Each record's last ``most`` tokens under the policy that ``which`` names, and what is right under it."""
    told(f"{name}: {len(records):,} messages under {len(policies)} policies")
    states, last, others, lengths = [], [], [], torch.zeros(len(records), dtype=torch.long)
    rows: list[int] = []
    for k, policy in enumerate(policies):
        of = [i for i, place in enumerate(which) if place == k]
        asking = [records[i].conversation for i in of] or [Conversation.of("-")]  # also what nobody drew
        head, messages = reader.parts(policy, asking, shots, most)
        known, below, before = frozen(head, messages, told)
        states.append(known)
        last.append(below[: len(of)])
        others.append(before[: len(of)])
        lengths[of] = torch.tensor([len(m) for m in messages[: len(of)]], dtype=torch.long)
        rows += of
    width = max(o.shape[2] for o in others)
    back = torch.tensor(rows).argsort()
    padded = torch.cat([F.pad(o, (0, 0, 0, 0, 0, width - o.shape[2])) for o in others])[back]
    return Read(
        Policies.of(states),
        torch.cat(last)[back],
        padded,
        lengths,
        torch.tensor(which),
        torch.tensor(unsafe).long(),
    )


def study(
    plan: Plan,
    epsilons: Sequence[float],
    *,
    seed: int = 0,
    model: str = "135m",
    layout: Layout = SHORT,
    cache: Path | None = None,
    told: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Judge the model as it is, then tuned without privacy and for each ε; all figures."""
    prompts = data.prompts()
    whole, tokenizer = load(model)
    reader, frozen = Reader(tokenizer, layout, plan.max_tokens), Frozen(whole, plan.layers, cache)
    under = partial(read_under, reader=reader, frozen=frozen, most=plan.message_tokens, told=told)

    def read(name: str, asked: Question) -> Read:
        """A question under its one policy."""
        which = [0] * len(asked.records)
        return under(name, [asked.policy], asked.records, which, asked.unsafe, shots=asked.shots)

    policies = drawn_policies(prompts.taxonomy)
    train_rows = data.thinned(prompts.splits["train"], plan.limit)
    phrases = data.thinned(public.phrases().splits["train"], plan.limit)
    twice = [readings(phrases, policies, turn) for turn in (0, 1)]  # each under two policies, now and then the same
    which, unsafe = (twice[0][k] + twice[1][k] for k in (0, 1))
    start = under("public phrases", policies, [*phrases, *phrases], which, unsafe)
    asked = {"train": Question.of(prompts.taxonomy, train_rows)}
    known = {"train": under("train", policies, train_rows, *readings(train_rows, policies))}
    asked["val"] = Question.of(prompts.taxonomy, data.thinned(prompts.splits["val"], plan.limit))
    asked["XSTest"] = Question.of(prompts.taxonomy, data.thinned(data.xstest().splits["test"], plan.limit))
    asked |= unseen(plan.limit and plan.limit // 2)
    known |= {name: read(name, question) for name, question in asked.items() if name != "train"}

    torch.manual_seed(seed)  # the adapters' start
    untuned = Top(whole, plan, known["train"].policies, reader)
    begun = copy.deepcopy(untuned)
    train(begun, start.dataset, losses, plan.begin, seeds=seeds_of(seed, 97))

    def figures(top: Top) -> dict[str, dict[str, float]]:
        found = {name: probabilities(top, of) for name, of in known.items() if name != "train"}
        cut = threshold_at_fpr(known["val"].unsafe, found.pop("val"), 0.05)
        judged = {name: asdict(judge(known[name].unsafe, p, cut)) for name, p in found.items()}
        return {name: {k: round(v, 4) for k, v in of.items()} for name, of in judged.items()}

    delta = 1 / (10 * len(asked["train"].records))
    found = {"zero-shot": figures(untuned), "public phrases": figures(begun)}
    for name, of in found.items():
        told(f"{name}: {of['XSTest']['auprc']:.3f}")
    runs: list[Run] = []
    for k, epsilon in enumerate((None, *epsilons)):
        top = copy.deepcopy(begun)
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
            "trained": sum(q.numel() for q in untuned.parameters() if q.requires_grad),
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


def sections(result: dict[str, Any], command: str) -> Iterable[Part]:
    """The page."""
    yield "h1", "A pre-trained language model as a guard, privately tuned"
    yield (
        "lead",
        f"{result['parameters']['all']:,} weights, of which {result['parameters']['trained']:,} are tuned "
        f"({result['plan']['method']}, the last token in the top {result['plan']['layers']} layers, and the two words "
        f"that are read off) on {result['rows']['train']:,} prompts, after a start on public phrases.",
    )
    yield "p", f"Command: `{command}`. δ = {result['delta']:.2g}; the unit is one prompt. Judged on XSTest."
    yield (
        "p",
        f"Each prompt is read under one of {WHOLE + PARTIAL} policies, drawn before any data was seen: {WHOLE} list "
        f"all hazards, {PARTIAL} about half of them, in drawn orders; what violates only hazards that are not listed "
        "is safe. What is unsafe, but nobody said of which hazard, is read under a whole policy. A prompt's own text "
        "draws which, so that ε holds when a prompt is added or removed. Their number is taken to be public: the "
        "sampling rate, the number of steps and δ follow from it. ε covers neither the validation prompts, which are "
        "taken to be public and set the thresholds, nor the choice of the recipe, which looked at training prompts. "
        "Each private run is judged by itself; who is given several of them is given the sum of their ε. Seeds are "
        "known, so that the runs can be repeated: to release a model, give no generators.",
    )
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
