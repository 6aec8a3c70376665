"""From a tidy table to curves: loss against log teacher scale, one curve a student (and data scale, family, start)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from capacity_gap.fit.sizes import SIZE_TERMS, SizeSlope, adjust_for_size
from capacity_gap.records.columns import AXES, BY, default_metric, require
from capacity_gap.records.record import repeat_parting_columns
from capacity_gap.records.tables import numbers
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.curve_words import USUAL

SAME_SIZE = 0.03  # students within 3 % are one student where no nominal scale says so
# Settings that usually follow from a student's size, or act after the fitted loss is measured. They part curves only
# where cells that agree in everything else, seeds too, differ in them.
SETTINGS = repeat_parting_columns()


@dataclass(frozen=True)
class Curve:
    """One student under several teachers, smallest teacher first. Replicates of a teacher are averaged.

    `loss` [K] means, `count` [K] replicates, `within` the sum of squares of replicates about their means with
    `within_df` degrees of freedom; `clusters` [K] names the trained teachers, which other curves may share. Where the
    student's size differs by more than `TIGHT`, `loss` is less `size_off` [K, 3] times the value of `size_slope`.
    """

    key: dict[str, object]
    student_params: float
    teacher_params: np.ndarray
    loss: np.ndarray
    count: np.ndarray
    within: float
    within_df: int
    clusters: tuple[str, ...] = ()
    size_off: np.ndarray | None = None
    size_slope: SizeSlope | None = None

    @property
    def x(self) -> np.ndarray:
        """log teacher scale [K]."""
        return np.log(self.teacher_params)


def curves(
    frame: pd.DataFrame, *, metric: str | None = None, axis: str = "total", by: Sequence[str] = BY
) -> tuple[list[Curve], list[str]]:
    """Cuts a table into curves.

    Args:
        frame: tidy, one row a run: `student_params, teacher_params, loss`; may have `student`, `seed`, `teacher_seed`
            and whatever `by` names.
        metric: the column to minimise, by default `loss`, or `student_loss` of our records.
        axis: count `total` parameters or `non_embedding` ones.
        by: columns that part curves, where they are there.

    Returns:
        The curves, and notes on the rows that were left out.

    Raises:
        ValueError: a column is missing or holds text for a number, a scale is not positive, or no curve is left.
    """
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known. Allowed: {', '.join(AXES)}.")
    student, teacher = "student_params" + AXES[axis], "teacher_params" + AXES[axis]
    column = metric or default_metric(frame)
    require(frame, [student, teacher, column, *([] if by is BY else by)])
    kept, notes = _usable(_as_usual(frame), student, teacher, column)
    kept, said = _trained(kept)
    notes += said
    given = [c for c in by if c in kept and kept[c].notna().any()]
    if column != "loss" and "loss" in kept and "loss" not in given:
        given.insert(0, "loss")  # in our records the name of the objective: its losses are never replicates
    averaged = [c for c in BY if c in kept and c not in given and kept[c].nunique(dropna=False) > 1]
    notes += [f"{c} varies within a curve: its values are averaged like seeds" for c in averaged]
    kept = kept.assign(_student=_student_label(kept, student), _cluster=_clusters(kept, teacher))
    kept, parting, said = _told_apart(kept, teacher, column, given)
    given += parting
    notes += said
    kept, adjusted = adjust_for_size(kept, student, teacher, column, [*given, "_student"])
    if kept.empty:
        raise ValueError(f"no curve can be fitted: {'; '.join(adjusted)}.")
    notes += [*adjusted, *_mixtures(kept), *_equal_teachers(kept, teacher)]
    found = []
    for key, group in kept.groupby([*given, "_student"], dropna=False, sort=False):
        named = {k: None if v is None or v != v else v for k, v in zip([*given, "student"], key, strict=True)}
        found.append(_curve(named, group, student, teacher, column))
    if "student" not in frame and all(len(c.x) < 2 for c in found):
        notes.append(
            f"students are distinguished by size (within {SAME_SIZE:.0%}), and each of the {len(found)} has only one "
            "teacher: if several rows are one student, name it in a column `student`, such as 40k"
        )
    return sorted(found, key=lambda c: ([str(c.key[k]) for k in given], c.student_params)), notes


def _as_usual(frame: pd.DataFrame) -> pd.DataFrame:
    """Names an empty `settings` (all defaults), so that it parts curves as any other value does."""
    if "settings" not in frame or frame["settings"].isna().all():
        return frame
    return frame.assign(settings=frame["settings"].fillna(USUAL))


def _usable(frame: pd.DataFrame, student: str, teacher: str, column: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows that can be used, and why the others cannot."""
    notes = []
    frame = numbers(frame, (student, teacher, column))
    bad = frame[
        (frame[student] <= 0) | (frame[teacher] <= 0) | np.isinf(frame[[student, teacher]].to_numpy(float)).any(axis=1)
    ]
    if len(bad):
        raise ValueError(f"scales must be positive; {student} or {teacher} is not in rows {list(bad.index)[:10]}")
    finite = pd.Series(np.isfinite(frame[[student, teacher, column]].to_numpy(float)).all(axis=1), index=frame.index)
    if "status" in frame:
        finite &= frame["status"].isin(["done"])
    if (~finite).any():
        rows = ", ".join(map(str, frame.index[~finite][:10]))
        notes.append(f"{int((~finite).sum())} rows left out (failed, or no finite {column}): rows {rows}")
    if not finite.any():
        seen = f"; status: {', '.join(map(str, frame['status'].unique()))}" if "status" in frame else ""
        raise ValueError(f"no usable row: each needs {student}, {teacher} and a finite {column}{seen}.")
    return frame[finite], notes


