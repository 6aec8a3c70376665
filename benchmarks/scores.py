"""Claim: scores of the embedded suite rise along the pico ladder. Writes the table and figure of docs/scores.md.

    python -m benchmarks.scores STORE [--rungs 55k,120k,…] [--out results/pico_scores.csv]

Teachers that STORE lacks are trained (1M tokens each): about ten minutes of one thread up to 900k, then as long again
for the scores.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from capacity_gap.cell import config, pipeline
from capacity_gap.models.axes import count_params
from capacity_gap.report.plots import save_figure, short_scale
from capacity_gap.runtime.process import Runtime
from capacity_gap.store.stage import Store

ROOT = Path(__file__).resolve().parent.parent
RUNGS = "55k,80k,120k,180k,270k,400k,600k,900k"
CHANCE = 0.25


def rows_of(rung: str, store: Store, runtime: Runtime) -> list[dict]:
    overrides = [f"teacher={rung}", "student=40k", "data=0", "evaluate=pico", "family.teacher_data=1m"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cell = pipeline.resolve(config.from_hydra(compose("config", overrides=overrides)))
    loss = json.loads(
        (store.compute(cell.scored(cell.teacher, cell.teacher_shape), runtime) / "result.json").read_text()
    )
    rows = []
    for stage in cell.benchmarks(cell.teacher):
        (score,) = json.loads((store.compute(stage, runtime) / "result.json").read_text())["scores"]
        kept = {k: score[k] for k in ("task", "metric", "value", "stderr", "samples")}
        params = count_params(cell.teacher_shape)
        rows.append({"rung": rung, "params": params, "loss": round(loss["test"]["loss"], 4), **kept})
    return rows


def figure(table: pd.DataFrame) -> Figure:
    drawn = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = drawn.subplots()
    for task, group in table.groupby("task"):
        axes.errorbar(group["params"], group["value"], yerr=group["stderr"], fmt="o-", ms=4, capsize=3, label=task)
    axes.axhline(CHANCE, color="0.5", lw=1, ls=":")
    axes.set_xscale("log")
    axes.set_xticks(table["params"].unique())
    axes.xaxis.set_major_formatter(FuncFormatter(short_scale))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.set_xlabel("parameters")
    axes.set_ylabel("share right (dotted: chance; bars: one s.e.)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--rungs", default=RUNGS)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "pico_scores.csv")
    given = parser.parse_args()
    config.register()
    store, runtime, rows = Store(given.store), Runtime(), []
    for rung in given.rungs.split(","):
        rows += rows_of(rung, store, runtime)
        print(rows[-2:], flush=True)
    table = pd.DataFrame(rows).round(4)
    table.to_csv(given.out, index=False)
    save_figure(figure(table), ROOT / "docs" / "scores")
    (ROOT / "docs" / "scores.svg").unlink()
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
