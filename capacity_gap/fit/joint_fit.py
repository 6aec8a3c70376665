"""`fit_joint`: optima, break-even budgets and laws from the joint model, and what the data do not identify."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from capacity_gap.estimators.mixed import Contrast
from capacity_gap.fit.joint import (
    ALPHA,
    ALPHA_WITHOUT,
    BY_LOSS,
    SAME,
    Cells,
    Joint,
    cells_of,
    close_names,
    ends,
    fit_cells,
    without,
)
from capacity_gap.fit.joint_curve import LEVEL, JointCurve
from capacity_gap.fit.regression import Estimate
from capacity_gap.fit.sizes import TIGHT
from capacity_gap.records.columns import AXES, BY, default_metric, require
from capacity_gap.records.tables import numbers
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.fit_words import joint_words

LEAST_RUNGS = 5  # slope, curvature, a level, and two to see what the curve does not fit
NEAR = 0.1  # log: teachers this close to those that were tried are these
LEAST_INSIDE = 3  # students whose optimum lies between their smallest and largest teacher
CONDITIONS = ("init", "kd_weight")  # settings on which the best teacher was seen to depend (docs/study2.md)
CELLS_ASIDE = ("data_tokens", "epochs")  # what parts curves, and may differ here


@dataclass(frozen=True)
class BreakEven:
    """Tokens above which the larger of two teachers wins, with their set. Unpacks to tokens and interval.

    `established` if tests are significant at both ends of the budgets that were tried.
    """

    tokens: float
    interval: tuple[float, float]
    small: float
    large: float
    established: bool

    def __iter__(self) -> Iterator[Any]:
        return iter((self.tokens, self.interval))


class Best(NamedTuple):
    """The best teacher of a student at a budget: its parameters, their set, and of each rung that is larger than the
    student the probability of being best and the expected loss above the best one's (nats)."""

    params: float
    interval: tuple[float, float]
    probabilities: Mapping[str, float]
    regret: Mapping[str, float]


