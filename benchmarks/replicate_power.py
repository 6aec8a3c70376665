"""What the sweeps `replicate_*` can find: their registered analysis on simulated cells, made before any cell was run.

    python -m benchmarks.replicate_power [--grids 150] [--out results/replicate_power.csv]     ten minutes of one core

Each grid has exactly the cells of a sweep, read from its file, and losses of study one's form and noise
(`benchmarks/study2_power.py`): the optimum is 1.8 times the student at the least budget and grows as tokens^1.3.
`noise` multiplies study one's standard deviations; what they are at these sizes is not known. `origins`: the same cells
run by so many, pooled; each has teachers and noise of its own, but a rung's misfit is the same for all.
"""

import argparse
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from benchmarks.joint_coverage import CURVATURE
from benchmarks.replicate import Answers, answered, pooled
from benchmarks.study2_power import BEST, D, cells, expected, rows_of, scatter
from capacity_gap.models.ladders import family
from capacity_gap.settings.places import SWEEPS
from capacity_gap.settings.scales import parse_scale, short_scale

FIRST_SEED = 80_000


@dataclass(frozen=True)
class Case:
    """A truth. `bend`: there is an optimum; `d`: how it, or the slope alone, moves with tokens."""

    name: str
    curvature: float = 1.0  # times study one's
    bend: bool = True
    d: float = D
    noise: float = 1.0
    origins: int = 1


TRUTHS = (
    Case("as study one"),
    Case("half its curvature", curvature=0.5),
    Case("a slope that turns, no optimum", bend=False),
    Case("an optimum that stays", d=0.0),
    Case("one slope at all budgets", bend=False, d=0.0),
)
QUIET, TWO = Case("as study one, half the noise", noise=0.5), Case("as study one, two origins", origins=2)
CASES: dict[str, tuple[Case, ...]] = {
    "replicate_hour": (*TRUTHS, QUIET, TWO),
    "replicate_day": TRUTHS,
    "replicate_qwen3": (*TRUTHS, QUIET),
    "replicate_pythia": (*TRUTHS, QUIET),
}


def sweep(name: str) -> Mapping[str, Any]:
    """A sweep's file."""
    found = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def cells_of(name: str) -> pd.DataFrame:
    """The cells of a sweep, without losses."""
    file = sweep(name)
    params = {k: str(v).split(",") for k, v in file["hydra"]["sweeper"]["params"].items()}
    ladder = next(choice["override /family"] for choice in file["defaults"] if "override /family" in choice)
    sizes = {s: parse_scale(s, key="student") for s in params["student"]}
    budgets = [parse_scale(d, key="data") for d in params["data"]]
    seeds = [int(seed) for seed in params["seed"]]
    found = cells(params["student"], params["teacher"], budgets, seeds, ladder=ladder, sizes=sizes)
    if family(ladder).published:  # one teacher a rung, whatever the seed
        return found.assign(teacher_seed=0, teacher_tokens=np.nan)
    return found.assign(teacher_tokens=1.0)


def simulated(name: str, case: Case, rng: np.random.Generator) -> pd.DataFrame:
    """A grid with losses."""
    frame = cells_of(name)
    frame["cell"] = [f"cell {i}" for i in frame.index]
    ratio = math.exp(np.log(frame["teacher_params"].unique()).mean() - np.log(frame["student_params"].unique()).mean())
    at = float(frame["data_tokens"].min())
    true = expected(frame, CURVATURE * case.curvature, d=case.d, bend=case.bend, at=at, ratio=ratio)
    found = [frame.assign(origin=f"origin {i}") for i in range(case.origins)]
    both = pooled(pd.concat(found, ignore_index=True).assign(loss=np.arange(case.origins * len(frame))))
    noise = case.noise * scatter(both, rng)
    return both.assign(loss=np.tile(true, case.origins) + noise)


def said(found: Answers, case: Case) -> dict[str, float]:
    """The answers as shares of grids, and whether sets cover."""
    row = {f"1 {answer}": float(found.break_even == answer) for answer in ("yes", "open")}
    row["1 no"] = float(found.break_even.startswith("no"))
    row |= {f"2 {status}": float(found.fit.status == status) for status in ("law", "provisional")}
    row |= {f"3 {answer}": float(found.growth == answer) for answer in ("it grows", "it shrinks")}
    if case.bend:
        budgets = [float(tokens) for tokens in found.fit.budgets if tokens]
        for tokens in budgets:
            low, high = found.fit.ratio_at(tokens).interval
            row[f"ratio covered at {short_scale(tokens)}"] = float(
                low <= BEST * (tokens / budgets[0]) ** case.d <= high
            )
        low, high = found.fit.exponents()["d"].interval
        row["d covered"] = float(low <= case.d <= high)
    return row


def one(given: tuple[str, Case, int]) -> dict[str, float]:
    """What the analysis says of one grid."""
    name, case, seed = given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rng = np.random.default_rng([seed, sum(map(ord, name + case.name))])
        return said(answered(simulated(name, case, rng)), case)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=150)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the table goes; rows that it has are not made again")
    given = parser.parse_args(words)
    known = pd.read_csv(given.out) if given.out and given.out.exists() else pd.DataFrame(columns=["grids"])
    rows: list[dict[str, Any]] = known[known["grids"] == given.grids].to_dict("records")
    with ProcessPoolExecutor(given.workers) as pool:
        for name, cases in CASES.items():
            for case in cases:
                if any((row["sweep"], row["truth"]) == (name, case.name) for row in rows):
                    continue
                asked = [(name, case, FIRST_SEED + i) for i in range(given.grids)]
                found = rows_of(name, 0, pd.DataFrame(pool.map(one, asked, chunksize=5)))
                for row in found:
                    row = {"sweep": row.pop("question"), "truth": case.name, **row}
                    rows.append({k: v for k, v in row.items() if k != "effect"})
                print(name, case.name, {r["share of"]: r["share"] for r in found}, flush=True)
                if given.out:
                    pd.DataFrame(rows).to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
