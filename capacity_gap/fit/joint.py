"""One model of all cells of a grid: the optimum, the break-even budget and their tests share every teacher's error.

    loss = level(student, budget) + slope·z + κ·z²/2 + λ·z³/6 + random effects + error
    slope = α + β·log(N_S/N̄) + δ·log(D/D̄)

z is log teacher size less where the optimum seems to be; where that is not inside the grid, log N_T/N_S less its mean.
Curvature κ and asymmetry λ are common to all curves. λ is never selected: a weak prior in units of κ lets it be
averaged over. Random effects: the rung (what the cubic does not fit), the teacher (rung × seed), teacher × student,
teacher × budget, the student's seed × budget, and a slope of each curve. A derivative or a difference of two teachers
is linear in the coefficients, so sets for optimum and break-even budget are Fieller's: all values at which a t test
does not reject. docs/joint.md has the reasons and the simulations.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from threadpoolctl import threadpool_limits

from capacity_gap.estimators.mixed import Contrast, Mixed, fit_mixed
from capacity_gap.fit.frame import AXES
from capacity_gap.settings.scales import short_scale

LEVEL = 0.95
ALPHA = 0.05  # of each of the two one-sided tests that make an optimum (Lind and Mehlum 2010)
ALPHA_WITHOUT = 0.2  # of the same with one rung left out
ASYMMETRY = 1.0  # standard deviation of λ/κ before the data, per unit of log scale
ROUNDS = 3  # of moving z to where the optimum seems to be
GRID = 400  # points on which a set is looked for
BEYOND = math.log(4.0)  # how far beyond the grid


@dataclass(frozen=True)
class Cells:
    """What is fitted: one row a cell. Logs of sizes and budget, the loss, and what cells share."""

    y: np.ndarray
    student: np.ndarray  # log N_S
    teacher: np.ndarray  # log N_T
    data: np.ndarray  # log D, zero where all are alike
    curve: np.ndarray  # codes of (student, budget)
    groups: Mapping[str, np.ndarray]  # codes by random effect
    rungs: Mapping[int, str]  # the names of teachers, by their codes

    def part(self, keep: np.ndarray) -> "Cells":
        """Some of them."""
        groups = {name: codes[keep] for name, codes in self.groups.items()}
        return Cells(
            self.y[keep], self.student[keep], self.teacher[keep], self.data[keep], self.curve[keep], groups, self.rungs
        )


def cells_of(frame: pd.DataFrame, *, axis: str = "total", metric: str = "loss", unpruned: bool = False) -> Cells:
    """The cells of a tidy table.

    Args:
        frame: one row a run, all alike but for student, teacher, budget and seeds.
        axis: `total` parameters, or `non_embedding` ones.
        metric: the column that is lower where a student is better.
        unpruned: whether to keep students that are as large as their teacher, which no pruning damages.
    """
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} is not known. Allowed: {', '.join(AXES)}.")
    student, teacher = (np.log(frame[f"{of}_params{AXES[axis]}"].to_numpy(float)) for of in ("student", "teacher"))
    keep = np.isfinite(student + teacher + frame[metric].to_numpy(float))
    keep &= unpruned | (teacher > student + SAME)
    frame, student, teacher = frame[keep], student[keep], teacher[keep]
    data = np.log(frame["data_tokens"].to_numpy(float)) if "data_tokens" in frame else np.zeros(len(frame))
    data = np.zeros(len(frame)) if np.ptp(data) < SAME else data
    seed, of_teacher = (
        frame[c].astype(str).to_numpy() if c in frame else np.full(len(frame), "") for c in ("seed", "teacher_seed")
    )
    names = frame["student"].astype(str).to_numpy() if "student" in frame else _close(student)
    rung = frame["teacher"].astype(str).to_numpy() if "teacher" in frame else _close(teacher)
    budget = np.char.mod("%.9g", data)

    def codes(*parts: np.ndarray) -> np.ndarray:
        return np.unique([" | ".join(row) for row in zip(*parts, strict=True)], return_inverse=True)[1]

    trained = codes(rung, of_teacher)
    groups = {
        "rung": codes(rung),
        "teacher": trained,
        "teacher x student": codes(rung, of_teacher, names),
        "teacher x budget": codes(rung, of_teacher, budget),
        "seed x budget": codes(names, seed, budget),
    }
    named = {
        int(code): label if "teacher" in frame else short_scale(math.exp(log))
        for code, label, log in zip(groups["rung"], rung, teacher, strict=True)
    }
    return Cells(frame[metric].to_numpy(float), student, teacher, data, codes(names, budget), groups, named)


SAME = 0.02  # log sizes closer than this are one


def _close(logs: np.ndarray) -> np.ndarray:
    """A name for each value, shared by those next to each other."""
    order = np.argsort(logs)
    jumps = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > SAME)])
    found = np.empty(len(logs), dtype=int)
    found[order] = jumps
    return found.astype(str)


@dataclass(frozen=True)
class Centre:
    """Where z is zero: log N_T = at + b·log(N_S/N̄) + d·log(D/D̄)."""

    at: float
    b: float
    d: float

    def __call__(self, n: np.ndarray | float, d: np.ndarray | float) -> Any:
        """At a student `n` and a budget `d`, in logs off their means."""
        return self.at + self.b * n + self.d * d


@dataclass(frozen=True, eq=False)
class Joint:
    """The fitted model, in its own coordinates."""

    cells: Cells
    centre: Centre
    mixed: Mixed
    means: tuple[float, float]  # of log N_S and log D
    terms: tuple[str, ...]  # of the slope: "1", "n", "d"
    curves: int

    def row(self, z: np.ndarray, n: np.ndarray, d: np.ndarray, *, derivative: bool = False) -> np.ndarray:
        """The loss at z less that at 0, or its derivative, as a function of the coefficients [m, P]."""
        by = {"1": np.ones_like(z), "n": n, "d": d}
        first = np.ones_like(z) if derivative else z
        slope = [first * by[t] for t in self.terms]
        bend = [z, z**2 / 2] if derivative else [z**2 / 2, z**3 / 6]
        return np.stack([*[np.zeros_like(z)] * self.curves, *slope, *bend], -1)

    def coefficient(self, name: str) -> np.ndarray:
        """The vector that takes one coefficient."""
        names = [*self.terms, "κ", "λ"]
        return np.eye(self.curves + len(names))[self.curves + names.index(name)]

    @property
    def curvature(self) -> Contrast:
        """κ."""
        return self.mixed.contrast(self.coefficient("κ"))


@threadpool_limits.wrap(limits=1)  # its matrices are small: on a machine at work, threads made it thirty times slower
def fit_cells(cells: Cells) -> Joint:
    """Fits, moving z to where the optimum seems to be."""
    means = float(np.mean(cells.student)), float(np.mean(cells.data))
    terms = ("1", *["n"] * bool(np.ptp(cells.student) > SAME), *["d"] * bool(np.ptp(cells.data) > SAME))
    n, d = cells.student - means[0], cells.data - means[1]
    centre = Centre(float(np.mean(cells.teacher)), 1.0 if "n" in terms else 0.0, 0.0)
    centre = replace(centre, at=float(np.mean(cells.teacher - centre.b * n)))
    found = None
    for _ in range(ROUNDS):
        found = _fit_at(cells, centre, means, terms, found)
        moved = _moved(found, n, d)
        if moved is None or abs(moved.at - centre.at) + abs(moved.b - centre.b) + abs(moved.d - centre.d) < 0.02:
            break
        centre = moved
    assert found is not None
    return found


def _fit_at(
    cells: Cells, centre: Centre, means: tuple[float, float], terms: tuple[str, ...], before: Joint | None
) -> Joint:
    n, d = cells.student - means[0], cells.data - means[1]
    z = cells.teacher - centre(n, d)
    curves = int(cells.curve.max()) + 1
    levels = np.eye(curves)[cells.curve]
    by = {"1": np.ones_like(z), "n": n, "d": d}
    X = np.column_stack([levels, *[z * by[t] for t in terms], z**2 / 2, z**3 / 6])
    groups = {name: np.eye(int(codes.max()) + 1)[codes] for name, codes in cells.groups.items()}
    groups = _told_apart(groups, len(z))
    if curves > 2:
        middle = np.array([z[cells.curve == c].mean() for c in range(curves)])[cells.curve]
        groups["slope"] = levels * (z - middle)[:, None]
    # λ ~ N(0, (ASYMMETRY·κ)²): one row more, in which it is seen to be zero with that error.
    error = ASYMMETRY * _typical_curvature(cells.y, X, before)
    prior, known = np.zeros((1, X.shape[1])), np.zeros(len(z) + 1)
    prior[0, -1], known[-1] = 1.0, error**2
    groups = {name: np.vstack([Z, np.zeros(Z.shape[1])]) for name, Z in groups.items()}
    mixed = fit_mixed(
        np.append(cells.y, 0.0), np.vstack([X, prior]), groups, known, near=before.mixed.sds if before else None
    )
    return Joint(cells, centre, mixed, means, terms, curves)


def _told_apart(groups: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The random effects that differ from each other, from the levels, and from the error of a cell."""
    found: dict[str, np.ndarray] = {}
    for name, Z in groups.items():
        if not 1 < Z.shape[1] < count or any(Z.shape == other.shape and _alike(Z, other) for other in found.values()):
            continue
        found[name] = Z
    return found


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(((one.T @ other > 0).sum(0) == 1).all())