@dataclass(frozen=True)
class Answers:
    """Predictions of a fitted model for any student and budget; also of a model read from a file."""

    curve: JointCurve

    def optimum(self, student_params: float, data_tokens: float | None = None, *, level: float = LEVEL) -> Estimate:
        """The best teacher's parameters; NaN where the curve has no minimum. `level`: of the interval."""
        found = self.curve.optimum(*self._at(student_params, data_tokens), level)
        return Estimate(math.exp(found.value), (math.exp(found.low), math.exp(found.high)))

    def ratio_at(self, data_tokens: float | None = None, *, level: float = LEVEL) -> Estimate:
        """The best teacher over its student, at the mean (log) size of the students."""
        size = math.exp(self.curve.means[0])
        found = self.optimum(size, data_tokens, level=level)
        return Estimate(found.value / size, (found.interval[0] / size, found.interval[1] / size))

    def break_even(
        self, student_params: float, small: float | None = None, large: float | None = None, *, level: float = LEVEL
    ) -> BreakEven:
        """Of two teachers' sizes, by default the smallest and the largest that all curves have.

        Raises:
            ValueError: all cells have one budget, or `small` is not the smaller one.
        """
        if "d" not in self.curve.terms:
            raise ValueError("a break-even budget needs cells of at least two budgets (data_tokens); there is one.")
        ends = zip((small, large), self.curve.shared, strict=True)
        low, high = (math.log(size) if size else self.curve.rungs[name] for size, name in ends)
        if not low < high:
            raise ValueError(f"small={math.exp(low):,.0f} is not below large={math.exp(high):,.0f} parameters.")
        found = self.curve.break_even(low, high, self._at(student_params, None)[0], level)
        back, tried = self.curve.means[1], self.curve.rungs.values()
        inside = min(tried) - NEAR <= low and high <= max(tried) + NEAR  # beyond the teachers that were tried: a guess
        interval = math.exp(found.low + back), math.exp(found.high + back)
        return BreakEven(
            math.exp(found.value + back), interval, math.exp(low), math.exp(high), found.bounded and inside
        )

    def best_teacher(
        self, student_params: float, data_tokens: float | None = None, *, rungs: Mapping[str, float] | None = None
    ) -> Best:
        """At any student and budget.

        Args:
            student_params: of the student.
            data_tokens: by default the mean (log) budget.
            rungs: parameters of the teachers that can be had, by name; by default those that were tried. One that was
                tried counts with its own effect, what the smooth curve does not fit of it.
        """
        n, d = self._at(student_params, data_tokens)
        found = self.optimum(student_params, data_tokens)
        sizes = self.curve.rungs if rungs is None else {name: math.log(size) for name, size in rungs.items()}
        larger = {k: size for k, size in sizes.items() if size > math.log(student_params) + SAME} or dict(sizes)
        losses = self.curve.draws(larger, n, d)
        best = losses.argmin(1)
        share = [float((best == i).mean()) for i in range(len(larger))]
        above = (losses - losses.min(1, keepdims=True)).mean(0).tolist()
        probabilities, regret = (dict(zip(larger, x, strict=True)) for x in (share, above))
        return Best(found.value, found.interval, probabilities, regret)

    def exponents(self) -> dict[str, Estimate]:
        """b and d of log N_T* = a + b·log N_S + d·log D with their sets; those that these cells do not hold are left
        out."""
        held = {"n": "b", "d": "d"}
        found = {held[t]: self.curve.exponent(t) for t in self.curve.terms if t in held and self.curve.powers}
        return {name: Estimate(s.value, (float(s.low), float(s.high))) for name, s in found.items()}

    def tests(self) -> dict[str, float]:
        """p-values of hypotheses on `log N_T* = a + b·log N_S + d·log D`: b = 1, d = 0, b + d = 1."""
        c = self.curve
        found: dict[str, np.ndarray] = {}
        bend = c.unit("κ")
        if "n" in c.terms and c.powers:
            found["b = 1"] = c.unit("n") - (c.centre.b - 1) * bend
        if "d" in c.terms:
            found["d = 0"] = c.unit("d") - c.centre.d * bend
        if "n" in c.terms and "d" in c.terms and c.powers:
            found["b + d = 1"] = c.unit("n") + c.unit("d") - (c.centre.b + c.centre.d - 1) * bend
        return {name: c.contrast(g).p() for name, g in found.items()}

    def _at(self, student_params: float, data_tokens: float | None) -> tuple[float, float]:
        """A student and a budget as logs off their means; no budget is the mean one.

        Raises:
            ValueError: one of them is not positive.
        """
        for name, given in (("student_params", student_params), ("data_tokens", data_tokens)):
            if given is not None and not 0 < given < math.inf:
                raise ValueError(f"{name}={given} must be positive.")
        mean = self.curve.means
        d = 0.0 if data_tokens is None or "d" not in self.curve.terms else math.log(data_tokens) - mean[1]
        return math.log(student_params) - mean[0], d


@dataclass(frozen=True)
class JointFit(Answers):
    """The model of all cells of one table. Intervals are 95 %; they may be open at an end.

    `status`: `law`, an optimum inside the grid that every rung left out leaves standing; `provisional`, one that falls
    with some rung (`rests_on`); `break_even`, no optimum, but a budget above which the larger of the ladder's ends
    wins; `no_optimum`, none of these: `missing` names the cells needed.
    """

    status: str
    missing: str
    rests_on: tuple[str, ...]
    inside: int
    axis: str
    joint: Joint
    families: tuple[str, ...] = ()
    budget: float | None = None  # tokens, where all cells have the same
    conditions: Mapping[str, Any] = field(default_factory=dict)  # of `CONDITIONS`, those that all cells share

    @property
    def sds(self) -> Mapping[str, float]:
        """Standard deviations of the random effects and of one run, in nats."""
        return self.joint.mixed.sds

    @property
    def students(self) -> dict[str, float]:
        """Parameters of the students, smallest first, by short names."""
        sizes = np.exp(np.unique(np.round(self.joint.cells.student, 6)))
        return {short_scale(size): float(size) for size in sizes}

    @property
    def budgets(self) -> list[float | None]:
        """Tokens, smallest first; None alone where all cells have one budget."""
        if "d" not in self.curve.terms:
            return [None]
        return [float(x) for x in np.exp(np.unique(np.round(self.joint.cells.data, 6)))]

    def verdict(self) -> str:
        """What was found, in a sentence or two."""
        ratio, even = self.ratio_at(), None
        if self.status == "break_even":
            even = self.break_even(math.exp(self.curve.means[0]))
        return joint_words(
            self.status,
            ratio=(ratio.value, ratio.interval),
            rests_on=self.rests_on,
            pair=(even.small, even.large) if even else None,
            even=(even.tokens, even.interval) if even else None,
            missing=self.missing,
        )

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """Status, components, tests, the numbers at the mean student and budget, and the model, which `Answers` reads.
        None stands for an end that is open.
        """
        ratio = self.ratio_at()
        found = {
            "status": self.status,
            "verdict": self.verdict(),
            "missing": self.missing,
            "rests_on": list(self.rests_on),
            "ratio": asdict(ratio),
            "tests": self.tests(),
            "sds": dict(self.sds),
            "students_inside": self.inside,
            "axis": self.axis,
            "families": list(self.families),
            "cells": len(self.joint.cells.y),
            "conditions": dict(self.conditions),
            "budget": self.budget,
            "exponents": {name: asdict(found) for name, found in self.exponents().items()},
        }
        if "d" in self.curve.terms:
            found["break_even"] = asdict(self.break_even(math.exp(self.curve.means[0])))
        return _finite(found | {"model": self.curve.to_dict()})


