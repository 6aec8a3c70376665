"""User tables, also from spreadsheets: CSV and parquet, with an error for each cell that cannot be read.

Nothing is guessed: text in a column of numbers, or a word where true or false belongs, is named with column and row.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.settings.errors import ConfigError, UserError

if TYPE_CHECKING:
    import pandas as pd

IsNumber = Callable[[str, "pd.DataFrame"], bool]
AS_CSV = "Save it as `CSV UTF-8`, with commas between values and points in decimals"
PLAIN = "Write a plain number, such as 400000, 3.5 or 0.05, without units, thousands separators or %, or leave it empty"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which spreadsheets let a formula begin
MISSING = ("", "-", "–", "nan", "-nan", "na", "n/a", "<na>", "null", "none")


def no_formula(value: Any) -> Any:
    """A cell as it is written to a CSV file: text that a spreadsheet would take for a formula begins with `'`."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def as_given(text: str) -> str:
    """The text of a cell that `no_formula` wrote."""
    return text[1:] if text.startswith("'") and text[1:].startswith(FORMULA) else text


def write_csv(frame: "pd.DataFrame", file: Path, **options: Any) -> None:
    """Writes a table for spreadsheets, without its index; `options` are those of `DataFrame.to_csv`."""
    texts = [c for c in frame if frame[c].dtype == object or str(frame[c].dtype).startswith("str")]
    frame.assign(**{str(c): frame[c].map(no_formula) for c in texts}).to_csv(file, index=False, **options)


def boolean(value: Any) -> bool | None:
    """`true` or `false` in any case; None where there is nothing.

    Raises:
        ValueError: anything else, such as 1 or yes.
    """
    if (said := str(value).strip().lower()) in MISSING:
        return None
    if said not in ("true", "false"):
        raise ValueError(f"{str(value)!r} is neither true nor false. Allowed: true, false, in any case, or empty")
    return said == "true"


def booleans(values: "pd.Series") -> "pd.Series":
    """A column of `boolean`s.

    Raises:
        ConfigError: a cell is something else; the message names column and row.
    """
    found = values.astype(object)
    for at, (row, value) in enumerate(values.items()):
        try:
            found.iloc[at] = boolean(value)
        except ValueError as error:
            raise ConfigError(f"column {values.name}, row {row} (of the table's index): {error}.") from error
    return found.infer_objects()


def numbers(frame: "pd.DataFrame", columns: Iterable[str]) -> "pd.DataFrame":
    """The table with columns that hold numbers; what is empty or `nan` in them is missing.

    Raises:
        ConfigError: a cell holds text, which no row is left out for; the message names column and row.
    """
    import pandas as pd

    held = [c for c in dict.fromkeys(columns) if c in frame]
    for name in held:
        if (at := no_number(frame[name])) is not None:
            row, value = frame.index[at], frame[name].iloc[at]
            raise ConfigError(f"column {name}, row {row} (of the table's index): {_not_plain(name, value)}")
    return frame.assign(**{c: pd.to_numeric(frame[c], errors="coerce") for c in held})


def no_number(values: "pd.Series") -> int | None:
    """Position of the first cell that is there and is no number; None if there is none."""
    import pandas as pd

    kinds = pd.api.types
    if kinds.is_numeric_dtype(values) and not kinds.is_bool_dtype(values):
        return None
    text = values.astype(str).str.strip().str.lower()
    bad = pd.to_numeric(values, errors="coerce").isna() | text.isin(("true", "false"))
    bad &= values.notna() & ~text.isin(MISSING)
    return int(bad.to_numpy().argmax()) if bad.any() else None


def _not_plain(name: str, value: Any) -> str:
    if str(value).strip() == name:
        return "the column's name again. Delete the line that repeats the header."
    return f"{str(value)!r} is not a number. {PLAIN}."


