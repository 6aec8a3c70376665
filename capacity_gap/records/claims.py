"""Records that somebody else made: the file they are sent in, and what is checked before they are believed.

A row is text until it is read here: numbers and words in columns that a record has. Nothing in it is run or unpickled.
What the settings of a cell decide (`Claim.columns`) is known here too and must agree; what was measured must be
possible. A file with anything wrong in it is refused whole, with all that is wrong.
"""

import csv
import datetime
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.records.record import NESTED, RESULT_FIELDS, SCHEMA_VERSION, columns
from capacity_gap.records.tables import as_given, boolean, cells, write_csv
from capacity_gap.settings.errors import UserError, shown

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

ASIDE = ("error", "origin")  # columns that a sent file need not have
SENT = tuple(name for name in columns() if name not in (*NESTED, *ASIDE))
SPREAD = re.compile(r"(?:(?:teacher_)?metrics|version)/[\w.\-]+(?:/[\w.\-]+)*")  # of a record's nested columns
ORIGIN = re.compile(r"[a-z0-9][a-z0-9_\-]{0,39}")
COMMIT = re.compile(r"[0-9a-f]{7,64}\+?")
LONGEST = 2000  # characters of a cell
SHOWN = 50  # faults that are listed
SAME = 1e-9  # relative: what is computed twice from the same settings
SAME_TEXT = 1e-6  # relative: bytes a token of the same held-out text
LOSS = (0.0, 100.0)  # nats: a uniform guess has log V, a damaged start some times that
COUNT = (1.0, 1e15)
AMOUNT = (0.0, 1e15)
MEASURED = {  # what no setting decides → least and largest that it can be
    **dict.fromkeys(("student_loss", "teacher_loss", "init_loss", "student_loss_ood", "teacher_loss_ood"), LOSS),
    **dict.fromkeys(("student_loss_validation", "tuned_loss", "train_ce", "student_loss_stderr"), LOSS),
    "train_kl": (-LOSS[1], LOSS[1]),  # estimated from samples
    "teacher_entropy": LOSS,
    **dict.fromkeys(("held_out_tokens", "stored_params", "micro_batch", "threads", "ranks"), COUNT),
    **dict.fromkeys(("expanded_tokens", "peak_memory_bytes", "wall_s", "tokens_per_s"), AMOUNT),
    **dict.fromkeys(("student_bits_per_byte", "signal_bytes_per_token"), AMOUNT),
    **dict.fromkeys(("second_bytes_per_token_before", "second_bytes_per_token"), AMOUNT),
    "mfu": (0.0, 1.0),
}
NEEDED = ("student_loss", "teacher_loss", "init_loss", "teacher_entropy", "held_out_tokens", "stored_params", "device")
TOLD = ("device", "git_commit", "created")  # words that no setting decides
OWN = ("schema_version", "cell", "status", "registration", "trained")  # each checked by itself


@dataclass(frozen=True)
class Claim:
    """What a record of one cell must say.

    `columns`: what its settings come to. `trained`: digest of the trained student. `text`: of the packed text.
    `vocabulary`: rows of the teacher's output matrix. `registration`: hash of the page that was there beforehand.
    """

    columns: Mapping[str, Any]
    trained: str
    text: str
    vocabulary: int
    registration: str | None
    name: str


# Writing


