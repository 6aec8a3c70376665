"""What a report says, before it is drawn: records cut into arms, the law, histories, costs, causes, commands."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capacity_gap import records
from capacity_gap.cell.outdated import without_outdated
from capacity_gap.evaluate.task_scores import WRONG, as_loss
from capacity_gap.fit import JointFit, LawFit, fit_joint
from capacity_gap.fit.frame import Curve, curves
from capacity_gap.fit.law import law_from
from capacity_gap.fit.optimum import Optimum, locate
from capacity_gap.records.columns import AXES, default_metric, renamed
from capacity_gap.records.load import BESIDE_SCORES, sweep_frame
from capacity_gap.records.tables import numbers
from capacity_gap.report.plots import LOSSES
from capacity_gap.report.products import products
from capacity_gap.settings.errors import Damaged
from capacity_gap.settings.places import RUN_WORDS, TOOL_WORDS, user_path
from capacity_gap.settings.scales import short_scale
from capacity_gap.store.contents import end_of, open_store, rounds_of, sweeps
from capacity_gap.store.files import is_store, name_left_out, read_all
from capacity_gap.wording.curve_words import arm_names

HISTORY_POINTS = 40  # a training curve is averaged in so many bins: single batches are noise
LONGEST_RUNG = 8  # letters; model folders have longer names
LOSS = re.compile(r"loss|(student|teacher|init|tuned)_loss(_ood)?|train_ce|train_kl")  # our columns in nats per token
COSTS = ("train_flops", "teacher_flops", "teacher_train_flops", "wall_s", "peak_memory_bytes")
SAME_SIZE = 0.03  # as in the fit: students within 3 % are one

# What is told of a whole run in one line each, where all its cells agree.
SETTINGS = {
    "family": "family",
    "corpus": "corpus",
    "data_tokens": "distillation tokens",
    "epochs": "epochs",
    "teacher_data": "teacher's tokens",
    "init": "start",
    "reference": "cut from",
    "prune_method": "score",
    "shape": "shape",
    "batch": "batch (sequences)",
    "loss": "objective",
    "kd_weight": "weight of distillation",
    "temperature": "temperature",
    "signal": "teacher's signal",
    "precision": "precision",
}


@dataclass(frozen=True)
class Panel:
    """One curve with the rows that it was made from, and what was found on it."""

    curve: Curve
    optimum: Optimum | None
    rows: pd.DataFrame
    arm: str

    @property
    def student(self) -> str:
        """The student's scale, as people say it."""
        return str(self.curve.key["student"])


@dataclass(frozen=True, kw_only=True)
class Content:
    """Everything in a report. `problem`: why nothing could be fitted, if so."""

    frame: pd.DataFrame
    metric: str
    axis: str
    law: LawFit | None
    panels: list[Panel]
    notes: list[str]
    problem: str | None
    joint: JointFit | None
    joint_problem: str
    histories: dict[str, pd.DataFrame]
    commands: list[str]
    names: list[str]
    source: str = ""  # the name of the store or file
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of adaptive grids, by name
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)  # of those that have ended: why

    @property
    def done(self) -> pd.DataFrame:
        """The cells that have a result."""
        return self.frame[self.frame["status"] == "done"] if "status" in self.frame else self.frame

    @property
    def failed(self) -> pd.DataFrame:
        """The cells that have none."""
        return self.frame[self.frame["status"] == "failed"] if "status" in self.frame else self.frame[:0]

    @property
    def teacher(self) -> str:
        """The column that counts the teacher's parameters."""
        return "teacher_params" + AXES[self.axis]

    @property
    def student(self) -> str:
        """The column that counts the student's."""
        return "student_params" + AXES[self.axis]

    @property
    def unit(self) -> str:
        """What the metric counts: losses are in nats a token, of anything else the name is all that is known."""
        if self.metric.startswith(WRONG):
            return "error rate"
        if self.metric.endswith("bits_per_byte"):
            return "bits/byte"
        return "nats/token" if LOSS.fullmatch(self.metric) else ""

    @property
    def metric_name(self) -> str:
        """The metric with its unit, for axes and headings."""
        said = "held-out loss" if self.metric in LOSSES else self.metric.removeprefix(WRONG).removeprefix("metrics/")
        return f"{said}, {self.unit}" if self.unit else said

    def rung(self, params: Any) -> str:
        """What a teacher of so many parameters is called; no two are called alike."""
        name = self.teachers.get(float(params)) or short_scale(float(params))
        return name if self._calls[name] < 2 else f"{name} ({params:,.0f})"

    @cached_property
    def _calls(self) -> Counter[str]:
        """How many teachers share a name, which has three digits at most where it is a count."""
        counts = {float(n) for n in self.frame[self.teacher].dropna()}
        return Counter(self.teachers.get(n) or short_scale(n) for n in counts)

    @cached_property
    def teachers(self) -> dict[float, str]:
        """The rungs' names by their parameters, where they have short ones."""
        if "teacher" not in self.frame:
            return {}
        pairs = self.frame[[self.teacher, "teacher"]].dropna().drop_duplicates()
        return {float(n): str(name) for n, name in pairs.itertuples(index=False) if len(str(name)) <= LONGEST_RUNG}


