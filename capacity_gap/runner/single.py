"""One cell at a terminal: its progress, then its result. A grid has its own table (`grid.py`)."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.pipeline import resolve
from capacity_gap.cell.recipes import check_corpus, no_corpus
from capacity_gap.cell.strategy_config import ADAPTIVE
from capacity_gap.records import RECORD
from capacity_gap.runner import run_cell
from capacity_gap.runner.plan import check_budget, make_plan, noted_cell
from capacity_gap.runner.preflight import check_losses
from capacity_gap.runner.progress import View, Watch
from capacity_gap.runner.waves import noting_stop
from capacity_gap.runtime.process import check_threads, resolve_device
from capacity_gap.runtime.ranks import Ranks
from capacity_gap.settings.errors import ConfigError, UserError, choose
from capacity_gap.store.contents import note_sweep, sweeps
from capacity_gap.store.files import explaining_full_disk, read_json, reading
from capacity_gap.store.stage import Store

SINGLE = "single"  # what the cells that were run one by one are called in the store, beside the grids


def run_alone(config: RunConfig, overrides: Sequence[str]) -> str:
    """Computes one cell in this process, shows its stages on the way, and prints its result; returns its key.

    Args:
        config: its settings.
        overrides: as they were given, for the rerun line of `status --failed`.
    """
    if config.strategy == ADAPTIVE:
        raise ConfigError(f"strategy={ADAPTIVE} is for grids: add -m, and values such as teacher=120k,180k,270k,400k.")
    cell = resolve(config)
    store = Store(config.store_path)
    store.check_schema()
    check_losses([cell], store)
    plan = make_plan([cell], store)
    if config.plan:
        said = no_corpus(config, cell.student_target)
        print("\n".join([*plan.lines, *([f"warning: {said}"] if said else [])]))
    check_budget(plan, config.budget_hours)
    if not config.plan:
        check_corpus(config, cell.student_target)
    if config.plan or config.only or not Ranks().leads:
        return cell.record.key if config.plan else run_cell.run(cell)
    for warning in plan.too_short:
        print(warning, file=sys.stderr)
    if config.sweep:
        choose("sweep", config.sweep, sweeps(store))
    # What is not here is refused before anything is written.
    resolve_device(config.train.device)
    check_threads(config.train.threads)
    with explaining_full_disk(store.root, "the list of cells to run"):
        store.create()
        noted = {cell.record.key: noted_cell(cell, overrides, plan.speed)}
        note_sweep(store, config.sweep or SINGLE, noted)
    reused = store.is_sound(cell.record)
    with noting_stop(store, config.sweep or SINGLE, noted), Watch(View(store, noted), label=cell.name):
        try:
            run_cell.run(cell)
        except UserError as error:  # before its work began too: `status` then says that it failed
            run_cell.fail(cell, store, str(error))
            raise
    folder = store.path(cell.record)
    with reading(folder / RECORD):
        told = result_line(cell.name, read_json(folder / RECORD))
    print(f"{'reused' if reused else 'done'}: {told}")
    print(f"record: {folder / RECORD}")
    return cell.record.key


def result_line(name: str, row: Mapping[str, Any]) -> str:
    """A record in a sentence, with its settings that are not the default."""
    from capacity_gap.cell.table_settings import record_settings

    (settings,) = record_settings([row])
    named = ", ".join([name, *(f"{key}={value}" for key, value in settings.items())])
    error = row["student_loss_stderr"]
    loss = f"held-out loss {row['student_loss']:.4f}{'' if error is None else f' ± {error:.4f}'} nats per token"
    before = f"{row['init_loss']:.4f} before training, " if row["data_tokens"] else ""
    return f"{named}: {loss} ({before}teacher {row['teacher_loss']:.4f})"
