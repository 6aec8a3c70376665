"""Claim: `next_cells` reaches an answer with a small part of a full grid's FLOPs, and its sets still cover there.

    python -m benchmarks.next_cells [--out results/next.csv]    an hour on one core; it can be stopped and started again
    python -m benchmarks.next_cells --records                   the same on study one's own losses

Designs are fixed here, before any result. Seeds below 2,000 chose what `fit/next_model.py` and `fit/next_search.py`
hold; seeds from 20,000 judge. Each study is a full grid of 4 students, 8 teachers, 4 budgets and 3 seeds (teachers of
each seed are trained anew), whose losses come from one of three surfaces:

- `joint`: study one as the joint model reads it in `results/pico/joint.json`, with its noise;
- `published`: the distillation law of Busbridge et al. 2025 (docs/method.md §5), teachers at 20 tokens a parameter;
- `steep`: the loss rises exponentially above the best teacher, about linearly below it;

the last two with study one's noise. A policy starts from nothing and reveals cells: `greedy` the six that `next_cells`
names, `random` six at random, `factorial` six of the grid in order, a whole factorial for each seed. After every six the
joint model is fitted. A policy stops where the set of the goal is at most `STOPS` times as wide as the full grid's.
An open set is infinitely wide; studies whose full grid leaves it open are left out, and counted (`open`). `share` is the
part of the full grid's FLOPs that was spent, each teacher and cached signal counted once; `paid`: teachers are trained
for it; `there`: they are there already. `covers`: whether the set at the stop holds the true value.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.fit.joint import SAME, Cells, Joint, cells_of, fit_cells
from capacity_gap.fit.joint_curve import JointCurve, Set
from capacity_gap.fit.joint_forecast import coded_anew
from capacity_gap.fit.next_cells import next_cells
from capacity_gap.fit.next_model import CURVATURE, STUDY, Goal
from capacity_gap.records.bills import Arithmetic, Bills, Cost
from capacity_gap.settings.places import RESULTS
from capacity_gap.settings.scales import short_scale
from capacity_gap.store.files import read_json
from capacity_gap.surfaces.surface import published

FIRST_SEED = 20_000
STUDIES = 100
STEP = 6  # cells between two fits
SEEDS = 3
BUDGETS = np.array([0.5, 1.0, 2.0, 4.0])
STOPS = {"law": 1.5, "target": 1.25, "break_even": 1.5}
MODES = ("paid", "there")
STEEP = 0.6  # a cubic term of a fifth of the quadratic: METHOD's worst for a parabola
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


class Answer(NamedTuple):
    """What a fit says of a goal by one measure."""

    width: float
    covers: bool


Asked = tuple[str, str]  # goal and measure
MEASURES = ("set", "slope")


@dataclass(frozen=True, eq=False)
class Study:
    """A full grid with its losses, what is asked of it, and the true answers (logs), where they are known."""

    table: pd.DataFrame
    cells: Cells
    goals: dict[str, Goal]
    true: dict[str, float]
    full: dict[Asked, Answer]

    @classmethod
    def of(cls, table: pd.DataFrame, goals: dict[str, Goal], true: dict[str, float]) -> "Study":
        """Fits the full grid."""
        bare = cls(table, cells_of(table), goals, true, {})
        return replace(bare, full=bare.answers(range(len(table))))

    @property
    def means(self) -> tuple[float, float]:
        """Of log N_S and log D: where the law's ratio is asked for."""
        return float(self.cells.student.mean()), float(self.cells.data.mean())

    def answers(self, chosen: Sequence[int]) -> dict[Asked, Answer]:
        """Of each goal by some of the cells; nothing where the model cannot be fitted."""
        keep = np.zeros(len(self.table), bool)
        keep[list(chosen)] = True
        try:
            joint = fit_cells(coded_anew(self.cells, keep))
        except ValueError:
            return {}
        found = {}
        for name, goal in self.goals.items():
            found |= {(name, measure): got for measure, got in self._answer(joint, goal, self.true.get(name, math.nan))}
        return found

    def _answer(self, joint: Joint, goal: Goal, true: float) -> Iterator[tuple[str, Answer]]:
        n = math.log(goal.student_params) if goal.student_params else self.means[0]
        d = math.log(goal.data_tokens) if goal.data_tokens else self.means[1]
        n, d = n - joint.means[0], d - joint.means[1]
        if goal.kind != "break_even" and joint.powers:
            yield "set", _of(joint.curve.optimum(n, d), true)
            if math.isfinite(true):
                row = joint.curve.row(true - joint.curve.centre(n, d), n, d, derivative=True)
                slope = joint.curve.contrast(row)
                quantile = float(stats.t.ppf(0.975, slope.df))
                yield "slope", Answer(2 * quantile * slope.error, abs(slope.t) <= quantile)
        elif goal.kind == "break_even" and "d" in joint.terms:
            assert goal.small and goal.large
            yield "set", _of(joint.curve.break_even(math.log(goal.small), math.log(goal.large), n), true)

    def reached(self, asked: Asked, found: dict[Asked, Answer]) -> bool:
        """Whether an answer is as narrow as the full grid's, times `STOPS`."""
        return asked in found and found[asked].width <= STOPS[asked[0]] * self.full[asked].width

    def closed(self) -> list[Asked]:
        """What the full grid answers."""
        return [asked for asked, found in self.full.items() if math.isfinite(found.width)]


