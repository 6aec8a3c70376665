"""Jobs as cluster launchers hand them out: files in, files out, one process lost costs one job."""

import dataclasses
import sys
from pathlib import Path

import pytest

from capacity_gap.cell.pipeline import resolve
from capacity_gap.runner.worker import Jobs, run_children, run_job
from capacity_gap.settings.errors import Busy, ConfigError, UserError
from capacity_gap.store.lease import Lease
from capacity_gap.store.stage import Store
from hydra_plugins.capacity_gap_launchers.ray_launcher import RayLauncher
from hydra_plugins.capacity_gap_launchers.slurm_launcher import SlurmLauncher
from tests.conftest import compose


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    made.create()
    return made


def settings(tiny, store, *more):
    return dataclasses.asdict(compose([*tiny, "student=40k", "teacher=55k", f"store={store.root}", *more]))


def test_outcomes_come_back_as_what_a_launcher_returns(store):
    jobs = Jobs.hand_out(store, [{}] * 5)
    for n, kind in enumerate(("done", "user", "busy", "crash")):
        jobs.note(n, kind, kind)
    values = [r._return_value for r in jobs.returns()]
    assert values[0] == "done"
    assert [type(v) for v in values[1:4]] == [UserError, Busy, RuntimeError]
    assert values[4] is None
    assert jobs.open() == [4]
    assert Jobs.handed_out_in(jobs.folder) == jobs, "outcomes are no jobs"


@pytest.mark.slow
def test_workers_compute_jobs_and_report_what_is_wrong(tiny, store):
    given = [settings(tiny, store), settings(tiny, store, "train.learning_rate=1e9")]
    jobs = Jobs.hand_out(store, given)
    run_children(jobs, [0, 1])
    assert jobs.outcome(0)["kind"] == "done"
    assert jobs.outcome(1)["kind"] == "user"
    assert "no longer finite" in jobs.outcome(1)["message"]


@pytest.mark.slow
def test_a_job_that_kills_its_process_costs_only_itself(tiny, store, tmp_path):
    jobs = Jobs.hand_out(store, [settings(tiny, store), settings(tiny, store, "seed=1")])
    fatal = tmp_path / "fatal.py"  # stands for a worker whose first job takes the process down
    fatal.write_text(
        "import os, runpy, sys\n"
        "sys.argv = sys.argv[2:]\n"  # without this file and -m: the module, the folder, the jobs
        "if sys.argv[2] == '0': os.kill(os.getpid(), 9)\n"
        "runpy.run_module('capacity_gap.runner.worker', run_name='__main__')\n"
    )
    run_children(jobs, [0, 1], launcher=[sys.executable, str(fatal)])
    assert jobs.outcome(0) == {"kind": "died", "message": "its process died (exit status -9)"}
    assert jobs.outcome(1)["kind"] == "done"


def test_a_worker_does_not_wait_for_a_stage_that_another_is_at(tiny, store):
    config = compose([*tiny, "student=40k", "teacher=55k", f"store={store.root}"])
    corpus = resolve(config).corpus
    with Lease(store.work / corpus.key.replace("/", "-"), lambda: False):
        kind, message = run_job(dataclasses.asdict(config))
    assert kind == "busy"
    assert "is being computed by" in message
    assert not (store.root / "failed").exists(), "busy is no failure"


def test_launchers_refuse_what_cannot_be_before_anything_is_submitted():
    ray = RayLauncher(gpus=4)
    with pytest.raises(ConfigError, match="hydra.launcher.gpus=4, but under Ray a cell is one process"):
        ray.launch([["student=40k"]], 0)
    slurm = SlurmLauncher(nodes=2)
    with pytest.raises(ConfigError, match="hydra.launcher.nodes=2 with hydra.launcher.gpus=0"):
        slurm.launch([["student=40k"]], 0)
    with pytest.raises(ConfigError, match="hydra.launcher.nodes=2 with hydra.launcher.gpus=0"):
        slurm.submit_grid([], Path())
