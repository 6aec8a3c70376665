"""Recorded cells whose numbers an earlier version got wrong: a store keeps them, and no new cell reuses them.

Each check compares a stage's `stage.json` with what the current version would write. Imports no
torch; nothing is computed again.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.data.token_bytes import old_bytes_were_wrong
from capacity_gap.models.axes import architecture, config_with, count_params, dims
from capacity_gap.models.defaults import completed, frozen_rows, training_only
from capacity_gap.models.folders import in_text
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.layers import renumbered
from capacity_gap.models.weights import check_names
from capacity_gap.pruning.common_shape import common_rows
from capacity_gap.records import RECORD
from capacity_gap.settings.errors import UserError
from capacity_gap.settings.hashing import plain
from capacity_gap.settings.places import user_path
from capacity_gap.settings.scales import counted, parse_scale
from capacity_gap.store.files import META, is_store, write_json
from capacity_gap.store.stage import Store

if TYPE_CHECKING:
    import pandas as pd

CHECKED = "checked.json"  # of a store: the records that were found right
RULES = 1  # raise it with the checks: what was found right before is looked at again
SIZED = 0.01  # how far a student's size may be from its name
TRAINED = ("teacher", "adapt", "distil", "instruct", "prefer")
POINTER, RESULT = "published.json", "result.json"


class Made:
    """A finished stage as its folder describes it."""

    def __init__(self, folder: Path, others: "Makings") -> None:
        self.folder, self.others = folder, others
        self.meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self.name: str = self.meta["name"]
        self.config: Mapping[str, Any] = plain(self.meta["config"])

    @property
    def inputs(self) -> dict[str, "Made"]:
        """The stages that it was made from."""
        return {name: self.others(key) for name, key in self.meta["inputs"].items()}

    @cached_property
    def shape(self) -> Mapping[str, Any]:
        """The config.json of the model that it made or read."""
        if "shape" in self.config:
            return self.config["shape"]
        before = next(self.inputs[name].shape for name in ("student", "model", "teacher") if name in self.inputs)
        if "rows" in self.config:  # of an expanded vocabulary
            return {**before, architecture(before).keys["vocab"]: self.config["rows"]}
        return before

    def read(self, file: str) -> dict[str, Any]:
        """One of its JSON files."""
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer that its text was packed with, where that came with the user's own models."""
        found = self.inputs.get("tokenizer") or self.inputs["tokens"].inputs["tokenizer"]
        return found.folder if "content" in found.config else None

    @cached_property
    def reason(self) -> str | None:
        """Why its numbers, or those of its inputs, are wrong; None if no error is known."""
        mine = (check(self) for check in CHECKS.get(self.name, ()))
        return next((why for why in (*(made.reason for made in self.inputs.values()), *mine) if why), None)

    @cached_property
    def is_known(self) -> bool:
        """Whether nothing that `reason` asks for has gone: the folders of the user's models are as they were."""
        mine = self.name != "published" or _as_it_was(self) is not None
        return mine and all(made.is_known for made in self.inputs.values())


class Makings:
    """The finished stages of a store, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, Made] = {}

    def __call__(self, key: str) -> Made:
        """The stage of that key."""
        if key not in self.known:
            self.known[key] = Made(self.root / key, self)
        return self.known[key]


def outdated(store: Store, records: Iterable[str]) -> dict[str, str]:
    """Record key → why its numbers are wrong, for those of `records` (keys) that are.

    Damaged or missing stages are skipped: only known errors are reported. Finished stages do not change, so
    the store keeps a list of the records that were found right.
    """
    made, found, right = Makings(store.root), {}, _found_right(store.root)
    before = len(right)
    for key in (k for k in records if k not in right):
        try:
            why = made(key).reason or _other_student(made(key))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, UserError):
            continue
        if why:
            found[key] = why
        elif made(key).is_known:
            right.add(key)
    if len(right) > before:
        with contextlib.suppress(OSError):  # a store that may only be read is looked through again
            write_json(store.root / CHECKED, {"rules": RULES, "right": sorted(right)})
    return found


def _found_right(root: Path) -> set[str]:
    try:
        kept = json.loads((root / CHECKED).read_text(encoding="utf-8"))
        return set(kept["right"]) if kept["rules"] == RULES else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _acted(made: Made) -> str | None:
    """Dropout and the like, before training ignored them."""
    keys = _read(made, training_only(made.shape))
    return f"trained with {', '.join(keys)} of its config.json active" if keys else None


def _frozen(made: Made) -> str | None:
    if made.config.get("init") == "random":
        wrong = frozen_rows(made.shape) if "ignored" not in made.config else []
    else:
        wrong = _read(made, frozen_rows(made.shape)) if made.config.get("method") in ("taylor", "movement") else []
    return "made with the padding token's embedding at zero or frozen" if wrong else None


def _read(made: Made, keys: list[str]) -> list[str]:
    """`keys` that once acted and that its identity does not name, without a padding token that no text holds."""
    if "ignored" in made.config:
        return []
    folder, pad = made.tokenizer, completed(made.shape).get("pad_token_id")
    unread = folder is not None and pad is not None and not in_text(folder, pad)
    return [key for key in keys if not (key == "pad_token_id" and unread)]


def _renumbered(made: Made) -> str | None:
    """What belongs to a layer's number, before it went with the layer."""
    if made.config.get("init") != "pruned" or "by_layer" in made.config:
        return None
    before, shape = made.inputs["teacher"].shape, made.shape
    symmetric = "layers" not in made.config
    right = config_with(before, dims(shape)).get("layer_types") if symmetric else shape.get("layer_types")
    moved = renumbered(before, dims(before).layers, dims(shape).layers, symmetric=symmetric)
    if moved or right != shape.get("layer_types"):
        return "its layers got per-layer settings of other layers (layer_types and the like)"
    return None


