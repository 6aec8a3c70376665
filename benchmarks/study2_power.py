"""What study two can find: its registered analysis on simulated cells, made before any cell was run.

    python -m benchmarks.study2_power [--grids 200] [--out results/study2_power.csv]     25 minutes of one core

Each grid has the cells of a sweep of study two, and losses of study one's form: a parabola in log teacher size about an
optimum that is 1.8 times the student at 300k tokens and grows as tokens^1.3, with study one's noise (`STUDY`). Its
curvature is study one's, half of it, or none: then a slope that moves as study one's does, without an optimum.
"""

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.joint_coverage import CURVATURE, STUDY
from benchmarks.study2_answers import LARGE, SMALL, growth, one_loss, optimum, recipe, seen, stands
from capacity_gap.models.ladders import family

FIRST_SEED = 70_000
ALL = [
    "55k",
    "80k",
    "120k",
    "180k",
    "220k",
    "270k",
    "330k",
    "400k",
    "460k",
    "530k",
    "600k",
    "700k",
    "800k",
    "900k",
    "1m",
]
EIGHT = ["120k", "180k", "270k", "330k", "460k", "600k", "800k", "1m"]
BEST, D, AT = 1.8, 1.3, 300_000  # the true optimum over the student, its growth with tokens, and the budget of BEST
STUDENTS = {"40k": 40_000, "55k": 55_000, "80k": 80_000, "110k": 110_000}


def cells(
    students: Sequence[str],
    rungs: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
    *,
    ladder: str = "pico",
    sizes: Mapping[str, int] = STUDENTS,
) -> pd.DataFrame:
    """The cells of one grid, without losses; `sizes` are the students' parameters."""
    params = family(ladder).params
    rows = [
        (s, sizes[s], t, params[t], b, seed, seed)
        for s, t, b, seed in itertools.product(students, rungs, budgets, seeds)
        if params[t] > sizes[s] * 1.02
    ]
    names = ["student", "student_params", "teacher", "teacher_params", "data_tokens", "seed", "teacher_seed"]
    return pd.DataFrame(rows, columns=names)


def expected(
    frame: pd.DataFrame, curvature: float, *, d: float = D, bend: bool = True, at: float = AT, ratio: float = 3.5
) -> np.ndarray:
    """The loss without noise. Without `bend` only the slope is left, which moves with tokens as the parabola's.

    `at`: the budget of the optimum `BEST`. `ratio`: the middle of the ladder over the mean student.
    """
    x, n = np.log(frame["teacher_params"].to_numpy(float)), np.log(frame["student_params"].to_numpy(float))
    budget = np.log(frame["data_tokens"].to_numpy(float) / at)
    z = x - n - math.log(BEST) - d * budget
    level = 4 - 0.3 * (n - n.mean()) - 0.1 * budget
    middle = math.log(ratio)
    return level + (
        curvature * z**2 if bend else 2 * curvature * (math.log(ratio / BEST) - d * budget) * (x - n - middle)
    )


def scatter(frame: pd.DataFrame, rng: np.random.Generator, *, run_only: bool = False, rung: bool = True) -> np.ndarray:
    """Study one's noise; `run_only`: what cells of equal teachers, students and budgets differ by."""
    found = STUDY.run * rng.standard_normal(len(frame))
    if run_only:
        return found
    parts = {
        ("teacher", "teacher_seed"): STUDY.teacher,
        ("teacher",): STUDY.rung if rung else 0.0,
        ("teacher", "teacher_seed", "student"): STUDY.with_student,
        ("teacher", "teacher_seed", "data_tokens"): STUDY.at_budget,
    }
    for keys, sd in parts.items():
        codes = frame.groupby(list(keys)).ngroup().to_numpy()
        found = found + sd * rng.standard_normal(codes.max() + 1)[codes]
    return found


# A question each: what the analysis says of one simulated grid


def of_optimum(rng: np.random.Generator, factor: float) -> dict[str, float]:
    """Question 1."""
    frame = cells(list(STUDENTS), ALL, (300_000, 600_000), (10, 11))
    true = expected(frame, CURVATURE * (factor or 1), bend=factor > 0)
    fit = optimum(frame.assign(loss=true + scatter(frame, rng)))
    row = {name: float(fit.status == name) for name in ("law", "provisional", "break_even", "no_optimum")}
    if factor:
        for tokens in (300_000, 600_000):
            found, ratio = fit.ratio_at(tokens), BEST * (tokens / AT) ** D
            row[f"covers {tokens:,}"] = float(found.interval[0] <= ratio <= found.interval[1])
            row[f"open {tokens:,}"] = float(not 0 < found.interval[0] < found.interval[1] < math.inf)
    return row


def of_starts(rng: np.random.Generator, factor: float) -> dict[str, float]:
    """Question 2, of one start: its growth per doubling; `factor` times that of study one."""
    frame = cells(("55k", "110k"), EIGHT, (300_000, 600_000, 1_200_000), (10, 11))
    frame["loss"] = expected(frame, CURVATURE, d=D * factor) + scatter(frame, rng)
    found, true = growth(frame), -2 * CURVATURE * D * factor * math.log(2)
    covers = found.interval[0] <= true <= found.interval[1]
    return {"falls": found.sign == "falls", "rises": found.sign == "rises", "covers": covers}


