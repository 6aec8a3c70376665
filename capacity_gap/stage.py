"""The content-addressed store: a stage is a function of its settings and of earlier stages that writes one directory.

`<store>/<name>/<digest>/` holds the result of one stage. It is written beside and then renamed, so if it exists it is
whole. The digest is the hash of the stage's name, version, settings and input digests: the same question is never
computed twice, whoever asks it. Work in progress lives in `<store>/.work/<name>-<digest>/<owner>/`, where it leaves
checkpoints that the next owner takes over. Two processes may compute one stage at once (the lease makes that rare);
the first rename wins and both results are equal.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from capacity_gap.errors import StageError, StoreError
from capacity_gap.fingerprint import canonical, fingerprint
from capacity_gap.lease import Lease
from capacity_gap.runtime import Interrupted, Runtime, provenance

log = logging.getLogger(__name__)
SCHEMA = 1
META = "stage.json"


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
    for parent in stage.inputs.values():
        found.update(closure(parent))
    found[stage.key] = stage
    return found


class Store:
    """A folder of finished stages, shared by processes and machines."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser().absolute()
        self.work = self.root / ".work"

    def check(self) -> None:
        """Raises `StoreError` if the store cannot be written or is of a newer schema; writes nothing."""
        existing = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise StoreError(self._unwritable(f"{existing} is not a folder that you may write to"))
        marker = self.root / "store.json"
        schema = json.loads(marker.read_text())["schema"] if marker.exists() else SCHEMA
        if schema > SCHEMA:
            raise StoreError(
                f"store={self.root} was written by a newer capacity_gap (store schema {schema}; this version reads up "
                f"to {SCHEMA}). Upgrade capacity_gap, or name another store with store=FOLDER."
            )

    def create(self) -> None:
        """Makes the folder, with the marker that names its schema."""
        self.check()
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            if not (self.root / "store.json").exists():
                write_json(self.root / "store.json", {"schema": SCHEMA})
        except OSError as error:
            raise StoreError(self._unwritable(str(error))) from error

    def _unwritable(self, why: str) -> str:
        return (
            f"store={self.root} cannot be written: {why}. "
            "Name another folder with store=FOLDER or the environment variable CAPACITY_GAP_STORE."
        )

    def path(self, stage: Stage) -> Path:
        """Where the result of `stage` is, or will be."""
        return self.root / stage.name / stage.digest

    def has(self, stage: Stage) -> bool:
        """Whether the result is there; if it is, it is whole."""
        return (self.path(stage) / META).exists()

    def started(self, stage: Stage) -> bool:
        """Whether work on the stage, or on something that it still needs, was begun and not ended."""
        return any((self.work / key.replace("/", "-")).exists() for key in self.missing(stage))

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
        """Returns the directory of `stage`, computing whatever of its chain is not there yet."""
        self.create()
        for todo in self.missing(stage).values():
            runtime.check()
            self._compute_one(todo, runtime)
        return self.path(stage)

    def _compute_one(self, stage: Stage, runtime: Runtime) -> None:
        place = self.work / stage.key.replace("/", "-")
        with Lease(place, lambda: self.has(stage), waits=runtime.waits) as lease:
            if lease.owned:
                self._run(stage, place, lease, runtime)

    def _run(self, stage: Stage, place: Path, lease: Lease, runtime: Runtime) -> None:
        mine = place / lease.owner
        out, checkpoint = mine / "out", mine / "checkpoint"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        resumed = adopt_checkpoint(place, checkpoint)
        started = time.monotonic()
        log.info("%s: %s", stage.key, "goes on from a checkpoint" if resumed else "starts")
        with disk_errors(stage, self.root), runtime.following(stage.key, mine / "progress.json", stage.cost):
            inputs = {k: self.path(s) for k, s in stage.inputs.items()}
            if stage.collective:
                runtime.ranks.tell((stage.key, str(checkpoint)))
            stage.fn(StageRun(stage.digest, stage.config, inputs, out, checkpoint, runtime, stage.options))
            write_json(out / META, self._meta(stage, runtime, time.monotonic() - started, resumed))
            publish(out, self.path(stage))
        log.info("%s: done in %.1f s", stage.key, time.monotonic() - started)
        shutil.rmtree(place, ignore_errors=True)

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
    """Copies the furthest checkpoint that an earlier owner left to this owner's folder; returns whether there is one.

    Checkpoints are folders `step-<number>`, each written whole (`write_checkpoint` renames them into place).
    """
    left = sorted(place.glob("*/checkpoint/step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    checkpoint.mkdir(parents=True, exist_ok=True)
    if left and left[-1].parent != checkpoint:
        # Another owner may do the same at this moment: whoever comes second starts from its own, or from nothing.
        with contextlib.suppress(OSError):
            shutil.copytree(left[-1], checkpoint / f".{left[-1].name}.tmp")
            os.rename(checkpoint / f".{left[-1].name}.tmp", checkpoint / left[-1].name)
    return bool(left)


def publish(out: Path, final: Path) -> None:
    """Renames a finished directory into place; if another process was first, its equal result stays."""
    let_others_read(out)
    for file in sorted(out.rglob("*")):
        if file.is_file():
            _sync(file)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(out, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync(final.parent)


def let_others_read(folder: Path) -> None:
    """Who may read the folder may read its files: safetensors are written for their owner alone, stores are shared."""
    allowed = folder.stat().st_mode & 0o444
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | allowed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(stage: Stage, root: Path) -> Iterator[None]:
    """Turns a full disk into an error that names the stage, the place and the room left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(root).free
        raise StageError(
            f"the disk is full: stage {stage.key} could not be written below {root} ({free / 1e6:.1f} MB are free). "
            "Nothing in the store is damaged. Free some space (`python -m capacity_gap store du` says what takes it) "
            "and start the same command again: it goes on from its checkpoints."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all (a file beside, renamed); refuses NaN, which JSON cannot carry."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False, ensure_ascii=False)
        file.write("\n")
    os.replace(beside, path)
