"""The command `beside`: one's own cells beside published ones, and what those predict for the same students."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the command to the command line's parser."""
    told = "Compare cells with published ones, and say which teacher those predict."
    parser = commands.add_parser("beside", description=told)
    parser.add_argument("source", help="a store")
    parser.add_argument(
        "--sweep", metavar="NAME", required=True, help="the cells of this sweep (`store ls` names them)"
    )
    parser.add_argument(
        "--records", help="the published cells: whatever `fit` reads (default: the pico study, results/pico)"
    )
    parser.set_defaults(run=run_beside)


def run_beside(given: argparse.Namespace) -> int:
    """Prints both losses of each cell, the prediction for each student, and what to type next."""
    from capacity_gap import records
    from capacity_gap.records.load import sweep_frame
    from capacity_gap.report.beside import beside, next_commands
    from capacity_gap.settings.errors import UserError
    from capacity_gap.settings.places import RESULTS, RUN_WORDS, TOOL_WORDS
    from capacity_gap.store.contents import open_store

    mine = sweep_frame(open_store(given.source), given.sweep)
    mine = mine[(mine["status"] == "done") & (mine["data_tokens"] > 0)]
    if mine.empty:
        raise UserError(f"sweep {given.sweep} has no finished cell that was trained. `status` says how far it is.")
    where = given.records or str(RESULTS / "pico")
    published = records.load(where).drop_duplicates("cell")
    print("\n".join(beside(mine, published, source=given.records or "the pico study")))
    print("\nnext:")
    for line in next_commands(mine, TOOL_WORDS, RUN_WORDS, given.source, given.sweep):
        print(f"  {line}")
    return 0
