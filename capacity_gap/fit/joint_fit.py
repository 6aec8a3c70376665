"""`fit_joint`: what the model of all cells says of optima, break-even budgets and laws, and what it cannot say."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from capacity_gap.estimators.mixed import Contrast
from capacity_gap.fit.frame import BY, default_metric, require
from capacity_gap.fit.joint import (
    ALPHA,
    ALPHA_WITHOUT,
    SAME,
    Cells,
    Joint,
    break_even,
    cells_of,
    ends,
    fit_cells,
    optimum,
    without,
)
from capacity_gap.fit.regression import Estimate
from capacity_gap.fit.sizes import TIGHT
from capacity_gap.settings.scales import short_scale

LEAST_RUNGS = 5  # four coefficients, and one to spare
LEAST_INSIDE = 3  # students whose optimum lies between their smallest and largest teacher
DRAWS = 2000
SEED = 0
CELLS_ASIDE = ("data_tokens", "epochs")  # what parts curves, and may differ here


@dataclass(frozen=True)
class BreakEven:
    """Tokens above which the larger of two teachers wins, with their set; `established` if a test says so at both ends
    of the budgets that were tried."""

    tokens: float
    interval: tuple[float, float]
    small: float
    large: float
    established: bool


@dataclass(frozen=True)
class Best:
    """The best teacher of a student at a budget: its parameters, their set, and of the rungs that were tried the
    probability of being best and the expected loss above the best one's (nats)."""

    params: float
    interval: tuple[float, float]
    probabilities: Mapping[str, float]
    regret: Mapping[str, float]


