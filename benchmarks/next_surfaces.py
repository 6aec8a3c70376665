"""The true surfaces of `benchmarks/next_cells.py`: study one's, the published distillation law, an asymmetric one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from capacity_gap.fit.joint import SAME
from capacity_gap.fit.joint_curve import JointCurve
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
