"""Damage in a store: it is named, moved to `.damaged/` and made again; what can be read goes on being read."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from capacity_gap import records
from capacity_gap.commands import cli
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import Damaged
from capacity_gap.store import files
from capacity_gap.store.contents import note_sweep, sweeps
from capacity_gap.store.stage import Stage, Store
from capacity_gap.store.verify import verify


def writing(calls, content="x" * 1000):
    def write(run):
        calls.append(run.digest)
        (run.out / "inner").mkdir()
        (run.out / "inner" / "x.txt").write_text(content)
        (run.out / "y.json").write_text("{}")

    return write


@pytest.fixture(autouse=True)
def _tells_anew(monkeypatch):
    """Each damaged file is named once a process; here each test is one."""
    monkeypatch.setattr(files, "_named", set())


@pytest.fixture
def chain(tmp_path):
    """A store with a base and an end made from it, and how often each was computed."""
    calls: list[str] = []
    base = Stage("base", 1, {"a": 0.5}, {}, writing(calls))
    end = Stage("end", 1, {}, {"base": base}, writing(calls))
    store = Store(tmp_path / "store")
    store.compute(end, Runtime())
    return store, base, end, calls


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x15
    file.write_bytes(content)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    file.write_bytes(b"")


def test_a_stage_lists_the_size_and_hash_of_each_of_its_files(chain):
    store, base, *_ = chain
    meta = json.loads((store.path(base) / "stage.json").read_text())
    known = hashlib.sha256(b"x" * 1000).hexdigest()
    assert meta["files"]["inner/x.txt"] == {"bytes": 1000, "sha256": known}
    assert set(meta["files"]) == {"inner/x.txt", "y.json"}


@pytest.mark.parametrize("damage", [zero, halve, os.remove])
@pytest.mark.parametrize("name", ["inner/x.txt", "y.json", "stage.json"])
def test_a_damaged_input_is_named_moved_and_made_again_in_the_same_run(chain, capsys, damage, name):
    store, base, _, calls = chain
    damage(store.path(base) / name)
    other = Stage("other", 1, {}, {"base": base}, writing(calls))
    store.compute(other, Runtime())
    assert calls.count(base.digest) == 2
    assert f"base/{base.digest}/{name} is damaged: it " in capsys.readouterr().err
    assert [p.name.rpartition(".")[0] for p in store.damaged.iterdir()] == [f"base-{base.digest}"]
    files.check_sizes(store.path(base))


def test_a_damaged_result_is_made_again_and_its_inputs_are_not(chain):
    store, base, end, calls = chain
    halve(store.path(end) / "inner" / "x.txt")
    assert store.has(end), "a plan looks names up and reads nothing"
    store.compute(end, Runtime())
    assert (calls.count(base.digest), calls.count(end.digest)) == (1, 2)


def test_an_input_that_is_deleted_while_it_is_needed_is_made_again(tmp_path):
    calls: list[str] = []
    store, base = Store(tmp_path), Stage("signal", 1, {}, {}, writing(calls))

    def unlucky(run):
        if len(calls) == 1:
            shutil.rmtree(run.inputs["base"])
        (run.out / "x").write_text((run.inputs["base"] / "y.json").read_text())

    assert store.compute(Stage("end", 1, {}, {"base": base}, unlucky), Runtime()).exists()
    assert len(calls) == 2
    assert list(store.work.iterdir()) == []


def test_an_error_of_the_stage_itself_is_not_tried_again(tmp_path):
    calls: list[str] = []

    def fail(run):
        calls.append("fail")
        raise RuntimeError("boom")

    base = Stage("base", 1, {}, {}, writing([]))
    with pytest.raises(RuntimeError, match="boom"):
        Store(tmp_path).compute(Stage("end", 1, {}, {"base": base}, fail), Runtime())
    assert calls == ["fail"]


def without_list(folder: Path) -> None:
    meta = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in ("files", "checksum")}))


def test_a_stage_of_an_older_version_stays_valid_and_gets_its_list(chain, capsys):
    store, base, _, calls = chain
    without_list(store.path(base))
    store.compute(Stage("other", 1, {}, {"base": base}, writing(calls)), Runtime())
    assert calls.count(base.digest) == 1
    assert cli.main(["store", "verify", str(store.root)]) == 0
    assert "0 damaged, 1 of an older version got their list" in capsys.readouterr().out
    halve(store.path(base) / "inner" / "x.txt")
    assert not store.is_sound(base)


def test_verify_finds_one_flipped_byte_in_any_file_and_repair_sets_it_aside(chain, capsys):
    store, base, end, _ = chain
    note_sweep(store, "mine", {"record/r": {"name": "r", "overrides": ["student=60k"], "stages": {base.key: 1.0}}})
    (note,) = store.root.glob("sweeps/mine.json")
    everything = [store.marker, note, *(p for s in (base, end) for p in store.path(s).rglob("*") if p.is_file())]
    for file in everything:
        content = file.read_bytes()
        flip(file)
        assert cli.main(["store", "verify", str(store.root)]) == 1, file
        assert f"damaged: {file.relative_to(store.root)} " in capsys.readouterr().out
        file.write_bytes(content)
    flip(store.path(base) / "inner" / "x.txt")
    assert cli.main(["store", "verify", "--repair", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert f"python run.py student=60k store={store.root}" in out
    assert not store.has(base)
    assert [s.key for s in store.lost(end)] == [base.key]
    assert verify(store).damaged == []


def test_verify_leaves_what_somebody_is_at(chain):
    from capacity_gap.store.lease import Lease

    store, base, *_ = chain
    flip(store.path(base) / "y.json")
    with Lease(store.place(base.key), lambda: False):
        assert not verify(store, repair=True).is_sound
    assert store.has(base)


def test_errors_of_damage_survive_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(Damaged(Path("/s/x"), "is empty")))
    assert (error.file, error.why, str(error)[:22]) == (Path("/s/x"), "is empty", "/s/x is damaged: it is")


COMMANDS = [
    ["status", "{store}"],
    ["status", "{store}", "--failed"],
    ["store", "ls", "{store}"],
    ["store", "du", "{store}"],
    ["store", "gc", "{store}"],
    ["fit", "{store}"],
    ["report", "{store}", "--out", "{out}"],
]


@pytest.fixture
def used(tiny_cell, tmp_path):
    """A copy of a finished store, with a sweep and a failed cell."""
    store = Store(shutil.copytree(tiny_cell.store_path, tmp_path / "used"))
    (record,) = store.root.glob("record/*")
    second = shutil.copytree(record, record.with_name("f" * 20)) / "record.json"
    second.write_text(json.dumps({**json.loads(second.read_text()), "cell": second.parent.name, "seed": 1}))
    note_sweep(store, "mine", {f"record/{record.name}": {"name": "a", "overrides": [], "stages": {}}})
    note_sweep(store, "other", {"record/gone": {"name": "b", "overrides": [], "stages": {}}})
    row = {"cell": "gone", "status": "failed", "error": "boom"}
    (store.root / "failed").mkdir(exist_ok=True)
    files.write_checked(store.root / "failed" / "gone.json", row)
    return store


@pytest.mark.parametrize("damage", [zero, halve])
@pytest.mark.parametrize(
    "pattern",
    ["store.json", "record/*/record.json", "record/*/stage.json", "sweeps/mine.json", "failed/*.json"],
)
def test_a_damaged_file_costs_itself_and_every_command_goes_on(used, tmp_path, capsys, damage, pattern, monkeypatch):
    file = min(used.root.glob(pattern))
    damage(file)
    named = 0
    for command in COMMANDS:
        monkeypatch.setattr(files, "_named", set())
        given = [word.format(store=used.root, out=tmp_path / "r.html") for word in command]
        assert cli.main(given) in (0, 1), given  # 1: status of a store with a failed cell
        said = capsys.readouterr()
        named += str(file.relative_to(used.root)) in said.err
        assert said.err.count("\n") <= 1, "one line says what was left out"
    assert named
    assert len(records.read(used.root)) == 3 - (pattern.endswith("record.json") or pattern.startswith("failed"))
    assert set(sweeps(used)) == {"mine", "other"} - ({"mine"} if "sweeps" in pattern else set())


def test_a_store_without_its_marker_is_read_and_gets_it_back(used, capsys):
    used.marker.unlink()
    assert cli.main(["store", "ls", str(used.root)]) == 0
    assert "store.json is missing" in capsys.readouterr().err
    used.create()
    assert json.loads(used.marker.read_text())["schema"] == 1


def test_export_names_what_is_damaged(used, tmp_path, capsys):
    (weights,) = used.root.glob("distil/*/model.safetensors")
    halve(weights)
    record = min(used.root.glob("record/*"))
    assert cli.main(["export", record.name[:6], str(tmp_path / "out"), "--store", str(used.root)]) == 2
    assert f"{weights} is damaged: it has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_command_makes_again_what_verify_set_aside(tiny_cell, tmp_path):
    config = dataclasses.replace(tiny_cell, store=str(shutil.copytree(tiny_cell.store_path, tmp_path / "s")))
    (weights,) = tmp_path.glob("s/teacher/*/model.safetensors")
    content = weights.read_bytes()
    with weights.open("r+b") as stream:  # 4 kB in the middle
        stream.seek(len(content) // 2)
        stream.write(bytes(b ^ 0x15 for b in content[len(content) // 2 :][:4096]))
    assert cli.main(["store", "verify", config.store]) == 1
    assert cli.main(["store", "verify", config.store, "--repair"]) == 0
    assert not weights.exists()
    run_config(config)
    assert weights.read_bytes() == content
    assert cli.main(["store", "verify", config.store]) == 0
