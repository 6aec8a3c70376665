"""What is in a store, and that clearing it never takes what is needed."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from capacity_gap.commands import cli
from capacity_gap.runner.progress import failure_file
from capacity_gap.runtime.process import Runtime
from capacity_gap.store.contents import (
    Waste,
    delete,
    disk_use,
    list_sweeps,
    needed,
    note_sweep,
    sweep_id,
    sweeps,
    sweeps_of,
    waste,
)
from capacity_gap.store.lease import Lease
from capacity_gap.store.stage import Stage, Store


def write(run):
    (run.out / "x.txt").write_text("x" * 1000)


@pytest.fixture
def store(tmp_path):
    """A record made from a base, an orphan, a cached signal, dead work and live work."""
    store = Store(tmp_path / "store")
    base = Stage("teacher", 1, {"a": 1}, {}, write)
    for stage in (
        Stage("record", 1, {}, {"base": base}, write),
        Stage("scores", 1, {"orphan": True}, {"base": base}, write),
        Stage("signal", 1, {}, {"base": base}, write),
    ):
        store.compute(stage, Runtime())
    for name, pid in (("dead", None), ("live", os.getpid())):
        place = store.work / f"distil-{name}"
        (place / "me" / "checkpoint").mkdir(parents=True)
        (place / "me" / "checkpoint" / "state").write_text("y" * 500)
        if pid:
            (place / "lease.json").write_text(json.dumps({"owner": "me", "boot": "elsewhere", "pid": pid}))
    return store


def test_waste_is_dead_work_then_signals_then_orphans(store):
    found = [(w.path.parent.name, w.reason.split()[0]) for w in waste(store)]
    assert found == [(".work", "checkpoints"), ("signal", "cached"), ("scores", "no")]
    assert "distil-dead" in str(next(waste(store)).path)


def test_collecting_is_dry_unless_told(store, capsys):
    assert cli.main(["store", "gc", str(store.root)]) == 0
    assert "3 items" in capsys.readouterr().out
    assert len(list(waste(store))) == 3
    assert cli.main(["store", "gc", str(store.root), "--yes"]) == 0
    assert list(waste(store)) == []
    assert len(list(store.root.glob("record/*"))) == 1
    assert len(list(store.root.glob("teacher/*"))) == 1
    assert (store.work / "distil-live").exists()


def test_a_stage_that_a_started_sweep_still_needs_is_kept(store):
    (orphan,) = store.root.glob("scores/*")
    note_sweep(store, "mine", {"record/unborn": {"stages": [f"scores/{orphan.name}"]}})
    assert "scores" not in {w.path.parent.name for w in waste(store)}
    assert list_sweeps(store)[0][:3] == ("mine", 0, 1)


def test_a_grown_sweep_keeps_its_older_cells(store):
    note_sweep(store, "mine", {"record/a": {}})
    note_sweep(store, "mine", {"record/b": {}})
    assert list_sweeps(store)[0][:3] == ("mine", 0, 2)


def test_disk_use_counts_every_byte(store):
    rows = {kind: (count, size) for kind, count, size in disk_use(store)}
    assert rows["teacher"][0] == 1
    assert rows["teacher"][1] > 1000
    total = sum(f.stat().st_size for f in store.root.rglob("*") if f.is_file())
    assert sum(size for _, size in rows.values()) == total - (store.root / "store.json").stat().st_size


def test_needed_follows_inputs_only(store):
    from capacity_gap.store.contents import entries

    found = entries(store)
    (record,) = (k for k in found if k.startswith("record/"))
    assert {k.split("/")[0] for k in needed([record], found)} == {"record", "teacher"}


def test_deleting_is_whole(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "x").write_text("x")
    delete(Waste(tmp_path / "s", 1, ""))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_store_is_said(tmp_path, capsys):
    assert cli.main(["store", "du", str(tmp_path)]) == 2
    assert "is no store" in capsys.readouterr().err


SIGNAL_CELL = {"name": "c", "overrides": ["student=60k"]}


def signal_key(store):
    (folder,) = store.root.glob("signal/*")
    return f"signal/{folder.name}"


def test_a_cached_signal_goes_only_when_the_last_cell_that_needs_it_is_recorded(store):
    key = signal_key(store)
    note_sweep(store, "mine", {"record/unborn": {**SIGNAL_CELL, "stages": {key: 1.0}}})
    assert "signal" not in {w.path.parent.name for w in waste(store)}
    (record,) = store.root.glob("record/*")
    note_sweep(store, "mine", {f"record/{record.name}": {**SIGNAL_CELL, "stages": {key: 1.0}}})
    assert "signal" not in {w.path.parent.name for w in waste(store)}
    record.rename(record.with_name("unborn"))
    note_sweep(store, "mine", {"record/unborn": {**SIGNAL_CELL, "stages": {key: 1.0}}})
    (note,) = [f for f in store.root.glob("sweeps/mine*.json") if record.name in f.read_text()]
    note.unlink()
    assert "signal" in {w.path.parent.name for w in waste(store)}


def test_the_checkpoints_of_an_unfinished_cell_stay(store):
    note_sweep(store, "mine", {"record/unborn": {**SIGNAL_CELL, "stages": {"distil/dead": 1.0}}})
    assert ".work" not in {w.path.parent.name for w in waste(store)}


def test_what_running_work_reads_stays(store):
    with Lease(store.place("distil/now"), lambda: False, needs=[signal_key(store)]):
        assert "signal" not in {w.path.parent.name for w in waste(store)}
    assert "signal" in {w.path.parent.name for w in waste(store)}


def test_a_stage_that_somebody_is_at_is_not_deleted(store):
    (item,) = [w for w in waste(store) if w.path.parent.name == "signal"]
    with Lease(item.place, lambda: False):
        assert not delete(item)
        assert item.path.exists()
    assert delete(item)
    assert not item.path.exists()
    assert not item.place.exists()
    assert not delete(item), "it is gone already"


def test_stray_files_and_links_do_not_stop_collecting(store, tmp_path, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("precious")
    (store.work / "stray").write_text("x")
    (store.work / "link").symlink_to(outside)
    (store.work / "dangling").symlink_to(tmp_path / "nothing")
    (store.root / "scores" / "link").symlink_to(outside)
    assert cli.main(["store", "gc", str(store.root), "--yes"]) == 0
    assert {p.name for p in store.work.iterdir()} == {"distil-live"}
    assert (outside / "mine").exists()


NOTING = """
    import sys
    from capacity_gap.store.stage import Store
    from capacity_gap.store.contents import note_sweep
    store, n = Store(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    sys.stdin.readline()
    for again in range(5):
        note_sweep(store, "single", {f"record/{n}-{again}": {"name": n, "overrides": [], "stages": {}}})
"""


def test_processes_that_note_cells_at_once_lose_none(store):
    made = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(NOTING), str(store.root), str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(20)
    ]
    assert [p.stdout.readline() for p in made] == ["ready\n"] * 20
    for p in made:
        p.stdin.write("go\n")
        p.stdin.flush()
    assert [p.communicate(timeout=60) and p.returncode for p in made] == [0] * 20
    assert len(sweeps(store)["single"]) == 100


def test_what_older_versions_noted_is_read_beside_what_is_noted_now(store):
    old = {"name": "mine", "id": "abc", "cells": {"record/a": {**SIGNAL_CELL, "stages": {}}}}
    (store.root / "sweeps").mkdir()
    (store.root / "sweeps" / "mine.json").write_text(json.dumps(old))
    note_sweep(store, "mine", {"record/b": {**SIGNAL_CELL, "stages": {}}})
    assert set(sweeps(store)["mine"]) == {"record/a", "record/b"}
    assert sweep_id(store, "mine") == "abc"
    assert sweeps_of(store, "record/a") == ["mine"]


def test_forgetting_takes_what_failed_and_nothing_else(store, capsys):
    (record,) = store.root.glob("record/*")
    cells = {k: {"name": k, "overrides": [], "stages": {}} for k in ("record/bad", "record/later")}
    note_sweep(store, "mine", {**cells, f"record/{record.name}": {"name": "good", "overrides": [], "stages": {}}})
    note_sweep(store, "other", {"record/bad": cells["record/bad"]})
    failed = failure_file(store, "record/bad")
    failed.parent.mkdir()
    failed.write_text(json.dumps({"cell": "bad", "status": "failed", "error": "boom"}))
    assert cli.main(["store", "forget", str(store.root), "--failed", "nope"]) == 2
    assert "'nope' is not known. Allowed: mine, other" in capsys.readouterr().err
    assert cli.main(["store", "forget", str(store.root), "--failed", "mine"]) == 0
    assert capsys.readouterr().out == "forgotten: record/bad\n1 failed cells forgotten.\n"
    assert set(sweeps(store)["mine"]) == {"record/later", f"record/{record.name}"}
    assert failed.exists(), "another sweep wants it"
    assert cli.main(["store", "forget", str(store.root), "--failed"]) == 0
    assert "other" not in sweeps(store)
    assert not failed.exists()
    with pytest.raises(SystemExit):
        cli.main(["store", "forget", str(store.root)])


@pytest.mark.slow
def test_a_grid_with_cached_signals_ends_well_beside_collecting_again_and_again(tiny, tmp_path):
    from tests.conftest import ROOT

    given = ["student=40k,45k", "teacher=55k", "data=30k", "distill.signal=topk", "distill.signal_size=32"]
    command = [sys.executable, str(ROOT / "run.py"), "-m", *tiny, *given, f"store={tmp_path}"]
    rounds = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as grid:
        while grid.poll() is None:
            if (tmp_path / "store.json").exists():
                assert cli.main(["store", "gc", str(tmp_path), "--yes"]) == 0
                rounds += 1
        assert grid.returncode == 0, grid.stdout.read()
    assert rounds > 20
    assert len(list(tmp_path.glob("record/*/record.json"))) == 2
