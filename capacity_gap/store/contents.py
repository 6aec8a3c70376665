"""What is in a store, what it is for, and what can go: `python -m capacity_gap store ls | du | gc | forget`."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import StoreError, choose
from capacity_gap.settings.hashing import fingerprint
from capacity_gap.store.files import RECORD, is_store, read_all, stage_files, tell, write_checked
from capacity_gap.store.lease import held_elsewhere, needs_of, taking
from capacity_gap.store.stage import Store

OUTSIDE = (".work", ".damaged", "sweeps", "failed", "jobs", "logs", "wandb")  # folders of a store that hold no stages
NOTED = re.compile(r"\.[0-9a-f]{20}$")  # the end of a note's name
SIGNAL = "signal"  # cached teacher outputs: large, and made again from the teacher when needed


@dataclass(frozen=True)
class Entry:
    """One finished stage on disk."""

    key: str
    path: Path
    bytes: int
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Waste:
    """Something that can be deleted, and why."""

    path: Path
    bytes: int
    reason: str
    place: Path | None = None  # where the lease lies that must be had before it is deleted


def open_store(folder: str) -> Store:
    """The store at `folder`, to be read; raises if there is none."""
    store = Store(folder)
    if not is_store(store.root):
        raise StoreError(
            f"{folder} is no store: it has no store.json. Name the folder that run.py was given as store=."
        )
    if not store.marker.exists():
        tell(f"{store.marker} is missing; the next run.py with this store writes it again.")
    store.check_schema()
    return store


def failure_file(store: Store, record_key: str) -> Path:
    """Where the failed record of a cell is, until the cell is done."""
    return store.root / "failed" / f"{record_key.partition('/')[2]}.json"


def entries(store: Store) -> dict[str, Entry]:
    """Every finished stage, by key."""
    found = {}
    for file, meta in read_all(store.root, stage_files(store.root), ["inputs"]):
        key = f"{file.parent.parent.name}/{file.parent.name}"
        found[key] = Entry(key, file.parent, size(file.parent), tuple(meta["inputs"].values()))
    return found


def size(path: Path) -> int:
    """Bytes of a file or a link, or of all files below a folder."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size if path.is_symlink() or path.exists() else 0
    total = 0
    for file in path.rglob("*"):
        try:
            total += 0 if file.is_dir() else file.lstat().st_size
        except FileNotFoundError:
            continue  # a running stage moved it
    return total


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


def note_sweep(store: Store, name: str, cells: dict[str, dict[str, Any]]) -> None:
    """Writes down which cells a grid is made of; a grown grid adds to what is there.

    The first start writes `<store>/sweeps/<name>.json`, every start with other cells one more file,
    `<name>.<hash of its cells>.json`. No file ever changes its cells, so that many processes may note cells of one
    sweep at once and none loses another's.
    """
    first = store.root / "sweeps" / f"{name.replace('/', '-')}.json"
    first.parent.mkdir(parents=True, exist_ok=True)
    parts = _parts(store, name)
    # Several first starts may each draw an id; the smallest is the sweep's for all readers.
    own = min([part["id"] for part in parts if part.get("id")], default=uuid.uuid4().hex[:12])
    file = next((part["file"] for part in parts if part["cells"].keys() == cells.keys()), _note_file(first, cells))
    write_checked(file, {"name": name, "id": own, "cells": cells})
    if not first.exists():
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # another process was first
            os.link(file, first)  # atomic, unlike a rename, which would replace the other's
            file.unlink()


def _note_file(first: Path, cells: Iterable[str]) -> Path:
    return first.with_name(f"{first.stem}.{fingerprint(sorted(cells))}.json")


