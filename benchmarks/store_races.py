"""Claim: a store loses nothing to gc beside a grid, to cells noted at once, or to owners that were stopped.

    python -m benchmarks.store_races [--only gc] [--out results/store_races.csv]     about half an hour on two cores

`gc`: `store gc --yes` again and again beside a joblib grid with cached signals, ten grids; each must end with exit
status 0 and the results of one without gc. `notes`: twenty processes note a single cell each at the same moment, in
fifty stores, and once twenty whole cells are run at once; all must be noted. `stopped`: the owner of a stage is stopped
(SIGSTOP) until a successor has its lease, then goes on (SIGCONT), for every kind of stage: before its work, before its
rename, and when the successor has ended (`benchmarks/stopped_owner.py`). Both must end with exit status 0, no word on
stderr, and the results of a calm run. Leases are shortened for that, but for one race with the forty seconds that
users have. Tuning is left out where TRL is not installed.
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from hydra import compose, initialize_config_dir

from benchmarks import stopped_owner
from benchmarks.chaos import ROOT, differences, tiny_corpus
from benchmarks.stopped_owner import MOMENTS, Race
from capacity_gap import records
from capacity_gap.cell import config
from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.pipeline import resolve
from capacity_gap.commands import cli
from capacity_gap.runner import run_cell, single
from capacity_gap.store import lease
from capacity_gap.store.contents import note_sweep, sweeps
from capacity_gap.store.stage import Store, closure

GRIDS = 10
CELLS = ["student=40k", "teacher=55k", "seed=0,1", "distill.signal=sampled,topk", "data=12k", "family.teacher_data=12k"]
STORES = 50
PROCESSES = 20
CELL = ["student=40k", "teacher=55k", "data=12k", "family.teacher_data=12k", "distill.signal=sampled"]
GREEK = str.maketrans("abcdefghiklmnoprstuxyz", "αβκδεφγηικλμνοπρστυξψζ")
TUNED = ["instruct.count=40", "instruct.held_out=12", "prefer.count=16", "instruct.batch_size=8", "prefer.batch_size=8"]
PATIENCE_S = 4.0
LINE = re.compile(r" MB  (\S+)  \((?!not deleted)")  # of `store gc`: what was deleted


def run_py(*arguments: str, log: Path) -> subprocess.Popen:
    """`run.py` in the background."""
    with log.open("a") as out:
        return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *arguments], stdout=out, stderr=out)


def settings(*overrides: str) -> RunConfig:
    """Of one cell."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.from_hydra(compose("config", overrides=list(overrides)))


# gc beside a grid


def gc_races(place: Path, corpus: list[str]) -> Iterator[dict[str, Any]]:
    """Ten grids beside which `store gc --yes` runs, against one in peace."""
    calm = place / "calm"
    assert grid(calm, corpus, place).wait() == 0, (place / "calm.log").read_text()
    for number in range(1, GRIDS + 1):
        store, before = place / f"grid-{number}", time.perf_counter()
        rounds, taken = collect_beside(grid(store, corpus, place), store)
        assert not (different := differences(calm, store)), f"grid {number}: {different}"
        told = f"{rounds} rounds of gc took " + (", ".join(f"{n} {k}" for k, n in sorted(taken.items())) or "nothing")
        yield row("gc", f"grid {number}", 1, before, told)


def grid(store: Path, corpus: list[str], place: Path) -> subprocess.Popen:
    """The grid, without retries, on two workers."""
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "train.checkpoint_minutes=0.005"]
    return run_py("-m", *corpus, *CELLS, *launcher, f"store={store}", log=place / f"{store.name}.log")


def collect_beside(process: subprocess.Popen, store: Path) -> tuple[int, Counter]:
    """Collects as long as the grid runs; returns rounds, and what was deleted by kind."""
    rounds, taken = 0, Counter[str]()
    while process.poll() is None:
        if (store / "store.json").exists():
            taken += collect(store)
            rounds += 1
        time.sleep(0.1)
    assert process.returncode == 0, store.with_suffix(".log").read_text()
    return rounds, taken


def collect(store: Path) -> Counter:
    """`store gc --yes`, once; returns what it deleted by kind."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["store", "gc", str(store), "--yes"]) == 0
    return Counter(Path(file).parent.name for file in LINE.findall(out.getvalue()))


# Cells noted at once


class Noted(Exception):
    """Raised where a cell would begin to compute."""


def note_races(place: Path, corpus: list[str]) -> Iterator[dict[str, Any]]:
    """Twenty processes, fifty stores; then twenty whole cells."""
    for case, name, more in (("cells without a sweep", "single", ""), ("cells with sweep=NAME", "mine", "mine")):
        before = time.perf_counter()
        stores = [Store(place / f"{name}-{n}") for n in range(STORES)]
        if more:
            for store in stores:
                store.create()
                note_sweep(store, more, {"record/first": {"name": "first", "overrides": [], "stages": {}}})
        note_at_once(corpus, stores, more)
        lost = [s for s in stores if len(sweeps(s)[name]) != PROCESSES + bool(more)]
        assert not lost, f"cells were lost in {len(lost)} of {STORES} stores"
        assert not any(s.damaged.exists() for s in stores), "something was taken for damaged"
        yield row("notes", case, STORES, before, f"{PROCESSES} of {PROCESSES} cells noted in each store")
    yield whole_cells(place, corpus)


def note_at_once(corpus: list[str], stores: list[Store], sweep: str) -> None:
    """Every process notes its own cell in every store; in each store all do so at the same moment."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    processes = [context.Process(target=note_cell, args=(n, corpus, stores, sweep, barrier)) for n in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * PROCESSES


