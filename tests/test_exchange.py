"""Records that are sent: what is exported is believed, and whatever is wrong with a file refuses all of it."""

import csv
import functools
import hashlib
import os
import re
import shutil
import sys

import pandas as pd
import pytest

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.commands import cli
from capacity_gap.records.claims import EXPORTED, IDENTITY, MEASURED, NOT_EXPORTED, PROVENANCE, write_rows
from capacity_gap.records.record import NESTED, columns
from capacity_gap.runner import claimed_grid
from capacity_gap.runner.claimed_grid import claimed_cells
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.contents import note_sweep
from capacity_gap.store.stage import Store
from tests.conftest import ROOT, run_here

PAGE = ROOT / "docs" / "study2_registration.md"
AXES = "student=3m,4m teacher=5m,7m,10m,14m,20m,28m,40m,50m data=10m,40m"
WORDS = "family=small corpus=fineweb_edu train.recipe=small prune.multiple=8 registration=docs/study2_registration.md"
GRID = f"{WORDS} {AXES}"


@pytest.fixture(autouse=True)
def _composed_once(monkeypatch):
    """Composing a grid takes longer than all else."""
    monkeypatch.setattr(claimed_grid, "claimed_cells", known_cells)


@functools.cache
def _known_cells(words):
    return claimed_cells(words)


def known_cells(words):
    return _known_cells(tuple(words))


@pytest.fixture(scope="module")
def claims():
    return known_cells(GRID.split())


@pytest.fixture(scope="module")
def sound(claims):
    """Rows as an export has them: what settings decide, and measurements that could be."""
    measured = {"student_loss": 3.5, "teacher_loss": 3.2, "init_loss": 6.0, "teacher_entropy": 3.1}
    measured |= {"held_out_tokens": 300_000, "student_loss_stderr": 0.01, "device": "NVIDIA H100 80GB HBM3"}
    measured |= {"student_bits_per_byte": 3.5 / 4, "created": "2026-12-01T10:00:00+00:00", "threads": 1, "ranks": 1}
    rows = []
    for digest, claim in claims.items():
        row = dict.fromkeys(EXPORTED) | dict(claim.columns) | measured
        row |= {"cell": digest, "schema_version": records.SCHEMA_VERSION, "status": "done", "trained": claim.trained}
        row |= {"stored_params": claim.columns["student_params"], "version/torch": "2.11.0"}
        rows.append(row | {"registration": claim.registration, "metrics/pico_cloze": 0.6})
    return rows


def sent(rows, folder, name="sent.csv"):
    write_rows(rows, folder / name)
    return folder / name


def imported(file, folder, *, origin="lab-a", grid=GRID):
    return cli.main(["records", "import", str(file), "--origin", origin, "--grid", grid, "--out", str(folder)])


def changed(rows, **values):
    """The rows with other values in the fourth."""
    return [{**row, **values} if i == 3 else row for i, row in enumerate(rows)]


def test_sound_rows_are_added_with_their_origin_and_again_they_change_nothing(sound, tmp_path, capsys):
    file = sent(sound[:20], tmp_path)
    assert imported(file, tmp_path / "in") == 0
    said = capsys.readouterr().out
    assert "20 of 32 cells of this grid, 20 of them new" in said and "Not there from lab-a:" in said
    frame = records.load(tmp_path / "in")
    assert set(frame["origin"]) == {"lab-a"} and len(frame) == 20
    before = (tmp_path / "in" / "lab-a.csv").read_bytes()
    assert imported(file, tmp_path / "in") == 0
    assert (tmp_path / "in" / "lab-a.csv").read_bytes() == before
    assert imported(sent(sound[10:], tmp_path), tmp_path / "in") == 0
    assert "22 of 32 cells of this grid, 12 of them new" in capsys.readouterr().out
    assert len(records.load(tmp_path / "in")) == 32