def _typical_curvature(y: np.ndarray, X: np.ndarray, before: Joint | None) -> float:
    """|κ|, or twice its error if that is more: without any the prior would say that there is no asymmetry either."""
    if before is not None:
        found = before.curvature
        return max(abs(found.value), 2 * found.error)
    flat = X[:, :-1]
    beta = np.linalg.lstsq(flat, y, rcond=None)[0]
    rest = y - flat @ beta
    error = math.sqrt(rest @ rest / max(1, len(y) - flat.shape[1]) * np.linalg.pinv(flat.T @ flat)[-1, -1])
    return max(abs(float(beta[-1])), 2 * error)


def _moved(joint: Joint, n: np.ndarray, d: np.ndarray) -> Centre | None:
    """Where the optimum is by these coefficients; None where there is none inside the grid."""
    beta = dict(zip([*joint.terms, "κ", "λ"], joint.mixed.beta[joint.curves :], strict=True))
    z = joint.cells.teacher - joint.centre(n, d)
    grid = np.linspace(z.min(), z.max(), GRID)
    slope = beta["1"] + beta["κ"] * grid + beta["λ"] * grid**2 / 2
    up = np.flatnonzero((slope[:-1] < 0) & (slope[1:] >= 0))
    if not len(up) or joint.curvature.t < 1:
        return None
    at = float(grid[up[0]])
    bend = beta["κ"] + beta["λ"] * at
    c = joint.centre
    if bend <= 0:
        return None
    b = float(np.clip(c.b - beta.get("n", 0.0) / bend, -1, 3)) if "n" in beta else 0.0
    return Centre(c.at + at, b, float(np.clip(c.d - beta.get("d", 0.0) / bend, -2, 4)) if "d" in beta else 0.0)


