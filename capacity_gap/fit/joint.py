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
from functools import cached_property

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from capacity_gap.estimators.mixed import Contrast, Mixed, fit_mixed
from capacity_gap.estimators.size_map import size_map
from capacity_gap.fit.joint_curve import GRID, NAMES, Centre, JointCurve, root
from capacity_gap.records.columns import AXES
from capacity_gap.settings.scales import short_scale

ALPHA = 0.06  # of each of the two one-sided tests that make an optimum (Lind and Mehlum 2010); by simulation
ALPHA_WITHOUT = 0.2  # of the same with one rung left out
# Standard deviations of λ/κ and μ/κ before the data, per unit of log scale and per its square; by power of z.
UNCERTAIN = {3: 1.25, 4: 1.5}
ROUNDS = 3  # of moving z to where the optimum seems to be


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
    map_sd: float = 0.0  # where `teacher` is a size read off a loss: the scatter about that map

    def part(self, keep: np.ndarray) -> "Cells":
        """Some of them."""
        groups = {name: codes[keep] for name, codes in self.groups.items()}
        kept = {name: getattr(self, name)[keep] for name in ("y", "student", "teacher", "data", "curve")}
        return replace(self, **kept, groups=groups)


def cells_of(frame: pd.DataFrame, *, axis: str = "total", metric: str = "loss", unpruned: bool = False) -> Cells:
    """The cells of a tidy table.

    Args:
        frame: one row a run, all alike but for student, teacher, budget and seeds.
        axis: `total` parameters, `non_embedding` ones, or `teacher_loss`: of a teacher the size at which its ladder has
            its loss (`size_map.py`).
        metric: the column that is lower where a student is better.
        unpruned: whether to keep students that are as large as their teacher, which no pruning damages.
    """
    if axis not in (*AXES, BY_LOSS):
        raise ValueError(f"axis={axis!r} is not known. Allowed: {', '.join((*AXES, BY_LOSS))}.")
    ending = AXES.get(axis, "")
    sizes = (frame[f"{of}_params{ending}"].to_numpy(float) for of in ("student", "teacher"))
    student, teacher = (np.log(np.where(size > 0, size, np.nan)) for size in sizes)
    quality = frame[BY_LOSS].to_numpy(float) if axis == BY_LOSS else np.zeros(len(frame))
    keep = np.isfinite(student + teacher + quality + frame[metric].to_numpy(float))
    keep = keep & (unpruned | (teacher > student + SAME))
    frame, student, teacher, quality = frame[keep], student[keep], teacher[keep], quality[keep]
    if frame.empty:
        raise ValueError("no row has a positive size of student and teacher, a teacher larger than it, and a loss.")
    tokens = frame["data_tokens"].to_numpy(float) if "data_tokens" in frame else np.zeros(len(frame))
    data = np.log(tokens) if (tokens > 0).all() else np.zeros(len(frame))  # pruning alone has none
    data = np.zeros(len(frame)) if np.ptp(data) < SAME else data
    seed, of_teacher = (
        frame[c].astype(object).fillna("").astype(str).to_numpy() if c in frame else np.full(len(frame), "")
        for c in ("seed", "teacher_seed")
    )
    names = frame["student"].astype(str).to_numpy() if "student" in frame else close_names(student)
    rung = frame["teacher"].astype(str).to_numpy() if "teacher" in frame else close_names(teacher)
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
    _check_rungs(teacher, groups["rung"], named)
    cells = Cells(frame[metric].to_numpy(float), student, teacher, data, codes(names, budget), groups, named)
    if axis != BY_LOSS:
        return cells
    found = size_map(teacher, quality, groups["rung"])
    return replace(cells, teacher=found.size(quality), map_sd=found.sd)


SAME = 0.02  # log sizes closer than this are one
BY_LOSS = "teacher_loss"
IN_STEP = 0.05  # log: budgets this close to a line in log student size are that line


def _check_rungs(teacher: np.ndarray, codes: np.ndarray, named: Mapping[int, str]) -> None:
    """Raises where teachers of one name have several sizes: they are not one rung."""
    for code, name in named.items():
        sizes = teacher[codes == code]
        if np.ptp(sizes) > SAME:
            low, high = (short_scale(math.exp(x)) for x in (sizes.min(), sizes.max()))
            raise ValueError(
                f"teachers called {name} have from {low} to {high} parameters. Use a separate name for each size in "
                "the column `teacher`, or drop the column."
            )


