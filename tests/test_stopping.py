"""Asked to end, a run leaves checkpoints and free leases, ends within half a minute, and says so in its exit status."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from capacity_gap.runner import stopping
from capacity_gap.runner.stopping import UntilAsked, ending_workers
from capacity_gap.runner.worker import Jobs, run_children
from capacity_gap.runtime.process import PARENT, STOP_FILE, Interrupted, Runtime
from hydra_plugins.capacity_gap_launchers.ray_launcher import _start
from tests.conftest import ROOT

ENDED_S = 30
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
LONG = ("student=40k", "teacher=55k", "data=100k", "epochs=8", "train.checkpoint_minutes=60")


def start(store, tiny, *more):
    command = [sys.executable, str(ROOT / "run.py"), *more, *tiny, *LONG, f"store={store}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for_training(store, process, students):
    while len(list(store.glob(".work/distil-*/*/progress.json"))) < students:
        assert process.poll() is None
        time.sleep(0.05)


def stop(store, process, number, group):
    """Sends the signal; returns the exit status, and checks that everything has ended well."""
    children, sent = psutil.Process(process.pid).children(recursive=True), time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    status = process.wait(timeout=ENDED_S)
    _, alive = psutil.wait_procs(children, timeout=sent + ENDED_S - time.monotonic())
    assert alive == []
    assert list(store.glob(".work/*/lease.json")) == []
    return status


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True], ids=["to the grid", "to all"])
@pytest.mark.parametrize("number", STATUS)
def test_a_joblib_grid_that_is_asked_to_end(tiny, tmp_path, number, group):
    """`to all`: as Ctrl-C and a closed terminal do, which reach the workers too."""
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    grid = start(tmp_path, tiny, "-m", "seed=0,1,2,3", *launcher)
    wait_for_training(tmp_path, grid, students=2)
    assert stop(tmp_path, grid, number, group) == STATUS[number]
    assert len(list(tmp_path.glob(".work/distil-*/*/checkpoint/step-*"))) == 2
    assert list(tmp_path.glob("failed/*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), ("-m", "seed=0,1")], ids=["cell", "grid"])
@pytest.mark.parametrize("number", STATUS)
def test_a_run_in_one_process_that_is_asked_to_end(tiny, tmp_path, number, kind):
    run = start(tmp_path, tiny, *kind)
    wait_for_training(tmp_path, run, students=1)
    assert stop(tmp_path, run, number, group=False) == STATUS[number]
    assert len(list(tmp_path.glob(".work/distil-*/*/checkpoint/step-*"))) == 1


def test_a_grid_outside_a_pool_is_interrupted_where_it_waits():
    with pytest.raises(Interrupted) as caught, ending_workers():
        signal.raise_signal(signal.SIGHUP)
    assert caught.value.exit_status == 129
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_pool_is_told_and_waited_for_and_no_further_job_is_handed_out(monkeypatch):
    seen = []

    def launch(jobs, initial_job_idx):
        for job in jobs:
            seen.append(job)
            signal.raise_signal(signal.SIGTERM)
            assert os.path.exists(os.environ[STOP_FILE]), "workers look for this file"
        return ["what the first job returned"]

    with pytest.raises(Interrupted) as caught, ending_workers() as asked:
        asked.telling(launch)([1, 2, 3], initial_job_idx=0)
    assert seen == [1]
    assert caught.value.exit_status == 143
    assert STOP_FILE not in os.environ


def test_a_second_signal_does_not_wait():
    def launch(jobs, initial_job_idx):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it should not come so far")

    with pytest.raises(Interrupted), ending_workers() as asked:
        asked.telling(launch)([1], initial_job_idx=0)


def test_workers_that_do_not_end_are_killed_in_time(monkeypatch):
    monkeypatch.setattr(stopping, "GRACE_S", 0.2)
    ignoring = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE) as stubborn:
        stubborn.stdout.readline()
        with pytest.raises(Interrupted), ending_workers():
            raise Interrupted
        assert stubborn.wait(timeout=10) == -signal.SIGKILL


def wait_for_the_end(runtime):
    while True:
        runtime.check()


def test_a_worker_sees_that_its_grid_was_asked_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getppid()))
    monkeypatch.setenv(STOP_FILE, str(tmp_path / "stop"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Runtime().catching_signals():
            pass
        signal.raise_signal(signal.SIGTERM)  # between two jobs: passed over, the pool would break
        runtime = Runtime()
        threading.Timer(0.1, (tmp_path / "stop").touch).start()
        with pytest.raises(Interrupted), runtime.catching_signals():
            wait_for_the_end(runtime)
        later = Runtime()
        with pytest.raises(Interrupted), later.catching_signals():
            later.check()
    finally:
        for number in (*STATUS, signal.SIGUSR2):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else before)


def test_a_hang_up_is_passed_over_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runtime = Runtime()
        with runtime.catching_signals():
            signal.raise_signal(signal.SIGHUP)
        assert not runtime.stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_jobs_come_one_by_one_until_the_grid_is_asked_to_end():
    with ending_workers() as asked:
        jobs = iter(UntilAsked([1, 2, 3], asked))
        assert next(jobs) == 1
        asked.number = 15
        assert list(jobs) == []


def test_a_worker_that_was_asked_to_end_is_not_followed_by_another(tmp_path):
    jobs = Jobs(tmp_path, 3)
    for n in range(3):
        (tmp_path / f"{n}.json").write_text("{}")
    log = tmp_path / "log"
    script = f"import sys; open({str(log)!r}, 'a').write('started '); sys.exit(143)"
    run_children(jobs, [0, 1, 2], launcher=[sys.executable, "-c", script])
    assert log.read_text() == "started "
    assert jobs.open() == [0, 1, 2]
    assert json.loads((tmp_path / "0.json").read_text()) == {}


class RayThatSetsAHandler:
    """As Ray does when it starts: SIGTERM kills its processes and ends this one with status 1."""

    def __init__(self, *, asked):
        self.asked = asked

    def init(self, **settings):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(1))
        if self.asked:
            signal.raise_signal(signal.SIGTERM)


def test_ray_leaves_us_our_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    _start(RayThatSetsAHandler(asked=False), None)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_request_to_end_while_ray_starts_is_one():
    with pytest.raises(Interrupted) as caught:
        _start(RayThatSetsAHandler(asked=True), None)
    assert caught.value.exit_status == 143
