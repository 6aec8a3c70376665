"""Claim: `next_cells` reaches an answer with a small part of a full grid's FLOPs.

    python -m benchmarks.next_cells --tune          calibrates: studies of seeds below 2,000
    python -m benchmarks.next_cells                 judges; an hour on two cores, and it goes on where it was stopped
    python -m benchmarks.next_cells --records       the same on study one's own losses

Designs are fixed here, before any result. Seeds below 2,000 chose what `fit/next_model.py` and `fit/next_search.py`
hold, and calibrate intervals; seeds from 20,000 judge. Each study is a full grid of 4 students, 8 teachers, 4 budgets
and 3 seeds, each seed with teachers of its own, whose losses come from one of three surfaces:

- `joint`: study one as the joint model reads it in `results/pico/joint.json`, with its noise;
- `published`: the distillation law of Busbridge et al. 2025 (docs/method.md §5), teachers at 20 tokens a parameter;
- `steep`: the loss rises faster above the best teacher than below it, with a cubic term a fifth of the quadratic;

the last two with study one's noise. A policy starts from nothing and reveals cells, six at a time, and from 60 on a
tenth: `greedy` those that `next_cells` names, `random` any, `factorial` a whole factorial for each seed, the smallest
budget first. The joint model is fitted after each step. A policy stops where the goal's interval is at most `STOPS`
times as wide as the full grid's by two fits in a row: one fit of few cells may take its variances for far too small.
There are three measures:

- `set`: Fieller's set for the best teacher. An open one is infinitely wide; studies whose full grid leaves it open are
  left out, and counted. Its width depends on the estimated curvature, and so on chance: any policy that looks often
  stops early at times.
- `slope`: the interval of the curve's slope at the true optimum. That is the contrast that the set is made from, and
  what a design can narrow. All studies have it.
- `known`: the same slope's standard error with the true variances. It says what the chosen cells are worth, whatever a
  fit of few cells takes its variances for, so one step suffices. `oracle` chooses as `greedy` does, told the true
  variances, optimum and curvature: what no data can teach it is left.

`share` is the part of the full grid's FLOPs, each teacher and each cached signal counted once. `paid`: teachers are
trained for it; `there`: they are there already. `covers`, of measures with an interval: how often the one at the stop
holds the true value; `calibrated`: the same with intervals widened by `factor`, which covers 95 % on the seeds that
calibrate. `benchmarks/next_stops.py` judges the intervals that users get.
"""

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.next_surfaces import PICO_TEACHERS, SURFACES, Surface
from benchmarks.study import load
from benchmarks.study_arms import arms_of, main_of
from capacity_gap.fit.joint import SAME, Cells, Joint, cells_of, fit_cells
from capacity_gap.fit.joint_curve import Set
from capacity_gap.fit.joint_forecast import coded_anew
from capacity_gap.fit.next_cells import next_cells
from capacity_gap.fit.next_model import Goal, Model
from capacity_gap.records.bills import Arithmetic, Bills, Cost

FIRST_SEED, TUNE_SEED = 20_000, 1_000
STUDIES = 100
STEP, MANY = 6, 60  # cells between two fits; from so many cells on, a tenth of them
STOPS = {"law": 1.5, "target": 1.25, "break_even": 1.5}
MODES = ("paid", "there")


class Answer(NamedTuple):
    """A fit's interval for a goal by one measure."""

    width: float
    off: float  # how far the true value lies from the estimate, in half widths on that side: covered up to one


Asked = tuple[str, str]  # goal and measure


