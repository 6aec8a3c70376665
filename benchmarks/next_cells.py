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

import argparse
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.study_arms import arms_of, main_of
from capacity_gap import records
from capacity_gap.fit.joint import SAME, Cells, cells_of, fit_cells
from capacity_gap.fit.joint_curve import JointCurve, Set
from capacity_gap.fit.joint_forecast import coded_anew
from capacity_gap.fit.next_cells import next_cells
from capacity_gap.fit.next_costs import Arithmetic, Bills, Cost
from capacity_gap.fit.next_model import CURVATURE, STUDY, Goal
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
        y += sd["teacher x student"] * draw((R, SEEDS, S))[k, s, i] + sd["teacher x budget"] * draw((R, SEEDS, B))[k, s, j]
        y += sd["seed x budget"] * draw((S, SEEDS, B))[i, s, j] + sd["error"] * draw(len(i))
        y += sd["slope"] * draw((S, B))[i, j] * (x - np.log(self.teachers).mean())
        names = {"student": [short_scale(v) for v in self.students[i]], "teacher": [short_scale(v) for v in self.teachers[k]]}
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
        return 3 - 0.3 * (n - 11) - 0.1 * (d - 13) + CURVATURE * (np.exp(z) - z - 1)

    tokens = np.full(len(PICO_TEACHERS), 1e6)
    return Surface("steep", PICO_STUDENTS, PICO_TEACHERS, PICO_BUDGETS, tokens, loss, dict(STUDY))


SURFACES: dict[str, Callable[[], Surface]] = {"joint": cache(_joint), "published": cache(_published), "steep": cache(_steep)}


@dataclass(frozen=True, eq=False)
class Study:
    """A full grid with its losses, and what is asked of it."""

    table: pd.DataFrame
    cells: Cells
    goals: dict[str, Goal]
    full: dict[str, Set]

    @classmethod
    def of(cls, table: pd.DataFrame, goals: dict[str, Goal]) -> "Study":
        """Fits the full grid."""
        cells = cells_of(table)
        every = cls(table, cells, goals, {})
        return cls(table, cells, goals, every.answers(range(len(table))))

    @property
    def means(self) -> tuple[float, float]:
        """Of log N_S and log D: where the law's ratio is asked for."""
        return float(self.cells.student.mean()), float(self.cells.data.mean())

    def answers(self, chosen: Sequence[int]) -> dict[str, Set]:
        """The set of each goal by some of the cells; open where the model cannot be fitted."""
        keep = np.zeros(len(self.table), bool)
        keep[list(chosen)] = True
        try:
            joint = fit_cells(coded_anew(self.cells, keep))
        except ValueError:
            return dict.fromkeys(self.goals, OPEN)
        return {name: self._answer(joint, goal) for name, goal in self.goals.items()}

    def _answer(self, joint: Any, goal: Goal) -> Set:
        n = math.log(goal.student_params) if goal.student_params else self.means[0]
        d = math.log(goal.data_tokens) if goal.data_tokens else self.means[1]
        n, d = n - joint.means[0], d - joint.means[1]
        if goal.kind != "break_even":
            return joint.curve.optimum(n, d) if joint.powers else OPEN
        if "d" not in joint.terms:
            return OPEN
        assert goal.small and goal.large
        found = joint.curve.break_even(math.log(goal.small), math.log(goal.large), n)
        back = joint.means[1]
        return Set(found.value + back, found.low + back, found.high + back, found.bounded)

    def reached(self, name: str, found: Set) -> bool:
        """Whether a set is narrow enough."""
        full = self.full[name]
        return found.bounded and found.high - found.low <= STOPS[name] * (full.high - full.low)


OPEN = Set(math.nan, -math.inf, math.inf, False)


def stopped(study: Study, order: Iterator[list[int]], names: Sequence[str]) -> dict[str, tuple[list[int], Set]]:
    """Where each goal is reached: the cells by then, and its set."""
    chosen: list[int] = []
    found: dict[str, tuple[list[int], Set]] = {}
    for more in order:
        chosen = [*chosen, *more]
        answers = study.answers(chosen)
        found |= {n: (chosen, answers[n]) for n in names if n not in found and study.reached(n, answers[n])}
        if len(found) == len(names):
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


def one(name: str, seed: int) -> list[dict[str, Any]]:
    """Every policy on one study."""
    surface = SURFACES[name]()
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    table = surface.table(rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = Study.of(table, {"law": Goal(), "target": surface.target})
        means = study.means
        target = surface.target
        true = {
            "law": surface.best(*means),
            "target": surface.best(math.log(target.student_params or 1), math.log(target.data_tokens or 1)),
        }
        return list(_rows(study, true, {"surface": name, "seed": seed}, rng))


def _shift(study: Study, joint_means: tuple[float, float]) -> float:
    return joint_means[0] - study.means[0]


def _rows(study: Study, true: dict[str, float], said: dict[str, Any], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    table, names = study.table, [n for n in study.goals if study.full[n].bounded]
    for name in set(study.goals) - set(names):
        yield {**said, "goal": name, "policy": "open"}
    bills = {mode: Bills.of(table, COSTS[mode]) for mode in MODES}
    everything = range(len(table))
    order = table.sort_values(["seed", "data_tokens", "student_params", "teacher_params"]).index.to_numpy()
    fixed = {"random": rng.permutation(len(table)), "factorial": order}
    for policy, mine in fixed.items():
        found = stopped(study, listed(mine), names)
        for mode in MODES:
            yield from _stops(study, found, true, {**said, "policy": policy, "mode": mode}, bills[mode])
    for mode in MODES:
        for name in names:
            found = stopped(study, greedy(study, study.goals[name], COSTS[mode]), [name])
            yield from _stops(study, found, true, {**said, "policy": "greedy", "mode": mode}, bills[mode])
    for name in names:
        full = study.full[name]
        yield {**said, "goal": name, "policy": "full", "covers": full.low <= true[name] <= full.high}
    assert everything


def _stops(
    study: Study, found: dict[str, tuple[list[int], Set]], true: dict[str, float], said: dict[str, Any], bills: Bills
) -> Iterator[dict[str, Any]]:
    whole = flops(bills, range(len(study.table)))
    for name, (chosen, got) in found.items():
        row = {"goal": name, "share": flops(bills, chosen) / whole, "cells": len(chosen)}
        yield {**said, **row, "covers": got.low <= true[name] <= got.high}
