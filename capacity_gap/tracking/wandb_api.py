"""W&B's public API, and all that is asked of it: the records behind a project's runs; and uploading offline runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from capacity_gap.tracking.wandb_runs import UNSENT, ended, run_folders

AT_ONCE = 50  # runs given to one `wandb sync`


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
