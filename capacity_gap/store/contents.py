"""What is in a store and what it is for: `python -m capacity_gap store ls | du | forget`."""

import os
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import Damaged, StoreError, choose
from capacity_gap.settings.hashing import fingerprint
from capacity_gap.store.files import (
    DIGEST,
    META,
    RECORD,
    is_store,
    name_left_out,
    read_all,
    read_sound,
    stage_files,
    tell,
    write_checked,
)
from capacity_gap.store.stage import Store

OUTSIDE = (".work", ".damaged", "sweeps", "failed", "jobs", "logs", "wandb")  # folders of a store that hold no stages
NOTED = re.compile(r"\.[0-9a-f]{20}$")  # the end of a note's name
OF_A_CELL = {"name": str, "overrides": list, "stages": dict}  # what a note says of each of its cells
NOT_STARTED = "not started: fail_fast, and another cell failed"  # the cause of such a cell
SIGNAL = "signal"  # cached teacher outputs: large, and made again from the teacher when needed


@dataclass(frozen=True)
class Entry:
    """One finished stage on disk."""

    key: str
    path: Path
    bytes: int
    inputs: tuple[str, ...]


def open_store(folder: str) -> Store:
    """The store at `folder`, to be read; raises if there is none."""
    store = Store(folder)
    if not is_store(store.root):
        raise StoreError(
            f"{folder} is not a store: it has no store.json. Use the folder passed to run.py as store= (`export` "
            "takes it as --store DIR)."
        )
    if not store.marker.exists():
        tell(f"{store.marker} is missing; the next run.py with this store will write it.")
    store.check_schema()
    return store


def failure_file(store: Store, record_key: str) -> Path:
    """Where the failed record of a cell is, until the cell is done."""
    return store.root / "failed" / f"{record_key.partition('/')[2]}.json"


def stage_folders(store: Store) -> list[Path]:
    """Every folder that holds a stage, or should; folders without a digest as their name are ignored."""
    kinds = [p for p in sorted(store.root.iterdir()) if p.is_dir() and p.name not in OUTSIDE and p.name[0] != "."]
    return [p for kind in kinds for p in sorted(kind.iterdir()) if p.is_dir() and DIGEST.fullmatch(p.name)]


def entries(store: Store) -> dict[str, Entry]:
    """Every finished stage, by key."""
    found = {}
    for file, meta in read_all(store.root, stage_files(store.root), {"inputs": dict}, check=_check_inputs):
        key = f"{file.parent.parent.name}/{file.parent.name}"
        found[key] = Entry(key, file.parent, size(file.parent), tuple(meta["inputs"].values()))
    return found


def _check_inputs(file: Path, meta: dict[str, Any]) -> None:
    if wrong := [key for key in meta["inputs"].values() if not isinstance(key, str)]:
        raise TypeError(f"{wrong[0]!r} is not a stage")


