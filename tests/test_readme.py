"""The README's commands are commands, and what it names is there."""

import re
import shlex
import subprocess

import pytest

from capacity_gap.commands import cli
from tests.conftest import ROOT, run_here

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands_of(text):
    return [
        line.partition("  #")[0].strip()
        for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.startswith(("python ", "make "))
    ]


COMMANDS = commands_of(README)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python run.py")])
def test_run_commands_plan(command, tmp_path):
    words = shlex.split(command)[2:]
    if "-m" not in words:
        words = ["-m", *words]
    done = run_here(*words, "plan=true", f"store={tmp_path / 'store'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan: " in done.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m capacity_gap")])
def test_other_commands_parse(command):
    assert callable(cli.parser().parse_args(shlex.split(command)[3:]).run)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_are_there(command):
    done = subprocess.run(["make", "-n", shlex.split(command)[1]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_it_is_short():
    assert len(README.split()) <= 900


FINDINGS = re.findall(r"^\| [^|]+ \| ([^|]+) \| \[[^\]]+\]\(([^)]+)\) \|$", README, re.MULTILINE)


@pytest.mark.parametrize(("number", "page"), FINDINGS)
def test_numbers_of_the_findings_stand_in_the_page_that_is_named(number, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"\d[\d.]*\d|\d", number.replace("SmolLM2", ""))
    assert found and [n for n in found if n not in text] == []


def test_there_are_findings_to_check():
    assert len(FINDINGS) >= 5


def test_paths_that_the_readme_names_exist():
    named = set(re.findall(r"`((?:capacity_gap|conf|sweeps|docs)/[\w./]*)`", README))
    assert named
    assert [p for p in named if not (ROOT / p).exists()] == []
