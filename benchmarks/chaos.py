"""Claim: a grid whose workers and parent are killed at random ends with the same bits as one that ran in peace.

    python -m benchmarks.chaos [--kills 10] [--seed 0] [--out results/chaos.csv]     about fifteen minutes on two cores

24 tiny cells on three joblib workers. Every few seconds `kill -9` meets a random worker or the parent; when the parent
is gone, the same command is started again. Checked at the end: every cell recorded once; RESULT_FIELDS and weights
equal to the calm run's bit for bit; no stage begun more often than the kills that met it explain.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil

from capacity_gap import records
from capacity_gap.records import RESULT_FIELDS

ROOT = Path(__file__).resolve().parent.parent
CELLS = ["student=40k,50k", "teacher=55k,80k,120k", "seed=0,1,2,3"]


@dataclass
class Chaos:
    """What was done to a grid."""

    workers_killed: int = 0
    parents_killed: int = 0
    inside: int = 0  # kills of a process that was at a stage, or of a parent with one that was
    met: Counter = field(default_factory=Counter)  # stage → kills while it was being computed
    parents_started: int = 0


def tiny_corpus(folder: Path) -> list[str]:
    """Settings that make a cell cost seconds: Python's own language reference, short budgets."""
    from pydoc_data.topics import topics

    file = folder / "topics.txt"
    file.write_text("\n\n".join(topics[t] for t in sorted(topics))[:240_000], encoding="utf-8")
    given = "corpus=text corpus.sequence_length=32 family.teacher_data=40k data=24k prune.batches=2 tracking=disabled"
    return [*given.split(), f"corpus.path={file}", "evaluate.tokens=2000", "evaluate.ood_tokens=1000"]


def start(store: Path, arguments: list[str], workers: int, log: Path) -> subprocess.Popen:
    """The grid, in the background."""
    launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"]
    given = [*launcher, f"store={store}", "retries=99", "train.checkpoint_minutes=0.005"]
    with log.open("a") as out:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), "-m", *arguments, *given], stdout=out, stderr=subprocess.STDOUT
        )


def at_work(store: Path) -> dict[str, int]:
    """Stages that are being computed now, with the process that computes each."""
    found = {}
    for lease in (store / ".work").glob("*/lease.json"):
        try:
            pid = json.loads(lease.read_text())["pid"]
        except (OSError, json.JSONDecodeError):
            continue
        if psutil.pid_exists(pid):
            found[lease.parent.name] = pid
    return found


def strike(parent: subprocess.Popen, store: Path, rng: random.Random, told: Chaos) -> None:
    """Kills the parent, or, four times in five, a worker that is at a stage."""
    busy = at_work(store)
    workers = [p for p in busy.values() if p != parent.pid]
    if not workers:
        return
    victim = parent.pid if rng.random() < 0.2 else rng.choice(workers)
    told.parents_killed += victim == parent.pid
    told.workers_killed += victim != parent.pid
    told.inside += 1
    told.met.update(busy)  # a pool that loses one worker ends the others too, and so does a lost parent
    os.kill(victim, 9)


def run_in_chaos(store: Path, arguments: list[str], *, kills: int, seed: int, every_s: float, workers: int) -> Chaos:
    """Runs the grid to its end, with `kills` of its processes killed on the way, each inside a stage."""
    rng, told, log = random.Random(seed), Chaos(), store.parent / "chaos.log"
    while True:
        told.parents_started += 1
        parent = start(store, arguments, workers, log)
        while parent.poll() is None:
            time.sleep(rng.uniform(0.2, 2 * every_s))
            if told.inside < kills and parent.poll() is None:
                strike(parent, store, rng, told)
        if parent.returncode == 0:
            return told
        assert parent.returncode == -9, f"the grid ended by itself: {log.read_text()[-3000:]}"


def begun(store: Path) -> Counter:
    """How often each stage was begun, from the logs."""
    counts: Counter = Counter()
    for file in (store / "logs").glob("*.log"):
        for line in file.read_text(errors="replace").splitlines():
            if line.endswith((": starts", ": resumed from a checkpoint")):
                counts[line.split(" INFO ")[1].split(":")[0].replace("/", "-")] += 1
    return counts


def differences(calm: Path, other: Path) -> list[str]:
    """In what the results of two stores differ: cells, columns that must repeat, and weights of students."""
    one, two = ({r["cell"]: r for r in records.read(s)} for s in (calm, other))
    found = [f"cell {cell} is in one of them" for cell in one.keys() ^ two.keys()]
    for cell in one.keys() & two.keys():
        found += [f"{f} of cell {cell}" for f in RESULT_FIELDS if one[cell][f] != two[cell][f]]
    weights = (f.relative_to(calm) for f in calm.glob("distil/*/model.safetensors"))
    return found + [str(f) for f in weights if (calm / f).read_bytes() != (other / f).read_bytes()]


def compare(calm: Path, chaotic: Path, told: Chaos) -> dict:
    """The checks, as one row; raises if one of them does not hold."""
    assert not (different := differences(calm, chaotic)), different
    counts = begun(chaotic)
    unexplained = {s: n for s, n in counts.items() if n > 1 + told.met[s]}
    assert not unexplained, f"begun more often than kills explain: {unexplained}"
    return {
        "cells": len(records.read(chaotic)),
        "kills inside a stage": told.inside,
        "of workers": told.workers_killed,
        "of the parent": told.parents_killed,
        "parents started": told.parents_started,
        "stages": len(counts),
        "stages begun again": sum(n - 1 for n in counts.values()),
        "identical": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--every", type=float, default=6.0, help="mean seconds between kills")
    parser.add_argument("--out", type=Path, help="CSV for the row")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        arguments = [*tiny_corpus(place), *CELLS]
        calm = start(place / "calm", arguments, given.workers, place / "calm.log")
        assert calm.wait() == 0, (place / "calm.log").read_text()[-3000:]
        told = run_in_chaos(
            place / "chaos", arguments, kills=given.kills, seed=given.seed, every_s=given.every, workers=given.workers
        )
        row = pd.DataFrame([{"seed": given.seed, **compare(place / "calm", place / "chaos", told)}])
    print(row.T.to_string(header=False))
    if given.out:
        given.out.parent.mkdir(exist_ok=True)
        row.to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
