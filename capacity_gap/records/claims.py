"""Records that somebody else made: the file they are sent in, and what is checked in each row by itself.

A row is text until it is read here: numbers and words in columns that a record has. Nothing in it is run or unpickled.
What the settings of a cell decide (`Claim.columns`) is known here too and must agree; what was measured must be
possible. What is checked between rows is in `receive.py`.
"""

import csv
import datetime
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.records.record import NESTED, SCHEMA_VERSION, columns
from capacity_gap.records.tables import as_given, boolean, cells, write_csv
from capacity_gap.settings.errors import UserError, shown

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

NOT_EXPORTED = ("error", "origin")
EXPORTED = tuple(name for name in columns() if name not in (*NESTED, *NOT_EXPORTED))
NESTED_COLUMN = re.compile(r"(?:(?:teacher_)?metrics|version)/[\w.\-]+(?:/[\w.\-]+)*")
ORIGIN = re.compile(r"[a-z0-9][a-z0-9_\-]{0,39}")
COMMIT = re.compile(r"[0-9a-f]{7,64}\+?")
MOST_CHARACTERS = 2000  # of a cell
SAME = 1e-9  # relative: what is computed twice from the same settings
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
ALWAYS_MEASURED = (
    *("student_loss", "teacher_loss", "init_loss", "teacher_entropy", "held_out_tokens", "stored_params", "device"),
)
PROVENANCE = ("device", "git_commit", "created")  # text that no setting decides
IDENTITY = ("schema_version", "cell", "status", "registration", "trained")  # compared with the claim one by one
REQUIRED = (*IDENTITY, *ALWAYS_MEASURED, "created")  # columns; others may be absent where a cell has their default
SHARE = re.compile(r"acc|exact_match|pass@|mmlu|ceval|humaneval|bbh|gsm8k|pico_(cloze|next)")  # scores from 0 to 1


@dataclass(frozen=True)
class Claim:
    """What a record of one cell must say.

    `columns`: what its settings come to. `trained`: digest of the trained student. `held_out`: names the text that
    losses are measured on, `teacher` the teacher that is measured on it. `stored_params`: None where training decides
    it. `vocabulary`: rows of the teacher's output matrix. `registration`: hash of the preregistration file.
    """

    columns: Mapping[str, Any]
    trained: str
    held_out: str
    teacher: str
    stored_params: int | None
    vocabulary: int
    registration: str | None
    name: str


# Writing


def sent(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The finished cells as they are sent: every column of a record, in order of cells."""
    done = frame[frame["status"] == "done"].sort_values("cell")
    spread = sorted(c for c in map(str, done) if NESTED_COLUMN.fullmatch(c) and done[c].notna().any())
    return done.reindex(columns=[*EXPORTED, *spread])


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
    """The rows of a sent file by path and line, and what is wrong with columns and single values."""
    try:
        header, lines = cells(file)
    except UserError as error:
        return {}, [str(error)]
    missing = [name for name in REQUIRED if name not in header]
    unknown = [name for name in header if name not in (*EXPORTED, *NOT_EXPORTED) and not NESTED_COLUMN.fullmatch(name)]
    wrong = [f"{file} lacks the columns {', '.join(missing)}"] if missing else []
    wrong += [f"{file} has unknown columns: {', '.join(map(shown, unknown))}"] if unknown else []
    found: dict[str, Row] = {}
    for line, texts in lines:
        place = f"{file}, line {line}"
        found[place], said = _read_row(dict(zip(header, texts, strict=True)))
        wrong += [f"{place}, {what}" for what in said]
    return found, wrong + ([] if found else [f"{file} has no rows"])


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
        if len(text) > MOST_CHARACTERS or not text.isprintable():
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
            found.append(
                f"{place}: {shown(row.get('cell'))} is no cell of this grid as this checkout composes it: other "
                "settings, or another version of the code"
            )
            continue
        said = (*_unlike(row, claim), *_impossible(row, claim), *_impossible_scores(row), *_provenance(row, origin))
        found += [f"{place}, {what}" for what in said]
    return found


def _unlike(row: Row, claim: Claim) -> Iterator[str]:
    """Where a row differs from what its own digest stands for."""
    other = {*NESTED, *NOT_EXPORTED, *MEASURED, *PROVENANCE, *IDENTITY}
    own = {"schema_version": SCHEMA_VERSION, "status": "done", "trained": claim.trained}
    expected = own | {name: claim.columns.get(name) for name in columns() if name not in other}
    for name, value in expected.items():
        if name not in row:  # of a file from before the column was added, which has its default
            if name not in REQUIRED and value is not None and value != columns()[name].default:
                yield f"{name}: there is no such column, where {claim.name} has {shown(value)}"
        elif not same(row[name], value):
            yield f"{name}: {shown(row[name])}, where {claim.name} has {shown(value)}"
    if row.get("registration") != claim.registration:
        said = "none" if row.get("registration") is None else shown(row["registration"], 16)
        yield f"registration: {said}, where the page of this grid has {shown(claim.registration, 16)}"


def same(one: Any, other: Any, within: float = SAME) -> bool:
    """Whether two values agree: numbers within a relative difference, all else exactly."""
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=within, abs_tol=0) if numbers else one == other


def _impossible(row: Row, claim: Claim) -> Iterator[str]:
    for name, (least, most) in MEASURED.items():
        value = row.get(name)
        if value is not None and not least <= value <= most:
            yield f"{name}: {value} is impossible; it is from {least:g} to {most:g}"
    for name in ALWAYS_MEASURED:
        if name in row and row[name] in (None, 0):
            yield f"{name}: a finished cell has one"
    stored, size = row.get("stored_params"), claim.columns["student_params"]
    if stored and (stored < size if claim.stored_params is None else stored != claim.stored_params):
        yield f"stored_params: {stored}, where the shape of {claim.name} has {size}"
    error, loss = row.get("student_loss_stderr"), row.get("student_loss")
    if error is not None and loss and loss > 0 and not 0 < error < loss:
        yield f"student_loss_stderr: {error} is impossible; it is above zero and below the loss, {loss}"
    entropy, most = row.get("teacher_entropy"), math.log(claim.vocabulary)
    if entropy is not None and entropy > most * (1 + SAME):
        yield f"teacher_entropy: {entropy} is impossible; {claim.vocabulary:,} tokens have at most {most:.4g} nats"


def _impossible_scores(row: Row) -> Iterator[str]:
    """Benchmark scores out of bounds. What has no upper bound, such as a perplexity, is from 0 or not bounded."""
    for name, value in row.items():
        if value is None or not name.startswith(("metrics/", "teacher_metrics/")):
            continue
        score, _, last = name.rpartition("/")
        if last in ("shots", "higher_is_better"):
            continue
        score = score if last == "stderr" else name
        share = SHARE.search(score.rpartition("/")[2]) and row.get(f"{score}/higher_is_better") is not False
        if share and not 0 <= value <= 1:
            yield f"{name}: {value} is impossible; it is from 0 to 1"
        elif last == "stderr" and value < 0:
            yield f"{name}: {value} is impossible; it is 0 or more"


def _provenance(row: Row, origin: str) -> Iterator[str]:
    """Where text that no setting decides is not what the program writes."""
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
