"""Jobs that a cluster launcher hands out: settings and outcomes are JSON files in the store, workers are processes.

`<store>/jobs/<id>/<n>.json` holds the settings of job n, `<n>.out.json` its outcome. A worker runs some jobs of one
folder in turn: `python -m capacity_gap.runner.worker FOLDER 0 3 6`. It never waits for a stage that another process is
at: it reports the job as busy, and the grid, which costs nothing, waits instead.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from capacity_gap.settings.errors import Busy, Damaged, Stopped, UserError
from capacity_gap.store.files import read_json, write_json
from capacity_gap.store.stage import Store

if TYPE_CHECKING:
    from capacity_gap.cell.config import RunConfig

POLL_S = 0.2
STOPPED = (129, 130, 143)  # exit statuses of a worker that was asked to end
KINDS: dict[str, type[Exception]] = {
    "user": UserError,
    "busy": Busy,
    "crash": RuntimeError,
    "died": RuntimeError,
    "stopped": Stopped,
}


@dataclass(frozen=True)
class Jobs:
    """One hand-out: a folder of settings, to which outcomes are added."""

    folder: Path
    count: int

    @classmethod
    def hand_out(cls, store: Store, settings: Sequence[Mapping[str, Any]]) -> "Jobs":
        """Writes the settings of all jobs into a new folder of the store."""
        folder = store.root / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        folder.mkdir(parents=True)
        for n, given in enumerate(settings):
            write_json(folder / f"{n}.json", given)
        return cls(folder, len(settings))

    @classmethod
    def handed_out_in(cls, folder: Path) -> "Jobs":
        """The hand-out of a folder."""
        return cls(folder, sum(file.stem.isdigit() for file in folder.glob("*.json")))

    def outcome(self, n: int) -> dict[str, str] | None:
        """What became of job n, or None while that is open."""
        try:
            return read_json(self.folder / f"{n}.out.json", {"kind": str, "message": str})
        except Damaged:
            return None

    def note(self, n: int, kind: str, message: str) -> None:
        """Writes down what became of job n."""
        write_json(self.folder / f"{n}.out.json", {"kind": kind, "message": message})

    def open(self, among: Iterable[int] | None = None) -> list[int]:
        """The jobs without an outcome."""
        return [n for n in (range(self.count) if among is None else among) if self.outcome(n) is None]

    def returns(self) -> list[SimpleNamespace]:
        """The outcomes as Hydra's launchers return them: an exception where a job failed."""
        return [SimpleNamespace(_return_value=self._value(n)) for n in range(self.count)]

    def _value(self, n: int) -> Any:
        found = self.outcome(n)
        if found is None:
            return None  # the grid asks the store, and takes it for dead if it holds nothing
        return KINDS[found["kind"]](found["message"]) if found["kind"] in KINDS else found["message"]


def handed_out(config: "RunConfig") -> dict[str, Any]:
    """The settings of a job, with its store's own path: a worker may have another working directory."""
    return {**asdict(config), "store": str(config.store_path)}


def run_job(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Computes one job in this process; returns (kind, message)."""
    from capacity_gap.cell import config
    from capacity_gap.runner.run_cell import run_config

    try:
        return "done", run_config(config.from_dict(settings), waits=False)
    except Busy as error:
        return "busy", str(error)
    except UserError as error:
        return "user", str(error)
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"


def run_task(settings: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> tuple[str, str]:
    """`run_job` for a pool that takes only ordinary returns and exceptions: being asked to end is an outcome too.

    `variables`: of the environment of the grid, by which a worker on another machine finds the user's modules.
    """
    from capacity_gap.runtime.process import Interrupted

    os.environ.update(variables or {})
    sys.path += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    try:
        return run_job(settings)
    except Interrupted:
        return "stopped", "stopped by a signal"


def run_children(
    jobs: Jobs, mine: Sequence[int], *, at_once: int = 1, launcher: Sequence[str] = (), notes: bool = True
) -> None:
    """Runs jobs in `at_once` child processes; one that dies costs the job that it was at, and no other.

    Args:
        jobs: the hand-out.
        mine: which of its jobs.
        at_once: how many child processes.
        launcher: goes before the worker's command: `torchrun …` for cells on several devices.
        notes: whether deaths are written down here; of several nodes at one cell only the first does.
    """
    children: dict[int, subprocess.Popen] = {}
    left = {slot: list(mine[slot::at_once]) for slot in range(at_once)}
    environment = {**os.environ, "CAPACITY_GAP_PARENT": str(os.getpid())}
    while True:
        for slot, numbers in left.items():
            if slot in children and children[slot].poll() is None:
                continue
            still = jobs.open(numbers)
            if slot in children and not notes:
                left[slot] = []
                continue
            if slot in children and children[slot].returncode in STOPPED:
                left[slot] = []  # the request to stop holds for all jobs
                continue
            if slot in children and still:
                status = children.pop(slot).returncode
                jobs.note(still[0], "died", f"its process died (exit status {status})")
                still = still[1:]
            left[slot] = still
            if still:
                python = [] if launcher else [sys.executable]
                command = [*launcher, *python, "-m", __name__, str(jobs.folder), *map(str, still)]
                children[slot] = subprocess.Popen(command, env=environment)
        if not any(left.values()):
            return
        time.sleep(POLL_S)


def main(arguments: Sequence[str]) -> int:
    """Runs the named jobs of a folder in turn."""
    from capacity_gap.runtime.process import Interrupted

    folder = Path(arguments[0])
    jobs = Jobs.handed_out_in(folder)
    for n in map(int, arguments[1:]):
        try:
            kind, message = run_job(json.loads((folder / f"{n}.json").read_text()))
        except Interrupted as error:
            return error.exit_status  # asked to stop: no outcome, the grid decides what follows
        if os.environ.get("RANK", "0") == "0":
            jobs.note(n, kind, message)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