def _of(found: Set, true: float) -> Answer:
    return Answer(found.high - found.low if found.bounded else math.inf, found.low <= true <= found.high)


def stopped(study: Study, order: Iterator[list[int]], asked: Sequence[Asked]) -> dict[Asked, tuple[list[int], Answer]]:
    """Where each answer is reached: the cells by then, and the answer."""
    chosen: list[int] = []
    found: dict[Asked, tuple[list[int], Answer]] = {}
    for more in order:
        chosen = [*chosen, *more]
        answers = study.answers(chosen)
        found |= {a: (chosen, answers[a]) for a in asked if a not in found and study.reached(a, answers)}
        if len(found) == len(asked):
            break
    return found


def listed(order: Sequence[int]) -> Iterator[list[int]]:
    """Six at a time."""
    for at in range(0, len(order), STEP):
        yield [int(i) for i in order[at : at + STEP]]


def greedy(study: Study, goal: Goal, cost: Cost, start: Sequence[int] = ()) -> Iterator[list[int]]:
    """Those that `next_cells` names, given the losses of those before."""
    table = study.table.assign(index=np.arange(len(study.table)))
    chosen = list(start)
    while len(chosen) < len(table):
        there = table["index"].isin(chosen)
        told = next_cells(table[there], table[~there].drop(columns="loss"), goal=goal, k=STEP, cost=cost)
        new = [int(c.cell["index"]) for c in told]
        chosen += new
        yield new


def flops(bills: Bills, chosen: Sequence[int]) -> float:
    return bills.total(chosen, np.zeros(len(bills.parts), bool))


COSTS: dict[str, Cost] = {"paid": Arithmetic(), "there": Arithmetic(teacher_tokens=None)}


def study_of(name: str, seed: int) -> tuple[Study, np.random.Generator]:
    """A simulated study."""
    surface = SURFACES[name]()
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    table, target = surface.table(rng), surface.target
    assert target.student_params and target.data_tokens
    means = (float(np.log(table[c]).mean()) for c in ("student_params", "data_tokens"))
    true = {
        "law": surface.best(*means),
        "target": surface.best(*map(math.log, (target.student_params, target.data_tokens))),
    }
    return Study.of(table, {"law": Goal(), "target": target}, true), rng


def one(name: str, seed: int) -> list[dict[str, Any]]:
    """Every policy on one study: a row for each goal, measure and way of paying."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study, rng = study_of(name, seed)
        return [{"surface": name, "seed": seed, **row} for row in _rows(study, rng)]


def _rows(study: Study, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    table, asked = study.table, study.closed()
    for (goal, measure), full in study.full.items():
        kind = "full" if math.isfinite(full.width) else "open"
        yield {"policy": kind, "goal": goal, "measure": measure, "covers": full.covers}
    order = table.sort_values(["seed", "data_tokens", "student_params", "teacher_params"]).index.to_numpy()
    for policy, mine in {"random": rng.permutation(len(table)), "factorial": order}.items():
        found = stopped(study, listed(mine), asked)
        for mode in MODES:
            yield from _stops(study, found, mode, policy)
    for mode, goal in itertools.product(MODES, study.goals):
        mine = [a for a in asked if a[0] == goal]
        found = stopped(study, greedy(study, study.goals[goal], COSTS[mode]), mine)
        yield from _stops(study, found, mode, "greedy")


def _stops(
    study: Study, found: dict[Asked, tuple[list[int], Answer]], mode: str, policy: str
) -> Iterator[dict[str, Any]]:
    bills = Bills.of(study.table, COSTS[mode])
    whole = flops(bills, range(len(study.table)))
    for (goal, measure), (chosen, got) in found.items():
        row = {"policy": policy, "mode": mode, "goal": goal, "measure": measure}
        yield {**row, "share": flops(bills, chosen) / whole, "cells": len(chosen), "covers": got.covers}