def sent(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The finished cells as they are sent: every column of a record, in order of cells."""
    done = frame[frame["status"] == "done"].sort_values("cell")
    spread = sorted(c for c in map(str, done) if SPREAD.fullmatch(c) and done[c].notna().any())
    return done.reindex(columns=[*SENT, *spread])


def write_rows(rows: Iterable[Row], file: Path) -> None:
    """Writes rows as a CSV, whole or not at all: the columns of a record first, formulas of spreadsheets as text."""
    import pandas as pd

    frame = pd.DataFrame(list(rows), dtype=object)
    known = [name for name in columns() if name in frame]
    frame = frame[[*known, *sorted(str(c) for c in frame if c not in known)]]
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write_csv(frame, beside, quoting=csv.QUOTE_MINIMAL, lineterminator="\n")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


# Reading


def read_rows(file: Path) -> tuple[dict[str, Row], list[str]]:
    """The rows of a sent file by their place, and what is wrong with columns and single values."""
    try:
        header, lines = cells(file)
    except UserError as error:
        return {}, [str(error)]
    missing = [name for name in SENT if name not in header]
    unknown = [name for name in header if name not in (*SENT, *ASIDE) and not SPREAD.fullmatch(name)]
    wrong = [f"{file.name} lacks the columns {', '.join(missing)}"] if missing else []
    wrong += [f"{file.name} has unknown columns: {', '.join(map(shown, unknown))}"] if unknown else []
    found: dict[str, Row] = {}
    for line, texts in lines:
        place = f"{file.name}, line {line}"
        found[place], said = _read_row(dict(zip(header, texts, strict=True)))
        wrong += [f"{place}, {what}" for what in said]
    return found, wrong + ([] if found else [f"{file.name} has no rows"])


def _read_row(texts: Mapping[str, str]) -> tuple[Row, list[str]]:
    row: Row = {}
    wrong = []
    for name, text in texts.items():
        try:
            row[name] = _value(name, text)
        except ValueError as error:
            wrong.append(f"{shown(name)}: {error}")
    return row, wrong


def _value(name: str, text: str) -> Any:
    """A cell in its column's type; None where it is empty."""
    if not text:
        return None
    column = columns().get(name)
    kind = column.kind if column else "float" if name.startswith(("metrics/", "teacher_metrics/")) else "str"
    if name.endswith("/higher_is_better"):
        return boolean(text)
    if kind.startswith("str"):
        if len(text) > LONGEST or not text.isprintable():
            raise ValueError(f"{shown(text)!r} is too long or holds signs that cannot be printed")
        return as_given(text)
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"{shown(text)!r} is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)!r} is not finite")
    if not kind.startswith("int"):
        return number
    if number != int(number):
        raise ValueError(f"{shown(text)!r} is no whole number")
    return int(text) if re.fullmatch(r"-?\d+", text) else int(number)


# Checking


def faults(rows: Mapping[str, Row], claims: Mapping[str, Claim], *, origin: str) -> list[str]:
    """What is wrong with rows by themselves, as records of these cells: settings, sizes, digests, measurements."""
    found = []
    for place, row in rows.items():
        claim = claims.get(str(row.get("cell")))
        if claim is None:
            found.append(f"{place}: {shown(row.get('cell'))} is no cell of this grid, so it has other settings")
            continue
        found += [f"{place}, {what}" for what in (*_unlike(row, claim), *_impossible(row, claim), *_told(row, origin))]
    return found


def _unlike(row: Row, claim: Claim) -> Iterator[str]:
    """Where a row differs from what its own digest stands for."""
    aside = {*NESTED, *ASIDE, *MEASURED, *TOLD, *OWN}
    own = {"schema_version": SCHEMA_VERSION, "status": "done", "trained": claim.trained}
    expected = own | {name: claim.columns.get(name) for name in columns() if name not in aside}
    for name, value in expected.items():
        if name in row and not _same(row[name], value):
            yield f"{name}: {shown(row[name])}, where {claim.name} has {shown(value)}"
    if row.get("registration") != claim.registration:
        said = "none" if row.get("registration") is None else shown(row["registration"], 16)
        yield f"registration: {said}, where the page of this grid has {shown(claim.registration, 16)}"


def _same(one: Any, other: Any, within: float = SAME) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=within, abs_tol=0) if numbers else one == other


def _impossible(row: Row, claim: Claim) -> Iterator[str]:
    for name, (least, most) in MEASURED.items():
        value = row.get(name)
        if value is not None and not least <= value <= most:
            yield f"{name}: {value} is impossible; it is from {least:g} to {most:g}"
    for name in NEEDED:
        if name in row and row[name] in (None, 0):
            yield f"{name}: a finished cell has one"
    entropy, most = row.get("teacher_entropy"), math.log(claim.vocabulary)
    if entropy is not None and entropy > most * (1 + SAME):
        yield f"teacher_entropy: {entropy} is impossible; {claim.vocabulary:,} tokens have at most {most:.4g} nats"