def note_files(store: Store) -> list[Path]:
    """The files that say which cells the sweeps are made of, in the order in which they were written."""
    return sorted((store.root / "sweeps").glob("[!.]*.json"), key=_written)


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _parts(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    """What was noted of one sweep, or of all, oldest first; older versions kept one file a sweep."""
    files = [f for f in note_files(store) if name in (None, _sweep_of(f))]
    return [{**part, "name": _sweep_of(file), "file": file} for file, part in read_all(store.root, files, ["cells"])]


def _sweep_of(file: Path) -> str:
    """The sweep that a note is of: its file's name, without the hash of the cells."""
    return NOTED.sub("", file.stem)


def sweep_id(store: Store, name: str) -> str:
    """What tells this grid from others of its name in other stores; it stays when the grid grows."""
    ids = [part["id"] for part in _parts(store, name) if part.get("id")]
    return min(ids, default=fingerprint(name)[:12])


def sweeps(store: Store) -> dict[str, dict[str, Any]]:
    """The grids that were started in this store: name → record key → what is known of the cell."""
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
        write_checked(_note_file(store.root / "sweeps" / f"{part['name']}.json", cells), kept)
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
    return sorted(((k, n, b) for k, (n, b) in rows.items()), key=lambda row: -row[2])


def waste(store: Store) -> Iterator[Waste]:
    """What can be deleted, the cheapest to lose first: dead work, cached signals, stages that no record needs.

    Stages that an unfinished cell of a sweep needs stay, and so do those that running work reads.
    """
    found, known = entries(store), sweeps(store)
    unfinished = {
        k
        for cells in known.values()
        for record, c in cells.items()
        if record not in found
        for k in (record, *c.get("stages", ()))
    }
    yield from _dead_work(store, {key.replace("/", "-") for key in unfinished})
    yield from _made_again(store, found)
    wanted = needed([*unfinished, *_read_now(store)], found)
    for key, e in found.items():
        if key.split("/")[0] == SIGNAL and key not in wanted:
            yield Waste(e.path, e.bytes, "cached teacher outputs, made again when needed", store.place(key))
    kept = wanted | needed([k for k in found if k.startswith("record/")], found)
    kept |= needed([k for cells in known.values() for k in _planned(cells)], found)
    for key, e in found.items():
        if key not in kept and key.split("/")[0] != SIGNAL:
            yield Waste(e.path, e.bytes, "no record and no cell of a sweep was made from it", store.place(key))


def _dead_work(store: Store, unfinished: Collection[str]) -> Iterator[Waste]:
    """Work without a live process that no unfinished cell goes on from; stray files and links."""
    for place in sorted(store.work.iterdir()) if store.work.is_dir() else ():
        if place.is_symlink() or not place.is_dir():
            yield Waste(place, size(place), "no work: a stray file or link")
        elif place.name not in unfinished and not held_elsewhere(place):
            yield Waste(place, size(place), "checkpoints and halves of work that nobody is at", place)


def _made_again(store: Store, found: dict[str, Entry]) -> Iterator[Waste]:
    """Damaged stages that are there again, and damaged files."""
    there = {key.replace("/", "-") for key in found}
    for aside in sorted(store.damaged.iterdir()) if store.damaged.is_dir() else ():
        if aside.name.rpartition(".")[0] in there or not aside.is_dir():
            yield Waste(aside, size(aside), "set aside as damaged")


def _read_now(store: Store) -> list[str]:
    """The stages that running work reads."""
    places = store.work.iterdir() if store.work.is_dir() else ()
    return [key for place in places if held_elsewhere(place) for key in needs_of(place)]


def _planned(cells: dict[str, dict[str, Any]]) -> list[str]:
    """The stages of a sweep's cells, those included that are not recorded yet."""
    return [key for record, cell in cells.items() for key in (record, *cell.get("stages", ()))]


def delete(item: Waste) -> bool:
    """Deletes one piece of waste, with its lease in hand; returns whether it was there and nobody was at it.

    It is renamed first, so that a half-deleted stage is never taken for a whole one.
    """
    aside = item.path.with_name(f".deleted-{item.path.name}-{uuid.uuid4().hex[:6]}")
    try:
        if item.place is None:
            item.path.rename(aside)
        else:
            with taking(item.place) as had:
                if not had:
                    return False
                item.path.rename(aside)
    except FileNotFoundError:
        return False
    if aside.is_symlink() or not aside.is_dir():
        aside.unlink(missing_ok=True)
    else:
        shutil.rmtree(aside, ignore_errors=True)
    return True
