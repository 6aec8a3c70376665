"""A store that may only be read: what reads it needs no write access."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from capacity_gap.cell import pipeline
from capacity_gap.store.contents import note_sweep
from capacity_gap.store.stage import Store
from tests.conftest import ROOT

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def without_privileges():
    """Root reads and writes whatever it likes; a program that it starts after this does not."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.fixture(scope="module")
def read_only(tiny_cell, tmp_path_factory):
    """A copy of a finished store in which nothing may be changed."""
    store = shutil.copytree(tiny_cell.store_path, tmp_path_factory.mktemp("shared") / "store")
    key = pipeline.resolve(tiny_cell).record.key
    note_sweep(Store(store), "mine", {key: {"name": "c", "overrides": [], "stages": {key: 0.0}}})
    folders = [store, *(p for p in store.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield store
    for folder in folders:
        folder.chmod(0o755)


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=without_privileges,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_store_really_cannot_be_written(read_only):
    status, said = run("-c", f"open({str(read_only / 'x')!r}, 'w')")
    assert status == 1
    assert "PermissionError" in said


COMMANDS = """
    status {store} --failed
    store ls {store}
    store du {store}
    store gc {store}
    store verify {store}
    fit {store} --sweep mine
    report {store} --out {out}/report.html
    export {cell} {out}/model --store {store}
"""


def test_what_reads_a_store_needs_no_write_access(read_only, tiny_cell, tmp_path):
    cell = pipeline.resolve(tiny_cell).record.digest[:8]
    given = [line.split() for line in COMMANDS.format(store=read_only, out=tmp_path, cell=cell).strip().splitlines()]
    status, said = run("-c", f"from capacity_gap.commands.cli import main; print([main(words) for words in {given}])")
    assert status == 0, said
    assert said.splitlines()[-1] == str([0] * len(given)), said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["-m"]], ids=["cell", "grid"])
def test_a_plan_needs_no_write_access_and_a_run_says_that_it_does(read_only, tiny, kind):
    given = [*kind, *tiny, "student=40k", "teacher=55k", f"store={read_only}"]
    status, said = run("run.py", *given, "plan=true")
    assert status == 0, said
    assert "plan: 1 cell, 1 of them recorded" in said
    status, said = run("run.py", *given, "seed=1")
    assert status == 2
    assert "cannot be written" in said
    assert "Traceback" not in said
