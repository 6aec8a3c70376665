"""Deletion of unused parts of a store: `python -m capacity_gap store gc`.

A list of waste is outdated as soon as it is made: a grid may start meanwhile. So each item is checked again, with its
lease held, just before it is renamed away.
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.store.contents import SIGNAL, Entry, entries, needed, note_files, read_notes, size, stage_folders
from capacity_gap.store.files import META, read_json, tell
from capacity_gap.store.lease import LEASE, at_work, needs_of, owner_of, taking
from capacity_gap.store.stage import Store

DELETED = ".deleted-"  # begins the name of what is being deleted
ASIDE = re.compile(r"(?P<name>.+)\.[0-9a-f]{6}")  # what `Store.set_aside` calls a file or folder
NOTE_ASIDE = re.compile(r"sweeps-(?P<note>.+\.json)\.[0-9a-f]{6}")


@dataclass(frozen=True)
class Waste:
    """Something that can be deleted, and why."""

    path: Path
    bytes: int
    reason: str
    place: Path | None = None  # where the lease lies that must be had before it is deleted
    is_waste: Callable[[], bool] = lambda: True  # asked again before it is deleted
    dead: str | None = None  # the owner there that was watched and did not beat


class Kept:
    """What must stay, as it was when `look` was called last."""

    def __init__(self, store: Store) -> None:
        self.store = store
        folders = {f"{f.parent.name}/{f.name}": f for f in stage_folders(store)}
        self.found = entries(store)
        self.blind = {k: f for k, f in folders.items() if k not in self.found and f.exists()}  # stages nobody can read
        places = list(store.work.iterdir()) if store.work.is_dir() else []
        alive = at_work(places)
        self.dead = {place: owner_of(place) for place in places if place not in alive}
        self._seen: Any = None
        self.look()

    def holds_work(self, place: Path) -> bool:
        """Whether an unfinished cell may go on from the work in `place`."""
        return bool(self.unreadable) or place.name in self._unfinished

    def is_at_work(self, place: Path) -> bool:
        """Whether a live process may be at work there."""
        return place in self._at_work()

    def holds_signal(self, key: str) -> bool:
        """Whether an unfinished cell or running work may read a cached signal."""
        return bool(self.unreadable) or key in self._wanted

    def holds(self, key: str) -> bool:
        """Whether a record, a cell of a sweep or running work may need a stage."""
        return bool(self.unreadable) or key in self._kept

    def look(self) -> None:
        """Looks again, which costs much only if a note, a lease or something damaged has come or gone."""
        reads = {key for place in self._at_work() for key in needs_of(place)}
        seen = (_listing(self.store.root / "sweeps"), _listing(self.store.damaged), frozenset(reads))
        if seen == self._seen:
            return
        self._seen = seen
        notes, damaged = read_notes(self.store)
        cells = {key: cell["stages"] for note in notes for key, cell in note["cells"].items()}
        planned = {key for record, stages in cells.items() for key in (record, *stages)}
        lost = self._lost(planned)
        unfinished = {
            key
            for record, stages in cells.items()
            if record not in self.found or not lost.isdisjoint(stages)
            for key in (record, *stages)
        }
        inputs, unknown = self._inputs_aside({key.replace("/", "-") for key in planned})
        unknown += [folder for key, folder in self.blind.items() if key not in planned]
        self.unreadable = [*(error.file for error in damaged), *_notes_aside(self.store), *unknown]
        self._unfinished = {key.replace("/", "-") for key in unfinished}
        self._wanted = needed([*unfinished, *reads], self.found)
        records = [key for key in self.found if key.startswith("record/")]
        self._kept = self._wanted | needed([*planned, *inputs, *records], self.found)

    def _lost(self, keys: Iterable[str]) -> set[str]:
        """The stages that were set aside or are damaged in place: a recorded cell recomputes them."""
        aside = {match["name"] for path in _inside(self.store.damaged) if (match := ASIDE.fullmatch(path.name))}
        return {
            key
            for key in keys
            if key not in self.found and (key.replace("/", "-") in aside or (self.store.root / key).exists())
        }

    def _inputs_aside(self, planned: set[str]) -> tuple[list[str], list[Path]]:
        """The inputs of set-aside stages, and the stages whose inputs are unknown."""
        there = {key.replace("/", "-") for key in self.found}
        inputs: list[str] = []
        unknown = []
        for path in _inside(self.store.damaged):
            match = ASIDE.fullmatch(path.name)
            if match and path.is_dir() and match["name"] not in there | planned:
                try:
                    inputs += read_json(path / META, {"inputs": dict})["inputs"].values()
                except OSError:
                    unknown.append(path)
        return inputs, unknown

    def _at_work(self) -> set[Path]:
        """Where a live process may be at work: wherever there is a lease, but for those whose owner was found dead."""
        leases = self.store.work.glob(f"*/{LEASE}")
        return {file.parent for file in leases if self.dead.get(file.parent) != owner_of(file.parent)}


def _listing(folder: Path) -> frozenset[tuple[str, int]]:
    """The names in a folder, with the times at which they were last written."""
    found = set()
    for path in _inside(folder):
        with contextlib.suppress(OSError):
            found.add((path.name, path.lstat().st_mtime_ns))
    return frozenset(found)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _notes_aside(store: Store) -> list[Path]:
    """The notes that were set aside as damaged and are not there again: the cells they name are unknown."""
    there = {file.name for file in note_files(store)}
    asides = ((path, NOTE_ASIDE.fullmatch(path.name)) for path in _inside(store.damaged))
    return [path for path, match in asides if match and match["note"] not in there]


def waste(store: Store) -> Iterator[Waste]:
    """What can be deleted, the cheapest to lose first: dead work, cached signals, stages that no record needs.

    Stages that an unfinished cell of a sweep needs stay, and so do those that running work reads. While a note of a
    sweep cannot be read, or a stage that no note names, nothing goes that it may need.
    """
    kept = Kept(store)
    yield from _half_deleted(store)
    yield from _dead_work(store, kept)
    yield from _set_aside(store, kept)
    for key, e in kept.found.items():
        if key.split("/")[0] == SIGNAL and not kept.holds_signal(key):
            yield _stage(kept, e, "cached teacher logits, recomputed when needed", kept.holds_signal)
    for key, e in kept.found.items():
        if key.split("/")[0] != SIGNAL and not kept.holds(key):
            yield _stage(kept, e, "not used by any record or cell of a sweep", kept.holds)
    for path in kept.unreadable:
        if path not in kept.blind.values():  # they were named as left out
            tell(f"everything that {path.relative_to(store.root)} may name is kept: {_mend(store, path)}")


def _mend(store: Store, path: Path) -> str:
    if path.parent == store.damaged:
        return "it was set aside as damaged. Run its sweep or cell again, or delete it if it is not needed."
    return f"it is damaged. `python -m capacity_gap store verify {store.root} --repair` moves it to .damaged/."


def _stage(kept: Kept, entry: Entry, reason: str, holds: Callable[[str], bool]) -> Waste:
    return Waste(entry.path, entry.bytes, reason, kept.store.place(entry.key), _unless(kept, holds, entry.key))


def _unless(kept: Kept, holds: Callable[[Any], bool], what: Any) -> Callable[[], bool]:
    """The check that is repeated before something is deleted."""

    def is_waste() -> bool:
        kept.look()
        return not holds(what)

    return is_waste


def _half_deleted(store: Store) -> Iterator[Waste]:
    """What was renamed away by a deletion that did not come to its end."""
    for path in sorted(store.root.glob(f"*/{DELETED}*")):
        yield Waste(path, size(path), "half-deleted")


def _dead_work(store: Store, kept: Kept) -> Iterator[Waste]:
    """Work without a live process that no unfinished cell goes on from; stray files and links."""
    for place in _inside(store.work):
        if place.name.startswith(DELETED):
            continue
        if place.is_symlink() or not place.is_dir():
            yield Waste(place, size(place), "a stray file or link")
        elif not kept.holds_work(place) and not kept.is_at_work(place):
            yield Waste(
                place,
                size(place),
                "checkpoints and partial results without a running process",
                place,
                _unless(kept, kept.holds_work, place),
                kept.dead.get(place),
            )


def _set_aside(store: Store, kept: Kept) -> Iterator[Waste]:
    """Damaged stages and notes of sweeps that are there again, and other damaged files."""
    there = {key.replace("/", "-"): entry.path / META for key, entry in kept.found.items()}
    for path in _inside(store.damaged):
        match = ASIDE.fullmatch(path.name)
        again = there.get(match["name"]) if match else None
        if again is not None:
            yield Waste(path, size(path), "set aside as damaged, and recomputed", is_waste=again.exists)
        elif not path.is_dir() and path not in kept.unreadable:
            free = _unless(kept, lambda file: file in kept.unreadable, path)
            yield Waste(path, size(path), "set aside as damaged", is_waste=free)


def delete(item: Waste) -> str:
    """Deletes one piece of waste, with its lease in hand; returns why it was not deleted, or nothing.

    It is renamed first, so that a half-deleted stage is never taken for a whole one.
    """
    try:
        with taking(item.place, dead=item.dead) if item.place else contextlib.nullcontext("") as busy:
            if busy:
                return busy
            if not item.is_waste():
                return "it is needed again"
            aside = _hide(item.path)
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return error.strerror or str(error)
    if aside.is_symlink() or not aside.is_dir():
        with contextlib.suppress(OSError):
            aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)
    return f"{aside} is left of it" if os.path.lexists(aside) else ""


def _hide(path: Path) -> Path:
    if path.name.startswith(DELETED):
        path.lstat()
        return path
    return path.rename(path.with_name(f"{DELETED}{path.name}-{uuid.uuid4().hex[:6]}"))
