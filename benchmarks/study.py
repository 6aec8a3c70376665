"""Every figure and number of the pico study, from its records.

    python -m benchmarks.study export STORE [--data 0,300k]     copy the study's cells out of a store, to results/pico/
    python -m benchmarks.study figures      law.json, arms.json, docs/study_*.png, the tables in the pages

Tables stand in the pages between `<!-- NAME -->` and `<!-- /NAME -->`; a test makes them again and compares.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.intervals import interval
from benchmarks.study_arms import Arm, arms_of
from capacity_gap import records
from capacity_gap.fit.law import LawFit
from capacity_gap.report.plots import plot_curves, plot_law, save_figure
from capacity_gap.scales import format_scale, parse_scale

ROOT = Path(__file__).resolve().parent.parent
RECORDS, PAGES = ROOT / "results" / "pico", (ROOT / "docs" / "study.md", ROOT / "README.md")
DROPPED = ("error", "git_commit", "micro_batch", "created", "schema_version", "peak_memory_bytes", "ranks")
SMALL, LARGE = 120_200, 899_712  # the ends of what every student of the confound was distilled from
NOT_YET = "Not run yet."


def export(store: str, budgets: list[int]) -> None:
    """One CSV for each sweep of the study, sorted, without what only the machine knows; all budgets, or some."""
    from capacity_gap import store_tools

    frame = records.load(store)
    for name, cells in store_tools.sweeps(store_tools.open_store(store)).items():
        mine = frame[("record/" + frame["cell"]).isin(list(cells)) & (frame["status"] == "done")]
        mine = mine[mine["data_tokens"].isin(budgets)] if budgets else mine
        if not name.startswith("study_") or mine.empty:
            continue
        mine = mine.drop(columns=list(DROPPED)).dropna(axis=1, how="all").sort_values("cell")
        RECORDS.mkdir(parents=True, exist_ok=True)
        mine.to_csv(RECORDS / f"{name}.csv", index=False, float_format="%.6g")
        print(f"{name}: {len(mine)} cells")


def load() -> pd.DataFrame:
    """The study's cells, each once."""
    return records.load(RECORDS).drop_duplicates("cell").reset_index(drop=True)


# Tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, or what stands in its place while nothing of it has run."""
    if not rows:
        return NOT_YET
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)])


def within(interval: tuple[float | None, float | None] | None, form: str) -> str:
    """An interval in words; … where an end is open."""
    low, high = ("…" if v is None else format(v, form) for v in interval or (None, None))
    return f"{low} to {high}"


def estimate(value: float | None, interval: tuple[float, float] | None) -> str:
    """A number with its interval, or a dash."""
    return "–" if value is None else f"{value:.2f} ({within(interval, '.2f')})"


def optima_table(arms: list[Arm]) -> str:
    """One row a curve: optimum, interval, status, and how much worse the largest teacher is than the best."""
    head = ["arm", "student", "tokens", "teachers", "status", "best teacher", "95 % interval", "ratio"]
    rows = []
    for arm in arms:
        curses = {(c.student, c.data_tokens): c for c in arm.law.curses}
        for o in sorted(arm.law.optima, key=lambda o: (o.data_tokens or 0, o.student_params)):
            best = "–" if o.teacher_params is None else f"{o.teacher_params:,.0f}"
            ratio = "–" if o.ratio is None else f"{o.ratio:.2f}"
            c = curses.get((o.student, o.data_tokens))
            excess = f"{c.excess:.3f} ({within(c.interval, '.3f')})" if c else "–"
            place = [arm.name, o.student, format_scale(o.data_tokens or 0), str(o.teachers), o.status]
            rows.append([*place, best, within(o.interval, ",.0f"), ratio, excess])
    return markdown([*head, "largest − best, nats"], rows)


