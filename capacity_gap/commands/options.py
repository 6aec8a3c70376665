"""Types of command-line options: impossible values are rejected before a command computes anything."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from capacity_gap.settings.checks import check_text
from capacity_gap.settings.errors import ConfigError, shown
from capacity_gap.settings.places import user_path

MOST = 10**9
MESSAGE = 2000  # characters of an error of argparse's: it may list every command


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one paragraph, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"error: {shown(message.rstrip('.'), most=MESSAGE)}. `{self.prog} --help` lists what it takes.\n")


def out_file(given: str) -> Path:
    """A file that can be written."""
    return _out(given, Path.is_file, "is not a file: name a file to write")


def out_folder(given: str) -> Path:
    """A folder that can be made, or be written to."""
    return _out(given, Path.is_dir, "is a file: name a folder")


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A whole number in a range."""

    def number(given: str) -> int:
        if not given.isascii() or not given.isdigit() or len(given) > 20 or not least <= int(given) <= most:
            raise argparse.ArgumentTypeError(f"{shown(given)} is out of range; allowed: {least:,} to {most:,}")
        return int(given)

    return number


def amount(given: str) -> float:
    """A finite number, zero or more."""
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not math.isfinite(value) or not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{shown(given)} is out of range; allowed: 0 to {MOST:,}")
    return value


COLUMNS = "column names of an external table: student_params=n_student,teacher_params=n_teacher,loss=val_loss,..."


def columns(given: str) -> dict[str, str]:
    """Pairs `OURS=THEIRS`, with commas between."""
    found: dict[str, str] = {}
    for pair in given.split(","):
        ours, sign, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and sign and theirs) or ours in found:
            raise argparse.ArgumentTypeError(
                f"{shown(given)} cannot be read; write OURS=THEIRS,OURS=THEIRS, such as student_params=n_student"
            )
        found[ours] = theirs
    return found


def _out(given: str, is_kind: Callable[[Path], bool], said: str) -> Path:
    """A place of one kind that is there or can be made."""
    path = _path(given)
    if path.exists() and not is_kind(path):
        raise argparse.ArgumentTypeError(f"{shown(given)} {said}")
    _writable(path, given)
    return path


def _path(given: str) -> Path:
    try:
        check_text("path", given)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not given:
        raise argparse.ArgumentTypeError("empty; give a path to write to")
    return user_path(given)


def _writable(path: Path, given: str) -> None:
    """Whether the nearest thing that is there can hold what is written."""
    there = path.absolute()
    while not there.exists() and there.parent != there:
        there = there.parent
    if there != path.absolute() and not there.is_dir():
        raise argparse.ArgumentTypeError(f"{shown(given)} is inside {there}, which is not a folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{shown(given)} cannot be written: no write permission for {there}")


WHERE = "only rows whose column has one of these values, such as teacher_data=1m; may be given several times"


def where(given: str) -> tuple[str, list[str]]:
    """A column and the values that are kept: `COLUMN=VALUE,VALUE`."""
    column, sign, values = (part.strip() for part in given.partition("="))
    kept = [value.strip() for value in values.split(",") if value.strip()]
    if not (column and sign and kept):
        raise argparse.ArgumentTypeError(f"{shown(given)} cannot be read; write COLUMN=VALUE, such as teacher_data=1m")
    return column, kept
