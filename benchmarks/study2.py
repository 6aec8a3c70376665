"""Study two: its records, its forecast and its answers (docs/study2.md).

    python -m benchmarks.study2 export STORE...   copy finished cells out of stores, to results/pico2/
    python -m benchmarks.study2 forecast          the odds of question 3, from studies one and two: forecast.csv
    python -m benchmarks.study2 figures           the tables and figures of docs/study2.md, from the records
    python -m benchmarks.study2 rerun STORE       one cell of each part again, in an empty store: rerun.csv

Tables stand in the page between `<!-- NAME -->` and `<!-- /NAME -->`; a test makes them again and compares.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from benchmarks.study import draw, filled, save_fit
from benchmarks.study import load as study_one
from benchmarks.study2_after import apart, start_differences
from benchmarks.study2_answers import foretold, optimum, optimum_row, plain, recipe, seen, starts, taught_less_direct
from benchmarks.study2_corrected import by_student, picks, pooled, seen_by_curve
from benchmarks.study2_plots import plot_forecast, plot_starts
from benchmarks.study2_tables import (
    STARTS,
    controls_table,
    curves_of,
    forecast_table,
    loss_table,
    odds_table,
    rates_table,
    ratios_table,
    recipe_table,
    row_table,
    rows_table,
    slopes_table,
    starts_table,
)
from benchmarks.study_arms import arms_of, main_of
from benchmarks.study_joint import PAIR
from benchmarks.study_tables import markdown
from capacity_gap import records
from capacity_gap.fit import JointFit
from capacity_gap.report.joint_tables import best_table, even_table, plot_joint

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "results" / "pico2"
FORECAST = RECORDS / "forecast.csv"
DROPPED = ("error", "micro_batch", "created", "schema_version", "peak_memory_bytes", "ranks")
PAGE = ROOT / "docs" / "study2.md"
SWEEPS = {"optimum": 228, "rates": 40, "starts": 240, "forecast": 78, "recipe": 324}  # cells of each part
TABLES = (
    "cells",
    "optimum",
    "best",
    "even",
    "both_studies",
    "one_loss",
    "rates",
    "starts",
    "paired",
    "controls",
    "seen",
    "forecast",
    "odds",
    "published",
    "recipe",
    "apart",
    "picks",
)


def load(sweep: str) -> pd.DataFrame:
    """The finished cells of one part of the study, each once; none where it has not been run."""
    file = RECORDS / f"study2_{sweep}.csv"
    return records.load(file).drop_duplicates("cell").reset_index(drop=True) if file.exists() else pd.DataFrame()


def export(stores: Sequence[str]) -> None:
    """One CSV a part, what was published before kept, without what only the machine knows."""
    from capacity_gap.store import contents

    for store in stores:
        frame = records.load(store)
        for name, cells in contents.sweeps(contents.open_store(store)).items():
            part = name.removeprefix("study2_")
            mine = frame[("record/" + frame["cell"]).isin(list(cells)) & (frame["status"] == "done")]
            if part not in SWEEPS or part == name or mine.empty:
                continue
            mine = mine.drop(columns=list(DROPPED)).dropna(axis=1, how="all")
            RECORDS.mkdir(parents=True, exist_ok=True)
            file = RECORDS / f"{name}.csv"
            known = pd.read_csv(file) if file.exists() else mine.iloc[:0]
            found = pd.concat([known, mine[~mine["cell"].isin(known["cell"])]]).sort_values("cell")
            found.to_csv(file, index=False, float_format="%.6g")
            print(f"{name}: {len(found)} cells")


def whole(sweep: str) -> bool:
    """Whether all registered cells of a part are there: an answer is given then, and not before."""
    return len(load(sweep)) == SWEEPS[sweep]


def tell_forecast() -> None:
    """Writes question 3's odds, once: they are fixed before its cells run."""
    if FORECAST.exists():
        raise SystemExit(f"{FORECAST.relative_to(ROOT)} is there. A forecast is made once, before its cells.")
    if len(load("forecast")):
        raise SystemExit("cells of question 3 have run: a forecast can no longer be made.")
    if not whole("optimum"):
        raise SystemExit("question 1 is not complete: the forecast is made from all of its cells, once.")
    told = foretold(main_arm(), plain(load("optimum")))
    told.to_csv(FORECAST, index=False, float_format="%.6g")
    print(f"{len(told)} pairs in {FORECAST.relative_to(ROOT)}")


