"""The settings behind a table of records, read back from its columns."""

import json
import shutil

import pandas as pd
import pytest

from capacity_gap.cell import pipeline
from capacity_gap.cell.table_settings import TableSettings, record_settings, table_settings
from capacity_gap.commands import cli
from capacity_gap.runner.rerun import quoted
from capacity_gap.store.files import write_checked, write_json
from capacity_gap.store.stage import Store
from tests.conftest import ROOT, compose
from tests.test_next import cells, run

SETTINGS = {
    "defaults": [],
    "a cached signal": ["distill.signal=sampled", "distill.signal_size=32"],
    "a cached signal of the usual size": ["distill.signal=topk"],
    "weights and temperature": ["distill.kd_weight=0.3", "distill.temperature=2.0"],
    "another objective": ["distill.loss=skewed_reverse_kl", "distill.skew=0.2"],
    "direct training": ["distill.kd_weight=0"],
    "a random start": ["prune.init=random"],
    "a shared start": ["prune.init=shared", "prune.reference=120k"],
    "another score": ["prune.method=random"],
    "shapes of each teacher": ["prune.shape=per_teacher"],
    "the teacher's tokens": ["family.teacher_data=2x"],
    "another corpus": ["corpus=code"],
    "batch and epochs": ["train.batch_size=8", "epochs=2"],
    "a weight of many digits": ["distill.kd_weight=0.3333333333"],
    "layers from both ends": ["prune.depth=3", "prune.layers=symmetric"],
    "layers by the default score": ["prune.depth=3"],
    "layers by another score": ["prune.depth=3", "prune.layers=block_influence"],
    "settings without columns": ["train.learning_rate=0.01", "train.schedule=wsd", "corpus.sequence_length=64"],
}


def recorded(*words):
    """A table of two cells with these settings, as records have it, and the cells."""
    found = [pipeline.resolve(compose(["student=60k", f"teacher={t}", "data=300k", *words])) for t in ("120k", "180k")]
    return pd.DataFrame([c.description | {"status": "done"} for c in found]), found


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_settings_read_from_a_table_make_the_same_cells(words, tmp_path):
    frame, made = recorded(*words)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    from capacity_gap import records

    told = table_settings(records.load(tmp_path / "runs.csv"))
    assert told.known and told.untold == ()
    again = recorded(*told.overrides)[1]
    assert [c.record.digest for c in again] == [c.record.digest for c in made]
    assert len(told.overrides) <= len(words), "what is the default is not printed"


@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_a_record_tells_the_settings_that_its_table_tells(words):
    frame, made = recorded(*words)
    told = record_settings([c.description for c in made])
    assert told[0] == told[1] == dict(o.split("=", 1) for o in table_settings(frame).overrides)


def test_a_record_tells_what_a_table_leaves_to_the_command():
    """A loss of a module that is not loaded here, the ladder, and the teacher's seed."""
    ours = recorded("family=pico_gpt2", "teacher_seed=2")[1][0].description | {"loss": "square"}
    wanted = {"family": "pico_gpt2", "distill.loss": "square", "teacher_seed": "2"}
    assert record_settings([ours]) == [wanted]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prune.layers=symmetric"], None),  # no layers go: the default cell
        (["prune.depth=3", "prune.layers=symmetric"], "symmetric"),
        (["prune.shape=fixed", "prune.fixed=3x32x4x80", "student=68k", "prune.layers=symmetric"], "symmetric"),
        (["prune.depth=3"], None),
        (["prune.layers=loss_increase"], "loss_increase"),  # no layers go, and another digest than the default
        (["family=pico_t5", "student=50k", "teacher=180k", "prune.depth=1"], None),  # its default is from both ends
        (["family=pythia", "student=60m", "teacher=410m", "corpus=embedded", "prune.layers=symmetric"], "symmetric"),
        (["family=pythia", "student=60m", "teacher=410m", "corpus=embedded"], None),
    ],
)
def test_the_way_layers_were_removed_is_told_where_it_is_not_the_default(words, expected):
    """The column is null both for symmetric removal and where no layers go."""
    (told,) = record_settings([pipeline.resolve(compose(words)).description])
    assert told.get("prune.layers") == expected


def test_a_table_tells_symmetric_layers_where_only_some_of_its_students_lose_layers():
    rows = [
        recorded("prune.layers=symmetric", *words)[0] for words in (["student=60k"], ["student=60k", "prune.depth=3"])
    ]
    frame = pd.concat(rows).assign(settings=None)
    frame["settings"] = [None, None, "prune.depth=3", "prune.depth=3"]
    assert "prune.layers=symmetric" in table_settings(frame).overrides
    frame["prune_layers"] = [None, None, None, "loss_increase"]
    assert not [o for o in table_settings(frame).overrides if "layers" in o], "they differ"


