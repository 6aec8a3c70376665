"""The store: whole or absent, computed once, taken over from the dead."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from capacity_gap.errors import StageError, StoreError
from capacity_gap.lease import Lease
from capacity_gap.runtime import Runtime
from capacity_gap.stage import Stage, Store, adopt_checkpoint, closure


def counting(calls):
    def write(run):
        calls.append(run.digest)
        (run.out / "x.txt").write_text("x")

    return write


def test_a_shared_stage_is_computed_once(tmp_path):
    calls = []
    base = Stage("base", 1, {"a": 1}, {}, counting(calls))
    ends = [Stage("end", 1, {"n": n}, {"base": base}, counting(calls)) for n in range(3)]
    store = Store(tmp_path)
    for end in ends:
        store.compute(end, Runtime())
        store.compute(end, Runtime())
    assert len(calls) == 4
    assert calls.count(base.digest) == 1


def test_who_may_read_the_store_may_read_its_tensors(tmp_path):
    def write(run):
        (run.out / "model.safetensors").touch(mode=0o600)

    stage = Stage("tensors", 1, {}, {}, write)
    written = Store(tmp_path).compute(stage, Runtime()) / "model.safetensors"
    assert written.stat().st_mode & 0o444 == written.parent.stat().st_mode & 0o444 != 0


def test_identity_is_name_version_settings_and_inputs_alone(tmp_path):
    base = Stage("s", 1, {"a": 1}, {}, counting([]))
    assert base.digest == Stage("s", 1, {"a": 1}, {}, print, cost=9.0, options={"path": "/x"}).digest
    different = [
        Stage("t", 1, {"a": 1}, {}, print),
        Stage("s", 2, {"a": 1}, {}, print),
        Stage("s", 1, {"a": 2}, {}, print),
        Stage("s", 1, {"a": 1}, {"in": base}, print),
    ]
    assert len({base.digest, *(s.digest for s in different)}) == 5


def test_a_failed_stage_leaves_nothing_in_place(tmp_path):
    def fail(run):
        (run.out / "half.txt").write_text("half")
        raise RuntimeError("boom")

    store, stage = Store(tmp_path), Stage("s", 1, {}, {}, fail)
    with pytest.raises(RuntimeError, match="boom"):
        store.compute(stage, Runtime())
    assert not store.has(stage)
    assert not store.path(stage).exists()
    fixed = Stage("s", 1, {}, {}, counting([]))
    assert (store.compute(fixed, Runtime()) / "x.txt").exists()
    assert not (store.path(fixed) / "half.txt").exists()


def test_a_full_disk_is_named_and_the_store_stays_whole(tmp_path):
    def full(run):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, stage = Store(tmp_path), Stage("s", 1, {}, {}, full)
    with pytest.raises(StageError, match="the disk is full: stage s/.*start the same command again"):
        store.compute(stage, Runtime())
    assert not store.has(stage)


def test_a_newer_store_is_refused_and_untouched(tmp_path):
    (tmp_path / "store.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(StoreError, match="newer capacity_gap"):
        Store(tmp_path).compute(Stage("s", 1, {}, {}, counting([])), Runtime())
    assert [p.name for p in tmp_path.iterdir()] == ["store.json"]


def test_closure_lists_inputs_before_their_users():
    a = Stage("a", 1, {}, {}, print)
    b = Stage("b", 1, {}, {"a": a}, print)
    c = Stage("c", 1, {}, {"a": a, "b": b}, print)
    assert [s.name for s in closure(c).values()] == ["a", "b", "c"]


def test_the_furthest_checkpoint_of_any_owner_is_taken_over(tmp_path):
    for owner, step in (("one", 9), ("two", 10)):
        (tmp_path / owner / "checkpoint" / f"step-{step}").mkdir(parents=True)
    adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert [p.name for p in (tmp_path / "me" / "checkpoint").iterdir()] == ["step-10"]


def test_a_living_owner_elsewhere_keeps_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr("capacity_gap.lease.PATIENCE_S", 0.3)
    monkeypatch.setattr("capacity_gap.lease.POLL_S", 0.01)
    beats = 0

    def done():
        """Each look of the waiting process is also a heartbeat of the owner, for more than three times the patience."""
        nonlocal beats
        beats += 1
        lease = {"owner": "other-machine", "counter": beats, "boot": "elsewhere", "pid": 1}
        (tmp_path / "lease.json").write_text(json.dumps(lease))
        return beats > 100

    with Lease(tmp_path, done) as lease:
        assert not lease.owned
    assert json.loads((tmp_path / "lease.json").read_text())["owner"] == "other-machine"


WORKER = """
    import sys, time
    from pathlib import Path
    from capacity_gap.runtime import Runtime
    from capacity_gap.stage import Stage, Store

    def work(run):
        with open(sys.argv[1] + ".log", "a") as log:
            log.write("start\\n")
        Path(sys.argv[1] + ".ready").touch()
        while not Path(sys.argv[1] + ".go").exists():
            time.sleep(0.01)
        (run.out / "x.txt").write_text("x")

    Store(sys.argv[1]).compute(Stage("s", 1, {}, {}, work), Runtime())
"""


def start_worker(store):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(WORKER), str(store)])


def wait_for(path, worker):
    while not path.exists():
        assert worker.poll() is None


def test_of_two_processes_one_works_and_the_other_waits(tmp_path):
    store = tmp_path / "store"
    workers = [start_worker(store)]
    wait_for(tmp_path / "store.ready", workers[0])
    workers.append(start_worker(store))
    with pytest.raises(subprocess.TimeoutExpired):
        workers[1].wait(timeout=4)
    (tmp_path / "store.go").touch()
    assert [w.wait(timeout=60) for w in workers] == [0, 0]
    assert (tmp_path / "store.log").read_text() == "start\n"


def test_a_killed_owner_is_taken_over(tmp_path):
    store = tmp_path / "store"
    first = start_worker(store)
    wait_for(tmp_path / "store.ready", first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (tmp_path / "store.go").touch()
    second = start_worker(store)
    assert second.wait(timeout=60) == 0
    assert (tmp_path / "store.log").read_text() == "start\nstart\n"
    assert list((store / ".work").iterdir()) == []


def test_a_silent_owner_elsewhere_is_waited_for_by_the_observers_own_clock(tmp_path, monkeypatch):
    monkeypatch.setattr("capacity_gap.lease.PATIENCE_S", 0.2)
    monkeypatch.setattr("capacity_gap.lease.POLL_S", 0.01)
    foreign = {"owner": "other-machine", "counter": 7, "boot": "elsewhere", "pid": os.getpid()}
    (tmp_path / "lease.json").write_text(json.dumps(foreign))
    with Lease(tmp_path, lambda: False) as lease:
        assert lease.owned
    assert not (tmp_path / "lease.json").exists()
