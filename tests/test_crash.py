"""`kill -9` at any moment, then the same command again: the same bits as if nothing had happened."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks import chaos
from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runtime.process import Interrupted
from capacity_gap.store.stage import Store
from tests.conftest import ROOT, compose

STAGES = ("corpus", "tokenizer", "tokens", "teacher", "scores", "student", "distil", "evaluate")
CELL = ("student=40k", "teacher=55k", "data=12k", "family.teacher_data=24k", "train.checkpoint_minutes=1e-6")


def start(tiny, store):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *tiny, *CELL, f"store={store}"], stderr=subprocess.DEVNULL
    )


def inside(store, stage):
    """Whether the stage is at work now; a training stage only once it has left a checkpoint."""
    deep = stage in ("teacher", "distil")
    return any(store.glob(f".work/{stage}-*/*/" + ("checkpoint/step-*" if deep else "out")))


def interrupt(tiny, store, stage, number):
    """Starts the cell and sends it a signal inside `stage`; returns its exit status."""
    worker = start(tiny, store)
    while not inside(store, stage):
        assert worker.poll() is None, f"the cell ended before {stage} was seen at work"
    worker.send_signal(number)
    return worker.wait(timeout=120)


def outcome(store):
    """The results and the weights of the one cell of a store."""
    (row,) = records.read(store)
    (weights,) = store.glob("distil/*/model.safetensors")
    return {f: row[f] for f in records.RESULT_FIELDS}, weights.read_bytes()


@pytest.fixture(scope="module")
def calm(tiny, tmp_path_factory):
    store = tmp_path_factory.mktemp("calm")
    assert start(tiny, store).wait(timeout=300) == 0
    return outcome(store)


@pytest.mark.slow
def test_a_cell_killed_in_every_stage_in_turn_ends_with_the_same_bits(tiny, tmp_path, calm):
    for stage in STAGES:
        assert interrupt(tiny, tmp_path, stage, signal.SIGKILL) == -signal.SIGKILL, stage
        assert records.read(tmp_path) == []
    assert start(tiny, tmp_path).wait(timeout=300) == 0
    assert outcome(tmp_path) == calm
    assert list((tmp_path / ".work").iterdir()) == []


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_a_free_lease(tiny, tmp_path, calm):
    assert interrupt(tiny, tmp_path, "distil", signal.SIGTERM) == 143
    (place,) = tmp_path.glob(".work/distil-*")
    assert not (place / "lease.json").exists()
    assert list(place.glob("*/checkpoint/step-*"))
    assert start(tiny, tmp_path).wait(timeout=300) == 0
    assert outcome(tmp_path) == calm


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_not_from_the_start(tiny, tmp_path, monkeypatch):
    config = compose([*tiny, *CELL, f"store={tmp_path}"])
    seen = []
    stop_at = 3

    def count(self, done, total, unit="tokens", **extra):
        if unit == "steps":
            seen.append(done)
            if len(seen) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("capacity_gap.runtime.process.Runtime.report", count)
    with pytest.raises(Interrupted):
        run_config(config)
    run_config(config)
    cell = pipeline.resolve(config)
    assert Store(tmp_path).has(cell.record)
    teacher_steps = seen[: seen.index(1, 1)]
    assert teacher_steps == sorted(set(teacher_steps)), "no step was taken twice"


@pytest.mark.slow
def test_a_grid_in_chaos_ends_with_the_same_bits(tmp_path):
    """A short, seeded run of benchmarks/chaos.py; the long one is results/chaos.csv."""
    arguments = [*chaos.tiny_corpus(tmp_path), "student=40k", "teacher=55k,80k"]
    assert chaos.start(tmp_path / "calm", arguments, 2, tmp_path / "calm.log").wait() == 0
    told = chaos.run_in_chaos(tmp_path / "chaos", arguments, kills=2, seed=1, every_s=1.5, workers=2)
    row = chaos.compare(tmp_path / "calm", tmp_path / "chaos", told)
    assert row["kills inside a stage"] == 2
    assert row["cells"] == 2