def of_seen(rng: np.random.Generator, factor: float) -> dict[str, float]:
    """Question 4: a change of slope of `factor` times 0.02 between the texts, at each of two budgets."""
    frame = cells(("55k", "110k"), EIGHT, (300_000, 600_000), (10, 11)).assign(init="pruned", kd_weight=0.5)
    shared = scatter(frame, rng)
    tilt = 0.02 * factor * np.log(frame["teacher_params"])
    one, two = (frame.assign(loss=shared + t + scatter(frame, rng, run_only=True)) for t in (tilt, 0 * tilt))
    found = seen(one, two)["mean of the budgets"]
    return {"changes": found.sign != "open", "small": found.small}


def of_recipe(rng: np.random.Generator, factor: float) -> dict[str, float]:
    """Question 5: nine settings a cell, equally good but for noise; the contrast is `factor` times study one's."""
    frame = cells(("55k", "110k"), ("120k", "330k", "900k"), (300_000, 1_200_000), (10, 11, 12))
    misfit = dict(zip(("120k", "330k", "900k"), STUDY.rung * rng.standard_normal(3), strict=True))
    rung = frame["teacher"].map(misfit).to_numpy()  # of these two rungs, so part of the truth
    shared = scatter(frame, rng, rung=False) + rung
    z = np.log(frame["teacher_params"] / 330_000) / math.log(LARGE / SMALL)
    turn = np.where(frame["data_tokens"] == 300_000, 0.06, -0.06) * factor
    each = []
    for rate, weight in itertools.product((0.2, 0.4, 0.8), (0.25, 0.5, 1.0)):
        loss = 4 + shared + turn * z + scatter(frame, rng, run_only=True)
        validation = loss + 0.002 * rng.standard_normal(len(frame))
        part = frame.assign(loss=loss, student_loss_validation=validation, learning_rate=rate, kd_weight=weight)
        each.append(part)
    grid = pd.concat(each, ignore_index=True)
    usual = grid[(grid["learning_rate"] == 0.4) & (grid["kd_weight"] == 0.5)]
    before = frame.assign(loss=4 + turn * z + rung + scatter(frame, rng, rung=False))  # study one's, of other seeds
    found = recipe(grid, usual, before)
    said, held = stands(found), [e.interval for name, e in found.items() if name.startswith("tuned, ")]
    own = misfit["900k"] - misfit["120k"]
    true = (own + 0.06 * factor, own - 0.06 * factor)
    covers = [low <= value <= high for (low, high), value in zip(held, true, strict=True)]
    return {"stands": said == "stands", "falls": said == "falls", "covers": float(np.mean(covers))}


def of_one_loss(rng: np.random.Generator, factor: float) -> dict[str, float]:
    """Question 6: a second measure that adds an order of its own, `factor` times 0.03 nats a rung, to the loss's."""
    frame = cells(list(STUDENTS), ALL, (300_000, 600_000), (10, 11))
    frame["loss"] = expected(frame, CURVATURE) + scatter(frame, rng)
    own = pd.Series(0.03 * factor * rng.standard_normal(len(ALL)), index=ALL)
    noise = 0.008 * rng.standard_normal(len(frame))
    frame["other"] = frame["loss"] + frame["teacher"].map(own).to_numpy() + noise
    found = one_loss(frame, "other", better=-1, draws=300)
    return {"another order": found["excess_low"] > 0, "the same order": found["excess_high"] < 0.10}


QUESTIONS: dict[str, tuple[Callable[[np.random.Generator, float], dict[str, float]], tuple[float, ...]]] = {
    "1 optimum": (of_optimum, (1.0, 0.5, 0.0)),
    "2 starts": (of_starts, (1.0, 0.25, 0.0, -0.25)),
    "4 seen text": (of_seen, (1.0, 0.5, 0.0)),
    "5 recipe": (of_recipe, (1.0, 0.5, 0.0)),
    "6 one loss": (of_one_loss, (1.0, 0.5, 0.0)),
}


def one(given: tuple[str, float, int]) -> dict[str, float]:
    """What the analysis says of one grid."""
    question, factor, seed = given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rng = np.random.default_rng([seed, sum(map(ord, question)), round(100 * abs(factor))])
        return QUESTIONS[question][0](rng, factor)


def rows_of(question: str, factor: float, found: pd.DataFrame) -> list[dict[str, Any]]:
    """A row each share, with Clopper and Pearson's 95 % interval."""
    rows = []
    for name in found:
        mean, count = float(found[name].astype(float).mean()), len(found)
        hits = round(mean * count)
        low = stats.beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
        high = stats.beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1.0
        row = {"question": question, "effect": factor, "grids": count, "share of": name, "share": mean}
        rows.append(row | {"low": low, "high": high})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the table goes; rows that it has are not made again")
    given = parser.parse_args()
    known = pd.read_csv(given.out) if given.out and given.out.exists() else pd.DataFrame(columns=["grids"])
    rows: list[dict[str, Any]] = known[known["grids"] == given.grids].to_dict("records")
    with ProcessPoolExecutor(given.workers) as pool:
        for question, (_, factors) in QUESTIONS.items():
            for factor in factors:
                if any((row["question"], row["effect"]) == (question, factor) for row in rows):
                    continue
                asked = [(question, factor, FIRST_SEED + i) for i in range(given.grids)]
                rows += rows_of(question, factor, pd.DataFrame(pool.map(one, asked, chunksize=5)))
                print(pd.DataFrame(rows).query("question == @question and effect == @factor").to_string(), flush=True)
                if given.out:
                    pd.DataFrame(rows).to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
