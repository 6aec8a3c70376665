"""Which columns of a table fits read: sizes by axis, the loss, and what parts curves."""

import difflib
from collections.abc import Mapping, Sequence

import pandas as pd

from capacity_gap.records import is_number, scores_of
from capacity_gap.records.record import parting_columns
from capacity_gap.records.tables import numbers
from capacity_gap.settings.errors import ConfigError, shown
from capacity_gap.settings.scales import parse_scale

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
            "adds scores to existing cells without training again."
        )
    if missing:
        near = {n: difflib.get_close_matches(n, map(str, frame.columns), n=2, cutoff=0.5) for n in missing}
        hints = "; ".join(f"{shown(n)} (nearest: {', '.join(c) or 'none'})" for n, c in near.items())
        raise ValueError(f"the table lacks {hints}. It has: {', '.join(map(str, frame.columns))}.")


def _once(frame: pd.DataFrame, names: Sequence[str]) -> None:
    if twice := [n for n in dict.fromkeys(names) if list(frame.columns).count(n) > 1]:
        raise ConfigError(f"the table has more than one column {', '.join(twice)}. Rename or drop all but one.")


def renamed(frame: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """An external table with the columns that fits read: `names` maps each to its name in the table.

    Raises:
        ConfigError: the table lacks a column, or has another one under the target name, or text for a number.
    """
    held = list(map(str, frame.columns))
    if len(set(names.values())) < len(names):
        raise ConfigError("--columns names one column of the table twice. Map each name to a different column.")
    for wanted, given in names.items():
        if given not in held:
            near = ", ".join(difflib.get_close_matches(given, held, n=3, cutoff=0.5)) or "none"
            raise ConfigError(
                f"--columns {wanted}={shown(given)}: the table has no column {shown(given)} (nearest: {near}). "
                f"It has: {', '.join(map(shown, held))}."
            )
        if wanted in held and wanted not in names.values() and given != wanted:
            raise ConfigError(
                f"--columns {wanted}={shown(given)}: the table already has a column {wanted}. Rename or drop one."
            )
    found = frame.rename(columns={given: wanted for wanted, given in names.items()})
    _once(found, list(names))
    return numbers(found, [name for name in names if is_number(name, found)])


def rows_where(frame: pd.DataFrame, wanted: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rows whose columns hold one of the values given for each: text as it is, numbers also as scales, `300k`.

    Raises:
        ConfigError: the table lacks a column, or no row is left; the message lists the values that there are.
    """
    for column, values in wanted.items():
        if column not in frame:
            near = ", ".join(difflib.get_close_matches(column, map(str, frame.columns), n=3, cutoff=0.5)) or "none"
            raise ConfigError(f"--where {column}: the table has no column {shown(column)} (nearest: {near}).")
        held = frame[column]
        if pd.api.types.is_numeric_dtype(held):
            numbers_given = [_number(value, column) for value in values]
            kept = frame[held.isin(numbers_given)]
        else:
            kept = frame[held.fillna("none").astype(str).isin(list(values))]
        if kept.empty:
            some = ", ".join(sorted(held.fillna("none").astype(str).unique())[:10])
            raise ConfigError(f"--where {column}={','.join(values)}: no row has it. Values in the table: {some}.")
        frame = kept
    return frame


def _number(value: str, column: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float(parse_scale(value, key=f"--where {column}", allow_zero=True))
