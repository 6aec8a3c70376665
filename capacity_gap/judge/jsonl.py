"""JSON lines: what users give is read strictly, what this package appends is read as far as it is whole.

Lines end at a newline byte alone. `str.splitlines` would also part them at U+2028 and its like, which JSON leaves as
they are inside a text, and a file that a crash cut inside a character would not even decode.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import UserError


def read_given(file: Path, needed: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a user's file, each with the place that an error about it should name.

    Raises:
        UserError: there is no such file, or a line is no JSON object that has all of `needed`.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist. Pass JSON lines with the fields {', '.join(needed)}.")
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is None or not row.keys() >= set(needed):
            raise UserError(f"{file}, line {number}: not a JSON object with {', '.join(needed)}.")
        rows.append((f"{file}, line {number}", row))
    return rows


def read_whole(file: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a file of our own that are whole; a line that a crash cut off is as if never written."""
    rows = [_parsed(line) for line in file.read_bytes().split(b"\n")] if file.exists() else []
    return [row for row in rows if row is not None and row.keys() >= set(needed)]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        return None
    return row if isinstance(row, dict) else None


def append(file: Path, row: dict[str, Any]) -> None:
    """Appends one object on a line of its own, and makes sure that it is on the disk: it was paid or waited for."""
    with file.open("ab+") as stream:
        end = stream.seek(0, os.SEEK_END)
        whole = end == 0 or (stream.seek(end - 1), stream.read(1))[1] == b"\n"
        stream.write((b"" if whole else b"\n") + json.dumps(row, ensure_ascii=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
