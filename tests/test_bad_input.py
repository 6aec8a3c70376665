"""Whatever a user gives: an error of one paragraph, or a plan; no traceback, no hang, nothing written."""

import contextlib
import io
import math
import os
import shlex
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from capacity_gap.cell.config import RunConfig, from_dict
from capacity_gap.cell.pipeline import resolve
from capacity_gap.commands import cli
from capacity_gap.commands.explain import paragraph
from capacity_gap.commands.run import options_first
from capacity_gap.runner.plan import make_plan
from capacity_gap.settings.checks import LONGEST_TEXT
from capacity_gap.settings.declare import walk
from capacity_gap.settings.errors import UserError
from capacity_gap.store.stage import Store
from tests.conftest import run_here

NUMBERS = [0, -1, 1, 2, 1.5, -0.0, 1e300, -1e300, 5e-324, math.inf, -math.inf, math.nan, 2**31, 2**63, 2**70, 10**400]
WORDS = ["", " ", "x", "null", "nan", "1e6", "-5", "0x", "9" * 50, "..", "/", "~", "~nobody/x", "/dev/null", "é", "🙂"]
WORDS += ["a" * 300, "a/" * 3000, "a\0b", "a\tb", "\ud800", "${x}", "${oc.env:NOPE}", "{", "[", "!!python/none", "%s"]
SPELT = st.one_of(st.sampled_from(WORDS), st.sampled_from(NUMBERS).map(str), st.text())
PARTS: list = [None, True, [], [1], ["x"], {}, {"a": 1}]
VALUES = st.one_of(st.sampled_from([*NUMBERS, *WORDS, *PARTS]), st.text(), st.integers())
ALONE = [d for d in walk(RunConfig) if not d.section]
NUMERIC = [d for d in ALONE if any(kind in str(d.field.type) for kind in ("int", "float"))]
TEXTS = [d for d in ALONE if d not in NUMERIC and d.field.type is not bool]
OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ONCE = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def with_value(key, value):
    """The settings of the default cell with one other value."""
    found = asdict(RunConfig())
    *sections, last = key.split(".")
    part = found
    for section in sections:
        part = part[section]
    part[last] = value
    return found


def outcome(values, store):
    """The plan of a cell with these settings, or the paragraph that says why there is none."""
    try:
        config = from_dict(values)
        return "\n".join(make_plan([resolve(config)], Store(store)).lines)
    except Exception as error:
        if (said := paragraph(error)) is None:
            raise
        return f"error: {said}"


@pytest.mark.parametrize("setting", NUMERIC, ids=lambda d: d.key)
def test_every_number_has_a_declared_range_and_what_is_outside_is_refused(setting, tmp_path):
    known = setting.setting
    assert known.least is not None or known.above is not None
    assert known.most is not None or known.below is not None, "no number is without an upper bound"
    low, high = known.above if known.least is None else known.least, known.below if known.most is None else known.most
    for value in (low - 1, high * 2 + 1, math.inf, -math.inf, math.nan, 1e300, -1e300):
        told = outcome(with_value(setting.key, value), tmp_path / "store")
        assert told.startswith("error: "), (value, told)
        assert setting.key.rpartition(".")[2] in told or "whole number" in told or "wrong type" in told


@pytest.mark.parametrize("setting", TEXTS, ids=lambda d: d.key)
def test_texts_of_any_length_are_refused(setting, tmp_path):
    for text in ("a" * 300, "a/" * LONGEST_TEXT, "a\0b", "\ud800", "a\nb"):
        value = [text] if "list" in str(setting.field.type) else text
        told = outcome(with_value(setting.key, value), tmp_path / "store")
        assert told.startswith("error: ") and "\n" not in told and len(told) < 2000


