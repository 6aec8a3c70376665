"""The information in cells that were not run: the joint model as one Gaussian over cells and a goal.

    y_i = x_i'β + Σ_k u_k(i) + e_i,   β ~ N(m, V),   u_k ~ N(0, σ_k²),   e ~ N(0, σ²)

A goal is a contrast g'β: the slope of the curve where the optimum seems to be, or the difference of two teachers where
it seems to be zero. The optimum moves by that contrast over a curvature, so it loses the same share of its variance. A
cell i lowers the variance of the goal by C(g, i)² / (σ² + C(i, i)), with C the covariance given all cells so far.
Levels, teachers, rungs and curves that only the pool has stand in C with their prior variances.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import linalg

from capacity_gap.fit.joint import SAME, UNCERTAIN, Cells, Joint, cells_of, fit_cells
from capacity_gap.fit.joint_curve import Centre
from capacity_gap.fit.joint_forecast import coded_anew

# Before any cell: study one's, as the joint model reads it in results/pico (nats; benchmarks/joint_coverage.py).
STUDY: Mapping[str, float] = {
    "rung": 0.008,
    "teacher": 0.016,
    "teacher x student": 0.006,
    "teacher x budget": 0.007,
    "seed x budget": 0.004,
    "slope": 0.008,
    "error": 0.010,
}
CURVATURE = 0.045  # second derivative of study one's loss by log teacher size
RATIO = 2.5  # where the optimum is assumed before any cell
LEVEL_SD = 3.0  # of a curve's level: nothing is known of it
# Standard deviations of slope and curvature, over a typical curvature; of the slope that is log units of the optimum.
WIDTHS = {"1": 2.0, "n": 1.0, "d": 1.5, "κ": 1.0}
POWERS = (2, *UNCERTAIN)
LEAST_RUNGS = 3  # teachers from which the joint model is fitted
LEAST_CELLS = 10
STEADY = 30.0  # cells that the prior standard deviations count for


@dataclass(frozen=True)
class Goal:
    """The quantity to estimate: the law's ratio, the best teacher at a `target`, or a `break_even` budget.

    `law` is the optimum at the mean (log) student and budget of all cells, those of the pool included.
    """

    kind: str = "law"
    student_params: float | None = None
    data_tokens: float | None = None  # of a target
    small: float | None = None  # teachers' parameters, of a break-even budget
    large: float | None = None

    def __post_init__(self) -> None:
        needs = NEEDS.get(self.kind)
        if needs is None:
            raise ValueError(f"goal={self.kind!r} is not known. Allowed: {', '.join(NEEDS)}.")
        wrong = [name for name in needs if not _positive(getattr(self, name))]
        if wrong:
            raise ValueError(f"goal {self.kind} needs {', '.join(needs)}, positive; {', '.join(wrong)} is not.")
        if self.kind == "break_even" and not self.small < self.large:  # type: ignore[operator]
            raise ValueError(f"small={self.small:,.0f} is not below large={self.large:,.0f} parameters.")


NEEDS: Mapping[str, tuple[str, ...]] = {
    "law": (),
    "target": ("student_params", "data_tokens"),
    "break_even": ("student_params", "small", "large"),
}


def _positive(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


@dataclass(frozen=True, eq=False)
class Belief:
    """The posterior of M cells of a pool, and of the contrast that stands for the goal, given the cells so far."""

    cells: Cells  # those so far, then those of the pool
    known: int
    covariance: np.ndarray  # [M, M] of what the pool's cells share and what is not known of them, without their errors
    goal: np.ndarray  # [M] covariance with the contrast
    variance: float  # of the contrast
    error: float  # variance of a run
    optimum: np.ndarray  # [M] log size of the teacher that seems to be best for each cell's student and budget
    fitted: bool  # whether variances and optimum are a fit's; else they are assumed


def believe(frame: pd.DataFrame, pool: pd.DataFrame, goal: Goal) -> Belief:
    """The posterior over a pool.

    Args:
        frame: tidy cells with a loss; may be empty.
        pool: tidy cells without one, each with a teacher larger than its student.
        goal: the quantity to estimate.
    """
    cells = cells_of(pd.concat([frame, pool.assign(loss=0.0)], ignore_index=True))
    known = len(cells.y) - len(pool)
    model = Model.of(cells, known)
    K = model.shared()
    first, rest = slice(None, known), slice(known, None)
    inside = K[first, first] + model.sds["error"] ** 2 * np.eye(known)
    L = linalg.cholesky(inside, lower=True, check_finite=False)
    by_cells = model.rows[first] * model.variances  # [known, p] covariance with the coefficients
    white = linalg.solve_triangular(L, np.column_stack([K[first, rest], by_cells]), lower=True, check_finite=False)
    of_pool, of_beta = white[:, : len(pool)], white[:, len(pool) :]
    surprise = linalg.solve_triangular(L, cells.y[first] - model.mean(first), lower=True, check_finite=False)
    beta = model.prior_mean + of_beta.T @ surprise
    spread = np.diag(model.variances) - of_beta.T @ of_beta
    g = model.contrast(goal, beta)
    return Belief(
        cells,
        known,
        K[rest, rest] - of_pool.T @ of_pool,
        (model.rows[rest] * model.variances - of_pool.T @ of_beta) @ g,
        float(g @ spread @ g),
        model.sds["error"] ** 2,
        model.optima(beta)[rest],
        model.fitted,
    )


@dataclass(frozen=True, eq=False)
class Model:
    """The prior of cells and coefficients, in the order 1, n, d, κ, λ, μ."""

    cells: Cells
    known: int
    centre: Centre
    means: tuple[float, float]  # of log N_S and log D, over all cells
    sds: Mapping[str, float]
    curvature: float
    level: float  # of the loss
    fitted: bool  # or assumed: nothing else is known

    @classmethod
    def of(cls, cells: Cells, known: int) -> "Model":
        """As the first `known` cells fit it; as study one has it where they are too few."""
        means = float(np.mean(cells.student)), float(np.mean(cells.data))
        joint = _fitted(cells, known)
        level = float(cells.y[:known].mean()) if known else 0.0
        if joint is None:
            return cls(
                cells, known, Centre(means[0] + math.log(RATIO), 1.0, 0.0), means, STUDY, CURVATURE, level, False
            )
        b = joint.centre.b if "n" in joint.terms else 1.0
        d = joint.centre.d if "d" in joint.terms else 0.0
        at = joint.centre.at + b * (means[0] - joint.means[0]) + d * (means[1] - joint.means[1])
        bend = joint.curvature
        bent = max(abs(bend.value), 2 * bend.error)
        return cls(cells, known, Centre(at, b, d), means, _sds(joint), bent, level, True)

    @property
    def n(self) -> np.ndarray:
        """log N_S off its mean [cells]."""
        return self.cells.student - self.means[0]

    @property
    def d(self) -> np.ndarray:
        """log D off its mean [cells]."""
        return self.cells.data - self.means[1]

    @property
    def z(self) -> np.ndarray:
        """log N_T off where the optimum seems to be [cells]."""
        return self.cells.teacher - self.centre(self.n, self.d)

    @property
    def rows(self) -> np.ndarray:
        """[cells, 6]."""
        return row(self.z, self.n, self.d)

    @property
    def variances(self) -> np.ndarray:
        """[6] of the coefficients before the cells."""
        widths = np.array([*WIDTHS.values(), *UNCERTAIN.values()])
        return (widths * self.curvature) ** 2

    @property
    def prior_mean(self) -> np.ndarray:
        """[6]: the optimum is at the centre."""
        return np.array([0, 0, 0, self.curvature, 0, 0], float)

    def mean(self, part: slice) -> np.ndarray:
        """Losses before the cells."""
        return self.level + self.rows[part] @ self.prior_mean

    def shared(self) -> np.ndarray:
        """Covariance of all cells but for the errors of runs [cells, cells]."""
        X, curve, z = self.rows, self.cells.curve, self.z
        same = np.equal.outer(curve, curve)
        middle = np.array([z[curve == c].mean() for c in range(int(curve.max()) + 1)])[curve]
        K = (X * self.variances) @ X.T
        K += same * (LEVEL_SD**2 + self.sds["slope"] ** 2 * np.outer(z - middle, z - middle))
        for name, codes in self.cells.groups.items():
            K += self.sds[name] ** 2 * np.equal.outer(codes, codes)
        return K

    def optima(self, beta: np.ndarray) -> np.ndarray:
        """log N_T of the teacher that seems best for each cell's student and budget [cells]."""
        found = np.empty(len(self.z))
        span = float(self.z.min()), float(self.z.max())
        for c in np.unique(self.cells.curve):
            mine = self.cells.curve == c
            n, d = float(self.n[mine].mean()), float(self.d[mine].mean())
            found[mine] = lowest(beta, n, d, span) + self.centre(n, d)
        return found

    def contrast(self, goal: Goal, beta: np.ndarray) -> np.ndarray:
        """The goal's gradient by the coefficients, but for a factor [6]."""
        n = 0.0 if goal.student_params is None else math.log(goal.student_params) - self.means[0]
        if goal.kind == "break_even":
            return self._difference(goal, n, beta)
        several = np.ptp(self.cells.data) > SAME
        d = math.log(goal.data_tokens) - self.means[1] if goal.data_tokens and several else 0.0
        span = float(self.z.min()), float(self.z.max())
        return row(lowest(beta, n, d, span), n, d, derivative=True)[0]

    def _difference(self, goal: Goal, n: float, beta: np.ndarray) -> np.ndarray:
        """The larger teacher's loss less the smaller one's at the budget where that seems to be nearest to zero."""
        d = np.linspace(self.d.min(), self.d.max(), GRID)
        if np.ptp(d) < SAME:
            raise ValueError("a break-even budget needs cells of at least two budgets (data_tokens); there is one.")
        assert goal.small and goal.large
        small, large = (row(math.log(size) - self.centre(n, d), n, d) for size in (goal.small, goal.large))
        least = int(np.argmin(np.abs((large - small) @ beta)))
        return (large - small)[least]