def _trained(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows without those of pruning alone, where there are others: its scatter, many times that of trained
    students, would hide their optima. A table of nothing else is fitted as it is.
    """
    if "data_tokens" not in frame or not (alone := frame["data_tokens"].eq(0)).any() or alone.all():
        return frame, []
    note = f"{int(alone.sum())} rows without distillation left out (data_tokens = 0): fit them in a separate table"
    return frame[~alone], [note]


def _told_apart(
    frame: pd.DataFrame, teacher: str, column: str, given: Sequence[str]
) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The rows without those that hold the same student again, settings that part what one seed holds twice, notes."""
    if "seed" not in frame or frame["seed"].isna().any():
        return frame, [], []
    same = [*given, "_student", teacher, *(c for c in ("seed", "teacher_seed") if c in frame)]
    others = [c for c in BY if c in frame and c not in given]  # averaged, because the caller said so
    again = frame.duplicated([*same, *others, column]) | _recorded_again(frame, teacher, column)
    kept = frame[~again]
    twice = kept[kept.duplicated(same, keep=False)]
    groups = twice.groupby(same, dropna=False)
    parting = [c for c in SETTINGS if c in twice and c not in given and (groups[c].nunique(dropna=False) > 1).any()]
    notes = []
    if again.any():
        notes.append(f"{again.sum()} rows left out as duplicates: the same {column} under the same seeds")
    if parting:
        notes.append(f"curves are split by {', '.join(parting)}, in which cells of one seed differ")
    if left := int(kept.duplicated([*same, *others, *parting]).sum()):
        notes.append(f"{left} rows repeat student, teacher and seeds with a different {column}: averaged like seeds")
    return kept, parting, notes


def _recorded_again(frame: pd.DataFrame, teacher: str, column: str) -> pd.Series:
    """Rows of one student under one teacher that differ only in how settings are recorded: the fuller one stays."""
    if "trained" not in frame or "settings" not in frame:
        return pd.Series(False, index=frame.index)
    fullest = frame.sort_values("settings", key=lambda s: s.eq(USUAL), kind="stable")
    alike = [c for c in BY if c in frame and c != "settings"]
    found = fullest.duplicated([*alike, "trained", teacher, column]) & fullest["trained"].notna()
    return found.reindex(frame.index)


def _student_label(frame: pd.DataFrame, column: str) -> pd.Series:
    """The nominal scale, or a short one that students within 3 % of each other share."""
    if "student" in frame and frame["student"].notna().all():
        return frame["student"].astype(str)
    label: dict[float, str] = {}
    first = -np.inf
    for n in np.sort(frame[column].unique()):
        first = n if n > first * (1 + SAME_SIZE) else first
        label[n] = short_scale(first)
    return frame[column].map(label)


def _curve(key: dict, group: pd.DataFrame, student: str, teacher: str, column: str) -> Curve:
    per = group.groupby(teacher, sort=True)[column]
    loss, count = per.mean(), per.size()
    within = float(((group[column] - group[teacher].map(loss)) ** 2).sum())
    slope = group["_slope"].iloc[0] if "_slope" in group else None
    return Curve(
        key=key,
        # A geometric mean, since all fits are in log scale.
        student_params=float(np.exp(np.log(group[student].astype(float)).mean())),
        teacher_params=loss.index.to_numpy(float),
        loss=loss.to_numpy(float),
        count=count.to_numpy(float),
        within=within,
        within_df=int((count - 1).sum()),
        clusters=tuple(group.groupby(teacher, sort=True)["_cluster"].first()),
        size_off=group.groupby(teacher, sort=True)[list(SIZE_TERMS)].mean().to_numpy(float) if slope else None,
        size_slope=slope,
    )


# What a teacher's own training depends on: cells that agree in all of it were taught by the same model.
TEACHER = ("family", "corpus", "teacher_data")


def _clusters(frame: pd.DataFrame, teacher: str) -> pd.Series:
    """A name for each teacher, whose error is shared by all curves in which it appears, at every budget."""
    parts = [frame[c].astype(str) for c in TEACHER if c in frame]
    return sum((p + "/" for p in parts), pd.Series("", index=frame.index)) + frame[teacher].astype(str)


def _mixtures(frame: pd.DataFrame) -> list[str]:
    """Warnings of what should not differ within one table."""
    found = []
    for name in ("device", "precision", "schema_version", "metric", "unit", "held_out_tokens"):
        if name in frame and frame[name].nunique() > 1:
            counts = ", ".join(f"{v} ({n} rows)" for v, n in frame[name].value_counts().items())
            found.append(f"{name} differs between rows: {counts}")
    return found


def _equal_teachers(frame: pd.DataFrame, teacher: str) -> list[str]:
    """Warnings of teachers of equal size with different names, such as a base model and its instructed one."""
    if "teacher" not in frame:
        return []
    names = frame.groupby(teacher)["teacher"].unique()
    return [
        f"WARNING: {', '.join(map(str, equal))} have {size:,.0f} parameters each and are averaged like seeds: fit "
        "only the rows of one of them"
        for size, equal in names.items()
        if len(equal) > 1
    ]
