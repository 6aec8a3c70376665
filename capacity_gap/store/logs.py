"""One log a job, in the store: what `status --failed` shows the end of."""

import contextlib
import faulthandler
import logging
import os
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path

from capacity_gap.settings.errors import UserError
from capacity_gap.store.stage import Store

FOLDER = "logs"


def log_file(store: Store, key: str) -> Path:
    """Where the log of the job that makes stage `key` is."""
    return store.root / FOLDER / f"{key.replace('/', '-')}.log"


class CourteousHandler(logging.StreamHandler):
    """A log is a courtesy: where it cannot be written, as on a full disk, its lines are lost and the work goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        """Says nothing."""


@contextlib.contextmanager
def logging_to(store: Store, key: str) -> Iterator[None]:
    """Sends log lines, warnings, a traceback and even a crash of the interpreter to the log of this job."""
    file = log_file(store, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = file.open("a", encoding="utf-8")
    handler = CourteousHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("capacity_gap")
    before = ours.level
    ours.setLevel(logging.INFO)
    root.addHandler(handler)
    faulthandler.enable(stream)
    try:
        ours.info("process %d on %s", os.getpid(), socket.gethostname())
        yield
    except UserError as error:
        ours.error("%s", error)
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            stream.write(traceback.format_exc())
            stream.flush()
        raise
    finally:
        faulthandler.disable()
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            stream.close()
        ours.setLevel(before)


def tail(store: Store, keys: list[str], lines: int = 12) -> tuple[Path, list[str]] | None:
    """The end of the youngest log among the jobs that make `keys`, or None."""
    files = [f for f in (log_file(store, key) for key in keys) if f.exists()]
    if not files:
        return None
    youngest = max(files, key=lambda f: f.stat().st_mtime)
    return youngest, youngest.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
