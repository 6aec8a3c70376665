"""The command that runs a cell again: quoted for Hydra and for the shell, it composes to the same settings."""

import shlex
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from capacity_gap.commands import cli
from capacity_gap.runner import rerun
from capacity_gap.store.contents import sweeps
from capacity_gap.store.stage import Store
from tests.conftest import run_py

HARD = st.sampled_from("[]{}()'\"\\=,$ /ab:~é界%#@!*&;|<>?-\t")
ANY = st.characters(exclude_characters="\0\r\n", exclude_categories=("Cs",))
TEXTS = st.text(st.one_of(HARD, ANY), min_size=1)


def parsed(overrides):
    """Key and value of each override, as Hydra composes them."""
    found = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        config = OmegaConf.create({"value": override.value()})
        found[override.key_or_group] = OmegaConf.to_container(config, resolve=True)["value"]
    return found


@given(TEXTS)
def test_composing_a_quoted_text_gives_the_text(text):
    assert parsed([f"store={rerun.quoted(text)}"]) == {"store": text}


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_composing_the_parsed_line_gives_the_same_overrides(path, folders):
    given = [f"corpus.path={rerun.quoted(path)}", f"family.folders=[{','.join(map(rerun.quoted, folders))}]", "seed=3"]
    (((*swept,),),) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(given), None)
    store = Path("/somewhere") / path.replace("/", "_")
    line = rerun.command(
        [*swept, "budget_hours=1", "retries=2", "hydra.x=1", "store=/elsewhere", "only=distil/abc"], store
    )
    python, script, *words = shlex.split(line)
    assert (python, script) == ("python", "run.py")
    assert parsed(words) == {**parsed(given), "store": str(store)}


def test_plain_words_stay_plain():
    line = rerun.command(["student=60k", "+sweeps=quick"], Path("/a/b-c.d"))
    assert line == "python run.py student=60k +sweeps=quick store=/a/b-c.d"


@pytest.mark.slow
def test_the_line_that_status_prints_runs_the_cell_and_another_one_joins_the_sweep_only_if_asked(
    tiny, text_file, tmp_path, capsys
):
    folder = tmp_path / "text [1]=é, 'a' \"b\""
    folder.mkdir()
    (folder / "topics.txt").write_text(text_file.read_text())
    path = rerun.quoted(str(folder / "topics.txt"))
    store = tmp_path / "store (x)=[ü]"
    plain = [o for o in tiny if not o.startswith("corpus.path")]
    given = [*plain, f"corpus.path={path}", "student=40k", "teacher=55k", f"store={rerun.quoted(str(store))}"]
    assert run_py("-m", *given, "sweep=mine", "train.learning_rate=1e9", check=False).returncode == 1
    assert list(sweeps(Store(store))) == ["mine"]
    assert cli.main(["status", str(store), "--failed"]) == 1
    out = capsys.readouterr().out
    (line,) = [line.split("rerun: ")[1] for line in out.splitlines() if "rerun: " in line]
    alone = [word.replace("1000000000.0", "0.01") for word in shlex.split(line)[2:]]
    assert any("0.01" in word for word in alone)
    run_py(*alone)
    assert {name: len(cells) for name, cells in sweeps(Store(store)).items()} == {"mine": 1, "single": 1}
    run_py(*alone, "sweep=mine")
    assert len(sweeps(Store(store))["mine"]) == 2
    assert cli.main(["store", "forget", str(store), "--failed", "mine"]) == 0
    assert cli.main(["status", str(store)]) == 0
    nope = run_py(*alone, "sweep=nine", check=False)
    assert nope.returncode == 2
    assert "sweep='nine' is not known (did you mean 'mine'?)" in nope.stderr
