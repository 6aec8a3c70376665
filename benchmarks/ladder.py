"""The pico ladder: held-out loss of every rung, with seed noise. Writes the table and the figure of docs/ladder.md.

python run.py -m +sweeps=ladder_equal  (then ladder_equal_seeds, ladder_proportional, ladder_proportional_seeds)
python benchmarks/ladder.py store
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from capacity_gap import records
from capacity_gap.report.plots import save_figure, short_scale
from capacity_gap.settings.scales import parse_scale

ROOT = Path(__file__).resolve().parent.parent
POLICIES = {"1m": "equal tokens (1m)", "2x": "tokens ∝ parameters (2×)"}


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a rung and policy: mean held-out loss over teacher seeds, how many, and their standard deviation."""
    frame = frame[
        (frame["status"] == "done") & (frame["data_tokens"] == 0) & frame["teacher_data"].isin(list(POLICIES))
    ]
    keys = ["teacher_data", "teacher", "teacher_params", "teacher_params_non_embedding", "teacher_tokens"]
    grouped = frame.groupby(keys)["teacher_loss"].agg(["mean", "count", "std"]).reset_index()
    grouped["order"] = grouped["teacher"].map(lambda t: parse_scale(t, key="teacher"))
    return grouped.sort_values(["teacher_data", "order"]).drop(columns="order").round(4)


def figure(rows: pd.DataFrame) -> Figure:
    """Loss against parameters, one line a policy."""
    drawn = Figure(figsize=(6, 3.8), layout="constrained")
    axes = drawn.subplots()
    for policy, group in rows.groupby("teacher_data"):
        axes.errorbar(
            group["teacher_params"],
            group["mean"],
            yerr=2 * group["std"],
            fmt="o-",
            ms=4,
            capsize=3,
            label=POLICIES[policy],
        )
    axes.set_xscale("log")
    axes.set_xticks(rows["teacher_params"].unique())
    axes.xaxis.set_major_formatter(FuncFormatter(short_scale))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="x", rotation=40)
    axes.set_xlabel("teacher parameters")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    return drawn


def main(store: str) -> None:
    """Writes results/ladder.csv and docs/ladder.png, and prints the table."""
    rows = table(records.load(store))
    rows.to_csv(ROOT / "results/ladder.csv", index=False)
    save_figure(figure(rows), ROOT / "docs/ladder")
    (ROOT / "docs/ladder.svg").unlink()
    print(rows.to_string(index=False))


if __name__ == "__main__":
    main(sys.argv[1])
