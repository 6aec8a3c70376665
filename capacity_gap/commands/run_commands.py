"""The commands `init`, `run`, `settings`, `plan` and `status`: starting cells and grids, and watching them."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from capacity_gap.commands.options import out_folder
from capacity_gap.settings.places import RUN_WORDS, TOOL_WORDS, default_store

if TYPE_CHECKING:
    from capacity_gap.runner.progress import Snapshot
    from capacity_gap.store.stage import Store


def add(commands: Any) -> None:
    """Adds the commands to the command line's parser."""
    _add_init(commands)
    run = commands.add_parser("run", description="Run one cell, or with -m a grid of them.", add_help=False)
    run.add_argument("overrides", nargs=argparse.REMAINDER)
    run.set_defaults(run=run_run)
    told = "List every setting with its meaning and allowed values."
    listed = commands.add_parser("settings", description=told)
    listed.add_argument("--page", action="store_true", help="as the Markdown page docs/settings.md")
    listed.set_defaults(run=run_settings)
    plan = commands.add_parser(
        "plan", description="Show what a grid would run and its cost; takes the arguments of `run -m`."
    )
    plan.add_argument("overrides", nargs=argparse.REMAINDER, help="such as +sweeps=quick, or student=60k,90k teacher=…")
    plan.set_defaults(run=run_plan)
    _add_status(commands)


def _add_init(commands: Any) -> None:
    told = "Write a commented sweep for your own checkpoints, and a README with the commands."
    init = commands.add_parser("init", description=told)
    init.add_argument("folder", type=out_folder, help="where sweeps/NAME.yaml and README.md go; nothing is overwritten")
    init.add_argument(
        "--name", default="mine", help="name of the sweep: letters, digits, _ and - (default: %(default)s)"
    )
    init.set_defaults(run=run_init)


def _add_status(commands: Any) -> None:
    told = "Say how far the grids of a store are, from any machine, at any time."
    status = commands.add_parser("status", description=told)
    status.add_argument("store", nargs="?", default=default_store(), help="default: %(default)s")
    status.add_argument("--sweep", metavar="NAME", help="only this sweep (`store ls` names them)")
    status.add_argument("--failed", action="store_true", help="why cells failed: cause, end of the log, how to rerun")
    status.set_defaults(run=run_status)


def run_init(given: argparse.Namespace) -> int:
    """Writes the two files and prints the next steps."""
    from capacity_gap.commands.starter import write_starter

    sweep, readme = write_starter(given.folder, given.name)
    print(f"written: {sweep}, {readme}\nReplace what {sweep.name} marks as yours; {readme.name} has the commands.")
    return 0


def run_run(given: argparse.Namespace) -> int:
    """Everything that `python run.py` does."""
    from capacity_gap.commands.run import main

    return main(given.overrides)


def run_settings(given: argparse.Namespace) -> int:
    """Prints the help of `run`, or the page."""
    from capacity_gap.commands.settings_help import settings_help, settings_page

    print(settings_page().rstrip() if given.page else settings_help(" ".join(RUN_WORDS)))
    return 0


def run_plan(given: argparse.Namespace) -> int:
    """Composes the grid and prints its plan."""
    from capacity_gap.commands.run import main

    return main(["-m", *given.overrides, "plan=true"])


def run_status(given: argparse.Namespace) -> int:
    """Prints the state of one grid or of all in a store; 1 if a cell failed."""
    from capacity_gap.cell.outdated import outdated, said
    from capacity_gap.report.standing import MOST
    from capacity_gap.settings.errors import choose
    from capacity_gap.store import contents

    store = contents.open_store(given.store)
    known = contents.sweeps(store)
    if given.sweep:
        choose("--sweep", given.sweep, known)
        known = {given.sweep: known[given.sweep]}
    failed, room = 0, MOST
    for name, cells in known.items():
        rounds = contents.rounds_of(store, name)
        now = _show(store, name, cells, rounds, failures=given.failed)
        failed += now.counts["failed"]
        if not rounds:  # their answer is of one model of all cells, and their curves have few cells each
            room -= _say_curves(store, name, now, room)
    if failed and given.failed:
        print(
            "\nWith other settings a rerun is another cell: `sweep=NAME` adds it to a sweep, and "
            f"`{' '.join(TOOL_WORDS)} store forget {store.root} --failed NAME` takes failed cells out of a sweep "
            "and keeps all else."
        )
    if aside := contents.not_made_again(store):
        print(f"set aside as damaged and not made again: {', '.join(aside)}")
    made = known[given.sweep] if given.sweep else contents.recorded(store)
    print("".join(f"{line}\n" for line in said(outdated(store, made))), end="")
    return 1 if failed else 0


def _show(
    store: "Store", name: str, cells: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], *, failures: bool
) -> "Snapshot":
    """Prints one grid with its `rounds` and, if asked, why its cells failed; returns how far it is."""
    from rich.console import Console

    from capacity_gap.report.rounds import end_line, reasons, round_line, stop_words
    from capacity_gap.runner.progress import View, table
    from capacity_gap.store.contents import end_of, stopped_cells

    now = View(store, cells).snapshot()
    title = f"{name}: {now.share:.0%} of {len(cells)} cells"
    Console(highlight=False, soft_wrap=True).print(table(now, cells, title=title))
    for number, note in enumerate(rounds, 1):
        print(f"  {round_line(note)}")
        for reason in reasons(note) if number == len(rounds) else ():
            print(f"    {reason}")
    if rounds and (end := end_of(store, name)):
        print(f"  {end_line(end)}")
    for line in stop_words(name, stopped_cells(store, name), now.cells):
        print(f"  {line}")
    failed = [key for key, state in now.cells.items() if state == "failed"]
    for key in failed if failures else ():
        print(_autopsy(store, key, cells[key]))
    return now


def _say_curves(store: "Store", name: str, now: "Snapshot", room: int) -> int:
    """Prints what the curves of a grid that has ended say; returns how many cells were fitted for it."""
    from capacity_gap.report.standing import standing

    done = [key for key, state in now.cells.items() if state == "done"]
    if not done or now.counts["running"] or now.counts["waiting"]:
        return 0
    said, fitted = standing(store, name, done, room=room)
    if said is None:
        said = [f"`{' '.join(TOOL_WORDS)} fit {store.root} --sweep {name}` says what each student's best teacher is."]
    print("".join(f"  {sentence}\n" for sentence in said), end="")
    return fitted


def _autopsy(store: "Store", key: str, cell: Mapping[str, Any]) -> str:
    """Why one cell failed, what its log ends with, and the command that runs just this cell."""
    from capacity_gap.runner import rerun
    from capacity_gap.settings.errors import Damaged
    from capacity_gap.store.contents import failure_file
    from capacity_gap.store.files import read_json
    from capacity_gap.store.logs import tail

    try:
        cause = read_json(failure_file(store, key), ["error"])["error"]
    except Damaged as error:
        cause = f"not known, {error.file.relative_to(store.root)} {error.why}"
    lines = [f"\nfailed: {cell['name']}", f"  cause: {cause}"]
    if found := tail(store, list(cell["stages"])):
        lines += [f"  log:   {found[0]}", *(f"    | {line}" for line in found[1])]
    return "\n".join([*lines, f"  rerun: {rerun.command(cell['overrides'], store.root)}"])
