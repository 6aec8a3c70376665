"""The overrides behind a table of records: the settings that its columns say differ from their defaults.

The way back from `nondefault.py`. What a column cannot give back, such as the folder of a corpus, is named. Imports no
torch.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capacity_gap.cell.config import TUNING, RunConfig
from capacity_gap.cell.recipes import EMBEDDED, RECIPES, Recipe
from capacity_gap.cell.student_shape import DEEP, usual_layer_score_of
from capacity_gap.data.corpora import CORPORA
from capacity_gap.distill.distill_config import SIGNAL_SIZE
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.pruning.methods import SYMMETRIC
from capacity_gap.settings.declare import NOTHING, Declared, walk

if TYPE_CHECKING:
    import pandas as pd

OF_A_CELL = ("seed", "teacher_seed")  # these and what is computed from sizes tell cells apart
PAIR = re.compile(r"(\S+?)=(.*?)(?= \S+?=|$)")  # of the text `settings`
# Columns that say that something was done whose settings they do not hold.
UNTOLD = {
    "adapt_tokens": "adapt",
    "expanded_vocab": "expand",
    "instruct_rows": "instruct",
    "prefer_rows": "prefer",
    "start": "prune.start",
}
# Columns that are computed from settings, and the size that the usual recipe follows from.
COMPUTED = ("family", "teacher_data", "corpus", "shape", "start_tokens", "signal", "settings", "student_params")
# The setting whose column is null for two values, and the columns that say for which: see `_layers`.
LAYERS = "prune.layers"
OF_LAYERS = ("prune_layers", "family", "student", "teacher", "reference", "init", "shape", "settings")


@dataclass(frozen=True)
class TableSettings:
    """What a table says of the settings behind it. `known`: whether it says anything of them."""

    overrides: tuple[str, ...]  # `key=value`
    untold: tuple[str, ...]  # settings that must be added by hand
    known: bool


def table_settings(frame: "pd.DataFrame") -> TableSettings:
    """The settings that all finished cells of a table share and that are not the default."""
    rows = frame[frame["status"] == "done"] if "status" in frame else frame
    if "data_tokens" in rows and (rows["data_tokens"] > 0).any():
        rows = rows[rows["data_tokens"] > 0]  # pruning alone has no objective
    plain = [d for d in _plain() if d.key not in OF_A_CELL and _is_ours(d, rows)]
    return _told(rows, plain)


def record_settings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of each of our records, its settings that are not the default, but for its seed: value by name.

    Entries of modules that are not loaded here, such as a loss of the user's, are told too.
    """
    import pandas as pd

    plain = [d for d in _plain() if d.key != "seed"]
    columns = list(dict.fromkeys([*(str(d.setting.column) for d in plain), *COMPUTED, *OF_LAYERS]))
    known: dict[tuple[str, ...], dict[str, str]] = {}
    found = []
    for row in rows:
        same = tuple(str(row.get(c)) for c in columns)
        if same not in known:
            frame = pd.DataFrame([{c: row.get(c) for c in columns}])
            known[same] = dict(o.split("=", 1) for o in (*_family(row), *_told(frame, plain).overrides))
        found.append(known[same])
    return found


@functools.cache
def column_of(key: str) -> str:
    """The column that tells a setting, or its own name where it has none."""
    return next((d.setting.column for d in walk(RunConfig) if d.key == key and d.setting.column), key)


def _family(row: Mapping[str, Any]) -> list[str]:
    """The ladder, where it is one of a name that is not the default; checkpoints name themselves."""
    name = row.get("family")
    return [f"family={name}"] if name in FAMILIES and name != RunConfig().family.name else []


def _plain() -> list[Declared]:
    """Settings whose own value is in a column."""
    told = [d for d in walk(RunConfig) if d.setting.column and not d.section and d.key.partition(".")[0] not in TUNING]
    return [d for d in told if not d.setting.computed]


def _told(rows: "pd.DataFrame", plain: Sequence[Declared]) -> TableSettings:
    """What the columns of these settings say, and those that are computed."""
    found: dict[str, str] = {}
    for d in plain:
        value = _only(rows, str(d.setting.column)) if d.key != LAYERS else None
        if value is not None and not _usual(d, value, rows):
            found[d.key] = _text(value)
    untold: list[str] = [name for column, name in UNTOLD.items() if _values(rows, column)]
    for name, value in (*_computed(rows), *_layers(rows), *_from_text(rows)):
        if value is None:
            untold.append(name)
        else:
            found[name] = value
    overrides = tuple(f"{name}={value}" for name, value in found.items())
    return TableSettings(overrides, tuple(dict.fromkeys(untold)), bool(plain))


