"""Conversations and pairs in `.jsonl` files, each row checked before anything is trained. Imports no torch."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import user_path

TALK = ("messages",)
PAIR = ("messages", "chosen", "rejected")
TRAIN, TEST, PAIRS = "instruct.jsonl", "test.jsonl", "pairs.jsonl"  # what the stage `instructions` writes


def read_rows(file: Path, key: str, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file: conversations, or with the fields of `PAIR` pairs of answers.

    Raises:
        ConfigError: a row that nothing can be learnt from; the message names its line.
    """
    with user_path(file).open("rb") as lines:
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return [_row(line, f"{key}={file}, line {number}", fields) for number, line in numbered]


def rows_in(file: str | None) -> int:
    """How many rows a file holds, one a line; none without a file."""
    if file is None:
        return 0
    with user_path(file).open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _row(line: bytes, place: str, fields: Iterable[str]) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place} is not UTF-8: {error}. Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise ConfigError(f"{place} is not JSON: {error}. Each line must be one object.") from error
    if not isinstance(row, dict) or (lacking := [f for f in fields if f not in row]):
        said = ", ".join(lacking) if isinstance(row, dict) else "fields"
        raise ConfigError(f"{place} has no {said}. Each needs {', '.join(fields)}.")
    if not isinstance(row.get("task", ""), str):
        raise ConfigError(f"{place}: task is {row['task']!r}. It must be a name.")
    _check_turns(row["messages"], place, pair="chosen" in fields)
    if "chosen" in fields:
        _check_answers(row, place)
    return row


def _check_turns(turns: Any, place: str, *, pair: bool) -> None:
    """Turns are objects with text, the user's and the assistant's in turn; a pair's end with a question."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ConfigError(f'{place}: messages must be turns, [{{"role": ..., "content": ...}}, ...], at least one.')
    for number, turn in enumerate(turns, 1):
        if not _is_text(turn.get("content")):
            raise ConfigError(f"{place}, turn {number} has no content: {turn.get('content')!r}. It must be text.")
    roles = [turn.get("role") for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * pair:
        raise ConfigError(
            f"{place} has the roles {roles}. Allowed are user and assistant in turn, the user first; a conversation "
            "ends with the assistant's turn, the messages of a pair with the user's."
        )


def _check_answers(row: Mapping[str, Any], place: str) -> None:
    for name in ("chosen", "rejected"):
        if not _is_text(row[name]):
            raise ConfigError(f"{place}: {name} is {row[name]!r}. It must be the text of an answer.")
    if row["chosen"] == row["rejected"]:
        raise ConfigError(f"{place}: chosen and rejected are the same, so there is no preference. Remove the row.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def constant_hits(train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> list[bool]:
    """Which held-out conversations a lookup answers: the commonest training answer of each task and script.

    That needs no reading of the question beyond its first words: what a model must beat to have learnt a task.
    """
    seen: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for row in train:
        seen[_kind(row)][_answer(row)] += 1
    constant = {kind: answers.most_common(1)[0][0] for kind, answers in seen.items()}
    return [constant.get(_kind(row)) == _answer(row) for row in held_out]


def _kind(row: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The task of a conversation, where it is known, and whether its last question holds Han characters."""
    return row.get("task"), any("\u4e00" <= c <= "\u9fff" for c in row["messages"][-2]["content"])


def _answer(row: Mapping[str, Any]) -> str:
    return row["messages"][-1]["content"].strip()


def by_task(hits: Sequence[bool], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """Hits under the names of their scores: `exact_match` over all rows, `exact_match/<task>` where tasks are known."""
    found = {"exact_match": list(hits)}
    for task in sorted({row["task"] for row in rows if "task" in row}):
        found[f"exact_match/{task}"] = [hit for hit, row in zip(hits, rows, strict=True) if row.get("task") == task]
    return found


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share as records write it: the value and its binomial standard error, which one hit does not have."""
    n, value = len(hits), sum(hits) / len(hits)
    return {"value": value, "stderr": math.sqrt(value * (1 - value) / n) if n > 1 else None, "shots": 0}
