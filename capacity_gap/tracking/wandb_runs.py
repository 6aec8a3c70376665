"""Where the numbers of a cell are mirrored while it runs: one small protocol, W&B behind it.

The local JSONL history and the record are always written, by the stages themselves; a tracker only mirrors them, so
its failures never stop the work. W&B's key is read by W&B alone, from its own places; nothing here ever holds it.
"""

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from capacity_gap.tracking.tracking_config import TrackingConfig

log = logging.getLogger(__name__)
REACH_S = 12  # how long W&B is waited for, once a process, before everything goes offline
INIT_S = 15  # and at the start of a run
FINISH_S = 30  # how long the last points of a run may take to upload; what is left stays on disk for `sync`
UPLOAD_S = 1800  # the same where files go along
LONGEST_NAME = 64  # W&B's limit for a tag
UNSENT = "capacity_gap.unsent"  # marks an online run whose end could not be uploaded
ENDED = "capacity_gap.ended"  # marks an offline run that nobody writes to any more

Point = Mapping[str, Any]


class Tracker(Protocol):
    """The events of a running cell."""

    def log(self, point: Point) -> None:
        """One point of the training history, as it is made."""

    def finish(self, row: Point, history: Iterable[Point] = (), files: Sequence[Path] = ()) -> None:
        """The cell is done or has failed: its record, all its points, and what to keep beside them."""

    def leave(self) -> None:
        """The cell is not done, and another process will continue it."""


class NoTracker:
    """Mirrors nothing."""

    def log(self, point: Point) -> None:
        """Does nothing."""

    def finish(self, row: Point, history: Iterable[Point] = (), files: Sequence[Path] = ()) -> None:
        """Does nothing."""

    def leave(self) -> None:
        """Does nothing."""


def harmless(method: Callable[..., None]) -> Callable[..., None]:
    """An error in W&B ends the mirror, never the cell."""

    @functools.wraps(method)
    def guarded(self: "WandbTracker", *given: Any, **named: Any) -> None:
        if self.broken:
            return
        try:
            method(self, *given, **named)
        except Exception as error:
            self.broken = True
            log.warning("W&B failed (%s: %s): this cell is no longer mirrored.", type(error).__name__, error)

    return guarded


class WandbTracker:
    """One W&B run for one cell; its id is the cell's digest.

    The run is opened by the first point, or by the end: a process that only waits for another's work opens none. A
    cell that goes on from a checkpoint tells its whole history again: offline it takes the place of the run that was
    left, online it goes on in the same one. So a cell is one run, with each step once.
    """

    def __init__(self, open_run: Callable[[], Any], *, cell: str) -> None:
        self.broken = False
        self._open, self._cell = open_run, cell
        self._run: Any = None
        self._seen = -1

    @harmless
    def log(self, point: Point) -> None:
        """Logs one point at its step; steps already logged are passed over."""
        self._log(point)

    @harmless
    def finish(self, row: Point, history: Iterable[Point] = (), files: Sequence[Path] = ()) -> None:
        """Logs what is missing of the history, writes the record as the run's summary and ends the run."""
        for point in history:
            self._log(point)
        run = self._opened()
        run.summary.update(summary(row))
        if files:
            run.log_artifact(artifact(self._cell, files))
        self._run = None
        end(run, failed=row["status"] != "done")

    @harmless
    def leave(self) -> None:
        """Ends a run that was opened; the process that continues the cell replaces it."""
        if self._run is not None:
            run, self._run = self._run, None
            run.summary.update({"status": "interrupted"})
            end(run, failed=True)

    def _log(self, point: Point) -> None:
        run = self._opened()
        if point["step"] > self._seen:
            self._seen = point["step"]
            run.log({f"train/{k}": v for k, v in point.items() if k != "step"}, step=point["step"])

    def _opened(self) -> Any:
        if self._run is None:
            self._run = self._open()
            if self._run.resumed:
                self._seen = self._run.step - 1  # what the server has
        return self._run


def summary(row: Point) -> dict[str, Any]:
    """A record as a run's summary: what was measured. An empty `error` takes back an earlier failure's."""
    found = {k: v for k, v in row.items() if v is not None} | {"error": row.get("error")}
    if row.get("teacher_params") and row.get("student_params"):
        found["teacher_over_student"] = row["teacher_params"] / row["student_params"]
    return found


def artifact(cell: str, files: Sequence[Path]) -> Any:
    """Files of the store as one artifact; they never change there, so W&B need not copy them first."""
    import wandb

    made = wandb.Artifact(f"cell-{cell}", type="cell")
    for path in files:
        if path.is_dir():
            made.add_dir(str(path), policy="immutable")
        else:
            made.add_file(str(path), policy="immutable")
    return made