def _trained_on_nothing(made: Made) -> str | None:
    return "trained on zero sequences" if made.read(RESULT).get("steps") == 0 else None


def _as_it_was(made: Made) -> Path | None:
    """The user's folder of a published model, if none of its files is younger than the stage that points to it."""
    if "content" not in made.config:
        return made.folder  # of the hub: what is there does not change
    source = Path(made.read(POINTER)["repository"])
    before = (made.folder / META).stat().st_mtime
    return source if source.is_dir() and all(f.stat().st_mtime <= before for f in source.iterdir()) else None


def _of_other_weights(made: Made) -> str | None:
    """A model folder whose files are not its config.json's."""
    source = _as_it_was(made)
    if source is None or source == made.folder:
        return None
    try:
        check_names(source, made.shape)
    except UserError:
        return f"the weights of {source} do not match its config.json"
    return None


def _of_other_bytes(made: Made) -> str | None:
    if "tokenizer" in made.inputs or made.tokenizer is None or not old_bytes_were_wrong(made.tokenizer):
        return None
    return "bits per byte used a wrong byte count"


CHECKS: dict[str, tuple[Callable[[Made], str | None], ...]] = {
    **dict.fromkeys(TRAINED, (_acted,)),
    "student": (_frozen, _renumbered),
    "scores": (_frozen,),
    "published": (_of_other_weights,),
    "evaluate": (_of_other_bytes,),
}
CHECKS |= dict.fromkeys(("teacher", "adapt", "distil"), (_acted, _trained_on_nothing))


def _other_student(record: Made) -> str | None:
    """Counts that were wrong; a student of another size than its name, or of other rows than under other teachers."""
    row, student = record.read(RECORD), record.inputs["trained"]
    for whose, made in (("student", student), ("teacher", record.inputs["teacher"])):
        if row[f"{whose}_params"] != count_params(made.shape):
            return f"parameters of its {whose} were counted wrongly"
    if row.get("shape") not in ("common", "per_teacher") or row["student_params"] == row["teacher_params"]:
        return None
    ladder, scale = str(row["family"]), parse_scale(row["student"], key="student")
    target, rows = _common(ladder, scale) if ladder in FAMILIES else (scale, None)
    if abs(row["student_params"] / target - 1) > SIZED:
        return f"its student has {row['student_params']:,} parameters instead of the requested {target:,}"
    mine = dims(student.shape)
    if rows and row["shape"] == "common" and not row.get("expanded_vocab") and (mine.vocab, mine.tied) != rows:
        return "its student's embedding differs from the common shape under the other teachers"
    return None


@cache
def _common(family: str, scale: int) -> tuple[int, tuple[int, bool]]:
    """What a family means by a student's scale, and the rows and the tie of its common student."""
    ladder = FAMILIES[family]
    target = ladder.student_params(scale)
    return target, common_rows(ladder.common_rungs, target)


def without_outdated(frame: "pd.DataFrame", source: str | Path) -> "tuple[pd.DataFrame, list[str]]":
    """The records of `source` without stale cells where that is a store, and a note of how many were left out."""
    if str(source).startswith("wandb:") or not is_store(folder := user_path(source)) or frame.empty:
        return frame, []
    keys = "record/" + frame["cell"]
    found = outdated(Store(folder), keys[frame["status"] == "done"])
    note = f"{counted(len(found), 'stale cell')} left out: `python -m capacity_gap status` lists the reasons"
    return frame[~keys.isin(list(found))], [note] if found else []


def said(found: Mapping[str, str]) -> list[str]:
    """Lines to print: how many cells are wrong in each way, and what to do."""
    if not found:
        return []
    ways: dict[str, list[str]] = {}
    for key, why in found.items():
        ways.setdefault(why, []).append(key.partition("/")[2])
    lines = [f"stale: {len(found)} recorded cells hold numbers that an earlier version computed wrongly:"]
    lines += [f"  {len(cells)} × {why}: {', '.join(cells[:3])}{' …' * (len(cells) > 3)}" for why, cells in ways.items()]
    advice = "Started again, such a cell is computed anew under another digest, or refused with what is wrong."
    return [*lines, f"  {advice} Fits and reports of this store leave the old ones out."]
