"""Conversations as text, and a model's answers to them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capacity_gap.data.tokenizer import load_tokenizer

# MiniChat's roles in plain text, so no token has to be added; each turn ends with the end of a text. `generation` marks
# what a model is trained to say. An answer begins with a space: its first word is then the token it is within a text.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "[|Assistant|]{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ '[|User|] ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('a conversation has the roles user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[|Assistant|]{% endif %}"
)


def chat_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in `folder` with the chat template, ready to pad: on the left, as generation needs it."""
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[dict[str, str]]],
    *,
    most: int,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The model's likeliest next turn of each conversation, at most `most` tokens long."""
    found: list[str] = []
    for start in range(0, len(conversations), batch_size):
        part = list(conversations[start : start + batch_size])
        given = tokenizer.apply_chat_template(
            part, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        ).to(model.device)
        made = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = made[:, given["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        on_batch(len(found), len(conversations))
    return found


@torch.no_grad()
def answer_logprobs(model: Any, tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> Tensor:
    """log p(last turn | what precedes it) of each conversation, in nats: the sum over the turn's tokens."""
    found = []
    for turns in conversations:
        ids, start = answer_ids(tokenizer, turns)
        logits = model(torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1].float()
        labels = torch.tensor(ids[start:], device=model.device)
        found.append(logits.log_softmax(-1).gather(1, labels[:, None]).sum().cpu())
    return torch.stack(found)


def answer_ids(tokenizer: Any, turns: list[dict[str, str]]) -> tuple[list[int], int]:
    """The ids of a conversation, and where its last turn begins."""
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    before = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids, len(before)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share as records write it: the value and its binomial standard error."""
    value = sum(hits) / len(hits)
    return {"value": value, "stderr": math.sqrt(value * (1 - value) / len(hits)), "shots": 0}