def _is_ours(d: Declared, rows: "pd.DataFrame") -> bool:
    """Whether a column is that of our records: of other tables `loss` is a number, and no name of an objective."""
    values = _values(rows, str(d.setting.column))
    names = d.setting.names
    return bool(values) and (names is None or all(str(v) in names for v in values))


def _values(rows: "pd.DataFrame", column: str) -> list[Any]:
    return [v.item() if hasattr(v, "item") else v for v in rows[column].dropna().unique()] if column in rows else []


def _only(rows: "pd.DataFrame", column: str) -> Any:
    """The one value of a column that all rows have; None where they differ or some have none."""
    values = _values(rows, column)
    return values[0] if len(values) == 1 and not rows[column].isna().any() else None


def _usual(d: Declared, value: Any, rows: "pd.DataFrame") -> bool:
    """Whether a value is what the setting is unless given: its default, or what the recipe of the students has."""
    if d.setting.null_at is not NOTHING and value == d.setting.null_at:
        return True
    if d.default is not None:
        return bool(value == d.default)
    name = d.key.rpartition(".")[2]
    recipes = {_recipe(float(n)) for n in rows["student_params"].dropna()} if "student_params" in rows else set()
    return {getattr(r, name, None) for r in recipes} == {value}


def _recipe(params: float) -> Recipe:
    return next(r for r in RECIPES if params < r.below)


def _text(value: Any) -> str:
    """A value with all its digits: a rounded weight is another cell."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _computed(rows: "pd.DataFrame") -> Iterator[tuple[str, str | None]]:
    """Settings whose columns are computed; None in place of a value that the column does not hold."""
    if (data := _only(rows, "teacher_data")) not in (None, "1m"):
        yield "family.teacher_data", str(data)
    corpus = _only(rows, "corpus")
    if corpus not in (None, EMBEDDED):
        named = corpus in CORPORA and corpus != "hub"
        yield "corpus", str(corpus) if named else None
        if corpus == "text":
            yield "corpus.path", None
    shape = _only(rows, "shape")
    if shape not in (None, "common"):
        yield ("prune.shape", str(shape)) if shape == "per_teacher" else ("prune.fixed", None)
    if (tokens := _only(rows, "start_tokens")) not in (None, 0):
        yield "prune.init_data", _text(int(tokens))
    signal, _, size = str(_only(rows, "signal") or "online").partition("-")
    if signal != "online":
        yield "distill.signal", signal
        if size and size != str(SIGNAL_SIZE):
            yield "distill.signal_size", size


def _layers(rows: "pd.DataFrame") -> Iterator[tuple[str, str]]:
    """How layers were removed, where that is not the default.

    The column is null for `symmetric`, and also where no rung of the ladder has more layers than the student.
    """
    known = rows[[c for c in OF_LAYERS if c in rows]].drop_duplicates()
    told = {_layers_of({str(k): v for k, v in row.items() if v == v}) for row in known.to_dict("records")}
    # Where no layers go, symmetric removal is the default cell by another name.
    named = told - {""} if told <= {"", SYMMETRIC, None} else told
    yield from ((LAYERS, value) for value in named if value and len(named) == 1)


def _layers_of(row: Mapping[str, Any]) -> str | None:
    """How the layers of one record's student were chosen: None by the default score, empty where none went."""
    told = str(row.get("prune_layers") or "")
    if row.get("init") not in ("pruned", "shared"):
        return ""
    usual = usual_layer_score_of(row, dict(PAIR.findall(str(row.get("settings") or ""))))
    if not told:
        return SYMMETRIC if usual else ""
    return None if told == (DEEP if usual is None else usual) else told


def _from_text(rows: "pd.DataFrame") -> Iterator[tuple[str, str | None]]:
    """Settings without a column of their own, as the text `settings` holds them."""
    keys = {d.key for d in walk(RunConfig) if not d.section}
    for name, value in PAIR.findall(str(_only(rows, "settings") or "")):
        yield name, value if name in keys else None