def gather(
    source: str,
    *,
    sweep: str | None = None,
    axis: str = "total",
    metric: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Content:
    """Reads a store, or any other source of records, and fits it; what cannot be fitted is told, not raised."""
    store = open_store(source) if sweep or is_store(user_path(source)) else None
    frame = sweep_frame(store, sweep) if store and sweep else records.load(source)
    frame, stale = without_outdated(renamed(frame, columns or {}), source)
    frame, metric = as_loss(_numeric(frame.reset_index(drop=True), axis, metric), metric)
    found: list[Curve] = []
    notes: list[str] = []
    law = problem = None
    try:
        found, notes = curves(frame, metric=metric, axis=axis)
        law = law_from(locate(found), axis=axis, notes=notes) if found else None
    except ValueError as error:
        problem = str(error)
    joint, joint_problem = _joint(frame, axis, metric)
    optima: Sequence[Optimum | None] = law.optima if law and len(law.optima) == len(found) else [None] * len(found)
    labels = arm_names([c.key for c in found])
    drawn = once(frame, metric or default_metric(frame))
    panels = [Panel(c, o, rows_of(drawn, c, axis), label) for c, o, label in zip(found, optima, labels, strict=True)]
    panels = [panel for panel in panels if len(panel.rows)]
    panels.sort(key=lambda p: (p.rows["data_tokens"].max() if "data_tokens" in p.rows else 0, p.curve.student_params))
    known = {k: v for k, v in sweeps(store).items() if sweep in (None, k)} if store else {}
    return Content(
        frame=frame,
        metric=metric or default_metric(frame),
        axis=axis,
        law=law,
        panels=panels,
        notes=[*stale, *notes],
        problem=problem or (None if found else "No cell is done yet."),
        joint=joint,
        joint_problem=joint_problem,
        histories=histories(store.root, frame) if store else {},
        commands=[c for name, cells in known.items() for c in commands(name, cells.values())],
        names=list(known),
        source=Path(source).name,  # a page that is sent to others names no folder
        rounds={name: noted for name in known if store and (noted := rounds_of(store, name))},
        ends={name: end for name in known if store and (end := end_of(store, name))},
    )


def _joint(frame: pd.DataFrame, axis: str, metric: str | None) -> tuple[JointFit | None, str]:
    """The model of all cells, or why there is none."""
    try:
        return fit_joint(frame, axis=axis, metric=metric), ""
    except ValueError as error:
        return None, str(error)


def _numeric(frame: pd.DataFrame, axis: str, metric: str | None) -> pd.DataFrame:
    """The table as the fit reads it: with numbers in the columns that must hold them, or an error that names a cell."""
    names = ["student_params" + AXES[axis], "teacher_params" + AXES[axis], metric or default_metric(frame), *COSTS]
    return numbers(frame, names)


def rows_of(frame: pd.DataFrame, curve: Curve, axis: str) -> pd.DataFrame:
    """The finished rows that a curve was made from."""
    kept = frame["status"].eq("done") if "status" in frame else pd.Series(True, index=frame.index)
    for name, value in curve.key.items():
        if name in frame and not (name == "student" and frame["student"].isna().any()):
            column = frame[name].astype(str) if name == "student" else frame[name]
            kept &= column.isna() if value is None or value != value else column == value
    counts = frame["student_params" + AXES[axis]].astype(float)
    return frame[kept & (np.abs(np.log(counts / curve.student_params)) < np.log1p(SAME_SIZE))]


def means(rows: pd.DataFrame, teacher: str, metric: str) -> pd.DataFrame:
    """Mean over seeds at each teacher, with half the 95 % interval of that mean (missing without replicates)."""
    from scipy import stats

    groups = rows.groupby(teacher)[metric]
    found = pd.DataFrame({"mean": groups.mean(), "count": groups.size()}).reset_index()
    df = int((found["count"] - 1).sum())
    if df:
        spread = np.sqrt(((rows[metric] - groups.transform("mean")) ** 2).sum() / df)
        found["half"] = stats.t.ppf(0.975, df) * spread / np.sqrt(found["count"])
    else:
        found["half"] = np.nan
    return found


def histories(root: Path, frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The training history of each cell, in bins; cells that share one training share its history."""
    found: dict[str, pd.DataFrame] = {}
    read: dict[str, pd.DataFrame | None] = {}
    for cell in frame["cell"]:
        for _, meta in read_all(root, [root / "record" / str(cell) / "stage.json"], ["inputs"]):
            trained = meta["inputs"]["trained"]
            if trained not in read:
                read[trained] = _history(root, root / trained / "metrics.jsonl")
            if (history := read[trained]) is not None:
                found[str(cell)] = history
    return found


def _history(root: Path, file: Path) -> pd.DataFrame | None:
    if not file.exists():
        return None
    try:
        points = pd.DataFrame([json.loads(line) for line in file.read_text().splitlines()])
    except ValueError:
        name_left_out(root, [Damaged(file, "is no table of JSON lines")])
        return None
    if points.empty:
        name_left_out(root, [Damaged(file, "is empty")])
        return None
    bins = np.arange(len(points)) * HISTORY_POINTS // max(len(points), HISTORY_POINTS)
    return points.groupby(bins).mean()


def commands(name: str, cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """The commands that make a grid again, and nothing but it: one for each product of values that it is made of."""
    grids: dict[tuple[str, ...], dict[tuple[str, ...], None]] = {}
    for cell in cells:
        given = [o.partition("=") for o in cell["overrides"] if not o.startswith(("hydra", "store=", "only="))]
        grids.setdefault(tuple(k for k, _, _ in given), {})[tuple(v for _, _, v in given)] = None
    found = []
    for keys, values in grids.items():
        for product in products(keys, list(values)):
            words = [f"{k}={','.join(v)}" for k, v in zip(keys, product, strict=True)]
            words.sort(key=lambda word: not word.startswith("+sweeps="))
            found.append(shlex.join([*RUN_WORDS, "-m", *words]))
    return [*found, shlex.join([*TOOL_WORDS, "report", "store", "--sweep", name])]


def causes(failed: pd.DataFrame) -> list[tuple[str, int, str]]:
    """Why cells failed: cause, how many, and the first of them."""
    if failed.empty:
        return []
    said = failed["error"] if "error" in failed else pd.Series(np.nan, index=failed.index)
    groups = failed.groupby(said.fillna("unknown"), sort=False)
    found = [(str(cause), len(rows), cell_name(rows.iloc[0])) for cause, rows in groups]
    return sorted(found, key=lambda row: -row[1])


def cell_name(row: Any) -> str:
    """A cell in words; `row` is a row of the table, or a dict."""
    given: dict[str, Any] = dict(row)
    scales = [
        str(given[name]) if _is(given.get(name)) else short_scale(given.get(f"{name}_params", math.nan)) or "?"
        for name in ("student", "teacher")
    ]
    tokens = [f"{short_scale(given['data_tokens'])} tokens"] if _is(given.get("data_tokens")) else []
    seeds = [f"{k.replace('_', ' ')} {_whole(given[k])}" for k in ("seed", "teacher_seed") if _is(given.get(k))]
    return ", ".join([" from ".join(scales), *tokens, *seeds])


def _whole(value: Any) -> str:
    """A seed as it was given: beside missing ones, a table makes 1 into 1.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is(value: Any) -> bool:
    return value is not None and value == value


def constants(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """The settings of the cells: one value where all agree, else all values."""
    found = []
    for column, label in SETTINGS.items():
        values: Iterable[Any] = frame[column].dropna().unique() if column in frame else ()
        said = sorted((_value(column, v) for v in values), key=lambda s: (len(s), s))
        found += [(label, ", ".join(said))] if said else []
    return found


def _value(column: str, value: Any) -> str:
    if column == "data_tokens":
        return f"{value:,.0f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def once(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows with a finite `metric`, each trained student once: cells that differ in what else was asked share it."""
    known = frame[np.isfinite(frame[metric].astype(float))] if metric in frame else frame
    if "trained" not in known:
        return known
    return known[known["trained"].isna() | ~known.duplicated(["trained", metric, "teacher_params"])]


def costs(done: pd.DataFrame) -> dict[str, float | None]:
    """What the cells took, each student and each teacher counted once per origin; None for what no cell recorded."""
    if "trained" in done:
        again = done.duplicated([c for c in ("trained", "origin") if c in done])
        done = done[done["trained"].isna() | ~again]
    which = [c for c in ("family", "teacher", "teacher_seed", "teacher_tokens", "origin") if c in done]
    teachers = done.drop_duplicates(which) if which else done
    return {
        "students": _total(done, "train_flops"),
        "forward": _total(done, "teacher_flops"),
        "teachers": _total(teachers, "teacher_train_flops"),
        "seconds": _total(done, "wall_s"),
        "memory": float(done["peak_memory_bytes"].max()) if _total(done, "peak_memory_bytes") else None,
    }


def _total(frame: pd.DataFrame, column: str) -> float | None:
    known = frame[column].dropna() if column in frame else ()
    return float(sum(known)) if len(known) else None


def tasks(frame: pd.DataFrame) -> list[str]:
    """The benchmarks that some cell was scored on."""
    names = [str(c) for c in frame.columns if str(c).startswith("metrics/")]
    beside = tuple(f"/{of}" for of in BESIDE_SCORES)
    return [n for n in names if not n.endswith(beside) and frame[n].notna().any()]