@dataclass(frozen=True, eq=False)
class Study:
    """A full grid with its losses, what is asked of it, and the true answers (logs), where they are known."""

    table: pd.DataFrame
    cells: Cells
    goals: dict[str, Goal]
    true: dict[str, float]
    full: dict[Asked, Answer]
    surface: Surface | None = None

    @classmethod
    def of(cls, table: pd.DataFrame, goals: dict[str, Goal], surface: Surface | None = None) -> "Study":
        """Fits the full grid. The true answers are those of a surface."""
        bare = cls(table, cells_of(table), goals, {}, {}, surface)
        if surface:
            bare = replace(bare, true={name: surface.best(*bare.at(goal)) for name, goal in goals.items()})
        return replace(bare, full=bare.answers(range(len(table))))

    @property
    def means(self) -> tuple[float, float]:
        """Of log N_S and log D: where the law's ratio is asked for."""
        return float(self.cells.student.mean()), float(self.cells.data.mean())

    def answers(self, chosen: Sequence[int]) -> dict[Asked, Answer]:
        """Of each goal by some of the cells; nothing where the model cannot be fitted."""
        found = self._known(chosen)
        keep = np.zeros(len(self.table), bool)
        keep[list(chosen)] = True
        try:
            joint = fit_cells(coded_anew(self.cells, keep))
        except ValueError:
            return found
        for name, goal in self.goals.items():
            found |= {(name, measure): got for measure, got in self._answer(joint, goal, self.true.get(name, math.nan))}
        return found

    def at(self, goal: Goal) -> tuple[float, float]:
        """Logs of the student and the tokens that a goal is about."""
        n = math.log(goal.student_params) if goal.student_params else self.means[0]
        return n, math.log(goal.data_tokens) if goal.data_tokens else self.means[1]

    def _known(self, chosen: Sequence[int]) -> dict[Asked, Answer]:
        if self.surface is None:
            return {}
        errors = {
            name: self.surface.slope_error(self.cells, chosen, (self.true[name], *self.at(goal)))
            for name, goal in self.goals.items()
        }
        return {(name, "known"): Answer(error, math.nan) for name, error in errors.items()}

    def _answer(self, joint: Joint, goal: Goal, true: float) -> Iterator[tuple[str, Answer]]:
        n, d = (x - mean for x, mean in zip(self.at(goal), joint.means, strict=True))
        if goal.kind != "break_even" and joint.powers:
            yield "set", _of(joint.curve.optimum(n, d), true)
            if math.isfinite(true):
                row = joint.curve.row(true - joint.curve.centre(n, d), n, d, derivative=True)
                slope = joint.curve.contrast(row)
                quantile = float(stats.t.ppf(0.975, slope.df))
                yield "slope", Answer(2 * quantile * slope.error, abs(slope.t) / quantile)
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
    half = found.high - found.value if true > found.value else found.value - found.low
    return Answer(found.high - found.low if found.bounded else math.inf, abs(true - found.value) / half)


def stopped(study: Study, order: Iterator[list[int]], asked: Sequence[Asked]) -> dict[Asked, tuple[list[int], Answer]]:
    """Where each answer is reached by two fits in a row: the cells by then, and the second answer.

    One step is enough for what no fit says.
    """
    chosen: list[int] = []
    before: set[Asked] = set()
    found: dict[Asked, tuple[list[int], Answer]] = {}
    for more in order:
        chosen = [*chosen, *more]
        answers = study.answers(chosen)
        now = {a for a in asked if study.reached(a, answers)}
        sure = {a for a in now if a in before or a[1] == "known"}
        found |= {a: (chosen, answers[a]) for a in sure if a not in found}
        before = now
        if len(found) == len(asked):
            break
    return found


def step(cells: int) -> int:
    """Cells between two fits."""
    return STEP if cells < MANY else cells // 10


def listed(order: Sequence[int]) -> Iterator[list[int]]:
    """A fixed order, in steps."""
    at = 0
    while at < len(order):
        yield [int(i) for i in order[at : at + step(at)]]
        at += step(at)


def greedy(study: Study, goal: Goal, cost: Cost, start: Sequence[int] = ()) -> Iterator[list[int]]:
    """Those that `next_cells` names, given the losses of those before."""
    table = study.table.assign(index=np.arange(len(study.table)))
    chosen = list(start)
    while len(chosen) < len(table):
        there = table["index"].isin(chosen)
        k, pool = step(len(chosen)), table[~there].drop(columns="loss")
        new = [int(c.cell["index"]) for c in next_cells(table[there], pool, goal=goal, k=k, cost=cost)]
        chosen += new
        yield new


