"""Launches cells in waves: what several share first, then the cells. A failed stage costs only those that need it.

Hydra launchers run a list of jobs and know nothing of stages. So each wave is one such list: a job is a cell's own
overrides plus `only=<stage>`, or, in the last wave, the cell itself. Imports no torch.
"""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capacity_gap.cell.pipeline import Cell, in_waves
from capacity_gap.runner.progress import View, Watch
from capacity_gap.runner.run_cell import cause_of, fail
from capacity_gap.runner.stopping import ending_workers
from capacity_gap.runtime.process import Interrupted
from capacity_gap.settings.errors import Busy, UserError
from capacity_gap.store.contents import NOT_STARTED, failure_file, forget_stop, note_stop, note_sweep
from capacity_gap.store.files import explaining_full_disk
from capacity_gap.store.lease import POLL_S, Pulse
from capacity_gap.store.stage import Stage, Store, closure

Launch = Callable[..., Sequence[Any]]
DIED = "its process died"
Wave = dict[str, tuple[Stage, list[str]]]  # by stage key: what is wanted, and the overrides of a job that makes it


@dataclass
class Crew:
    """Runs cells of one grid through a launcher, all at once or in rounds.

    Attributes:
        store: where they are made.
        name: of the grid, in the store.
        launch: a Hydra launcher's.
        max_batch_size: how many jobs it is given at once; None: a whole wave.
        pool: whether the launcher is joblib's, whose workers must not be interrupted from outside.
        started: digests of the cells that were not there.
        causes: why stages and cells failed, by key.
    """

    store: Store
    name: str
    launch: Launch
    max_batch_size: int | None
    pool: bool
    started: set[str] = field(default_factory=set)
    causes: dict[str, str] = field(default_factory=dict)

    def note(self, noted: dict[str, dict[str, Any]], about: Mapping[str, Any] | None = None) -> None:
        """Writes down what is to run, before it does."""
        with explaining_full_disk(self.store.root, "the list of cells to run"):
            self.store.create()
            note_sweep(self.store, self.name, noted, about=about)

    def run(self, cells: Mapping[str, tuple[Cell, list[str]]], noted: Mapping[str, Mapping[str, Any]]) -> None:
        """Runs those that are not there, and writes down why others failed."""
        # A recorded cell runs again if a stage behind it was set aside as damaged.
        todo = {digest: c for digest, c in cells.items() if not self.store.finished(c[0].record)}
        self.started |= todo.keys()
        for cell, _ in todo.values():
            failure_file(self.store, cell.record.key).unlink(missing_ok=True)
        reused = len(cells) - len(todo)
        with ending_workers() as asked, Watch(View(self.store, noted), reused=reused) as watch:
            launch = _in_batches(asked.telling(self.launch) if self.pool else self.launch, self.max_batch_size)
            self.causes |= _run_waves(list(todo.values()), self.store, launch, watch)
        for cell, _ in todo.values():
            # A record stays as it is where only something behind it could not be made again.
            if not self.store.finished(cell.record) and not self.store.is_sound(cell.record):
                fail(cell, self.store, self.cause(cell))

    def cause(self, cell: Cell) -> str:
        """Why a cell is not there."""
        return self.causes.get(cell.record.key, DIED)


@contextlib.contextmanager
def noting_stop(store: Store, name: str, cells: Iterable[str]) -> Iterator[None]:
    """Around the work on cells of a sweep: an end before theirs is noted, so that nobody waits for them."""
    keys = list(cells)
    forget_stop(store, name, keys)
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk the error itself matters more
            note_stop(store, name, keys, _why_stopped(error))
        raise


