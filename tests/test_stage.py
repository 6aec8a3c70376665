"""The store: whole or absent, computed once, taken over from the dead."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import Damaged, Lost, StageError, StoreError
from capacity_gap.store.files import read_json, write_json
from capacity_gap.store.lease import Lease, Pulse
from capacity_gap.store.stage import Stage, Store, closure
from capacity_gap.store.takeover import adopt_checkpoint


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
    with pytest.raises(StageError, match="the disk is full: stage s/.*run the same command again"):
        store.compute(stage, Runtime())
    assert not store.has(stage)


def test_a_newer_store_is_refused_and_untouched(tmp_path):
    (tmp_path / "store.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(StoreError, match="newer capacity_gap"):
        Store(tmp_path).compute(Stage("s", 1, {}, {}, counting([])), Runtime())
    assert [p.name for p in tmp_path.iterdir()] == ["store.json"]


def test_a_marker_that_another_process_has_just_written_is_not_damaged(tmp_path, monkeypatch, capsys):
    """Many cells that start at once find no marker; by the time that one of them writes it, another has."""
    marker = tmp_path / "store.json"

    def read_too_early(path, needs=()):
        if marker.exists():
            return read_json(path, needs)
        marker.write_text(json.dumps({"schema": 1}))
        raise Damaged(path, "is missing")

    monkeypatch.setattr("capacity_gap.store.stage.read_json", read_too_early)
    store = Store(tmp_path)
    store.create()
    assert store.marker.is_file()
    assert not store.damaged.exists()
    assert capsys.readouterr().err == ""


def test_closure_lists_inputs_before_their_users():
    a = Stage("a", 1, {}, {}, print)
    b = Stage("b", 1, {}, {"a": a}, print)
    c = Stage("c", 1, {}, {"a": a, "b": b}, print)
    assert [s.name for s in closure(c).values()] == ["a", "b", "c"]


def leave_checkpoint(folder):
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(100)}, folder / "state.safetensors")
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", None])
@pytest.mark.parametrize("left", [0, 0.5])
def test_an_empty_or_torn_checkpoint_is_passed_over(tmp_path, name, left):
    leave_checkpoint(tmp_path / "one" / "checkpoint" / "step-9")
    torn = tmp_path / "two" / "checkpoint" / "step-10"
    leave_checkpoint(torn)
    for file in torn.iterdir():
        if name is None:
            file.unlink()
        elif file.name == name:
            os.truncate(file, int(file.stat().st_size * left))
    assert adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert [p.name for p in (tmp_path / "me" / "checkpoint").iterdir()] == ["step-9"]


def test_training_starts_from_the_furthest_checkpoint_that_can_be_read(tmp_path):
    from capacity_gap.store import checkpoint

    model, optimizer = after_one_step()
    checkpoint.save(tmp_path, 3, model, optimizer, [{"step": 3}], leads=True)
    shutil.copytree(tmp_path / "step-3", tmp_path / "step-7")
    os.truncate(tmp_path / "step-7" / "state.safetensors", 40)
    assert checkpoint.load(tmp_path, *after_one_step()) == (3, [{"step": 3}])
    os.truncate(tmp_path / "step-3" / "state.safetensors", 0)
    fresh, optimizer = after_one_step()
    before = fresh.weight.clone()
    assert checkpoint.load(tmp_path, fresh, optimizer) == (0, [])
    assert torch.equal(fresh.weight, before)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "state.json.crc32"])
def test_a_checkpoint_of_which_a_byte_has_changed_is_passed_over(tmp_path, caplog, name):
    from capacity_gap.store import checkpoint

    for owner, step in (("one", 9), ("two", 10)):
        checkpoint.save(tmp_path / owner / "checkpoint", step, *after_one_step(), [{"ce": 1.5}], leads=True)
    file = tmp_path / "two" / "checkpoint" / "step-10" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + 1] ^= 1
    file.write_bytes(content)
    assert adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert [p.name for p in (tmp_path / "me" / "checkpoint").iterdir()] == ["step-9"]
    assert "two/checkpoint/step-10 is damaged" in caplog.text


def after_one_step():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_the_furthest_checkpoint_of_any_owner_is_taken_over(tmp_path):
    for owner, step in (("one", 9), ("two", 10)):
        leave_checkpoint(tmp_path / owner / "checkpoint" / f"step-{step}")
    adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert [p.name for p in (tmp_path / "me" / "checkpoint").iterdir()] == ["step-10"]


def test_a_living_owner_elsewhere_keeps_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr("capacity_gap.store.lease.PATIENCE_S", 0.3)
    monkeypatch.setattr("capacity_gap.store.lease.POLL_S", 0.01)
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


def kept_steps(place):
    return sorted(str(p.relative_to(place)) for p in place.glob("*/checkpoint/step-*"))


def test_a_checkpoint_is_moved_so_that_restarts_leave_one(tmp_path):
    leave_checkpoint(tmp_path / "one" / "checkpoint" / "step-9")
    for owner in ("two", "three", "four", "four"):
        assert adopt_checkpoint(tmp_path, tmp_path / owner / "checkpoint")
    assert kept_steps(tmp_path) == ["four/checkpoint/step-9"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_checkpoint_that_cannot_be_taken_over_is_named_and_the_next_one_is_tried(
    tmp_path, monkeypatch, capsys, number
):
    for owner, step in (("one", 9), ("two", 10)):
        leave_checkpoint(tmp_path / owner / "checkpoint" / f"step-{step}")

    def failing(real):
        def rename(old, new, *more):
            if "step-10" in str(old) or "step-10" in str(new):
                raise OSError(number, os.strerror(number))
            return real(old, new, *more)

        return rename

    monkeypatch.setattr(os, "rename", failing(os.rename))
    assert adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert kept_steps(tmp_path) == ["me/checkpoint/step-9", "two/checkpoint/step-10"]
    assert "two/checkpoint/step-10 cannot be taken over" in capsys.readouterr().err


def test_a_checkpoint_of_another_user_is_copied(tmp_path, monkeypatch):
    leave_checkpoint(tmp_path / "one" / "checkpoint" / "step-9")
    real = os.rename

    def rename(old, new):
        if "one" in str(old):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    assert adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert kept_steps(tmp_path) == ["me/checkpoint/step-9", "one/checkpoint/step-9"]


def test_what_an_owner_that_comes_back_was_writing_does_not_come_along(tmp_path):
    """It may still hold the file open, and write into it beside its successor."""
    blocks = tmp_path / "one" / "checkpoint" / "step-0"
    blocks.mkdir(parents=True)
    (blocks / "block-00000-entropy.npy").write_bytes(b"x")
    (blocks / ".1-ids.tmp.npy").write_bytes(b"half")
    assert adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert [p.name for p in (tmp_path / "me" / "checkpoint" / "step-0").iterdir()] == ["block-00000-entropy.npy"]


@pytest.mark.parametrize("lacking", ["state.json", "state.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_none(tmp_path, lacking):
    for owner, step in (("one", 9), ("two", 10)):
        leave_checkpoint(tmp_path / owner / "checkpoint" / f"step-{step}")
    (tmp_path / "two" / "checkpoint" / "step-10" / lacking).unlink()
    assert adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert [p.name for p in (tmp_path / "me" / "checkpoint").iterdir()] == ["step-9"]


def test_stray_names_among_checkpoints_are_none(tmp_path):
    from capacity_gap.store import checkpoint

    leave_checkpoint(tmp_path / "one" / "checkpoint" / "step-9")
    for stray in ("step-9.bak", "step-x", "step-"):
        leave_checkpoint(tmp_path / "one" / "checkpoint" / stray)
    assert adopt_checkpoint(tmp_path, tmp_path / "me" / "checkpoint")
    assert [p.name for p in (tmp_path / "me" / "checkpoint").iterdir()] == ["step-9"]
    (tmp_path / "own" / "step-3.bak").mkdir(parents=True)
    assert checkpoint.load(tmp_path / "own", *after_one_step()) == (0, [])


def test_an_overtaken_owner_leaves_its_checkpoints_to_its_successor(tmp_path):
    """Until the stage is there: then it removes what it left."""
    seen = []

    def work(run):
        seen.append(sorted(p.name for p in run.checkpoint.iterdir()))
        if len(seen) == 1:
            leave_checkpoint(run.checkpoint / "step-5")
            raise Lost
        (run.out / "x").write_text("x")

    store, stage = Store(tmp_path), Stage("s", 1, {}, {}, work)
    store.compute(stage, Runtime())
    assert seen == [[], ["step-5"]]
    assert list(store.work.iterdir()) == []


def test_an_error_of_an_owner_that_was_overtaken_is_not_one_of_the_stage(tmp_path):
    """Its successor has moved the checkpoint away that it was writing to."""
    calls = []

    def work(run):
        calls.append(1)
        if len(calls) == 1:
            lease = run.out.parent.parent / "lease.json"
            lease.write_text(json.dumps({"owner": "other-1-a", "boot": "elsewhere", "pid": 1}))
            threading.Timer(0.2, lease.unlink).start()  # the successor ends without a result
            raise FileNotFoundError(errno.ENOENT, "step-0 is gone")
        (run.out / "x").write_text("x")

    store, stage = Store(tmp_path), Stage("s", 1, {}, {}, work)
    store.compute(stage, Runtime())
    assert len(calls) == 2


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_file_server_that_does_not_answer_costs_no_waiting_process(tmp_path, monkeypatch, number):
    """For a moment the lease cannot be read, nor can it be said whether the stage is there."""
    monkeypatch.setattr("capacity_gap.store.lease.POLL_S", 0.01)
    real, looks = Path.read_text, []

    def read_text(self, *args, **kwargs):
        if self.name == "lease.json" and self.parent == tmp_path:
            looks.append(self)
            if len(looks) in (2, 4):
                raise OSError(number, os.strerror(number))
        return real(self, *args, **kwargs)

    def done():
        if len(looks) == 6:
            looks.append(None)
            raise OSError(number, os.strerror(number))
        return len(looks) > 8

    (tmp_path / "lease.json").write_text(json.dumps({"owner": "other-1-a", "boot": "elsewhere", "pid": 1}))
    monkeypatch.setattr(Path, "read_text", read_text)
    with Lease(tmp_path, done) as lease:
        assert not lease.owned
    assert (tmp_path / "lease.json").exists()


def test_a_lease_that_cannot_be_read_is_no_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr("capacity_gap.store.lease.PATIENCE_S", 0.2)
    (tmp_path / "lease.json").write_text(json.dumps({"owner": "other-1-a", "boot": "elsewhere", "pid": 1}))
    pulse = Pulse(tmp_path)
    (tmp_path / "lease.json").write_text("{")
    assert pulse.state() == "silent"
    time.sleep(0.3)
    assert pulse.state() == "dead"


def test_files_beside_are_named_by_chance_and_not_by_the_process(tmp_path, monkeypatch):
    """In containers every process is number 1: two of them would write one file beside."""
    names = []

    def replace(old, new):
        names.append(Path(old).name)
        shutil.move(old, new)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        write_json(tmp_path / "x.json", {})
    assert len(set(names)) == 2


WORKER = """
    import sys, time
    from pathlib import Path
    from capacity_gap.runtime.process import Runtime
    from capacity_gap.store.stage import Stage, Store

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
    monkeypatch.setattr("capacity_gap.store.lease.PATIENCE_S", 0.2)
    monkeypatch.setattr("capacity_gap.store.lease.POLL_S", 0.01)
    foreign = {"owner": "other-machine", "counter": 7, "boot": "elsewhere", "pid": os.getpid()}
    (tmp_path / "lease.json").write_text(json.dumps(foreign))
    with Lease(tmp_path, lambda: False) as lease:
        assert lease.owned
    assert not (tmp_path / "lease.json").exists()