def size(path: Path) -> int:
    """Bytes of a file or a link, or of all files below a folder; what goes meanwhile counts nothing."""
    if path.is_symlink() or not path.is_dir():
        return _bytes(path)
    return sum(_bytes(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _bytes(file: str | Path) -> int:
    try:
        return os.lstat(file).st_size
    except OSError:
        return 0


def needed(keys: Iterable[str], found: dict[str, Entry]) -> set[str]:
    """The keys of all stages that `keys` were made from, themselves included."""
    seen: set[str] = set()
    stack = list(keys)
    while stack:
        key = stack.pop()
        if key in found and key not in seen:
            seen.add(key)
            stack.extend(found[key].inputs)
    return seen


def note_sweep(
    store: Store, name: str, cells: dict[str, dict[str, Any]], *, about: Mapping[str, Any] | None = None
) -> None:
    """Writes down which cells a grid is made of; a grown grid adds to what is there. `about`: of a round of it.

    Every start with other cells writes one more file, `<store>/sweeps/<name>.<hash of its cells>.json`. No file ever
    changes its cells or its name, so that many processes may note cells of one sweep at once and none loses another's.
    """
    (store.root / "sweeps").mkdir(parents=True, exist_ok=True)
    parts = _parts(store, name)
    # Several first starts may each draw an id; the smallest is the sweep's for all readers.
    own = min([part["id"] for part in parts if part.get("id")], default=uuid.uuid4().hex[:12])
    about = about or {}
    same = (
        part["file"]
        for part in parts
        if part["cells"].keys() == cells.keys() and part.get("round") == about.get("round")
    )
    of_round = [f"round {about['round']}"] if "round" in about else []
    note = {"name": name, "id": own, **about, "cells": cells}
    write_checked(next(same, _note_file(store, name, [*cells, *of_round])), note)


def rounds_of(store: Store, name: str) -> list[dict[str, Any]]:
    """The rounds of an adaptive grid, first to last: `round`, `answer`, `gain`, `device_hours`, `cells`."""
    return sorted((part for part in _parts(store, name) if "round" in part), key=lambda part: part["round"])


def note_end(store: Store, name: str, what: str, why: str, answer: Any, stopped: Any = None) -> None:
    """Writes down why the rounds of a question ended, after how many of them, with the answer then; `stopped`: with the
    interval that holds after a stop at a narrow one."""
    parts = rounds_of(store, name)
    about = {"ended": why, "rounds": max((part["round"] for part in parts), default=0)}
    about |= {"own_rounds": sum(part.get("what") == what for part in parts)}  # those of this question
    _write_end(store, name, what, {**about, "answer": answer, "stopped_answer": stopped})


def forget_end(store: Store, name: str, what: str) -> None:
    """A grid in rounds goes on: it has not ended. That it once ended at a narrow interval stays noted."""
    if (level := narrow_level(store, what, name)) is None:
        _end_file(store, name, what).unlink(missing_ok=True)
        return
    _write_end(store, name, what, {"stopped_answer": {"level": level, "answer": None}})


def _write_end(store: Store, name: str, what: str, about: Mapping[str, Any]) -> None:
    (store.root / "sweeps").mkdir(parents=True, exist_ok=True)
    note = {"name": name, "id": sweep_id(store, name), "what": what, **about, "cells": {}}
    write_checked(_end_file(store, name, what), note)


def end_of(store: Store, name: str) -> dict[str, Any] | None:
    """Why a grid in rounds ended: `ended`, `what`, `answer`; None while it has not, or if it has gone on since."""
    last = max((part["round"] for part in rounds_of(store, name)), default=0)
    ends = [part for part in _parts(store, name) if part.get("ended") and part.get("rounds", 0) >= last]
    return ends[-1] if ends else None


def narrow_level(
    store: Store, what: str, name: str | None = None, *, among: Collection[str] | None = None
) -> float | None:
    """The highest level noted when rounds for a question ended at a narrow interval; None if none did.

    Args:
        store: of the rounds.
        what: the question.
        name: of the grid; by default any.
        among: record keys: only of grids that have some of these cells.

    Returns:
        The level. An older version noted such an end without one too: that counts as 0.
    """
    every = _parts(store, name)
    mine = {part["name"] for part in every if among is None or not part["cells"].keys().isdisjoint(among)}
    parts = [part for part in every if part.get("what") == what and part["name"] in mine]
    levels = [float(part["stopped_answer"]["level"]) for part in parts if part.get("stopped_answer")]
    return max([*levels, *(0.0 for part in parts if part.get("after_stop"))], default=None)


def note_stop(store: Store, name: str, cells: Iterable[str], why: str) -> None:
    """Writes down why the process that ran these cells ended before them; what is left waits for another start."""
    left = [key for key in sorted(cells) if not _has_ended(store, key)]
    if left and any(part["cells"] for part in _parts(store, name)):
        _write_stop(store, name, why, left)


def forget_stop(store: Store, name: str, cells: Iterable[str]) -> None:
    """These cells are started again; others that stopped with them still wait."""
    mine = set(cells)
    for part in _parts(store, name):
        before = part.get("left", ()) if part.get("stopped") else ()
        if mine & set(before):
            if left := [key for key in before if key not in mine]:
                _write_stop(store, name, part["stopped"], left)
            part["file"].unlink(missing_ok=True)


def _write_stop(store: Store, name: str, why: str, left: Sequence[str]) -> None:
    note = {"name": name, "id": sweep_id(store, name), "stopped": why, "left": list(left), "cells": {}}
    write_checked(_note_file(store, name, ["stopped", *left]), note)


def stopped_cells(store: Store, name: str) -> dict[str, str]:
    """The cells of a sweep whose process ended before them, each with why."""
    parts = [part for part in _parts(store, name) if part.get("stopped")]
    return {key: str(part["stopped"]) for part in parts for key in part.get("left", ())}


def _has_ended(store: Store, record_key: str) -> bool:
    return (store.root / record_key / META).exists() or failure_file(store, record_key).exists()


def _end_file(store: Store, name: str, what: str) -> Path:
    return _note_file(store, name, ["ended", what])


def _note_file(store: Store, name: str, cells: Iterable[str]) -> Path:
    return store.root / "sweeps" / f"{_in_a_name(name)}.{fingerprint(sorted(cells))}.json"


def _in_a_name(sweep: str) -> str:
    return sweep.replace("/", "-")


def note_files(store: Store) -> list[Path]:
    """The files that say which cells the sweeps are made of, in the order in which they were written."""
    return sorted((store.root / "sweeps").glob("[!.]*.json"), key=_written)


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _parts(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    """What was noted of one sweep, or of all, oldest first; damaged notes are left out and named."""
    found, damaged = read_notes(store, name)
    name_left_out(store.root, damaged)
    return found


def read_notes(store: Store, name: str | None = None) -> tuple[list[dict[str, Any]], list[Damaged]]:
    """The notes of one sweep, or of all, oldest first, and the damaged ones; older versions kept one file a sweep."""
    files = [f for f in note_files(store) if name is None or _in_a_name(name) == _sweep_of(f)]
    found, damaged = read_sound(files, {"cells": dict}, check=check_cells)
    return [{**part, "name": _sweep_of(file), "file": file} for file, part in found], damaged


def check_cells(file: Path, part: dict[str, Any]) -> None:
    """Raises if a note of a sweep lacks a required entry of a cell."""
    for key, cell in part["cells"].items():
        if wrong := [name for name, kind in OF_A_CELL.items() if not isinstance(cell.get(name), kind)]:
            raise Damaged(file, f"lacks {', '.join(wrong)} of {key}")


def _sweep_of(file: Path) -> str:
    """The sweep that a note is of: its file's name, without the hash of the cells."""
    return NOTED.sub("", file.stem)


def sweep_id(store: Store, name: str) -> str:
    """An id that distinguishes this grid from grids of the same name in other stores; it stays when the grid grows."""
    ids = [part["id"] for part in _parts(store, name) if part.get("id")]
    return min(ids, default=fingerprint(name)[:12])


def sweeps(store: Store) -> dict[str, dict[str, Any]]:
    """The grids that were started in this store: name → record key → the note on the cell."""
    found: dict[str, dict[str, Any]] = {}
    for part in _parts(store):
        found.setdefault(part["name"], {}).update(part["cells"])
    return dict(sorted(found.items()))


def recorded(store: Store) -> list[str]:
    """The keys of all records, of grids and of single cells."""
    return sorted(f"record/{file.parent.name}" for file in store.root.glob(f"record/[!.]*/{RECORD}"))


def sweeps_of(store: Store, record_key: str) -> list[str]:
    """The grids that a cell belongs to, the youngest first."""
    mine = [part["name"] for part in _parts(store) if record_key in part["cells"]]
    return list(dict.fromkeys(reversed(mine)))


def forget_failed(store: Store, name: str | None = None) -> list[str]:
    """Forgets the failed cells of one sweep, or of all: their failed records and their place in the sweep.

    A cell that failed stays in other sweeps than `name`, and so does its record as long as one of them contains it.

    Returns:
        The names of what was forgotten.
    """
    parts = _parts(store)
    if name is not None:
        choose("--failed", name, sweeps(store))
    gone: dict[str, str] = {}
    for part in parts:
        failed = {key for key in part["cells"] if _has_failed(store, key)}
        if failed and name in (None, part["name"]):
            gone |= {key: part["cells"][key].get("name", key) for key in failed}
            _rewrite(store, part, {k: v for k, v in part["cells"].items() if k not in failed})
    wanted = {key for part in _parts(store) for key in part["cells"]}
    orphans = [] if name else [f"record/{f.stem}" for f in (store.root / "failed").glob("*.json")]
    for key in {*gone, *orphans} - wanted:
        failure_file(store, key).unlink(missing_ok=True)
    return sorted(gone.values())


def _has_failed(store: Store, record_key: str) -> bool:
    return failure_file(store, record_key).exists() and not (store.root / record_key / "stage.json").exists()


def _rewrite(store: Store, part: dict[str, Any], cells: dict[str, Any]) -> None:
    """Takes a note's place with one of fewer cells, or of none."""
    if cells:
        kept = {"name": part["name"], "id": part.get("id"), "cells": cells}
        write_checked(_note_file(store, part["name"], cells), kept)
    part["file"].unlink(missing_ok=True)


def list_sweeps(store: Store) -> list[tuple[str, int, int, int]]:
    """Name, cells done, cells in all, and bytes of what they were made from, for each sweep and for what is in none."""
    found = entries(store)
    rows, claimed = [], set()
    for name, cells in sweeps(store).items():
        mine = needed(cells, found)
        claimed |= mine
        rows.append((name, sum(c in found for c in cells), len(cells), sum(found[k].bytes for k in mine)))
    alone = {k for k in found if k.startswith("record/")} - claimed
    rest = needed(alone, found) - claimed
    if alone:
        rows.append(("(single cells)", len(alone), len(alone), sum(found[k].bytes for k in rest)))
    return rows


def not_made_again(store: Store) -> list[str]:
    """What was set aside as damaged and is not back in its place, by its path below the store."""
    return sorted(name for name in store.aside() if not (store.root / name).exists())


def disk_use(store: Store) -> list[tuple[str, int, int]]:
    """Kind of stage, how many, and bytes, largest first; with what is at work and what is mirrored."""
    rows: dict[str, tuple[int, int]] = {}
    for entry in entries(store).values():
        kind = entry.key.split("/")[0]
        count, total = rows.get(kind, (0, 0))
        rows[kind] = (count + 1, total + entry.bytes)
    for name in OUTSIDE:
        folder = store.root / name
        if folder.is_dir():
            rows[name] = (sum(1 for _ in folder.iterdir()), size(folder))
    halves = [p for p in store.root.glob("*/.deleted-*") if p.parent.name not in OUTSIDE]
    if halves:
        rows["half-deleted"] = (len(halves), sum(map(size, halves)))
    return sorted(((k, n, b) for k, (n, b) in rows.items()), key=lambda row: -row[2])