def _told(row: Row, origin: str) -> Iterator[str]:
    """Where words that no setting decides are not what the program writes."""
    if row.get("error"):
        yield "error: a finished cell has none"
    if row.get("origin") not in (None, origin):
        yield f"origin: {shown(row['origin'])}, where --origin is {origin}"
    if (commit := row.get("git_commit")) and not COMMIT.fullmatch(commit):
        yield f"git_commit: {shown(commit)} is none"
    try:
        datetime.datetime.fromisoformat(row.get("created") or "")
    except ValueError:
        yield f"created: {shown(row.get('created'))} is no date"


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
    return [name for name in RESULT_FIELDS if name not in NESTED and not _same(one.get(name), other.get(name))]


def contradictions(
    mine: Mapping[str, Row], known: Sequence[Row], claims: Mapping[str, Claim], *, origin: str
) -> list[str]:
    """Where rows cannot be true beside those that are there.

    Results of one cell may differ between origins: to see whether they do is what they are collected for. What may not
    differ is the number of tokens they were measured on, the size of the student, and the held-out text, whose bytes a
    token are the ratio of two losses.
    """
    wrong = []
    for there in known:
        who, cell = there.get("origin"), str(there.get("cell"))
        row = mine.get(cell)
        if row is None:
            continue
        same = _differ(row, there) if who == origin else []
        same += [n for n in ("held_out_tokens", "stored_params") if not _same(row.get(n), there.get(n)) and not same]
        if same:
            wrong.append(f"{claims[cell].name}: {who} has another {', '.join(same)}")
    return wrong + _other_texts([*mine.values(), *known], claims, origin)


def _other_texts(rows: Iterable[Row], claims: Mapping[str, Claim], origin: str) -> list[str]:
    """Rows whose losses were measured on another text than those of the same grid: each text is said once."""
    first: dict[str, tuple[float, str]] = {}
    wrong: dict[str, str] = {}
    for row in rows:
        claim, bits, loss = claims.get(str(row.get("cell"))), row.get("student_bits_per_byte"), row.get("student_loss")
        if claim is None or not bits or not loss:
            continue
        size, who = loss / bits / math.log(2), row.get("origin") or origin
        text = f"{claim.text} {row.get('held_out_tokens')}"
        before, whose = first.setdefault(text, (size, who))
        if not _same(size, before, SAME_TEXT):
            said = f"{claim.name}: its held-out text has {size:.7g} bytes a token, that of {whose} {before:.7g}"
            wrong.setdefault(f"{text} {who}", f"{said}: not the same text")
    return list(wrong.values())


# Together


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
    known = []
    for table in sorted(folder.glob("*.csv")):
        held, said = read_rows(table)
        wrong += [f"{folder.name}/{what}" for what in said]
        known += list(held.values())
    if not wrong:
        wrong = contradictions(mine, known, claims, origin=origin)
    if wrong:
        raise UserError("\n".join([f"nothing was imported, for {len(wrong)} faults:", *_some(wrong)]))
    before = {str(row["cell"]): row for row in known if row.get("origin") == origin}
    both = before | {cell: {**row, "origin": origin} for cell, row in mine.items()}
    file = folder / f"{origin}.csv"
    write_rows([both[cell] for cell in sorted(both)], file)
    lacking = [claim.name for cell, claim in claims.items() if cell not in both]
    changed = sum((row.get("git_commit") or "+").endswith("+") for row in mine.values())
    return Received(file, len(mine), len(mine.keys() - before.keys()), lacking, changed)


def _some(wrong: Sequence[str]) -> list[str]:
    more = [f"  and {len(wrong) - SHOWN:,} more"] if len(wrong) > SHOWN else []
    return [*(f"  {what}" for what in wrong[:SHOWN]), *more]
