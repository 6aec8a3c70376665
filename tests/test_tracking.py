"""W&B mirrors the records: read back by its own tool, and through its own client from a server on the loopback."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.cell.stages import distil_student
from capacity_gap.cell.stages.shared import read_history
from capacity_gap.commands import cli
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runner.stopping import ending_workers
from capacity_gap.runtime.process import Interrupted
from capacity_gap.settings.errors import UserError
from capacity_gap.store.contents import sweeps
from capacity_gap.store.stage import Store
from capacity_gap.tracking import wandb_runs
from capacity_gap.tracking.tracking_config import TrackingConfig
from tests.conftest import compose, run_py
from tests.fake_wandb import KEY, serving

WANDB = [sys.executable, "-c", "import sys; from wandb.cli.cli import cli; sys.exit(cli())"]


def inspect(folder, *options):
    """What `wandb leet inspect` reads in an offline run."""
    done = subprocess.run(
        [*WANDB, "leet", "inspect", "--json", *options, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout


def history(folder):
    """The logged points of an offline run, by step."""
    lines = [json.loads(line) for line in inspect(folder).splitlines()]
    return [
        {k.removeprefix("train/"): v for k, v in line["history"]["item"].items() if k.startswith("train/")}
        | {"step": line["history"]["step"]["num"]}
        for line in lines
        if line["type"] == "history"
    ]


def offline(store):
    return wandb_runs.run_folders(store / "wandb")


@pytest.fixture
def server(monkeypatch):
    """W&B's server on the loopback, and this process told to use it."""
    import wandb

    with serving() as (fake, url):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()  # it remembers the server that it first heard of
        yield fake
        wandb.teardown()


def test_a_grid_that_is_asked_to_end_leaves_the_service_of_its_runs_alone(tmp_path):
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, project="capacity_gap") as run:
        with pytest.raises(Interrupted), ending_workers():
            raise Interrupted
        run.log({"train/loss": 2.0})
    wandb.teardown()
    assert [point["loss"] for point in history(Path(run.dir).parent)] == [2.0]


@pytest.fixture(scope="module")
def sweep(tiny, tmp_path_factory):
    """A grid of three cells, of which one fails, tracked offline with a key in the environment."""
    store = tmp_path_factory.mktemp("sweep")
    given = ["student=40k", "teacher=55k,80k", "train.learning_rate=0.01,1e20", "tracking=offline"]
    words = ["-m", *[t for t in tiny if not t.startswith("tracking")], *given, f"store={store}"]
    done = run_py(*words, check=False, WANDB_API_KEY=KEY)
    return store, words, done


@pytest.mark.slow
def test_an_offline_sweep_read_back_by_wandb_is_the_records(sweep):
    store, _, done = sweep
    rows = {row["cell"]: row for row in records.read(store)}
    assert {r["status"] for r in rows.values()} == {"done", "failed"} and len(rows) == 4, done.stderr
    runs = {s["run_id"]: (s, folder) for folder in offline(store) for s in [json.loads(inspect(folder, "--summary"))]}
    assert len(offline(store)) == len(runs) == 5, "one run a cell, and one for the sweep"
    (name,) = sweeps(Store(store))
    for cell, row in rows.items():
        summary = {k: v for k, v in runs[cell][0]["summary"].items() if k in row}
        assert summary == {k: v for k, v in row.items() if v is not None}
        assert runs[cell][0]["config"] == {k: row[k] for k in runs[cell][0]["config"]}
        assert runs[cell][0]["tags"] == [name]
        assert (runs[cell][0]["exit_code"] == 0) == (row["status"] == "done")
    done_cells = [c for c, row in rows.items() if row["status"] == "done"]
    for cell in done_cells:
        trained = json.loads((store / "record" / cell / "stage.json").read_text())["inputs"]["trained"]
        logged = [{k: v for k, v in point.items() if k != "tokens_per_s"} for point in history(runs[cell][1])]
        assert logged == read_history(store / trained)


