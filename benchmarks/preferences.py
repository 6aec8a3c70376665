"""Does preference optimisation gain more after the best teacher than after one that is too large? A table.

    python run.py -m +sweeps=preferences_pico store=STORE
    python -m benchmarks.preferences STORE [--out results/preferences.csv]

Per teacher, over the seeds (each with its own teacher): the teacher's loss, the student's after distillation, exact
match after fine-tuning, and what DPO adds to exact match, to the share of held-out pairs in which the right answer is
the likelier one, and to their log-ratio; means with 95 % t-intervals. The last row is the paired difference of the best
teacher (by the student's loss) and the largest.
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.intervals import interval
from capacity_gap.store import contents

GAINS = ("exact_match", "preference", "log_ratio")


def gains(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell: what DPO added."""
    columns = {name: frame[f"metrics/{name}/prefer"] - frame[f"metrics/{name}/instruct"] for name in GAINS}
    kept = frame[["teacher", "teacher_params", "seed", "teacher_loss", "student_loss"]]
    return kept.assign(
        exact_match=frame["metrics/exact_match/instruct"], **{f"gain_{k}": v for k, v in columns.items()}
    )


def table(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per teacher, smallest first, and the difference between the best and the largest, paired by seed."""
    measured = [c for c in cells.columns if c not in ("teacher", "teacher_params", "seed")]
    by_seed = {
        t: g.set_index("seed")[measured].sort_index()
        for t, g in cells.sort_values("teacher_params").groupby("teacher", sort=False)
    }
    best = min(by_seed, key=lambda t: by_seed[t]["student_loss"].mean())
    largest = list(by_seed)[-1]
    parts = dict(by_seed)
    if best != largest:
        parts[f"{best} − {largest}"] = (by_seed[best] - by_seed[largest]).dropna()
    rows = []
    for name, part in parts.items():
        row: dict[str, float | str | int] = {"teacher": name, "cells": len(part)}
        for column in measured:
            row[column], row[f"{column}_half_width"] = interval(part[column].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store")
    parser.add_argument("--out", type=Path, default=Path("results/preferences.csv"))
    given = parser.parse_args()
    frame = contents.sweep_frame(contents.open_store(given.store), "preferences_pico")
    done = frame[(frame["status"] == "done") & frame["prefer_rows"].notna()]
    found = table(gains(done))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found.round(5).to_csv(given.out, index=False)
    print(found.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
