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
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.study import filled
from benchmarks.study import load as study_one
from benchmarks.study2_answers import (
    Slope,
    foretold,
    judged,
    one_loss,
    optimum,
    optimum_row,
    plain,
    rates,
    recipe,
    seen,
    stands,
    starts,
    taught_less_direct,
)
from benchmarks.study2_corrected import both_studies, by_student, excess, hedged_brier, picks, seen_by_curve, set_held
from benchmarks.study_arms import arms_of, main_of
from benchmarks.study_joint import PAIR
from benchmarks.study_tables import markdown
from capacity_gap import records
from capacity_gap.report.joint_tables import best_table, even_table, plot_joint
from capacity_gap.report.plots import save_figure
from capacity_gap.wording.intervals import marks

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
    "by_student",
    "controls",
    "seen",
    "forecast",
    "odds",
    "hedged",
    "held",
    "recipe",
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
    told = foretold(plain(main_of(arms_of(study_one())).frame), plain(load("optimum")))
    told.to_csv(FORECAST, index=False, float_format="%.6g")
    print(f"{len(told)} pairs in {FORECAST.relative_to(ROOT)}")


def answers() -> dict[str, str]:
    """A table for each question whose cells are there; those of the others say that they are not."""
    found = dict.fromkeys(TABLES, "*(not all cells have run: no answer yet)*")
    found["cells"] = rows_table(counts())
    parts = ("optimum", "starts", "forecast", "recipe")
    one = plain(main_of(arms_of(study_one())).frame)
    main, behind, pairs, grid = (load(name) if whole(name) else pd.DataFrame() for name in parts)
    if len(main):
        main = plain(main)
        fit, both = optimum(main), both_studies(one, main)
        found["optimum"], found["both_studies"] = row_table(optimum_row(fit)), row_table(optimum_row(both))
        found["best"], found["even"] = markdown(*best_table(fit)), markdown(*even_table(fit, PAIR))
        found["one_loss"] = loss_table(main)
    if whole("rates"):
        found["rates"] = rows_table(rates(load("rates")))
    if len(behind):
        behind = plain(behind)
        found["starts"] = slopes_table(starts(behind))
        found["by_student"] = slopes_table(by_student(behind))
        found["controls"] = rows_table(taught_less_direct(behind))
        if len(main):
            found["seen"] = slopes_table(seen(behind, main) | seen_by_curve(behind, main))
    if len(pairs) and FORECAST.exists():
        before = pd.concat([one, main], ignore_index=True)
        found["forecast"] = rows_table(judged(pd.read_csv(FORECAST), plain(pairs), before))
        found["hedged"] = rows_table(hedged_brier(pd.read_csv(FORECAST), plain(pairs), before))
        found["held"] = rows_table(set_held(pd.read_csv(FORECAST), plain(pairs)))
        found["odds"] = odds_table(pd.read_csv(FORECAST), plain(pairs), before)
    if len(grid):
        grid = plain(grid)
        usual = grid[(grid["kd_weight"] == 0.5) & (grid["learning_rate"].eq(usual_rate(grid)))]
        contrasts = recipe(grid, usual, one)
        found["picks"] = rows_table(picks(grid))
        rows = [[name, str(value)] for name, value in contrasts.items()]
        found["recipe"] = markdown(["900k less 120k", "nats"], [*rows, ["the break-even", stands(contrasts)]])
    return found


def row_table(row: dict[str, object]) -> str:
    """One answer, a row a quantity."""
    return markdown(["quantity", "found"], [[name, said(value)] for name, value in row.items()])


def said(value: object) -> str:
    """A value, a size or an interval in a few digits."""
    if isinstance(value, tuple):
        return marks(value, "{:.2f}".format)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def rows_table(rows: pd.DataFrame) -> str:
    """A table as it is, with four decimals."""
    return markdown(list(rows), [[str(value) for value in row] for row in rows.round(4).to_numpy()])


def counts() -> pd.DataFrame:
    """How many cells of each part have been run, of how many that were registered."""
    rows = [{"part": f"study2_{name}", "run": len(load(name)), "registered": of} for name, of in SWEEPS.items()]
    return pd.DataFrame(rows)


