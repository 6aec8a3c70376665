"""Claim: runs that `next_runs` chooses predict the dearest public runs better than as many FLOPs in random order.

    python -m benchmarks.outside_next FOLDER --out results/outside_next.csv             minutes; chooses the policy
    python -m benchmarks.outside_next FOLDER --out results/outside_next.csv --seven     once, after the choice

FOLDER holds `farseer_scaling_law-{train,test}.parquet` (arXiv 2604.22753, CC BY 4.0), of which no copy is kept here. A
run costs 6·N·D; a budget is a share of the cost of all runs of the pool. First the pool is the 364 cheaper of 404 runs
and the target the dearest tenth; then all 404 and the seven that others held out. Policies know where the targets lie,
not their losses. The form is `supervised`, which `select_surface` chose (results/outside_surfaces.csv).

A replay starts from `FIRST` runs drawn from the cheapest quarter, the same for every policy, and takes runs until no
run of the pool fits into what is left. Random order takes each run that still fits. R² and the
largest error are those of the targets under the surface fitted to the runs taken. A row is a replay's result in
`--work`, where an interrupted call goes on; the table has medians and quartiles over starts.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from capacity_gap.fit import fit_surface, next_runs
from capacity_gap.surfaces.design import MISFIT
from capacity_gap.surfaces.selection import foretold

NAME = "farseer_scaling_law"
COLUMNS = {"N": "student_params", "D": "data_tokens"}
FORM = "supervised"
SHARES = (0.02, 0.05, 0.1, 0.2)
SEVEN_SHARES = (0.05, 0.1)
STARTS = 20
FIRST = 8
TENTH = 40

Order = Callable[[pd.DataFrame, pd.DataFrame, pd.DataFrame, float, np.random.Generator], list[int]]


def designed(
    taken: pd.DataFrame, left: pd.DataFrame, target: pd.DataFrame, budget: float, _: np.random.Generator,
    *, exponent: float, misfit: float,
) -> list[int]:  # fmt: skip
    """As many runs as a tenth of what was taken, by `next_runs`."""
    k = max(1, len(taken) // 10)
    found = next_runs(taken, left, form=FORM, k=k, target=target, budget=budget, exponent=exponent, misfit=misfit)
    return [c.cell["row"] for c in found]


def shuffled(
    taken: pd.DataFrame, left: pd.DataFrame, target: pd.DataFrame, budget: float, draw: np.random.Generator
) -> list[int]:
    """All that fit, in random order."""
    return fitting(left.iloc[draw.permutation(len(left))], budget)


def cheapest(
    taken: pd.DataFrame, left: pd.DataFrame, target: pd.DataFrame, budget: float, draw: np.random.Generator
) -> list[int]:
    """All that fit, the cheapest first."""
    return fitting(left.sort_values("cost", kind="stable"), budget)


def fitting(ordered: pd.DataFrame, budget: float) -> list[int]:
    """Rows in their order, each that fits into what those before it left."""
    rows = []
    for row, cost in zip(ordered["row"], ordered["cost"], strict=True):
        if cost <= budget:
            rows.append(row)
            budget -= cost
    return rows


def policy(exponent: float, misfit: float) -> Order:
    return partial(designed, exponent=exponent, misfit=misfit)


POLICIES: dict[str, Order] = {
    "V-optimal, exponent 0.4": policy(0.4, 0.0),
    "with misfit, exponent 0": policy(0.0, MISFIT),
    "with misfit, exponent 0.2": policy(0.2, MISFIT),
    "with misfit, exponent 0.4": policy(0.4, MISFIT),
    "with misfit, exponent 0.7": policy(0.7, MISFIT),
    "random order": shuffled,
    "cheapest first": cheapest,
}


def replay(pool: pd.DataFrame, target: pd.DataFrame, order: Order, share: float, start: int) -> dict[str, float]:
    """One policy from one start to one budget: what it took and how it foretold the targets."""
    draw = np.random.default_rng(start)
    quarter = pool.nsmallest(len(pool) // 4, "cost")
    rows = list(quarter["row"].iloc[draw.choice(len(quarter), FIRST, replace=False)])
    budget = share * pool["cost"].sum()
    goal = target.drop(columns="loss")
    while True:
        there = pool["row"].isin(rows)
        taken, left = pool[there], pool[~there]
        rest = budget - taken["cost"].sum()
        new = order(taken, left, goal, rest, draw) if (left["cost"] <= rest).any() else []
        if not new:
            break
        rows += new
    fit = fit_surface(taken, FORM, starts=16, bootstraps=0, permutations=0)
    error, largest, r2 = foretold(fit, target)
    spent = taken["cost"].sum() / pool["cost"].sum()
    return {"runs": len(taken), "spent": spent, "mean_error": error, "largest_error": largest, "r2": r2}


def read(folder: Path, part: str) -> pd.DataFrame:
    runs = pd.read_parquet(folder / f"{NAME}-{part}.parquet").rename(columns=COLUMNS)[[*COLUMNS.values(), "loss"]]
    runs = runs.assign(cost=6 * runs["student_params"] * runs["data_tokens"])
    seed = runs.groupby(list(COLUMNS.values())).cumcount()  # four runs are there twice
    return runs.assign(seed=seed).sort_values("cost", kind="stable", ignore_index=True).assign(row=range(len(runs)))


def replays(
    pool: pd.DataFrame, target: pd.DataFrame, policies: Sequence[str], shares: Sequence[float], part: Path
) -> pd.DataFrame:
    """A row a replay, appended to `part`, of which rows that are there are not made again."""
    done = pd.read_csv(part) if part.exists() else pd.DataFrame(columns=["policy", "share", "start"])
    there = set(zip(done["policy"], done["share"], done["start"], strict=True))
    for start in range(STARTS):
        for policy in policies:
            for share in shares:
                if (policy, share, start) not in there:
                    found = replay(pool, target, POLICIES[policy], share, start)
                    row = pd.DataFrame([{"policy": policy, "share": share, "start": start, **found}])
                    row.to_csv(part, mode="a", header=not part.exists(), index=False)
    return pd.read_csv(part)


def table(found: pd.DataFrame, target: str, whole: tuple[float, float, float], size: int) -> pd.DataFrame:
    """Medians and quartiles over starts, and the fit to the whole pool."""
    rows = []
    for (policy, share), some in found.groupby(["policy", "share"], sort=False):
        quartiles = some["r2"].quantile([0.25, 0.75])
        rows.append(
            {"target": target, "policy": policy, "share": share, "starts": len(some), "runs": some["runs"].median()}
            | {"spent": some["spent"].median(), "r2": some["r2"].median(), "r2_low": quartiles.iloc[0]}
            | {"r2_high": quartiles.iloc[1], "r2_worst": some["r2"].min()}
            | {"mean_error": some["mean_error"].median(), "largest_error": some["largest_error"].median()}
        )
    error, largest, r2 = whole
    rows.append({"target": target, "policy": "all runs", "share": 1.0, "starts": 1, "runs": size, "spent": 1.0,
                 "r2": r2, "r2_low": math.nan, "mean_error": error, "largest_error": largest})  # fmt: skip
    return pd.DataFrame(rows)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("outside_next"), help="where replays are kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    given = parser.parse_args(words)
    given.work.mkdir(parents=True, exist_ok=True)
    runs = read(given.folder, "train")
    pool, target = runs[:-TENTH].reset_index(drop=True), runs[-TENTH:]
    found = replays(pool, target, given.policies, SHARES, given.work / "tenth.csv")
    whole = foretold(fit_surface(pool, FORM, bootstraps=0, permutations=0), target)
    told = table(found, f"dearest {TENTH} of {len(runs)}", whole, len(pool))
    print(told.to_string(index=False))
    if given.out:
        told.to_csv(given.out, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
