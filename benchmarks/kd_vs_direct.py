"""Distilled against directly trained students: table and figure of docs/distillation.md.

    python -m benchmarks.kd_vs_direct STORE      after the commands in the header of sweeps/kd_vs_direct.yaml

Differences are paired by seed (the same start, the same sequences in the same order); intervals are 95 % t intervals.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.losses import against
from capacity_gap import records
from capacity_gap.cell.stages.shared import read_history
from capacity_gap.report.plots import save_figure
from capacity_gap.store.files import META

ROOT = Path(__file__).resolve().parent.parent
ARM = ["init", "kd_weight", "teacher_data", "temperature"]


def cells(store: Path) -> pd.DataFrame:
    """The sweep's cells: those whose history holds held-out losses on the way."""
    frame = records.load(store)
    frame = frame[frame["status"] == "done"].copy()
    frame["history"] = [history(store, cell) for cell in frame["cell"]]
    return frame[[any("held_out" in p for p in h) for h in frame["history"]]]


def history(store: Path, cell: str) -> list[dict[str, Any]]:
    """The logged points of a cell's training."""
    made = json.loads((store / "record" / cell / META).read_text())
    return read_history(store / made["inputs"]["trained"])


def dynamics(points: list[dict]) -> pd.DataFrame:
    """Tokens and held-out loss, where it was measured."""
    return pd.DataFrame([{k: p[k] for k in ("tokens", "held_out")} for p in points if "held_out" in p])


def tokens_to_reach(points: list[dict], loss: float) -> float:
    """Where the held-out loss first falls to `loss`, between two measurements in proportion; NaN if it never does."""
    seen = dynamics(points)
    below = np.flatnonzero(seen["held_out"] <= loss)
    if not len(below):
        return float("nan")
    i = below[0]
    if i == 0:
        return float(seen["tokens"][0])
    return float(np.interp(-loss, -seen["held_out"][i - 1 : i + 1], seen["tokens"][i - 1 : i + 1]))


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Each arm: final losses, the difference to direct training and to KD at τ = 1 under the 400k-token teacher."""
    direct = {i: g.set_index("seed") for i, g in frame[frame["kd_weight"] == 0].groupby("init")}
    usual = frame[(frame["kd_weight"] > 0) & (frame["temperature"] == 1) & (frame["teacher_data"] == "400k")]
    rows = []
    for keys, group in frame.groupby(ARM):
        mine, base = group.set_index("seed"), direct[keys[0]]
        last = [h[-max(1, len(h) // 10) :] for h in mine["history"]]
        row = dict(zip(ARM, keys, strict=True)) | {"train CE": mine["train_ce"].mean()}
        row |= {"held-out loss": mine["student_loss"].mean(), **against(mine["student_loss"], base["student_loss"])}
        rival = usual[usual["init"] == keys[0]].set_index("seed")["student_loss"]
        row |= {f"{k} to usual KD": v for k, v in against(mine["student_loss"], rival).items() if k != "seeds"}
        row["train CE less direct"] = (mine["train_ce"] - base["train_ce"]).mean()
        row["teacher loss"] = mine["teacher_loss"].mean()
        row["teacher entropy"] = np.mean([p.get("teacher_entropy", np.nan) for h in last for p in h])
        reach = [
            tokens_to_reach(mine["history"][s], dynamics(base["history"][s])["held_out"].iloc[-1]) for s in mine.index
        ]
        row["tokens to direct's final loss"] = np.mean(reach)
        rows.append(row)
    return pd.DataFrame(rows)


def figure(frame: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Left: held-out loss along the way, range over seeds. Right: gain of distillation against teacher entropy."""
    drawn = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    usual = frame[(frame["temperature"] == 1) & (frame["teacher_data"] == "400k")]
    for (init, weight), group in usual.groupby(["init", "kd_weight"]):
        seen = pd.concat([dynamics(h) for h in group["history"]]).groupby("tokens")["held_out"]
        style = {"color": "C0" if weight else "C1", "ls": "-" if init == "pruned" else "--"}
        name = f"{'distilled' if weight else 'direct'}, {init} start"
        left.plot(seen.mean().index, seen.mean(), label=name, **style)
        left.fill_between(seen.mean().index, seen.min(), seen.max(), color=style["color"], alpha=0.2, lw=0)
    left.set(xlabel="tokens", ylabel="held-out loss, nats per token")
    left.legend(fontsize=8)
    arms = rows[(rows["kd_weight"] > 0) & (rows["init"] == "random")]
    for words, below, part in (
        ("by temperature", 5, arms[arms["teacher_data"] == "400k"]),
        ("by the teacher's tokens", -13, arms[arms["temperature"] == 1]),
    ):
        part = part.sort_values("teacher entropy")
        half = part["half-width"]
        right.errorbar(part["teacher entropy"], -part["difference"], yerr=half, fmt="o-", ms=4, capsize=3, label=words)
        for _, row in part.iterrows():
            said = f"τ={row['temperature']:g}" if words == "by temperature" else row["teacher_data"]
            right.annotate(
                said, (row["teacher entropy"], -row["difference"]), xytext=(4, below), textcoords="offset points"
            )
    right.axhline(0, color="0.5", lw=1)
    right.set(xlabel="teacher's entropy at its temperature, nats", ylabel="direct − distilled held-out loss, nats")
    right.legend(fontsize=8, title="random start, sharper and flatter teachers", title_fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    given = parser.parse_args()
    frame = cells(given.store)
    rows = table(frame)
    rows.to_csv(ROOT / "results" / "kd_vs_direct.csv", index=False, float_format="%.4f")
    print(rows.to_string(index=False, float_format="{:.4f}".format))
    print(save_figure(figure(frame, rows), ROOT / "docs" / "kd_vs_direct"))


if __name__ == "__main__":
    main()