GRID = 200


def row(z: np.ndarray | float, n: np.ndarray | float, d: np.ndarray | float, *, derivative: bool = False) -> np.ndarray:
    """The loss at z less that at 0, or its derivative, as a function of the coefficients [m, 6]."""
    z, n, d = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in (z, n, d)))
    first = np.ones_like(z) if derivative else z
    shape = [z ** (p - derivative) / math.factorial(p - derivative) for p in POWERS]
    return np.stack([first, first * n, first * d, *shape], -1)


def lowest(beta: np.ndarray, n: float, d: float, span: tuple[float, float]) -> float:
    """z of the least expected loss among those that were tried; an end where it falls up to there."""
    grid = np.linspace(*span, GRID)
    return float(grid[np.argmin(row(grid, n, d) @ beta)])


def _fitted(cells: Cells, known: int) -> Joint | None:
    """The joint model of the cells so far; None where they are too few for it."""
    there = np.arange(len(cells.y)) < known
    if known < LEAST_CELLS or len(np.unique(cells.groups["rung"][there])) < LEAST_RUNGS:
        return None
    try:
        return fit_cells(coded_anew(cells, there))
    except ValueError:
        return None


def _sds(joint: Joint) -> dict[str, float]:
    """Standard deviations by REML, drawn towards study one's while cells are few.

    A component that is confounded with another gets a share of that one's variance, as in study one.
    """
    found = {name: sd**2 for name, sd in joint.mixed.sds.items()}
    for name in [name for name in joint.cells.groups if name not in found]:
        holder = _holder(joint, name)
        share = STUDY[name] ** 2 / (STUDY[name] ** 2 + STUDY[holder] ** 2)
        found[name] = share * found[holder]
        found[holder] *= 1 - share
    scale = sum(v for k, v in found.items() if k != "slope") / sum(v**2 for k, v in STUDY.items() if k != "slope")
    found.setdefault("slope", scale * STUDY["slope"] ** 2)  # of one or two curves
    weight = STEADY / (STEADY + len(joint.cells.y))
    return {k: math.sqrt((1 - weight) * found[k] + weight * scale * STUDY[k] ** 2) for k in STUDY}


def _holder(joint: Joint, name: str) -> str:
    """The component of the fit that a missing one is part of: one with the same groups, else the error."""
    groups = joint.cells.groups
    levels = len(np.unique(groups[name]))
    for other in groups:
        if other in joint.mixed.sds and len(np.unique(groups[other])) == levels:
            pairs = {*zip(groups[name].tolist(), groups[other].tolist(), strict=True)}
            if len(pairs) == levels:
                return other
    return "error"