def test_numbers_keep_all_their_digits():
    frame, _ = recorded()
    told = table_settings(frame.assign(kd_weight=0.1 + 0.2, batch=1048576.0))
    assert set(told.overrides) == {"distill.kd_weight=0.30000000000000004", "train.batch_size=1048576"}


@pytest.fixture
def store(tmp_path):
    """Records of two losses, without training."""
    made = Store(tmp_path / "store")
    made.create()
    for loss, words in (("forward_kl", ["seed=0"]), ("square", ["seed=1"])):
        cell = recorded(*words)[1][0]
        folder = made.path(cell.record)
        folder.mkdir(parents=True)
        row = {"status": "done", "cell": cell.record.digest, "student_loss": 4.0} | cell.description | {"loss": loss}
        write_checked(folder / "record.json", row)
        write_json(folder / "stage.json", {"name": "record"})
    return made


def test_recorded_cells_are_listed_with_their_loss(store, capsys):
    """Also where all of them have the same one: it is not the default."""
    assert cli.main(["store", "ls", str(store.root), "--cells"]) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert {line.partition("seed ")[2] for line in (first, second)} == {"0, loss=forward_kl", "1, loss=square"}
    for file in store.root.glob("record/*/record.json"):
        if json.loads(file.read_text())["loss"] == "forward_kl":
            shutil.rmtree(file.parent)
    assert cli.main(["store", "ls", str(store.root), "--cells"]) == 0
    assert "seed 1, distill.loss=square\n" in capsys.readouterr().out


def test_what_columns_cannot_give_back_is_named():
    frame, _ = recorded()
    told = table_settings(frame.assign(corpus="text", settings="corpus.content=0a1b train.schedule=wsd"))
    assert told.untold == ("corpus.path", "corpus.content")
    assert set(told.overrides) == {"corpus=text", "train.schedule=wsd"}
    assert table_settings(frame.assign(instruct_rows=500)).untold == ("instruct",)
    assert table_settings(frame.assign(corpus="0.5*text+0.5*code")).untold == ("corpus",)


def test_settings_that_differ_between_cells_are_of_no_command():
    frame, _ = recorded()
    assert table_settings(frame.assign(kd_weight=[0.3, 0.5])).overrides == ()


def test_a_table_from_elsewhere_says_nothing_of_settings():
    frame = run(cells(seeds=(0,)))
    assert table_settings(frame) == TableSettings((), (), False), "its `loss` is a number"


def test_values_are_spelt_for_hydra():
    frame, _ = recorded()
    told = table_settings(frame.assign(settings="train.recipe=pico prune.layers=loss_increase"))
    assert [quoted(o.partition("=")[2]) for o in told.overrides] == ["pico", "loss_increase"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Study one's distilled cells."""
    frame = pd.read_csv(ROOT / "results" / "pico" / "study_law.csv", low_memory=False)
    file = tmp_path_factory.mktemp("next") / "study.csv"
    frame[(frame.teacher_data == "1m") & (frame.data_tokens > 0)].to_csv(file, index=False)
    return file


def test_next_says_the_answer_so_far_and_the_settings_of_its_table(study, capsys):
    assert cli.main(["next", str(study), "--student", "80k", "--data", "1.2m", "--k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("the answer so far: best teacher of 80k at 1.2m tokens: ")
    assert "One model of all cells establishes " in lines[0]
    commands = [line for line in lines if line.startswith("python run.py -m")]
    assert commands and all(" distill.signal=sampled " in line for line in commands)
    assert "not noted" not in "".join(lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--student", "500m", "--data", "1.2m"], "--student=500m lies outside the students of this pool"),
        (
            ["--student", "3m", "--data", "1.2m"],
            "No teacher of the pool is larger than it: the largest has 2m parameters",
        ),
        (["--student", "10k", "--data", "1.2m", "--students", "40k,80k"], "Allowed: 40k to 110k parameters; or give"),
        (
            ["--student", "80k", "--data", "10b", "--budgets", "300k"],
            "--data=10b lies outside the budgets of this pool and its records, so none of its cells would tell. "
            "Allowed: 300k to 1.2m tokens; or give --budgets that include it.",
        ),
        (
            ["--goal", "break_even", "--student", "80k", "--small", "7k", "--large", "900k"],
            "--small=7k lies outside the teachers of this pool",
        ),
    ],
)
def test_questions_outside_the_pool_are_refused_with_what_is_allowed(study, words, said, capsys):
    assert cli.main(["next", str(study), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_question_between_what_was_tried_is_answered(study):
    assert cli.main(["next", str(study), "--student", "60k", "--data", "800k", "--k", "1"]) == 0
