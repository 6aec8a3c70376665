"""Claim: runs that `next_runs` chooses predict the costliest public runs better than as many FLOPs in random order.

    python -m benchmarks.outside_next FOLDER --out results/outside_next.csv             minutes; chooses the policy
    python -m benchmarks.outside_next FOLDER --out results/outside_next.csv --seven     once, after the choice

FOLDER holds `farseer_scaling_law-{train,test}.parquet` (arXiv 2604.22753, CC BY 4.0), of which no copy is kept here. A
run costs 6·N·D; a budget is a share of the cost of all runs of the pool. First the pool is the 364 cheaper of 404 runs
and the target the costliest tenth; then all 404 and the seven that others held out. Policies know the targets' inputs,
not their losses. The form is `supervised`, which `select_surface` chose (results/outside_surfaces.csv).

A replay starts from `FIRST` runs drawn from the cheapest quarter, the same for every policy; under `OWN` from one, and
`next_runs` makes the start. It takes runs until no run of the pool fits into what is left; random order takes each run
that still fits. R² and the largest error are those of the targets under the surface fitted to the runs taken. A row is
a replay's result in `--work`, where an interrupted call goes on; the table has medians and quartiles over starts.
"""

import argparse
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
# On the costliest tenth, at a tenth of the budget, the medians of R² under exponents 0, 0.2 and 0.4 are alike (0.985 to
# 0.986); of these 0.4 has the best lower quartile and the best worst start, there and at a twentieth.
CHOSEN = "with misfit, exponent 0.4"
STARTS = 20
FIRST = 8
TENTH = 40
HELD = "seven held out"
OWN = "own start, with misfit, exponent 0.4"

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


def by_design(exponent: float, misfit: float) -> Order:
    return partial(designed, exponent=exponent, misfit=misfit)


POLICIES: dict[str, Order] = {
    "V-optimal, exponent 0.4": by_design(0.4, 0.0),
    "with misfit, exponent 0": by_design(0.0, MISFIT),
    "with misfit, exponent 0.2": by_design(0.2, MISFIT),
    "with misfit, exponent 0.4": by_design(0.4, MISFIT),
    "with misfit, exponent 0.7": by_design(0.7, MISFIT),
    OWN: by_design(0.4, MISFIT),
    "random order": shuffled,
    "cheapest first": cheapest,
}
SEVEN = [CHOSEN, "random order"]


def replay(pool: pd.DataFrame, target: pd.DataFrame, policy: str, share: float, start: int) -> dict[str, float]:
    """One policy from one start to one budget: the runs it chose and how well they predict the targets."""
    draw = np.random.default_rng(start)
    quarter = pool.nsmallest(len(pool) // 4, "cost")
    rows = list(quarter["row"].iloc[draw.choice(len(quarter), 1 if policy == OWN else FIRST, replace=False)])
    budget = share * pool["cost"].sum()
    goal = target.drop(columns="loss")
    while True:
        there = pool["row"].isin(rows)
        taken, left = pool[there], pool[~there]
        rest = budget - taken["cost"].sum()
        new = POLICIES[policy](taken, left, goal, rest, draw) if (left["cost"] <= rest).any() else []
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
                    found = replay(pool, target, policy, share, start)
                    row = pd.DataFrame([{"policy": policy, "share": share, "start": start, **found}])
                    row.to_csv(part, mode="a", header=not part.exists(), index=False)
    return pd.read_csv(part)


def judged(
    pool: pd.DataFrame, target: pd.DataFrame, policies: Sequence[str], shares: Sequence[float], part: Path, name: str
) -> pd.DataFrame:
    """Medians and quartiles over starts of each policy and budget, and the fit to the whole pool."""
    found = replays(pool, target, policies, shares, part)
    by = found.groupby(["policy", "share"], sort=False)
    told = by[["runs", "spent", "r2", "mean_error", "largest_error"]].median()
    told.insert(0, "starts", by.size())
    told["r2_low"], told["r2_high"] = by["r2"].quantile(0.25), by["r2"].quantile(0.75)
    told["r2_worst"] = by["r2"].min()
    error, largest, r2 = foretold(fit_surface(pool, FORM, bootstraps=0, permutations=0), target)
    whole = {"policy": "all runs", "share": 1.0, "starts": 1, "runs": len(pool), "spent": 1.0}
    whole |= {"r2": r2, "mean_error": error, "largest_error": largest}
    table = pd.concat([told.reset_index(), pd.DataFrame([whole])])
    table.insert(0, "target", name)
    return table


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("outside_next"), help="where replays are kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seven", action="store_true", help="read the held-out runs, once the policy is chosen")
    given = parser.parse_args(words)
    given.work.mkdir(parents=True, exist_ok=True)
    runs = read(given.folder, "train")
    if given.seven:
        told = judged(runs, read(given.folder, "test"), SEVEN, SEVEN_SHARES, given.work / "seven.csv", HELD)
        if given.out and given.out.exists():
            before = pd.read_csv(given.out)
            told = pd.concat([before[before["target"] != HELD], told])
    else:
        pool, target = runs[:-TENTH], runs[-TENTH:]
        told = judged(
            pool, target, list(POLICIES), SHARES, given.work / "tenth.csv", f"costliest {TENTH} of {len(runs)}"
        )
    print(told.to_string(index=False))
    if given.out:
        told.to_csv(given.out, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