def laws_table(arms: list[Arm]) -> str:
    """One row an arm, data scale, axis and method: the ratio with its null, its outer rungs and its two tests."""
    head = ["arm", "tokens", "parameters", "method", "status", "ratio (95 %)", "without outer rungs", "permutation p"]
    rows = []
    for arm in arms:
        for tokens in [*arm.budgets, *(["all"] if len(arm.budgets) > 1 else [])]:
            for axis, method in (("total", "asymmetric"), ("non_embedding", "asymmetric"), ("total", "argmin")):
                law = arm.fit(tokens, axis, method)
                said = [arm.name, tokens if tokens == "all" else format_scale(int(tokens)), axis, method, law.status]
                rows.append([*said, estimate(law.ratio, law.ratio_interval), *_beside(law)])
    return markdown([*head, "b (95 %)", "p of b = 1", "p of r = 2.5"], rows)


def _beside(law: LawFit) -> list[str]:
    outer = estimate(law.without_outer_rungs, law.without_outer_interval)
    tests = [f"{law.tests[t]:.3f}" if t in law.tests else "–" for t in ("b = 1", "r = 2.5")]
    return [outer, "–" if law.null_p is None else f"{law.null_p:.3f}", estimate(law.slope, law.slope_interval), *tests]


def teachers_table(frame: pd.DataFrame) -> str:
    """The teachers' own held-out losses, mean and standard deviation over seeds, for each way to train them."""
    taught = frame[(frame["family"] == "pico") & (frame["corpus"] == "embedded")]
    each = taught.drop_duplicates(["teacher", "teacher_data", "teacher_seed"])
    rows = [
        [str(policy), f"{params:,.0f}", f"{losses.mean():.3f}", f"{losses.std():.3f}"]
        for (policy, params), losses in each.groupby(["teacher_data", "teacher_params"])["teacher_loss"]
    ]
    return markdown(["tokens", "teacher", "loss", "standard deviation"], rows)


# Contrasts, paired by seed


def shown(values: np.ndarray) -> str:
    """Mean ± half of the interval."""
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def rise(frame: pd.DataFrame) -> pd.Series:
    """Loss under the largest teacher less that under the 120k one, for each seed (its teachers are its own)."""
    table = frame.pivot_table(index="seed", columns="teacher_params", values="student_loss")
    return (table[LARGE] - table[SMALL]).dropna() if {LARGE, SMALL} <= set(table) else pd.Series(dtype=float)


def confound_table(arms: list[Arm]) -> str:
    """What a teacher 7.5 times as large costs a student, by the student's start: pruned from it, or held fixed."""
    starts = {a.frame["init"].iloc[0]: a.frame for a in arms if a.differs <= {"init"}}
    rows = []
    if "pruned" in starts:
        pruned = starts["pruned"]
        for (tokens, _, student), cells in pruned.groupby(["data_tokens", "student_params", "student"]):
            row = [str(student), format_scale(int(tokens)), shown(rise(cells).to_numpy()) if len(rise(cells)) else "–"]
            for init in ("random", "shared"):
                held = starts.get(init, pruned[:0])
                held = held[(held["student"] == student) & (held["data_tokens"] == tokens)]
                both = pd.concat([rise(cells), rise(held)], axis=1, keys=["pruned", "held"]).dropna()
                left = [both["held"], both["pruned"] - both["held"]] if len(both) else []
                row += [shown(v.to_numpy()) for v in left] or ["–", "–"]
            if row[3:] != ["–"] * 4:
                rows.append(row)
    head = ["student", "tokens", "pruned from each teacher", "random start", "difference", "shared start", "difference"]
    return markdown(head, rows)


def direct_table(frame: pd.DataFrame) -> str:
    """Direct training less distillation under each curve's best teacher, from the same random start, by seed."""
    random = frame[(frame["init"] == "random") & (frame["teacher_data"] == "1m")]
    direct, taught = random[random["kd_weight"] == 0], random[random["kd_weight"] == 0.5]
    rows = []
    for (tokens, _, student), cells in direct.groupby(["data_tokens", "student_params", "student"]):
        theirs = taught[(taught["student"] == student) & (taught["data_tokens"] == tokens)]
        if theirs.empty:
            continue
        best = theirs.groupby("teacher")["student_loss"].mean().idxmin()
        ours = theirs[theirs["teacher"] == best].set_index("seed")["student_loss"]
        gain = (cells.set_index("seed")["student_loss"] - ours).dropna()
        losses = [f"{cells['student_loss'].mean():.3f}", f"{ours.mean():.3f}"]
        rows.append([str(student), format_scale(int(tokens)), losses[0], str(best), losses[1], shown(gain.to_numpy())])
    return markdown(["student", "tokens", "direct", "best teacher", "distilled", "direct − distilled"], rows)


