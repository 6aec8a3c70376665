"""Every file of a store against its hash: `python -m capacity_gap store verify [--repair]`.

A stage is compared with the list in its `stage.json`, a note with its own checksum. Stages of versions that kept no
list are checked as far as their formats allow, and get their list here.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import Damaged
from capacity_gap.settings.hashing import fingerprint
from capacity_gap.store.contents import check_cells, note_files, size, stage_folders
from capacity_gap.store.files import (
    META,
    check_sizes,
    is_whole_file,
    listed,
    read_json,
    reading,
    sha256,
    unreadable,
    write_checked,
)
from capacity_gap.store.lease import taking
from capacity_gap.store.stage import Store

READERS = 4  # files that are hashed at once, where there are as many cores
SAY_EVERY_S = 10.0  # how often progress is said where it is no terminal


@dataclass
class Verified:
    """What a verification found."""

    stages: int = 0
    notes: int = 0
    bytes: int = 0
    listed: int = 0  # stages of older versions that got their list
    damaged: list[Damaged] = field(default_factory=list)  # one a stage or note
    repaired: list[Path] = field(default_factory=list)  # where what was damaged lies now
    left: list[str] = field(default_factory=list)  # what was not repaired, and why
    seconds: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether nothing damaged is left in its place."""
        return len(self.repaired) == len(self.damaged)


def verify(store: Store, *, repair: bool = False, say: Callable[[str], None] = lambda line: None) -> Verified:
    """Reads every finished stage and every note of a store; with `repair` sets aside what is damaged.

    Args:
        store: what is read; without write access older stages get no list.
        repair: whether damaged stages and notes are moved to `.damaged/`.
        say: is given a line about the progress, now and then.
    """
    found, started = Verified(), time.monotonic()
    for note in _notes(store):
        found.notes += 1
        _take(store, note, _fault_of_note(note), found, repair)
    folders = stage_folders(store)
    sizes = {folder: size(folder) for folder in folders}
    total = sum(sizes.values())
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        for folder, fault in zip(folders, pool.map(fault_of_stage, folders), strict=True):
            found.stages += 1
            found.bytes += sizes[folder]
            found.listed += fault is None and _add_list(folder)
            _take(store, folder, fault, found, repair)
            found.seconds = time.monotonic() - started
            say(_progress(found, total))
    return found


def _progress(found: Verified, total: int) -> str:
    rate = found.bytes / max(found.seconds, 1e-9)
    share = found.bytes / max(1, total)
    return f"verify: {share:4.0%}, {found.bytes / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.0f} MB/s"


def _take(store: Store, path: Path, fault: Damaged | None, found: Verified, repair: bool) -> None:
    """Counts one stage or note, and sets it aside if it is damaged and that was asked for."""
    if fault is None or not path.exists():  # deleted by another process meanwhile
        return
    if not repair:
        found.damaged.append(fault)
        return
    is_stage = path.is_dir()
    with taking(store.place(f"{path.parent.name}/{path.name}")) if is_stage else contextlib.nullcontext("") as busy:
        # The hashes may be an hour old by now, and another process may have made it again.
        now = fault if busy else (fault_of_stage if is_stage else _fault_of_note)(path)
        if now is None:
            return
        if busy:
            found.left.append(f"{path.relative_to(store.root)}: {busy}")
        else:
            try:
                found.repaired.append(store.set_aside(path, now))
            except FileNotFoundError:
                return
        found.damaged.append(now)


def _notes(store: Store) -> list[Path]:
    failed = sorted((store.root / "failed").glob("[!.]*.json"))
    return [*([store.marker] if store.marker.exists() else []), *note_files(store), *failed]


def _fault_of_note(file: Path) -> Damaged | None:
    try:
        value = read_json(file)
        if file.parent.name == "sweeps":
            with reading(file):
                check_cells(file, value)
    except OSError as error:  # `Damaged` is a kind of it
        return unreadable(file, error)
    return None


def fault_of_stage(folder: Path) -> Damaged | None:
    """What of a stage is not what was written there, hashes included; None if it is sound."""
    try:
        check_sizes(folder)
        meta = read_json(folder / META, {"name": str, "version": int, "config": dict, "inputs": dict, "digest": str})
        with reading(folder / META):
            _check_identity(folder, meta)
            _check_content(folder, meta)
    except FileNotFoundError as error:
        return Damaged(Path(error.filename or folder), "is missing")
    except OSError as error:  # a bad sector costs the stage and not the verification
        return unreadable(Path(error.filename or folder), error)
    return None


def _check_identity(folder: Path, meta: dict[str, Any]) -> None:
    """The settings that a stage names must be those that its digest was made of."""
    inputs = {k: key.partition("/")[2] for k, key in meta["inputs"].items()}
    own = {"name": meta["name"], "version": meta["version"], "config": meta["config"], "inputs": inputs}
    if fingerprint(own) != folder.name:
        raise Damaged(folder / META, f"has different settings than {folder.name}")


def _check_content(folder: Path, meta: dict[str, Any]) -> None:
    if "files" not in meta:
        for file in folder.rglob("*"):
            if file.is_file() and file.suffix in (".json", ".safetensors") and not is_whole_file(file):
                raise Damaged(file, "cannot be read completely")
        return
    for name, known in meta["files"].items():
        if sha256(folder / name) != known["sha256"]:
            raise Damaged(folder / name, "has the right size but different content")


def _add_list(folder: Path) -> bool:
    """Gives a stage of an older version its list of files; returns whether it was one, and could be written."""
    with contextlib.suppress(OSError):  # a store that may only be read, or a stage that has just been deleted
        meta = read_json(folder / META)
        if "files" not in meta:
            write_checked(folder / META, {**meta, "files": listed(folder)})
            return True
    return False


class ProgressLine:
    """Shows the latest line in place on a terminal, and one now and then elsewhere."""

    def __init__(self) -> None:
        self.said = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __call__(self, line: str) -> None:
        """Shows the line, or keeps it to itself."""
        now = time.monotonic()
        if self.terminal:
            print(f"\r{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        elif now - self.said > SAY_EVERY_S:
            self.said = now
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leaves the line where it is."""
        if self.terminal:
            print(file=sys.stderr)