@dataclass(frozen=True)
class JointFit:
    """The model of all cells of one table. Intervals are 95 %; they may be open at an end.

    `status`: `law`, an optimum inside the grid that every rung left out leaves standing; `provisional`, one that falls
    with some rung (`rests_on`); `break_even`, no optimum, but a budget above which the larger of the ladder's ends
    wins; `no_optimum`, none of these: `missing` says what would be needed.
    """

    status: str
    missing: str
    rests_on: tuple[str, ...]
    inside: int
    joint: Joint

    def optimum(self, student_params: float, data_tokens: float | None = None) -> Estimate:
        """The best teacher's parameters; NaN where the curve has no minimum."""
        found = optimum(self.joint, *self._at(student_params, data_tokens))
        return Estimate(math.exp(found.value), (math.exp(found.low), math.exp(found.high)))

    def ratio_at(self, data_tokens: float | None = None) -> Estimate:
        """The best teacher over its student, at the mean (log) size of the students."""
        size = math.exp(self.joint.means[0])
        found = self.optimum(size, data_tokens)
        return Estimate(found.value / size, (found.interval[0] / size, found.interval[1] / size))

    def break_even(self, student_params: float, small: float | None = None, large: float | None = None) -> BreakEven:
        """Of two teachers' sizes, by default those of the ladder's ends.

        Raises:
            ValueError: all cells have one budget, or `small` is not the smaller one.
        """
        if "d" not in self.joint.terms:
            raise ValueError("a break-even budget needs cells of two budgets (data_tokens) or more; here is one.")
        low, high = (math.log(x) for x in (small or self._ends[0], large or self._ends[1]))
        if not low < high:
            raise ValueError(f"small={small} is not below large={large}.")
        found = break_even(self.joint, low, high, self._at(student_params, None)[0])
        back = self.joint.means[1]
        interval = math.exp(found.low + back), math.exp(found.high + back)
        return BreakEven(math.exp(found.value + back), interval, math.exp(low), math.exp(high), found.bounded)

    def best_teacher(self, student_params: float, data_tokens: float | None = None) -> Best:
        """At any student and budget. Rungs larger than the student count, with their own effects: what the smooth curve
        does not fit.
        """
        n, d = self._at(student_params, data_tokens)
        found = self.optimum(student_params, data_tokens)
        larger = [code for code in self._rungs if self._size(code) > math.log(student_params) + SAME] or self._rungs
        losses = self._draws(n, d, larger)
        best = losses.argmin(1)
        labels = [self.joint.cells.rungs[code] for code in larger]
        share = [float((best == i).mean()) for i in range(len(labels))]
        above = (losses - losses.min(1, keepdims=True)).mean(0)
        return Best(
            found.value,
            found.interval,
            dict(zip(labels, share, strict=True)),
            {name: float(a) for name, a in zip(labels, above, strict=True)},
        )

    def tests(self) -> dict[str, float]:
        """p of what the published law says of `log N_T* = a + b·log N_S + d·log D`: b = 1, d = 0, b + d = 1."""
        j = self.joint
        found: dict[str, np.ndarray] = {}
        bend = j.coefficient("κ")
        if "n" in j.terms:
            found["b = 1"] = j.coefficient("n") - (j.centre.b - 1) * bend
        if "d" in j.terms:
            found["d = 0"] = j.coefficient("d") - j.centre.d * bend
        if "n" in j.terms and "d" in j.terms:
            both = j.coefficient("n") + j.coefficient("d")
            found["b + d = 1"] = both - (j.centre.b + j.centre.d - 1) * bend
        return {name: j.mixed.contrast(g).p() for name, g in found.items()}

    @property
    def sds(self) -> Mapping[str, float]:
        """Standard deviations of the random effects and of one run, in nats."""
        return self.joint.mixed.sds

    def verdict(self) -> str:
        """What was found, in a sentence or two."""
        if self.status in ("law", "provisional"):
            ratio = self.ratio_at()
            said = f"the best teacher has {ratio.value:.2g} times its student's parameters ({_range(ratio.interval)})"
            if self.status == "law":
                return f"{said}."
            return f"{said}, but without {' or '.join(self.rests_on)} there is no optimum."
        if self.status == "break_even":
            found = self.break_even(math.exp(self.joint.means[0]))
            sizes = [short_scale(x) for x in (found.small, found.large)]
            low, high = (short_scale(x) for x in found.interval)
            return (
                f"above {short_scale(found.tokens)} tokens ({low} to {high}) a teacher of {sizes[1]} is better than "
                f"one of {sizes[0]}. {self.missing}"
            )
        return f"no optimum and no break-even budget is established. {self.missing}"

    def to_json(self) -> str:
        """Status, components, tests, and the numbers at the mean student and budget."""
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
        }
        if "d" in self.joint.terms:
            found["break_even"] = asdict(self.break_even(math.exp(self.joint.means[0])))
        return json.dumps(found, indent=2, default=float)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """The smallest and the largest teacher that every curve has."""
        cells = self.joint.cells
        each = [set(np.round(cells.teacher[cells.curve == c], 9)) for c in range(self.joint.curves)]
        shared = sorted(set.intersection(*each)) or sorted(set.union(*each))
        return math.exp(shared[0]), math.exp(shared[-1])

    @cached_property
    def _rungs(self) -> list[int]:
        """Codes of the rungs, smallest first."""
        codes = np.unique(self.joint.cells.groups["rung"])
        return sorted(codes.tolist(), key=self._size)

    def _at(self, student_params: float, data_tokens: float | None) -> tuple[float, float]:
        """A student and a budget as logs off their means; no budget is the mean one."""
        mean = self.joint.means
        d = 0.0 if data_tokens is None or "d" not in self.joint.terms else math.log(data_tokens) - mean[1]
        return math.log(student_params) - mean[0], d

    def _size(self, code: int) -> float:
        """log parameters of a rung."""
        cells = self.joint.cells
        return float(cells.teacher[cells.groups["rung"] == code].mean())

    def _draws(self, n: float, d: float, rungs: list[int]) -> np.ndarray:
        """Losses of some rungs by the posterior of coefficients and rung effects [DRAWS, rungs], but for the level."""
        j, teacher = self.joint, np.array([self._size(code) for code in rungs])
        rows = j.row(teacher - j.centre(n, d), np.full(len(teacher), n), np.full(len(teacher), d))
        W = np.zeros((len(teacher), len(j.mixed.joint)))
        W[:, : rows.shape[1]] = rows
        mean = rows @ j.mixed.beta
        if "rung" in j.mixed.effects:
            columns = j.mixed.problem.columns[list(j.mixed.effects).index("rung")]
            W[np.arange(len(teacher)), columns.start + np.array(rungs)] = 1.0
            mean = mean + j.mixed.effects["rung"][rungs]
        covariance = W @ j.mixed.joint @ W.T
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        generator = np.random.default_rng(SEED)
        df = min(float(j.mixed.contrast(j.coefficient("κ")).df), 1e3)
        normal = generator.standard_normal((DRAWS, len(teacher))) * np.sqrt(np.maximum(values, 0))
        return mean + (normal @ vectors.T) * np.sqrt(df / generator.chisquare(df, (DRAWS, 1)))