@contextmanager
def told(study: Study) -> Iterator[None]:
    """`next_cells` is told the true variances, optimum and curvature, instead of what it fits or assumes."""
    assert study.surface
    surface, (centre, curvature) = study.surface, study.surface.optimum(*study.means)

    def of(cls: type[Model], cells: Cells, known: int) -> Model:
        level = float(cells.y[:known].mean()) if known else 0.0
        return cls(cells, known, centre, study.means, surface.noise, curvature, level, True)

    with patch.object(Model, "of", classmethod(of)):
        yield


def flops(bills: Bills, chosen: Sequence[int]) -> float:
    return bills.total(chosen, np.zeros(len(bills.parts), bool))


COSTS: dict[str, Cost] = {"paid": Arithmetic(), "there": Arithmetic(teacher_tokens=None)}


def study_of(name: str, seed: int) -> tuple[Study, np.random.Generator]:
    """A simulated study."""
    surface = SURFACES[name]()
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    return Study.of(surface.table(rng), {"law": Goal(), "target": surface.target}, surface), rng


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
        yield {"policy": kind, "goal": goal, "measure": measure, "off": full.off}
    order = table.sort_values(["seed", "data_tokens", "student_params", "teacher_params"]).index.to_numpy()
    for policy, mine in {"random": rng.permutation(len(table)), "factorial": order}.items():
        found = stopped(study, listed(mine), asked)
        for mode in MODES:
            yield from _stops(study, found, mode, policy)
    for mode, goal in itertools.product(MODES, study.goals):
        mine = [a for a in asked if a[0] == goal]
        found = stopped(study, greedy(study, study.goals[goal], COSTS[mode]), mine)
        yield from _stops(study, found, mode, "greedy")
        with told(study):
            found = stopped(study, greedy(study, study.goals[goal], COSTS[mode]), [(goal, "known")])
        yield from _stops(study, found, mode, "oracle")


def _stops(
    study: Study, found: dict[Asked, tuple[list[int], Answer]], mode: str, policy: str
) -> Iterator[dict[str, Any]]:
    bills = Bills.of(study.table, COSTS[mode])
    whole = flops(bills, range(len(study.table)))
    for (goal, measure), (chosen, got) in found.items():
        row = {"policy": policy, "mode": mode, "goal": goal, "measure": measure}
        yield {**row, "share": flops(bills, chosen) / whole, "cells": len(chosen), "off": got.off}


FIRST = 12  # cells at random from which study one is replayed
STARTS = 10


def replayed(name: str, start: int) -> list[dict[str, Any]]:
    """Study one's main arm as the pool; each of its cells has one loss. `name` is that of its rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = study_one()
        rng = np.random.default_rng(start)
        order = [int(i) for i in rng.permutation(len(study.table))]
        rows = []
        for mode, asked in itertools.product(MODES, study.closed()):
            mine = greedy(study, study.goals[asked[0]], COSTS[mode], order[:FIRST])
            orders = {"random": listed(order), "greedy": itertools.chain([order[:FIRST]], mine)}
            for policy, cells in orders.items():
                rows += list(_stops(study, stopped(study, cells, [asked]), mode, policy))
        return [{"surface": name, "seed": start, **row} for row in rows]


@cache
def study_one() -> Study:
    """The main arm's cells, with the law and the break-even budget of its mean student as goals."""
    arm = main_of(arms_of(load())).frame
    arm = arm[np.log(arm["teacher_params"] / arm["student_params"]) > SAME].drop_duplicates("cell")
    names = ["student", "student_params", "teacher", "teacher_params", "teacher_tokens", "data_tokens", "seed"]
    table = arm[[*names, "teacher_seed"]].assign(loss=arm["student_loss"]).reset_index(drop=True)
    middle = float(np.exp(np.log(table["student_params"]).mean()))
    even = Goal("break_even", middle, small=PICO_TEACHERS[2], large=PICO_TEACHERS[-1])
    return Study.of(table, {"law": Goal(), "break_even": even})