@pytest.mark.slow
def test_the_sweep_has_a_run_with_all_its_cells_and_the_law(sweep):
    store, _, _ = sweep
    (summary, folder) = next(
        (s, f) for f in offline(store) for s in [json.loads(inspect(f, "--summary"))] if s["name"].startswith("sweep")
    )
    said = summary["summary"]
    assert (said["cells"], said["cells/done"], said["cells/failed"], said["law/status"]) == (4, 2, 2, "too_few")
    table = json.loads((folder / "files" / said["records"]["path"]).read_text())
    mirrored = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    kept = ("cell", "status", "student_loss", "teacher_params")
    assert [{k: r[k] for k in kept} for r in mirrored] == [{k: r[k] for k in kept} for r in records.read(store)]
    assert (folder / "files" / said["figures/curves"]["path"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_key_reaches_no_file(sweep):
    store, _, _ = sweep
    files = [f for f in store.rglob("*") if f.is_file()]
    assert any(f.suffix == ".wandb" for f in files) and any("logs" in f.parts for f in files)
    assert [str(f) for f in files if KEY.encode() in f.read_bytes()] == []


@pytest.mark.slow
def test_a_sweep_that_grows_keeps_one_run_and_counts_the_reused_cells(sweep):
    store, words, _ = sweep
    grown = [w.replace("0.01,1e20", "0.01") if w.startswith("train.") else w for w in words]
    before = {f.name for f in offline(store)}
    assert "2 reused" in run_py(*grown).stdout
    (new,) = [f for f in offline(store) if f.name not in before]
    said = json.loads(inspect(new, "--summary"))["summary"]
    assert (said["cells"], said["cells/done"], "cells/failed" in said) == (2, 2, False)
    run_py(*grown)
    assert len(offline(store)) == len(before) + 1, "nothing changed: nothing is written again"


@pytest.mark.slow
def test_the_records_come_back_from_wandb(sweep, server):
    store, _, _ = sweep
    (name,) = {name for name, cells in sweeps(Store(store)).items() if len(cells) == 4}
    cells = [f for f in offline(store) if f.name.split("-")[-1] in {r["cell"] for r in records.read(store)}]
    subprocess.run([*WANDB, "sync", "--yes", "--project", "gap", *map(str, cells)], check=True, capture_output=True)
    got = records.load("wandb:team/gap")
    with pytest.raises(UserError, match="cannot be read"):
        records.load("wandb:team/other")
    local = records.load(store)
    columns = [c for c in local.columns if local[c].notna().any()]
    ordered, expected = (t.sort_values("cell")[columns].reset_index(drop=True) for t in (got, local))
    pd.testing.assert_frame_equal(ordered, expected, check_exact=True, check_dtype=False)
    assert {run["group"] for run in server.runs.values()} == {name}


def test_a_source_that_names_no_project_is_refused():
    with pytest.raises(UserError, match="entity/project"):
        records.load("wandb:gap")


def test_sync_uploads_each_run_once(tmp_path, server, capfd):
    row = records.Record(1, "c0", "done", student_loss=0.25, metrics={"m": {"value": 0.5, "shots": 0}}).to_dict()
    Store(tmp_path).create()
    folder = tmp_path / "wandb"
    tracker = wandb_runs.start(
        TrackingConfig(), cell="c0", name="a cell", config={"seed": 0}, folder=folder, sweeps=["g"]
    )
    tracker.finish(row, [{"step": 1, "ce": 2.5}, {"step": 11, "ce": 1.5}])
    assert cli.main(["sync", str(tmp_path), "--project", "gap"]) == 0
    assert "1 runs uploaded, 0 left" in capfd.readouterr().out
    assert cli.main(["sync", str(tmp_path)]) == 0
    assert "0 runs uploaded" in capfd.readouterr().out
    run = server.runs["c0"]
    assert (run["uploads"], run["tags"], run["job_type"]) == (1, ["g"], "cell")
    assert [(p["_step"], p["train/ce"]) for p in run["history"].values()] == [(1, 2.5), (11, 1.5)]
    assert records.load("wandb:team/gap").equals(records.to_frame([row]))


@pytest.mark.slow
def test_sync_leaves_a_run_that_is_written_to(tmp_path, server):
    """So many points that some are on disk before the end: `wandb sync` would take those, and never the rest."""
    Store(tmp_path).create()
    points = [{"step": i, "ce": 3.0 - i / 1e4, "kl": 1.0, "grad_norm": 1.0} for i in range(1, 3001)]
    row = records.Record(1, "c0", "done", student_loss=0.25).to_dict()
    tracker = wandb_runs.start(TrackingConfig(), cell="c0", name="c", config={}, folder=tmp_path / "wandb")
    for point in points:
        tracker.log(point)
    (log,) = (tmp_path / "wandb").glob("wandb/offline-run-*-c0/*.wandb")
    deadline = time.monotonic() + 30
    while log.stat().st_size < 30_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.stat().st_size >= 30_000, "a first part is on disk"
    sync = [sys.executable, "-m", "capacity_gap", "sync", str(tmp_path), "--project", "gap"]
    said = subprocess.run(sync, check=True, capture_output=True, text=True).stdout
    assert "0 runs uploaded, 0 left" in said and "1 runs have not ended" in said
    tracker.finish(row, points)
    said = subprocess.run(sync, check=True, capture_output=True, text=True).stdout
    assert "1 runs uploaded, 0 left" in said and "not ended" not in said
    assert len(server.runs["c0"]["history"]) == 3000 and server.runs["c0"]["summary"]["status"] == "done"


def test_online_a_cell_that_goes_on_is_one_run_with_each_step_once(tmp_path, server, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb_runs._reach.cache_clear()
    points = [{"step": step, "ce": 1.0 + step} for step in range(1, 62, 10)]
    row = records.Record(1, "c0", "done", student_loss=0.25).to_dict()
    online = TrackingConfig(mode="online", project="gap")
    given = {"cell": "c0", "name": "c", "config": {"seed": 0}, "folder": tmp_path / "wandb", "sweeps": ["g"]}
    first = wandb_runs.start(online, **given)
    for point in points[:3]:
        first.log(point)
    first.leave()
    assert server.runs["c0"]["summary"]["status"] == "interrupted"
    second = wandb_runs.start(online, **given)
    second.log(points[3])
    second.finish(row, points)
    assert not first.broken and not second.broken and "WANDB_MODE" not in os.environ
    (run,) = server.runs.values()
    assert [(p["_step"], p["train/ce"]) for p in run["history"].values()] == [(p["step"], p["ce"]) for p in points]
    assert (run["summary"]["status"], run["tags"], run["group"], run["config"]["seed"]) == (
        "done",
        ["g"],
        "g",
        {"value": 0},
    )
    assert offline(tmp_path) == [], "nothing is left for sync"
    assert records.load("wandb:team/gap")["student_loss"].tolist() == [0.25]


def test_runs_of_others_in_a_project_are_left_out(server, capfd):
    ours = records.Record(1, "c0", "done", student_loss=1.0, metrics={"m": {"value": 1}}).to_dict()
    summaries = {
        "c0": {k: v for k, v in ours.items() if v is not None},
        "mute": {"status": "done", "loss": 1},
        "nan": {"schema_version": 1, "cell": "x", "status": "done", "student_loss": "NaN"},
        "odd": {"schema_version": 1, "cell": "x", "status": "done", "metrics": {"m": 3}},
        "open": {"status": "running"},
    }
    for name, summary in summaries.items():
        server.run(name).update(job_type="cell", summary=summary)
    assert records.load("wandb:team/gap")["cell"].tolist() == ["c0"]
    said = capfd.readouterr().err
    assert all(f"{name} (" in said for name in ("mute", "nan", "odd")) and "open" not in said
    del server.runs["c0"]
    with pytest.raises(UserError, match="contains no cells"):
        records.load("wandb:team/gap")


def test_sync_gives_up_in_time(tmp_path):
    from capacity_gap.tracking.wandb_api import sync

    run = wandb_runs.open_run(TrackingConfig(), tmp_path, id="x", name="x", config={}, job_type="cell")
    wandb_runs.end(run, failed=False)
    with serving(answers=False) as (_, url), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", url)
        patch.setenv("WANDB_API_KEY", KEY)
        began = time.monotonic()
        assert sync(tmp_path, limit_s=4) == (0, 1)
        assert time.monotonic() - began < 12


@pytest.mark.slow
def test_a_resumed_cell_is_one_run_with_each_step_once(tiny, tmp_path, monkeypatch):
    given = ["student=40k", "teacher=55k", "data=20k", "tracking=offline", f"store={tmp_path}"]
    config = compose([*tiny, *given, "train.batch_size=4"])
    cell = pipeline.resolve(config)
    real = distil_student.distil

    def asked_to_stop(run):
        seen = run.runtime.on_log

        def on_log(point):
            seen(point)
            if point["step"] > 40:
                run.runtime.stop.set()

        run.runtime.on_log = on_log
        real(run)

    with monkeypatch.context() as patch:
        patch.setattr(distil_student, "distil", asked_to_stop)
        with pytest.raises(Interrupted):
            run_config(config)
    (left,) = offline(tmp_path)
    assert len(history(left)) > 0 and json.loads(inspect(left, "--summary"))["summary"]["status"] == "interrupted"
    run_config(config)
    (whole,) = offline(tmp_path)
    trained = Store(tmp_path).path(cell.distilled)
    assert json.loads((trained / "stage.json").read_text())["resumed"]
    assert [p["step"] for p in history(whole)] == [p["step"] for p in read_history(trained)]
    assert json.loads(inspect(whole, "--summary"))["summary"]["status"] == "done"


@pytest.mark.slow
def test_artifacts_go_along_when_asked_for(tiny, tmp_path):
    given = ["student=40k", "teacher=55k", "tracking=offline", "tracking.artifacts=model", f"store={tmp_path}"]
    run_config(compose([*tiny, *given]))
    (run,) = offline(tmp_path)
    (found,) = [a for line in inspect(run).splitlines() if (a := json.loads(line))["type"] == "artifact"]
    names = {entry["path"] for entry in found["artifact"]["manifest"]["contents"]}
    assert {"record.json", "model.safetensors", "metrics.jsonl"} <= names


def without_key(tmp_path):
    return {"HOME": str(tmp_path), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", KEY])
def test_online_without_a_key_or_a_network_goes_on_offline(tiny, tmp_path, key):
    store = tmp_path / "store"
    words = [*[t for t in tiny if not t.startswith("tracking")], "student=40k", "teacher=55k", "tracking=online"]
    environment = {**without_key(tmp_path), "WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run_py("-m", *words, f"store={store}", **environment)
    assert "grid: 1 done" in done.stdout
    assert len([line for line in done.stderr.splitlines() if "W&B cannot be reached" in line]) == 1, done.stderr
    (row,) = records.read(store)
    summaries = {s["run_id"]: s["summary"] for f in offline(store) for s in [json.loads(inspect(f, "--summary"))]}
    assert summaries[row["cell"]]["student_loss"] == row["student_loss"]


@pytest.mark.slow
def test_a_silent_server_costs_little_time(tmp_path):
    code = (
        "import sys, time, wandb; from capacity_gap.tracking import wandb_runs\n"
        "from capacity_gap.tracking.tracking_config import TrackingConfig\n"
        "from pathlib import Path; t = time.monotonic()\n"
        "run = wandb_runs.open_run(TrackingConfig(mode='online'), Path(sys.argv[1]), id='x', name='x', config={})\n"
        "print(time.monotonic() - t, run.settings.mode)"
    )
    with serving(answers=False) as (_, url):
        environment = {**os.environ, **without_key(tmp_path), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, mode = done.stdout.split()
    # It takes about 12 s, and at most the half minute that is promised.
    assert float(seconds) < 30 and mode == "offline", done.stderr