BAD = {
    "a digest of another grid": (
        {"cell": "0" * 20},
        "is no cell of this grid as this checkout composes it: other settings, or another version of the code",
    ),
    "another teacher under the digest": ({"teacher": "50m"}, "teacher: 50m, where 3m from 7m"),
    "sizes off the ladder": ({"teacher_params": 10_000_000}, "teacher_params: 10000000, where"),
    "another rate": ({"learning_rate": 0.01}, "learning_rate: 0.01, where"),
    "a setting that the grid has not": ({"reference": "50m"}, "reference: 50m, where"),
    "another student": ({"trained": "1" * 20}, "trained: 11111111111111111111, where"),
    "no registration": ({"registration": None}, "registration: none, where the page of this grid has"),
    "another registration": ({"registration": "ab" * 32}, "registration: abababab…"),
    "an infinite loss": ({"student_loss": float("inf")}, "student_loss: 'inf' is not finite"),
    "a loss below zero": ({"student_loss": -1.0}, "student_loss: -1.0 is impossible"),
    "a loss that is none": ({"student_loss": None}, "student_loss: a finished cell has one"),
    "more entropy than tokens allow": ({"teacher_entropy": 9.5}, "8,192 tokens have at most 9.011 nats"),
    "text for a number": ({"teacher_loss": "low"}, "teacher_loss: 'low' is no number"),
    "half a token": ({"held_out_tokens": 0.5}, "held_out_tokens: '0.5' is no whole number"),
    "a failed cell": ({"status": "failed"}, "status: failed, where"),
    "an older schema": ({"schema_version": 0}, "schema_version: 0, where"),
    "an unknown column": ({"wins": 1}, "unknown columns: wins"),
    "an own origin": ({"origin": "lab-b"}, "origin: lab-b, where --origin is lab-a"),
    "another text": ({"student_bits_per_byte": 0.9}, "not the same text"),
    "fewer held-out tokens": ({"held_out_tokens": 200_000}, "has 200000 tokens, that of lab-a 300000"),
    "no bits per byte beside others": ({"student_bits_per_byte": None}, "student_bits_per_byte is empty, and other"),
    "another size in its files": ({"stored_params": 2_000_000}, "stored_params: 2000000, where the shape of 3m"),
    "no error at all": ({"student_loss_stderr": 0.0}, "student_loss_stderr: 0.0 is impossible"),
    "an error above the loss": ({"student_loss_stderr": 3.6}, "3.6 is impossible; it is above zero and below the loss"),
    "more than all answers right": ({"metrics/pico_cloze": 1.2}, "metrics/pico_cloze: 1.2 is impossible"),
    "an error of more than all": ({"metrics/pico_cloze/stderr": -0.1}, "metrics/pico_cloze/stderr: -0.1 is impossible"),
    "no date": ({"created": "yesterday"}, "created: yesterday is no date"),
    "signs that move a cursor": ({"device": "H100\x1b[2J"}, "[2J' is too long or holds signs"),
}


@pytest.mark.parametrize(("values", "said"), BAD.values(), ids=BAD)
def test_whatever_is_wrong_refuses_the_whole_file(sound, tmp_path, capsys, values, said):
    assert imported(sent(changed(sound, **values), tmp_path), tmp_path / "in") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "in").exists()


def test_all_faults_are_listed_at_once(sound, tmp_path, capsys):
    rows = changed(sound, student_loss=-1.0, teacher="50m")
    rows[7] = {**rows[7], "cell": "f" * 20}
    file = sent([{k: v for k, v in row.items() if k != "device"} for row in rows], tmp_path)
    assert imported(file, tmp_path / "in") == 2
    said = capsys.readouterr().err
    assert "nothing was imported, for 4 faults:" in said and "lacks the columns device" in said
    assert said.count("sent.csv, line 5, ") == 2 and "sent.csv, line 9: ffff" in said


def test_a_cell_may_come_twice_but_not_with_two_results(sound, tmp_path, capsys):
    assert imported(sent([*sound[:4], sound[0]], tmp_path), tmp_path / "in") == 0
    again = {**sound[0], "student_loss": 3.6, "student_bits_per_byte": 0.9}
    assert imported(sent([*sound[:4], again], tmp_path), tmp_path / "other") == 2
    said = capsys.readouterr().err
    assert re.search(r"line 6: the cell of \S+/sent.csv, line 2 again, with another student_loss", said)
    assert "nothing was imported, for 1 fault:" in said


def test_an_origin_cannot_take_a_result_back_and_another_may_differ(sound, tmp_path, capsys):
    assert imported(sent(sound, tmp_path), tmp_path / "in") == 0
    other = [{**row, "student_loss": 3.6, "student_bits_per_byte": 3.6 / 4} for row in sound]
    assert imported(sent(other, tmp_path), tmp_path / "in") == 2
    assert "lab-a has another student_loss" in capsys.readouterr().err
    assert imported(sent(other, tmp_path), tmp_path / "in", origin="lab-b") == 0
    assert len(records.load(tmp_path / "in")) == 64
    fewer = [{**row, "held_out_tokens": 200_000} for row in sound]
    assert imported(sent(fewer, tmp_path), tmp_path / "in", origin="lab-c") == 2
    assert "has 200000 tokens, that of lab-a 300000: not the same text" in capsys.readouterr().err
    elsewhere = [{**row, "student_bits_per_byte": 0.9} for row in sound]
    assert imported(sent(elsewhere, tmp_path), tmp_path / "in", origin="lab-c") == 2
    assert "that of lab-" in capsys.readouterr().err
    assert sorted(f.name for f in (tmp_path / "in").iterdir()) == ["lab-a.csv", "lab-b.csv"]


