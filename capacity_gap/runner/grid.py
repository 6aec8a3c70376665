"""A grid in waves: what several cells share runs first, then the cells; finished work is never run again.

Hydra launchers run a list of jobs and know nothing of stages. So each wave is one such list: a job is a cell's own
overrides plus `only=<stage>`, or, in the last wave, the cell itself. Imports no torch.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from capacity_gap.cell.config import from_hydra
from capacity_gap.cell.pipeline import Cell, in_waves, resolve
from capacity_gap.cell.recipes import check_corpus, no_corpus
from capacity_gap.report.sweep_run import mirror_sweep
from capacity_gap.runner.machines import Machines
from capacity_gap.runner.plan import check_budget, make_plan, noted_cell
from capacity_gap.runner.progress import View, Watch
from capacity_gap.runner.run_cell import fail
from capacity_gap.runner.stopping import ending_workers
from capacity_gap.runtime.process import check_threads
from capacity_gap.settings.errors import Busy, ConfigError, ImpossibleCell, UserError
from capacity_gap.settings.hashing import fingerprint
from capacity_gap.store.contents import failure_file, note_sweep
from capacity_gap.store.files import explaining_full_disk
from capacity_gap.store.lease import POLL_S, Pulse
from capacity_gap.store.stage import Stage, Store, closure
from capacity_gap.tracking.wandb_runs import settled

Launch = Callable[..., Sequence[Any]]
DIED = "its process died"
Wave = dict[str, tuple[Stage, list[str]]]  # by stage key: what is wanted, and the overrides of a job that makes it


@dataclass(frozen=True)
class Job:
    """One combination of the grid: its overrides and the config that Hydra composed from them."""

    overrides: list[str]
    composed: Any


@dataclass
class Outcome:
    """What became of each cell: `reused`, `done`, `failed` or `skipped`, with the cause."""

    cells: list[tuple[str, str, str]] = field(default_factory=list)
    warnings: dict[str, str] = field(default_factory=dict)  # of a plan, by what they are about

    def add(self, name: str, status: str, cause: str = "") -> None:
        """Notes one cell."""
        self.cells.append((name, status, cause))

    @property
    def counts(self) -> Counter:
        """Cells by status."""
        return Counter(status for _, status, _ in self.cells)


def check_grid(jobs: Sequence[Job]) -> Store:
    """Reads every cell without running any; returns the store. Raises as `run_grid` does."""
    cells = _resolve(jobs, Outcome())
    store = Store(next(iter(cells.values()))[0].config.store_path)
    store.create()
    return store


def run_grid(
    jobs: Sequence[Job],
    launch: Launch,
    *,
    machines: Machines | None = None,
    max_batch_size: int | None = None,
    pool: bool = False,
    here: bool = False,
) -> bool:
    """Runs every cell of a grid; returns whether none failed.

    Args:
        jobs: its combinations.
        launch: a Hydra launcher's.
        machines: how many jobs the launcher runs at once, and on what.
        max_batch_size: how many jobs it is given at once; None: a whole wave.
        pool: whether the launcher is joblib's, whose workers must not be interrupted from outside.
        here: whether its workers run on this machine.

    Raises:
        ConfigError: a setting is wrong, no cell is possible, or all cost too much (raised before anything is run).
    """
    outcome = Outcome()
    cells = _resolve(jobs, outcome)
    first = next(iter(cells.values()))[0].config
    store = Store(first.store_path)
    store.check_schema()
    plan = make_plan([c for c, _ in cells.values()], store, machines=machines)
    if first.plan:
        print("\n".join([*plan.lines, *outcome.warnings.values(), *_skipped(outcome)]))
    check_budget(plan, first.budget_hours)
    if first.plan:
        return True
    for warning in plan.too_short:
        print(warning, file=sys.stderr)
    if here:
        for threads in {cell.config.train.threads for cell, _ in cells.values()}:
            check_threads(threads)
    settled(first.tracking)  # says once, for all workers, if W&B cannot be had
    name = first.sweep or _name(jobs)
    noted = {c.record.key: noted_cell(c, overrides, plan.speed) for c, overrides in cells.values()}
    with explaining_full_disk(store.root, "the note of what is to run"):
        store.create()
        note_sweep(store, name, noted)
    # A recorded cell runs again if a stage behind it was set aside as damaged.
    todo = {digest: c for digest, c in cells.items() if not store.finished(c[0].record)}
    for cell, _ in todo.values():
        failure_file(store, cell.record.key).unlink(missing_ok=True)
    with ending_workers() as asked, Watch(View(store, noted), reused=len(cells) - len(todo)) as watch:
        launch = _in_batches(asked.telling(launch) if pool else launch, max_batch_size)
        causes = _run_waves(list(todo.values()), store, launch, watch)
    for digest, (cell, _) in cells.items():
        done = store.finished(cell.record)
        status = ("done" if digest in todo else "reused") if done else "failed"
        outcome.add(cell.name, status, "" if done else causes.get(cell.record.key, DIED))
        # A record stays as it is where only something behind it could not be made again.
        if not done and not store.is_sound(cell.record):
            fail(cell, store, causes.get(cell.record.key, DIED))
    _print_outcome(outcome, store)
    mirror_sweep(store, name, first.tracking, changed=bool(todo))
    return not outcome.counts["failed"]


def _in_batches(launch: Launch, size: int | None) -> Launch:
    """A launcher that is given at most `size` jobs at once."""
    if size is None:
        return launch

    def launch_all(jobs: Sequence[Any], initial_job_idx: int) -> list[Any]:
        parts = [jobs[i : i + size] for i in range(0, len(jobs), size)]
        return [r for part in parts for r in launch(part, initial_job_idx=initial_job_idx)]

    return launch_all


def _resolve(jobs: Sequence[Job], outcome: Outcome) -> dict[str, tuple[Cell, list[str]]]:
    """Cells with their overrides, by digest; the impossible ones are noted."""
    cells: dict[str, tuple[Cell, list[str]]] = {}
    for job in jobs:
        try:
            asked = from_hydra(job.composed)
            cell = resolve(asked)
        except ImpossibleCell as error:
            outcome.add(_given(job), "skipped", str(error))
        else:
            if not asked.plan:
                check_corpus(asked, cell.student_target)
            elif said := no_corpus(asked, cell.student_target):
                outcome.warnings.setdefault("corpus", f"warning: {said}")
            cells.setdefault(cell.record.digest, (cell, job.overrides))
    if not jobs:
        raise ConfigError(
            "this grid has no cell: one of its axes names no value. Write values, such as student=60k,90k."
        )
    if not cells:
        raise ConfigError(f"no cell of this grid is possible. The first: {outcome.cells[0][2]}")
    return cells


def _name(jobs: Sequence[Job]) -> str:
    """What the grid is called in the store: its file in `sweeps/`, or a hash of its overrides."""
    named = [o.partition("=")[2] for o in jobs[0].overrides if o.startswith("+sweeps=")]
    return named[0] if named else f"grid-{fingerprint([j.overrides for j in jobs])[:8]}"


def _given(job: Job) -> str:
    return " ".join(o for o in job.overrides if not o.startswith("hydra"))


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
                causes.setdefault(cell.record.key, "not started: fail_fast, and another cell failed")
            break
        if wave:
            watch.wave(next(iter(wave.values()))[0].name, len(wave))
            causes |= _launch_wave(wave, store, launch, settings.retries)
    return causes


def _launch_wave(wave: Wave, store: Store, launch: Launch, retries: int) -> dict[str, str]:
    """Launches one wave until all of it is there or has failed; returns the causes.

    A user's error is final. Whatever crashed or died is started again `retries` times. A worker that is killed can take
    a launcher's whole pool with it, and nobody can say which one it was: what had been started by then is suspect, and
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


def _skipped(outcome: Outcome) -> list[str]:
    """A line for each cause: the cell, or how many cells have it."""
    names: dict[str, list[str]] = {}
    for name, status, cause in outcome.cells:
        if status == "skipped":
            names.setdefault(cause.split(". ")[0], []).append(name)
    return [
        f"  skipped  {mine[0] if len(mine) == 1 else f'{len(mine)} cells'}: {cause}." for cause, mine in names.items()
    ]


def _print_outcome(outcome: Outcome, store: Store) -> None:
    """The closing table: counts, and the cause of whatever is not there."""
    counts = outcome.counts
    summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "reused", "failed", "skipped") if counts[s])
    print(f"grid: {summary}. Records: {store.root / 'record'}", flush=True)
    for line in _skipped(outcome):
        print(line)
    for name, status, cause in outcome.cells:
        if status == "failed":
            print(f"  failed   {name}: {cause}", file=sys.stderr)
