"""The commands `store ACTION` and `sync`: what is printed of a store, done to it, and uploaded from it."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from capacity_gap.commands.options import amount
from capacity_gap.settings.places import TOOL_WORDS, default_store

if TYPE_CHECKING:
    from pathlib import Path

    from capacity_gap.store.stage import Store
    from capacity_gap.store.verify import Verified

SYNC_S = 600
SHOWN = 3  # commands that are shown to make damaged stages again


def add(commands: Any) -> None:
    """Adds the two commands to the command line's parser."""
    _add_store(commands)
    _add_sync(commands)


def _add_store(commands: Any) -> None:
    told = "List the contents of a store, find unused or damaged files, and repair it."
    store = commands.add_parser("store", description=told)
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = _action(actions, "ls", _ls, "cells and size of each sweep")
    listed.add_argument("--cells", action="store_true", help="every recorded cell: digest, loss, settings")
    _action(actions, "du", _du, "size by kind of stage")
    told = "list abandoned work, cached teacher logits and unused stages; delete them with --yes"
    _action(actions, "gc", _gc, told).add_argument("--yes", action="store_true", help="really delete")
    verify = _action(actions, "verify", _verify, "compare every file with its hash; exit status 1 if damage remains")
    verify.add_argument("--repair", action="store_true", help="move damaged stages to .damaged/, to be recomputed")
    told = (
        "take failed cells out of their sweeps and delete the records of their failures; everything computed, "
        "checkpoints, logs and all other cells are kept"
    )
    forget = _action(actions, "forget", _forget, told)
    forget.add_argument(
        "--failed",
        nargs="?",
        const="",
        required=True,
        metavar="SWEEP",
        help="the failed cells of this sweep alone; without a name, of all sweeps",
    )


def _add_sync(commands: Any) -> None:
    sync = commands.add_parser("sync", description="Upload to W&B what was tracked offline.")
    sync.add_argument("store", nargs="?", default=default_store(), help="default: %(default)s")
    sync.add_argument(
        "--limit", type=amount, default=SYNC_S, metavar="SECONDS", help="seconds until giving up (%(default)s)"
    )
    sync.add_argument("--entity", help="another than the runs were made for")
    sync.add_argument("--project", help="another than the runs were made for")
    sync.set_defaults(run=run_sync)


def _action(actions: Any, name: str, run: Any, does: str) -> argparse.ArgumentParser:
    action = actions.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
    action.add_argument("store", nargs="?", default=default_store(), help="default: %(default)s")
    action.set_defaults(run=lambda given: run(_open(given.store), given))
    return action


def _open(folder: str) -> "Store":
    from capacity_gap.store.contents import open_store

    return open_store(folder)


def _ls(store: "Store", given: argparse.Namespace) -> int:
    from capacity_gap.store.contents import list_sweeps

    if given.cells:
        return _ls_cells(store)
    for name, done, cells, size in list_sweeps(store):
        print(f"{name:<24} {done:>5} of {cells:>5} cells {size / 1e6:>10.1f} MB")
    return 0


def _ls_cells(store: "Store") -> int:
    from capacity_gap.cell.table_settings import record_settings
    from capacity_gap.records.load import read
    from capacity_gap.records.record import parting_columns
    from capacity_gap.settings.scales import format_scale

    rows = [row for row in read(store.root) if row["status"] == "done"]
    shown = ("student", "teacher", "data_tokens", "seed", "start")
    parting = (c for c in dict.fromkeys(("loss", *parting_columns(), "settings", "teacher_seed")) if c not in shown)
    told = [c for c in parting if len({str(row.get(c)) for row in rows}) > 1]
    rows.sort(key=lambda row: (row["student_params"] or 0, row["student_loss"] or 0.0, row["cell"]))
    for row, settings in zip(rows, record_settings(rows), strict=True):
        loss = "" if row["student_loss"] is None else f"{row['student_loss']:.4f}"
        made = f"{row.get('start') or row['student']} from {row['teacher']}"
        said = f"{made}, {format_scale(row['data_tokens'])} tokens, seed {row['seed']}"
        differs = [f"{c}={row[c]}" if c != "settings" else row[c] for c in told if row.get(c) is not None]
        print(f"{row['cell'][:8]}  {loss:>8}  {', '.join([said, *differs, *_not_said(row, settings, told)])}")
    print(f"{len(rows)} cells. `export DIGEST OUT --store {store.root}` writes one of these students to a folder.")
    return 0


def _not_said(row: Mapping[str, Any], settings: Mapping[str, str], told: Sequence[str]) -> list[str]:
    """The settings of a record that are not the default, but for those whose column is printed for every cell."""
    from capacity_gap.cell.table_settings import column_of

    text = f" {row.get('settings') or ''}" if "settings" in told else ""
    return [f"{key}={v}" for key, v in settings.items() if column_of(key) not in told and f" {key}=" not in text]