def note_cell(number: int, corpus: list[str], stores: list[Store], sweep: str, barrier: Any) -> None:
    """One of the processes: `run.py`'s own way to a note, up to where computing would begin."""
    overrides = [*CELL, f"seed={number}"]
    config.register()
    given = settings(*corpus, *overrides)
    with mock.patch.object(run_cell, "run", side_effect=Noted):
        for store in stores:
            mine = replace(given, store=str(store.root), sweep=sweep or None)
            barrier.wait()
            with contextlib.suppress(Noted):
                single.run_alone(mine, overrides)


def whole_cells(place: Path, corpus: list[str]) -> dict[str, Any]:
    """Twenty `run.py` commands at once, to their ends."""
    store, before, log = place / "whole", time.perf_counter(), place / "whole.log"
    started = [run_py(*corpus, *CELL, f"seed={n}", f"store={store}", log=log) for n in range(PROCESSES)]
    assert [p.wait() for p in started] == [0] * PROCESSES, log.read_text()
    done = [r for r in records.read(store) if r["status"] == "done"]
    assert len(done) == len(sweeps(Store(store))["single"]) == PROCESSES
    return row("notes", "whole cells", 1, before, f"{PROCESSES} of {PROCESSES} cells noted and recorded")


# Owners that were stopped


def stopped_races(place: Path, corpus: list[str]) -> Iterator[dict[str, Any]]:
    """Every kind of stage, at each moment; and one with the patience that leases have."""
    seen: set[str] = set()
    tuned = TUNED if importlib.util.find_spec("trl") else []
    for name, cell in (("plain", CELL), ("tuned", [*CELL, *adapted(corpus, place), *tuned])):
        overrides, whole = [*corpus, *cell], Store(place / name)
        log = place / f"{name}.log"
        assert run_py(*overrides, f"store={whole.root}", log=log).wait() == 0, log.read_text()
        kinds = {s.name: key for key, s in closure(resolve(settings(*overrides)).record).items()}
        for kind in [k for k in kinds if k not in seen]:
            for moment in MOMENTS:
                yield stopped(Race(whole, overrides, kinds[kind], moment, PATIENCE_S, place / "race"))
        if not seen:
            yield stopped(Race(whole, overrides, kinds["distil"], "start", lease.PATIENCE_S, place / "race"))
        seen |= kinds.keys()


def adapted(corpus: list[str], place: Path) -> list[str]:
    """Settings of an expanded and adapted teacher: half of its further text is written in Greek letters."""
    first = Path(next(c.partition("=")[2] for c in corpus if c.startswith("corpus.path=")))
    second = place / "greek.txt"
    second.write_text(first.read_text(encoding="utf-8").lower().translate(GREEK), encoding="utf-8")
    parts = ",".join(f"{{name:text,path:{file},weight:1}}" for file in (first, second))
    return ["expand.vocab=1100", "adapt.data=4k", f"adapt.parts=[{parts}]"]


def stopped(race: Race) -> dict[str, Any]:
    """One race as a row."""
    before, kind = time.perf_counter(), race.key.split("/")[0]
    when = {"start": "before its work", "end": "before its rename", "late": "until its successor had ended"}
    longer = f", lease of {race.patience:.0f} s" if race.patience != PATIENCE_S else ""
    seen = stopped_owner.run(race)
    return row("stopped", f"{kind}, {when[race.moment]}{longer}", 1, before, f"the owner {seen['the stopped one']}")


RACES: dict[str, Callable[[Path, list[str]], Iterator[dict[str, Any]]]] = {
    "gc": gc_races,
    "notes": note_races,
    "stopped": stopped_races,
}


def row(race: str, case: str, times: int, before: float, seen: str) -> dict[str, Any]:
    """A race that ended well; one that does not raises."""
    return {"race": race, "case": case, "times": times, "seen": seen, "seconds": round(time.perf_counter() - before, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--only", choices=RACES, help="one of the races")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    config.register()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = tiny_corpus(Path(folder))
        for name in [given.only] if given.only else RACES:
            place = Path(folder) / name
            place.mkdir()
            for found in RACES[name](place, corpus):
                rows.append(found)
                print(*found.values(), sep=" | ", flush=True)
    if given.out:
        pd.DataFrame(rows).to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
