"""Claim: the form that best predicts the costliest tenth of public runs from the others also predicts costlier ones.

    python -m benchmarks.outside_surfaces FOLDER --out results/outside_surfaces.csv [--open]     a minute

FOLDER holds `farseer_scaling_law-train.parquet` and `-test.parquet`: the Farseer grid as packed by ScaleBench
(Li et al. 2026, arXiv 2604.22753), CC BY 4.0, of which no copy is kept here. The 404 runs choose a form
(`select_surface`); its seven costlier runs, and a nine-parameter law's R² of 0.91 on them, were published by others.
`--open` reads the seven. They were read once, after the choice was committed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from capacity_gap.fit import fit_surface, select_surface
from capacity_gap.surfaces.selection import OF_TEXT, foretold

NAME = "farseer_scaling_law"
COLUMNS = {"N": "student_params", "D": "data_tokens"}


def rows_of(folder: Path, *, opened: bool) -> list[dict[str, object]]:
    """How well each form predicted the costliest tenth; with `opened` also the seven."""
    runs = pd.read_parquet(folder / f"{NAME}-train.parquet").rename(columns=COLUMNS)
    found = select_surface(runs, bootstraps=0)
    rows = [
        {"runs": f"costliest {found.foretold} of {len(runs)}", "form": t.form, "chosen": t.form == found.surface.form}
        | {"mean_error": t.error, "largest_error": t.largest, "r2": t.r2}
        for t in found.trials
    ]
    if opened:
        held = pd.read_parquet(folder / f"{NAME}-test.parquet").rename(columns=COLUMNS)
        for form in OF_TEXT:
            error, largest, r2 = foretold(fit_surface(runs, form, bootstraps=0, permutations=0), held)
            row = {"runs": f"the {len(held)} held out", "form": form, "chosen": form == found.surface.form}
            rows.append(row | {"mean_error": error, "largest_error": largest, "r2": r2})
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--open", action="store_true", help="read the held-out runs too")
    given = parser.parse_args(words)
    table = pd.DataFrame(rows_of(given.folder, opened=given.open))
    print(table.to_string(index=False))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