STOPPED_OWNER = """
    import sys, time
    from pathlib import Path
    import capacity_gap.store.lease as lease
    lease.BEAT_S, lease.PATIENCE_S, lease.POLL_S = 0.1, 1.0, 0.05
    lease._dead_here = lambda found: False  # as on two machines: only the beats tell
    from capacity_gap.runtime.process import Runtime
    from capacity_gap.store.stage import Stage, Store

    def work(run):
        Path(sys.argv[1] + f".{sys.argv[2]}.at").touch()
        while not Path(sys.argv[1] + f".{sys.argv[2]}.go").exists():
            time.sleep(0.01)
            if sys.argv[3] == "reports":
                run.runtime.report(1, 2)
        (run.out / "x.txt").write_text("x")

    print(Store(sys.argv[1]).compute(Stage("s", 1, {}, {}, work), Runtime()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reports", "is silent"])
def test_an_owner_that_was_stopped_and_lost_its_lease_ends_quietly_and_spares_its_successor(tmp_path, kind):
    """The first is stopped at work, the second takes over, the first goes on and ends, then the second does."""
    store = tmp_path / "store"
    one = start_owner(store, "one", kind)
    wait_for(tmp_path / "store.one.at", one)
    one.send_signal(signal.SIGSTOP)
    two = start_owner(store, "two", kind)
    wait_for(tmp_path / "store.two.at", two)
    (place,) = (store / ".work").iterdir()
    (theirs,) = (p for p in place.glob(f"*-{two.pid}-*") if p.is_dir())
    (tmp_path / "store.one.go").touch()
    one.send_signal(signal.SIGCONT)
    if kind == "reports":  # it waits for its successor's result
        wait_until(lambda: not list(place.glob(f"*-{one.pid}-*")), one)
    else:
        assert one.wait(timeout=60) == 0
    assert theirs.is_dir()
    (tmp_path / "store.two.go").touch()
    ended = [worker.communicate(timeout=60) for worker in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], ended
    assert [err for _, err in ended] == ["", ""]
    assert ended[0][0] == ended[1][0]
    assert list((store / ".work").iterdir()) == []


def start_owner(store, name, kind):
    command = [sys.executable, "-c", textwrap.dedent(STOPPED_OWNER), str(store), name, kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(true, worker):
    while not true():
        assert worker.poll() is None
        time.sleep(0.01)


def test_a_torn_lease_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr("capacity_gap.store.lease.PATIENCE_S", 0.2)
    monkeypatch.setattr("capacity_gap.store.lease.POLL_S", 0.01)
    (tmp_path / "lease.json").write_text('{"owner": "some')
    with Lease(tmp_path, lambda: False) as lease:
        assert lease.owned


# A full disk, in each library's own words.
WRITES = {
    "json": lambda out: write_json(out / "x.json", {"a": "x" * 9_000_000}),
    "safetensors": lambda out: save_file({"a": torch.zeros(2_000_000)}, out / "x.safetensors"),
    "text": lambda out: (out / "x").write_text("x" * 9_000_000),
    "npy": lambda out: np.save(out / "x.npy", np.zeros(2_000_000)),
    "tofile": lambda out: np.zeros(2_000_000).tofile(out / "x.bin"),
    "torch": lambda out: torch.save(torch.zeros(2_000_000), out / "x.pt"),
    "parquet": lambda out: pd.DataFrame({"a": np.random.default_rng(0).random(2_000_000)}).to_parquet(out / "x"),
    "tokenizer": lambda out: tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"{n:0>30}": n for n in range(200_000)}, unk_token="0")
    ).save(str(out / "x.json")),
}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("how", WRITES)
def test_whatever_fills_the_disk_the_error_is_one_paragraph(small_disk, how):
    store, stage = Store(small_disk / "store"), Stage("s", 1, {}, {}, lambda run: WRITES[how](run.out))
    with pytest.raises(StageError, match="the disk is full: stage s/.*run the same command again"):
        store.compute(stage, Runtime())
    assert not store.has(stage)


@pytest.mark.parametrize("left", [0, 1, 2, 3, 5, 8])
def test_a_disk_that_is_full_before_the_first_stage_gives_the_paragraph_too(small_disk, left):
    """`left` pages of 4 kB: too few for the store's marker, for a lease, for a stage's folder or for its content."""
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(b"x" * 5_000_000)
    os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 4096 * left)
    stage = Stage("s", 1, {}, {}, lambda run: (run.out / "x").write_text("x" * 40_000))
    with pytest.raises(StageError, match="the disk is full: .*run the same command again"):
        Store(small_disk / "store").compute(stage, Runtime())
