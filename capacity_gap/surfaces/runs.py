"""A tidy table of runs, checked, as the columns that a loss surface is fitted to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from capacity_gap.estimators.batched import Array
from capacity_gap.records import is_number
from capacity_gap.records.columns import AXES, BY, default_metric, require
from capacity_gap.records.tables import numbers as numeric
from capacity_gap.settings.errors import ConfigError

SAME = 0.03  # a column whose values all lie within 3 % takes one value
SHOWN = 10  # rows that a message names


@dataclass(frozen=True)
class Runs:
    """The runs of one fit: `inputs` (positive, raw) and `loss`, each [n]; `index` names the rows of the table."""

    inputs: Mapping[str, Array]
    loss: Array
    cluster: Array | None
    families: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def span(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of each input, and of what is made of them."""
        raw = {**self.inputs, **{k: np.exp(v) for k, v in derived(self.inputs).items()}}
        return {k: (float(v.min()), float(v.max())) for k, v in raw.items()}


def derived(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Logs of what the additive surface is made of: teacher over student, tokens over parameters."""
    found = {}
    if "teacher_params" in inputs:
        found["ratio"] = np.log(inputs["teacher_params"]) - np.log(inputs["student_params"])
        found["tokens_per_param"] = np.log(inputs["data_tokens"]) - np.log(inputs["student_params"])
    return found


def log_columns(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Natural logarithms of all inputs and of what is made of them."""
    return {**{k: np.log(v) for k, v in inputs.items()}, **derived(inputs)}


def read_runs(
    frame: pd.DataFrame,
    inputs: Sequence[str],
    *,
    metric: str | None = None,
    axis: str = "total",
    cluster: str | None = None,
) -> Runs:
    """Takes from a table what a surface needs.

    Raises:
        ConfigError: a column is missing (the message names the nearest ones), a cell is text, or a scale is not
            positive (the rows).
    """
    if axis not in AXES:
        raise ConfigError(f"axis={axis!r} is not known. Allowed: {', '.join(AXES)}.")
    columns = {name: name + AXES[axis] if name.endswith("_params") else name for name in inputs}
    column = metric or default_metric(frame)
    _require(frame, [*columns.values(), column, *([cluster] if cluster else [])])
    kept, notes = _usable(frame, list(columns.values()), column)
    return Runs(
        inputs={name: kept[c].to_numpy(float) for name, c in columns.items()},
        loss=kept[column].to_numpy(float),
        cluster=pd.factorize(kept[cluster])[0] if cluster else None,
        families=tuple(sorted(map(str, kept["family"].dropna().unique()))) if "family" in kept else (),
        notes=tuple(notes),
    )


def _require(frame: pd.DataFrame, names: Sequence[str]) -> None:
    try:
        require(frame, names)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _usable(frame: pd.DataFrame, scales: Sequence[str], column: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows that can be used, as numbers, and why the others cannot."""
    numbers = numeric(frame[[*scales, column]], [*scales, column])
    wrong = (numbers[list(scales)] <= 0).any(axis=1) | (numbers[column] <= 0)
    if wrong.any():
        raise ConfigError(
            f"scales and losses must be positive, since the fit takes their logarithms; they are not in "
            f"{', '.join([*scales, column])} of {_rows(frame, wrong)}. Remove or correct those rows."
        )
    good = pd.Series(np.isfinite(numbers.to_numpy(float)).all(axis=1), index=frame.index)
    if "status" in frame:
        good &= frame["status"].eq("done")
    notes = []
    if (~good).any():
        why = f"failed, or without {', '.join([*scales, column])}"
        notes.append(f"{int((~good).sum())} of {len(frame)} runs left out ({why}): {_rows(frame, ~good)}")
    return frame[good].assign(**{c: numbers.loc[good, c] for c in map(str, numbers)}), notes


def _rows(frame: pd.DataFrame, which: pd.Series) -> str:
    named = [str(i) for i in frame.index[which]]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return f"rows {', '.join(named[:SHOWN])}{more}"


def teachers_of(frame: pd.DataFrame) -> pd.DataFrame:
    """The teachers in a table of records, each once, as a table for the forms `chinchilla` and `supervised`.

    They were trained on text, so they are what the law L_T(N_T, D_T) is fitted to.
    """
    wanted = {"teacher_params": "student_params", "teacher_tokens": "data_tokens", "teacher_loss": "loss"}
    _require(frame, list(wanted))
    if "teacher_params_non_embedding" in frame:
        wanted["teacher_params_non_embedding"] = "student_params_non_embedding"
    seed = ["teacher_seed"] if "teacher_seed" in frame else []
    return frame[[*wanted, *seed]].rename(columns=wanted).drop_duplicates().reset_index(drop=True)


def constant(values: Array) -> bool:
    """Whether logs [n] are one value, up to `SAME`."""
    return bool(np.ptp(values) < np.log1p(SAME))


def two_values(values: Array) -> bool:
    """Whether logs [n] are two values, up to `SAME`."""
    ordered = np.sort(values)
    return int((np.diff(ordered) > np.log1p(SAME)).sum()) == 1


def collinear(a: Array, b: Array) -> bool:
    """Whether two columns of logs say the same, such as tokens in proportion to parameters."""
    if constant(a) or constant(b):
        return False
    return abs(float(np.corrcoef(a, b)[0, 1])) > 0.999


def mixed(frame: pd.DataFrame) -> str:
    """The settings, data scale apart, in which runs differ, with their values; nothing if they are of one kind."""
    names = [c for c in BY if c != "data_tokens"]
    if "loss" in frame and not (pd.api.types.is_numeric_dtype(frame["loss"]) or is_number("loss", frame)):
        names.append("loss")  # in our records the name of the objective
    found = {c: sorted(map(str, frame[c].dropna().unique())) for c in names if c in frame}
    return "; ".join(f"{c} ({', '.join(values[:5])})" for c, values in found.items() if len(values) > 1)