def close_names(logs: np.ndarray) -> np.ndarray:
    """A name for each value, shared by those next to each other."""
    order = np.argsort(logs)
    jumps = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > SAME)])
    found = np.empty(len(logs), dtype=int)
    found[order] = jumps
    return found.astype(str)


@dataclass(frozen=True, eq=False)
class Joint:
    """The fitted model, in its own coordinates."""

    cells: Cells
    centre: Centre
    mixed: Mixed
    means: tuple[float, float]  # of log N_S and log D
    terms: tuple[str, ...]  # of the slope: "1", "n", "d"
    powers: tuple[int, ...]  # of z besides the first
    curves: int

    @property
    def curvature(self) -> Contrast:
        """κ."""
        return self.curve.contrast(self.curve.unit("κ"))

    @cached_property
    def curve(self) -> JointCurve:
        """What questions need of it."""
        return self.curve_of(self.mixed)

    def curve_of(self, mixed: Mixed) -> JointCurve:
        """The same by another fit of the same coefficients."""
        cells, first = self.cells, self.curves
        last = first + len(self.terms) + len(self.powers)
        n, d = cells.student - self.means[0], cells.data - self.means[1]
        z = cells.teacher - self.centre(n, d)
        codes, names = cells.groups["rung"], cells.rungs
        sizes = {code: float(cells.teacher[codes == code].mean()) for code in names}
        order = sorted(sizes, key=lambda code: sizes[code])
        places = list(range(first, last))
        effects = np.empty(0)
        if "rung" in mixed.effects:
            columns = mixed.problem.columns[list(mixed.effects).index("rung")]
            places += [columns.start + code for code in order]
            effects = mixed.effects["rung"][order]
        return JointCurve(
            self.centre,
            self.means,
            self.terms,
            self.powers,
            mixed.of(slice(first, last)),
            (float(z.min()), float(z.max())),
            (float(n.min()), float(n.max())),
            (float(d.min()), float(d.max())),
            {names[code]: sizes[code] for code in order},
            effects,
            mixed.spread(np.eye(mixed.size)[places]),
            mixed.sds.get("rung", mixed.sds.get("teacher", 0.0)),
            _shared(cells),
            cells.map_sd,
        )


@threadpool_limits.wrap(limits=1)  # its matrices are small: on a machine at work, threads made it thirty times slower
def fit_cells(cells: Cells) -> Joint:
    """Fits, moving z to where the optimum seems to be."""
    means = float(np.mean(cells.student)), float(np.mean(cells.data))
    terms = ("1", *["n"] * bool(np.ptp(cells.student) > SAME), *["d"] * bool(np.ptp(cells.data) > SAME))
    n, d = cells.student - means[0], cells.data - means[1]
    centre = Centre(float(np.mean(cells.teacher)), 1.0 if "n" in terms else 0.0, 0.0)
    centre = replace(centre, at=float(np.mean(cells.teacher - centre.b * n)))
    if len(terms) == 3 and _in_step(n, d):
        terms = ("1", "n")  # budgets grow with students: one slope stands for both
    rungs = len(np.unique(cells.groups["rung"]))
    powers = (2, *UNCERTAIN) if rungs > 2 else ()
    found = None
    for _ in range(ROUNDS):
        try:
            found = _fit_at(cells, centre, means, terms, powers, found)
        except np.linalg.LinAlgError as error:
            raise ValueError(
                "these cells do not determine the model: students and teachers are confounded, or too few teachers "
                "share a student. Run every student under the same teachers."
            ) from error
        moved = _moved(found, n, d) if powers else None
        if moved is None or abs(moved.at - centre.at) + abs(moved.b - centre.b) + abs(moved.d - centre.d) < 0.02:
            break
        centre = moved
    assert found is not None
    return found


def _in_step(n: np.ndarray, d: np.ndarray) -> bool:
    """Whether budgets follow from students, as in 20 tokens a parameter."""
    line = np.polyfit(n, d, 1)
    return bool(np.std(d - np.polyval(line, n)) < IN_STEP)


