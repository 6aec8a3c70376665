"""Which distance to minimise: the table of docs/distillation.md, from the records of a sweep.

python run.py -m +sweeps=losses
python -m benchmarks.losses STORE [--out results/losses.csv]
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.intervals import interval
from capacity_gap import records


def against(values: pd.Series, baseline: pd.Series) -> dict[str, float]:
    """Mean difference of two series paired by seed, and the half-width of its 95 % t interval."""
    difference = (values - baseline).dropna()
    mean, half = interval(difference.to_numpy())
    return {"seeds": len(difference), "difference": mean, "half-width": half}


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Final held-out loss of every distance and weight, less that of forward KL at the same weight and seed."""
    wanted = (frame["status"] == "done") & (frame["student"] == "45k") & (frame["teacher"] == "180k")
    wanted &= (frame["data_tokens"] == 150_000) & (frame["teacher_data"] == "400k") & (frame["init"] == "pruned")
    wanted &= (frame["signal"] == "online") & (frame["kd_weight"] > 0) & (frame["temperature"] == 1)
    cells = frame[wanted].drop_duplicates(["loss", "kd_weight", "seed"]).set_index("seed")
    rows = []
    for (weight, loss), group in cells.groupby(["kd_weight", "loss"]):
        forward = cells[(cells["kd_weight"] == weight) & (cells["loss"] == "forward_kl")]["student_loss"]
        row = {"kd_weight": weight, "loss": loss, "held-out loss": group["student_loss"].mean()}
        rows.append(row | {"forward KL": group["train_kl"].mean()} | against(group["student_loss"], forward))
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = table(records.load(given.store))
    print(found.to_string(index=False, float_format="{:.4f}".format))
    if given.out:
        found.to_csv(given.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
