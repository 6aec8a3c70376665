"""Whole cells and grids, on real text, through the real commands."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import time

import pytest

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.cell.stages import distil_student
from capacity_gap.commands import cli
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.pruning.prune_config import PruneConfig
from capacity_gap.records.record import columns
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.declare import KEY
from capacity_gap.settings.errors import ConfigError, ImpossibleCell
from capacity_gap.store.contents import sweeps
from capacity_gap.store.files import META
from capacity_gap.store.stage import Store, closure
from capacity_gap.training.train_config import PretrainConfig, TrainConfig
from tests.conftest import ROOT, compose, ran, run_here, run_py


def test_a_cell_leaves_a_whole_record(tiny_cell):
    (row,) = records.read(tiny_cell.store_path)
    assert row["status"] == "done"
    assert (row["student"], row["teacher"], row["data_tokens"]) == ("40k", "55k", 6000)
    assert row["teacher_params"] == 55_032
    assert abs(row["student_params"] / 40_000 - 1) < 0.005
    for name in ("student_loss", "teacher_loss", "init_loss", "teacher_entropy"):
        assert 0 < row[name] < 1.2 * math.log(1024), name
    missing = [f for f in records.RESULT_FIELDS if row[f] is None]
    assert missing == ["student_loss_validation"]  # asked for by evaluate.validation_tokens alone
    assert set(row) == set(columns())


def test_a_record_keeps_the_hash_of_its_registration_and_the_loss_on_the_validation_split(tiny_cell, tmp_path):
    page = tmp_path / "registration.md"
    page.write_text("What counts as yes.\n")
    evaluate = dataclasses.replace(tiny_cell.evaluate, validation_tokens=2000)
    store = shutil.copytree(tiny_cell.store_path, tmp_path / "store")
    asked = dataclasses.replace(tiny_cell, store=str(store), evaluate=evaluate, registration=str(page))
    run_config(asked)
    rows = {row["registration"]: row for row in records.read(store)}
    (plain, registered) = rows[None], rows[hashlib.sha256(page.read_bytes()).hexdigest()]
    assert plain["student_loss_validation"] is None and plain["trained"] == registered["trained"]
    assert plain["student_loss"] == registered["student_loss"] != registered["student_loss_validation"]
    assert 0 < registered["student_loss_validation"] < 1.2 * math.log(1024)
    same = dataclasses.replace(asked, registration=None)
    assert pipeline.resolve(same).record.digest == pipeline.resolve(asked).record.digest
    with pytest.raises(ConfigError, match="registration=.*none.md is not a file"):
        dataclasses.replace(asked, registration=str(tmp_path / "none.md"))


def test_the_same_cell_in_another_store_gives_the_same_bits(tiny_cell, tmp_path):
    again = dataclasses.replace(tiny_cell, store=str(tmp_path))
    run_config(again)
    (one,), (two,) = records.read(tiny_cell.store_path), records.read(tmp_path)
    assert {f: one[f] for f in records.RESULT_FIELDS} == {f: two[f] for f in records.RESULT_FIELDS}
    distilled = pipeline.resolve(again).distilled
    files = [Store(root).path(distilled) / "model.safetensors" for root in (tiny_cell.store_path, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_recorded_cell_is_not_run_again(tiny_cell):
    made = [f.stat().st_mtime_ns for f in sorted(tiny_cell.store_path.glob(f"*/*/{META}"))]
    run_config(tiny_cell)
    assert [f.stat().st_mtime_ns for f in sorted(tiny_cell.store_path.glob(f"*/*/{META}"))] == made


def test_cells_share_what_they_have_in_common(tiny):
    def cell(*overrides):
        return pipeline.resolve(compose([*tiny, "teacher=120k", *overrides]))

    base, seed, data, student = cell(), cell("seed=1"), cell("data=3k"), cell("student=40k")
    for other in (seed, data, student):
        assert other.teacher.digest == base.teacher.digest
        assert other.scores.digest == base.scores.digest
        assert other.record.digest != base.record.digest
    assert seed.student.digest == base.student.digest == data.student.digest != student.student.digest
    assert cell("prune.init=random", "seed=1").student.digest != cell("prune.init=random").student.digest
    direct = ["prune.init=random", "distill.kd_weight=0"]
    assert cell(*direct).distilled.digest == cell(*direct, "teacher=270k").distilled.digest
    assert cell("prune.method=random").scores.digest != cell("prune.method=random", "seed=1").scores.digest


def test_paths_devices_and_tracking_are_no_part_of_an_identity(tiny, tmp_path):
    base = pipeline.resolve(compose(tiny)).record.digest
    moved = [f"store={tmp_path}", "train.device=cpu", "tracking=offline", "train.micro_batch_size=4"]
    assert pipeline.resolve(compose([*tiny, *moved])).record.digest == base
    for changed in ("train.threads=2", "train.precision=bf16", "seed=5", "teacher_seed=1", "distill.temperature=2"):
        assert pipeline.resolve(compose([*tiny, changed])).record.digest != base


def test_golden_digests_of_the_default_cell():
    cell = pipeline.resolve(compose([]))
    found = {s.name: s.digest for s in closure(cell.record).values() if s.name != "evaluate"}
    assert found == json.loads((ROOT / "tests/golden_digests.json").read_text()), (
        "a default cell has a new identity: every store would compute it again. If results really change, raise the "
        "stage's version and write the new digests; if a field was added, declare it with later=True"
    )


FAMILY = sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILY)
def test_a_cell_as_usual_says_nothing_of_its_other_settings(name):
    ladder = FAMILIES[name].rungs
    rung = next(iter(ladder))
    given = [f"family={name}", f"student={rung}", f"teacher={rung}"]
    given += ["prune.init=random"] * (name in ("gemma3", "olmo2"))  # their models cannot be cut yet
    cell = pipeline.resolve(compose(given))
    assert "settings" not in cell.description


# One of every setting that decides a result and has no column of its own.
UNSAID = (
    "distill.tau_squared=false",
    "corpus.sequence_length=64",
    "corpus.validation=0.1",
    "prune.batches=8",
    "prune.depth=3",
    "prune.calibration=1",
    "data_offset=128k",
    "train.learning_rate=0.01",
    "evaluate.limit=5",
    "train.schedule=wsd",
    "train.weight_decay=0.2",
    "train.compile=true",
    "family.teacher_epochs=2",
    "family.pretrain.warmup=0.2",
    "family.pretrain.learning_rate_times_width=0.3",
)


@pytest.mark.parametrize("given", UNSAID)
def test_what_has_no_column_of_its_own_is_said_where_it_is_not_as_usual(given):
    name, value = given.split("=")
    found = pipeline.resolve(compose([given])).description["settings"]
    assert found.lower() == f"{name}={value}"


def test_every_setting_that_decides_a_cell_is_in_its_record():
    """Whatever changes the trained student changes a column too: else a fit would take it for another seed."""
    usual = pipeline.resolve(compose([]))
    sections = {"train": TrainConfig, "prune": PruneConfig, "distill": DistillConfig, "family.pretrain": PretrainConfig}
    tried = 0
    for section, kind in sections.items():
        for field in dataclasses.fields(kind):
            default = field.default
            if default is None:  # as the recipe has it
                default = getattr(functools.reduce(getattr, section.split("."), usual.config), field.name)
            if field.metadata[KEY].decides and isinstance(default, int | float):
                value = not default if isinstance(default, bool) else default * 0.5 or 0.5
                value = 2 if isinstance(default, int) and not isinstance(default, bool) else value
                with_it = ["train.schedule=wsd"] * (field.name == "trunk")
                cell = pipeline.resolve(compose([f"{section}.{field.name}={value}", *with_it]))
                assert cell.distilled.digest != usual.distilled.digest, field.name
                known = field.name == "threads"  # a column that is filled when the cell has run
                assert known or cell.description != usual.description, f"{section}.{field.name}={value}"
                tried += 1
    assert tried > 25


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["prune.init=random"], ["prune.depth=3"]),
        (["adapt.data=1m", "adapt.parts=[{name:code}]"], ["corpus=code"]),
        (["adapt.parts=[{name:hub,dataset:a/b}]"], ["adapt.parts=[{name:hub,dataset:a/b,subset:c}]"]),
        (["corpus=mixture", "corpus.parts=[{name:code},{name:hub,dataset:a/b,column:c}]"], ["corpus.parts.1.column=d"]),
        (["expand.vocab=1100"], ["expand.vocab=1120"]),
        (["prune.iterative=2", "prune.step_data=10k"], ["prune.step_data=20k"]),
    ],
    ids=["depth of a random start", "corpus before adaptation", "subset of a part", "column", "padding", "steps"],
)  # fmt: skip
def test_what_columns_do_not_tell_apart_settings_do(one, other):
    kept = [o for o in one if o.split("=")[0] not in {x.split("=")[0] for x in other}]
    first, second = (pipeline.resolve(compose(given)) for given in (one, [*kept, *other]))
    assert first.distilled.digest != second.distilled.digest
    assert first.description.get("settings") != second.description.get("settings")


def test_how_a_student_was_tuned_afterwards_parts_no_curves(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": name}]}) + "\n")
    cells = [
        pipeline.resolve(compose([f"instruct.path={tmp_path}/{name}.jsonl", "instruct.max_length=128"]))
        for name in "ab"
    ]
    said = [cell.description["instruct_settings"] for cell in cells]
    assert all("settings" not in cell.description for cell in cells)
    assert said[0] != said[1]
    assert all("instruct.content=" in s and "instruct.max_length=128" in s for s in said)


def test_results_in_bf16_are_not_those_of_the_first_release(tiny):
    """Their stages were computed otherwise then; those of fp32 stay found (the golden digests)."""
    versions = {
        p: pipeline.resolve(compose([*tiny, f"train.precision={p}"])).distilled.version for p in ("fp32", "bf16")
    }
    assert versions == {"fp32": 1, "bf16": 2}
    adapted = pipeline.resolve(compose(["family=gpt2", "student=124m", "teacher=355m", "adapt.data=1m"]))
    assert adapted.teacher.version == 2, "teachers held in bf16 are adapted in fp32 now"


def test_two_texts_of_ones_own_are_two_corpora(tiny, tmp_path):
    (tmp_path / "other.txt").write_text("Another text.\n\nOf two paragraphs.")
    one, two = (
        pipeline.resolve(compose([*tiny, *more])).description["settings"]
        for more in ([], [f"corpus.path={tmp_path}/other.txt"])
    )
    assert "corpus.content=" in one
    assert one != two


def test_a_student_above_its_teacher_is_impossible(tiny):
    with pytest.raises(ImpossibleCell, match=r"student=60k is larger than teacher=55k \(55,032 parameters\)"):
        pipeline.resolve(compose([*tiny, "teacher=55k"]))


def test_student_equal_to_teacher_prunes_nothing(tiny, warm):
    row = ran(compose([*tiny, "student=55k", "teacher=55k", f"store={warm}"]))
    assert row["student_params"] == row["teacher_params"]
    assert row["init_loss"] == row["teacher_loss"]


def test_prune_only_records_the_start(tiny, tmp_path):
    config = compose([*tiny, "student=40k", "teacher=55k", "data=0", f"store={tmp_path}"])
    run_config(config)
    (row,) = records.read(tmp_path)
    assert row["student_loss"] == row["init_loss"]
    assert (row["data_tokens"], row["train_flops"], row["train_ce"], row["tokens_per_s"]) == (0, 0, None, None)
    assert not (tmp_path / "distil").exists()


@pytest.mark.slow
def test_a_shared_start_is_one_for_all_teachers(tiny, tmp_path):
    shared = [*tiny, "student=40k", "prune.init=shared", "prune.reference=55k"]
    cells = [pipeline.resolve(compose([*shared, f"teacher={t}", f"store={tmp_path}"])) for t in ("55k", "80k")]
    assert cells[0].student.digest == cells[1].student.digest
    assert cells[0].distilled.digest != cells[1].distilled.digest
    own = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k"]))
    assert own.student.digest == cells[0].student.digest
    for cell in cells:
        run_config(cell.config)
    rows = records.read(tmp_path)
    assert {(r["init"], r["reference"]) for r in rows} == {("shared", "55k")}
    assert len({r["init_loss"] for r in rows}) == 1
    assert len({r["teacher_loss"] for r in rows}) == 2


def test_a_failure_is_recorded_with_its_cause_until_the_cell_is_done(tiny, tmp_path, monkeypatch):
    config = compose([*tiny, "student=40k", "teacher=55k", f"store={tmp_path}"])
    with monkeypatch.context() as patch:
        patch.setattr(distil_student, "distil", lambda run: (_ for _ in ()).throw(RuntimeError("boom")))
        with pytest.raises(RuntimeError, match="boom"):
            run_config(config)
    (row,) = records.read(tmp_path)
    assert (row["status"], row["error"], row["student_loss"]) == ("failed", "RuntimeError: boom", None)
    run_config(config)
    (row,) = records.read(tmp_path)
    assert (row["status"], row["error"]) == ("done", None)


def test_records_refuse_nan():
    with pytest.raises(ValueError, match="student_loss=nan"):
        records.Record(1, "x", "done", student_loss=math.nan)


def test_tracking_mirrors_a_cell_offline(tiny, tmp_path):
    config = compose([*tiny, "student=40k", "teacher=55k", "tracking=offline", f"store={tmp_path}"])
    run_config(config)
    (run,) = (tmp_path / "wandb" / "wandb").glob("offline-run-*")
    assert run.name.endswith(pipeline.resolve(config).record.digest)
    ended = time.monotonic() + 60  # W&B's own process writes the file, a moment after the run has ended
    while next(run.glob("run-*.wandb")).stat().st_size < 1000:
        assert time.monotonic() < ended
        os.sched_yield()


@pytest.fixture(scope="module")
def grid(tiny, tmp_path_factory):
    """A grid of 2 × 2 cells, of which one is impossible, through the command line from another folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    arguments = ["-m", *tiny, "student=40k,60k", "teacher=55k,80k", "store=grid"]
    return folder, arguments, run_py(*arguments, cwd=folder)