def _fit_at(
    cells: Cells,
    centre: Centre,
    means: tuple[float, float],
    terms: tuple[str, ...],
    powers: tuple[int, ...],
    before: Joint | None,
) -> Joint:
    n, d = cells.student - means[0], cells.data - means[1]
    z = cells.teacher - centre(n, d)
    curves = int(cells.curve.max()) + 1
    levels = np.eye(curves)[cells.curve]
    by = {"1": np.ones_like(z), "n": n, "d": d}
    X = np.column_stack([levels, *[z * by[t] for t in terms], *[z**p / math.factorial(p) for p in powers]])
    groups = {name: np.eye(int(codes.max()) + 1)[codes] for name, codes in cells.groups.items()}
    groups = _told_apart(groups, len(z))
    if curves > 2:
        middle = np.array([z[cells.curve == c].mean() for c in range(curves)])[cells.curve]
        groups["slope"] = levels * (z - middle)[:, None]
    # λ ~ N(0, (UNCERTAIN·κ)²): one row more, in which it is seen to be zero with that error; so μ.
    shares = [UNCERTAIN[p] for p in powers if p in UNCERTAIN]
    m = len(shares)
    typical = _typical_curvature(cells.y, X[:, : X.shape[1] - m], before) if m else 0.0
    prior = np.eye(X.shape[1])[X.shape[1] - m :]
    known = np.append(np.zeros(len(z)), [(share * typical) ** 2 for share in shares])
    groups = {name: np.vstack([Z, np.zeros((m, Z.shape[1]))]) for name, Z in groups.items()}
    near = before.mixed.sds if before else None
    mixed = fit_mixed(
        np.append(cells.y, np.zeros(m)), np.vstack([X, prior]), groups, known, near=near, wanted=("rung", "teacher")
    )
    return Joint(cells, centre, mixed, means, terms, powers, curves)


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
    """|κ|, or twice its error if that is more: at zero curvature the prior would force zero asymmetry."""
    if before is not None:
        found = before.curvature
        return max(abs(found.value), 2 * found.error)
    beta = np.linalg.lstsq(X, y, rcond=None)[0]
    rest = y - X @ beta
    error = math.sqrt(rest @ rest / max(1, len(y) - X.shape[1]) * np.linalg.pinv(X.T @ X)[-1, -1])
    return max(abs(float(beta[-1])), 2 * error)


def _moved(joint: Joint, n: np.ndarray, d: np.ndarray) -> Centre | None:
    """Where the optimum is by these coefficients; None if it is not inside the grid."""
    curve, c = joint.curve, joint.centre
    grid = np.linspace(*curve.z_span, GRID)
    at = root(grid, curve.slope(grid))
    if not math.isfinite(at) or joint.curvature.t < 1:
        return None
    bend = sum(curve.value(NAMES[p]) * at ** (p - 2) / math.factorial(p - 2) for p in joint.powers)
    if bend <= 0:
        return None
    b = float(np.clip(c.b - curve.value("n") / bend, -1, 3)) if "n" in joint.terms else 0.0
    return Centre(c.at + at, b, float(np.clip(c.d - curve.value("d") / bend, -2, 4)) if "d" in joint.terms else 0.0)


def _shared(cells: Cells) -> tuple[str, str]:
    """The smallest and the largest teacher that every curve has; of all where no two are in every one."""
    codes = cells.groups["rung"]
    each = [set(codes[cells.curve == c].tolist()) for c in np.unique(cells.curve)]
    common = set.intersection(*each)
    able = sorted(
        common if len(common) > 1 else set.union(*each), key=lambda c: float(cells.teacher[codes == c].mean())
    )
    return cells.rungs[able[0]], cells.rungs[able[-1]]


def ends(joint: Joint, keep: np.ndarray | None = None) -> tuple[Contrast, Contrast]:
    """The slope at the smallest and at the largest teacher, mean over curves: a minimum between falls, then rises.

    `keep`: which cells there are, if not all.
    """
    cells = joint.cells if keep is None else joint.cells.part(keep)
    curve = joint.curve
    n, d = cells.student - joint.means[0], cells.data - joint.means[1]
    z = cells.teacher - joint.centre(n, d)
    found = []
    for pick in (np.argmin, np.argmax):
        at = [np.flatnonzero(cells.curve == c)[pick(z[cells.curve == c])] for c in np.unique(cells.curve)]
        found.append(curve.contrast(curve.row(z[at], n[at], d[at], derivative=True).mean(0)))
    return found[0], found[1]


def without(joint: Joint, rung: int) -> tuple[Contrast, Contrast] | None:
    """The slopes of `ends` with one rung left out, its variance components kept; None where the rest does not determine
    them."""
    keep = joint.cells.groups["rung"] != rung
    priors = len(joint.mixed.problem.y) - len(keep)
    try:
        mixed = joint.mixed.part(np.append(keep, [True] * priors))
    except np.linalg.LinAlgError:
        return None
    return ends(replace(joint, mixed=mixed), keep)