def _du(store: "Store", given: argparse.Namespace) -> int:
    from capacity_gap.store.contents import disk_use

    rows = disk_use(store)
    total = ("total", sum(count for _, count, _ in rows), sum(size for *_, size in rows))
    for kind, count, size in [*rows, total]:
        print(f"{kind:<16} {count:>6} {size / 1e6:>10.1f} MB")
    return 0


def _gc(store: "Store", given: argparse.Namespace) -> int:
    from capacity_gap.store.collect import delete, waste

    items, total = 0, 0
    for item in list(waste(store)):
        left = delete(item) if given.yes else ""
        why = f"not deleted: {left}" if left else item.reason
        print(f"{item.bytes / 1e6:>9.1f} MB  {item.path}  ({why})")
        items, total = items + (not left), total + item.bytes * (not left)
    ending = "deleted" if given.yes else "can be deleted; add `--yes`. Nothing was changed"
    print(f"{items} items, {total / 1e6:.1f} MB {ending}.")
    return 0


def _verify(store: "Store", given: argparse.Namespace) -> int:
    from capacity_gap.store.contents import not_made_again
    from capacity_gap.store.verify import ProgressLine, verify

    line = ProgressLine()
    found = verify(store, repair=given.repair, say=line)
    line.end()
    for fault in found.damaged:
        print(f"damaged: {fault.file.relative_to(store.root)} {fault.why}")
    print(
        f"{found.stages} stages and {found.notes} notes, {found.bytes / 1e6:,.1f} MB in {found.seconds:.1f} s: "
        f"{len(found.damaged)} damaged"
        + (f", {found.listed} of an older version were given a list of files" if found.listed else "")
    )
    for name in not_made_again(store):
        print(f"set aside and not recomputed: {name}")
    if found.damaged:
        print("\n".join(_advice(store, found, given.repair)))
    return 0 if found.is_sound else 1


def _advice(store: "Store", found: "Verified", repair: bool) -> Sequence[str]:
    """What to do next."""
    if not repair:
        return ["`--repair` moves damaged stages to .damaged/; then run the same run.py commands to recompute them."]
    if not found.is_sound:
        return [
            "Some of it is in use by running work: verify again when that has ended.",
            *(f"  {line}" for line in found.left),
        ]
    again = _commands(store, [fault.file for fault in found.damaged])
    shown = [f"  {line}" for line in again[:SHOWN]]
    more = [f"  and {len(again) - SHOWN} more cells"] if len(again) > SHOWN else []
    told = "Moved to .damaged/. Recomputed when needed, or now by:" if again else "Moved to .damaged/."
    return [told, *shown, *more, *_lost_notes(found)]


def _lost_notes(found: "Verified") -> list[str]:
    lost = [fault.file.name for fault in found.damaged if fault.file.parent.name == "sweeps"]
    return [
        f"`status` cannot list the cells of {name} until its sweep is run again; their results are kept."
        for name in lost
    ]


def _commands(store: "Store", files: "Sequence[Path]") -> list[str]:
    """The commands of the cells behind which damaged stages are."""
    from capacity_gap.runner import rerun
    from capacity_gap.store.contents import sweeps

    keys = {"/".join(file.relative_to(store.root).parts[:2]) for file in files}
    cells = [cell for known in sweeps(store).values() for cell in known.values() if keys & set(cell.get("stages", ()))]
    return list(dict.fromkeys(rerun.command(cell["overrides"], store.root) for cell in cells))


def _forget(store: "Store", given: argparse.Namespace) -> int:
    from capacity_gap.settings.scales import counted
    from capacity_gap.store.contents import forget_failed

    names = forget_failed(store, given.failed or None)
    for name in names:
        print(f"forgotten: {name}")
    if not names:
        print("No cell of a sweep has failed: nothing to forget.")
        return 0
    print(
        f"Removed: {counted(len(names), 'failed cell')} from {given.failed or 'all sweeps'}, and "
        "the records of their failures, unless another sweep has the cell.\n"
        "Kept: everything computed, checkpoints, logs and all other cells. "
        f"`{' '.join(TOOL_WORDS)} store gc {store.root}` lists what nothing needs any more."
    )
    return 0


def run_sync(given: argparse.Namespace) -> int:
    """Uploads the offline runs that have ended; 1 if some of them are left."""
    from capacity_gap.records.wandb_rows import connect
    from capacity_gap.store.contents import open_store
    from capacity_gap.tracking.wandb_api import sync
    from capacity_gap.tracking.wandb_runs import ended, run_folders

    folder = open_store(given.store).root / "wandb"
    connect()
    sent, left = sync(folder, limit_s=given.limit, entity=given.entity, project=given.project)
    print(f"{sent} runs uploaded, {left} left in {folder}.", file=sys.stderr if left else sys.stdout)
    waiting = run_folders(folder)
    if still := len(waiting) - len(ended(waiting)):
        print(
            f"{still} runs have not ended: sync again when they have. A run whose process died is replaced "
            "when its cell runs again."
        )
    return 1 if left else 0
