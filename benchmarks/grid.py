"""Claim: a grid that shares every common stage costs a fraction of one that does not.

    python -m benchmarks.grid [--tokens 20k] [--out results/grid.csv]       about twenty minutes on two cores

5 students × 6 teachers × 2 seeds, teachers and students trained on equally many tokens. Every cell is computed three
times in one process, in turn: in a store of its own (nothing shared but the tokenised corpus), in one that is given its
teacher, and in the store of the grid.
"""

import argparse
import itertools
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks.chaos import tiny_corpus
from capacity_gap.cell import pipeline
from capacity_gap.cell.config import from_hydra, register
from capacity_gap.runtime.process import Runtime
from capacity_gap.store.stage import Store, closure

ROOT = Path(__file__).resolve().parent.parent
STUDENTS, TEACHERS, SEEDS = ("30k", "35k", "40k", "45k", "50k"), ("55k", "80k", "120k", "180k", "270k", "400k"), (0, 1)
WAYS = ("nothing shared", "teachers shared", "grid")


def compose(overrides: list[str]):
    """The validated settings that `run.py` would get."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(hydra_compose("config", overrides=overrides))


def give(source: Store, target: Store, stages) -> None:
    """Copies finished stages from one store to another."""
    target.create()
    for stage in stages:
        if not target.path(stage).exists():
            shutil.copytree(source.path(stage), target.path(stage))


def compute(cell, store: Store) -> float:
    """Seconds for a cell in `store`."""
    began = time.perf_counter()
    store.compute(cell.record, Runtime())
    return time.perf_counter() - began


def flops(cell, store: Store) -> float:
    """What a cell would cost in `store` now."""
    return sum(s.cost for s in store.missing(cell.record).values())


def measure(place: Path, given: list[str]) -> pd.DataFrame:
    """One row a cell: seconds and FLOPs each way."""
    grid, rows = Store(place / "grid"), []
    combinations = list(itertools.product(SEEDS, TEACHERS, STUDENTS))
    for number, (seed, teacher, student) in enumerate(combinations):
        cell = pipeline.resolve(compose([*given, f"student={student}", f"teacher={teacher}", f"seed={seed}"]))
        grid.create()
        grid.compute(cell.tokens, Runtime())  # the corpus is given to all
        common = list(closure(cell.tokens).values())
        trained = [*common, *closure(cell.teacher).values()]
        row = {"student": student, "teacher": teacher, "seed": seed}
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            store = grid if way == "grid" else Store(place / "alone")
            if way != "grid":
                give(grid, store, common)
            if way == "teachers shared":
                teachers = Store(place / "teachers")
                began = time.perf_counter()
                teachers_cost = 0.0 if teachers.has(cell.teacher) else cell.teacher.cost
                give(grid, teachers, common)
                teachers.compute(cell.teacher, Runtime())
                row[f"s, {way}"] = time.perf_counter() - began
                row[f"FLOPs, {way}"] = teachers_cost
                give(teachers, store, trained)
            row[f"FLOPs, {way}"] = row.get(f"FLOPs, {way}", 0.0) + flops(cell, store)
            row[f"s, {way}"] = row.get(f"s, {way}", 0.0) + compute(cell, store)
            if way != "grid":
                shutil.rmtree(store.root)
        rows.append(row)
        print(f"{number + 1}/{len(combinations)} " + " ".join(f"{row[f's, {w}']:.2f}" for w in WAYS), flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="20k", help="of every teacher and every student")
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        given = [*tiny_corpus(place), f"data={asked.tokens}", f"family.teacher_data={asked.tokens}"]
        cells = measure(place, given)
    rows = []
    for other in WAYS[:2]:
        halves = cells.groupby("seed")[[f"s, {other}", "s, grid"]].sum()
        ratios = halves[f"s, {other}"] / halves["s, grid"]
        rows.append(
            {
                "against": other,
                "wall ratio": cells[f"s, {other}"].sum() / cells["s, grid"].sum(),
                "FLOPs ratio": cells[f"FLOPs, {other}"].sum() / cells["FLOPs, grid"].sum(),
                "wall ratio, first seed": ratios.iloc[0],
                "wall ratio, second seed (its teachers are there)": ratios.iloc[1],
            }
        )
    table = pd.DataFrame(rows)
    print(table.T.to_string(header=False, float_format="{:.2f}".format))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if asked.out:
        table.to_csv(asked.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
