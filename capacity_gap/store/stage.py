"""The content-addressed store: a stage is a function of its settings and of earlier stages that writes one directory.

`<store>/<name>/<digest>/` holds the result of one stage. It is written beside and then renamed, so if it exists it was
whole; `stage.json` lists its files, and every reader of the stage compares their sizes. What is damaged moves to
`<store>/.damaged/` and is made again. The digest is the hash of the stage's name, version, settings and input digests:
the same stage is never computed twice, whichever process needs it. Work in progress lives in
`<store>/.work/<name>-<digest>/<owner>/`, where it leaves checkpoints that the next owner takes over. Two processes may
compute one stage at once (the lease makes that rare); the first rename wins and both results are equal. A process
deletes its own folder and those that lay there before it, never one of a later owner, and no checkpoint before the
stage is there.
"""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.runtime.process import Interrupted, Runtime, provenance
from capacity_gap.settings.errors import Damaged, Lost, StageError, StoreError
from capacity_gap.settings.hashing import canonical, fingerprint
from capacity_gap.settings.places import user_path
from capacity_gap.store.files import (
    META,
    check_sizes,
    disk_full,
    explaining_full_disk,
    is_disk_full,
    let_others_read,
    listed,
    name_left_out,
    read_json,
    sync,
    sync_all,
    tell,
    with_checksum,
    write_checked,
    write_json,
)
from capacity_gap.store.lease import Lease
from capacity_gap.store.takeover import CHECKPOINT, adopt_checkpoint, clear_up, leave

log = logging.getLogger(__name__)
SCHEMA = 1
TOGETHER = (Interrupted, StageError)  # what a collective stage raises on all ranks at once


@dataclass(frozen=True)
class StageRun:
    """What a stage function is given: its settings, its inputs' directories, and where to write."""

    digest: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    checkpoint: Path
    runtime: Runtime
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One node of the chain. Equal digests mean equal results.

    `options`: how it is made (paths, batch on one device); `cost` (FLOPs) and `passes` (tokens × forward passes
    over them, a backward pass counting as two) estimate how long it takes; `collective`: several ranks work on it
    together. None of these is hashed.
    """

    name: str
    version: int
    config: Mapping[str, Any]
    inputs: Mapping[str, "Stage"]
    fn: Callable[[StageRun], None] = field(compare=False)
    cost: float = field(default=0.0, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    passes: float = field(default=0.0, compare=False)
    collective: bool = field(default=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """Hash of the name, version, settings and input digests: the stage's identity."""
        return fingerprint(
            {
                "name": self.name,
                "version": self.version,
                "config": self.config,
                "inputs": {k: s.digest for k, s in self.inputs.items()},
            }
        )

    @property
    def key(self) -> str:
        """`name/digest`: the directory of the stage below the store."""
        return f"{self.name}/{self.digest}"


def closure(stage: Stage) -> dict[str, Stage]:
    """Every stage that `stage` needs and itself, by key, inputs before those that use them."""
    found: dict[str, Stage] = {}

    def add(one: Stage) -> None:
        if one.key not in found:  # many ways lead to one stage
            for parent in one.inputs.values():
                add(parent)
            found[one.key] = one

    add(stage)
    return found


