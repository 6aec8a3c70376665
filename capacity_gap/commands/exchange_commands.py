"""The commands `records export` and `records import`: cells that one person ran and another believes."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_gap.commands.options import out_file, out_folder

NAMED = 5  # cells that are named where some are not there


def add(commands: Any) -> None:
    """Adds the commands to the command line's parser."""
    told = "Send the records of a sweep to somebody else, and check those that somebody sent."
    actions = commands.add_parser("records", description=told).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    told = "write the finished cells of a sweep to a CSV file"
    export = actions.add_parser("export", help=told, description=f"{told[0].upper()}{told[1:]}.")
    export.add_argument("store", help="a store")
    export.add_argument("--sweep", metavar="NAME", required=True, help="its cells (`store ls` names the sweeps)")
    export.add_argument("--out", type=out_file, required=True, metavar="FILE.csv", help="the file")
    export.set_defaults(run=run_export)
    told = "check every row of such files against a grid, and add them to a folder; 2 if anything is wrong"
    take = actions.add_parser("import", help=told, description=f"{told[0].upper()}{told[1:]}.")
    take.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of `records export`")
    take.add_argument("--origin", required=True, metavar="WHO", help="who ran them: small letters, digits, - and _")
    words = "what follows `run.py -m`: '+sweeps=replicate_hour data=10m'; extend=[MODULE] among them runs MODULE"
    take.add_argument("--grid", required=True, metavar="WORDS", help=words)
    take.add_argument("--out", type=out_folder, required=True, metavar="FOLDER", help="writes FOLDER/WHO.csv")
    take.set_defaults(run=run_import)


def run_export(given: argparse.Namespace) -> int:
    """Writes the file, and says which cells of the sweep are not in it."""
    from capacity_gap.records.claims import sent, write_rows
    from capacity_gap.records.load import sweep_frame
    from capacity_gap.settings.errors import ConfigError, UserError, shown
    from capacity_gap.store.contents import open_store, sweeps

    if given.out.suffix != ".csv":
        raise ConfigError(f"--out {shown(given.out)}: records are sent as .csv.")
    store = open_store(given.store)
    frame = sent(sweep_frame(store, given.sweep))
    if frame.empty:
        raise UserError(f"sweep {given.sweep} has no finished cell. `status` says how far it is.")
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    write_rows(({str(k): v for k, v in row.items()} for row in rows), given.out)
    cells = sweeps(store)[given.sweep]
    lacking = [cell["name"] for key, cell in cells.items() if key.removeprefix("record/") not in set(frame["cell"])]
    print(f"{len(frame)} of {len(cells)} cells of {given.sweep} in {given.out}.")
    _say_lacking(lacking, "Not finished")
    return 0


def run_import(given: argparse.Namespace) -> int:
    """Adds the rows to the folder, and says which cells of the grid are not there."""
    from capacity_gap.records.claims import ORIGIN
    from capacity_gap.records.receive import receive
    from capacity_gap.runner.claimed_grid import claimed_cells
    from capacity_gap.settings import extension
    from capacity_gap.settings.errors import ConfigError, shown
    from capacity_gap.settings.places import user_path
    from capacity_gap.settings.scales import counted

    if not ORIGIN.fullmatch(given.origin):
        raise ConfigError(
            f"--origin {shown(given.origin)}: write 1 to 40 small letters, digits, - and _, such as lab-a."
        )
    try:
        words = shlex.split(given.grid)
    except ValueError as error:
        raise ConfigError(f"--grid {shown(given.grid)} cannot be read: {error}.") from error
    extension.load_named_on(words)  # typed on this command line, as `run.py extend=[…]` is
    claims = claimed_cells(words)
    files = [user_path(file) for file in given.files]
    found = receive(files, claims, given.out, origin=given.origin)
    print(f"{found.cells} of {len(claims)} cells of this grid, {found.new} of them new, are in {found.file}.")
    _say_lacking(found.lacking, f"Not there from {given.origin}")
    if found.changed:
        verb = "was" if found.changed == 1 else "were"
        print(f"note: {counted(found.changed, 'cell')} {verb} made with source that no commit names.")
    return 0


def _say_lacking(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        print(f"{what}: {'; '.join(names[:NAMED])}{more}.")
