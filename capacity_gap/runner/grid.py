"""A grid: every cell is read and planned, then run in waves, all at once or in rounds; nothing finished runs again.

Imports no torch.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from capacity_gap.cell.config import from_hydra
from capacity_gap.cell.pipeline import Cell, resolve
from capacity_gap.cell.recipes import check_corpus, no_corpus
from capacity_gap.cell.strategy_config import ADAPTIVE
from capacity_gap.report.sweep_run import mirror_sweep
from capacity_gap.runner.adaptive import Rounds
from capacity_gap.runner.budget import check_affordable
from capacity_gap.runner.machines import Machines
from capacity_gap.runner.plan import make_plan, noted_cell
from capacity_gap.runner.preflight import check_losses
from capacity_gap.runner.rerun import cell_overrides
from capacity_gap.runner.waves import Crew, Launch, noting_stop
from capacity_gap.runtime.process import check_threads
from capacity_gap.settings.errors import ConfigError, ImpossibleCell
from capacity_gap.settings.hashing import fingerprint
from capacity_gap.store.stage import Store
from capacity_gap.tracking.wandb_runs import settled

ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")  # as Hydra writes what a value holds of its own signs


@dataclass(frozen=True)
class Job:
    """One combination of the grid: its overrides and the config that Hydra composed from them."""

    overrides: list[str]
    composed: Any


@dataclass
class Outcome:
    """The outcome of each cell: `reused`, `done`, `failed` or `skipped`, with the cause."""

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
    cells = resolved(jobs, Outcome())
    store = Store(next(iter(cells.values()))[0].config.store_path)
    check_losses((c for c, _ in cells.values()), store)
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
    cells = resolved(jobs, outcome)
    first = next(iter(cells.values()))[0].config
    store = Store(first.store_path)
    store.check_schema()
    check_losses((c for c, _ in cells.values()), store)
    plan = make_plan([c for c, _ in cells.values()], store, machines=machines)
    if first.plan:
        warned = [*plan.warnings, *outcome.warnings.values(), *_skipped(outcome, "warning: skipped ")]
        print("\n".join(replace(plan, warnings=warned).lines))
    name = first.sweep or _name(jobs)
    rounds = Rounds(cells, store, name, plan.worker, plan.speed)
    adaptive = first.strategy == ADAPTIVE
    if adaptive:
        rounds.check()
    else:
        check_affordable(rounds, first.budget_hours, plan.device_hours, plan.reckoning)
    if first.plan:
        if adaptive:
            print("\n".join(rounds.planned()))
        return True
    for warning in plan.too_short:
        print(warning, file=sys.stderr)
    if here:
        for threads in {cell.config.train.threads for cell, _ in cells.values()}:
            check_threads(threads)
    settled(first.tracking)  # says once, for all workers, if W&B cannot be had
    crew = Crew(store, name, launch, max_batch_size, pool)
    with noting_stop(store, name, [c.record.key for c, _ in cells.values()]):
        if adaptive:
            cells = rounds.run(crew)
        else:
            noted = {c.record.key: noted_cell(c, overrides, plan.speed) for c, overrides in cells.values()}
            crew.note(noted)
            crew.run(cells, noted)
    for digest, (cell, _) in cells.items():
        done = store.finished(cell.record)
        status = ("done" if digest in crew.started else "reused") if done else "failed"
        outcome.add(cell.name, status, "" if done else crew.cause(cell))
    _print_outcome(outcome, store)
    mirror_sweep(store, name, first.tracking, changed=bool(crew.started))
    return not outcome.counts["failed"]


def resolved(jobs: Sequence[Job], outcome: Outcome) -> dict[str, tuple[Cell, list[str]]]:
    """Cells with their overrides, by digest; the impossible ones are noted."""
    cells: dict[str, tuple[Cell, list[str]]] = {}
    impossible: list[ImpossibleCell] = []
    for job in jobs:
        try:
            asked = from_hydra(job.composed)
            cell = resolve(asked)
        except ImpossibleCell as error:
            outcome.add(_given(job), "skipped", error.note)
            impossible.append(error)
        else:
            if not asked.plan:
                check_corpus(asked, cell.student_target)
            elif said := no_corpus(asked, cell.student_target):
                outcome.warnings.setdefault("corpus", f"warning: {said}")
            cells.setdefault(cell.record.digest, (cell, job.overrides))
    if not jobs:
        raise ConfigError("this grid has no cell: one of its axes has no value. Write values, such as student=60k,90k.")
    if not cells:
        raise ConfigError(f"no cell of this grid is possible. The first: {impossible[0]}")
    return cells


def _name(jobs: Sequence[Job]) -> str:
    """What the grid is called in the store: its file in `sweeps/`, or a hash of what makes its cells."""
    named = [o.partition("=")[2] for o in jobs[0].overrides if o.startswith("+sweeps=")]
    return named[0] if named else f"grid-{fingerprint([cell_overrides(j.overrides) for j in jobs])[:8]}"


def _given(job: Job) -> str:
    return ESCAPED.sub(r"\1", " ".join(o for o in job.overrides if not o.startswith("hydra")))


def _skipped(outcome: Outcome, word: str = "  skipped  ") -> list[str]:
    """A line for each cause: the cell, or how many cells have it."""
    names: dict[str, list[str]] = {}
    for name, status, cause in outcome.cells:
        if status == "skipped":
            names.setdefault(cause, []).append(name)
    return [f"{word}{mine[0] if len(mine) == 1 else f'{len(mine)} cells'}: {cause}" for cause, mine in names.items()]


def _print_outcome(outcome: Outcome, store: Store) -> None:
    """The closing table: counts, and the cause of each missing cell."""
    counts = outcome.counts
    summary = ", ".join(f"{counts[s]} {s}" for s in ("done", "reused", "failed", "skipped") if counts[s])
    print(f"grid: {summary or 'nothing was run'}. Records: {store.root / 'record'}", flush=True)
    for line in _skipped(outcome):
        print(line)
    for name, status, cause in outcome.cells:
        if status == "failed":
            print(f"  failed   {name}: {cause}", file=sys.stderr)
