"""The command `next`: on a table, a store and an empty store; what it prints runs exactly the cells it names."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from capacity_gap.commands import cli
from capacity_gap.commands.possible_cells import possible
from capacity_gap.commands.stage_costs import StageCost
from capacity_gap.fit.goal_answer import AFTER_STOPPING
from capacity_gap.models.axes import count_params
from capacity_gap.models.folders import named_family
from capacity_gap.records.load import load
from capacity_gap.report.next_pool import deciding, make_pool
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.contents import note_end, note_sweep
from capacity_gap.store.files import write_checked
from capacity_gap.store.stage import Store
from tests.conftest import ROOT, compose
from tests.small_models import small_model
from tests.test_next import cells, place, run


def grids(lines):
    """Every cell of `run.py -m` commands, as overrides."""
    for line in lines:
        python, script, flag, *words = shlex.split(line)
        assert (python, script, flag) == ("python", "run.py", "-m")
        for batch in BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None):
            yield from (list(overrides) for overrides in batch)


def test_command_on_a_table_prints_commands_for_exactly_these_cells(tmp_path, capsys):
    from capacity_gap.settings.scales import parse_scale

    file = tmp_path / "runs.csv"
    run(cells(students=["40k", "80k"], seeds=(0,))).assign(family="pico").to_csv(file, index=False)
    words = ["next", str(file), "--student", "80k", "--data", "1.2m", "--k", "7"]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["cells"]) == 7 and {c["cell"]["student"] for c in told["cells"]} <= {"40k", "80k"}
    made = set()
    for overrides in grids(told["commands"]):
        config = compose(overrides)
        made.add(
            (
                config.student,
                config.teacher,
                parse_scale(config.data, key="data"),
                str(config.seed),
                str(config.teacher_seed),
            )
        )
    assert made == {place(c["cell"]) for c in told["cells"]}
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "the next 7 of" in text and "How these records were run is not noted" in text
    assert all(c["reason"] in text for c in told["cells"])


def test_command_on_a_store_keeps_the_settings_of_its_cells_and_the_teachers_that_are_there(tmp_path, tiny, capsys):
    store = Store(tmp_path / "my store")
    store.create()
    shared, noted = [*tiny, "distill.kd_weight=0.3"], {}
    for i, one in enumerate(run(cells(students=["40k", "55k"], seeds=(0,))).to_dict("records")):
        name = f"{i:020d}"
        own = [f"{k}={one[k]}" for k in ("student", "teacher", "seed")] + [
            f"data={int(one['data_tokens'])}",
            "teacher_seed=0",
        ]
        record = {
            **one,
            "student_loss": one["loss"],
            "loss": "forward_kl",
            "cell": name,
            "status": "done",
            "family": "pico",
        }
        (store.root / "record" / name).mkdir(parents=True)
        write_checked(store.root / "record" / name / "record.json", record)
        noted[f"record/{name}"] = {"name": name, "overrides": [*shared, *own, "hydra.verbose=false"], "stages": {}}
    note_sweep(store, "mine", noted)
    words = [
        "next",
        str(store.root),
        "--teachers",
        "120k,270k",
        "--budgets",
        "6k",
        "--seeds",
        "0,1",
        "--k",
        "4",
        "--json",
    ]
    assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    made = [compose(overrides) for overrides in grids(told["commands"])]
    assert len(made) == 4 and {c.distill.kd_weight for c in made} == {0.3}
    assert {(c.student, c.teacher, str(c.seed)) for c in made} == {
        tuple(c["cell"][k] for k in ("student", "teacher", "seed")) for c in told["cells"]
    }
    assert {str(c.store_path) for c in made} == {str(store.root)}

    assert told["answer"] and told["stopped_answer"] is None
    note_end(store, "mine", "tokens from which 270k beats 120k for 55k", "narrow", [1.0] * 3, {"level": 0.9})
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["stopped_answer"] is None, "that was another question"
    note_end(store, "mine", told["what"], "narrow", [2.5, 2.0, 3.0], {"level": 0.9, "answer": [2.5, 1.0, 4.0]})
    assert cli.main(words) == 0
    stopped = json.loads(capsys.readouterr().out)["stopped_answer"]
    assert stopped["level"] == AFTER_STOPPING and stopped["answer"][0] == told["answer"][0]
    assert cli.main(words[:-1]) == 0
    assert f"({100 * AFTER_STOPPING:g} %). Rounds ended at a narrow 95 % interval" in capsys.readouterr().out
    assert cli.main([*words, "--sweep", "mine"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["stopped_answer"] and all(" sweep=mine " in line for line in one["commands"])
    assert cli.main([*words, "--where", "student=55k"]) == 0
    assert json.loads(capsys.readouterr().out)["stopped_answer"], "some of its cells were chosen so"
    note_sweep(store, "other", {"record/" + "9" * 20: {"name": "x", "overrides": [], "stages": {}}})
    note_end(
        store, "other", "tokens from which 270k beats 120k for 40k", "narrow", None, {"level": 0.99, "answer": None}
    )
    asked = ["--goal", "break_even", "--student", "40k", "--small", "120k", "--large", "270k"]
    assert cli.main([*words, *asked]) == 0
    assert json.loads(capsys.readouterr().out)["stopped_answer"] is None, "that was of none of these cells"
    note_end(store, "mine", told["what"], "narrow", [2.5, 2.0, 3.0], {"level": 0.995, "answer": [2.5, 1.0, 4.0]})
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["stopped_answer"]["level"] == 0.995, "an older version's"


def test_a_store_of_ones_own_loss_names_the_variable_that_loads_it(monkeypatch):
    """There is no config file to blame, and `next` takes no extend=."""
    monkeypatch.setenv("CAPACITY_GAP_EXTEND", "other_loss")
    with pytest.raises(ConfigError) as error:
        StageCost.of(["extend=[good_loss]", "distill.loss=square"])
    said = str(error.value)
    assert said.startswith(
        "This store has cells of your module good_loss: set CAPACITY_GAP_EXTEND=other_loss,good_loss"
    )
    assert "config file" not in said


def test_stages_that_a_store_has_cost_nothing(tiny_cell):
    cost = StageCost(tiny_cell, Store(tiny_cell.store_path))
    there = {"student": "40k", "teacher": "55k", "data_tokens": 6000.0, "seed": "0", "teacher_seed": "0"}
    own, shared = cost(there)
    assert own == 1.0 and not any(shared.values())
    own, shared = cost(there | {"seed": "1"})
    assert own > 6 * 20_000 * 6000 and not any(shared.values()), "the student is trained again, its teacher is not"
    _, shared = cost(there | {"teacher_seed": "1"})
    trained = {key: flops for key, flops in shared.items() if key[0] == "teacher"}
    assert len(trained) == 1 and next(iter(trained.values())) > 6 * 30_000 * 8000
    other = cost(there | {"teacher_seed": "1", "student": "48k"})[1]
    assert trained.items() <= other.items(), "both students need the same teacher"
    with pytest.raises(ConfigError, match="a cell that cannot run.*larger than teacher"):
        cost(there | {"student": "80k"})


def test_command_on_an_empty_store_starts_a_design(tmp_path, capsys):
    Store(tmp_path / "store").create()
    assert (
        cli.main(
            ["next", str(tmp_path / "store"), "--students", "40k,60k,80k", "--budgets", "300k", "--k", "12", "--json"]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert len({c["cell"]["student"] for c in told["cells"]}) == 3
    assert all(c["cost_flops"] > 0 for c in told["cells"])
    assert {str(compose(overrides).store_path) for overrides in grids(told["commands"])} == {str(tmp_path / "store")}


def test_a_target_in_tokens_per_parameter_is_of_the_rung_s_own_size(tmp_path, capsys):
    """`1b` of Llama 3 has 1.24 billion parameters, so 20x is 24.7 billion tokens."""
    words = ["next", str(tmp_path / "none"), "--family", "llama3", "--student", "1b", "--data", "20x", "--k", "2"]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["what"] == "best teacher of 1.24b at 24.7b tokens"
    assert {c["cell"]["data_tokens"] for c in told["cells"]} == {20 * 1_235_814_400}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--student", "80k"], "--goal target: --data is missing. It takes --student, --data."),
        (["--goal", "law", "--small", "80k"], "--goal law: --small is not read"),
        (["--seeds", "0,x"], "--seeds x is no whole number"),
        (["--teachers", "7k"], "family pico has no such rung"),
        (["--family", "pica"], "family='pica' is not known (did you mean 'pico'?)"),
        (["--students", "3m"], "no teacher of 55k, 80k"),
        (["--pool", "runs.csv", "--seeds", "1"], "--pool names every candidate"),
        (["--pool", "none.csv"], "none.csv contains no records"),
        (["--sweep", "x"], "runs.csv"),
    ],
)
def test_bad_questions_are_one_paragraph(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(cells(seeds=(0,))).assign(family="pico").to_csv("runs.csv", index=False)
    assert cli.main(["next", "runs.csv", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_fit_without_a_law_names_cells_that_would_decide(tmp_path, capsys):
    table = run(cells(students=["40k", "80k"], seeds=(0,))).assign(family="pico")
    table.to_csv(file := tmp_path / "runs.csv", index=False)
    named = deciding(table)
    assert len(named) == len(set(named)) == 4
    run_already = {
        f"{r.teacher} for {r.student} at {r.data_tokens / 1000:g}k tokens, seed 0" for r in table.itertuples()
    }
    assert not run_already & {*named}
    assert cli.main(["fit", str(file)]) == 0
    text = capsys.readouterr().out
    assert f"Of all curves, the cells that would say most for their cost: {'; '.join(named)}." in text
    assert all(
        " for 40k at " in said or " for 80" in said for said in deciding(table.drop(columns=["teacher", "student"]))
    )
    assert deciding(table.assign(family=["pico", "gpt2"] * (len(table) // 2) + ["pico"] * (len(table) % 2))) == []


def test_teachers_cost_what_those_of_the_records_were_trained_on(tmp_path, capsys):
    table = run(cells(students=["40k", "80k"], seeds=(0,))).assign(family="pico", teacher_tokens=1_000_000)
    table.to_csv(file := tmp_path / "runs.csv", index=False)
    words = [
        "next",
        str(file),
        "--student",
        "80k",
        "--data",
        "1.2m",
        "--teachers",
        "2m",
        "--students",
        "80k",
        "--k",
        "1",
    ]
    assert cli.main([*words, "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    size = cell["cell"]["teacher_params"]
    assert 6 * size * 1e6 < cell["cost_flops"] < 12 * size * 1e6, "not twenty tokens a parameter"


def test_a_folder_that_is_not_there_yet_is_an_empty_store(tmp_path, capsys):
    words = ["--student", "80k", "--data", "1.2m", "--students", "80k,110k", "--budgets", "300k,1.2m"]
    assert cli.main(["next", str(tmp_path / "new"), *words]) == 0
    assert "python run.py -m" in capsys.readouterr().out


def test_a_pool_without_names_is_refused(tmp_path, capsys):
    file = tmp_path / "pool.csv"
    file.write_text("student_params,teacher_params,data_tokens\n80160,269888,300000\n")
    table = run(cells(students=["40k", "80k"], seeds=(0,))).assign(family="pico")
    table.to_csv(runs := tmp_path / "runs.csv", index=False)
    assert cli.main(["next", str(runs), "--goal", "law", "--pool", str(file)]) == 2
    assert "lacks student, teacher in some rows" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a,b", "${seed}", "it's", "x=1", "[a]", "null", "two words", "$(touch x)"])
def test_a_name_from_a_table_stays_one_value_of_the_printed_command(name):
    """A name is text of a file: it must not become two values, a look-up or another setting."""
    from capacity_gap.commands.next_command import commands_for
    from capacity_gap.fit import Candidate

    rows = [{"student": "80k", "teacher": t, "data_tokens": 300_000, "seed": 0} for t in (name, "120k")]
    found = [Candidate(cell=row, gain=0.1, cost=1.0, reason="") for row in rows]
    made = []
    for overrides in grids(commands_for(found, [])):
        parsed = OverridesParser.create().parse_overrides(overrides)
        made.append({o.key_or_group: o.value() for o in parsed})
    assert len(made) == 2 and {row["student"] for row in made} == {"80k"}
    values = {OmegaConf.create({"teacher": str(row["teacher"]), "seed": 0}).teacher for row in made}
    assert values == {name, "120k"}


def test_published_teachers_cost_no_training_and_rungs_go_by_their_names(tmp_path, capsys):
    words = ["next", str(tmp_path / "none"), "--goal", "break_even", "--student", "1b", "--small", "3b"]
    words += ["--large", "8b", "--family", "llama3", "--teachers", "3b,8b", "--budgets", "50m,100m"]
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {cell["cell"]["teacher"] for cell in told["cells"]} == {"3b", "8b"}
    assert sum(cell["cost_flops"] for cell in told["cells"]) < 1e19  # 8b alone on 20 tokens a parameter: 7.8e21
    assert "must be trained" not in str(told) and told["missing"].startswith("Add corpus=")


def test_where_keeps_the_rows_of_one_curve(tmp_path, capsys):
    records = "results/pico/study_law.csv"
    asked = ["--student", "55k", "--data", "1m", "--k", "2"]
    assert cli.main(["next", records, *asked]) == 2
    assert "teacher_data" in capsys.readouterr().err
    assert cli.main(["next", records, *asked, "--where", "teacher_data=1m", "--where", "data_tokens=300k,600k"]) == 0
    assert "the next 2 of" in capsys.readouterr().out
    assert cli.main(["next", records, *asked, "--where", "teacher_data=3m"]) == 2
    assert "Values in the table: 1m, 2x" in capsys.readouterr().err
    assert cli.main(["fit", records, "--where", "teacher_dat=1m"]) == 2
    assert "nearest: teacher_data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["fit", records, "--where", "teacher_data"])


def test_models_of_the_users_form_a_ladder_that_the_printed_commands_name(tmp_path, capsys):
    from capacity_gap.cell.pipeline import resolve

    for name, hidden in (("the small", 32), ("mid", 48), ("large", 96)):
        shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 500}
        small_model("llama", **shape).config.save_pretrained(tmp_path / name)
    ladder = ",".join(str(tmp_path / name) for name in ("the small", "mid", "large"))
    ranges = ["--students", "20k,30k,35k", "--budgets", "10k,40k", "--seeds", "0", "--k", "6"]
    Store(tmp_path / "store").create()
    for at in ("nothing yet", "store"):
        assert cli.main(["next", str(tmp_path / at), "--family", ladder, *ranges, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        made = [compose([*overrides, "corpus=embedded", "plan=true"]) for overrides in grids(told["commands"])]
        assert {config.teacher for config in made} == {cell["cell"]["teacher"] for cell in told["cells"]}
        assert {"the small"} <= {config.teacher for config in made}
        assert {*made[0].family.folders} == {str(tmp_path / name) for name in ("the small", "mid", "large")}
        assert all(Path(resolve(c).teacher.options["repository"]).name == c.teacher for c in made)


def own_models(folder):
    """Three models of one user; the head size of the largest is not that of the others. Returns `--family`."""
    for name, hidden, heads in (("mid", 64, 8), ("high", 80, 10), ("wide", 112, 7)):
        shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 500}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": hidden // heads}
        small_model("llama", **shape).config.save_pretrained(folder / name)
    return ",".join(str(folder / name) for name in ("mid", "high", "wide"))


@pytest.mark.parametrize("at", ["nothing yet", "store"])
def test_cells_that_the_command_would_skip_are_no_candidates(at, tmp_path, capsys):
    from capacity_gap.cell.pipeline import resolve

    Store(tmp_path / "store").create()
    words = ["next", str(tmp_path / at), "--family", own_models(tmp_path), "--budgets", "10k,40k", "--seeds", "0"]
    question = ["--goal", "break_even", "--student", "40k", "--small", "mid", "--large", "wide"]
    assert cli.main([*words, *question, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    made = [compose([*overrides, "corpus=embedded", "plan=true"]) for overrides in grids(told["commands"])]
    assert {c["cell"]["teacher"] for c in told["cells"]} == {config.teacher for config in made} >= {"mid", "wide"}
    assert {config.prune.shape for config in made} == {"per_teacher"} and all(map(resolve, made))
    (note,) = told["notes"]
    assert note.startswith("The command has prune.shape=per_teacher, since the common student of 40,000 parameters")
    assert "does not fit into the teacher wide: head_dim 8 of the student ≠ 16" in note


def test_a_shape_that_records_have_decided_takes_teachers_out_of_the_pool(tmp_path, capsys):
    """Records with the common shape: the teacher that does not hold it is left out, or the question is refused."""
    family, sizes = own_models(tmp_path), {}
    for name in ("mid", "high", "wide"):
        sizes[name] = count_params(json.loads((tmp_path / name / "config.json").read_text()))
    rows = [
        {"student": "40k", "student_params": 40_000, "teacher": teacher, "teacher_params": sizes[teacher]}
        | {"data_tokens": tokens, "seed": 0, "teacher_seed": 0, "student_loss": 3.0, "loss": "forward_kl"}
        | {"family": "folders", "status": "done", "shape": "common", "cell": f"{teacher}{tokens}"}
        for teacher, tokens in (("mid", 10_000), ("high", 10_000), ("mid", 40_000))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    frame, ladder = load(tmp_path / "runs.csv"), named_family(family)
    pool = make_pool(frame, ladder, students=[], teachers=[], budgets=[], seeds=[1], given=frozenset({"seeds"}))
    settings = ["family=folders", f"family.folders=[{family}]"]
    found = possible(pool, settings, fresh=False, asked=["wide"], needed=[])
    assert set(pool["teacher"]) == {"mid", "high", "wide"} and set(found.pool["teacher"]) == {"mid", "high"}
    assert found.overrides == settings
    (note,) = found.notes
    assert note.startswith("2 cells of the pool cannot run and are left out: the common student") and "wide" in note
    assert note.endswith("Add prune.shape=per_teacher (each teacher is then cut to a shape of its own), or take "
                         "teachers of one head size.")  # fmt: skip
    with pytest.raises(ConfigError, match=r"no cell of this pool under the teacher wide can run: .*per_teacher"):
        possible(pool, settings, fresh=False, asked=["wide"], needed=["wide"])


def test_without_a_fit_gains_and_reasons_are_said_to_be_assumed(tmp_path, capsys):
    said = "no fit yet: gains assume study one's variances and a best teacher of 2.5 times the student"
    words = ["--students", "40k,60k", "--budgets", "300k", "--teachers", "55k,120k,270k,900k", "--seeds", "0,1,2"]
    assert cli.main(["next", str(tmp_path / "none"), *words, "--k", "9"]) == 0
    text = capsys.readouterr().out
    assert said in text and "above the assumed best teacher" in text and "the estimated best teacher" not in text
    run(cells(students=["40k", "80k"], seeds=(0,))).assign(family="pico").to_csv(tmp_path / "runs.csv", index=False)
    assert cli.main(["next", str(tmp_path / "runs.csv"), "--student", "80k", "--data", "1.2m", "--k", "9"]) == 0
    text = capsys.readouterr().out
    assert said not in text and "the estimated best teacher" in text and "assumed" not in text


def test_a_source_that_is_not_there_is_refused_or_called_a_start_from_nothing(tmp_path, capsys):
    assert cli.main(["next", str(tmp_path / "runs.csv")]) == 2
    assert "runs.csv does not exist. Name a table, a store, or a new folder" in capsys.readouterr().err
    assert cli.main(["next", str(tmp_path / "new"), "--student", "60k", "--data", "40k"]) == 0
    assert "new is empty or not there: this starts from nothing" in capsys.readouterr().out


def test_teachers_in_the_wrong_order_are_refused(tmp_path, capsys):
    file = tmp_path / "runs.csv"
    run(cells()).to_csv(file, index=False)
    words = ["--goal", "break_even", "--student", "80k", "--small", "270k", "--large", "120k"]
    assert cli.main(["next", str(file), *words]) == 2
    assert "--small 270k is not below --large 120k" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("student", "data", "said", "known"),
    [
        ("80k", "1.2m", "", True),
        ("80k", "5m", "5m tokens lie 4.17 times beyond the 300k to 1.2m that were run: the answer is", True),
        ("80k", "50m", "an answer would be a guess", False),
        ("20k", "1.2m", "20k parameters of a student lie 2 times beyond the 39.9k to 110k that were run: the", True),
        ("3k", "1.2m", "an answer would be a guess", False),
    ],
)
def test_a_question_beyond_what_was_run_is_marked_and_a_far_one_not_answered(capsys, student, data, said, known):
    words = ["next", str(ROOT / "results" / "pico" / "study_law.csv"), "--where", "teacher_data=1m"]
    assert cli.main([*words, "--student", student, "--data", data, "--k", "2"]) == 0
    text = capsys.readouterr().out
    assert said in text and ("times beyond" in text) == bool(said)
    assert ("not known yet" not in text) == known
