"""A grid in waves: what several cells share runs first, then the cells; finished work is never run again.

Hydra launchers run a list of jobs and know nothing of stages. So each wave is one such list: a job is a cell's own
overrides plus `only=<stage>`, or, in the last wave, the cell itself. Imports no torch.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from capacity_gap.config import from_hydra
from capacity_gap.errors import ConfigError, ImpossibleCell, UserError
from capacity_gap.fingerprint import fingerprint
from capacity_gap.pipeline import Cell, fail, resolve
from capacity_gap.stage import Stage, Store, closure
from capacity_gap.store_tools import note_sweep
from capacity_gap.watch import Watch

Launch = Callable[..., Sequence[Any]]
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

    def add(self, name: str, status: str, cause: str = "") -> None:
        """Notes one cell."""
        self.cells.append((name, status, cause))

    @property
    def counts(self) -> Counter:
        """Cells by status."""
        return Counter(status for _, status, _ in self.cells)


def run_grid(jobs: Sequence[Job], launch: Launch) -> bool:
    """Runs every cell of a grid; returns whether none failed.

    Raises:
        ConfigError: a setting is wrong (raised before anything is run), or no cell is possible.
    """
    outcome = Outcome()
    cells: dict[str, tuple[Cell, list[str]]] = {}
    for job in jobs:
        try:
            cell = resolve(from_hydra(job.composed))
        except ImpossibleCell as error:
            outcome.add(_given(job), "skipped", str(error))
        else:
            cells.setdefault(cell.record.digest, (cell, job.overrides))
    if not cells:
        raise ConfigError(f"no cell of this grid is possible. The first: {outcome.cells[0][2]}")
    first = next(iter(cells.values()))[0].config
    store = Store(first.store_path)
    store.check()
    todo = {digest: c for digest, c in cells.items() if not store.has(c[0].record)}
    if first.plan:
        _print_plan([c for c, _ in cells.values()], store, outcome)
        return True
    store.create()
    note_sweep(store, _name(jobs), {c.record.key: _noted(c, overrides) for c, overrides in cells.values()})
    causes = _run_waves(list(todo.values()), store, launch)
    for digest, (cell, _) in cells.items():
        done = store.has(cell.record)
        status = ("done" if digest in todo else "reused") if done else "failed"
        outcome.add(cell.name, status, "" if done else causes.get(cell.record.key, "its process ended without a word"))
    _print_outcome(outcome, store)
    return not outcome.counts["failed"]


def _name(jobs: Sequence[Job]) -> str:
    """What the grid is called in the store: its file in `sweeps/`, or a hash of what was asked for."""
    named = [o.partition("=")[2] for o in jobs[0].overrides if o.startswith("+sweeps=")]
    return named[0] if named else f"grid-{fingerprint([j.overrides for j in jobs])[:8]}"


def _noted(cell: Cell, overrides: list[str]) -> dict[str, Any]:
    return {"name": cell.name, "overrides": overrides, "stages": list(closure(cell.record))}


def _given(job: Job) -> str:
    return " ".join(o for o in job.overrides if not o.startswith("hydra"))


def _run_waves(cells: list[tuple[Cell, list[str]]], store: Store, launch: Launch) -> dict[str, str]:
    """Launches wave after wave; returns the cause of every stage that failed, by key."""
    causes: dict[str, str] = {}
    if not cells:
        return causes
    settings = cells[0][0].config
    with Watch(store, [cell.record for cell, _ in cells]) as watch:
        for number in range(len(cells[0][0].waves) + 1):
            wave = _wave(cells, number, store, causes)
            if causes and settings.fail_fast:
                causes.update(
                    dict.fromkeys((c.record.key for c, _ in cells), "not started: fail_fast, and another failed")
                )
                break
            if wave:
                watch.wave(next(iter(wave.values()))[0].name, len(wave))
                causes |= _launch_wave(wave, store, launch, settings.retries)
    return causes


def _launch_wave(wave: Wave, store: Store, launch: Launch, retries: int) -> dict[str, str]:
    """Launches one wave until all of it is there or has failed; returns the causes.

    A user's error is final. Whatever crashed or died is started again `retries` times. A worker that is killed can take
    a launcher's whole pool with it: what had not been started by then is launched again, at no cost to its retries.
    """
    causes: dict[str, str] = {}
    deaths: Counter = Counter()
    pending = dict(wave)
    while pending:
        ordered = sorted(pending.values(), key=lambda job: -_effort(job[0], store))  # longest first
        errors, broken = _launch(launch, ordered)
        left: Wave = {}
        for (stage, overrides), error in zip(ordered, errors, strict=True):
            if store.has(stage):
                continue
            if broken and not store.started(stage):
                left[stage.key] = (stage, overrides)
                continue
            deaths[stage.key] += 1
            if isinstance(error, UserError) or deaths[stage.key] > retries:
                causes[stage.key] = str(error) if error else "its process died"
            else:
                left[stage.key] = (stage, overrides)
        if broken and len(left) == len(pending) and not deaths:
            raise broken  # the launcher itself does not work: nothing was even started
        pending = left
    return causes


def _launch(launch: Launch, jobs: list[tuple[Stage, list[str]]]) -> tuple[list[Exception | None], Exception | None]:
    """One call of the launcher: the error of each job, and the launcher's own if it broke."""
    try:
        returns = launch([overrides for _, overrides in jobs], initial_job_idx=0)
    except Exception as error:
        return [None] * len(jobs), error
    values = [getattr(r, "_return_value", None) for r in returns]
    return [v if isinstance(v, Exception) else None for v in values], None


