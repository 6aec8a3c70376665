"""What `status` says of a grid that has ended, and the report that is written while one runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from capacity_gap.commands import cli
from capacity_gap.report import page, watching
from capacity_gap.report import standing as standing_file
from capacity_gap.report.standing import KEPT, standing
from capacity_gap.report.watching import Follower, progress_words
from capacity_gap.runner.progress import View
from capacity_gap.runner.waves import noting_stop
from capacity_gap.runtime.process import Interrupted
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.contents import (
    NOT_STARTED,
    end_of,
    failure_file,
    forget_end,
    note_end,
    note_sweep,
    rounds_of,
    stopped_cells,
    sweeps,
)
from capacity_gap.store.files import write_checked, write_json
from capacity_gap.store.stage import Store
from tests.conftest import ROOT
from tests.test_report import grid

OURS = {"loss": "forward_kl", "family": "pico"}  # in records `loss` names the objective


class Grid:
    """A grid in a store whose cells end one by one, without training."""

    def __init__(self, folder: Path, name: str = "mine", **more) -> None:
        self.store, self.name = Store(folder), name
        self.store.create()
        frame = grid(budgets=(300_000,), seeds=1, **more)
        self.rows = [{k: v for k, v in row.items() if "/" not in k} for row in frame.to_dict("records")]
        self.keys = [f"record/{row['cell'][-20:]}" for row in self.rows]
        self.note()

    def note(self, count=None, about=None):
        cells = {
            key: {"name": key[-4:], "overrides": [f"student={row['student']}"], "stages": {key: 1.0}}
            for key, row in list(zip(self.keys, self.rows, strict=True))[:count]
        }
        note_sweep(self.store, self.name, cells, about=about)

    def end(self, count):
        """The first `count` cells are done."""
        for key, row in list(zip(self.keys, self.rows, strict=True))[:count]:
            folder = self.store.root / key
            if not folder.exists():
                folder.mkdir(parents=True)
                write_checked(folder / "record.json", {**row, **OURS, "cell": key[-20:], "status": "done"})
                write_json(folder / "stage.json", {"name": "record"})

    def fail(self, number, error="boom"):
        file = failure_file(self.store, self.keys[number])
        file.parent.mkdir(exist_ok=True)
        write_checked(
            file, {**self.rows[number], **OURS, "cell": self.keys[number][-20:], "status": "failed", "error": error}
        )

    def status(self, capsys, *words):
        code = cli.main(["status", str(self.store.root), *words])
        return code, capsys.readouterr().out


@pytest.fixture
def mine(tmp_path):
    return Grid(tmp_path / "store")


def test_status_says_what_curves_say_once_the_grid_has_ended(mine, capsys):
    mine.end(17)
    assert "the best teacher" not in mine.status(capsys)[1], "one cell is still to come"
    mine.end(18)
    code, text = mine.status(capsys)
    assert code == 0 and text.count("the best teacher has ") == 3
    assert "  50k at 300k tokens: the best teacher has 1" in text


def test_status_fits_a_grid_once(mine, capsys, monkeypatch):
    mine.end(18)
    first = mine.status(capsys)[1]
    assert "mine" in json.loads((mine.store.root / KEPT).read_text())
    monkeypatch.setattr(standing_file, "_sentences", lambda *given: pytest.fail("it was fitted before"))
    assert mine.status(capsys)[1] == first
    monkeypatch.setattr(standing_file, "_sentences", lambda *given: ["anew"])
    (mine.store.root / mine.keys[0] / "stage.json").unlink()
    done = mine.keys[1:]
    assert standing(mine.store, "mine", done) == (["anew"], 17), "other cells are fitted again"


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"mine": 1}', '{"mine": {"cells": 1}}'])
def test_a_damaged_answer_is_fitted_again(mine, capsys, kept):
    mine.end(18)
    (mine.store.root / KEPT).write_text(kept)
    assert mine.status(capsys)[1].count("the best teacher has ") == 3


def test_status_leaves_large_grids_to_fit(mine, capsys, monkeypatch):
    mine.end(18)
    monkeypatch.setattr(standing_file, "_sentences", lambda *given: pytest.fail("too many cells"))
    assert standing(mine.store, "mine", mine.keys, room=17) == (None, 0)
    monkeypatch.setattr("capacity_gap.report.standing.MOST", 17)
    assert f"fit {mine.store.root} --sweep mine` says what each student's best teacher is." in mine.status(capsys)[1]


def test_status_loads_no_torch_and_with_a_kept_answer_no_pandas(mine, capsys):
    mine.end(18)
    code = (
        "import sys\nfrom capacity_gap.commands import cli\n"
        f"assert cli.main(['status', {str(mine.store.root)!r}]) == 0\n"
        "print('loaded:', *sorted({'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert said[0].splitlines()[-1] == "loaded: pandas scipy"
    assert said[1].splitlines()[-1] == "loaded:"
    assert said[0].count("the best teacher has ") == said[1].count("the best teacher has ") == 3


def test_status_says_that_a_grid_in_rounds_has_ended_and_why(mine, capsys):
    mine.note(6, about={"round": 1, "what": "ratio", "answer": None})
    mine.end(6)
    assert "ended" not in mine.status(capsys)[1]
    note_end(mine.store, "mine", "ratio", "narrow enough: until=3", [2.5, 2.0, None])
    assert "  ended after 1 round: narrow enough: until=3; ratio: 2.5 (95 %: at least 2)" in mine.status(capsys)[1]
    assert set(sweeps(mine.store)["mine"]) == set(mine.keys) and len(rounds_of(mine.store, "mine")) == 1
    assert cli.main(["store", "verify", str(mine.store.root)]) in (0, 1)
    assert "sweeps/" not in capsys.readouterr().out, "the note is as sound as others"
    mine.note(12, about={"round": 2, "what": "ratio", "answer": None})
    assert end_of(mine.store, "mine") is None, "it went on"
    note_end(mine.store, "mine", "ratio", "the budget is spent", None)
    assert end_of(mine.store, "mine")["ended"] == "the budget is spent"
    forget_end(mine.store, "mine", "ratio")
    assert end_of(mine.store, "mine") is None
    mine.end(18)
    assert "the best teacher has " not in mine.status(capsys)[1], "rounds answer by one model of all cells"


def follower(mine, tmp_path, steps, **more):
    """One that does the next of `steps` instead of sleeping."""
    said, steps = [], iter(steps)

    def sleep(_seconds):
        pages.append((tmp_path / "r.html").read_text())
        step = next(steps)
        if callable(step):
            step()

    def progress(store, cells):
        now = View(store, cells).snapshot()
        return now.cells, [stage.key for stage in now.running]

    pages = []
    followed = Follower(
        str(mine.store.root),
        tmp_path / "r.html",
        more.pop("sweep", None),
        progress,
        sleep=sleep,
        say=said.append,
        **more,
    )
    followed.pages, followed.lines = pages, said
    return followed


def test_a_watched_report_is_written_when_cells_end_and_ends_with_the_grid(mine, tmp_path):
    pytest.importorskip("plotly")
    mine.end(3)

    def fail_last():
        mine.end(17)
        mine.fail(17)

    followed = follower(mine, tmp_path, [None, lambda: mine.end(9), fail_last, None], every_s=7)
    content = followed.run()
    assert len(followed.pages) == 4 and followed.pages[0] == followed.pages[1], "nothing ended: nothing is written"
    assert [line.partition(" ")[2].partition(" ")[2] for line in followed.lines[:-1]] == [
        *("3 of 18 cells done, 15 waiting.", "9 of 18 cells done, 9 waiting.", "17 of 18 cells done, 1 failed.")
    ]
    assert followed.lines[-1] == (
        "every grid has ended: 1 cell failed. "
        f"`python -m capacity_gap status {mine.store.root} --failed` says why cells failed and how to run them again."
    )
    assert followed.missing == 1
    watched, last = followed.pages[-1], (tmp_path / "r.html").read_text()
    assert 'data-every="7"' in watched and "17 of 18 cells done, 1 failed." in watched and 'id="pause"' in watched
    assert 'id="pause"' not in last and "the best teacher has" in last and "boom" in last
    assert len(content.done) == 17 and [f for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_a_watched_grid_that_fail_fast_ended_says_so(mine, tmp_path):
    pytest.importorskip("plotly")
    mine.end(15)
    mine.fail(15)
    for number in (16, 17):
        mine.fail(number, NOT_STARTED)
    followed = follower(mine, tmp_path, [None])
    followed.run()
    assert "3 cells failed, 2 of them not started because of fail_fast." in followed.lines[-1]
    assert followed.missing == 3


def test_a_watched_grid_that_was_interrupted_is_not_waited_for(mine, tmp_path, capsys):
    """It left cells that wait: nobody comes to them until the command is typed again."""
    pytest.importorskip("plotly")
    mine.end(12)

    def interrupt():
        with pytest.raises(Interrupted), noting_stop(mine.store, "mine", mine.keys):
            raise Interrupted(signal.SIGTERM)

    followed = follower(mine, tmp_path, [None, interrupt, None])
    followed.run()
    said = "mine was stopped: it was interrupted (SIGTERM); 6 cells left; the same command goes on with them"
    assert followed.lines[-1] == f"every grid has ended: {said}." and followed.missing == 6
    assert said in mine.status(capsys)[1]
    assert cli.main(["store", "verify", str(mine.store.root)]) in (0, 1)
    assert "sweeps/" not in capsys.readouterr().out, "the note is as sound as others"
    assert sweeps(mine.store).keys() == {"mine"} and len(sweeps(mine.store)["mine"]) == 18

    def again():
        with noting_stop(mine.store, "mine", mine.keys):
            assert stopped_cells(mine.store, "mine") == {}
            mine.end(18)

    followed = follower(mine, tmp_path, [again, None])
    assert len(followed.run().done) == 18 and followed.missing == 0
    assert followed.lines[-1] == "every grid has ended" and "was stopped" not in mine.status(capsys)[1]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (KeyboardInterrupt(), "it was interrupted (SIGINT)"),
        (ConfigError("no such partition"), "it ended with an error (no such partition)"),
        (RuntimeError("boom"), "it ended with an error (RuntimeError: boom)"),
    ],
)
def test_what_stopped_a_grid_is_noted(mine, error, why):
    with pytest.raises(type(error)), noting_stop(mine.store, "mine", mine.keys[:2]):
        raise error
    assert stopped_cells(mine.store, "mine") == dict.fromkeys(mine.keys[:2], why)
    with pytest.raises(KeyboardInterrupt), noting_stop(mine.store, "never noted", mine.keys):
        raise KeyboardInterrupt
    assert sweeps(mine.store).keys() == {"mine"}, "a grid that noted no cell is none"


def test_a_stop_of_several_cells_is_kept_for_those_that_are_not_started_again(mine):
    with pytest.raises(KeyboardInterrupt), noting_stop(mine.store, "mine", mine.keys[:4]):
        raise KeyboardInterrupt
    with noting_stop(mine.store, "mine", mine.keys[1:2]):
        left = stopped_cells(mine.store, "mine")
        assert left.keys() == {mine.keys[0], *mine.keys[2:4]}, "three still wait"
    with noting_stop(mine.store, "mine", mine.keys):
        assert stopped_cells(mine.store, "mine") == {}


def test_a_cell_of_a_dead_process_is_looked_at_again(mine, tmp_path):
    """Its lease looks alive for a while, and its end changes no folder that is watched."""
    pytest.importorskip("plotly")
    mine.end(17)
    lease = mine.store.work / mine.keys[17].replace("/", "-") / "lease.json"
    lease.parent.mkdir(parents=True)
    write_json(lease, {"owner": "me"})

    def fail_beside():
        mine.fail(17)

    followed = follower(mine, tmp_path, [fail_beside, None, lease.unlink, None])
    followed.run()
    assert followed.missing == 1


def test_a_grid_that_was_killed_is_told_after_a_while(mine, tmp_path):
    pytest.importorskip("plotly")
    mine.end(12)

    def press():
        raise KeyboardInterrupt

    followed = follower(mine, tmp_path, [None, None, None, press], every_s=200)
    followed.run()
    (idle,) = (line for line in followed.lines if line.startswith("nothing runs"))
    assert idle.startswith("nothing runs, and 6 of the cells wait: their jobs are queued, or the grid was killed.")


def test_a_teacher_that_several_cells_share_counts_as_running(mine, tmp_path):
    """It makes no cell run: the page neither says that nothing runs nor ends while it trains."""
    pytest.importorskip("plotly")
    mine.end(12)
    shared = {key: {"name": key[-4:], "overrides": [], "stages": {"teacher/0": 9.0, key: 1.0}} for key in mine.keys}
    note_sweep(mine.store, "mine", shared)
    lease = mine.store.work / "teacher-0" / "lease.json"
    lease.parent.mkdir(parents=True)
    write_json(lease, {"owner": "me"})

    def press():
        raise KeyboardInterrupt

    followed = follower(mine, tmp_path, [None, None, None, press], every_s=200)
    followed.run()
    assert not [line for line in followed.lines if line.startswith("nothing runs")]
    with pytest.raises(KeyboardInterrupt), noting_stop(mine.store, "mine", mine.keys):
        raise KeyboardInterrupt  # another start of the grid: this one still trains the teacher
    steps = [None, None, lambda: (lease.unlink(), mine.end(18)), None]
    followed = follower(mine, tmp_path, steps)
    assert len(followed.run().done) == 18 and followed.missing == 0


def test_watching_ends_with_1_if_cells_are_missing(mine, tmp_path, monkeypatch, capsys):
    pytest.importorskip("plotly")
    mine.end(17)
    mine.fail(17)
    command = ["report", str(mine.store.root), "--watch", "1", "--out", str(tmp_path / "r.html")]
    monkeypatch.setattr(watching, "RESTS", 0)
    assert cli.main(command) == 1
    (failure_file(mine.store, mine.keys[17])).unlink()
    mine.end(18)
    assert cli.main(command) == 0


def test_ctrl_c_ends_the_watching_and_leaves_a_page_that_stays(mine, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    mine.end(3)

    def press():
        raise KeyboardInterrupt

    followed = follower(mine, tmp_path, [press])
    monkeypatch.setattr(watching, "render", lambda *given, **more: (rendered.append(1), render(*given, **more))[1])
    rendered, render = [], page.render
    followed.run()
    assert len(rendered) == 1, "a second Ctrl-C would find it rendering"
    assert followed.lines[-1] == "stopped; the grids go on"
    assert 'id="pause"' not in (tmp_path / "r.html").read_text()


def test_a_cell_that_fails_may_be_started_again(mine, tmp_path):
    """A grid with retries goes on after a failure: one look that finds nothing running is no end."""
    pytest.importorskip("plotly")
    mine.end(17)
    mine.fail(17)

    def again():
        failure_file(mine.store, mine.keys[17]).unlink()

    followed = follower(mine, tmp_path, [again, lambda: mine.end(18), None])
    assert len(followed.run().done) == 18


def test_a_grid_in_rounds_is_watched_to_its_end(mine, tmp_path):
    pytest.importorskip("plotly")
    mine.note(6, about={"round": 1, "what": "ratio", "answer": None})
    mine.end(18)
    steps = [None, None, lambda: note_end(mine.store, "mine", "ratio", "nothing is left to run", None), None]
    followed = follower(mine, tmp_path, steps, sweep="mine")
    followed.run()
    assert len(followed.pages) == 4, "all cells are done, but the next round may come"
    assert (
        "mine ended after 1 round: nothing is left to run; ratio: not known yet." in (tmp_path / "r.html").read_text()
    )


def test_only_stores_are_watched(tmp_path, capsys):
    grid().to_csv(tmp_path / "runs.csv", index=False)
    assert cli.main(["report", str(tmp_path / "runs.csv"), "--watch", "--out", str(tmp_path / "r.html")]) == 2
    assert "--watch follows a store while its grids run" in capsys.readouterr().err


def test_an_unknown_sweep_is_refused_before_anything_is_written(mine, tmp_path):
    with pytest.raises(ConfigError, match="--sweep='other' is not known"):
        follower(mine, tmp_path, [], sweep="other").run()
    assert not (tmp_path / "r.html").exists()


def test_progress_in_words():
    assert progress_words({"done": 7, "failed": 1, "waiting": 2}) == "7 of 10 cells done, 1 failed, 2 waiting."
    assert progress_words({}) == "0 of 0 cells done."


def test_a_page_is_never_half_written(mine, tmp_path, monkeypatch):
    pytest.importorskip("plotly")
    mine.end(18)
    assert cli.main(["report", str(mine.store.root), "--out", str(tmp_path / "r.html")]) == 0
    before = (tmp_path / "r.html").read_text()
    monkeypatch.setattr(os, "replace", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cli.main(["report", str(mine.store.root), "--out", str(tmp_path / "r.html")])
    assert (tmp_path / "r.html").read_text() == before
    assert [f.name for f in tmp_path.iterdir() if f.name.endswith(".tmp")] == []
