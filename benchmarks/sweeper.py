"""Claim: the grid sweeper adds less than 50 ms a cell, less than Hydra's own sweeper with its basic launcher.

    python -m benchmarks.sweeper [--repeats 5] [--out results/sweeper.csv]      about three minutes

60 cells are composed, resolved and planned, and one cell is, by the grid sweeper and by Hydra's basic one with its
basic launcher (which does the same cell by cell); the difference over 59 is what a cell costs. Nothing is computed.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
ONE = ["student=30k", "teacher=55k", "seed=0"]
MANY = ["student=30k,35k,40k,45k,50k", "teacher=55k,80k,120k,180k,270k,400k", "seed=0,1"]
WAYS = {"ours": [], "hydra": ["hydra/sweeper=basic", "hydra/launcher=basic"]}


def seconds(arguments: list[str]) -> float:
    """How long `python run.py -m … plan=true` takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run.py"), "-m", *arguments, "plan=true", f"store={folder}/store"]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=folder)  # Hydra leaves a multirun.yaml
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    given = parser.parse_args()
    rows = []
    for _ in range(given.repeats):
        row = {}
        for way, extra in WAYS.items():
            row[way] = 1000 * (seconds([*MANY, *extra]) - seconds([*ONE, *extra])) / 59
        rows.append({**row, "ratio": row["ours"] / row["hydra"]})
    table = pd.DataFrame(rows).agg(["median", "min", "max"]).T
    table.index = ["ours, ms a cell", "Hydra basic, ms a cell", "ratio"]
    print(table.to_string(float_format="{:.2f}".format))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    if given.out:
        table.to_csv(given.out, float_format="%.3g")


if __name__ == "__main__":
    main()
