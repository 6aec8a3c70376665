"""Files that are written whole or not at all, listed with size and hash, and read with their damage named.

A finished stage lists its files in its `stage.json`: `files: {name: {bytes, sha256}}`. Sizes are compared whenever the
stage is read, hashes by `store verify`. JSON files of the store that no list names carry a `checksum` of themselves,
which is compared whenever they are read.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from capacity_gap.settings.errors import Damaged, StageError

META = "stage.json"  # of a finished stage
RECORD = "record.json"  # the row of a finished cell, in the stage `record`
CHECKSUM = "checksum"
NUMBER = int | float
STATE = ("state.json", "state.safetensors")  # what a checkpoint of training holds
CRC = ".crc32"  # end of the name of what is written beside each file of a checkpoint
DIGEST = re.compile(r"[0-9a-f]{20}")  # the name of a stage's folder
STEP = re.compile(r"step-(\d+)")
# How libraries that know no errno say that the disk is full: safetensors and tokenizers (Rust), numpy, torch.
FULL = re.compile(
    r"os error (28|122)\b|No space left on device|Disk quota exceeded|Not enough free space"
    r"|requested and \d+ written|unexpected pos \d+ vs|iostream error"
)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all (a file beside, renamed); refuses NaN, which JSON cannot carry."""
    _replace(path, _json(value), durable=lambda file: None)


def write_text(path: Path, text: str) -> None:
    """Writes text whole or not at all: whoever reads meanwhile finds the file as it was."""
    _replace(path, lambda file: file.write(text), durable=lambda file: None)


