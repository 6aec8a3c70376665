"""A small real corpus, so that whole cells run in seconds: the first part of Python's own language reference."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capacity_gap.cell import pipeline
from capacity_gap.runner.run_cell import run_config
from capacity_gap.store.stage import Store

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 240 kB of prose, a paragraph a document."""
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("corpus") / "topics.txt"
    file.write_text("\n\n".join(topics[t] for t in sorted(topics))[:240_000], encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny(text_file) -> list[str]:
    """Overrides that make a cell cost about a second."""
    return [
        "corpus=text",
        f"corpus.path={text_file}",
        "corpus.sequence_length=32",
        "family.teacher_data=8k",
        "data=6k",
        "prune.batches=2",
        "evaluate.tokens=2000",
        "evaluate.ood_tokens=1000",
        "tracking=disabled",
    ]


@pytest.fixture(scope="session")
def tiny_cell(tiny, tmp_path_factory):
    """Settings of one tiny cell, and a store in which it has been run."""

    store = tmp_path_factory.mktemp("store")
    config = compose([*tiny, "student=40k", "teacher=55k", f"store={store}"])
    run_config(config)
    return config


@pytest.fixture(scope="session")
def warm(tmp_path_factory) -> Path:
    """A store whose cells share tokenizers, texts and teachers, for tests that look at a record of their own alone."""
    return tmp_path_factory.mktemp("warm")


def ran(config) -> dict:
    """Runs a cell and returns its record."""
    run_config(config)
    record = Store(config.store_path).path(pipeline.resolve(config).record) / "record.json"
    return json.loads(record.read_text())


def compose(overrides):
    """The validated settings that `run.py` would get."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from capacity_gap.cell import config

    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.from_hydra(hydra_compose("config", overrides=overrides))


def run_py(*arguments, cwd=None, check=True, **environment):
    """Runs `python run.py …` as a user does; returns the finished process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=cwd or ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(*arguments, cwd):
    """The same in this process, for what ends before any compute: starting Python takes longer than the rest."""
    from hydra.core.global_hydra import GlobalHydra

    from capacity_gap.commands.run import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = argv
        GlobalHydra.instance().clear()
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())
