"""Running a cell: its record if it is there, else whatever of its chain is missing, tracked, and a note if it fails."""

import contextlib
from pathlib import Path
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.pipeline import Cell, resolve
from capacity_gap.cell.stages.shared import METRICS, read_history
from capacity_gap.records import RECORD, SCHEMA_VERSION, Record
from capacity_gap.runner.plan import make_plan
from capacity_gap.runner.preflight import check_budgets
from capacity_gap.runtime.process import Runtime, check_threads, resolve_device, take
from capacity_gap.settings.errors import Busy, UserError
from capacity_gap.store.contents import failure_file, sweeps_of
from capacity_gap.store.files import explaining_full_disk, read_json, write_checked
from capacity_gap.store.logs import logging_to
from capacity_gap.store.stage import Store, closure
from capacity_gap.tracking import wandb_runs


def run_config(config: RunConfig, *, waits: bool = True) -> str:
    """Computes the cell that `config` asks for and returns the key of what was made (see `run`)."""
    return run(resolve(config), waits=waits)


def run(cell: Cell, *, waits: bool = True) -> str:
    """Computes one cell (or, with `only`, one stage of it) and returns the key of what was made.

    A failure leaves a failed record, with its cause, until the cell is done.

    Raises:
        Busy: with `waits=False`, another process is at a stage that this cell needs.
    """
    config = cell.config
    store = Store(config.store_path)
    if config.plan:
        print("\n".join(make_plan([cell], store).lines))
        return cell.record.key
    runtime = Runtime(
        resolve_device(config.train.device),
        config.train.threads,
        config.train.checkpoint_minutes,
        waits,
        sharding=config.train.sharding,
        placement=cell.placement,
    )
    check_threads(runtime.threads)
    take(runtime.device)
    if not runtime.ranks.leads:
        with runtime.catching_signals():
            store.follow(closure(cell.record), runtime)
        return cell.record.key
    store.create()
    with (
        explaining_full_disk(store.root, "a file of the store"),
        logging_to(store, config.only or cell.record.key),
        runtime.catching_signals(),
    ):
        try:
            return _lead(cell, store, runtime)
        finally:
            runtime.ranks.tell(None)  # to those that follow: the end
            runtime.ranks.part()


def _lead(cell: Cell, store: Store, runtime: Runtime) -> str:
    runtime.check()
    check_budgets(cell, store, runtime)
    if only := cell.config.only:
        stage = closure(cell.record).get(only)
        if stage is None:
            raise UserError(
                f"this process sees different models or texts than the grid that requested {only}: a folder or file "
                "has changed, or differs on this machine. Run the grid again."
            )
        store.compute(stage, runtime)
        store.make_again(stage, runtime)
        return only
    return _run_cell(cell, store, runtime)


def _run_cell(cell: Cell, store: Store, runtime: Runtime) -> str:
    record = cell.record
    if store.is_sound(record):
        store.make_again(record, runtime)  # the record itself stays as it is
        return record.key
    tracker = _tracker(cell, store)
    try:
        for parent in cell.distilled.inputs.values():
            store.compute(parent, runtime)
        runtime.on_log = tracker.log  # from here on only the cell's own points, not its teacher's
        store.compute(cell.distilled, runtime)
        row = read_json(store.compute(record, runtime) / RECORD)
        store.make_again(record, runtime)
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, Busy):
            tracker.finish(fail(cell, store, cause_of(error)))
        else:
            tracker.leave()
        raise
    failure_file(store, record.key).unlink(missing_ok=True)
    tracker.finish(row, _history(cell, store), _artifact_files(cell, store))
    return record.key


def _history(cell: Cell, store: Store) -> list[dict[str, Any]]:
    """The logged points of a finished cell, if its trained student is still there."""
    with contextlib.suppress(FileNotFoundError):
        return read_history(store.path(cell.distilled)) if cell.data_tokens else []
    return []


def _tracker(cell: Cell, store: Store) -> wandb_runs.Tracker:
    """What mirrors the cell, grouped by the youngest grid that it belongs to."""
    return wandb_runs.start(
        cell.config.tracking,
        cell=cell.record.digest,
        name=cell.name,
        config=cell.description,
        folder=store.root / "wandb",
        sweeps=sweeps_of(store, cell.record.key),
    )


def _artifact_files(cell: Cell, store: Store) -> list[Path]:
    """The files of a cell that go to W&B as an artifact, if any."""
    kind, trained = cell.config.tracking.artifacts, store.path(cell.distilled)
    if kind == "none":
        return []
    history = [trained / METRICS] if cell.data_tokens and kind == "record" else []
    return [store.path(cell.record) / RECORD, *history, *([trained] if kind == "model" else [])]


def cause_of(error: BaseException) -> str:
    """An error as text; internal errors include their type."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".removesuffix(": ")


def fail(cell: Cell, store: Store, cause: str) -> dict[str, Any]:
    """Leaves a failed record with its cause, and returns it; it stays until the cell is done."""
    file = failure_file(store, cell.record.key)
    told = {"schema_version": SCHEMA_VERSION, "cell": cell.record.digest, "status": "failed", "error": cause}
    row = Record.of(told | cell.description).to_dict()
    with contextlib.suppress(OSError):  # on a full disk the cause that is shown matters more
        file.parent.mkdir(parents=True, exist_ok=True)
        write_checked(file, row)
    return row
