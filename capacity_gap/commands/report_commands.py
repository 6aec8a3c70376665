"""The commands `report`, `dashboard` and `sync`: what leaves a store for people to look at."""

import argparse
import sys
from pathlib import Path
from typing import Any

from capacity_gap.cell.config import default_store

SYNC_S = 600


def add(commands: Any) -> None:
    """Adds the three commands to the command line's parser."""
    report = commands.add_parser("report", help="one HTML file with curves, law, dynamics, costs; needs no network")
    report.add_argument("source", help="a store, or anything else that `fit` reads")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="default: %(default)s")
    report.add_argument("--sweep", metavar="NAME", help="of a store: only this sweep (`store ls` names them)")
    report.add_argument("--axis", choices=("total", "non_embedding"), default="total", help="which parameters count")
    report.add_argument("--metric", help="column to minimise (default: student_loss, or loss in foreign tables)")
    report.set_defaults(run=run_report)
    board = commands.add_parser("dashboard", help="a W&B workspace for the runs of a project")
    board.add_argument("project", metavar="ENTITY/PROJECT")
    board.add_argument("--sweep", metavar="NAME", help="only the runs of this sweep")
    board.add_argument("--out", type=Path, help="write the workspace as JSON; W&B is not asked")
    board.set_defaults(run=run_dashboard)
    sync = commands.add_parser("sync", help="upload to W&B what was tracked offline")
    sync.add_argument("store", nargs="?", default=default_store(), help="default: %(default)s")
    sync.add_argument("--limit", type=float, default=SYNC_S, metavar="SECONDS", help="give up then (%(default)s)")
    sync.add_argument("--entity", help="another than the runs were made for")
    sync.add_argument("--project", help="another than the runs were made for")
    sync.set_defaults(run=run_sync)


def run_report(given: argparse.Namespace) -> int:
    """Writes the report and says what it says."""
    from capacity_gap.report.page import write_report

    content = write_report(given.source, given.out, sweep=given.sweep, axis=given.axis, metric=given.metric)
    print(content.law.verdict() if content.law else content.problem)
    print(f"\nwritten: {given.out} ({given.out.stat().st_size / 1e6:.1f} MB)")
    return 0


def run_dashboard(given: argparse.Namespace) -> int:
    """Saves the workspace to W&B, or to a file."""
    from capacity_gap.report.dashboard import dashboard, save

    print(f"written: {save(dashboard(given.project, sweep=given.sweep), given.out)}")
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
            f"{still} runs have not ended: sync again when they have. One whose process died gives way to a new one "
            "when its cell is run again."
        )
    return 1 if left else 0
