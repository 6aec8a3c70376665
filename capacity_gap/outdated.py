"""Recorded cells whose numbers an earlier version got wrong: a store keeps them, and no new cell reuses them.

Each check compares what a stage says of itself (`stage.json`) with what the same stage would say today. Imports no
torch; nothing is computed again.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.data.token_bytes import old_bytes_were_wrong
from capacity_gap.errors import UserError
from capacity_gap.fingerprint import plain
from capacity_gap.models.axes import config_with, dims
from capacity_gap.models.defaults import frozen_rows, training_only
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.layers import renumbered
from capacity_gap.models.weights import check_names
from capacity_gap.pruning.shape import common_rows
from capacity_gap.records import RECORD
from capacity_gap.scales import parse_scale
from capacity_gap.stage import META, Store, write_json

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
        return next(self.inputs[name].shape for name in ("student", "model", "teacher") if name in self.inputs)

    def read(self, file: str) -> dict[str, Any]:
        """One of its JSON files."""
        return json.loads((self.folder / file).read_text(encoding="utf-8"))

    @cached_property
    def reason(self) -> str | None:
        """Why its numbers, or those that it was made from, are wrong; None if they are right."""
        mine = (check(self) for check in CHECKS.get(self.name, ()))
        return next((why for why in (*(made.reason for made in self.inputs.values()), *mine) if why), None)


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

    What is damaged or gone is passed over: this says only what is known to be wrong. Finished stages do not change, so
    the store keeps a list of the records that were found right.
    """
    made, found, right = Makings(store.root), {}, _found_right(store.root)
    before = len(right)
    for key in (k for k in records if k not in right):
        try:
            why = made(key).reason or _other_student(made(key))
        except (OSError, ValueError, KeyError, StopIteration, UserError):
            continue
        if why:
            found[key] = why
        else:
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
    keys = training_only(made.shape) if "ignored" not in made.config else []
    return f"trained with {', '.join(keys)} of its config.json in effect" if keys else None


def _frozen(made: Made) -> str | None:
    keys = frozen_rows(made.shape) if "ignored" not in made.config else []
    random = made.config.get("init") == "random" or made.config.get("method") in ("taylor", "movement")
    return "made with the padding token's embedding at zero or frozen" if keys and random else None


def _renumbered(made: Made) -> str | None:
    """What belongs to a layer's number, before it went with the layer."""
    if made.config.get("init") != "pruned" or "by_layer" in made.config:
        return None
    before, shape = made.inputs["teacher"].shape, made.shape
    symmetric = "layers" not in made.config
    right = config_with(before, dims(shape)).get("layer_types") if symmetric else shape.get("layer_types")
    moved = renumbered(before, dims(before).layers, dims(shape).layers, symmetric=symmetric)
    if moved or right != shape.get("layer_types"):
        return "its layers were given what belongs to other layers' numbers (layer_types and the like)"
    return None


def _trained_on_nothing(made: Made) -> str | None:
    return "trained on no sequence at all" if made.read(RESULT).get("steps") == 0 else None


def _of_other_weights(made: Made) -> str | None:
    """A model folder whose files are not its config.json's."""
    source = made.read(POINTER)["repository"]
    try:
        if Path(source).is_dir():
            check_names(Path(source), made.shape)
    except UserError:
        return f"the weights of {source} are not those of its config.json"
    return None


def _of_other_bytes(made: Made) -> str | None:
    wrong = "bytes" not in made.config and old_bytes_were_wrong(made.inputs["tokenizer"].folder)
    return "bits per byte counted other bytes than the text's" if wrong else None


CHECKS: dict[str, tuple[Callable[[Made], str | None], ...]] = {
    **dict.fromkeys(TRAINED, (_acted,)),
    "student": (_frozen, _renumbered),
    "scores": (_frozen,),
    "published": (_of_other_weights,),
    "tokens": (_of_other_bytes,),
}
CHECKS["distil"] = CHECKS["teacher"] = (_acted, _trained_on_nothing)


def _other_student(record: Made) -> str | None:
    """A student of another size than its name says, or, under a common shape, than under the other teachers."""
    row = record.read(RECORD)
    if row.get("shape") not in ("common", "per_teacher") or row["student_params"] == row["teacher_params"]:
        return None
    ladder, scale = FAMILIES.get(str(row["family"])), parse_scale(row["student"], key="student")
    target = ladder.params[ladder.scales[scale]] if ladder and scale in ladder.scales else scale
    if abs(row["student_params"] / target - 1) > SIZED:
        return f"its student has {row['student_params']:,} parameters, not the {target:,} asked for"
    student = record.inputs["trained"]
    if not ladder or row["shape"] != "common" or row.get("expanded_vocab"):
        return None
    mine = dims(student.shape)
    if (mine.vocab, mine.tied) != common_rows(ladder.rungs, target):
        return "its student's embedding is not that of the common shape under the other teachers"
    return None


def said(found: Mapping[str, str]) -> list[str]:
    """Lines for people: how many cells are wrong in each way, and what to do."""
    if not found:
        return []
    ways: dict[str, list[str]] = {}
    for key, why in found.items():
        ways.setdefault(why, []).append(key.partition("/")[2])
    lines = [f"stale: {len(found)} recorded cells have numbers that an earlier version got wrong:"]
    lines += [f"  {len(cells)} × {why}: {', '.join(cells[:3])}{' …' * (len(cells) > 3)}" for why, cells in ways.items()]
    return [*lines, "  The same command computes them again under new digests; leave the old ones out of fits."]
