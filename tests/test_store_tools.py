"""What is in a store, and that clearing it never takes what is needed."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from capacity_gap.commands import cli
from capacity_gap.runner.progress import failure_file
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import Damaged
from capacity_gap.store import lease
from capacity_gap.store.collect import Waste, delete, waste
from capacity_gap.store.contents import disk_use, list_sweeps, needed, note_sweep, size, sweep_id, sweeps, sweeps_of
from capacity_gap.store.files import write_checked
from capacity_gap.store.lease import Lease
from capacity_gap.store.stage import Stage, Store
from capacity_gap.store.verify import verify

CELL = {"name": "c", "overrides": ["student=60k"], "stages": {}}
UNBORN = f"record/{'0' * 20}"


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
            (place / "lease.json").write_text(json.dumps({"owner": "me", "boot": lease._boot_id(), "pid": pid}))
    return store


def test_waste_is_dead_work_then_signals_then_orphans(store):
    found = [(w.path.parent.name, w.reason.split()[0]) for w in waste(store)]
    assert found == [(".work", "checkpoints"), ("signal", "cached"), ("scores", "not")]
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
    note_sweep(store, "mine", {"record/unborn": {**CELL, "stages": {f"scores/{orphan.name}": 1.0}}})
    assert "scores" not in {w.path.parent.name for w in waste(store)}
    assert list_sweeps(store)[0][:3] == ("mine", 0, 1)


def test_a_grown_sweep_keeps_its_older_cells(store):
    note_sweep(store, "mine", {"record/a": CELL})
    note_sweep(store, "mine", {"record/b": CELL})
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
    assert "is not a store" in capsys.readouterr().err


def signal_key(store):
    (folder,) = store.root.glob("signal/*")
    return f"signal/{folder.name}"


def test_a_cached_signal_goes_only_when_the_last_cell_that_needs_it_is_recorded(store):
    key = signal_key(store)
    note_sweep(store, "mine", {UNBORN: {**CELL, "stages": {key: 1.0}}})
    assert "signal" not in {w.path.parent.name for w in waste(store)}
    (record,) = store.root.glob("record/*")
    note_sweep(store, "mine", {f"record/{record.name}": {**CELL, "stages": {key: 1.0}}})
    assert "signal" not in {w.path.parent.name for w in waste(store)}
    record.rename(store.root / UNBORN)
    (note,) = [f for f in store.root.glob("sweeps/mine*.json") if record.name in f.read_text()]
    note.unlink()
    assert "signal" in {w.path.parent.name for w in waste(store)}


def test_the_checkpoints_of_an_unfinished_cell_stay(store):
    note_sweep(store, "mine", {"record/unborn": {**CELL, "stages": {"distil/dead": 1.0}}})
    assert ".work" not in {w.path.parent.name for w in waste(store)}


def test_what_running_work_reads_stays(store):
    with Lease(store.place("distil/now"), lambda: False, needs=[signal_key(store)]):
        assert "signal" not in {w.path.parent.name for w in waste(store)}
    assert "signal" in {w.path.parent.name for w in waste(store)}


def test_a_stage_that_somebody_is_at_is_not_deleted(store):
    (item,) = [w for w in waste(store) if w.path.parent.name == "signal"]
    with Lease(item.place, lambda: False) as held:
        assert delete(item) == f"{held.owner} is working on it ({held.file})"
        assert item.path.exists()
    assert delete(item) == ""
    assert not item.path.exists()
    assert not item.place.exists()
    assert delete(item) == "it is gone"


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
    old = {"name": "mine", "id": "abc", "cells": {"record/a": {**CELL, "stages": {}}}}
    (store.root / "sweeps").mkdir()
    (store.root / "sweeps" / "mine.json").write_text(json.dumps(old))
    note_sweep(store, "mine", {"record/b": {**CELL, "stages": {}}})
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
    first, removed, kept = capsys.readouterr().out.splitlines()
    assert first == "forgotten: record/bad"
    assert removed == (
        "Removed: 1 failed cell from mine, and the records of their failures, unless another sweep has the cell."
    )
    assert kept.startswith("Kept: everything computed, checkpoints, logs and all other cells. ")
    assert cli.main(["store", "forget", str(store.root), "--failed", "mine"]) == 0
    assert capsys.readouterr().out == "No cell of a sweep has failed: nothing to forget.\n"
    assert set(sweeps(store)["mine"]) == {"record/later", f"record/{record.name}"}
    assert failed.exists(), "another sweep wants it"
    assert cli.main(["store", "forget", str(store.root), "--failed"]) == 0
    assert "other" not in sweeps(store)
    assert not failed.exists()
    with pytest.raises(SystemExit):
        cli.main(["store", "forget", str(store.root)])


def note_of(store, name):
    (note,) = store.root.glob(f"sweeps/{name}.*.json")
    return note


def kinds_of_waste(store):
    return {w.path.parent.name for w in waste(store)}


def rename_a_key(note):
    note.write_text(note.read_text().replace('"stages"', '"stagds"'))


def empty(note):
    note.write_text("")


@pytest.fixture
def unfinished(store):
    """A sweep with a cell that is not recorded: it needs the orphan, the signal and the dead work."""
    (orphan,) = store.root.glob("scores/*")
    stages = dict.fromkeys((f"scores/{orphan.name}", signal_key(store), "distil/dead"), 1.0)
    note_sweep(store, "mine", {UNBORN: {**CELL, "stages": stages}})
    return store


@pytest.mark.parametrize("damage", [empty, rename_a_key])
def test_a_damaged_note_keeps_whatever_its_cells_may_need(unfinished, capsys, damage):
    store, note = unfinished, note_of(unfinished, "mine")
    content = note.read_text()
    damage(note)
    assert list(waste(store)) == []
    assert f"{note.relative_to(store.root)} may name is kept: it is damaged" in capsys.readouterr().err
    assert cli.main(["store", "verify", "--repair", str(store.root)]) == 0
    capsys.readouterr()
    assert not note.exists()
    assert cli.main(["store", "gc", "--yes", str(store.root)]) == 0
    told = capsys.readouterr()
    assert "0 items" in told.out
    assert "may name is kept: it was set aside as damaged. Run its sweep or cell again" in told.err
    assert len(list(store.damaged.iterdir())) == 1
    note_sweep(store, "mine", json.loads(content)["cells"])
    assert kinds_of_waste(store) == {".damaged"}, "what is noted again is no longer needed twice"


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("damage", ["", "a key"])
def test_what_a_damaged_stage_that_no_note_names_was_made_from_is_kept(store, repair, damage):
    """Of single records in a store whose notes are gone: a chain with a missing link does not make its start waste."""
    (teacher,), (middle,) = store.root.glob("teacher/*"), store.root.glob("scores/*")
    (record,) = store.root.glob("record/*")
    meta = json.loads((record / "stage.json").read_text())
    meta["inputs"] = {"base": f"scores/{middle.name}"}
    write_checked(record / "stage.json", meta)
    (middle / "stage.json").write_text(damage and (middle / "stage.json").read_text().replace('"inputs"', '"inputt"'))
    if repair:
        store.set_aside(middle, Damaged(middle / "stage.json", "is damaged"))
    assert "teacher" not in kinds_of_waste(store)
    assert teacher.exists()


def test_other_damaged_files_that_were_set_aside_are_waste(store):
    store.damaged.mkdir()
    (store.damaged / "failed-abc.json.a1b2c3").write_text("")
    assert ".damaged" in kinds_of_waste(store)


def test_a_recorded_cell_with_a_stage_that_was_set_aside_is_unfinished(store):
    """It will be made again, from its checkpoints and its signal."""
    (record,) = store.root.glob("record/*")
    distilled = f"distil/{'1' * 20}"
    stages = {signal_key(store): 1.0, distilled: 1.0}
    (store.work / distilled.replace("/", "-") / "me").mkdir(parents=True)
    note_sweep(store, "mine", {f"record/{record.name}": {**CELL, "stages": stages}})
    assert "signal" in kinds_of_waste(store)
    store.damaged.mkdir()
    (store.damaged / f"{distilled.replace('/', '-')}.a1b2c3").mkdir()
    left = {w.path.name for w in waste(store)}
    assert signal_key(store).split("/")[1] not in left
    assert distilled.replace("/", "-") not in left
    (store.root / distilled).mkdir(parents=True)
    shutil.copy(record / "stage.json", store.root / distilled)
    assert {"signal", ".damaged"} <= kinds_of_waste(store)


def test_what_a_grid_that_started_meanwhile_needs_is_not_deleted(store):
    items = {w.path.parent.name: w for w in waste(store)}
    (orphan,) = store.root.glob("scores/*")
    note_sweep(store, "mine", {UNBORN: {**CELL, "stages": {f"scores/{orphan.name}": 1.0, "distil/dead": 1.0}}})
    with Lease(store.place("distil/now"), lambda: False, needs=[signal_key(store)]):
        assert [delete(items[kind]) for kind in ("scores", ".work", "signal")] == ["it is needed again"] * 3
    assert delete(items["signal"]) == ""


def test_a_note_keeps_its_name_so_that_a_reader_always_finds_it(store):
    note_sweep(store, "mine", {"record/a": CELL})
    before = note_of(store, "mine")
    note_sweep(store, "mine", {"record/b": CELL})
    note_sweep(store, "mine", {"record/a": CELL})
    assert before.exists()
    assert len(list(store.root.glob("sweeps/*"))) == 2


def test_a_sweep_with_a_slash_in_its_name_is_one_sweep(store):
    for _ in range(2):
        note_sweep(store, "a/b", {"record/a": CELL})
    note_sweep(store, "a/b", {"record/b": CELL})
    assert len(list(store.root.glob("sweeps/*"))) == 2
    assert len({json.loads(f.read_text())["id"] for f in store.root.glob("sweeps/*")}) == 1
    assert sweep_id(store, "a/b") == sweep_id(store, "a-b") in note_of_any(store)


def note_of_any(store):
    return min(store.root.glob("sweeps/*")).read_text()


def test_a_deletion_that_was_killed_is_ended_by_the_next_one(store, monkeypatch, capsys):
    monkeypatch.setattr("capacity_gap.store.collect.shutil.rmtree", lambda *args, **kwargs: None)
    (signal,) = [w for w in waste(store) if w.path.parent.name == "signal"]
    assert "is left of it" in delete(signal)
    monkeypatch.undo()
    assert "half-deleted" in {kind for kind, *_ in disk_use(store)}
    assert cli.main(["store", "gc", "--yes", str(store.root)]) == 0
    assert "(half-deleted)" in capsys.readouterr().out
    assert list(store.root.glob("*/.deleted-*")) == []


def test_what_may_not_be_deleted_is_said(store, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("capacity_gap.store.collect._hide", refuse)
    assert cli.main(["store", "gc", "--yes", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert out.count("(not deleted: Permission denied)") == 3
    assert "0 items, 0.0 MB deleted" in out


def test_a_folder_that_goes_while_it_is_measured_counts_nothing(store, monkeypatch):
    real = os.walk

    def walk(top, *args, **kwargs):
        for folder, folders, names in real(top, *args, **kwargs):
            if "checkpoint" in folders:
                shutil.rmtree(os.path.join(folder, "checkpoint"))
            yield folder, folders, names

    monkeypatch.setattr(os, "walk", walk)
    assert size(store.work / "distil-dead") == 0


def test_a_stage_of_another_program_is_none_of_ours(store):
    (record,) = store.root.glob("record/*")
    shutil.copytree(record, store.root / "exports" / "mine")
    (store.root / "exports" / "half").mkdir()
    assert "exports" not in kinds_of_waste(store)
    assert verify(store, repair=True).damaged == []
    assert (store.root / "exports" / "half").exists()


def test_a_dead_owner_elsewhere_and_a_torn_lease_are_watched_and_then_collected(store, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_S", 0.3)
    monkeypatch.setattr(lease, "POLL_S", 0.01)
    for name, text in (("dead", '{"owner": "gone-1-a", "boot": "elsewhere", "pid": 1}'), ("torn", "{}")):
        place = store.work / f"distil-{name}"
        place.mkdir(exist_ok=True)
        (place / "lease.json").write_text(text)
    assert {w.path.name for w in waste(store)} >= {"distil-dead", "distil-torn"}
    assert cli.main(["store", "gc", "--yes", str(store.root)]) == 0
    assert {p.name for p in store.work.iterdir()} == {"distil-live"}


def test_an_owner_elsewhere_that_beats_keeps_what_it_reads(store, monkeypatch):
    monkeypatch.setattr(lease, "POLL_S", 0.01)
    place = store.work / "distil-far"
    place.mkdir()
    beats = 0

    def beating(folder):
        nonlocal beats
        beats += 1
        known = {"owner": "far-1-a", "counter": beats, "boot": "elsewhere", "pid": 1, "needs": [signal_key(store)]}
        (place / "lease.json").write_text(json.dumps(known))
        return real(folder)

    real = lease._read
    monkeypatch.setattr(lease, "_read", beating)
    assert "signal" not in kinds_of_waste(store)
    assert delete(Waste(place, 1, "", place)) == f"far-1-a is working on it ({place / 'lease.json'})"


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
