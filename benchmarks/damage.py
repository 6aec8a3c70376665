"""Claim: whatever file of a finished store is damaged, it is named, made again to the same bits, and never used unseen.

    python -m benchmarks.damage [--out results/damage.csv] [--only teacher]     about a quarter of an hour of one core

A tiny cell, and one that fails. Every kind of file that they leave is emptied, halved, changed in one byte or in a byte
of a key of its JSON, or deleted, one at a time. What has lost bytes must be noticed by the run that reads it: so the
stages that are made directly from the damaged one are removed, and the same command is given again. A changed byte must
be noticed by `store verify`, and be made again by the same command after `--repair`. Logs are not looked at: nothing
reads them but people. The exit status is 1 if a case does not end so.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir

from benchmarks.chaos import ROOT, tiny_corpus
from capacity_gap.cell import config
from capacity_gap.cell.config import RunConfig
from capacity_gap.commands import cli
from capacity_gap.runner import single
from capacity_gap.settings.errors import UserError
from capacity_gap.store import files
from capacity_gap.store.stage import Store

CELL = ["student=40k", "teacher=55k", "data=12k", "family.teacher_data=12k"]
FAILS = "train.learning_rate=1e9"
# What differs between two runs that gave the same result.
VOLATILE = ("wall_s", "created", "tokens_per_s", "mfu", "peak_memory_bytes", "checksum", "id", "resumed")
TIMED = (".json", ".jsonl")  # files of a stage that may hold such things: of them the list is compared by name alone
KEY = re.compile(rb'"[^"]*([a-z_])":')


@dataclass(frozen=True)
class Seen:
    """What was said and how it ended."""

    said: str
    crashed: bool


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x15
    file.write_bytes(content)


def flip_key(file: Path) -> None:
    """Changes the last letter of the key that is nearest to the middle."""
    content = bytearray(file.read_bytes())
    found = min(KEY.finditer(content), key=lambda match: abs(match.start() - len(content) // 2))
    content[found.start(1)] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "emptied": empty,
    "halved": halve,
    "one byte changed": flip,
    "one key changed": flip_key,
    "deleted": Path.unlink,
}


BY_HASH = ("one byte changed", "one key changed")


def applies(damage: str, file: Path) -> bool:
    """Only JSON has keys."""
    return damage != "one key changed" or (file.suffix == ".json" and KEY.search(file.read_bytes()) is not None)


def settings(store: Path, corpus: list[str], *more: str) -> RunConfig:
    """Of the cell."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.from_hydra(compose("config", overrides=[*corpus, *CELL, *more, f"store={store}"]))


def watched(do: Callable[[], Any]) -> Seen:
    """Does something, and returns what it printed."""
    files._named.clear()  # damaged files are named once a process; every case counts as one
    out, crashed = io.StringIO(), False
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            do()
        except UserError as error:
            print(f"error: {error}")
        except Exception:
            crashed = True
            traceback.print_exc(file=out)
    return Seen(out.getvalue(), crashed)


def run(store: Path, corpus: list[str]) -> Seen:
    """The same commands again: the cell, and the one that fails."""

    def both() -> None:
        single.run_alone(settings(store, corpus), CELL)
        with contextlib.suppress(UserError):
            single.run_alone(settings(store, corpus, FAILS), [*CELL, FAILS])

    return watched(both)


def kinds(store: Path) -> Iterator[Path]:
    """One file of each kind, relative to the store."""
    found: dict[tuple[str, ...], Path] = {}
    for file in sorted(p for p in store.rglob("*") if p.is_file()):
        parts = file.relative_to(store).parts
        if parts[0] not in ("logs", ".work", ".damaged") and not file.name.startswith("."):
            name = parts[-1] if (len(parts) > 1 and (file.parent / files.META).exists()) or len(parts) == 1 else "note"
            found.setdefault((parts[0], name), file.relative_to(store))
    yield from found.values()


def forget_readers(store: Path, damaged: Path) -> None:
    """Removes the stages that are made directly from the one that a file belongs to, and the records."""
    key = "/".join(damaged.parts[:2])
    for meta in files.stage_files(store):
        if meta.parent == store / key:
            continue
        if key in json.loads(meta.read_text())["inputs"].values() or meta.parent.parent.name == "record":
            shutil.rmtree(meta.parent)


def same(one: Path, two: Path) -> str:
    """How a file that was made again compares with what it was."""
    if not two.exists():
        return "not made again"
    if one.read_bytes() == two.read_bytes():
        return "the same bits"
    if one.suffix == ".json" and lasting(one) == lasting(two):
        return "the same but for timings and ids"
    return "different"


def lasting(file: Path) -> dict[str, Any]:
    """What a JSON file says beside timings and ids; of a noted cell the stages, without their expected seconds."""
    said = {k: v for k, v in json.loads(file.read_text()).items() if k not in VOLATILE}
    if isinstance(said.get("files"), dict):
        said["files"] = {n: None if n.endswith(TIMED) else known for n, known in said["files"].items()}
    if "cells" in said:
        said["cells"] = {k: {**cell, "stages": list(cell["stages"])} for k, cell in said["cells"].items()}
    return said


def case(whole: Path, file: Path, damage: str, scratch: Path, corpus: list[str]) -> dict[str, Any]:
    """Damages one file of a copy of the store, and reports the outcome."""
    store = scratch / "store"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(whole, store)
    is_stage = (whole / file).parent != whole and (whole / file.parts[0] / file.parts[1] / files.META).is_file()
    if is_stage:
        forget_readers(store, file)
    DAMAGES[damage](store / file)
    before = time.perf_counter()
    by_hash = damage in BY_HASH
    if by_hash:
        first = watched(lambda: cli.main(["store", "verify", str(store), "--repair"]))
    else:
        first = watched(lambda: cli.main(["status", str(store), "--failed"]))
    then = run(store, corpus)
    left = watched(lambda: cli.main(["store", "verify", str(store)]))
    named = str(file) in first.said + then.said
    return {
        "stage": file.parts[0] if len(file.parts) > 1 else "",
        "file": file.name if is_stage or len(file.parts) == 1 else "(note)",
        "damage": damage,
        "named by": ("verify" if by_hash else "reading") if named else "nobody: nothing is left of the note",
        "made again": same(whole / file, store / file),
        "traceback": first.crashed or then.crashed or "Traceback" in first.said + then.said,
        "sound afterwards": " 0 damaged" in left.said and Store(store).root.exists(),
        "seconds": round(time.perf_counter() - before, 1),
    }


def holds(row: dict[str, Any]) -> bool:
    """Whether a case ended as claimed. A deleted note cannot be named; it is written again."""
    named = not row["named by"].startswith("nobody") or (row["file"], row["damage"]) == ("(note)", "deleted")
    return named and row["made again"].startswith("the same") and row["sound afterwards"] and not row["traceback"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--only", default="", help="only files of this kind of stage")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config.register()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        corpus, whole = tiny_corpus(scratch), scratch / "whole"
        made = run(whole, corpus)
        assert not made.crashed, made.said
        for file in kinds(whole):
            if str(file).startswith(given.only):
                for damage in [d for d in DAMAGES if applies(d, whole / file)]:
                    rows.append(case(whole, file, damage, scratch, corpus))
                    print(*rows[-1].values(), sep=" | ", flush=True)
    table = pd.DataFrame(rows)
    print(table.groupby(["damage", "named by", "made again", "traceback", "sound afterwards"]).size().to_string())
    if given.out:
        table.to_csv(given.out, index=False)
    broken = [row for row in rows if not holds(row)]
    for row in broken:
        print("not as claimed:", *row.values(), sep=" | ", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