def _wave(cells: list[tuple[Cell, list[str]]], number: int, store: Store, causes: dict[str, str]) -> Wave:
    """The jobs of one wave, by stage; a cell whose shared stages failed is not launched but takes their cause."""
    wave: Wave = {}
    for cell, overrides in cells:
        broken = [causes[key] for key in closure(cell.record) if key in causes]
        if broken:
            causes.setdefault(cell.record.key, broken[0])
            fail(cell, store, broken[0])
        elif number == len(cell.waves):
            wave[cell.record.key] = (cell.record, overrides)
        else:
            for stage in cell.waves[number]:
                if not store.has(stage):
                    wave[stage.key] = (stage, [*overrides, f"only={stage.key}"])
    return wave


def _effort(stage: Stage, store: Store) -> float:
    return sum(s.cost for s in store.missing(stage).values())


def _print_plan(cells: list[Cell], store: Store, outcome: Outcome) -> None:
    """What the grid would compute: stages by kind, done and to do, with their FLOPs."""
    stages: dict[str, Stage] = {}
    for cell in cells:
        stages.update(closure(cell.record))
    kinds = list(dict.fromkeys(s.name for s in stages.values()))
    print(f"plan: {len(cells)} cells, {outcome.counts['skipped']} impossible; nothing is started")
    print(f"{'stage':<12}{'distinct':>9}{'there':>7}{'to run':>8}{'FLOPs to run':>14}")
    for kind in kinds:
        mine = [s for s in stages.values() if s.name == kind]
        left = [s for s in mine if not store.has(s)]
        flops = sum(s.cost for s in left)
        print(f"{kind:<12}{len(mine):>9}{len(mine) - len(left):>7}{len(left):>8}{flops:>14.3g}")
    alone = sum(s.cost for c in cells for s in closure(c.record).values())
    shared = sum(s.cost for s in stages.values())
    print(f"every cell alone would take {alone:.3g} FLOPs, shared {shared:.3g} ({shared / alone:.0%})")


def _print_outcome(outcome: Outcome, store: Store) -> None:
    """The closing table: counts, and the cause of whatever is not there."""
    counts = outcome.counts
    summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "reused", "failed", "skipped") if counts[s])
    print(f"grid: {summary}. Records: {store.root / 'record'}", flush=True)
    for name, status, cause in outcome.cells:
        if status == "skipped":
            print(f"  skipped  {name}: {cause.split('.')[0]}.")
        if status == "failed":
            print(f"  failed   {name}: {cause}", file=sys.stderr)
