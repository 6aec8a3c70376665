"""`capacity-gap COMMAND`, also `python -m capacity_gap COMMAND`. Heavy imports wait until a command needs them."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from capacity_gap import __version__
from capacity_gap.commands import (
    exchange_commands,
    fit_commands,
    model_commands,
    report_commands,
    run_commands,
    store_commands,
)
from capacity_gap.commands.options import Parser
from capacity_gap.settings import extension

GROUPS = {
    "run and watch": run_commands,
    "fit and decide": fit_commands,
    "look": report_commands,
    "models": model_commands,
    "store and upload": store_commands,
    "send and receive": exchange_commands,
}
HYDRAS = ("run", "plan")  # every word after these is for Hydra, options too
QUESTION = "Find the best teacher size for distilling a student of N parameters."


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = Parser(
        prog="capacity-gap",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description=QUESTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog=root.prog
    )
    root.epilog = "\n\n".join(_grouped(commands)) + "\n\n`%(prog)s COMMAND --help` lists a command's options."
    return root


def _grouped(commands: Any) -> list[str]:
    """Adds all commands; returns a paragraph of help for each group."""
    paragraphs = []
    for heading, group in GROUPS.items():
        known = set(commands.choices)
        group.add(commands)
        new = {name: made.description for name, made in commands.choices.items() if name not in known}
        paragraphs.append("\n".join([f"{heading}:", *(f"  {name:<11}{does}" for name, does in new.items())]))
    return paragraphs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a user's error is one paragraph and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any("\ud800" <= sign <= "\udfff" for word in words for sign in word):
        print("error: the arguments hold bytes that are not UTF-8. Rename such files.", file=sys.stderr)
        return 2
    if words[:1] in ([name] for name in HYDRAS):
        given = parser().parse_args(words[:1])
        given.overrides = words[1:]
    else:
        given = parser().parse_args(words)
    try:
        extension.load()
        status = given.run(given)
        sys.stdout.flush()  # what is wrong with the output shows here, and not after all
        return status
    except Exception as error:
        from capacity_gap.commands.explain import leave_output, paragraph

        if isinstance(error, BrokenPipeError):
            leave_output()
            return 0
        if (said := paragraph(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
