"""The installed wheel does in an empty folder what a checkout does; `init` writes a sweep that runs."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from capacity_gap.commands import cli
from capacity_gap.settings import places
from tests.conftest import ROOT, run_py

BUILT_FROM = ("capacity_gap", "hydra_plugins", "conf", "sweeps", "results/pico2")
SCRIPT = "bin/capacity-gap"
HAND_OUT = """
import os
from capacity_gap.cell.config import RunConfig
from capacity_gap.runner.worker import Jobs, handed_out, run_children
from capacity_gap.store.stage import Store

config = RunConfig(plan=True)
jobs = Jobs.hand_out(Store(config.store_path), [handed_out(config)])
os.chdir("/")
run_children(jobs, [0])
print(jobs.outcome(0))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that the checkout gets no build folder and lends none."""
    source = tmp_path_factory.mktemp("source")
    for folder in BUILT_FROM:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel, which sees the packages of this one but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    pip("--python", python, "install", "--no-deps", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture(scope="module")
def installed(environment, tmp_path_factory):
    """Runs a program of that environment in one empty folder."""
    folder = tmp_path_factory.mktemp("empty")

    def run(program, *arguments, status=0):
        done = subprocess.run(
            [environment / program, *arguments], cwd=folder, env=clean(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    run.folder = folder
    return run


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    environment = {**clean(), "PIP_NO_INDEX": "1"}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def clean():
    """The variables of a shell that knows nothing of the checkout."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CAPACITY_GAP_STORE")}


@pytest.mark.slow
def test_a_wheel_runs_a_cell_and_a_grid_fits_reports_and_exports_in_an_empty_folder(installed, tiny):
    cell = installed(SCRIPT, "run", *tiny, "student=40k", "teacher=55k")
    record = Path(re.search(r"record: (.*)", cell)[1])
    assert record.is_relative_to(installed.folder / "store"), "the default store is ./store"

    axes = ["student=40k,45k", "teacher=55k,80k", "sweep=own"]
    grid = installed(SCRIPT, "run", "-m", *tiny, *axes, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert "grid: 3 done, 1 reused" in grid
    assert "own: 100% of 4 cells" in installed(SCRIPT, "status", "--sweep", "own")

    assert "status: too_few" in installed(SCRIPT, "fit", "store", "--sweep", "own", "--out", "figures")
    assert (installed.folder / "figures/law.json").is_file()
    if importlib.util.find_spec("plotly"):
        installed(SCRIPT, "report", "store", "--sweep", "own", "--out", "report.html")
        assert "capacity-gap run -m" in (installed.folder / "report.html").read_text()
    installed(SCRIPT, "export", record.parent.name[:8], "model")
    assert (installed.folder / "model/config.json").is_file()


@pytest.mark.slow
def test_a_wheel_brings_help_sweeps_and_the_published_fit(installed, environment):
    where = installed("bin/python", "-c", "import capacity_gap; print(capacity_gap.__file__)")
    assert Path(where).is_relative_to(environment), "the checkout is out of sight"
    assert "run and watch:" in installed(SCRIPT, "--help")
    assert installed("bin/python", "-m", "capacity_gap", "--help") == installed(SCRIPT, "--help")
    told = installed(SCRIPT, "run", "--help")
    assert "capacity-gap run -m student=60k,90k" in told, "examples name the installed command"
    assert "[none, record, model]" in told, "settings say what they may be"
    assert "plan: 10 cells" in installed(SCRIPT, "plan", "+sweeps=quick")
    assert "Basis: " in installed(SCRIPT, "recommend", "--student", "60k", "--family", "pico")


@pytest.mark.slow
def test_a_wheel_says_how_to_rerun_a_cell_and_its_workers_find_the_store(installed, tiny):
    installed(SCRIPT, "run", "-m", *tiny, "train.learning_rate=1e9", "sweep=bad", "student=40k", status=1)
    told = installed(SCRIPT, "status", "--sweep", "bad", "--failed", status=1)
    words = shlex.split(re.search(r"rerun: (.*)", told)[1])
    assert words[:2] == ["capacity-gap", "run"]
    assert words[-1] == f"store={installed.folder / 'store'}"

    assert "'kind': 'done'" in installed("bin/python", "-c", HAND_OUT)


def test_a_run_is_started_from_any_folder(tmp_path):
    command = [*places.run_command(), "-m", "student=40k", "plan=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "plan: 1 cell," in done.stdout, done.stderr


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, text_file):
    """Two tiny model folders with one tokenizer."""
    from capacity_gap.data.tokenizer import train_tokenizer
    from capacity_gap.models import loading

    place = tmp_path_factory.mktemp("checkpoints")
    shape = {"model_type": "llama", "vocab_size": 512, "num_hidden_layers": 2, "head_dim": 8}
    for name, width in (("small", 32), ("large", 48)):
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 8}
        loading.save_model(loading.new_model({**shape, **sizes, "tie_word_embeddings": True}, 1), place / name)
        train_tokenizer([text_file.read_text()], 512, place / name)
    return place


def test_init_writes_a_sweep_that_plans_once_its_placeholders_are_replaced(checkpoints, text_file, tmp_path, capsys):
    project = tmp_path / "my project"
    assert cli.main(["init", str(project), "--name", "own"]) == 0
    sweep = project / "sweeps/own.yaml"
    assert str(sweep) in capsys.readouterr().out
    yours = {
        "/path/to/small-teacher": str(checkpoints / "small"),
        "/path/to/large-teacher": str(checkpoints / "large"),
        "/path/to/text": str(text_file),
        "50m,100m": "20k,22k",
    }
    text = sweep.read_text()
    for placeholder, value in yours.items():
        assert text.count(placeholder) == 1
        text = text.replace(placeholder, value)
    sweep.write_text(text)

    told = (project / "README.md").read_text()
    plan, *others = re.search(r"```\n(.*?)```", told, re.DOTALL)[1].splitlines()
    done = run_py(*shlex.split(plan)[2:], cwd=tmp_path)
    assert "plan: 8 cells, 0 of them recorded" in done.stdout
    assert not (project / "store").exists()
    for other in others[1:]:
        assert callable(cli.parser().parse_args(shlex.split(other)[3:]).run)


def test_every_setting_of_that_sweep_has_a_comment(tmp_path):
    cli.main(["init", str(tmp_path / "new")])
    lines = (tmp_path / "new/sweeps/mine.yaml").read_text().splitlines()
    values = [line for line in lines if re.search(r":\s+\S|- override|^store", line) and not line.startswith("#")]
    assert len(values) > 10
    assert [line for line in values if "  # " not in line] == []


def test_init_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 2
    assert f"already there: {tmp_path / 'README.md'}" in capsys.readouterr().err
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("README.md", "mine")]
    assert cli.main(["init", str(tmp_path / "new"), "--name", "a=b"]) == 2


def test_the_help_says_one_sentence_about_each_command_under_a_heading(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    assert [h for h in re.findall(r"^([a-z ]+):$", told, re.M) if h != "options"] == list(cli.GROUPS)
    lines = dict(re.findall(r"^  ([a-z]+) +([A-Z].*)$", told, re.M))
    assert {"init", "run", "plan", "status", "fit", "recommend", "report", "store", "sync"} <= set(lines)
    assert [does for does in lines.values() if not re.fullmatch(r".{10,90}\.", does)] == []
