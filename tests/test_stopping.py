"""Asked to end, a run leaves checkpoints and free leases, ends within half a minute, and says so in its exit status."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from capacity_gap.runner import stopping
from capacity_gap.runner.stopping import Asked, UntilAsked, ending_workers, noting_signals
from capacity_gap.runner.worker import Jobs, run_children
from capacity_gap.runtime.process import PARENT, STOP_FILE, Interrupted, Runtime
from capacity_gap.store.contents import stopped_cells, sweeps
from capacity_gap.store.stage import Store
from hydra_plugins.capacity_gap_launchers import slurm_launcher
from hydra_plugins.capacity_gap_launchers.ray_launcher import NICENESS, _end, _start
from hydra_plugins.capacity_gap_launchers.slurm_launcher import SlurmLauncher
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
    (left,) = (stopped_cells(Store(tmp_path), name) for name in sweeps(Store(tmp_path)))
    assert list(left.values()) == [f"it was interrupted ({signal.Signals(number).name})"] * (2 if kind else 1)


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


def test_workers_of_a_ray_that_is_started_here_give_way_to_nobody(monkeypatch):
    monkeypatch.setenv(NICENESS, "")
    monkeypatch.delenv(NICENESS)
    _start(RayThatSetsAHandler(asked=False), None)
    assert os.environ[NICENESS] == "0"
    monkeypatch.setenv(NICENESS, "15")
    _start(RayThatSetsAHandler(asked=False), None)
    assert os.environ[NICENESS] == "15", "whoever wants them nice says so"


def test_a_request_to_end_while_ray_starts_is_one():
    with pytest.raises(Interrupted) as caught:
        _start(RayThatSetsAHandler(asked=True), None)
    assert caught.value.exit_status == 143


def test_the_handler_of_a_pool_starts_no_thread_and_takes_no_lock(tmp_path, monkeypatch):
    """What it interrupts may hold the very lock, and would never give it back."""

    def refuse(*args, **kwargs):
        raise AssertionError("a lock is taken inside a signal handler")

    asked = Asked(tmp_path / "stop")
    asked.in_pool = True
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(threading.Event, "set", refuse)
    asked(signal.SIGTERM, None)
    assert (tmp_path / "stop").exists()


def test_a_worker_of_a_pool_that_never_returns_is_killed(monkeypatch):
    monkeypatch.setattr(stopping, "GRACE_S", 0.2)
    ignoring = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE) as stubborn:
        stubborn.stdout.readline()

        def launch(jobs, initial_job_idx):
            signal.raise_signal(signal.SIGTERM)
            return [stubborn.wait(timeout=10)]

        with pytest.raises(Interrupted), ending_workers() as asked:
            asked.telling(launch)([1], initial_job_idx=0)
        assert stubborn.returncode == -signal.SIGKILL


class RayThatIsGone:
    """Its cluster does not answer, and none of its tasks ends."""

    def cancel(self, task):
        raise ConnectionError("the cluster is gone")

    def wait(self, tasks, num_returns, timeout):
        signal.raise_signal(signal.SIGTERM)
        return [], tasks

    def shutdown(self):
        raise ConnectionError("the cluster is gone")


def test_a_ray_grid_that_was_asked_to_end_ends_so_and_a_second_signal_does_not_wait():
    started = time.monotonic()
    with noting_signals() as noted:
        signal.raise_signal(signal.SIGINT)
        _end(RayThatIsGone(), ["task"], noted)
        with pytest.raises(Interrupted) as caught:
            noted()
    assert caught.value.exit_status == 130
    assert time.monotonic() - started < stopping.GRACE_S / 2


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A scancel that notes what it was given; a launcher whose two jobs are in one array."""
    command = tmp_path / "bin" / "scancel"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/cancelled\n. {tmp_path}/more\n")
    command.chmod(0o755)
    (tmp_path / "more").write_text("")
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    config = SimpleNamespace(store_path=tmp_path / "store", train=SimpleNamespace(threads=1))
    monkeypatch.setattr("capacity_gap.cell.config.from_hydra", lambda composed: config)
    monkeypatch.setattr("capacity_gap.runner.worker.handed_out", lambda given: {})
    launcher = SlurmLauncher()
    launcher.config, launcher.loader = None, SimpleNamespace(load_sweep_config=lambda config, overrides: None)
    monkeypatch.setattr(launcher, "_check", lambda: None)
    monkeypatch.setattr(launcher, "_submit", lambda jobs, packs, threads: ["12_0", "12_1"])
    return launcher


def test_a_signal_while_slurm_jobs_are_submitted_cancels_their_array(slurm, tmp_path, monkeypatch):
    def submit(jobs, packs, threads):
        slow = [sys.executable, "-c", "import time; time.sleep(0.3); print('submitted')"]  # shells clear their masks
        with subprocess.Popen(slow, stdout=subprocess.PIPE, text=True) as sbatch:
            for process in (sbatch.pid, os.getpid()):  # as Ctrl-C does
                os.kill(process, signal.SIGINT)
            assert sbatch.stdout.read() == "submitted\n"
        return ["12_0", "12_1"]

    monkeypatch.setattr(slurm, "_submit", submit)
    with pytest.raises(Interrupted) as caught:
        slurm.launch([["a"], ["b"]], 0)
    assert caught.value.exit_status == 130
    assert (tmp_path / "cancelled").read_text() == "12\n"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_second_signal_does_not_end_the_cancelling(slurm, tmp_path, monkeypatch):
    script = f"import os; os.kill({os.getpid()}, 2); os.kill(os.getpid(), 2); print('whole')"
    (tmp_path / "more").write_text(f'exec {sys.executable} -c "{script}" >> {tmp_path}/cancelled')

    def watch(jobs, packs, submitted):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(slurm, "_watch", watch)
    with pytest.raises(Interrupted) as caught:
        slurm.launch([["a"], ["b"]], 0)
    assert caught.value.exit_status == 143
    assert (tmp_path / "cancelled").read_text() == "12\nwhole\n"


@pytest.mark.parametrize("more", ["exec sleep 60", "echo no controller >&2; exit 1"])
def test_what_slurm_did_not_cancel_is_told_with_the_command(slurm, tmp_path, monkeypatch, capsys, more):
    (tmp_path / "more").write_text(more)
    monkeypatch.setattr(slurm_launcher, "ANSWER_S", 0.5)
    slurm_launcher._cancel(["12_0", "12_1", "13_0"])
    assert "They may still run. Run: scancel 12 13" in capsys.readouterr().err


def test_a_queue_that_does_not_answer_is_asked_again(tmp_path, monkeypatch):
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_launcher, "ANSWER_S", 0.2)
    assert slurm_launcher._squeue(["12_0"]) is None