@dataclass(frozen=True)
class Set:
    """All values that a test does not reject: an interval, or one that is open at an end of where was looked."""

    value: float
    low: float
    high: float
    bounded: bool


def optimum(joint: Joint, n: float, d: float) -> Set:
    """log N_T of the best teacher of a student and a budget (logs off their means), and Fieller's set for it."""
    cells = joint.cells
    z = cells.teacher - joint.centre(cells.student - joint.means[0], cells.data - joint.means[1])
    grid = np.linspace(z.min() - BEYOND, z.max() + BEYOND, GRID)
    rows = joint.row(grid, np.full(GRID, n), np.full(GRID, d), derivative=True)
    value, error, df = joint.mixed.contrasts(rows)
    at = _root(grid, value)
    t = value / error
    held = np.abs(t) <= stats.t.ppf((1 + LEVEL) / 2, df)
    shift = joint.centre(n, d)
    if not math.isfinite(at):
        return Set(math.nan, -math.inf, math.inf, False)
    first, last = _around(held, int(np.argmin(np.abs(grid - at))))
    # Below the set the loss must fall, above it rise: else there is no minimum between.
    bounded = first > 0 and last < GRID - 1 and bool(t[first - 1] < 0 < t[last + 1])
    low = grid[first] if first > 0 and t[first - 1] < 0 else -math.inf
    high = grid[last] if last < GRID - 1 and t[last + 1] > 0 else math.inf
    return Set(at + shift, low + shift, high + shift, bounded)