def write_checked(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object with its checksum, and returns once it is on the disk."""
    _replace(path, _json(with_checksum(value)), durable=lambda file: os.fsync(file.fileno()))


def _json(value: Any) -> Callable[[TextIO], Any]:
    def write(file: TextIO) -> None:
        json.dump(value, file, indent=1, allow_nan=False, ensure_ascii=False)
        file.write("\n")

    return write


def _replace(path: Path, write: Callable[[TextIO], Any], *, durable: Callable[[TextIO], None]) -> None:
    # Not the process id: in containers every process is number 1.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            write(file)
            file.flush()
            durable(file)
        os.replace(beside, path)
    except BaseException:  # Ctrl-C too: nothing is left beside
        beside.unlink(missing_ok=True)
        raise


def checksum(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its own `checksum`."""
    rest = {k: v for k, v in value.items() if k != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with the checksum of the rest of it."""
    return {**value, CHECKSUM: checksum(value)}


def read_json(path: Path, needs: Iterable[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        needs: the keys that it must have; as a mapping, with the type of each value.

    Raises:
        Damaged: there is none, it is no JSON object, has not its checksum, or lacks something of `needs`.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(path, "is missing") from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are kinds of ValueError
        raise Damaged(path, "is no JSON" if path.stat().st_size else "is empty") from error
    if not isinstance(value, dict):
        raise Damaged(path, f"holds a {type(value).__name__} instead of a JSON object")
    if not has_its_checksum(value):
        raise Damaged(path, "does not match its checksum")
    types = needs if isinstance(needs, Mapping) else dict.fromkeys(needs, object)
    if lacking := [key for key in types if key not in value]:
        raise Damaged(path, f"lacks {', '.join(lacking)}")
    if wrong := [key for key, kind in types.items() if not isinstance(value[key], kind)]:
        raise Damaged(path, f"differs from what was written, in {', '.join(wrong)}")
    return value


def has_its_checksum(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is as it was written; True of one that was written without a checksum."""
    if CHECKSUM in value:
        return value[CHECKSUM] == checksum(value)
    # Where a byte of the word itself has changed, the rest still has the sum that stands under another key.
    sums = (key for key, v in value.items() if isinstance(v, str) and len(v) == 64)
    return not any(value[key] == checksum({k: v for k, v in value.items() if k != key}) for key in sums)


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns the errors of a reader that finds other keys or types than it expects into damage of the file.

    Raises:
        Damaged: instead of them.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(file, f"differs from what was written ({type(error).__name__}: {error})") from error


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, or was one before its marker was lost."""
    return (folder / "store.json").exists() or any(folder.glob(f"record/*/{META}"))


def stage_files(root: Path) -> list[Path]:
    """The `stage.json` of every finished stage of a store; what has no digest for its name is none of its stages."""
    return sorted(f for f in root.glob(f"[!.]*/*/{META}") if DIGEST.fullmatch(f.parent.name))


_named: set[Path] = set()  # what this process has told of already


def read_all(
    root: Path,
    files: Iterable[Path],
    needs: Iterable[str] | Mapping[str, Any] = (),
    *,
    check: Callable[[Path, dict[str, Any]], None] = lambda file, value: None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The JSON objects in many files of the store at `root`; the damaged ones are left out, and named in one line.

    Args:
        root: the store.
        files: which files.
        needs: see `read_json`.
        check: raises `Damaged` where more is wrong than `needs` tells.
    """
    found, left_out = read_sound(files, needs, check=check)
    name_left_out(root, left_out)
    yield from found


def read_sound(
    files: Iterable[Path],
    needs: Iterable[str] | Mapping[str, Any] = (),
    *,
    check: Callable[[Path, dict[str, Any]], None] = lambda file, value: None,
) -> tuple[list[tuple[Path, dict[str, Any]]], list[Damaged]]:
    """The JSON objects in many files, and the damage of those that cannot be read."""
    found, left_out = [], []
    for file in files:
        try:
            value = read_json(file, needs)
            with reading(file):
                check(file, value)
        except Damaged as error:
            if file.exists():  # else another process has just deleted it
                left_out.append(error)
        except OSError as error:
            left_out.append(unreadable(file, error))
        else:
            found.append((file, value))
    return found, left_out


def unreadable(file: Path, error: OSError) -> Damaged:
    """What a file is that is there and cannot be read, as on a bad sector."""
    return error if isinstance(error, Damaged) else Damaged(file, f"cannot be read ({error.strerror or error})")


def name_left_out(root: Path, found: Iterable[Damaged]) -> None:
    """Says in one line which damaged files are left out; each file once a process."""
    fresh = [d for d in found if d.file not in _named]
    if fresh:
        _named.update(d.file for d in fresh)
        said = ", ".join(f"{_below(root, d.file)} {d.why}" for d in fresh[:5])
        more = f" and {len(fresh) - 5} more" if len(fresh) > 5 else ""
        tell(
            f"left out as damaged: {said}{more}. `python -m capacity_gap store verify {root} --repair` repairs the "
            "store."
        )


def tell(line: str) -> None:
    """Writes a line to standard error."""
    print(f"note: {line}", file=sys.stderr, flush=True)


def _below(root: Path, file: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file below a folder, by its path there; `stage.json` is left out."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f != folder / META)
    return {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def crc32(file: Path) -> str:
    """The CRC-32 of a file's content: half the time of SHA-256, and any one changed byte changes it."""
    found = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found = zlib.crc32(part, found)
    return f"{found:08x}"


def note_crc(file: Path, final: str = "") -> None:
    """Writes the CRC-32 of a file beside it; `final` is the name that the file will get, if another one."""
    file.with_name((final or file.name) + CRC).write_text(crc32(file))


def check_sizes(folder: Path) -> None:
    """Compares a finished stage with the list in its `stage.json`; stages of older versions have none.

    Raises:
        Damaged: a file is missing, has another size, or the list itself cannot be read.
    """
    meta = read_json(folder / META)
    if "files" not in meta:
        _check_for_empty_files(folder)
        return
    with reading(folder / META):
        sizes = {folder / name: int(known["bytes"]) for name, known in meta["files"].items()}
    for file, size in sizes.items():
        try:
            there = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise Damaged(file, "is missing") from None
        if there != size:
            raise Damaged(file, f"has {there:,} of {size:,} bytes")


def _check_for_empty_files(folder: Path) -> None:
    for file in folder.iterdir():
        if file.suffix in (".json", ".safetensors") and file.stat().st_size == 0:
            raise Damaged(file, "is empty")


def sync(path: Path) -> None:
    """Returns once a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Syncs every file below a folder, and the folders."""
    for path in [*sorted(folder.rglob("*")), folder]:
        if path.is_file() or path.is_dir():
            sync(path)


def let_others_read(folder: Path) -> None:
    """Who may read the folder may read its files: safetensors are written for their owner alone, stores are shared."""
    allowed = folder.stat().st_mode & 0o444
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | allowed)


def checkpoints(folders: Iterable[Path]) -> list[Path]:
    """The checkpoints `step-<number>` in some folders, furthest first; whatever else lies there is none."""
    found = [(int(match[1]), p) for f in folders for p in _inside(f) if (match := STEP.fullmatch(p.name))]
    return [path for _, path in sorted(found, key=lambda known: (-known[0], known[1]))]


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # its owner has just removed it
        return []


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is as it was written; older ones are checked by their format."""
    files = [f for f in checkpoint.rglob("*") if f.is_file() and not f.name.startswith(".") and f.suffix != CRC]
    states = [f.name for f in files if f.name in STATE]
    return bool(files) and len(states) in (0, len(STATE)) and all(is_whole_file(f) for f in files)


def is_whole_file(file: Path) -> bool:
    """Whether a file can be read to its end, as far as its format tells, and has its CRC-32 if one was noted."""
    noted = file.with_name(file.name + CRC)
    try:
        if noted.exists() and noted.read_text() != crc32(file):
            return False
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix == ".safetensors":
            return file.stat().st_size == _tensors_end(file)
        return file.stat().st_size > 0
    except (Damaged, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return False


def _tensors_end(file: Path) -> int:
    """The size of a safetensors file by its own header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(min(length, file.stat().st_size)))
    tensors = [t for name, t in header.items() if name != "__metadata__"]
    if any(t.keys() != {"dtype", "shape", "data_offsets"} for t in tensors):
        raise ValueError(f"{file.name} has an invalid safetensors header")
    return 8 + length + max((t["data_offsets"][1] for t in tensors), default=0)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, means that the disk is full, in the wording of any library."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explaining_full_disk(root: Path, what: str) -> Iterator[None]:
    """Turns a full disk into one paragraph that names what could not be written, the place and the room left."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise disk_full(root, what) from error


def disk_full(root: Path, what: str) -> StageError:
    """The paragraph."""
    there = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(there).free
    return StageError(
        f"the disk is full: {what} could not be written below {root} ({free / 1e6:.1f} MB are free). "
        "Nothing in the store is damaged. Free some space (`python -m capacity_gap store du` shows usage) and run the "
        "same command again: it continues from its checkpoints."
    )
