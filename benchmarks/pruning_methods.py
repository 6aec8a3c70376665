"""Which score leaves the better student: the table and the figure of docs/pruning.md, from the records of the sweep.

python run.py -m +sweeps=pruning_methods
python -m benchmarks.pruning_methods STORE
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t

from capacity_gap import records
from capacity_gap.report.plots import save_figure

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["family", "student", "prune_method"]
STAGES = {"init_loss": "right after pruning", "student_loss": "after 200k tokens"}


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean losses over teacher seeds, and the difference to `random` within each seed with its 95 % t interval."""
    rows = []
    for keys, group in frame.groupby(KEYS):
        row = dict(zip(KEYS, keys, strict=True)) | {"seeds": len(group)}
        baseline = frame[(frame["prune_method"] == "random") & (frame["family"] == keys[0])]
        baseline = baseline[baseline["student"] == keys[1]].set_index("teacher_seed")
        for column in STAGES:
            row[column] = group[column].mean()
            difference = group.set_index("teacher_seed")[column] - baseline[column]
            half = difference.std() / np.sqrt(len(difference)) * t.ppf(0.975, len(difference) - 1)
            row[f"{column}_vs_random"] = difference.mean()
            row[f"{column}_vs_random_half"] = half
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def figure(rows: pd.DataFrame) -> Figure:
    """Difference to random pruning, with intervals: one panel a family and stage."""
    drawn = Figure(figsize=(9, 5.2), layout="constrained")
    families = list(dict.fromkeys(rows["family"]))
    panels = drawn.subplots(len(families), 2, sharex="col", sharey=True, squeeze=False)
    for line, family in zip(panels, families, strict=True):
        for axes, (column, words) in zip(line, STAGES.items(), strict=True):
            mine = rows[(rows["family"] == family) & (rows["prune_method"] != "random")]
            methods = list(dict.fromkeys(mine["prune_method"]))
            for shift, (student, group) in zip((-0.14, 0.14), mine.groupby("student"), strict=True):
                at = [methods.index(m) + shift for m in group["prune_method"]]
                half = group[f"{column}_vs_random_half"]
                axes.errorbar(group[f"{column}_vs_random"], at, xerr=half, fmt="o", ms=4, capsize=3, label=student)
            axes.axvline(0, color="0.5", lw=1)
            axes.set_yticks(range(len(methods)), methods)
            axes.grid(alpha=0.25)
            axes.set_title(f"{family}, {words}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("loss − loss under random pruning, nats per token")
    panels[0][0].legend(title="student, from 270k", fontsize=8)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    given = parser.parse_args()
    frame = records.load(given.store)
    frame = frame[(frame["status"] == "done") & (frame["data_tokens"] == 200_000) & (frame["teacher"] == "270k")]
    rows = table(frame)
    rows.to_csv(ROOT / "results" / "pruning_methods.csv", index=False)
    print(rows.to_string(index=False))
    print(save_figure(figure(rows), ROOT / "docs" / "pruning_methods"))


if __name__ == "__main__":
    main()
