"""What is in a store, what it is for, and what can go: `python -m capacity_gap store ls | du | gc`."""

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap import records
from capacity_gap.errors import StoreError, choose
from capacity_gap.fingerprint import fingerprint
from capacity_gap.lease import held_elsewhere
from capacity_gap.stage import META, Store, write_json

if TYPE_CHECKING:
    import pandas as pd

OUTSIDE = (".work", "sweeps", "failed", "jobs", "logs", "wandb")  # folders of a store that hold no stages
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


def open_store(folder: str) -> Store:
    """The store at `folder`; raises if there is none."""
    store = Store(folder)
    if not (store.root / "store.json").exists():
        raise StoreError(
            f"{folder} is no store: it has no store.json. Name the folder that run.py was given as store=."
        )
    store.check()
    return store


def entries(store: Store) -> dict[str, Entry]:
    """Every finished stage, by key."""
    found = {}
    for meta in sorted(store.root.glob(f"*/*/{META}")):
        key = f"{meta.parent.parent.name}/{meta.parent.name}"
        inputs = tuple(json.loads(meta.read_text())["inputs"].values())
        found[key] = Entry(key, meta.parent, size(meta.parent), inputs)
    return found


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
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
    """Writes down which cells a grid is made of: `<store>/sweeps/<name>.json`; a grown grid adds to what is there."""
    file = store.root / "sweeps" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    own = known.get("id") or uuid.uuid4().hex[:12]
    write_json(file, {"name": name, "id": own, "cells": {**known["cells"], **cells}})


def sweep_id(store: Store, name: str) -> str:
    """What tells this grid from others of its name in other stores; it stays when the grid grows."""
    return json.loads((store.root / "sweeps" / f"{name}.json").read_text()).get("id") or fingerprint(name)[:12]


def sweep_frame(store: Store, name: str) -> "pd.DataFrame":
    """The records of one grid's cells, done and failed.

    Raises:
        ConfigError: there is no such grid; the message lists those that are there.
    """
    known = sweeps(store)
    choose("--sweep", name, known)
    frame = records.to_frame(records.read(store.root))
    return frame[("record/" + frame["cell"]).isin(list(known[name]))]


def sweeps(store: Store) -> dict[str, dict[str, Any]]:
    """The grids that were started in this store: name → record key → what is known of the cell."""
    files = sorted((store.root / "sweeps").glob("*.json"))
    return {f.stem: json.loads(f.read_text())["cells"] for f in files}


def recorded(store: Store) -> list[str]:
    """The keys of all records, of grids and of single cells."""
    return sorted(f"record/{file.parent.name}" for file in store.root.glob(f"record/*/{records.RECORD}"))


def sweeps_of(store: Store, record_key: str) -> list[str]:
    """The grids that a cell belongs to, the youngest first."""
    files = sorted((store.root / "sweeps").glob("*.json"), key=lambda f: -f.stat().st_mtime)
    return [f.stem for f in files if record_key in json.loads(f.read_text())["cells"]]


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
    """What can go, in the order in which it is least missed: dead work, cached signals, what no record needs."""
    for place in sorted(store.work.iterdir()) if store.work.is_dir() else ():
        if not held_elsewhere(place):
            yield Waste(place, size(place), "checkpoints and halves of work that nobody is at")
    found = entries(store)
    signals = [e for key, e in found.items() if key.split("/")[0] == SIGNAL]
    yield from (Waste(e.path, e.bytes, "cached teacher outputs, made again when needed") for e in signals)
    kept = needed([k for k in found if k.startswith("record/")], found)
    kept |= needed([k for cells in sweeps(store).values() for k in _planned(cells)], found)
    for key, entry in found.items():
        if key not in kept and key.split("/")[0] != SIGNAL:
            yield Waste(entry.path, entry.bytes, "no record and no cell of a sweep was made from it")


def _planned(cells: dict[str, dict[str, Any]]) -> list[str]:
    """The stages of a sweep's cells, those included that are not recorded yet."""
    return [key for record, cell in cells.items() for key in (record, *cell.get("stages", ()))]


def delete(item: Waste) -> None:
    """Deletes one piece of waste; renamed first, so that a half-deleted stage is never taken for a whole one."""
    aside = item.path.with_name(f".deleted-{item.path.name}")
    item.path.rename(aside)
    shutil.rmtree(aside)