def test_a_grid_runs_every_possible_cell_and_says_what_it_skipped(grid):
    folder, _, done = grid
    assert "grid: 3 done, 1 skipped" in done.stdout
    assert "student=60k is larger than teacher=55k" in done.stdout
    assert [p.name for p in folder.iterdir()] == ["grid"], "Hydra must leave no folders of its own"
    assert len(records.read(folder / "grid")) == 3
    assert len(list((folder / "grid/teacher").iterdir())) == 2, "a teacher is trained once"
    assert len(list((folder / "grid/corpus").iterdir())) == 1
    (noted,) = sweeps(Store(folder / "grid")).values()
    assert len(noted) == 3


@pytest.mark.slow
def test_a_grid_again_runs_nothing_and_more_seeds_run_only_themselves(grid):
    folder, arguments, _ = grid
    assert "grid: 3 reused, 1 skipped" in run_here(*arguments, cwd=folder).stdout
    assert "grid: 3 done, 3 reused, 2 skipped" in run_py(*arguments, "seed=0,1", cwd=folder).stdout
    assert len(list((folder / "grid/teacher").iterdir())) == 2


def test_plan_says_what_would_run_and_starts_nothing(tiny, tmp_path):
    done = run_here("-m", *tiny, "student=40k,60k", "teacher=80k,120k", "plan=true", "store=planned", cwd=tmp_path)
    assert "plan: 4 cells, 0 of them recorded" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_stage_that_fails_costs_only_the_cells_that_need_it(tiny, tmp_path):
    more = ["family.pretrain.learning_rate=0.001,1e20", "student=40k", "teacher=55k", "family.teacher_data=30k"]
    done = run_py("-m", *tiny, *more, f"store={tmp_path}", check=False)
    assert done.returncode == 1
    assert "grid: 1 done, 1 failed" in done.stdout
    assert "the loss is no longer finite" in done.stderr
    frame = records.load(tmp_path)
    assert sorted(frame["status"]) == ["done", "failed"]