@OFTEN
@given(setting=st.sampled_from(ALONE), value=VALUES)
def test_any_value_of_any_setting_is_planned_or_refused(setting, value, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "any"
    told = outcome(with_value(setting.key, value), folder / "store")
    assert told.startswith(("plan: ", "error: "))
    assert told.startswith("plan: ") or "\n" not in told
    assert not folder.exists(), "nothing was written"


@pytest.mark.slow
@ONCE
@given(
    setting=st.sampled_from(ALONE),
    value=SPELT,
)
def test_any_override_on_the_command_line_is_planned_or_refused(setting, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    done = run_here(f"{setting.key}={value}", f"store={folder / 'store'}", "plan=true", cwd=folder)
    assert_told(done.returncode, done.stdout, done.stderr)
    assert list(folder.iterdir()) == []


COMMANDS = {  # every option that takes a value, with commands that need nothing but a table or a store
    "fit TABLE": ["--axis", "--metric", "--by", "--method", "--sweep"],
    "recommend --student 60k --family pico": ["--student", "--family", "--data", "--fit"],
    "report TABLE": ["--sweep", "--axis", "--metric"],
    "frontier": ["--metric", "--compute"],
    "status EMPTY": ["--sweep"],
    "store ls": [""],
    "store gc": [""],
    "store forget EMPTY": ["--failed"],
    "sync": [""],
    "sync EMPTY": ["--limit"],
    "evaluate EMPTY": ["--tasks", "--task-folder", "--tokenizer", "--limit", "--batch-size", "--device", "--dtype"],
    "compare": [""],
    "judge EMPTY --endpoint http://localhost:1 --model x --out EMPTY/x": ["--price 1", "--max-tokens", "--questions"],
    "export": [""],
    "export 0 EMPTY/y": ["--store", "--shard"],
    "init EMPTY/z": ["--name x/"],
    "fetch pico:": [""],
    "settings": [""],
    "plan": [""],
}
OPTIONS = [(command, option) for command, options in COMMANDS.items() for option in options]


@ONCE
@given(
    which=st.sampled_from(OPTIONS),
    value=SPELT,
)
@example(which=("init EMPTY/z", "--name x/"), value="\x1e")
def test_any_option_of_any_command_is_answered_or_refused(which, value, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("given")
    (folder / "empty").mkdir()
    table = folder / "runs.csv"
    table.write_text("student_params,teacher_params,loss\n60000,120000,4.0\n60000,180000,3.9\n")
    monkeypatch.chdir(folder / "empty")
    command, option = which
    words = [w.replace("TABLE", str(table)).replace("EMPTY", str(folder / "empty")) for w in shlex.split(command)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([*words, *option.split(), value])
        except SystemExit as end:
            status = end.code
    assert_told(status, out.getvalue(), err.getvalue())
    written = {p.name for p in folder.rglob("*")} - {"empty", "runs.csv", "report.html"}
    assert not written


def assert_told(status, out, err):
    """Either it worked, or one paragraph says why not."""
    assert status in (0, 1, 2)
    assert "Traceback" not in out + err
    if status == 2:
        said = [line for line in err.strip().splitlines() if not line.startswith("note: ")]
        assert len(said) == 1 and said[0].startswith("error: "), err


GIVEN = [
    (["epochs=" + "9" * 5000], "holds a number of 5,000 digits"),
    (["student=${oc.env:NOPE}"], "student=${oc.env:NOPE} cannot be resolved"),
    (["student=${teacher}", "teacher=${student}"], "cannot be resolved"),
    (["+foo=1"], "foo is not a setting"),
    (["+train.foo=1"], "train.foo is not a setting"),
    (["student=null"], "student=null has the wrong type: it may not be null"),
    (["student=[]"], "student=[] has the wrong type"),
    (["adapt=5"], "adapt=5 has the wrong type"),
    (["family=null"], "must be a string"),
    (["corpus.parts=[3]"], "corpus.parts=[3] has the wrong type"),
    (["corpus.parts=[{nom:x}]"], "corpus.parts has no nom"),
    (["student=é"], "student=é cannot be read. Write KEY=VALUE"),
    (["-m", "teacher=glob(*)"], "this grid has no cell"),
    (["-m", "student=range(1,10000000000)"], "more than 100,000 combinations"),
    (["-m", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0 is out of range. Allowed: 1 to 100,000"),
    (["-m", "hydra.launcher.n_jobs=2"], "Add hydra/launcher=joblib (or slurm, ray)."),
    (["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0 is out of range"),
    (["+sweeps=quick"], "gives student, teacher several values: a grid needs -m"),
    (["student='60k,90k'"], "or a sweep file with them under `hydra.sweeper.params`"),
]


@pytest.mark.parametrize(("overrides", "said"), GIVEN, ids=[" ".join(o)[:40] for o, _ in GIVEN])
def test_what_is_wrong_is_said(overrides, said, tmp_path):
    done = run_here(*overrides, f"store={tmp_path / 'store'}", "plan=true", cwd=tmp_path)
    assert done.returncode == 2
    assert_told(done.returncode, done.stdout, done.stderr)
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []


FILES = {
    "broken": ("a: [b\n", "line 3: expected"),
    "bytes": (b"\xff\xfe", "not UTF-8 text"),
    "tagged": ("student: !!python/object/apply:os.getcwd []\n", "line 2: could not determine a constructor"),
    "unknown": ("studnet: 60k\n", "studnet is not a setting (did you mean 'student'?)"),
    "lists": ("student: [60k, 90k]\n", "student takes one value. Several values need a grid"),
    "callback": ("hydra: {callbacks: {x: {_target_: evil.X}}}\n", "names code to run (hydra.callbacks.x._target_)"),
    "params": ("hydra: {sweeper: {params: {x: {_target_: evil.X}}}}\n", "(hydra.sweeper.params.x._target_)"),
    "created": (
        "hydra: {sweeper: {params: {x: '${oc.create:{_target_:evil.X}}'}}}\n",
        "computes hydra.sweeper.params.x by",
    ),
    "logging": ("hydra: {job_logging: {root: {handlers: [x]}}}\n", "sets hydra.job_logging.root.handlers.0"),
    "whole": ("hydra: {job_logging: '${store}'}\n", "sets hydra.job_logging"),
    "environment": ("hydra: {job: {env_set: {LD_PRELOAD: evil.so}}}\n", "sets hydra.job.env_set.LD_PRELOAD"),
    "launcher": ("hydra: {launcher: {_target_: evil.X}}\n", "names code to run (hydra.launcher._target_)"),
    "shell": ("hydra: {launcher: {setup: [rm -r x]}}\n", "sets hydra.launcher.setup"),
    "elsewhere": ("defaults: [{/sweeps/empty@hydra.job: empty}]\n", "places another file at"),
    "secret": ("sweep: '${oc.env:HF_TOKEN}'\n", "reads the variable HF_TOKEN"),
    "computed": ("sweep: \"${oc.env:'HF_TO${oc.decode:KEN}'}\"\n", "computes sweep by oc.decode"),
    "nested": ("sweep: '${oc.env:${store}}'\n", "whose name is computed"),
    "quoted": ("sweep: '${oc.env:\"HF_TOKEN\"}'\n", "whose name is computed"),
    "default": ("sweep: '${oc.env:NOPE,${oc.create:x}}'\n", "computes sweep by oc.create"),
    "opt_in": ("evaluate: {allow_code_execution: true}\n", "sets evaluate.allow_code_execution"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_sweep_file_names_no_code_and_breaks_nothing(name, tmp_path):
    text, said = FILES[name]
    file = tmp_path / "sweeps" / f"{name}.yaml"
    file.parent.mkdir()
    file.write_bytes(b"# @package _global_\n" + (text if isinstance(text, bytes) else text.encode()))
    done = run_here(f"--config-dir={tmp_path}", "-m", f"+sweeps={name}", "plan=true", cwd=tmp_path)
    assert_told(done.returncode, done.stdout, done.stderr)
    assert done.returncode == 2 and said in done.stderr


def test_a_folder_of_configs_may_hold_other_folders_and_settings_of_a_launcher(tmp_path):
    for name in ("sweeps", "data", "store", "hydra/launcher"):
        (tmp_path / "own" / name).mkdir(parents=True)
    (tmp_path / "own/sweeps/mine.yaml").write_text(
        "# @package _global_\nteacher_seed: ${seed}\nstore: ${oc.env:HOME}/x\n"
        "hydra: {sweeper: {params: {student: '40k,60k'}}}\n"
    )
    (tmp_path / "own/hydra/launcher/site.yaml").write_text("defaults: [slurm]\nsetup: [module load cuda]\n")
    given = [f"--config-dir={tmp_path / 'own'}", "-m", "+sweeps=mine", "data=0", "plan=true"]
    done = run_here(*given, "hydra/launcher=site", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan: 2 cells" in done.stdout
    (tmp_path / "own/sweeps/mine.yaml").write_text("# @package _global_\ndefaults: [override /hydra/launcher: site]\n")
    done = run_here(*given, cwd=tmp_path)
    assert done.returncode == 2 and "hydra/launcher/site sets hydra.launcher.setup" in done.stderr


def test_options_stand_anywhere(tmp_path):
    given = ["student=60k", "--config-dir", "somewhere", "teacher=120k", "-m"]
    assert options_first(given) == ["--config-dir", "somewhere", "-m", "student=60k", "teacher=120k"]
    assert options_first(["student=60k", "--config-dir=x", "+sweeps=quick"])[0] == "--config-dir=x"


def test_evaluate_says_first_that_there_is_no_model(capsys):
    assert cli.main(["evaluate", "./nowhere", "--tasks", "arc_easy"]) == 2
    assert "MODEL ./nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit TABLE", "report TABLE", "frontier", "compare TABLE", "evaluate x", "init"])
def test_a_place_that_cannot_be_written_is_refused_first(command, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    words = [w.replace("TABLE", str(tmp_path / "none.csv")) for w in command.split()]
    flag = [] if command == "init" else ["--out"]
    for out in (str(tmp_path / "file/inside"), "", "a" * 5000, "/dev/null/x"):
        with pytest.raises(SystemExit) as end:
            cli.main([*words, *flag, out])
        assert end.value.code == 2
        assert_told(2, "", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_users_errors_survive_being_explained_and_ours_do_not():
    assert paragraph(UserError("x")) == "x"
    assert paragraph(PermissionError(13, "Permission denied", "/x")) == "/x: Permission denied."
    assert paragraph(KeyError("x")) is None
    assert paragraph(OSError("no file")) is None


def test_a_plan_of_many_steps_takes_no_longer_than_few():
    """Stages that several others need are counted once: a chain of diamonds is no tree."""
    found = from_dict(with_value("prune.iterative", 100))
    assert len(resolve(found).record.inputs) > 0
    assert "plan: 1 cell," in outcome(asdict(found), os.devnull + "-none")