class Store:
    """A folder of finished stages, shared by processes and machines."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = user_path(root).absolute()
        self.work = self.root / ".work"
        self.damaged = self.root / ".damaged"
        self.marker = self.root / "store.json"

    def check_schema(self) -> None:
        """Raises `StoreError` if the store is of a newer schema; needs no write access."""
        try:
            schema = self._schema()
        except Damaged as error:
            name_left_out(self.root, [error])
            return
        if schema is not None and schema > SCHEMA:
            raise StoreError(
                f"store={self.root} was written by a newer capacity_gap (store schema {schema}; this version reads up "
                f"to {SCHEMA}). Upgrade capacity_gap, or choose another store with store=FOLDER."
            )

    def _schema(self) -> int | None:
        """The content of the marker; None where there is none yet."""
        if not self.marker.exists():
            return None
        schema = read_json(self.marker, ["schema"])["schema"]
        if not isinstance(schema, int):
            raise Damaged(self.marker, f"names the schema {schema!r}, which is not a whole number")
        return schema

    def check(self) -> None:
        """Raises `StoreError` if the store cannot be written or is of a newer schema; writes nothing."""
        existing = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise StoreError(self._unwritable(f"{existing} is not a writable folder"))
        self.check_schema()

    def create(self) -> None:
        """Makes the folder, with the marker that names its schema."""
        self.check()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._mark()
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.root, "the marker of the store") from error
            raise StoreError(self._unwritable(str(error))) from error

    def _mark(self) -> None:
        schema = None
        try:
            schema = self._schema()
        except Damaged as error:
            with contextlib.suppress(FileNotFoundError):  # another process has just done so
                self.set_aside(self.marker, error)
        if schema is None:
            write_checked(self.marker, {"schema": SCHEMA})

    def _unwritable(self, why: str) -> str:
        return (
            f"store={self.root} cannot be written: {why}. "
            "Choose another folder with store=FOLDER or the environment variable CAPACITY_GAP_STORE."
        )

    def path(self, stage: Stage) -> Path:
        """Where the result of `stage` is, or will be."""
        return self.root / stage.name / stage.digest

    def place(self, key: str) -> Path:
        """Where the work on a stage is kept until it is finished."""
        return self.work / key.replace("/", "-")

    def has(self, stage: Stage) -> bool:
        """Whether the result is there, looked up by name alone, because a plan looks up thousands of stages."""
        return (self.path(stage) / META).exists()

    def is_sound(self, stage: Stage) -> bool:
        """Whether the result is there and every file has its size; hashes are compared by `store verify`."""
        try:
            check_sizes(self.path(stage))
        except Damaged:
            return False
        return True

    def set_aside(self, path: Path, why: Damaged) -> Path:
        """Moves what is damaged to `.damaged/`, prints a line, and returns its new place."""
        self.damaged.mkdir(exist_ok=True)
        name = path.relative_to(self.root).as_posix().replace("/", "-")
        aside = self.damaged / f"{name}.{uuid.uuid4().hex[:6]}"
        os.rename(path, aside)
        told = f"{why.file.relative_to(self.root)} is damaged: it {why.why}; {path.name} was moved to {aside}"
        log.warning("%s", told)
        tell(told)
        return aside

    def lost(self, stage: Stage) -> list[Stage]:
        """The stages behind `stage`, itself included, that were set aside as damaged and not made again yet."""
        aside = self.aside()
        return [s for key, s in closure(stage).items() if key in aside and not self.has(s)] if aside else []

    def aside(self) -> set[str]:
        """What was ever set aside as damaged: stages by key, other files by their path below the store."""
        found = self.damaged.iterdir() if self.damaged.is_dir() else ()
        return {p.name.rpartition(".")[0].replace("-", "/", 1) for p in found}

    def finished(self, stage: Stage) -> bool:
        """Whether nothing is to be done for `stage`: it is whole, and so is all behind it that was once damaged."""
        return self.is_sound(stage) and not self.lost(stage)

    def started(self, stage: Stage) -> bool:
        """Whether work on the stage, or on something that it still needs, was begun and not ended."""
        return any(self.place(key).exists() for key in self.missing(stage))

    def missing(self, stage: Stage) -> dict[str, Stage]:
        """The stages that must still run before `stage` is finished, inputs first."""
        found = {s.key: s for s in self.lost(stage)}
        asked: set[str] = set()

        def add(one: Stage) -> None:
            if one.key in asked or self.is_sound(one):  # many ways lead to one stage
                return
            asked.add(one.key)
            for parent in one.inputs.values():
                add(parent)
            found[one.key] = one

        add(stage)
        return found

    def compute(self, stage: Stage, runtime: Runtime) -> Path:
        """Returns the directory of `stage`, computing whatever of its chain is missing or damaged."""
        self.create()
        self._need(stage, runtime)
        return self.path(stage)

    def make_again(self, stage: Stage, runtime: Runtime) -> None:
        """Computes what was set aside as damaged behind a stage that is there."""
        for lost in self.lost(stage):
            self.compute(lost, runtime)

    def _need(self, stage: Stage, runtime: Runtime) -> None:
        """Returns once the stage is there; inputs that are deleted in the meantime are made again."""
        left: list[Path] = []  # folders of this process, from which it was overtaken
        while not self.is_sound(stage):
            for parent in stage.inputs.values():
                self._need(parent, runtime)
            runtime.check()
            self._compute_one(stage, runtime, left)
        for mine in left:
            shutil.rmtree(mine, ignore_errors=True)
            with contextlib.suppress(OSError):
                mine.parent.rmdir()  # unless others are there

    def _compute_one(self, stage: Stage, runtime: Runtime, left: list[Path]) -> None:
        place, needs = self.place(stage.key), [s.key for s in stage.inputs.values()]
        with (
            explaining_full_disk(self.root, f"stage {stage.key}"),
            Lease(place, lambda: self.is_sound(stage), waits=runtime.waits, needs=needs) as lease,
        ):
            if lease.owned:
                left.append(place / lease.owner)
                self._clear(stage)
                self._run(stage, place, lease, runtime)

    def _clear(self, stage: Stage) -> None:
        """Sets aside what stands in the way of a result: a folder that is not whole."""
        if self.path(stage).exists():
            try:
                check_sizes(self.path(stage))
            except Damaged as error:
                self.set_aside(self.path(stage), error)

    def _run(self, stage: Stage, place: Path, lease: Lease, runtime: Runtime) -> None:
        """Computes one stage, unless another owner takes over on the way or what it needs is deleted under it."""
        mine = place / lease.owner
        before = [p for p in place.iterdir() if p not in (mine, lease.file)]
        try:
            with runtime.following(stage.key, mine / "progress.json", stage.cost, lease.is_lost):
                self._make(stage, place, mine, runtime)
        except Lost:
            self._leave(stage, mine)
        except Exception as error:
            if runtime.ranks.size > 1 and stage.collective:
                raise  # else ranks would wait for one another for ever
            if lease.is_taken():
                self._leave(stage, mine)
            elif self.is_sound(stage) or not all(map(self.is_sound, stage.inputs.values())):
                log.warning("%s: restarted, because an input was deleted (%s)", stage.key, error)
            else:
                raise
        if self.has(stage):
            shutil.rmtree(mine, ignore_errors=True)
            clear_up(before)

    def _leave(self, stage: Stage, mine: Path) -> None:
        log.info("%s: another process took over while this one was stopped", stage.key)
        leave(mine)

    def _make(self, stage: Stage, place: Path, mine: Path, runtime: Runtime) -> None:
        out, checkpoint = mine / "out", mine / CHECKPOINT
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        resumed = adopt_checkpoint(place, checkpoint)
        started = time.monotonic()
        log.info("%s: %s", stage.key, "resumed from a checkpoint" if resumed else "starts")
        inputs = {k: self.path(s) for k, s in stage.inputs.items()}
        _call(stage, StageRun(stage.digest, stage.config, inputs, out, checkpoint, runtime, stage.options))
        meta = self._meta(stage, runtime, time.monotonic() - started, resumed)
        write_json(out / META, with_checksum({**meta, "files": listed(out)}))
        publish(out, self.path(stage))
        log.info("%s: done in %.1f s", stage.key, time.monotonic() - started)

    def follow(self, stages: Mapping[str, Stage], runtime: Runtime) -> None:
        """What ranks other than the first do: their share of each collective stage, until rank 0 says that it ends."""
        import torch

        torch.set_num_threads(runtime.threads)
        try:
            while told := runtime.ranks.tell():
                self._share(stages[told[0]], Path(told[1]), runtime)
        except TOGETHER:  # rank 0 still says that it ends
            runtime.ranks.tell()
            runtime.ranks.part()
            raise
        runtime.ranks.part()

    def _share(self, stage: Stage, checkpoint: Path, runtime: Runtime) -> None:
        inputs = {k: self.path(s) for k, s in stage.inputs.items()}
        with tempfile.TemporaryDirectory() as scratch, runtime.working(collective=True):
            stage.fn(StageRun(stage.digest, stage.config, inputs, Path(scratch), checkpoint, runtime, stage.options))

    def _meta(self, stage: Stage, runtime: Runtime, wall_s: float, resumed: bool) -> dict[str, Any]:
        return {
            "name": stage.name,
            "version": stage.version,
            "digest": stage.digest,
            "config": canonical(stage.config),
            "inputs": {k: s.key for k, s in stage.inputs.items()},
            "cost_flops": stage.cost,
            "passes": stage.passes,
            "resumed": resumed,  # wall_s is then that of the last part only
            "wall_s": round(wall_s, 3),
            **provenance(runtime),
        }


def _call(stage: Stage, run: StageRun) -> None:
    ranks = run.runtime.ranks
    if stage.collective:
        ranks.tell((stage.key, str(run.checkpoint)))
    try:
        with run.runtime.working(collective=stage.collective):
            stage.fn(run)
    except TOGETHER:
        raise
    except BaseException:  # such as a disk that is full under the checkpoint that only this rank writes
        if stage.collective:
            ranks.desert()
        raise


def publish(out: Path, final: Path) -> None:
    """Renames a finished directory into place; if another process was first, its equal result stays."""
    let_others_read(out)
    # Content before name: else a crash of the machine could leave a published folder of empty files.
    sync_all(out)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(out, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        check_sizes(final)
    sync(final.parent)
