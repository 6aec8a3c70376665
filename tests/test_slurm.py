"""Grids on a real Slurm: arrays of packed jobs, time-outs, cancelled jobs, a restarted controller, detached sweeps."""

import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from capacity_gap import records
from tests import slurm
from tests.conftest import ROOT
from tests.test_registries import MINE

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not slurm.installed(), reason="Slurm is not installed here, or we are not root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Grid:
    """`python run.py -m … hydra/launcher=slurm`, running in the background."""

    def __init__(self, cluster, folder, tiny, *arguments):
        self.cluster, self.store = cluster, folder / "store"
        launcher = ["hydra/launcher=slurm", "hydra.launcher.poll_s=0.5", "hydra.launcher.partition=debug"]
        command = [sys.executable, str(ROOT / "run.py"), "-m", *tiny, f"store={self.store}", *launcher, *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self, seconds=300):
        out, _ = self.process.communicate(timeout=seconds)
        self.output = out
        return self.process.returncode

    def wait_until(self, holds, seconds=120):
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "waited too long"
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.1)

    def working_on(self, kind):
        return bool(list((self.store / ".work").glob(f"{kind}-*/*/progress.json")))

    @property
    def done(self):
        return [r for r in records.read(self.store) if r["status"] == "done"] if self.store.exists() else []


LONG = ["data=160k", "train.checkpoint_minutes=0.02", "epochs=4"]  # half a minute of distillation


def test_a_grid_of_twelve_cells_in_packed_jobs(cluster, tiny, tmp_path):
    grid = Grid(
        cluster, tmp_path, tiny, "student=40k,55k", "teacher=80k,120k", "seed=0,1,2",
        "hydra.launcher.cells_per_job=3", "hydra.launcher.cells_at_once=2",
    )  # fmt: skip
    assert grid.end() == 0, grid.output
    assert len(grid.done) == 12
    assert "12 done" in grid.output
    waves = sorted((grid.store / "jobs").iterdir())
    handed = [len(list(w.glob("[0-9].out.json")) + list(w.glob("[0-9][0-9].out.json"))) for w in waves]
    submitted = [len(list((w / "slurm").glob("*_submitted.pkl"))) for w in waves]
    assert handed[-1] == 12, "the last wave: the cells"
    assert submitted[-1] == 4, "in packs of three"


def test_a_time_out_requeues_and_goes_on_from_the_checkpoint(cluster, tiny, tmp_path):
    # Slurm counts in minutes: the warning comes 30 s before the end of the first.
    grid = Grid(
        cluster, tmp_path, tiny, "student=40k", "teacher=55k", "data=400k", "epochs=10", "train.checkpoint_minutes=9",
        "hydra.launcher.time_min=1", "hydra.launcher.signal_delay_s=30",
    )  # fmt: skip
    assert grid.end(900) == 0, grid.output  # many requeues on a busy machine
    (row,) = grid.done
    meta = json.loads(next(grid.store.glob("distil/*/stage.json")).read_text())
    logs = "".join(f.read_text() for f in grid.store.glob("jobs/*/slurm/*.err"))
    assert "timed-out" in logs
    assert meta["resumed"]
    assert row["student_loss"] > 0


def test_a_cancelled_cell_is_reported_and_a_rerun_completes_it(cluster, tiny, tmp_path):
    given = ["student=40k", "teacher=55k,80k", *LONG]
    grid = Grid(cluster, tmp_path, tiny, *given)
    grid.wait_until(lambda: grid.working_on("distil"))
    jobs = cluster.run("squeue", "-h", "-r", "-o", "%i").split()
    cluster.run("scancel", jobs[0])
    assert grid.end() == 1
    assert "1 done, 1 failed" in grid.output
    assert "its process died" in grid.output
    again = Grid(cluster, tmp_path, tiny, *given)
    assert again.end() == 0, again.output
    assert "1 done, 1 reused" in again.output


def test_the_controller_restarts_in_the_middle(cluster, tiny, tmp_path):
    grid = Grid(cluster, tmp_path, tiny, "student=40k", "teacher=55k,80k", *LONG)
    grid.wait_until(lambda: grid.working_on("distil"))
    cluster.stop_controller()
    threading.Timer(15, cluster.start_controller).start()
    assert grid.end() == 0, grid.output
    assert len(grid.done) == 2


def test_two_grids_share_their_teachers_and_hold_no_job_waiting(cluster, tiny, tmp_path):
    slow = ["teacher=55k,80k", "family.teacher_data=150k", "family.teacher_epochs=4"]
    grids = [Grid(cluster, tmp_path, tiny, *slow, f"student={s}") for s in ("30k", "40k")]
    assert [g.end() for g in grids] == [0, 0], [g.output for g in grids]
    assert len(grids[0].done) == 4
    assert len(list(grids[0].store.glob("teacher/*"))) == 2
    kinds = [json.loads(f.read_text())["kind"] for f in grids[0].store.glob("jobs/*/*.out.json")]
    assert set(kinds) <= {"done", "busy"}


def test_a_detached_grid(cluster, tiny, tmp_path):
    grid = Grid(cluster, tmp_path, tiny, "student=40k", "teacher=55k,80k", "hydra.launcher.detach=true")
    assert grid.end() == 0, grid.output
    job = re.search(r"Slurm job (\d+) runs the grid", grid.output)[1]
    end = time.monotonic() + 240
    while len(grid.done) < 2 and time.monotonic() < end:
        assert job in cluster.run("squeue", "-h", "-o", "%i") or len(grid.done) == 2
        time.sleep(0.5)
    assert len(grid.done) == 2


def test_a_grid_with_entries_of_the_users_own(cluster, tiny, tmp_path):
    (tmp_path / "my_entries.py").write_text(MINE)
    own = ["extend=[my_entries]", "distill.loss=jeffreys", "prune.method=mine"]
    grid = Grid(cluster, tmp_path, tiny, "student=40k", "teacher=55k", *own)
    assert grid.end() == 0, grid.output
    assert [(r["loss"], r["prune_method"]) for r in grid.done] == [("jeffreys", "mine")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_grid_that_is_asked_to_end_takes_its_jobs_along(cluster, tiny, tmp_path, number):
    given = ["student=40k", "teacher=55k", "seed=0,1", "data=160k", "epochs=9", "train.checkpoint_minutes=60"]
    grid = Grid(cluster, tmp_path, tiny, *given, "hydra.launcher.cells_per_job=2")
    grid.wait_until(lambda: grid.working_on("distil"))
    grid.process.send_signal(number)
    assert grid.end(30) == 128 + number, grid.output
    end = time.monotonic() + 30
    while cluster.run("squeue", "-h", "-o", "%i"):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert len(list(grid.store.glob(".work/distil-*/*/checkpoint/step-*"))) == 1
    assert list(grid.store.glob(".work/*/lease.json")) == []
    assert list(grid.store.glob("failed/*")) == []