def _range(interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{low:.2g} to {high:.2g}" if math.isfinite(high) and low > 0 else "open at an end"


def fit_joint(
    frame: pd.DataFrame, *, axis: str = "total", metric: str | None = None, unpruned: bool = False
) -> JointFit:
    """One model of all cells of a grid (`joint.py`).

    Args:
        frame: tidy, one row a run: `student_params, teacher_params, loss`; may have `data_tokens`, `seed`,
            `teacher_seed`, and the names `student` and `teacher`. Rows alike but for these.
        axis: count `total` parameters or `non_embedding` ones.
        metric: the column to minimise, by default `loss`, or `student_loss` of our records.
        unpruned: whether students as large as their teacher are fitted too: these were not pruned.

    Raises:
        ValueError: columns are missing, rows differ in what parts curves, or there are too few rungs.
    """
    column = metric or default_metric(frame)
    require(frame, ["student_params", "teacher_params", column])
    if "status" in frame:
        frame = frame[frame["status"] == "done"]
    if "data_tokens" in frame and (frame["data_tokens"] > 0).any():
        frame = frame[frame["data_tokens"] > 0]  # the others were pruned, and not trained
    differ = [c for c in BY if c in frame and c not in CELLS_ASIDE and frame[c].nunique(dropna=False) > 1]
    if differ:
        some = {c: ", ".join(map(str, frame[c].unique()[:4])) for c in differ}
        said = "; ".join(f"{c} ({values})" for c, values in some.items())
        raise ValueError(
            f"one model is for cells alike but for student, teacher, budget and seeds; here differ {said}."
        )
    if "cell" in frame:
        frame = frame.drop_duplicates("cell")
    cells = cells_of(frame, axis=axis, metric=column, unpruned=unpruned)
    _check_sizes(cells)
    rungs = np.unique(cells.groups["rung"])
    if len(rungs) < LEAST_RUNGS:
        raise ValueError(f"{len(rungs)} teachers are too few: a curve with asymmetry needs {LEAST_RUNGS} or more.")
    return _said(fit_cells(cells))


@threadpool_limits.wrap(limits=1)
def _check_sizes(cells: Cells) -> None:
    """Raises where students of one curve are not of one size: what size does would be taken for the teacher's doing."""
    spread = max(float(np.ptp(cells.student[cells.curve == c])) for c in np.unique(cells.curve))
    if spread > TIGHT:
        raise ValueError(
            f"students of one curve differ by {math.expm1(spread):.1%} in size, and size alone would order their "
            f"teachers. Fit rows within {TIGHT:.0%}, such as those of prune.shape=common; fit_law adjusts for size."
        )


def _said(joint: Joint) -> JointFit:
    first = JointFit("", "", (), _inside(joint), joint)
    status, missing, rests_on = _status(first)
    return replace(first, status=status, missing=missing, rests_on=rests_on)


def _inside(joint: Joint) -> int:
    """Students whose optimum, at the mean budget, lies between their smallest and largest teacher."""
    cells, found = joint.cells, 0
    for n in np.unique(np.round(cells.student - joint.means[0], 6)):
        mine = cells.teacher[np.abs(cells.student - joint.means[0] - n) < 1e-5]
        at = optimum(joint, float(n), 0.0).value
        found += bool(mine.min() < at < mine.max())
    return found


def _passes(pair: Sequence[Contrast], alpha: float) -> bool:
    """Whether the loss falls at the smallest teacher and rises at the largest (Lind and Mehlum 2010)."""
    low, high = pair
    return 1 - low.p_above() < alpha and high.p_above() < alpha


def _status(fit: JointFit) -> tuple[str, str, tuple[str, ...]]:
    joint = fit.joint
    pair = ends(joint)
    missing = _missing(pair)
    students = len(np.unique(np.round(joint.cells.student, 6)))
    if _passes(pair, ALPHA):
        rests = [joint.cells.rungs[c] for c in fit._rungs if not _passes(without(joint, c), ALPHA_WITHOUT)]
        if not rests and fit.inside >= LEAST_INSIDE:
            return "law", "", ()
        if rests:
            return "provisional", "", tuple(rests)
        missing = f"{fit.inside} of {students} students have their optimum inside the grid; a law takes {LEAST_INSIDE}."
        return "provisional", missing, ()
    if "d" in joint.terms and fit.break_even(math.exp(joint.means[0])).established:
        return "break_even", missing, ()
    return "no_optimum", missing, ()


def _missing(pair: Sequence[Contrast]) -> str:
    """What would decide whether there is an optimum."""
    low, high = pair
    if 1 - low.p_above() >= ALPHA and high.p_above() >= ALPHA:
        return "Neither end of the ladder is shown to be worse: more rungs narrow this, more seeds of these hardly."
    if high.p_above() >= ALPHA:
        return "The largest teachers are not shown to be worse: larger ones, or smaller budgets, would decide."
    return "The smallest teachers are not shown to be worse: smaller ones, or larger budgets, would decide."
