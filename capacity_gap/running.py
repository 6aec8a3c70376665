"""Running a cell: its record if it is there, else whatever of its chain is missing, tracked, and a note if it fails."""

import json
from typing import TYPE_CHECKING

from capacity_gap import steps, tracking
from capacity_gap.errors import Busy
from capacity_gap.logs import logging_to
from capacity_gap.plan import make_plan
from capacity_gap.records import RECORD, SCHEMA_VERSION, Record
from capacity_gap.runtime import Runtime, resolve_device
from capacity_gap.stage import Store, closure, write_json
from capacity_gap.watch import failure_file

if TYPE_CHECKING:
    from capacity_gap.pipeline import Cell


def run(cell: "Cell", *, waits: bool = True) -> str:
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
    )
    if not runtime.ranks.leads:
        with runtime.catching_signals():
            store.follow(closure(cell.record), runtime)
        return cell.record.key
    store.create()
    with logging_to(store, config.only or cell.record.key), runtime.catching_signals():
        try:
            return _lead(cell, store, runtime)
        finally:
            runtime.ranks.tell(None)  # to those that follow: the end
            runtime.ranks.part()


def _lead(cell: "Cell", store: Store, runtime: Runtime) -> str:
    cell.check_budgets(store, runtime)
    if only := cell.config.only:
        store.compute(closure(cell.record)[only], runtime)
        return only
    return _run_cell(cell, store, runtime)


def _run_cell(cell: "Cell", store: Store, runtime: Runtime) -> str:
    record = cell.record
    if store.has(record):
        return record.key
    track = cell.config.tracking
    tracker = tracking.start(
        track, cell=record.digest, name=cell.name, config=cell.description, folder=store.root / "wandb"
    )
    runtime.on_log = tracker.log
    try:
        store.compute(cell.distilled, runtime)
        for point in steps.read_history(store.path(cell.distilled)) if cell.data_tokens else ():
            tracker.log(point)  # what another process computed, or an earlier one; what was logged is passed over
        row = json.loads((store.compute(record, runtime) / RECORD).read_text())
    except BaseException as error:
        tracker.finish({"status": "failed", "error": str(error)}, failed=True)
        if isinstance(error, Exception) and not isinstance(error, Busy):
            fail(cell, store, str(error) or type(error).__name__)
        raise
    failure_file(store, record.key).unlink(missing_ok=True)
    tracker.finish(row, failed=False)
    return record.key


def fail(cell: "Cell", store: Store, cause: str) -> None:
    """Leaves a failed record with its cause; it stays until the cell is done."""
    file = failure_file(store, cell.record.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    row = Record(SCHEMA_VERSION, cell.record.digest, "failed", cause, **cell.description)
    write_json(file, row.to_dict())
