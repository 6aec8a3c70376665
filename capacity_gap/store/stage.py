"""The content-addressed store: a stage is a function of its settings and of earlier stages that writes one directory.

`<store>/<name>/<digest>/` holds the result of one stage. It is written beside and then renamed, so if it exists it was
whole; `stage.json` lists its files, and whoever reads the stage compares their sizes. What is damaged moves to
`<store>/.damaged/` and is made again. The digest is the hash of the stage's name, version, settings and input digests:
the same stage is never computed twice, whichever process needs it. Work in progress lives in
`<store>/.work/<name>-<digest>/<owner>/`, where it leaves checkpoints that the next owner takes over. Two processes may
compute one stage at once (the lease makes that rare); the first rename wins and both results are equal. A process
deletes its own folder and those that lay there before it, never one of a later owner.
"""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.runtime.process import Interrupted, Runtime, provenance
from capacity_gap.settings.errors import Damaged, Lost, StageError, StoreError
from capacity_gap.settings.hashing import canonical, fingerprint
from capacity_gap.store.files import (
    META,
    check_sizes,
    disk_full,
    explaining_full_disk,
    is_disk_full,
    is_whole,
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
from capacity_gap.store.lease import Lease, lives_here

log = logging.getLogger(__name__)
SCHEMA = 1


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

    `options` say how it is made (paths, batch on one device); `cost` (FLOPs) and `passes` (tokens × forward passes
    over them, a backward pass counting as two) say how long it takes; `collective` whether several ranks work on it
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
        self.root = Path(root).expanduser().absolute()
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
                f"to {SCHEMA}). Upgrade capacity_gap, or name another store with store=FOLDER."
            )

    def _schema(self) -> int | None:
        """What the marker says; None where there is none yet."""
        if not self.marker.exists():
            return None
        schema = read_json(self.marker, ["schema"])["schema"]
        if not isinstance(schema, int):
            raise Damaged(self.marker, f"names the schema {schema!r}, which is no whole number")
        return schema

    def check(self) -> None:
        """Raises `StoreError` if the store cannot be written or is of a newer schema; writes nothing."""
        existing = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise StoreError(self._unwritable(f"{existing} is not a folder that you may write to"))
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
            "Name another folder with store=FOLDER or the environment variable CAPACITY_GAP_STORE."
        )

    def path(self, stage: Stage) -> Path:
        """Where the result of `stage` is, or will be."""
        return self.root / stage.name / stage.digest

    def place(self, key: str) -> Path:
        """Where the work on a stage lies until it is finished."""
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
        """Moves what is damaged to `.damaged/`, says so, and returns where it is now."""
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
        aside = {p.name.rpartition(".")[0] for p in self.damaged.iterdir()} if self.damaged.is_dir() else ()
        return [s for key, s in closure(stage).items() if key.replace("/", "-") in aside and not self.has(s)]

    def started(self, stage: Stage) -> bool:
        """Whether work on the stage, or on something that it still needs, was begun and not ended."""
        return any(self.place(key).exists() for key in self.missing(stage))

    def missing(self, stage: Stage) -> dict[str, Stage]:
        """The stages that must still run before `stage` is there, itself included, inputs first."""
        if self.has(stage):
            return {}
        found: dict[str, Stage] = {}
        for parent in stage.inputs.values():
            found.update(self.missing(parent))
        found[stage.key] = stage
        return found

    def compute(self, stage: Stage, runtime: Runtime) -> Path:
        """Returns the directory of `stage`, computing whatever of its chain is missing or damaged."""
        self.create()
        self._need(stage, runtime)
        return self.path(stage)

    def _need(self, stage: Stage, runtime: Runtime) -> None:
        """Returns once the stage is there; inputs that are deleted in the meantime are made again."""
        while not self.is_sound(stage):
            for parent in stage.inputs.values():
                self._need(parent, runtime)
            runtime.check()
            self._compute_one(stage, runtime)

    def _compute_one(self, stage: Stage, runtime: Runtime) -> None:
        place, needs = self.place(stage.key), [s.key for s in stage.inputs.values()]
        with (
            explaining_full_disk(self.root, f"stage {stage.key}"),
            Lease(place, lambda: self.is_sound(stage), waits=runtime.waits, needs=needs) as lease,
        ):
            if lease.owned:
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
            log.info("%s: another process took over while this one was stopped", stage.key)
            shutil.rmtree(mine, ignore_errors=True)
        except Exception as error:
            if not self._is_overtaken(stage, runtime):
                raise
            log.warning("%s: begins again, because what it needs is gone (%s)", stage.key, error)
        if self.has(stage):
            shutil.rmtree(mine, ignore_errors=True)
            _remove_leftovers(before)

    def _is_overtaken(self, stage: Stage, runtime: Runtime) -> bool:
        """Whether an error came of what other processes did: they finished the stage, or deleted its inputs."""
        alone = runtime.ranks.size == 1 or not stage.collective  # else ranks would wait for one another for ever
        return alone and (self.is_sound(stage) or not all(map(self.is_sound, stage.inputs.values())))

    def _make(self, stage: Stage, place: Path, mine: Path, runtime: Runtime) -> None:
        out, checkpoint = mine / "out", mine / "checkpoint"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        resumed = adopt_checkpoint(place, checkpoint)
        started = time.monotonic()
        log.info("%s: %s", stage.key, "goes on from a checkpoint" if resumed else "starts")
        inputs = {k: self.path(s) for k, s in stage.inputs.items()}
        if stage.collective:
            runtime.ranks.tell((stage.key, str(checkpoint)))
        stage.fn(StageRun(stage.digest, stage.config, inputs, out, checkpoint, runtime, stage.options))
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
        except (Interrupted, StageError):  # raised on all ranks at once: rank 0 still says that it ends
            runtime.ranks.tell()
            runtime.ranks.part()
            raise
        runtime.ranks.part()

    def _share(self, stage: Stage, checkpoint: Path, runtime: Runtime) -> None:
        inputs = {k: self.path(s) for k, s in stage.inputs.items()}
        with tempfile.TemporaryDirectory() as scratch:
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


def adopt_checkpoint(place: Path, checkpoint: Path) -> bool:
    """Copies the furthest whole checkpoint that an earlier owner left to this owner's folder; whether there is one.

    Checkpoints are folders `step-<number>`, each written whole (`checkpoint.save` renames them into place); one that a
    crash of the machine left empty or torn, or of which a byte has changed, is passed over.
    """
    left = sorted(place.glob("*/checkpoint/step-*"), key=lambda p: int(p.name.removeprefix("step-")), reverse=True)
    checkpoint.mkdir(parents=True, exist_ok=True)
    furthest = next(filter(_is_sound_checkpoint, left), None)
    if furthest and furthest.parent != checkpoint:
        # Another owner may do the same at this moment: whoever comes second starts from its own, or from nothing.
        with contextlib.suppress(OSError):
            shutil.copytree(furthest, checkpoint / f".{furthest.name}.tmp")
            os.rename(checkpoint / f".{furthest.name}.tmp", checkpoint / furthest.name)
    return furthest is not None and (checkpoint / furthest.name).is_dir()


def _is_sound_checkpoint(folder: Path) -> bool:
    if not (whole := is_whole(folder)):
        log.warning("%s is damaged: it is passed over", folder)
    return whole


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


def _remove_leftovers(before: Iterable[Path]) -> None:
    """Removes what earlier owners of a finished stage left, but for those that are stopped here: they clear up
    themselves when they go on.
    """
    for path in before:
        if lives_here(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