def start(
    tracking: TrackingConfig, *, cell: str, name: str, config: Point, folder: Path, sweeps: Sequence[str] = ()
) -> Tracker:
    """What mirrors one cell. `sweeps`: the grids that it belongs to, youngest first: its group, and its tags."""
    if tracking.mode == "disabled":
        return NoTracker()
    about = {"id": cell, "name": name, "config": dict(config), "job_type": "cell"}
    return WandbTracker(lambda: open_run(tracking, folder, sweeps=sweeps, **about), cell=cell)


def open_run(tracking: TrackingConfig, folder: Path, *, sweeps: Sequence[str] = (), **about: Any) -> Any:
    """A W&B run below `folder`, offline if online cannot be had; an offline run of the same id gives way to it.

    Args:
        tracking: mode, project, entity.
        folder: where offline runs are, in a folder `wandb`.
        sweeps: the first becomes the group, all become tags.
        about: what `wandb.init` takes: id, name, config, job_type.
    """
    import wandb

    named = [tag_of(s) for s in sweeps]
    about |= {"tags": named, "group": named[0] if named else None, "dir": str(folder)}
    about |= {"project": tracking.project, "entity": tracking.entity, "reinit": "finish_previous"}
    about["settings"] = wandb.Settings(
        console="off",
        init_timeout=INIT_S,
        finish_timeout=FINISH_S if tracking.artifacts == "none" else UPLOAD_S,
        finish_timeout_raises=True,
        disable_code=True,
        disable_git=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    if settled(tracking) == "online":
        try:
            return wandb.init(**about, mode="online", resume="allow")
        except Exception as error:
            go_offline(str(error))
            wandb.teardown()  # else the failed run holds on to its id
    give_way(folder, about["id"])
    return wandb.init(**about, mode="offline")


def tag_of(sweep: str) -> str:
    """A grid's tag, and the group of its runs; of a name that is longer than W&B takes, as much as it takes."""
    return sweep[:LONGEST_NAME]


def settled(tracking: TrackingConfig) -> str:
    """The mode that can be had: `online` only if W&B answers. Asked once a process, never interactively."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # an offline run then touches no network at all
    os.environ.setdefault("WANDB_SILENT", "true")
    if tracking.mode == "online" and os.environ.get("WANDB_MODE", "online") == "online":
        _reach()
        return os.environ.get("WANDB_MODE", "online")
    return "offline" if tracking.mode == "online" else tracking.mode


@functools.cache
def _reach() -> None:
    import wandb

    try:
        if not wandb.login(prompt=False, timeout=REACH_S):
            go_offline("no API key: `wandb login` or WANDB_API_KEY sets one")
    except Exception as error:
        go_offline(str(error))


def go_offline(why: str) -> None:
    """Says so in one line, and keeps this process and those that it starts from trying again."""
    os.environ["WANDB_MODE"] = "offline"
    line = (
        f"warning: W&B cannot be reached ({_first(why)}). Continuing offline; `python -m capacity_gap sync` uploads it."
    )
    print(line, file=sys.stderr, flush=True)
    log.info("%s", line)


def _first(text: str) -> str:
    """The first line of a message, without its full stop."""
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "unknown error"


def run_folders(folder: Path, run_id: str = "*") -> list[Path]:
    """The folders of offline runs that are not uploaded yet, and of online ones whose end is not, oldest first."""
    names = (f"offline-run-*-{run_id}", f"offline-run-*-{run_id}-[0-9]")
    offline = {p for name in names for p in (folder / "wandb").glob(name) if not list(p.glob("*.synced"))}
    unsent = {p.parent for p in (folder / "wandb").glob(f"run-*-{run_id}/{UNSENT}")}
    return sorted(offline | unsent, key=lambda p: p.name.partition("run-")[2])


def ended(folders: Iterable[Path]) -> list[Path]:
    """Those of `run_folders` whose end is on disk. `wandb sync` marks a run as sent as it finds it, so one that is
    still written to, or whose process died, would lose for good what comes later.
    """
    return [p for p in folders if (p / ENDED).exists() or (p / UNSENT).exists()]


def give_way(folder: Path, run_id: str) -> None:
    """Deletes what an interrupted or earlier run of this id left offline: the new run contains all of it."""
    for left in run_folders(folder, run_id):
        if left.name.startswith("offline-"):
            shutil.rmtree(left, ignore_errors=True)


def end(run: Any, *, failed: bool) -> None:
    """Ends a run and marks it for `sync`: all of it if it is offline, else what could not be uploaded in time."""
    folder, mark = Path(run.dir).parent, ENDED if run.settings.mode == "offline" else None
    try:
        run.finish(exit_code=1 if failed else 0)
    except TimeoutError:
        mark = UNSENT
        log.warning("W&B took too long: `python -m capacity_gap sync` uploads what is left in %s.", folder)
    if mark:
        (folder / mark).touch()