def test_other_words_are_another_grid(sound, tmp_path, capsys):
    file = sent(sound, tmp_path)
    assert imported(file, tmp_path / "in", grid=f"{GRID} distill.kd_weight=0.9") == 2
    assert "is no cell of this grid as this checkout composes it" in capsys.readouterr().err
    assert imported(file, tmp_path / "in", grid=f"{GRID} seed=0,1") == 0, "part of a grid is of the grid"
    for grid in ("", "+sweeps=nope", "student='"):
        assert imported(file, tmp_path / "none", grid=grid) == 2
    assert imported(file, tmp_path / "none", origin="../lab") == 2
    assert "--origin ../lab: write 1 to 40" in capsys.readouterr().err


def test_text_that_a_spreadsheet_would_run_stays_text(sound, tmp_path):
    file = sent(changed(sound, device="=cmd|' /C calc'!A0"), tmp_path)
    assert imported(file, tmp_path / "in") == 0
    assert imported(tmp_path / "in" / "lab-a.csv", tmp_path / "again") == 0
    with (tmp_path / "again" / "lab-a.csv").open(newline="") as rows:
        held = {row["device"] for row in csv.DictReader(rows)}
    assert held == {"NVIDIA H100 80GB HBM3", "'=cmd|' /C calc'!A0"}


