"""How far a grid is, as anyone with the store can see it."""

import json
import os

import pytest

from capacity_gap.commands import cli
from capacity_gap.runner.progress import Snapshot, View, Watch, failure_file
from capacity_gap.runtime.process import Runtime
from capacity_gap.store.lease import Lease
from capacity_gap.store.logs import log_file, logging_to, tail
from capacity_gap.store.stage import Stage, Store
from tests.conftest import run_here, run_py


def write(run):
    (run.out / "x").write_text("x")


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path)
    made.create()
    return made


def grid(*stages, shared=()):
    """Cells `record/<n>` that need their own stage and all shared ones, every stage of effort 1."""
    return {
        f"record/{n}": {"name": f"cell {n}", "stages": {s.key: 1.0 for s in (*shared, own)} | {f"record/{n}": 0.0}}
        for n, own in enumerate(stages)
    }


def test_a_view_tells_done_running_failed_and_waiting(store):
    teacher, *own = [Stage("s", 1, {"n": n}, {}, write) for n in range(5)]
    cells = grid(*own, shared=[teacher])
    store.compute(teacher, Runtime())
    store.compute(own[0], Runtime())
    (store.root / "record" / "0").mkdir(parents=True)
    (store.root / "record" / "0" / "stage.json").write_text("{}")
    failure_file(store, "record/1").parent.mkdir()
    failure_file(store, "record/1").write_text("{}")
    place = store.work / own[2].key.replace("/", "-")
    with Lease(place, lambda: False) as lease:
        (place / lease.owner).mkdir()
        progress = {"stage": own[2].key, "done": 3, "total": 4, "elapsed_s": 7.0}
        (place / lease.owner / "progress.json").write_text(json.dumps(progress))
        now = View(store, cells).snapshot()
    assert list(now.cells.values()) == ["done", "failed", "running", "waiting"]
    assert now.kinds == {"s": (2, 5), "record": (1, 4)}
    assert [(r.key, r.share) for r in now.running] == [(own[2].key, 0.75)]
    assert now.share == pytest.approx(2.75 / 5)


def test_a_dead_owner_is_not_running(store):
    stage = Stage("s", 1, {}, {}, write)
    place = store.work / stage.key.replace("/", "-")
    with Lease(place, lambda: False) as lease:
        os.utime(lease.file, (1, 1))
        assert View(store, grid(stage)).snapshot().running == []


def test_a_shared_stage_at_work_does_not_make_its_cells_running(store):
    teacher, one, two = (Stage("s", 1, {"n": n}, {}, write) for n in range(3))
    with Lease(store.work / teacher.key.replace("/", "-"), lambda: False):
        now = View(store, grid(one, two, shared=[teacher])).snapshot()
    assert set(now.cells.values()) == {"waiting"}
    assert len(now.running) == 1


def test_a_log_keeps_lines_warnings_and_the_traceback(store):
    import logging

    def job():
        logging.getLogger("capacity_gap.x").info("step 3")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError), logging_to(store, "record/abc"):
        job()
    logging.getLogger("capacity_gap.x").info("after the end")
    text = log_file(store, "record/abc").read_text()
    assert "INFO step 3" in text
    assert "RuntimeError: boom" in text
    assert "after the end" not in text
    assert tail(store, ["record/abc", "record/none"], lines=1)[1] == ["RuntimeError: boom"]
    assert tail(store, ["record/none"]) is None


@pytest.mark.slow
def test_status_of_a_grid_with_a_failure_says_why_and_how_to_rerun(tiny, tmp_path, capsys):
    store = tmp_path / "store"
    given = [*tiny, "student=40k", "teacher=55k", f"store={store}"]
    done = run_py("-m", *given, "train.learning_rate=0.01,1e9", check=False)
    assert done.returncode == 1
    assert cli.main(["status", str(store), "--failed"]) == 1
    out = capsys.readouterr().out
    assert "1 done, 1 failed" in out
    assert "cause: the loss is no longer finite" in out
    assert f"log:   {store}/logs/record-" in out
    (command,) = [line.split("rerun: ")[1] for line in out.splitlines() if "rerun: " in line]
    again = run_py(*command.replace("1000000000.0", "0.01").split()[2:])
    assert again.returncode == 0
    with pytest.raises(SystemExit):
        cli.main(["status", "--nope"])
    assert cli.main(["status", str(store), "--sweep", "nope"]) == 2
    assert "--sweep='nope' is not known" in capsys.readouterr().err


def test_plan_is_a_command_too(tiny, tmp_path, capfd):
    assert cli.main(["plan", *tiny, "student=40k,60k", "teacher=80k", f"store={tmp_path}"]) == 0
    assert "plan: 2 cells" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_single_cell_that_fails_before_its_work_has_failed(tmp_path, capsys):
    store, text = tmp_path / "store", tmp_path / "text.txt"
    text.write_bytes("Ein schöner Tag.".encode("latin-1"))
    words = ["student=60k", "teacher=120k", "data=0", "corpus=text", f"corpus.path={text}", f"store={store}"]
    done = run_here(*words, cwd=tmp_path)
    assert done.returncode == 2 and "not UTF-8 text" in done.stderr
    assert cli.main(["status", str(store), "--failed"]) == 1
    assert f"cause: {text}, line 1: not UTF-8 text" in capsys.readouterr().out
    assert cli.main(["store", "forget", str(store), "--failed"]) == 0
    assert cli.main(["status", str(store)]) == 0


@pytest.mark.parametrize(
    ("done", "elapsed", "said"),
    [(0.0, 50.0, "…"), (1.0, 50.0, "…"), (1.0, 400.0, "about 11.0 h left"), (2.0, 50.0, "about 41 min left")],
)
def test_the_time_left_is_told_once_it_can_be(done, elapsed, said, monkeypatch):
    """A thousandth of a grid, done in its first seconds, told hours of a run of one minute."""

    class Grid:
        def snapshot(self):
            return Snapshot({}, {}, [], 0.0, 100.0)

    watch = Watch(Grid())
    monkeypatch.setattr("capacity_gap.runner.progress.time.monotonic", lambda: watch.started + elapsed)
    assert watch._left(Snapshot({}, {}, [], done, 100.0)) == said
