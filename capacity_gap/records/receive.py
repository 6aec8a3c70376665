"""Import of records: what is checked between rows, and the file of each origin that they are added to.

A file with anything wrong in it is refused whole, with all that is wrong.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.records.claims import SAME, Claim, Row, faults, read_rows, same, write_rows
from capacity_gap.records.record import NESTED, RESULT_FIELDS
from capacity_gap.settings.errors import UserError, shown
from capacity_gap.settings.scales import counted

MOST_FAULTS = 50  # that are listed
SAME_TEXT = 1e-6  # relative: bytes a token of the same held-out text
OF_TEACHER = ("teacher_loss", "teacher_loss_ood", "teacher_entropy")  # measured once for each teacher of an origin


def once(rows: Mapping[str, Row]) -> tuple[dict[str, Row], list[str]]:
    """One row for each cell, and the cells that come twice with different results."""
    first: dict[str, tuple[str, Row]] = {}
    wrong = []
    for place, row in rows.items():
        if (cell := str(row.get("cell"))) not in first:
            first[cell] = place, row
        elif differ := _differ(first[cell][1], row):
            wrong.append(f"{place}: the cell of {first[cell][0]} again, with another {', '.join(differ)}")
    return {cell: row for cell, (_, row) in first.items()}, wrong


def _differ(one: Row, other: Row) -> list[str]:
    return [name for name in RESULT_FIELDS if name not in NESTED and not same(one.get(name), other.get(name))]


def contradictions(
    mine: Mapping[str, Row], known: Sequence[Row], claims: Mapping[str, Claim], *, origin: str
) -> list[str]:
    """Where rows cannot be true beside one another, or beside those that are there.

    Results of one cell may differ between origins: to see whether they do is what they are collected for. What may not
    differ is the size of the student and the held-out text: its tokens, and its bytes a token, which are the ratio of
    two losses. Within an origin a teacher is measured once.
    """
    wrong = []
    for there in known:
        who, cell = there.get("origin"), str(there.get("cell"))
        row = mine.get(cell)
        if row is None:
            continue
        differ = _differ(row, there) if who == origin else []
        if not differ and not same(row.get("stored_params"), there.get("stored_params")):
            differ = ["stored_params"]
        if differ:
            wrong.append(f"{claims[cell].name}: {who} has another {', '.join(differ)}")
    rows = [{**row, "origin": row.get("origin") or origin} for row in (*known, *mine.values())]
    rows = [row for row in rows if str(row.get("cell")) in claims]
    own = [row for row in rows if row["origin"] == origin]
    return wrong + _other_texts(rows, claims) + _other_teachers(own, claims)


def _other_texts(rows: Sequence[Row], claims: Mapping[str, Claim]) -> list[str]:
    """Rows that were measured on another text than earlier ones of the same grid: each text is said once an origin."""
    first: dict[tuple[str, str], tuple[float, str]] = {}
    wrong: dict[tuple[str, str, str], str] = {}
    in_bytes = {claims[str(row["cell"])].held_out for row in rows if row.get("student_bits_per_byte")}
    for row in rows:
        claim, who = claims[str(row["cell"])], row["origin"]
        bits, loss = row.get("student_bits_per_byte"), row.get("student_loss")
        if not bits and claim.held_out in in_bytes:
            said = f"{claim.name}: student_bits_per_byte is empty, and other records of this text have it"
            wrong.setdefault((claim.held_out, who, "empty"), said)
        tokens = row.get("held_out_tokens")
        sizes: dict[str, tuple[float, float]] = {"tokens": (tokens, SAME)} if tokens else {}
        sizes |= {"bytes a token": (loss / bits / math.log(2), SAME_TEXT)} if bits and loss else {}
        for what, (size, within) in sizes.items():
            before, whose = first.setdefault((claim.held_out, what), (size, who))
            if not same(size, before, within):
                said = f"{claim.name}: its held-out text has {size:.7g} {what}, that of {whose} {before:.7g}"
                wrong.setdefault((claim.held_out, who, what), f"{said}: not the same text")
    return list(wrong.values())


def _other_teachers(rows: Sequence[Row], claims: Mapping[str, Claim]) -> list[str]:
    """Rows of one origin in which one teacher has two losses or entropies: each teacher is said once."""
    first: dict[tuple[str, str], tuple[Any, str]] = {}
    wrong: dict[str, str] = {}
    for row in rows:
        claim = claims[str(row["cell"])]
        for name in OF_TEACHER:
            if (value := row.get(name)) is None:
                continue
            before, whose = first.setdefault((claim.teacher, name), (value, claim.name))
            if not same(value, before):
                said = f"{claim.name}: {name} of the same teacher is {shown(value)}, and {shown(before)} in {whose}"
                wrong.setdefault(claim.teacher, f"{said}. Cells of two stores have two origins: import each by itself")
    return list(wrong.values())


@dataclass(frozen=True)
class Received:
    """What an import left: the file, its cells, how many of them are new, and the grid's cells that it lacks."""

    file: Path
    cells: int
    new: int
    lacking: Sequence[str]
    changed: int  # rows that were made with a changed tree


def receive(files: Sequence[Path], claims: Mapping[str, Claim], folder: Path, *, origin: str) -> Received:
    """Checks every row of the files, and adds them to the origin's file in a folder.

    Raises:
        UserError: anything is wrong; all of it is listed, and nothing is written.
    """
    rows: dict[str, Row] = {}
    wrong = []
    for file in files:
        found, said = read_rows(file)
        rows |= found
        wrong += said
    mine, twice = once(rows)
    wrong += [*faults(rows, claims, origin=origin), *twice]
    known, target = [], folder / f"{origin}.csv"
    for table in sorted(folder.glob("*.csv")):
        held, said = read_rows(table)
        wrong += [*said, *_foreign(table, held)]
        known += list(held.values())
    if not wrong:
        wrong = contradictions(mine, known, claims, origin=origin)
    if wrong:
        raise UserError("\n".join([f"nothing was imported, for {counted(len(wrong), 'fault')}:", *_some(wrong)]))
    before = {str(row["cell"]): row for row in known if row.get("origin") == origin}
    both = before | {cell: {**row, "origin": origin} for cell, row in mine.items()}
    write_rows([both[cell] for cell in sorted(both)], target)
    lacking = [claim.name for cell, claim in claims.items() if cell not in both]
    changed = sum((row.get("git_commit") or "+").endswith("+") for row in mine.values())
    return Received(target, len(mine), len(mine.keys() - before.keys()), lacking, changed)


def _foreign(table: Path, rows: Mapping[str, Row]) -> list[str]:
    """What is said of a table in the folder that no import wrote: importing would write over its rows."""
    foreign = [row for row in rows.values() if row.get("origin") != table.stem]
    if not foreign:
        return []
    said = f"{table} has {counted(len(foreign), 'row')} without the origin {shown(table.stem)}"
    return [f"{said}, so no import wrote it. Move it out of this folder, then import it from there"]


def _some(wrong: Sequence[str]) -> list[str]:
    more = [f"  and {len(wrong) - MOST_FAULTS:,} more"] if len(wrong) > MOST_FAULTS else []
    return [*(f"  {what}" for what in wrong[:MOST_FAULTS]), *more]