def _finite(value: Any) -> Any:
    """The same for JSON, which has no infinities: null where an interval is open, or nothing was found."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def fit_joint(
    frame: pd.DataFrame, *, axis: str = "total", metric: str | None = None, unpruned: bool = False
) -> JointFit:
    """One model of all cells of a grid (`joint.py`).

    Args:
        frame: tidy, one row a run: `student_params, teacher_params, loss`; may have `data_tokens`, `seed`,
            `teacher_seed`, and the names `student` and `teacher`. Rows alike but for these.
        axis: count `total` parameters or `non_embedding` ones; or `teacher_loss`, which replaces a teacher's size by
            the size that its loss (column `teacher_loss`) implies. Answers are sizes all the same.
        metric: the column to minimise, by default `loss`, or `student_loss` of our records.
        unpruned: whether students as large as their teacher are fitted too: these were not pruned.

    Raises:
        ValueError: columns are missing, rows differ in what parts curves, or there are too few rungs.
    """
    column = metric or default_metric(frame)
    ending = AXES.get(axis, "")
    sizes = [f"{of}_params{ending}" for of in ("student", "teacher")]
    require(frame, [*sizes, column, *([BY_LOSS] if axis == BY_LOSS else [])])
    frame = numbers(frame, [*sizes, column, *([BY_LOSS] if axis == BY_LOSS else []), "data_tokens"])
    if "status" in frame:
        frame = frame[frame["status"] == "done"]
    if "data_tokens" in frame and (frame["data_tokens"] < 0).any():
        raise ValueError(
            f"data_tokens must be positive; rows {list(frame.index[frame['data_tokens'] < 0])[:10]} are not."
        )
    if "data_tokens" in frame and (frame["data_tokens"] > 0).any():
        frame = frame[frame["data_tokens"] > 0]  # the others were pruned, and not trained
    check_alike(frame)
    if "cell" in frame:  # one that two origins ran is two results
        frame = frame.drop_duplicates([c for c in ("cell", "origin") if c in frame])
    same = [c for c in (*sizes, column, "data_tokens", "seed", "teacher_seed", "student", "teacher") if c in frame]
    frame = frame.drop_duplicates(same)  # the same model recorded twice is no more evidence
    cells = cells_of(frame, axis=axis, metric=column, unpruned=unpruned)
    _check_sizes(cells)
    if len(np.unique(cells.groups["rung"])) < 2:
        raise ValueError("all cells have one teacher, or no teacher larger than its student: nothing to compare.")
    families = tuple(sorted(frame["family"].dropna().astype(str).unique())) if "family" in frame else ()
    tokens = frame["data_tokens"].dropna().unique().tolist() if "data_tokens" in frame else [0]
    budget = float(tokens[0]) if len(tokens) == 1 and tokens[0] > 0 else None
    alike = {c: frame[c].unique().tolist() for c in CONDITIONS if c in frame and frame[c].notna().all()}
    conditions = {c: values[0] for c, values in alike.items() if len(values) == 1}
    found = _said(fit_cells(cells), axis)
    return replace(found, families=families, budget=budget, conditions=conditions)


def check_alike(frame: pd.DataFrame) -> None:
    """Raises where cells differ in settings that part curves."""
    differ = [c for c in BY if c in frame and c not in CELLS_ASIDE and frame[c].nunique(dropna=False) > 1]
    if differ:
        some = {c: ", ".join(_value(c, v) for v in frame[c].unique()[:4]) for c in differ}
        said = "; ".join(f"{c} ({values})" for c, values in some.items())
        # Cells of two objectives may differ in a digest besides: the objective's name is easier to type.
        named = [c for c in ("loss",) if c in frame and frame[c].map(lambda v: isinstance(v, str)).all()]
        column = next(c for c in (*named, *differ) if frame[c].nunique(dropna=False) > 1)
        value = "none" if pd.isna(last := frame[column].iloc[-1]) else last
        raise ValueError(
            "one joint model needs cells that differ only in student, teacher, budget and seeds; these also differ "
            f"in {said}. Keep the cells of one value, such as --where {shlex.quote(f'{column}={value}')}."
        )


def _value(column: str, value: Any) -> str:
    """A value of a column; `none` where it has none, as `--where` calls it."""
    if not pd.isna(value):
        return str(value)
    return "default settings" if column == "settings" else "none"


@threadpool_limits.wrap(limits=1)
def _check_sizes(cells: Cells) -> None:
    """Raises where students of one curve differ in size: its effect would be confounded with the teacher's."""
    spread = max(float(np.ptp(cells.student[cells.curve == c])) for c in np.unique(cells.curve))
    if spread > TIGHT:
        raise ValueError(
            f"students of one curve differ by {math.expm1(spread):.1%} in size, which confounds the comparison of "
            f"teachers. Fit rows within {TIGHT:.0%}, such as those of prune.shape=common; fit_law adjusts for size."
        )


