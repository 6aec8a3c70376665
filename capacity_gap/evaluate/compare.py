"""Models beside one another: what `python -m capacity_gap compare` makes of the tables of `evaluate --out`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.evaluate.other_models import SETTINGS, score_rows
from capacity_gap.evaluate.task_scores import Score, as_metrics
from capacity_gap.records.load import BESIDE_SCORES
from capacity_gap.records.tables import PLAIN, boolean, write_csv
from capacity_gap.settings.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

WAY = tuple(name for name in SETTINGS if name != "train_flops")  # what makes a row: which model, scored how
WHOLE, REAL = ("params", "batch_size", "limit", "shots", "samples"), ("train_flops", "value", "stderr")


def compare(files: Sequence[Path], out: Path | None = None) -> int:
    """Prints one row a model; writes the same with everything that is known to a CSV if asked."""
    found = table(files)
    print(_shown(found).to_string(index=False, na_rep="–"))
    if out:
        write_csv(found, out)
        print(f"\nwritten: {out}")
    return 0


def table(files: Iterable[Path]) -> "pd.DataFrame":
    """One row for each model and way of scoring it: its settings, and `metrics/<task>` with what stands beside it.

    A task that was scored twice in one way counts as it was scored last.

    Raises:
        UserError: a file is missing or another table, a cell cannot be read, or one model has a task with several
            numbers of shots.
    """
    import pandas as pd

    ways: dict[tuple[Any, ...], dict[tuple[str, str], Score]] = {}
    spent: dict[tuple[Any, ...], float | None] = {}
    for row in _rows(files):
        way = tuple(row[name] for name in WAY)
        scores, score = ways.setdefault(way, {}), Score(**{f: row[f] for f in Score.__dataclass_fields__})
        before = scores.setdefault((score.task, score.metric), score)
        if before.shots != score.shots:
            raise UserError(
                f"the tables hold {score.task} of {row['model']} with {before.shots} and with {score.shots} shots. "
                "Use one number of shots for all models: remove the other rows."
            )
        scores[score.task, score.metric] = score
        spent[way] = row["train_flops"] or spent.get(way)
    return pd.DataFrame(
        [
            dict(zip(WAY, way, strict=True)) | {"train_flops": spent[way]} | _columns(scores.values())
            for way, scores in ways.items()
        ]
    ).astype({"limit": "Int64"})


def _rows(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist. Pass tables written by `evaluate --out`.")
        for line, row in score_rows(file):
            read = {}
            for name, text in row.items():
                try:
                    read[name] = _read(name, text)
                except ValueError as error:
                    raise UserError(f"{file}, line {line}: could not convert column {name}: {error}.") from error
            yield read


def _read(name: str, text: str) -> Any:
    """One cell; what is empty is None."""
    if not text.strip():
        return None
    if name == "higher_is_better":
        return boolean(text)
    return _number(text, whole=name in WHOLE) if name in (*WHOLE, *REAL) else text


def _number(text: str, *, whole: bool) -> float:
    try:
        found = int(text) if whole and text.strip().isdecimal() else float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number. {PLAIN}") from error
    if not whole or isinstance(found, int):
        return found
    if not found.is_integer():
        raise ValueError(f"{text!r} is not a whole number. Write one, such as 1000")
    return int(found)


def _columns(scores: Iterable[Score]) -> dict[str, Any]:
    found = {}
    for name, score in as_metrics(list(scores)).items():
        found[f"metrics/{name}"] = score["value"]
        found |= {f"metrics/{name}/{beside}": score[beside] for beside in BESIDE_SCORES}
    return found


def _shown(found: "pd.DataFrame") -> "pd.DataFrame":
    """What fits a screen: the settings in which rows differ, scores with their standard errors."""
    import pandas as pd

    differing = [c for c in WAY[2:] if found[c].nunique(dropna=False) > 1]
    shown = found[["model", "params", *differing]].copy()
    for column in map(str, found.columns):
        if f"{column}/stderr" in found:
            pairs = zip(found[column], found[f"{column}/stderr"], strict=True)
            shown[column.removeprefix("metrics/")] = [
                None if pd.isna(v) else f"{v:.4f}" + ("" if pd.isna(e) else f" ± {e:.4f}") for v, e in pairs
            ]
    return shown
