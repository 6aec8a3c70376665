"""W&B's public API, and all that is asked of it: the records behind a project's runs; and uploading offline runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from capacity_gap.errors import UserError
from capacity_gap.records import Record
from capacity_gap.tracking import UNSENT, ended, run_folders

PREFIX = "wandb:"
TIMEOUT_S = 30
AT_ONCE = 50  # runs given to one `wandb sync`


def connect() -> Any:
    """W&B's API, with the key that is in its own places; never asks for one.

    Raises:
        UserError: there is no key, or no answer.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        if wandb.login(prompt=False, timeout=TIMEOUT_S):
            return wandb.Api(timeout=TIMEOUT_S)
    except wandb.errors.Error as error:
        raise UserError(f"W&B cannot be reached: {error}") from error
    raise UserError("W&B needs an API key: `wandb login` stores one, or set WANDB_API_KEY.")


def load_rows(source: str) -> list[dict[str, Any]]:
    """The records of all cells mirrored to `wandb:entity/project`, as their runs' summaries hold them.

    Raises:
        UserError: there is no such project, or nothing of ours in it.
    """
    path = source.removeprefix(PREFIX)
    if path.count("/") != 1 or not all(path.split("/")):
        raise UserError(f"{source} names no project. Write wandb:entity/project.")
    api = connect()
    try:
        runs = api.runs(path, filters={"jobType": "cell"}, order="+created_at", per_page=200, lazy=False)
        found = [(run.id, _row(run)) for run in runs]
    except Exception as error:  # the client raises what its transport raises
        raise UserError(f"{source} cannot be read: {error}") from error
    foreign = [f"{name} ({row})" for name, row in found if isinstance(row, str)]
    if foreign:
        print(f"note: no records of ours, left out: {_some(foreign)}.", file=sys.stderr)
    rows = [row for _, row in found if isinstance(row, dict)]
    if not rows:
        raise UserError(
            f"{source} holds no cells. `tracking=online`, or `python -m capacity_gap sync`, puts them there."
        )
    return rows


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _row(run: Any) -> dict[str, Any] | str | None:
    """The record in one run's summary; None while its cell is neither done nor failed; what is wrong with it, if
    somebody else made the run.
    """
    found = dict(run.summary)
    if found.get("status") not in ("done", "failed"):
        return None
    kinds = {f.name: str(f.type) for f in dataclasses.fields(Record)}
    try:
        kept = {k: _typed(json.loads(json.dumps(v, default=dict)), kinds[k]) for k, v in found.items() if k in kinds}
        return Record(**kept).to_dict()
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("Record.__init__() ")


def _typed(value: Any, kind: str) -> Any:
    """A value of the summary as the record has it: on its way 1.0 has become 1."""
    if value is None or kind.startswith("str"):
        return value
    if kind.startswith("float"):
        return float(value)
    if not kind.startswith("dict"):
        return value
    if "Any" in kind and not all(isinstance(score, dict) and "value" in score for score in dict(value).values()):
        raise ValueError("a score without a value")
    return dict(value)


def sync(folder: Path, *, limit_s: float, entity: str | None = None, project: str | None = None) -> tuple[int, int]:
    """Uploads the runs that have ended offline below `folder` by `wandb sync`; returns how many of them went, and how
    many are left.

    Args:
        folder: the `wandb` folder of a store.
        limit_s: after so many seconds the rest is left for another time.
        entity: another than the runs were made for.
        project: another than the runs were made for.
    """
    waiting = ended(run_folders(folder))
    end = time.monotonic() + limit_s
    for i in range(0, len(waiting), AT_ONCE):
        part = [str(p) for p in waiting[i : i + AT_ONCE]]
        given = [*(["--entity", entity] if entity else []), *(["--project", project] if project else [])]
        code = "import sys; from wandb.cli.cli import cli; sys.exit(cli())"
        command = [sys.executable, "-c", code, "sync", "--yes", "--include-online", *given, *part]
        if not _within(command, end - time.monotonic()):
            break
    for sent in (p for p in waiting if list(p.glob("*.synced"))):
        (sent / UNSENT).unlink(missing_ok=True)
    left = len(set(waiting) & set(run_folders(folder)))
    return len(waiting) - left, left


def _within(command: list[str], seconds: float) -> bool:
    """Runs a command, with all that it starts, for so long at most; returns whether it ended well."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=max(0.0, seconds)) == 0
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(error, KeyboardInterrupt):
            raise
        return False
