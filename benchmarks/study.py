"""Every figure and number of the pico study, from its records.

    python -m benchmarks.study export STORE [--data 0,300k]     copy the study's cells out of a store, to results/pico/
    python -m benchmarks.study figures      law.json, joint.json, arms.json, docs/study_*.png, the tables in the pages

Tables stand in the pages between `<!-- NAME -->` and `<!-- /NAME -->`; a test makes them again and compares.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.study_arms import Arm, arms_of, main_of
from benchmarks.study_elsewhere import (
    elsewhere,
    elsewhere_table,
    prices_table,
    shapes_table,
    together,
    unpruned_surface,
    unpruned_table,
)
from benchmarks.study_joint import PAIR, joint_of, odds_table, standing_table, weights_table
from benchmarks.study_surface import contour_table, forecast_table, surface_of, surface_table
from benchmarks.study_tables import (
    argmin_table,
    budget_table,
    contrasts_table,
    direct_table,
    factors_table,
    laws_table,
    markdown,
    optima_table,
    ratios_table,
    seed_variance_table,
    teachers_table,
)
from capacity_gap import records
from capacity_gap.fit import JointFit, SurfaceFit
from capacity_gap.report.joint_tables import best_table, even_table, plot_joint
from capacity_gap.report.plots import plot_curves, plot_law, save_figure
from capacity_gap.settings.scales import parse_scale

ROOT = Path(__file__).resolve().parent.parent
DIGITS = 8  # significant ones of published numbers: the last of sixteen differ between processors
RECORDS, PAGES = ROOT / "results" / "pico", (ROOT / "docs" / "study.md",)
DRAWN = ("main", "random start", "shared start, cut from 120k", "teachers at 2x tokens")
DROPPED = ("error", "git_commit", "micro_batch", "created", "schema_version", "peak_memory_bytes", "ranks")


def export(store: str, budgets: list[int]) -> None:
    """One CSV for each sweep of the study, sorted, without machine-specific columns; all budgets, or some."""
    from capacity_gap.store import contents

    frame = records.load(store)
    for name, cells in contents.sweeps(contents.open_store(store)).items():
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
    frame = records.load(RECORDS).drop_duplicates("cell").reset_index(drop=True)
    return frame.assign(reference=frame["reference"].fillna("") if "reference" in frame else "")


# Pages


def pages(
    frame: pd.DataFrame, arms: list[Arm], surface: SurfaceFit | None = None, joint: JointFit | None = None
) -> dict[str, str]:
    """The tables of the pages, by name. `surface`, `joint`: of the main arm, fitted here if they are not given."""
    trained, main = [a for a in arms if a.budgets != [0]], main_of(arms)
    surface, joint = surface or surface_of(main), joint or joint_of(main)
    teachers = frame.drop_duplicates(["family", "teacher", "teacher_data", "teacher_seed", "corpus"])
    return {
        "cells": f"{len(frame)} cells under {len(teachers)} teachers.",
        "teachers": teachers_table(frame),
        "start": optima_table([a for a in arms if a.budgets == [0]]),
        "optima": optima_table(trained),
        "ratios": ratios_table(main),
        "surface": surface_table(surface),
        "contour": contour_table(surface, main),
        "forecast": forecast_table(main),
        "joint": markdown(*best_table(joint)),
        "even": markdown(*even_table(joint, PAIR)),
        "odds": odds_table(main),
        "weights": weights_table(arms),
        "standing": standing_table(joint, main),
        "argmin": argmin_table(main),
        "unpruned": unpruned_table(main),
        "unpruned_surface": unpruned_surface(main, surface),
        "elsewhere": elsewhere_table(arms),
        "prices": prices_table(arms),
        "shapes": shapes_table(arms),
        "laws": laws_table(trained),
        "budget": budget_table(main),
        "contrasts": contrasts_table(trained),
        "factors": factors_table(trained),
        "direct": direct_table(frame),
        "luck": seed_variance_table(frame),
        "verdict": f"> {main.law.verdict()}",
    }


def filled(text: str, tables: dict[str, str]) -> str:
    """A page with each of its marked tables filled in."""
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda m, t=table: m[1] + t + "\n" + m[2], text)  # type: ignore[misc]
    return text


def save_fit(file: Path, text: str, indent: int | None = 1) -> None:
    """Writes the JSON of a fit with rounded numbers."""
    file.write_text(json.dumps(_rounded(json.loads(text)), indent=indent) + "\n")


def _rounded(value: Any) -> Any:
    """Numbers rounded to the digits that all machines reproduce."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _brief(law: dict[str, Any]) -> dict[str, Any]:
    """A law without its draws and the cells of its curves."""
    return law | {"draws": [], "optima": [{k: v for k, v in o.items() if k != "tried"} for o in law["optima"]]}


def figures() -> None:
    """Writes everything that is published."""
    frame = load()
    arms = arms_of(frame)
    main = main_of(arms)
    surface, joint = surface_of(main), joint_of(main)
    tables = pages(frame, arms, surface, joint)
    if missing := [n for n in tables if not any(f"<!-- {n} -->" in page.read_text() for page in PAGES)]:
        raise SystemExit(f"no page has markers for {', '.join(missing)}: <!-- NAME --> … <!-- /NAME -->")
    for page in PAGES:
        page.write_text(filled(page.read_text(), tables))
    fits = {f"{a.name}, {n}": _brief(json.loads(a.fit(n).to_json())) for a in arms for n in a.budgets}
    published = {"law": main.law.to_json(), "surface": surface.to_json(), "joint": joint.to_json()}
    for name, found in (published | {"arms": json.dumps(fits)}).items():
        indent = None if name == "surface" else 1  # its draws would take a line a number
        save_fit(RECORDS / f"{name}.json", found, indent)
    for arm in arms:
        if arm.budgets != [0] and arm.name in DRAWN:
            draw(plot_curves(arm.located), f"study_curves{arm.suffix}")
    if families := [a for a in elsewhere(arms) if a.differs == {"family"}]:
        draw(plot_curves(together(families).located), "study_curves_architectures")
    draw(plot_law(main.law), "study_law", dpi=130)
    draw(plot_joint(joint), "study_joint", dpi=130)
    print(main.law.summary(), surface.summary(), sep="\n\n")


def draw(figure: Figure, name: str, dpi: int = 85) -> None:
    """Writes docs/NAME.png alone: a vector drawing of so many points is larger."""
    save_figure(figure, ROOT / "docs" / name, dpi=dpi)
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