def test_fit_takes_one_sweep_of_a_store(grid, capsys):
    folder, _, _ = grid
    name = min(sweeps(Store(folder / "grid")))
    assert cli.main(["fit", str(folder / "grid"), "--sweep", name]) == 0
    assert "status: too_few" in capsys.readouterr().out
    assert cli.main(["fit", str(folder / "grid"), "--sweep", "nope"]) == 2
    assert f"Allowed: {name}" in capsys.readouterr().err


def test_a_single_run_says_what_came_out(tiny, tmp_path, capsys):
    given = [*tiny, "student=40k", "teacher=55k", f"store={tmp_path}"]
    *_, result, where = run_py(*given).stdout.splitlines()
    (row,) = records.read(tmp_path)
    loss = f"held-out loss {row['student_loss']:.4f} ± {row['student_loss_stderr']:.4f} nats per token"
    assert result.startswith("done: 40k from 55k, 6k tokens, seed 0, ") and f": {loss}" in result
    assert ", family.teacher_data=8k, " in result and "distill." not in result, "settings that are not the default"
    assert where == f"record: {tmp_path / 'record' / row['cell'] / 'record.json'}"
    assert run_here(*given, cwd=tmp_path).stdout.splitlines() == [result.replace("done", "reused"), where]
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "single: 100% of 1 cells" in capsys.readouterr().out
