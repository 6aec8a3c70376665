"""The command line that runs one cell again, quoted first for Hydra and then for the shell."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from capacity_gap.settings.places import RUN_WORDS

PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.-]*")  # what Hydra's grammar reads as it stands
ROUNDS = ("strategy=", "until=", "next.", "budget_hours=", "fail_fast=", "retries=")  # how a grid is gone through
# How it was run, and what it joins only if asked.
DROPPED = ("hydra", "store=", "only=", "plan=", "sweep=", *ROUNDS)
WORDS = ("null", "true", "false", "inf", "nan")  # what it would read as something else


def command(overrides: Iterable[str], store: Path, *more: str) -> str:
    """`python run.py …` (`capacity-gap run …` from a wheel) for the cell that these overrides made, in the same store.

    The overrides were read by Hydra once and so are spelt for it; only the store's path is a plain text.
    """
    kept = [o for o in overrides if not o.startswith(DROPPED)]
    return shlex.join([*RUN_WORDS, *kept, f"store={quoted(str(store))}", *more])


def cell_overrides(overrides: Iterable[str]) -> list[str]:
    """Overrides without those that say how a grid is gone through: its cells and its place are the same."""
    return [o for o in overrides if not o.startswith((*ROUNDS, "plan="))]


def quoted(text: str) -> str:
    """A text as an override of Hydra's spells it, so that composing gives the same text."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # else OmegaConf would look it up
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)  # only backslashes before a quote count double
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"'{text}'"