def _said(joint: Joint, axis: str) -> JointFit:
    first = JointFit(joint.curve, "", "", (), _inside(joint), axis, joint)
    status, missing, rests_on = _status(first)
    return replace(first, status=status, missing=missing, rests_on=rests_on)


def _inside(joint: Joint) -> int:
    """Students whose optimum, at the mean budget, lies between their smallest and largest teacher."""
    cells, found = joint.cells, 0
    names = close_names(cells.student)
    for name in np.unique(names):
        mine = names == name
        at = joint.curve.optimum(float(cells.student[mine].mean()) - joint.means[0], 0.0).value
        found += bool(cells.teacher[mine].min() < at < cells.teacher[mine].max())
    return found


def _passes(pair: Sequence[Contrast], alpha: float) -> bool:
    """Whether the loss falls at the smallest teacher and rises at the largest (Lind and Mehlum 2010)."""
    low, high = pair
    return 1 - low.p_above() < alpha and high.p_above() < alpha


def _status(fit: JointFit) -> tuple[str, str, tuple[str, ...]]:
    joint = fit.joint
    pair, rungs = ends(joint), len(fit.curve.rungs)
    enough = rungs >= LEAST_RUNGS
    few = f"An optimum of this model needs at least {LEAST_RUNGS} teachers; there are {rungs}."
    missing = _missing(pair) if enough else few
    students = len(np.unique(close_names(joint.cells.student)))
    if enough and _passes(pair, ALPHA):
        codes = {name: code for code, name in joint.cells.rungs.items()}
        left = {name: without(joint, codes[name]) for name in fit.curve.rungs}
        rests = [name for name, pair in left.items() if pair is None or not _passes(pair, ALPHA_WITHOUT)]
        if not rests and fit.inside >= LEAST_INSIDE:
            return "law", "", ()
        if rests:
            return "provisional", "", tuple(rests)
        missing = f"{fit.inside} of {students} students have their optimum inside the grid; a law needs {LEAST_INSIDE}."
        return "provisional", missing, ()
    if "d" in fit.curve.terms and fit.break_even(math.exp(fit.curve.means[0])).established:
        return "break_even", missing, ()
    return "no_optimum", missing, ()


def _missing(pair: Sequence[Contrast]) -> str:
    """Which additional cells would decide whether there is an optimum."""
    low, high = pair
    if 1 - low.p_above() >= ALPHA and high.p_above() >= ALPHA:
        return "Neither end of the ladder is shown to be worse: add rungs; more seeds of these would change little."
    if high.p_above() >= ALPHA:
        return "The largest teachers are not shown to be worse: larger ones, or smaller budgets, would decide."
    return "The smallest teachers are not shown to be worse: smaller ones, or larger budgets, would decide."