def _why_stopped(error: BaseException) -> str:
    """What ended a process, in words."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted (SIGINT)"
    if isinstance(error, Interrupted):
        return f"it was interrupted ({signal.Signals(error.number).name})"
    return f"it ended with an error ({cause_of(error)})"


def _in_batches(launch: Launch, size: int | None) -> Launch:
    """A launcher that is given at most `size` jobs at once."""
    if size is None:
        return launch

    def launch_all(jobs: Sequence[Any], initial_job_idx: int) -> list[Any]:
        parts = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        return [r for part in parts for r in launch(part, initial_job_idx=initial_job_idx)]

    return launch_all


def _run_waves(cells: list[tuple[Cell, list[str]]], store: Store, launch: Launch, watch: Watch) -> dict[str, str]:
    """Launches wave after wave; returns the cause of every stage and cell that failed, by key."""
    causes: dict[str, str] = {}
    if not cells:
        return causes
    settings = cells[0][0].config
    for stages in in_waves([cell for cell, _ in cells]):
        wave = _wave(cells, stages, store, causes)
        if causes and settings.fail_fast:
            for cell, _ in cells:
                causes.setdefault(cell.record.key, NOT_STARTED)
            break
        if wave:
            watch.wave(next(iter(wave.values()))[0].name, len(wave))
            causes |= _launch_wave(wave, store, launch, settings.retries)
    return causes


def _launch_wave(wave: Wave, store: Store, launch: Launch, retries: int) -> dict[str, str]:
    """Launches one wave until all of it is there or has failed; returns the causes.

    A user's error is final. Crashed work is retried `retries` times. A worker that is killed can take
    a launcher's whole pool with it, and it is unknown which one it was: what had been started by then is suspect, and
    is launched again alone, after all others. Other grids' stages are waited for here, where no device idles.
    """
    causes: dict[str, str] = {}
    deaths: Counter = Counter()
    suspects: set[str] = set()
    idle = 0
    pending = dict(wave)
    while pending:
        ordered = sorted(pending.values(), key=lambda job: -_effort(job[0], store))  # longest first
        jobs = [job for job in ordered if job[0].key not in suspects] or ordered[:1]
        errors, broken = _launch(launch, jobs)
        idle = 1 + idle if broken and not any(store.finished(s) or store.started(s) for s, _ in jobs) else 0
        if broken and idle == 2:
            raise broken  # the launcher itself does not work: twice nothing was even started
        for (stage, _), error in zip(jobs, errors, strict=True):
            if store.finished(stage):
                del pending[stage.key]
            elif broken and len(jobs) > 1:
                suspects |= {stage.key} if store.started(stage) else set()
            # Busy is no failure, and where nothing was started the launcher failed, not the job.
            elif not isinstance(error, Busy) and not idle:
                deaths[stage.key] += 1
                if isinstance(error, UserError) or deaths[stage.key] > retries:
                    causes[stage.key] = str(error) if error else DIED + (f" ({broken})" if broken else "")
                    del pending[stage.key]
        if any(isinstance(error, Busy) for error in errors):
            _wait_for_others(store, pending)
    return causes


def _wait_for_others(store: Store, pending: Wave) -> None:
    """Returns when at least one of the stages is there, or free to be computed here."""
    pulses: dict[str, Pulse] = {}

    def is_at_work(key: str) -> bool:
        # A stage may be set aside or deleted while we wait, so what is missing is asked for anew each time.
        pulse = pulses.setdefault(key, Pulse(store.work / key.replace("/", "-")))
        return pulse.state() in ("alive", "silent")

    while pending and all(any(map(is_at_work, store.missing(stage))) for stage, _ in pending.values()):
        time.sleep(POLL_S)


def _launch(launch: Launch, jobs: list[tuple[Stage, list[str]]]) -> tuple[list[Exception | None], Exception | None]:
    """One call of the launcher: the error of each job, and the launcher's own if it broke."""
    try:
        returns = launch([overrides for _, overrides in jobs], initial_job_idx=0)
    except UserError:
        raise  # the launcher's own settings are wrong
    except Exception as error:
        return [None] * len(jobs), error
    # Not `return_value`, which raises the error of one job and would hide the results of the others.
    values = [getattr(r, "_return_value", None) for r in returns]
    return [v if isinstance(v, Exception) else None for v in values], None


def _wave(cells: list[tuple[Cell, list[str]]], stages: list[list[Stage]], store: Store, causes: dict[str, str]) -> Wave:
    """The jobs of one wave, by stage; a cell whose shared stages failed is not launched but takes their cause.

    `stages`: what each cell needs in it.
    """
    wave: Wave = {}
    for (cell, overrides), wanted in zip(cells, stages, strict=True):
        broken = [causes[key] for key in closure(cell.record) if key in causes]
        if broken:
            causes.setdefault(cell.record.key, broken[0])
            continue
        for stage in wanted:
            if stage is cell.record:
                wave[stage.key] = (stage, overrides)
            elif not store.finished(stage):
                wave[stage.key] = (stage, [*overrides, f"only={stage.key}"])
    return wave


def _effort(stage: Stage, store: Store) -> float:
    return sum(s.cost for s in store.missing(stage).values())