def answers() -> dict[str, str]:
    """A table for each question whose cells are there; those of the others say that they are not."""
    found = dict.fromkeys(TABLES, "*(not all cells have run: no answer yet)*")
    found["cells"] = rows_table(counts())
    parts = ("optimum", "starts", "forecast", "recipe")
    one = main_arm()
    main, behind, pairs, grid = (plain(load(name)) if whole(name) else pd.DataFrame() for name in parts)
    if len(main):
        fit = first_question()
        found["optimum"], found["both_studies"] = row_table(optimum_row(fit)), row_table(optimum_row(pooled(one, main)))
        found["best"], found["even"] = markdown(*best_table(fit)), markdown(*even_table(fit, PAIR))
        found["one_loss"] = loss_table(main)
    if whole("rates"):
        found["rates"] = rates_table(load("rates"))
    if len(behind):
        slopes = starts(behind)
        found["starts"] = starts_table(slopes, by_student(behind))
        found["paired"] = slopes_table({k: v for k, v in slopes.items() if "less" in k} | start_differences(behind))
        found["controls"] = controls_table(taught_less_direct(behind))
        if len(main):
            found["seen"] = slopes_table(seen(behind, main) | seen_by_curve(behind, main))
    if len(pairs) and FORECAST.exists():
        told = pd.read_csv(FORECAST)
        curves = curves_of(told, pairs, pd.concat([one, main], ignore_index=True))
        found["forecast"], found["odds"] = forecast_table(told, pairs, curves), odds_table(told, pairs, curves)
        found["published"] = ratios_table(published())
    if len(grid):
        usual = grid[(grid["kd_weight"] == 0.5) & (grid["learning_rate"].eq(usual_rate(grid)))]
        contrasts = recipe(grid, usual, one)
        found["picks"] = rows_table(picks(grid))
        found["recipe"] = recipe_table(contrasts)
        found["apart"] = recipe_table(apart(grid, usual, one), verdict=False)
    return found


def main_arm() -> pd.DataFrame:
    """Study one's cells that ask what question 1 asks."""
    return plain(main_of(arms_of(study_one())).frame)


@cache
def first_question() -> JointFit:
    """The fit of question 1."""
    return optimum(plain(load("optimum")))


@cache
def published() -> JointFit:
    """What `recommend` reads by default: one model of all cells of both studies that ask the same, pruned starts."""
    return pooled(main_arm(), *(plain(load(name)) for name in ("optimum", "forecast")))


def counts() -> pd.DataFrame:
    """How many cells of each part have been run, of how many that its sweep has."""
    rows = [{"part": f"study2_{name}", "run": len(load(name)), "planned": of} for name, of in SWEEPS.items()]
    return pd.DataFrame(rows)


def figures() -> None:
    """Writes the tables of the page, a figure for each of questions 1 to 3, and the published fit."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), answers()), encoding="utf-8")
    if whole("optimum"):
        draw(plot_joint(first_question()), "study2_joint", dpi=110)
    if whole("starts"):
        draw(plot_starts(plain(load("starts")), STARTS), "study2_starts", dpi=110)
    if whole("forecast"):
        save_fit(RECORDS / "joint.json", published().to_json())
        draw(plot_forecast(pd.read_csv(FORECAST), plain(load("forecast"))), "study2_forecast", dpi=110)


def rerun(store: str) -> None:
    """Runs the cell of the smallest digest of each part in another store, and notes both losses."""
    rows = []
    for name in SWEEPS:
        if not len(frame := load(name)):
            continue
        cell = frame.sort_values("cell").iloc[0]
        subprocess.run(
            [sys.executable, str(ROOT / "run.py"), "-m", *overrides(name, cell), f"store={store}"], check=True
        )
        again = records.load(store).set_index("cell").loc[cell["cell"]]
        row = {"part": name, "cell": cell["cell"], "published": cell["student_loss"], "again": again["student_loss"]}
        rows.append(row | {"difference": again["student_loss"] - cell["student_loss"]})
        pd.DataFrame(rows).to_csv(RECORDS / "rerun.csv", index=False, float_format="%.8g")
    print(pd.DataFrame(rows).to_string())


def overrides(name: str, cell: pd.Series) -> list[str]:
    """What `run.py` takes to make one cell of a part."""
    words = [f"+sweeps=study2_{name}", *(f"{k}={cell[k]}" for k in ("student", "teacher", "seed"))]
    words += [f"data={int(cell['data_tokens'])}", "hydra/launcher=basic"]
    if name in ("rates", "starts"):
        words += [f"prune.init={cell['init']}"] + ["prune.init_data=1m"] * (cell["init"] == "pretrained")
        words += ["distill=direct"] * bool(cell["kd_weight"] == 0)
    if name in ("rates", "starts", "recipe"):
        words.append(f"train.learning_rate_times_width={times_width(name, cell):g}")
    return [*words, f"distill.kd_weight={cell['kd_weight']:g}"] if name == "recipe" else words


def times_width(name: str, cell: pd.Series) -> float:
    """The peak rate times width of a cell, from the published rate: the recipe's is 0.4 for every student."""
    frame = load(name)
    frame = frame[frame["student"] == cell["student"]]
    if name == "starts":
        usual = frame[frame["init"] == "pruned"]["learning_rate"].iloc[0]
    else:
        usual = sorted(frame["learning_rate"].unique())[-2]  # 0.4 of 0.05 to 0.8, and of 0.2 to 0.8
    return round(0.4 * float(cell["learning_rate"] / usual), 3)


def usual_rate(grid: pd.DataFrame) -> pd.Series:
    """The recipe's rate of each student: the middle one of those that were tried."""
    return grid.groupby("student")["learning_rate"].transform(lambda rates: sorted(rates.unique())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "forecast", "figures", "rerun"))
    parser.add_argument("stores", nargs="*")
    given = parser.parse_args()
    if given.what == "export":
        export(given.stores)
    elif given.what == "forecast":
        tell_forecast()
    elif given.what == "rerun":
        rerun(*given.stores)
    else:
        figures()


if __name__ == "__main__":
    main()