def luck_table(frame: pd.DataFrame) -> str:
    """Standard deviations of a loss over the teacher's seed and over the student's, where both were crossed."""
    rows = []
    main = frame[(frame["data_tokens"] > 0) & (frame["init"] == "pruned") & (frame["kd_weight"] == 0.5)]
    main = main[(main["family"] == "pico") & (main["teacher_data"] == "1m") & (main["corpus"] == "embedded")]
    for (student, teacher_params, tokens), cells in main.groupby(["student", "teacher_params", "data_tokens"]):
        table = cells.pivot_table(index="teacher_seed", columns="seed", values="student_loss").dropna()
        if min(table.shape) > 1:
            spread = [table.mean(1).std(), table.mean(0).std(), remainder(table.to_numpy())]
            place = [str(student), format_scale(int(tokens)), f"{teacher_params:,.0f}"]
            rows.append([*place, *(f"{v:.4f}" for v in spread)])
    return markdown(["student", "tokens", "teacher", "over teachers", "over students", "rest"], rows)


def remainder(table: np.ndarray) -> float:
    """Standard deviation of what neither the row nor the column of a two-way table explains."""
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return float(np.sqrt((rest**2).sum() / (table.shape[0] - 1) / (table.shape[1] - 1)))


# Pages


def pages(frame: pd.DataFrame, arms: list[Arm]) -> dict[str, str]:
    """The tables of the pages, by name."""
    trained = [a for a in arms if a.budgets != [0]]
    main = next(a for a in trained if not a.differs)
    teachers = frame.drop_duplicates(["family", "teacher", "teacher_data", "teacher_seed", "corpus"])
    return {
        "cells": f"{len(frame)} cells under {len(teachers)} teachers.",
        "teachers": teachers_table(frame),
        "start": optima_table([a for a in arms if a.budgets == [0]]),
        "optima": optima_table(trained),
        "laws": laws_table(trained),
        "confound": confound_table(trained),
        "direct": direct_table(frame),
        "luck": luck_table(frame),
        "verdict": f"> {main.law.verdict()}",
    }


def filled(text: str, tables: dict[str, str]) -> str:
    """A page with each table that it has a place for."""
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda m, t=table: m[1] + t + "\n" + m[2], text)  # type: ignore[misc]
    return text


def figures() -> None:
    """Writes everything that is published."""
    frame = load()
    arms = arms_of(frame)
    tables = pages(frame, arms)
    if missing := [n for n in tables if not any(f"<!-- {n} -->" in page.read_text() for page in PAGES)]:
        raise SystemExit(f"no page has a place for {', '.join(missing)}: <!-- NAME --> … <!-- /NAME -->")
    for page in PAGES:
        page.write_text(filled(page.read_text(), tables))
    main = next(a for a in arms if not a.differs and a.budgets != [0])
    main.law.save(RECORDS / "law.json")
    fits = {f"{a.name}, {n}": json.loads(a.fit(n).to_json()) | {"draws": []} for a in arms for n in a.budgets}
    (RECORDS / "arms.json").write_text(json.dumps(fits, indent=1) + "\n")
    for arm in arms:
        if arm.budgets != [0]:
            _draw(plot_curves(arm.located), f"study_curves{arm.suffix}")
    _draw(plot_law(main.law), "study_law")
    print(main.law.summary())


def _draw(figure, name: str) -> None:  # type: ignore[no-untyped-def]
    save_figure(figure, ROOT / "docs" / name)
    (ROOT / "docs" / f"{name}.svg").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "figures"))
    parser.add_argument("store", nargs="?")
    parser.add_argument("--data", default="", help="only these budgets, such as 0,300k")
    given = parser.parse_args()
    if given.what == "export":
        if not given.store:
            parser.error("export needs the STORE")
        export(given.store, [parse_scale(d, key="--data", allow_zero=True) for d in given.data.split(",") if d])
    else:
        figures()


if __name__ == "__main__":
    main()
