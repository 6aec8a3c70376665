"""The true surfaces of `benchmarks/next_cells.py`: study one's, the published distillation law, an asymmetric one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from capacity_gap.fit.joint import SAME, Cells
from capacity_gap.fit.joint_curve import Centre, JointCurve, root
from capacity_gap.fit.next_model import CURVATURE, STUDY, Goal
from capacity_gap.settings.places import RESULTS
from capacity_gap.settings.scales import short_scale
from capacity_gap.store.files import read_json
from capacity_gap.surfaces.surface import published

SEEDS = 3
BUDGETS = np.array([0.5, 1.0, 2.0, 4.0])
STEEP = 0.6  # third derivative over second: a cubic term of a fifth of the quadratic
Loss = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Surface:
    """A true surface of the loss by logs of teacher, student and tokens; `noise` in nats."""

    name: str
    students: np.ndarray  # parameters
    teachers: np.ndarray
    budgets: np.ndarray  # tokens
    teacher_tokens: np.ndarray  # [teachers]
    loss: Loss
    noise: dict[str, float]

    @property
    def target(self) -> Goal:
        """The third student at the second largest budget."""
        return Goal("target", float(self.students[2]), float(self.budgets[2]))

    def best(self, student: float, tokens: float) -> float:
        """log N_T of the best teacher, within four times the ladder."""
        x = np.linspace(np.log(self.teachers[0]) - 1.4, np.log(self.teachers[-1]) + 1.4, 20_001)
        return float(x[np.argmin(self.loss(x, np.full_like(x, student), np.full_like(x, tokens)))])

    def break_even(self, goal: Goal) -> float:
        """Tokens above which the larger of two teachers has the lower loss, if within the budgets; else NaN."""
        assert goal.student_params and goal.small and goal.large
        d = np.linspace(np.log(self.budgets[0]), np.log(self.budgets[-1]), 20_001)
        n = np.full_like(d, math.log(goal.student_params))
        small, large = (self.loss(np.full_like(d, math.log(size)), n, d) for size in (goal.small, goal.large))
        return math.exp(root(d, small - large))

    def optimum(self, student: float, tokens: float) -> tuple[Centre, float]:
        """How the best teacher moves with the logs of student and tokens, and the curvature of the loss there."""
        best, step = self.best(student, tokens), 0.1
        by_student = (self.best(student + step, tokens) - best) / step
        by_tokens = (self.best(student, tokens + step) - best) / step
        left, middle, right = self.loss(best + np.array([-step, 0, step]), np.full(3, student), np.full(3, tokens))
        return Centre(best, by_student, by_tokens), float(left - 2 * middle + right) / step**2

    def table(self, rng: np.random.Generator) -> pd.DataFrame:
        """The cells of a full grid with their losses, each teacher larger than its student."""
        S, R, B = len(self.students), len(self.teachers), len(BUDGETS)
        i, j, k, s = (a.ravel() for a in np.meshgrid(*map(np.arange, (S, B, R, SEEDS)), indexing="ij"))
        keep = np.log(self.teachers[k] / self.students[i]) > SAME
        i, j, k, s = (a[keep] for a in (i, j, k, s))
        n, x, d = np.log(self.students[i]), np.log(self.teachers[k]), np.log(self.budgets[j])
        y = self.loss(x, n, d)
        sd, draw = self.noise, rng.standard_normal
        y = y + sd["rung"] * draw(R)[k] + sd["teacher"] * draw((R, SEEDS))[k, s]
        y += (
            sd["teacher x student"] * draw((R, SEEDS, S))[k, s, i]
            + sd["teacher x budget"] * draw((R, SEEDS, B))[k, s, j]
        )
        y += sd["seed x budget"] * draw((S, SEEDS, B))[i, s, j] + sd["error"] * draw(len(i))
        y += sd["slope"] * draw((S, B))[i, j] * (x - np.log(self.teachers).mean())
        names = {
            "student": [short_scale(v) for v in self.students[i]],
            "teacher": [short_scale(v) for v in self.teachers[k]],
        }
        sizes = {"student_params": self.students[i], "teacher_params": self.teachers[k], "data_tokens": self.budgets[j]}
        tokens = {"teacher_tokens": self.teacher_tokens[k]}
        return pd.DataFrame({**names, **sizes, **tokens, "seed": s, "teacher_seed": s, "loss": y})

    def slope_error(self, cells: Cells, chosen: Sequence[int], at: tuple[float, float, float]) -> float:
        """The standard error that generalised least squares gives the slope at a point, with the true variances.

        Args:
            cells: of a full grid.
            chosen: those of them that were run.
            at: logs of teacher, student and tokens.

        Returns:
            Nats per unit of log teacher size; infinite where the cells do not determine the slope.
        """
        index = np.array(sorted(chosen), int)
        z, n, d = (v[index] - x for v, x in zip((cells.teacher, cells.student, cells.data), at, strict=True))
        alike = np.equal.outer(cells.curve[index], cells.curve[index])
        V = self.noise["error"] ** 2 * np.eye(len(index)) + self.noise["slope"] ** 2 * alike * np.outer(z, z)
        for name, codes in cells.groups.items():
            V += self.noise[name] ** 2 * np.equal.outer(codes[index], codes[index])
        levels = np.equal.outer(cells.curve[index], np.unique(cells.curve[index]))
        X = np.column_stack([z, z * n, z * d, z**2, levels])
        values, vectors = np.linalg.eigh(X.T @ np.linalg.solve(V, X))
        kept = values > SMALL * values[-1]
        if np.abs(vectors[0, ~kept]).max(initial=0.0) > math.sqrt(SMALL):
            return math.inf
        return float(np.sqrt((vectors[0, kept] ** 2 / values[kept]).sum()))


SMALL = 1e-10  # eigenvalues this far below the largest are none
PICO_STUDENTS = np.array([39_940.0, 55_032.0, 80_160.0, 109_800.0])
PICO_TEACHERS = np.array([55_032.0, 80_160.0, 120_200.0, 179_760.0, 269_888.0, 400_080.0, 599_976.0, 899_712.0])
PICO_BUDGETS = 3e5 * BUDGETS


def _joint() -> Surface:
    held = read_json(RESULTS / "pico" / "joint.json", ["model", "sds"])
    curve = JointCurve.from_dict(held["model"])

    def loss(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        n, d = n - curve.means[0], d - curve.means[1]
        z = x - curve.centre(n, d)
        return 3 - 0.3 * n - 0.1 * d + curve.row(z, n, d) @ curve.coefficients.beta

    tokens = np.full(len(PICO_TEACHERS), 1e6)
    return Surface("joint", PICO_STUDENTS, PICO_TEACHERS, PICO_BUDGETS, tokens, loss, held["sds"])


def _published() -> Surface:
    law, own = published("distillation"), published("supervised")
    teachers = np.geomspace(4e8, 1.6e10, 8)

    def loss(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        at = own.predict(student_params=np.exp(x), data_tokens=20 * np.exp(x))
        return law.predict(student_params=np.exp(n), data_tokens=np.exp(d), teacher_loss=at)

    students = np.array([2e8, 2.75e8, 4e8, 5.5e8])
    return Surface("published", students, teachers, 1e11 * BUDGETS, 20 * teachers, loss, dict(STUDY))


def _steep() -> Surface:
    def loss(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        z = x - n - math.log(2.5) - 0.5 * (d - np.log(PICO_BUDGETS).mean())
        return 3 - 0.3 * (n - 11) - 0.1 * (d - 13) + CURVATURE / STEEP**2 * (np.exp(STEEP * z) - STEEP * z - 1)

    tokens = np.full(len(PICO_TEACHERS), 1e6)
    return Surface("steep", PICO_STUDENTS, PICO_TEACHERS, PICO_BUDGETS, tokens, loss, dict(STUDY))


SURFACES: dict[str, Callable[[], Surface]] = {
    "joint": cache(_joint),
    "published": cache(_published),
    "steep": cache(_steep),
}
