"""Conversations as text, and a model's answers to them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capacity_gap.data.tokenizer import load_tokenizer

IGNORED = -100  # the label of a token that does not count in the loss

# MiniChat's roles in plain text, so no token has to be added; each turn ends with the end of a text. `generation` marks
# what a model is trained to say. An answer begins with a space: its first word is then the token it is within a text.
# An end-of-text token that somebody typed is parted by a space (`< |endoftext|>`): only the template ends a turn.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set said = message['content'].replace(eos_token, eos_token[0] + ' ' + eos_token[1:]) %}"
    "{% if message['role'] == 'assistant' %}"
    "[|Assistant|]{% generation %}{{ ' ' + said + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ '[|User|] ' + said + eos_token }}"
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
    """The ids of a conversation, and where its last turn begins: after what a model is given when it is asked."""
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    before = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    same = (mine == given for mine, given in zip(ids, before, strict=False))
    return ids, sum(1 for _ in takewhile(bool, same))


@dataclass(frozen=True)
class Encoded:
    """Conversations as a trainer takes them, none longer than the limit."""

    rows: list[dict[str, list[int]]]  # input_ids, and labels: the id in the assistant's turns, elsewhere `IGNORED`
    shortened: int  # conversations that end earlier, with the last answer that fits whole
    dropped: int  # conversations of which no answer fits


def encoded(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], most: int) -> Encoded:
    """Conversations as ids and labels, at most `most` of them each; answers are whole, with their end, or left out.

    Labels come from where answers begin and end, not from character offsets: some tokenizers leave out of those the
    space before an answer, and then the template's mask of the assistant's turns is empty.
    """
    rows, shortened = [], 0
    for turns in conversations:
        row, ends = _labelled(tokenizer, turns, most)
        shortened += 0 < ends < len(turns)
        rows += [row] if ends else []
    return Encoded(rows, shortened, len(conversations) - len(rows))


def _labelled(tokenizer: Any, turns: list[dict[str, str]], most: int) -> tuple[dict[str, list[int]], int]:
    """The ids and labels of the turns that fit, and how many these are."""
    ids: list[int] = []
    labels: list[int] = []
    for end in range(2, len(turns) + 1, 2):
        until, start = answer_ids(tokenizer, turns[:end])
        if len(until) > most:
            return {"input_ids": ids, "labels": labels}, end - 2
        labels += [IGNORED] * (start - len(labels)) + until[start:]
        ids = until
    return {"input_ids": ids, "labels": labels}, len(turns)


def pairs_that_fit(tokenizer: Any, pairs: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """The pairs both of whose answers fit into `most` tokens, with what is before them."""
    return [pair for pair in pairs if max(len(answer_ids(tokenizer, turns)[0]) for turns in _ways(pair)) <= most]


def _ways(pair: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    return [[*pair["messages"], {"role": "assistant", "content": pair[k]}] for k in ("chosen", "rejected")]


def longest_prompt(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> int:
    """Tokens of the longest question, with all that is before it."""
    return max(answer_ids(tokenizer, turns)[1] for turns in conversations)


def mean(values: Tensor) -> dict[str, Any]:
    """A mean as records write it; the standard error of one value is not known."""
    n = len(values)
    return {"value": float(values.mean()), "stderr": float(values.std() / n**0.5) if n > 1 else None, "shots": 0}
