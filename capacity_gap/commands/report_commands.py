"""The commands `report`, `frontier` and `dashboard`: what people look at."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.commands.options import COLUMNS, columns, out_file, whole

if TYPE_CHECKING:
    from capacity_gap.report.content import Content
    from capacity_gap.store.stage import Store


def add(commands: Any) -> None:
    """Adds the three commands to the command line's parser."""
    _add_report(commands)
    _add_frontier(commands)
    _add_dashboard(commands)


def _add_report(commands: Any) -> None:
    told = "Write one HTML file with curves, law, dynamics and costs; it needs no network."
    report = commands.add_parser("report", description=told)
    report.add_argument("source", help="a store, or anything else that `fit` reads")
    report.add_argument("--out", type=out_file, default=Path("report.html"), help="default: %(default)s")
    report.add_argument("--sweep", metavar="NAME", help="of a store: only this sweep (`store ls` names them)")
    report.add_argument("--axis", choices=("total", "non_embedding"), default="total", help="which parameters count")
    report.add_argument("--metric", help="column to minimise (default: student_loss, or loss in foreign tables)")
    report.add_argument("--columns", type=columns, default={}, metavar="OURS=THEIRS,...", help=COLUMNS)
    told = (
        "write it again whenever a cell of the store ends, until its grids have ended or were stopped, or Ctrl-C; "
        "looks every SECONDS; exit status 1 if cells failed or were left"
    )
    report.add_argument("--watch", nargs="?", const=15, type=whole(1, 3600), metavar="SECONDS", help=told)
    report.set_defaults(run=run_report)


def _add_frontier(commands: Any) -> None:
    told = "Draw score against training compute, with the published models."
    frontier = commands.add_parser("frontier", description=told)
    frontier.add_argument("source", nargs="?", help="as for fit; without it, the published models alone")
    frontier.add_argument("--metric", default="average", help="a benchmark or recorded column (default: %(default)s)")
    frontier.add_argument("--compute", default="distillation", help="student, distillation (default) or total")
    frontier.add_argument("--out", type=out_file, help="stem of the .png, .svg and .csv; without it, only text")
    frontier.set_defaults(run=run_frontier)


def _add_dashboard(commands: Any) -> None:
    board = commands.add_parser("dashboard", description="Make a W&B workspace for the runs of a project.")
    board.add_argument("project", metavar="ENTITY/PROJECT")
    board.add_argument("--sweep", metavar="NAME", help="only the runs of this sweep")
    board.add_argument("--out", type=out_file, help="write the workspace as JSON; W&B is not asked")
    board.set_defaults(run=run_dashboard)


def run_report(given: argparse.Namespace) -> int:
    """Writes the report and says what it says; 1 if cells of a watched grid are missing at its end."""
    from capacity_gap.report.answer import answer_of
    from capacity_gap.report.page import write_report

    named = {"axis": given.axis, "metric": given.metric, "columns": given.columns}
    missing = 0
    if given.watch:
        content, missing = _follow(given, named)
    else:
        content = write_report(given.source, given.out, sweep=given.sweep, **named)
    print("\n".join(answer_of(content).lines()))
    print(f"\nwritten: {given.out} ({given.out.stat().st_size / 1e6:.1f} MB)")
    return 1 if missing else 0


def _follow(given: argparse.Namespace, options: Mapping[str, Any]) -> "tuple[Content, int]":
    """Writes the report again and again; returns what the last one was made from, and how many cells are missing."""
    from capacity_gap.report.watching import Follower, check_watched
    from capacity_gap.runner.progress import View

    def progress(store: "Store", cells: Mapping[str, Any]) -> tuple[Mapping[str, str], list[str]]:
        now = View(store, cells).snapshot()
        return now.cells, [stage.key for stage in now.running]

    check_watched(given.source)
    print(f"{given.out} is written again whenever a cell ends; Ctrl-C ends this and not the grid", flush=True)
    follower = Follower(
        given.source,
        given.out,
        given.sweep,
        progress,
        every_s=given.watch,
        options=options,
        say=lambda line: print(line, flush=True),
    )
    return follower.run(), follower.missing


def run_frontier(given: argparse.Namespace) -> int:
    """Prints the points of the figure, cheapest first, and writes it if asked."""
    from capacity_gap import records
    from capacity_gap.cell.outdated import without_outdated
    from capacity_gap.records.tables import write_csv
    from capacity_gap.report.frontier import better_up, frontier_points, plot_frontier
    from capacity_gap.report.plots import save_figure

    frame, stale = without_outdated(records.load(given.source), given.source) if given.source else (None, [])
    points, notes = frontier_points(frame, given.metric, given.compute)
    points = points.sort_values("flops")
    print(points.to_string(index=False, float_format="{:.4g}".format))
    for note in (*stale, *notes):
        print(f"note: {note}.")
    if given.out:
        up = better_up(frame, given.metric)
        drawn = plot_frontier(points, given.metric, given.compute, higher_is_better=up)
        files = save_figure(drawn, given.out)
        write_csv(points, given.out.with_suffix(".csv"))
        print("\nwritten: " + ", ".join(map(str, [*files, given.out.with_suffix(".csv")])))
    return 0


def run_dashboard(given: argparse.Namespace) -> int:
    """Saves the workspace to W&B, or to a file."""
    from capacity_gap.report.dashboard import dashboard, save

    print(f"written: {save(dashboard(given.project, sweep=given.sweep), given.out)}")
    return 0