def summary(found: pd.DataFrame, factors: dict[tuple[str, str], float]) -> pd.DataFrame:
    """Medians and quartiles of shares, and coverage; `factors` by goal and measure."""
    rows = []
    by = ["surface", "goal", "measure", "mode", "policy"]
    for key, part in found[found["share"].notna()].groupby(by):
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        alike = (found["surface"] == row["surface"]) & (found["goal"] == row["goal"])
        alike &= found["measure"] == row["measure"]
        row |= {"studies": len(part), "open": int((found["policy"][alike] == "open").sum())}
        row |= dict(zip(("q1", "share", "q3"), part["share"].quantile([0.25, 0.5, 0.75]), strict=True))
        row |= {"cells": part["cells"].median()}
        if row["surface"] != "records" and row["measure"] != "known":
            factor = factors.get((row["goal"], row["measure"]), math.nan)
            full = found["off"][alike & (found["policy"] == "full")]
            row |= {"covers": (part["off"] <= 1).mean(), "full_covers": (full <= 1).mean()}
            row |= {"factor": factor, "calibrated": (part["off"] <= factor).mean()}
        rows.append(row)
    table = pd.DataFrame(rows)
    random = table[table["policy"] == "random"].set_index(by[:-1])["share"]
    return table.assign(of_random=[row["share"] / random[tuple(row[c] for c in by[:-1])] for row in rows])


def factors_of(found: pd.DataFrame) -> dict[tuple[str, str], float]:
    """What widens the greedy policy's intervals so that 95 % cover over all surfaces, by goal and measure."""
    mine = found[found["policy"].eq("greedy") & found["off"].notna()].groupby(["goal", "measure"])["off"].quantile(0.95)
    return {(str(goal), str(measure)): max(1.0, float(value)) for (goal, measure), value in mine.items()}  # type: ignore[misc]


COLUMNS = ["surface", "seed", "policy", "mode", "goal", "measure", "share", "cells", "off"]


def run(
    jobs: Sequence[tuple[str, int]],
    part: Path,
    workers: int,
    each: Callable[[str, int], list[dict[str, Any]]],
    columns: Sequence[str] = COLUMNS,
) -> pd.DataFrame:
    """Rows of all jobs, each a surface and a seed; those that the part file has are not run again."""
    part.parent.mkdir(parents=True, exist_ok=True)
    known = pd.read_csv(part) if part.exists() else pd.DataFrame(columns=list(columns))
    done = set(zip(known["surface"], known["seed"], strict=True))
    todo = [job for job in jobs if job not in done]
    with ProcessPoolExecutor(workers) as pool:
        for n, rows in enumerate(pool.map(each, *zip(*todo, strict=True)) if todo else (), 1):
            pd.DataFrame(rows, columns=list(columns)).to_csv(part, mode="a", header=not part.exists(), index=False)
            print(f"{n} of {len(todo)}", flush=True)
    found = pd.read_csv(part) if part.exists() else known
    return found[[pair in set(jobs) for pair in zip(found["surface"], found["seed"], strict=True)]]


def options(description: str | None, studies: int) -> argparse.ArgumentParser:
    """The command line of simulated studies that either calibrate or judge."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="run the studies that calibrate")
    parser.add_argument("--studies", type=int, default=studies, help="of each surface (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/next"), help="finished studies (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the table")
    return parser


def jobs_of(given: argparse.Namespace, first: int = FIRST_SEED) -> list[tuple[str, int]]:
    """Surfaces and seeds; `first` of those that judge."""
    first = TUNE_SEED if given.tune else first
    return [(name, first + i) for i in range(given.studies) for name in SURFACES]


def main(words: Sequence[str] | None = None) -> int:
    parser = options(__doc__, STUDIES)
    parser.add_argument("--records", action="store_true", help="replay study one")
    given = parser.parse_args(words)
    jobs = [("records", start) for start in range(STARTS)] if given.records else jobs_of(given)
    kind = "tune" if given.tune else "records" if given.records else "judge"
    each = replayed if given.records else one
    found, tuned = run(jobs, given.work / f"{kind}.csv", given.workers, each), given.work / "tune.csv"
    table = summary(found, factors_of(pd.read_csv(tuned)) if tuned.exists() else {})
    print(table.to_string(index=False, float_format="{:.3g}".format))
    if given.out:
        kept = pd.read_csv(given.out) if given.out.exists() else table.iloc[:0]
        kept = kept[kept["surface"].eq("records") != given.records]
        pd.concat([kept, table]).to_csv(given.out, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
