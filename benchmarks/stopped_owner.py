"""A cell whose process is stopped inside one stage until another one took the stage over: a race of `store_races`.

    python -m benchmarks.stopped_owner --at KEY --moment start --role stops --go FILE --patience 3 OVERRIDE...

Runs `run.py` with these overrides, with a pause in the stage KEY: before its function (`start`) or between its function
and the rename into place (`end`). One that `stops` sends itself SIGSTOP, as a suspended machine would; one that `waits`
goes on beating until FILE is there; one that `runs` does not pause.
"""

import argparse
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos import ROOT, differences
from capacity_gap.store import lease, stage
from capacity_gap.store.files import listed, read_json, stage_files
from capacity_gap.store.stage import Store
from capacity_gap.store.verify import verify

MOMENTS = ("start", "end", "late")  # late: stopped at the end, and goes on when its successor has ended
TIMEOUT_S = 300


@dataclass(frozen=True)
class Race:
    """One owner that is stopped, one successor, and what both should come to."""

    whole: Store  # of a calm run
    overrides: list[str]
    key: str  # of the stage in which the owner is stopped
    moment: str
    patience: float  # seconds after which a lease that does not beat counts as dead
    scratch: Path

    @property
    def store(self) -> Store:
        """Where the race takes place."""
        return Store(self.scratch / "store")

    @property
    def go(self) -> Path:
        """The file that a waiting successor waits for."""
        return self.scratch / "go"

    def start(self, role: str) -> subprocess.Popen:
        """One of the two processes."""
        at = "start" if self.moment == "start" or role == "waits" else "end"
        given = [f"--at={self.key}", f"--moment={at}", f"--role={role}", f"--go={self.go}"]
        command = [sys.executable, "-m", "benchmarks.stopped_owner", *given, f"--patience={self.patience}"]
        return subprocess.Popen(
            [*command, *self.overrides, f"store={self.store.root}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def folders(self, process: subprocess.Popen) -> list[Path]:
        """Where a process works on the stage."""
        return list(self.store.place(self.key).glob(f"*-{process.pid}-*"))


def run(race: Race) -> dict[str, object]:
    """Runs the race; returns what was seen. Raises if something was lost, touched or different."""
    shutil.rmtree(race.scratch, ignore_errors=True)
    shutil.copytree(race.whole.root, race.store.root, ignore=shutil.ignore_patterns("logs"))
    forget(race.store, race.key)
    began = time.perf_counter()
    one = race.start("stops")
    until(lambda: psutil.Process(one.pid).status() == psutil.STATUS_STOPPED, one)
    two = race.start("runs" if race.moment == "late" else "waits")
    untouched = _late(race, one, two) if race.moment == "late" else _meanwhile(race, one, two)
    errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in (one, two)]
    assert (one.returncode, two.returncode, *errors) == (0, 0, "", ""), (race.key, one.returncode, errors)
    assert untouched, f"{race.key}: the successor's folder was changed"
    compare(race)
    return {"the stopped one": fate(race.store), "seconds": round(time.perf_counter() - began, 1)}


def _meanwhile(race: Race, one: subprocess.Popen, two: subprocess.Popen) -> bool:
    """The owner goes on while its successor is at work; returns whether the successor's folder stayed as it was."""
    until(lambda: bool(race.folders(two)) and _waits(race), two)
    (theirs,) = race.folders(two)
    before = listed(theirs)
    one.send_signal(signal.SIGCONT)
    until(
        lambda: not any((folder / "out").exists() for folder in race.folders(one)), one
    )  # checkpoints stay till the end
    untouched = theirs.is_dir() and listed(theirs) == before
    race.go.touch()
    return untouched


def _late(race: Race, one: subprocess.Popen, two: subprocess.Popen) -> bool:
    """The owner goes on when its successor has ended; returns whether the successor's result stayed as it was."""
    assert two.wait(timeout=TIMEOUT_S) == 0
    made = race.store.root / race.key
    before = listed(made)
    one.send_signal(signal.SIGCONT)
    one.wait(timeout=TIMEOUT_S)
    return listed(made) == before


def _waits(race: Race) -> bool:
    return race.go.with_suffix(".waits").exists()


def until(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until something holds; `process` may end meanwhile, but not badly."""
    end = time.monotonic() + TIMEOUT_S
    while not holds():
        assert not process.poll(), process.communicate()[1]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def forget(store: Store, key: str) -> None:
    """Removes a stage and whatever was made from it."""
    made_of = {f.parent: set(read_json(f)["inputs"].values()) for f in stage_files(store.root)}
    gone = [key]
    while gone:
        last = gone.pop()
        shutil.rmtree(store.root / last, ignore_errors=True)
        gone += [f"{f.parent.name}/{f.name}" for f, inputs in made_of.items() if last in inputs and f.exists()]


def compare(race: Race) -> None:
    """One whole result, equal to that of the calm run, and nothing left over."""
    assert not (different := differences(race.whole.root, race.store.root)), f"{race.key}: {different}"
    assert verify(race.store).is_sound
    assert list(race.store.work.iterdir()) == [], "work is left"
    assert not race.store.damaged.exists(), "something was set aside as damaged"


def fate(store: Store) -> str:
    """The log line on the owner that was stopped."""
    told = "".join(f.read_text() for f in store.root.glob("logs/*.log"))
    return "gave up" if "another process took over" in told else "finished, and one result stayed"


def pause(role: str, go: Path) -> None:
    """What a process does at the moment of its race."""
    if role == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif role == "waits":
        go.with_suffix(".waits").touch()
        while not go.exists():
            time.sleep(0.02)


def pausing(key: str, moment: str, pause: Callable[[], None]) -> None:
    """Puts a pause into one stage of this process: once its folder is made, or before its result is renamed."""
    adopt, publish = stage.adopt_checkpoint, stage.publish

    def adopt_then_pause(place: Path, checkpoint: Path) -> bool:
        found = adopt(place, checkpoint)
        if moment == "start" and place.name == key.replace("/", "-"):
            pause()
        return found

    def pause_then_publish(out: Path, final: Path) -> None:
        if moment == "end" and f"{final.parent.name}/{final.name}" == key:
            pause()
        publish(out, final)

    stage.adopt_checkpoint, stage.publish = adopt_then_pause, pause_then_publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", required=True)
    parser.add_argument("--moment", choices=("start", "end"), required=True)
    parser.add_argument("--role", choices=("stops", "waits", "runs"), required=True)
    parser.add_argument("--go", type=Path, required=True)
    parser.add_argument("--patience", type=float, default=lease.PATIENCE_S)
    given, overrides = parser.parse_known_args()
    lease.BEAT_S, lease.PATIENCE_S = given.patience / 8, given.patience  # the proportion of the defaults
    pausing(given.at, given.moment, lambda: pause(given.role, given.go))
    sys.argv = [str(ROOT / "run.py"), *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