def test_files_that_are_no_table_are_refused(tmp_path, capsys):
    for name, content in {
        "a": b"",
        "b": b"\xff\xfec\x00",
        "c": b"cell;status\n1;2\n",
        "d": b"cell,cell\n1,2\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert imported(tmp_path / name, tmp_path / "in") == 2
        assert "nothing was imported" in capsys.readouterr().err


def test_a_column_is_decided_by_settings_or_measured_and_none_is_both():
    claimed = {*MEASURED, *PROVENANCE, *IDENTITY}
    assert claimed <= set(columns()) and not claimed & {*NESTED, *NOT_EXPORTED}
    written = (ROOT / "capacity_gap/cell/stages/write_record.py").read_text()
    row = written[written.index("row = {") : written.index("write_json(run.out / RECORD")]
    named = {*re.findall(r'^        "(\w+)":', row, re.MULTILINE), "device", "threads", "ranks", "git_commit"}
    named -= {*NESTED}
    assert named <= claimed, "what a record measures has bounds here"


def test_two_files_of_one_name_are_both_checked(sound, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, two = sent(sound[:4], tmp_path / "a"), sent(sound[4:8], tmp_path / "b")
    words = ["records", "import", "--origin", "lab-a", "--grid", GRID, "--out", str(tmp_path / "in")]
    assert cli.main([*words, str(one), str(two)]) == 0
    assert len(records.load(tmp_path / "in")) == 8
    one = sent([{**row, "student_loss": -1.0} for row in sound[8:10]], tmp_path / "a")
    capsys.readouterr()
    assert cli.main([*words, str(one), str(two)]) == 2
    assert f"{one}, line 2, student_loss: -1.0 is impossible" in capsys.readouterr().err


def test_a_file_that_no_import_wrote_is_not_written_over(sound, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    raw = sent(sound[:4], tmp_path / "in", "lab-a.csv")
    before = raw.read_bytes()
    assert imported(sent(sound[4:8], tmp_path), tmp_path / "in") == 2
    assert "lab-a.csv has 4 rows without the origin lab-a, so no import wrote it. Move it" in capsys.readouterr().err
    assert raw.read_bytes() == before


def test_a_teacher_of_an_origin_is_measured_once(sound, tmp_path, capsys):
    own = [{**row, "teacher_loss": 3.0 + row["teacher_params"] / 1e9} for row in sound]
    assert imported(sent(own, tmp_path), tmp_path / "in") == 0, "each teacher has a loss of its own"
    assert imported(sent(changed(own, teacher_loss=3.3), tmp_path), tmp_path / "other") == 2
    assert "teacher_loss of the same teacher is 3.3, and 3.00699" in capsys.readouterr().err
    assert imported(sent(changed(own, teacher_entropy=3.3), tmp_path), tmp_path / "other") == 2
    assert imported(sent(sound, tmp_path), tmp_path / "in", origin="lab-b") == 0, "another origin trained its own"
    assert imported(sent(own[:16], tmp_path), tmp_path / "part") == 0
    later = [{**row, "teacher_loss": row["teacher_loss"] + 0.1} for row in own[16:]]
    assert imported(sent(later, tmp_path), tmp_path / "part") == 2, "also since the last import"


def test_a_score_without_an_upper_bound_may_be_above_one(sound, tmp_path):
    scores = {"metrics/wikitext": 35.2, "metrics/mmlu/perplexity": 4.0, "metrics/bleu": 22.0}
    assert imported(sent([{**row, **scores} for row in sound], tmp_path), tmp_path / "in") == 0


def test_columns_that_a_later_version_adds_may_be_absent_where_the_cell_has_their_default(sound, tmp_path, capsys):
    def lacking(*names):
        return [{k: v for k, v in row.items() if k not in names} for row in sound]

    earlier = lacking("reference", "epochs", "tuned_loss")  # null, a default that is not null, not measured
    assert {row["epochs"] for row in sound} == {columns()["epochs"].default} == {1}
    assert imported(sent(earlier, tmp_path), tmp_path / "in") == 0
    assert imported(sent(sound, tmp_path), tmp_path / "in") == 0, "records from before a column block nothing"
    for name in ("teacher", "signal", "teacher_loss", "created"):
        assert imported(sent(lacking(name), tmp_path), tmp_path / "none") == 2, name
    assert "lacks the columns created" in capsys.readouterr().err
    grid = f"{GRID} seed=1"
    of_seed = known_cells(grid.split())
    rows = [
        {**row, **claim.columns, "cell": digest, "trained": claim.trained, "registration": claim.registration}
        for row, (digest, claim) in zip(sound, of_seed.items(), strict=True)
    ]
    rows = [{k: v for k, v in row.items() if k != "seed"} for row in rows]
    assert imported(sent(rows, tmp_path), tmp_path / "none", grid=grid) == 2
    assert "seed: there is no such column, where 3m from 5m" in capsys.readouterr().err


def test_an_export_of_a_store_is_believed(tiny, tiny_cell, tmp_path, capsys):
    store, cell = Store(tmp_path / "store"), pipeline.resolve(tiny_cell)
    shutil.copytree(tiny_cell.store_path, store.root)  # other tests read that one
    note_sweep(store, "mine", {cell.record.key: {"name": cell.name, "overrides": [], "stages": {}}})
    file = tmp_path / "mine.csv"
    assert cli.main(["records", "export", str(store.root), "--sweep", "mine", "--out", str(file)]) == 0
    assert "1 of 1 cells of mine" in capsys.readouterr().out
    words = " ".join([*tiny, "student=40k", "teacher=55k,80k"])
    assert imported(file, tmp_path / "in", grid=words) == 0
    assert "1 of 2 cells of this grid" in capsys.readouterr().out
    (row,) = records.load(tmp_path / "in").to_dict("records")
    (own,) = records.read(store.root)
    for name in columns():
        if name not in (*NESTED, *NOT_EXPORTED):
            assert row[name] == own[name] or (pd.isna(row[name]) and own[name] is None), name
    assert imported(file, tmp_path / "in", grid=f"{words} seed=1") == 2


def test_a_claimed_grid_has_the_cells_that_a_plan_has(tmp_path):
    done = run_here("-m", *GRID.split(), "plan=true", cwd=tmp_path)
    assert f"plan: {len(claimed_cells(GRID.split()))} cells" in done.stdout


def test_a_grid_typed_with_an_interpolation_has_the_cells_that_its_run_has():
    """Hydra resolves `${seed}` in each cell; in the words of the grid it would be the default."""
    words = [*WORDS.split(), "student=3m", "teacher=5m", "data=10m", "seed=1,2", "teacher_seed=${seed}"]
    typed = [{**claim.columns} for claim in claimed_cells(words).values()]
    assert [(one["seed"], one["teacher_seed"]) for one in typed] == [(1, 1), (2, 2)]


def test_the_registration_of_a_claim_is_the_pages_hash(claims):
    assert {claim.registration for claim in claims.values()} == {hashlib.sha256(PAGE.read_bytes()).hexdigest()}


def test_a_grid_of_ones_own_loss_names_its_module(tmp_path, monkeypatch, capsys):
    """The words of --grid are typed on this command line, which may name code; a module that is not there is named."""
    from capacity_gap.settings import extension

    def composed(words):
        raise ConfigError(f"reached with {extension.named()}")

    (tmp_path / "my_square.py").write_text("seen = True")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(extension.VARIABLE, "")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(claimed_grid, "claimed_cells", composed)
    assert imported(tmp_path / "sent.csv", tmp_path, grid="extend=[absent] data=10m") == 2
    assert "extend=absent: no such module" in capsys.readouterr().err
    assert imported(tmp_path / "sent.csv", tmp_path, grid="extend=[my_square] data=10m") == 2
    assert "reached with ['my_square']" in capsys.readouterr().err and sys.modules["my_square"].seen
