"""Claim: within 30 s of a signal any launcher's grid ends with checkpoints and no lease, and reruns repeat no step.

    python -m benchmarks.stop_signals [--only ray] [--out results/stop_signals.csv]     about half an hour on two cores

SIGTERM, SIGINT and SIGHUP to the grid's process, under each launcher, while its cells are being distilled; no
checkpoint is due but for the signal. `seconds` ends when no process below the grid is left, and no job in Slurm's
queue. Then the same command is given again, and must come to the same bits as a grid in peace. `steps computed twice`
compares where the rerun began with the progress file, which is written once a second. Slurm is a small one that is
started XX
end as claimed.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from benchmarks.chaos import ROOT, differences, tiny_corpus
from benchmarks.stopped_owner import forget
from capacity_gap.store.files import read_json, stage_files
from capacity_gap.store.stage import Store
from tests import slurm

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
CELLS = ["student=40k", "teacher=55k", "seed=0,1", "data=100k", "epochs=8", "train.checkpoint_minutes=60"]
TIMEOUT_S = 400
LIMIT_S = 30


@dataclass(frozen=True)
class Launcher:
    """How a grid of two cells is started, and how many of them it works on at once."""

    name: str
    overrides: list[str]
    at_once: int = 2
    environment: Mapping[str, str] | None = None
    cluster: slurm.Slurm | None = None

    def start(self, store: Path, corpus: list[str]) -> subprocess.Popen:
        """The grid, in a session of its own."""
        command = [sys.executable, str(ROOT / "run.py"), "-m", *corpus, *CELLS, *self.overrides, f"store={store}"]
        with store.with_suffix(".log").open("a") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=self.environment, start_new_session=True)

    @property
    def jobs(self) -> list[str]:
        """The jobs that the cluster still lists."""
        return self.cluster.run("squeue", "-h", "-o", "%i").split() if self.cluster else []


@contextlib.contextmanager
def launchers(place: Path, only: str) -> Iterator[list[Launcher]]:
    """Those that are installed."""
    found = [
        Launcher("basic", [], at_once=1),
        Launcher("joblib", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
    ]
    if importlib.util.find_spec("ray"):
        found.append(Launcher("ray", ["hydra/launcher=ray"]))
    with contextlib.ExitStack() as stack:
        if slurm.installed() and only in ("", "slurm"):
            (place / "slurm").mkdir()
            cluster = stack.enter_context(slurm.Slurm(place / "slurm"))
            given = ["hydra/launcher=slurm", "hydra.launcher.partition=debug", "hydra.launcher.poll_s=0.5"]
            found.append(Launcher("slurm", given, environment=cluster.environment, cluster=cluster))
        yield [launcher for launcher in found if only in ("", launcher.name)]


def at_work(store: Path) -> dict[str, int]:
    """The cells that are being distilled, with the step that each says it has done."""
    found = {}
    for file in store.glob(".work/distil-*/*/progress.json"):
        with contextlib.suppress(OSError):
            found[file.parent.parent.name] = int(read_json(file, ["done"])["done"])
    return found


def wait_for_work(grid: subprocess.Popen, store: Path, cells: int) -> None:
    """Returns when so many cells are a few steps into their training."""
    end = time.monotonic() + TIMEOUT_S
    while sum(done > 1 for done in at_work(store).values()) < cells:
        assert grid.poll() is None and time.monotonic() < end, store.with_suffix(".log").read_text()
        time.sleep(0.05)


def stop(launcher: Launcher, grid: subprocess.Popen, number: int) -> tuple[float, int]:
    """Sends the signal; returns the seconds until everything has ended, and the grid's exit status."""
    below, sent = psutil.Process(grid.pid).children(recursive=True), time.monotonic()
    grid.send_signal(number)
    status = grid.wait(TIMEOUT_S)
    _, alive = psutil.wait_procs(below, timeout=TIMEOUT_S)
    assert not alive
    while launcher.jobs:
        time.sleep(0.1)
    return time.monotonic() - sent, status


def case(launcher: Launcher, number: signal.Signals, calm: Path, store: Path, corpus: list[str]) -> dict[str, Any]:
    """One signal to one launcher, and the rerun."""
    untrained(calm, store)
    grid = launcher.start(store, corpus)
    wait_for_work(grid, store, launcher.at_once)
    seconds, status = stop(launcher, grid, number)
    left = {
        "checkpoints": len(list(store.glob(".work/distil-*/*/checkpoint/step-*"))),
        "leases": len(list(store.glob(".work/*/lease.json"))),
        "failed": len(list(store.glob("failed/*"))),
    }
    reached = at_work(store)
    assert launcher.start(store, corpus).wait(TIMEOUT_S) == 0, store.with_suffix(".log").read_text()
    again = sum(max(0, done - began(store, stage)) for stage, done in reached.items())
    head = {"launcher": launcher.name, "signal": number.name, "cells at work": launcher.at_once}
    tail = {
        "steps computed twice": again,
        "steps kept": kept(store, reached),
        "identical": not differences(calm, store),
    }
    return {**head, "seconds": round(seconds, 1), "exit status": status, **left, **tail}


def untrained(calm: Path, store: Path) -> None:
    """A copy of the calm store in which the students are still to be trained."""
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(calm, store)
    for file in stage_files(store):
        if file.parent.parent.name == "distil" and file.exists():
            forget(Store(store), f"distil/{file.parent.name}")


def began(store: Path, stage: str) -> int:
    """The step after which the last process at a training stage began, from the tokens that it saw."""
    folder = store / stage.replace("-", "/", 1)
    done, config = (json.loads((folder / name).read_text()) for name in ("result.json", "stage.json"))
    settings = config["config"]
    return done["steps"] - math.ceil(done["tokens"] / settings["optim"]["batch_size"] / settings["sequence_length"])


def kept(store: Path, reached: Mapping[str, int]) -> int:
    """The steps that the rerun did not compute."""
    return sum(began(store, stage) for stage in reached)


def holds(row: Mapping[str, Any]) -> bool:
    """Whether one signal ended a grid as claimed."""
    return (
        row["seconds"] <= LIMIT_S
        and row["exit status"] == 128 + signal.Signals[row["signal"]]
        and row["checkpoints"] == row["cells at work"]
        and row["identical"]
        and not (row["leases"] or row["failed"] or row["steps computed twice"])
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--only", default="", choices=("basic", "joblib", "ray", "slurm"), help="one launcher")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # grids that inherit `nohup` would pass hang-ups over
    rows = []
    with tempfile.TemporaryDirectory() as folder, launchers(Path(folder), given.only) as found:
        corpus, calm = tiny_corpus(Path(folder)), Path(folder) / "calm"
        in_peace = Launcher("joblib", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])
        assert in_peace.start(calm, corpus).wait() == 0, calm.with_suffix(".log").read_text()
        for launcher in found:
            for number in SIGNALS:
                store = Path(folder) / f"{launcher.name}-{number.name}"
                rows.append(case(launcher, number, calm, store, corpus))
                print(*rows[-1].values(), sep=" | ", flush=True)
    if given.out:
        pd.DataFrame(rows).to_csv(given.out, index=False)
    broken = [row for row in rows if not holds(row)]
    for row in broken:
        print("not as claimed:", *row.values(), sep=" | ", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
