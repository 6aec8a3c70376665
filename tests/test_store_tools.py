"""What is in a store, and that clearing it never takes what is needed."""

import json
import os

import pytest

from capacity_gap import cli
from capacity_gap.runtime import Runtime
from capacity_gap.stage import Stage, Store
from capacity_gap.store_tools import Waste, delete, disk_use, list_sweeps, needed, note_sweep, waste


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
    from capacity_gap.store_tools import entries

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
