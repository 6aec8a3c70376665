"""Which cut damages a real model least: SmolLM2-135M-Instruct (4-bit weights) at 110M and 80M parameters.

    python -m benchmarks.real_cut --teacher SmolLM2-135M-Instruct.Q4_1.gguf --store STORE [--workers 6]
    python -m benchmarks.real_cut --records STORE --out results/real_cut.csv

The first command prints and runs its grids (about ten minutes on one H200 with six workers; a stopped one goes on),
the second makes the table. Width: all seven scores, two sets of calibration sequences. Depth: three ways to choose
layers, moderate and deep cuts. Then 1M tokens of distillation from the same teacher on the embedded prose.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd

from capacity_gap import records

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    "corpus=embedded",
    "corpus.sequence_length=256",
    "tracking=disabled",
    "train.recipe=small",
    "train.batch_size=64",
    "evaluate.tokens=50000",
    "evaluate.ood_tokens=20000",
    "prune.shape=per_teacher",
    "prune.batches=32",
    "prune.batch_size=8",
)
METHODS = "prune.method=expressive,random,magnitude,taylor,movement,activation,wanda"
LAYERS = "prune.layers=symmetric,block_influence,loss_increase"
GRIDS = (
    f"student=110m,80m {METHODS} prune.calibration=0,1 data=0",
    f"student=80m prune.depth=22,15 {LAYERS} prune.calibration=0,1 data=0",
    f"student=110m prune.depth=26,23 {LAYERS} prune.calibration=0,1 data=0",
    f"student=80m {METHODS} data=1m",
    "student=110m prune.method=expressive,random,wanda data=1m",
    f"student=80m prune.depth=22,15 {LAYERS} data=1m",
    f"student=110m prune.depth=26,23 {LAYERS} data=1m",
)
WIDTH = "width"


def run(teacher: Path, store: Path, workers: int) -> None:
    """Runs every grid, one after the other."""
    pool = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"] if workers > 1 else []
    for grid in GRIDS:
        words = [f"teacher={teacher}", f"store={store}", *COMMON, *pool, *grid.split()]
        print("python run.py -m", shlex.join(words), flush=True)
        subprocess.run([sys.executable, str(ROOT / "run.py"), "-m", *words], check=True)


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a way to cut: the loss right after it by calibration set, and after 1M tokens."""

    def said(name: str) -> pd.Series:
        return frame["settings"].map(lambda text: (re.findall(rf"prune\.{name}=(\d+)", text) or ["0"])[0]).astype(int)

    depth = said("depth")
    rows = frame.assign(
        layers=depth.where(depth > 0, 30),
        chosen=frame["prune_layers"].fillna("symmetric").where(depth > 0, WIDTH),
        calibration=said("calibration"),
    )
    keys = ["student", "layers", "chosen", "prune_method"]
    found = []
    for key, group in rows.groupby(keys, sort=True):
        first, second = (group[group["calibration"] == c]["init_loss"].min() for c in (0, 1))
        trained = group[group["data_tokens"] > 0]
        row = dict(zip(keys, key, strict=True)) | {"student_params": int(group["student_params"].iloc[0])}
        row |= {"cut": first, "cut, other calibration": second}
        row |= {"after 1M tokens": trained["student_loss"].min(), "stderr": trained["student_loss_stderr"].min()}
        found.append(row)
    whole = frame[["teacher_loss", "device"]].iloc[0]
    return pd.DataFrame(found).assign(teacher_loss=whole["teacher_loss"], device=whole["device"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="the .gguf file")
    parser.add_argument("--store", type=Path, help="where the cells are")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--records", type=Path, help="a store, or a CSV of its records, to make the table from")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.teacher:
        run(given.teacher, given.store, given.workers)
        return
    rows = pd.read_csv(given.records) if given.records.suffix == ".csv" else pd.DataFrame(records.read(given.records))
    found = table(rows)
    print(found.to_string(index=False, float_format="{:.3f}".format))
    if given.out:
        found.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
