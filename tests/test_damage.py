"""Damage in a store: it is named, moved to `.damaged/` and made again; what can be read goes on being read."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from capacity_gap import records
from capacity_gap.cell.pipeline import resolve
from capacity_gap.commands import cli
from capacity_gap.runner.plan import make_plan
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import Damaged
from capacity_gap.store import files
from capacity_gap.store.contents import note_sweep, sweeps
from capacity_gap.store.stage import Stage, Store
from capacity_gap.store.verify import verify
from tests.conftest import compose


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
    assert "0 damaged, 1 of an older version were given a list" in capsys.readouterr().out
    halve(store.path(base) / "inner" / "x.txt")
    assert not store.is_sound(base)


def test_verify_finds_one_flipped_byte_in_any_file_and_repair_sets_it_aside(chain, capsys):
    store, base, end, _ = chain
    note_sweep(store, "mine", {"record/r": {"name": "r", "overrides": ["student=60k"], "stages": {base.key: 1.0}}})
    (note,) = store.root.glob("sweeps/mine.*.json")
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
    assert f"set aside and not recomputed: {base.key}\n" in out
    assert not store.has(base)
    assert [s.key for s in store.lost(end)] == [base.key]
    assert verify(store).damaged == []
    flip(note)
    assert cli.main(["store", "verify", "--repair", str(store.root)]) == 0
    out = capsys.readouterr().out
    assert f"not recomputed: {base.key}\n" in out and f"not recomputed: sweeps/{note.name}\n" in out
    assert f"`status` cannot list the cells of {note.name} until" in out
    cli.main(["status", str(store.root)])
    assert f"{base.key}, sweeps/{note.name}" in capsys.readouterr().out
    store.compute(base, Runtime())
    cli.main(["status", str(store.root)])
    assert base.key not in capsys.readouterr().out


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
    ["store.json", "record/*/record.json", "record/*/stage.json", "sweeps/mine.*.json", "failed/*.json"],
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


@pytest.mark.parametrize(("damage", "said"), [(halve, "it has"), (flip, "it has the right size but different content")])
def test_export_names_what_is_damaged(used, tmp_path, capsys, damage, said):
    (weights,) = used.root.glob("distil/*/model.safetensors")
    damage(weights)
    record = min(used.root.glob("record/*"))
    assert cli.main(["export", record.name[:6], str(tmp_path / "out"), "--store", str(used.root)]) == 2
    assert f"{weights} is damaged: {said}" in capsys.readouterr().err
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


def rename_key(file: Path, key: str) -> None:
    """Changes one byte of one name."""
    file.write_text(file.read_text().replace(f'"{key}":', f'"{key[:-1]}{chr(ord(key[-1]) ^ 1)}":', 1))


def keys_of(file: Path) -> list[str]:
    """Every name in a JSON file that is no name of a file."""
    return sorted({key for key in re.findall(r'"([^"]*[a-z_0-9])":', file.read_text()) if "." not in key})


JSON = ["store.json", "sweeps/mine.*.json", "failed/*.json", "record/*/stage.json", "distil/*/stage.json"]


@pytest.mark.parametrize(
    "pattern", [p if i < 2 else pytest.param(p, marks=pytest.mark.slow) for i, p in enumerate(JSON)]
)
def test_a_changed_byte_in_any_key_is_named_and_stops_no_command(used, capsys, monkeypatch, tiny, pattern):
    file = min(used.root.glob(pattern))
    content = file.read_text()
    where = str(file.relative_to(used.root))
    cell = resolve(compose([*tiny, "student=40k", "teacher=55k", f"store={used.root}"]))
    for key in keys_of(file):
        rename_key(file, key)
        assert file.read_text() != content, key
        monkeypatch.setattr(files, "_named", set())
        for command in (["status", "--failed"], ["store", "ls"], ["store", "gc"]):
            assert cli.main([*command, str(used.root)]) in (0, 1)
        make_plan([cell], used)
        said = capsys.readouterr()
        assert where in said.err + said.out, key
        assert cli.main(["store", "verify", str(used.root)]) == 1
        assert f"damaged: {where} " in capsys.readouterr().out, key
        file.write_text(content)


OLDER = {
    "record": ["name", "version", "config", "inputs", "digest", "cost_flops", "passes", "wall_s", "created", "device"],
    "distil": ["inputs", "student", "seed", "float"],
}


@pytest.mark.parametrize("kind", OLDER)
def test_a_changed_key_in_a_stage_of_an_older_version_stops_no_command(used, capsys, tiny, kind):
    """It has no checksum: what is missed is named, the rest goes unseen but for the identity of the stage."""
    folder = min(used.root.glob(f"{kind}/*"))
    without_list(folder)
    content = (folder / "stage.json").read_text()
    cell = resolve(compose([*tiny, "student=40k", "teacher=55k", f"store={used.root}"]))
    for key in OLDER[kind]:
        rename_key(folder / "stage.json", key)
        for command in (["status", "--failed"], ["store", "ls"], ["store", "gc"], ["store", "verify"]):
            assert cli.main([*command, str(used.root)]) in (0, 1)
        make_plan([cell], used)
        (folder / "stage.json").write_text(content)
    capsys.readouterr()


def test_a_changed_key_in_the_list_of_files_is_damage(chain):
    store, base, *_ = chain
    rename_key(store.path(base) / "stage.json", "bytes")
    assert not store.is_sound(base)
    meta = json.loads((store.path(base) / "stage.json").read_text())
    files.write_checked(store.path(base) / "stage.json", meta)
    with pytest.raises(Damaged, match="differs from what was written"):
        files.check_sizes(store.path(base))


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_a_changed_key_in_the_header_of_tensors_is_found_in_older_stages(chain, key):
    store, base, *_ = chain
    weights = store.path(base) / "w.safetensors"
    save_file({"a": torch.zeros(3)}, weights)
    without_list(store.path(base))
    weights.write_bytes(weights.read_bytes().replace(key[:-1].encode() + key[-1:].encode(), f"{key[:-1]}X".encode()))
    assert not files.is_whole_file(weights)
    assert [error.file for error in verify(store).damaged] == [weights]


def test_a_record_whose_scores_have_changed_keys_is_left_out_and_named(used, capsys):
    file = min(used.root.glob("record/*/record.json"))
    row = json.loads(file.read_text())
    for metrics in ({"arc": {"valud": 1.0}}, {"arc": 1.0}, [1]):
        changed = {**row, "metrics": metrics}
        file.write_text(json.dumps(changed))
        files._named.clear()
        assert len(records.load(used.root)) == 2
        assert str(file.relative_to(used.root)) in capsys.readouterr().err


def test_what_has_been_made_again_since_it_was_hashed_stays(chain, monkeypatch):
    from capacity_gap.store import verify as module

    store, base, end, _ = chain
    note_sweep(store, "mine", {"record/r": {"name": "r", "overrides": [], "stages": {}}})
    real = {name: getattr(module, name) for name in ("fault_of_stage", "_fault_of_note")}

    def old_verdict(name):
        seen = set()

        def fault(path):
            if path in seen:
                return real[name](path)
            seen.add(path)
            return Damaged(path, "was damaged an hour ago")

        return fault

    for name in real:
        monkeypatch.setattr(module, name, old_verdict(name))
    found = verify(store, repair=True)
    assert (found.damaged, found.repaired) == ([], [])
    assert store.has(base)
    assert store.has(end)
    assert not store.damaged.exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_bad_sector_costs_the_file_and_not_the_verification(chain, monkeypatch, number):
    store, base, *_ = chain
    real = files.sha256

    def sha256(file):
        if file == store.path(base) / "inner" / "x.txt":
            raise OSError(number, os.strerror(number), str(file))
        return real(file)

    monkeypatch.setattr("capacity_gap.store.verify.sha256", sha256)
    found = verify(store)
    assert [(error.file.name, error.why) for error in found.damaged] == [
        ("x.txt", f"cannot be read ({os.strerror(number)})")
    ]
    assert found.stages == 2


def test_older_stages_are_verified_where_nothing_can_be_written(chain, monkeypatch):
    store, base, *_ = chain
    without_list(store.path(base))

    def refuse(path, value):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("capacity_gap.store.verify.write_checked", refuse)
    found = verify(store)
    assert (found.damaged, found.listed) == ([], 0)


def test_a_stage_that_is_deleted_while_it_is_listed_is_passed_over(chain, monkeypatch):
    store, base, *_ = chain
    without_list(store.path(base))
    real = files.listed

    def listed(folder):
        shutil.rmtree(folder)
        return real(folder)

    monkeypatch.setattr("capacity_gap.store.verify.listed", listed)
    found = verify(store)
    assert (found.damaged, found.listed) == ([], 0)


def test_what_could_not_be_repaired_names_who_is_at_it(chain, capsys):
    from capacity_gap.store.lease import Lease

    store, base, *_ = chain
    flip(store.path(base) / "y.json")
    with Lease(store.place(base.key), lambda: False) as held:
        assert cli.main(["store", "verify", "--repair", str(store.root)]) == 1
    assert f"{base.key}: {held.owner} is working on it ({held.file})" in capsys.readouterr().out