def figures() -> None:
    """Writes the tables of the page, and the figures of question 1."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), answers()), encoding="utf-8")
    if whole("optimum"):
        save_figure(plot_joint(optimum(plain(load("optimum")))), ROOT / "docs" / "study2_joint", dpi=110)
        (ROOT / "docs" / "study2_joint.svg").unlink()


def rerun(store: str) -> None:
    """Runs the cell of the smallest digest of each part in another store, and notes both losses."""
    rows = []
    for name in SWEEPS:
        if not len(frame := load(name)):
            continue
        cell = frame.sort_values("cell").iloc[0]
        subprocess.run([sys.executable, str(ROOT / "run.py"), *overrides(name, cell), f"store={store}"], check=True)
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
        words += ["distill=direct"] * (cell["kd_weight"] == 0)
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


def odds_table(told: pd.DataFrame, came: pd.DataFrame, before: pd.DataFrame) -> str:
    """Over the pairs of all curves: Brier scores, and how often the likelier teacher won, by the odds it was given."""
    curves = judged(told, came, before)
    rows = [
        [name, f"{np.average(curves[column], weights=curves['pairs']):.4f}"]
        for name, column in (
            ("Brier score of the odds", "brier"),
            ("of the order in the nearest curve", "brier, nearest budget"),
            ("of even odds", "brier, even odds"),
        )
    ]
    means = came.groupby(["student", "data_tokens", "teacher"])["loss"].mean()
    keys = told[["student", "data_tokens"]].apply(tuple, axis=1)
    won = [
        means.get((*k, large), np.nan) - means.get((*k, small), np.nan)
        for k, small, large in zip(keys, told["small"], told["large"], strict=True)
    ]
    kept = told.assign(larger=np.array(won) < 0)[~np.isnan(won)]
    sure = np.maximum(kept["odds"], 1 - kept["odds"])
    right = (kept["odds"] > 0.5) == kept["larger"]
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.0)):
        part = (sure > low) & (sure <= high)
        said = f"{right[part].mean():.0%} right, {sure[part].mean():.0%} expected" if part.any() else "none"
        rows.append([f"odds of {low:.0%} to {high:.0%} ({part.sum()} pairs)", said])
    return markdown(["over all pairs", "found"], rows)


def usual_rate(grid: pd.DataFrame) -> pd.Series:
    """The recipe's rate of each student: the middle one of those that were tried."""
    return grid.groupby("student")["learning_rate"].transform(lambda rates: sorted(rates.unique())[1])


def slopes_table(slopes: dict[str, Slope]) -> str:
    """What each slope is, its p against zero, and what is established."""
    rows = [[name, str(s), f"{s.p:.2g}", s.sign + (", small" if s.small else "")] for name, s in slopes.items()]
    return markdown(["quantity", "nats per unit of log teacher size", "p", "established"], rows)


def loss_table(frame: pd.DataFrame) -> str:
    """Question 6, a row a measure."""
    measures = {"student_loss_ood": ("student_loss_ood", -1)}
    for task in ("pico_cloze", "pico_next"):
        if f"metrics/{task}" in frame:
            measures[task] = (f"metrics/{task}", 1)
    frame, rows = frame[frame["teacher_params"] > 1.02 * frame["student_params"]], []
    for name, (column, better) in measures.items():
        found = one_loss(frame, column, better=better)
        rows.append([name, *(f"{found[k]:.4f}" for k in ("discordant", "across", "own", "excess"))])
        rows[-1] += [f"{found['excess_low']:.4f} to {found['excess_high']:.4f}"]
        mended = excess(frame, column, better=better)
        rows[-1] += [f"{mended['excess']:.4f} ({mended['excess_low']:.4f} to {mended['excess_high']:.4f})"]
        rows[-1] += [f"{found['regret']:.4f} of {found['range']:.4f}"]
    return markdown(
        ["measure", "discordant", "across", "own", "excess", "95 %", "excess, corrected", "regret of range"], rows
    )


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
