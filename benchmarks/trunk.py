"""Does one run with branches (`train.trunk=true`) end where a run for each budget ends? Do teachers keep their order?

    python run.py -m +sweeps=trunk
    python run.py -m +sweeps=trunk train.trunk=false train.schedule=cosine
    python run.py -m +sweeps=trunk train.learning_rate_times_width=RATE seed=1,2      each with its best rate
    python run.py -m +sweeps=trunk train.learning_rate_times_width=RATE seed=1,2 train.trunk=false train.schedule=cosine
    python -m benchmarks.trunk STORE [--out results/trunk.csv]

The rate of each way is the one with the least mean loss of seed 0; the table is of the other seeds.
"""

import argparse
from itertools import combinations
from pathlib import Path

import pandas as pd

from capacity_gap import records

PLACE = ["teacher", "data_tokens"]


def cells(store: str) -> pd.DataFrame:
    """The finished cells, with how they were trained and at which peak rate."""
    frame = records.load(store)
    frame = frame[frame["status"] == "done"]
    trunk = frame["settings"].fillna("").str.contains("train.trunk")
    return frame.assign(way=trunk.map({True: "trunk", False: "cosine"}), seed=frame["seed"].astype(int))


def best_rates(frame: pd.DataFrame) -> dict[str, float]:
    """The rate of each way with the least mean loss of seed 0."""
    means = frame[frame["seed"] == 0].groupby(["way", "learning_rate"])["student_loss"].mean()
    return {way: float(means[way].idxmin()) for way in means.index.unique("way")}


def table(frame: pd.DataFrame, rates: dict[str, float]) -> pd.DataFrame:
    """Mean losses of the other seeds by teacher and budget, and their difference."""
    used = frame[(frame["learning_rate"] == frame["way"].map(rates)) & (frame["seed"] > 0)]
    if used.empty:
        used = frame[frame["learning_rate"] == frame["way"].map(rates)]
    means = used.pivot_table(index=PLACE, columns="way", values="student_loss")
    paired = used.pivot_table(index=[*PLACE, "seed"], columns="way", values="student_loss").dropna()
    gap = (paired["trunk"] - paired["cosine"]).groupby(PLACE)
    found = means.assign(difference=gap.mean(), seeds=gap.size())
    sizes = frame.groupby("teacher")["teacher_params"].first()
    found = found.reset_index()
    return found.assign(size=found["teacher"].map(sizes)).sort_values(["data_tokens", "size"]).drop(columns="size")


def same_order(found: pd.DataFrame) -> tuple[int, int]:
    """Pairs of teachers at one budget that both ways put in the same order, and all of them."""
    same = [
        (a["trunk"] - b["trunk"]) * (a["cosine"] - b["cosine"]) > 0
        for _, rows in found.dropna().groupby("data_tokens")
        for a, b in combinations(rows.to_dict("records"), 2)
    ]
    return sum(same), len(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    frame = cells(given.store)
    rates = best_rates(frame)
    found = table(frame, rates)
    print(found.to_string(index=False, float_format="{:.4f}".format))
    print(f"rates: {rates}; same order of teachers: {same_order(found)[0]} of {same_order(found)[1]} pairs")
    if given.out:
        found.to_csv(given.out, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
