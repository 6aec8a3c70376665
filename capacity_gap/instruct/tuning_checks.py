"""What instruction tuning needs, checked before anything is trained: settings first, then extras and rows."""

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capacity_gap.instruct.rows import PAIR, PAIRS, TALK, TEST, TRAIN, read_rows
from capacity_gap.instruct.tune_config import InstructConfig, PreferConfig
from capacity_gap.models.axes import architecture, dims
from capacity_gap.settings.errors import ConfigError, StageError

log = logging.getLogger(__name__)
MOST_DROPPED = 0.05  # share of rows too long to learn from; above it the setting is wrong, not a few rows


def check_settings(
    instruct: InstructConfig, prefer: PreferConfig, shape: Mapping[str, Any], *, family: str, micro_batch: int | None
) -> None:
    """Raises `ConfigError` if a student of this shape and family cannot be tuned as asked."""
    if len(architecture(shape).stacks) == 2:
        raise ConfigError(
            f"instruct needs a causal model, and family={family} is an encoder–decoder. Leave out instruct and "
            "prefer, or use another family."
        )
    limit, micro = dims(shape).longest, micro_batch
    for name, c in (("instruct", instruct), ("prefer", prefer)):
        if c.wanted and limit and c.max_length > limit:
            raise ConfigError(
                f"{name}.max_length={c.max_length}, but models of {family} have learned positions for "
                f"{limit} tokens. Set {name}.max_length={limit} or less."
            )
        if c.wanted and micro and c.batch_size % min(micro, c.batch_size):
            raise ConfigError(
                f"{name}.batch_size={c.batch_size} does not split into micro-batches of "
                f"train.micro_batch_size={micro}. Set it to a divisor of the batch."
            )


def check_extras(*, adapters: bool) -> None:
    """Raises `StageError` if a package that tuning needs is not installed; imports none of them."""
    needed = ["datasets", "trl"] + ["peft"] * adapters
    if missing := [name for name in needed if not _installed(name)]:
        raise StageError(
            f"instruction tuning needs {' and '.join(missing)}, which is not installed: "
            "pip install 'capacity_gap[instruct]'."
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a specification
        return False


def check_rows(
    instruct: InstructConfig, prefer: PreferConfig, instructions: Path, tokenizer: Path, limit: int | None
) -> None:
    """Raises `ConfigError` if too many rows are too long, for training or (`limit`: positions) for answering.

    `instructions` and `tokenizer` are what their stages made.
    """
    from capacity_gap.instruct.chat import chat_tokenizer, encoded, longest_prompt, pairs_that_fit

    chat, most = chat_tokenizer(tokenizer), instruct.max_length
    talks = [row["messages"] for row in read_rows(instructions / TRAIN, "instruct.path", TALK)]
    check_lengths(encoded(chat, talks, most).dropped, len(talks), "instruct", most)
    if prefer.wanted:
        pairs = read_rows(instructions / PAIRS, "prefer.path", PAIR)
        kept = pairs_that_fit(chat, pairs, prefer.max_length)
        check_lengths(len(pairs) - len(kept), len(pairs), "prefer", prefer.max_length)
    asked = [row["messages"] for row in read_rows(instructions / TEST, "instruct.path", TALK)]
    needed = longest_prompt(chat, asked) + instruct.answer_tokens
    if limit and needed > limit:
        raise ConfigError(
            f"the longest held-out question needs {needed} tokens with instruct.answer_tokens="
            f"{instruct.answer_tokens}, and the model has learned positions for {limit}. Use shorter ones."
        )


def check_lengths(dropped: int, rows: int, section: str, most: int) -> None:
    """Reports how many rows are too long for training, and raises `ConfigError` if these are too many."""
    if dropped == 0:
        return
    said = f"{dropped:,} of {rows:,} rows have no answer that fits into {section}.max_length={most} tokens"
    if dropped > MOST_DROPPED * rows:
        raise ConfigError(
            f"{said}: they would be dropped from training. At most {MOST_DROPPED:.0%} may be dropped. Set a larger "
            f"{section}.max_length, or use shorter rows."
        )
    log.warning("%s, and are left out", said)
