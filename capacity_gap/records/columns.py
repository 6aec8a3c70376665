"""Which columns of a table fits read: sizes by axis, the loss, and what parts curves."""

import difflib
from collections.abc import Sequence

import pandas as pd

from capacity_gap.records import is_number, scores_of
from capacity_gap.records.record import parting_columns
from capacity_gap.settings.errors import ConfigError, shown

AXES = {"total": "", "non_embedding": "_non_embedding"}
BY = parting_columns()  # where a table has them: cells that differ in one of them answer different questions


def default_metric(frame: pd.DataFrame) -> str:
    """`loss` if it is a number, else `student_loss`: in our records `loss` is the name of the objective."""
    _once(frame, ["loss"])
    if "loss" in frame and (pd.api.types.is_numeric_dtype(frame["loss"]) or is_number("loss", frame)):
        return "loss"
    return "student_loss" if "student_loss" in frame else "loss"


def require(frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Raises if the table lacks a column, naming the nearest that it has, or has two of one name."""
    _once(frame, names)
    missing = [n for n in names if n not in frame]
    if scores := [n for n in missing if n.startswith("metrics/")]:
        held, asked = ", ".join(scores_of(frame)) or "none", ", ".join(map(shown, scores))
        raise ValueError(
            f"no run was scored on {asked}. Scores here: {held}. The same grid with evaluate=pico, or evaluate=paper, "
            "adds scores to what is there; nothing is trained again."
        )
    if missing:
        near = {n: difflib.get_close_matches(n, map(str, frame.columns), n=2, cutoff=0.5) for n in missing}
        hints = "; ".join(f"{shown(n)} (nearest: {', '.join(c) or 'none'})" for n, c in near.items())
        raise ValueError(f"the table lacks {hints}. It has: {', '.join(map(str, frame.columns))}.")


def _once(frame: pd.DataFrame, names: Sequence[str]) -> None:
    if twice := [n for n in dict.fromkeys(names) if list(frame.columns).count(n) > 1]:
        raise ConfigError(f"the table has more than one column {', '.join(twice)}. Rename or drop all but one.")
