"""Claim: after one calibration cell, `plan` predicts what a grid takes to ±30 %.

    python -m benchmarks.plan [--sweep quick] [--out results/plan.csv]      about six minutes on two cores

One cell of the sweep is computed, the rest is planned, then run; predicted and actual seconds, of all workers together
and on the clock.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
UNITS = {"s": 1, "min": 60, "h": 3600}


def run(*arguments: str) -> tuple[str, float]:
    """Output and seconds of `python run.py …`."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout, time.perf_counter() - began


def walls(store: Path) -> float:
    """Seconds of all stages in the store."""
    return sum(json.loads(f.read_text())["wall_s"] for f in store.glob("*/*/stage.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default="quick")
    parser.add_argument("--calibrate", nargs="*", default=["student=40k", "teacher=80k"], help="the first cell")
    parser.add_argument("--out", type=Path, help="CSV for the row")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        sweep = [f"+sweeps={given.sweep}", f"store={store}", "tracking=disabled"]
        run("-m", *sweep, *given.calibrate)
        before = walls(store)
        text, _ = run("-m", *sweep, "plan=true")
        found = re.search(r"FLOPs, ([\d.]+) (\w+) of one worker, about ([\d.]+) (\w+) with", text)
        assert found, text
        said = [float(found[i]) * UNITS[found[i + 1]] for i in (1, 3)]
        _, clock = run("-m", *sweep)
        took = [walls(store) - before, clock]
    row = {
        "sweep": given.sweep,
        "planned worker s": said[0],
        "actual worker s": took[0],
        "ratio, workers": said[0] / took[0],
        "planned wall s": said[1],
        "actual wall s": took[1],
        "ratio, wall": said[1] / took[1],
    }
    table = pd.DataFrame([row])
    print(table.T.to_string(header=False, float_format="{:.3g}".format))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