def cells(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """A CSV as text: the names of its columns, and its rows with the lines of the file that they begin in.

    Raises:
        UserError: another encoding or separator, two columns of one name, rows longer or shorter than the header.
    """
    try:
        rows = list(_rows(_text(file)))
    except csv.Error as error:
        raise UserError(f"{file} is not a readable table: {error}. {AS_CSV}.") from error
    header = [name.strip() for name in rows[0][1]] if rows else []
    _check_header(file, header)
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(
                f"{file} is not a readable table: Expected {len(header)} fields, as in its header, saw {len(row)} "
                f"in line {line}. Write one value a column; decimals take a point, since a comma separates values."
            )
    return header, rows[1:]


def _text(file: Path) -> str:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        why = "it is UTF-16 instead of UTF-8" if utf16 else f"not UTF-8 text ({error.reason} at byte {error.start})"
        raise UserError(f"{file} is not a readable table: {why}. {AS_CSV}.") from error
    if "\0" in text:
        raise UserError(f"{file} is not a readable table: it contains NUL bytes, like UTF-16. {AS_CSV}.")
    return text


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line that it begins in."""
    reader, line = csv.reader(io.StringIO(text, newline="")), 1
    for row in reader:
        if len(row) > 1 or "".join(row).strip():
            yield line, row
        line = reader.line_num + 1


def _check_header(file: Path, header: Sequence[str]) -> None:
    if not any(header):
        raise UserError(f"{file} is not a readable table: it has no header. {AS_CSV}.")
    joined = "".join(header)
    for mark, named in ((";", "semicolons"), ("\t", "tabs")):
        if joined.count(mark) >= len(header):
            raise UserError(f"{file} has {named} between values instead of commas. {AS_CSV}.")
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise UserError(f"{file} has more than one column {', '.join(twice)}. Rename or delete all but one.")


def read_csv(file: Path, *, is_flag: Callable[[str], bool], is_number: IsNumber) -> "pd.DataFrame":
    """A CSV whose flags are booleans and whose numbers are numbers.

    Raises:
        UserError: as `cells` does, or a cell holds something else than its column should.
    """
    import pandas as pd

    header, rows = cells(file)
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    kinds = {name: str for name in names if is_flag(name)}
    try:
        found = pd.read_csv(io.StringIO(_text(file)), header=0, names=names, dtype=kinds)
    except pd.errors.ParserError as error:
        raise UserError(f"{file} is not a readable table: {str(error).strip()}. {AS_CSV}.") from error
    return _checked(found, str(file), [f"line {line}" for line, _ in rows], is_flag, is_number)


def read_parquet(file: Path, *, is_flag: Callable[[str], bool], is_number: IsNumber) -> "pd.DataFrame":
    """The same of a parquet file. Raises `UserError` where it is none, or as `read_csv` does."""
    import pandas as pd

    try:
        found = pd.read_parquet(file)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{file} is not a readable parquet file: {' '.join(str(error).split())} Write it again, or pass a .csv."
        ) from error
    return _checked(found, str(file), [f"row {i}" for i in found.index], is_flag, is_number)


def _checked(
    frame: "pd.DataFrame", file: str, places: Sequence[str], is_flag: Callable[[str], bool], is_number: IsNumber
) -> "pd.DataFrame":
    """The table with numbers and booleans in the columns that hold these; `places` [rows] name the rows in messages."""
    import pandas as pd

    for name in [c for c in map(str, frame.columns) if is_flag(c)]:
        for place, value in zip(places, frame[name], strict=True):
            try:
                boolean(value)
            except ValueError as error:
                raise UserError(f"{file}, {place}, column {name}: {error}.") from error
        frame[name] = booleans(frame[name])
    for name in [c for c in map(str, frame.columns) if is_number(c, frame)]:
        if (at := no_number(frame[name])) is not None:
            raise UserError(f"{file}, {places[at]}, column {name}: {_not_plain(name, frame[name].iloc[at])}")
        if not pd.api.types.is_numeric_dtype(frame[name]) and frame[name].notna().any():
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame
