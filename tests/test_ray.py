"""A grid on a local Ray cluster, if the extra is installed."""

import signal

import pytest

from capacity_gap import records
from tests.conftest import run_py
from tests.test_stopping import LONG, start, stop, wait_for_training

pytest.importorskip("ray", reason="the extra [ray] is not installed")


@pytest.mark.slow
def test_a_grid_on_ray_and_a_cell_that_fails(tiny, tmp_path):
    given = [*tiny, "student=40k", "teacher=55k,80k", f"store={tmp_path}", "hydra/launcher=ray"]
    done = run_py("-m", *given, "train.learning_rate=0.01,1e9", check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "grid: 2 done, 2 failed" in done.stdout
    assert "the loss is no longer finite" in done.stderr
    assert sorted(r["status"] for r in records.read(tmp_path)) == ["done", "done", "failed", "failed"]
    assert len(list(tmp_path.glob("teacher/*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("wave", "number"), [("first", signal.SIGTERM), ("last", signal.SIGINT)])
def test_a_grid_on_ray_that_is_asked_to_end(tiny, tmp_path, number, wave):
    """In the wave in which it starts Ray, which sets handlers of its own, and in a later one."""
    if wave == "first":
        run_py(*tiny, *LONG, "data=6k", f"store={tmp_path}")
    grid = start(tmp_path, tiny, "-m", "seed=0,1", "hydra/launcher=ray")
    wait_for_training(tmp_path, grid, students=1)
    assert stop(tmp_path, grid, number, group=False) == 128 + number
    assert list(tmp_path.glob(".work/distil-*/*/checkpoint/step-*"))
    assert list(tmp_path.glob("failed/*")) == []
