"""Records as rows and as tables: read from a store, from files, or from W&B."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.records.record import NESTED, columns
from capacity_gap.records.tables import read_csv, read_parquet
from capacity_gap.settings.errors import UserError, choose
from capacity_gap.settings.places import user_path
from capacity_gap.store.contents import sweeps
from capacity_gap.store.files import CHECKSUM, RECORD, is_store, read_all
from capacity_gap.store.stage import Store

if TYPE_CHECKING:
    import pandas as pd


BESIDE_SCORES = ("stderr", "shots", "higher_is_better")  # what a table tells of a score, in columns of their own


def scores_of(frame: "pd.DataFrame") -> list[str]:
    """The columns of a table that are a benchmark's first score: `metrics/<task>`."""
    return [c for c in map(str, frame.columns) if c.startswith("metrics/") and c.count("/") == 1]


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Every record of a store, finished cells and failed ones, ordered by cell; damaged ones are left out and named."""
    root = Path(folder)
    files = [*root.glob(f"record/[!.]*/{RECORD}"), *root.glob("failed/[!.]*.json")]
    rows = (row for _, row in read_all(root, files, {"cell": str, "status": str}, check=_check_nested))
    kept = ({k: v for k, v in row.items() if k != CHECKSUM} for row in rows)
    return sorted(kept, key=lambda r: (r["cell"], r["status"]))


def _check_nested(file: Path, row: dict[str, Any]) -> None:
    """Raises where the scores or versions of a record have not the form that tables are made from."""
    for kind in ("metrics", "teacher_metrics"):
        for score in (row.get(kind) or {}).values():
            _ = score["value"], score.get("stderr")
    (row.get("versions") or {}).items()


def to_frame(records: Iterable[dict[str, Any]]) -> "pd.DataFrame":
    """One row per record; scores in columns `metrics/<task>`, `…/stderr`, `…/shots` and `…/higher_is_better`."""
    import pandas as pd

    rows = []
    for record in records:
        row = {k: v for k, v in record.items() if k not in NESTED}
        for kind in ("metrics", "teacher_metrics"):
            for task, score in (record.get(kind) or {}).items():
                row[f"{kind}/{task}"] = score["value"]
                row |= {f"{kind}/{task}/{of}": score.get(of) for of in BESIDE_SCORES}
        rows.append(row | {f"version/{k}": v for k, v in (record.get("versions") or {}).items()})
    known = [name for name in columns() if name not in NESTED]
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*known, *[c for c in frame.columns if c not in known]])


NUMERIC = re.compile(r"^(int|float)\b")
LABELS = ("seed", "teacher_seed")  # nothing computes with them: `seed0` does as well
NUMBERS = frozenset(c.name for c in columns().values() if NUMERIC.search(c.kind) and c.name not in LABELS)
SCORED = re.compile(r"(teacher_)?metrics/")


def is_flag(name: str) -> bool:
    """Whether a column must hold true or false."""
    return bool(SCORED.match(name)) and name.endswith("/higher_is_better")


def is_number(name: str, frame: "pd.DataFrame") -> bool:
    """Whether a column must hold numbers. `loss` is a name in our records, and a number elsewhere."""
    if name == "loss":
        return bool(frame[name].dropna().astype(str).str.match(r"\s*[-+.]?\d").any())
    return name in NUMBERS or (bool(SCORED.match(name)) and not is_flag(name))


COLUMNS: dict[str, Any] = {"is_flag": is_flag, "is_number": is_number}  # what tables of records hold


def load(source: str | Path) -> "pd.DataFrame":
    """Records as a table, from a store, a folder of CSVs, a CSV file, a parquet file or `wandb:entity/project`.

    Raises:
        UserError: there is nothing of the kind at `source`.
    """
    import pandas as pd

    if str(source).startswith("wandb:"):
        from capacity_gap.records.wandb_rows import load_rows

        return to_frame(load_rows(str(source)))
    path = user_path(source)
    if path.is_file():
        return read_parquet(path, **COLUMNS) if path.suffix == ".parquet" else read_csv(path, **COLUMNS)
    if is_store(path):
        return to_frame(read(path))
    tables = sorted(path.glob("*.csv")) if path.is_dir() else []
    if not tables:
        raise UserError(
            f"{source} contains no records. Pass a store (a folder with store.json), a folder of CSV files, "
            "a .csv or a .parquet file, or wandb:entity/project."
        )
    return pd.concat([read_csv(t, **COLUMNS) for t in tables], ignore_index=True)


def sweep_frame(store: Store, name: str) -> "pd.DataFrame":
    """The records of one grid's cells, done and failed.

    Raises:
        ConfigError: there is no such grid; the message lists those that are there.
    """
    known = sweeps(store)
    choose("--sweep", name, known)
    frame = to_frame(read(store.root))
    return frame[("record/" + frame["cell"].astype(str)).isin(list(known[name]))]