def _root(grid: np.ndarray, slope: np.ndarray) -> float:
    """Where a derivative goes from below to above zero, nearest to the middle; NaN if nowhere."""
    up = np.flatnonzero((slope[:-1] < 0) & (slope[1:] >= 0))
    if not len(up):
        return math.nan
    i = up[np.argmin(np.abs(up - len(grid) / 2))]
    return float(grid[i] - slope[i] * (grid[i + 1] - grid[i]) / (slope[i + 1] - slope[i]))


def _around(held: np.ndarray, i: int) -> tuple[int, int]:
    """The first and last of the neighbours of `i` that are held too."""
    first = last = i
    while first > 0 and held[first - 1]:
        first -= 1
    while last < len(held) - 1 and held[last + 1]:
        last += 1
    return first, last


def ends(joint: Joint, keep: np.ndarray | None = None) -> tuple[Contrast, Contrast]:
    """The slope at the smallest and at the largest teacher, mean over curves: a minimum between falls, then rises.

    `keep`: which cells there are, if not all.
    """
    cells = joint.cells if keep is None else joint.cells.part(keep)
    n, d = cells.student - joint.means[0], cells.data - joint.means[1]
    z = cells.teacher - joint.centre(n, d)
    found = []
    for pick in (np.argmin, np.argmax):
        at = [np.flatnonzero(cells.curve == c)[pick(z[cells.curve == c])] for c in np.unique(cells.curve)]
        found.append(joint.mixed.contrast(joint.row(z[at], n[at], d[at], derivative=True).mean(0)))
    return found[0], found[1]


def without(joint: Joint, rung: int) -> tuple[Contrast, Contrast]:
    """The slopes of `ends` with one rung left out, its variance components kept."""
    keep = joint.cells.groups["rung"] != rung
    return ends(replace(joint, mixed=joint.mixed.part(np.append(keep, True))), keep)


def difference(joint: Joint, small: float, large: float, n: float, d: np.ndarray) -> np.ndarray:
    """The loss under the larger teacher less that under the smaller one at budgets `d`: rows [m, P]."""
    both = [np.asarray(x - joint.centre(n, d)) for x in (small, large)]
    at = np.full_like(d, n)
    return joint.row(both[1], at, d) - joint.row(both[0], at, d)


def break_even(joint: Joint, small: float, large: float, n: float) -> Set:
    """log D off its mean above which the larger of two teachers (logs) wins, and Fieller's set for it.

    It is established only where the smaller one wins at the least budget of the grid and the larger one at the most,
    each by a one-sided test at 2.5 %: then the set lies between the two.
    """
    d = joint.cells.data - joint.means[1]
    grid = np.linspace(d.min(), d.max(), GRID)
    value, error, df = joint.mixed.contrasts(difference(joint, small, large, n, grid))
    t, limit = value / error, np.asarray(stats.t.ppf((1 + LEVEL) / 2, df))
    at = _root(grid, -value)
    bounded = bool(t[0] > limit[0] and t[-1] < -limit[-1])
    if not math.isfinite(at):
        return Set(math.nan, -math.inf, math.inf, False)
    first, last = _around(np.abs(t) <= limit, int(np.argmin(np.abs(grid - at))))
    low, high = (grid[first] if first > 0 else -math.inf), (grid[last] if last < GRID - 1 else math.inf)
    return Set(at, low, high, bounded)
