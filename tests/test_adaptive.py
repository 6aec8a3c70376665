"""Grids in rounds: what is chosen, why it ends, what the store is told, and that a stopped one goes on."""

import itertools
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from benchmarks.next_stops import Look, end
from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.cell.strategy_config import NextConfig
from capacity_gap.fit.goal_answer import AFTER_STOPPING, LEAST_CELLS, narrow_enough, too_little
from capacity_gap.fit.regression import Estimate
from capacity_gap.records.candidate import Candidate
from capacity_gap.report.rounds import bounds_text, end_line, round_line, stopped_text
from capacity_gap.runner import budget
from capacity_gap.runner.adaptive import NARROW, Rounds, StopRounds, ends_of, pool_rows
from capacity_gap.runner.grid import Job, _name
from capacity_gap.runner.noted_answers import both_answers
from capacity_gap.runner.plan import make_plan
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.contents import end_of, forget_end, narrow_level, note_end, note_sweep, rounds_of
from capacity_gap.store.stage import Store, closure
from tests.conftest import ROOT, compose, run_here, run_py

STUDENTS, TEACHERS, SEEDS = ("40k", "55k", "80k"), ("80k", "120k", "180k", "270k", "400k"), (0, 1)
AXES = ["student=40k,55k,80k", "teacher=80k,120k,180k,270k,400k", "seed=0,1", "teacher_seed=${seed}"]


@pytest.fixture
def rounds(tiny, tmp_path):
    """Of a grid of thirty cells in an empty store, with settings."""

    def make(*given):
        cells, base = {}, compose([*tiny, f"store={tmp_path}", "strategy=adaptive", *given])
        for s, t, seed in itertools.product(STUDENTS, TEACHERS, SEEDS):
            if s == t:
                continue
            words = [f"student={s}", f"teacher={t}", f"seed={seed}", f"teacher_seed={seed}"]
            cell = pipeline.resolve(replace(base, student=s, teacher=t, seed=seed, teacher_seed=seed))
            cells[cell.record.digest] = (cell, words)
        store = Store(tmp_path)
        plan = make_plan([c for c, _ in cells.values()], store)
        return Rounds(cells, store, "grid", plan.worker, plan.speed)

    return make


def measured(rounds, *, noise=0.002, best=2.5, curvature=0.05, seed=0):
    """Losses of all cells with a best teacher at `best` times the student."""
    frame, rng = pool_rows(rounds.cells), np.random.default_rng(seed)
    z = np.log(frame["teacher_params"] / (best * frame["student_params"]))
    return frame.assign(loss=3 + curvature / 2 * z**2 + noise * rng.standard_normal(len(frame)), status="done")


def test_the_first_round_of_an_empty_store_has_the_cells_asked_for_with_reasons_and_hours(rounds):
    found = rounds("next.k=5").next(set())
    assert (found.number, len(found.cells), found.before) == (1, 5, None)
    assert all(found.reasons[digest] for digest in found.cells)
    made = {s.key: s for cell, _ in found.cells.values() for s in closure(cell.record).values()}
    pace = make_plan([c for c, _ in found.cells.values()], Store(next(iter(found.cells.values()))[0].config.store_path))
    assert found.device_hours == pytest.approx(sum(map(pace.speed.seconds, made.values())) / 3600)


def test_it_ends_once_the_interval_was_narrow_enough_twice_and_reports_a_wider_one(rounds, monkeypatch, capsys):
    mine = rounds("until=1000")
    more = measured(mine, seed=1)
    known = pd.concat([measured(mine).iloc[:20], more.assign(seed=more["seed"] + 2, teacher_seed=more["seed"] + 2)])
    monkeypatch.setattr(Rounds, "frame", lambda self: known.reset_index(drop=True))
    assert len(known) >= LEAST_CELLS
    assert f"after {LEAST_CELLS} cells" in NARROW
    assert NARROW in mine.next(set()).lines("ratio"), "a single narrow interval ends nothing"
    assert NARROW not in rounds("until=1.001").next(set()).lines("ratio")
    cell, words = next(iter(mine.cells.values()))
    noted = {cell.record.key: {"name": "a", "overrides": words, "stages": {}}}
    note_sweep(mine.store, "grid", noted, about={"round": 1, "what": mine.what, "answer": [2.5, 2.0, None]})
    assert mine.next(set()).cells, "the one before was open"
    cell, words = list(mine.cells.values())[1]
    noted = {cell.record.key: {"name": "b", "overrides": words, "stages": {}}}
    note_sweep(mine.store, "grid", noted, about={"round": 2, "what": mine.what, "answer": [2.5, 2.0, 3.0]})
    with monkeypatch.context() as few:
        few.setattr(Rounds, "frame", lambda self: known.iloc[: LEAST_CELLS - 1].reset_index(drop=True))
        assert mine.answer().interval[1] < 1000 * mine.answer().interval[0]
        assert mine.next(set()).cells, "a narrow interval of few cells ends nothing"
    with pytest.raises(StopRounds, match="narrow enough, before and after the last round: until=1000"):
        mine.next(set())
    answer = mine.answer()
    assert answer.interval[0] < 2.5 < answer.interval[1] < 1000 * answer.interval[0]
    monkeypatch.setattr(Rounds, "unfinished", lambda self: None)
    mine.run(None)
    (value, low, high), noted = ends_of(answer), end_of(mine.store, "grid")
    assert noted["answer"] == [value, low, high]
    assert noted["stopped_answer"]["level"] == AFTER_STOPPING > 0.95
    assert noted["stopped_answer"]["answer"][0] == value
    _, wide_low, wide_high = noted["stopped_answer"]["answer"]
    assert wide_low < low < high < wide_high
    said = f"Report {wide_low:.3g} to {wide_high:.3g} ({100 * AFTER_STOPPING:g} %)"
    said += ". Rounds ended at a narrow 95 % interval"
    assert said in capsys.readouterr().out
    assert said in end_line(noted)
    again = rounds("until=1000", "budget_hours=1e-9", "next.k=1")
    monkeypatch.setattr(Rounds, "next", lambda self, tried: (_ for _ in ()).throw(StopRounds("the budget is used up")))
    again.run(None)
    noted = end_of(mine.store, "grid")
    assert (noted["ended"], noted["stopped_answer"]["level"]) == ("the budget is used up", AFTER_STOPPING)
    assert said in capsys.readouterr().out, "another end does not undo the stop at a narrow interval"


def stops(monkeypatch, mine, why, *, narrow=False):
    """Runs the grid, whose next round is refused for a reason."""
    monkeypatch.setattr(Rounds, "next", lambda self, tried: (_ for _ in ()).throw(StopRounds(why, narrow=narrow)))
    mine.run(None)


def one_round(mine, number):
    """Notes a round of one cell as a run of the grid would."""
    cell, words = list(mine.cells.values())[number]
    noted = {cell.record.key: {"name": str(number), "overrides": words, "stages": {}}}
    note_sweep(mine.store, mine.name, noted, about={"round": number, "what": mine.what, "answer": None})


def test_a_narrow_end_is_remembered_through_other_questions_and_kills(rounds, monkeypatch, capsys):
    mine, other = rounds(), rounds("next.goal=target", "next.student=40k", "next.data=6k")
    known = measured(mine)
    monkeypatch.setattr(Rounds, "frame", lambda self: known)
    monkeypatch.setattr(Rounds, "unfinished", lambda self: None)
    assert narrow_level(mine.store, mine.what, "grid") is None
    one_round(mine, 1)
    stops(monkeypatch, mine, "narrow", narrow=True)
    assert f"({100 * AFTER_STOPPING:g} %). Rounds ended at a narrow" in capsys.readouterr().out
    _, low, high = ends_of(mine.answer())
    assert end_of(mine.store, "grid")["stopped_answer"]["factor"] == pytest.approx(high / low)
    one_round(other, 2)
    stops(monkeypatch, other, "the budget is used up")
    assert end_of(mine.store, "grid")["stopped_answer"] is None, "that question has had no narrow end"
    monkeypatch.setattr(Rounds, "next", lambda self, tried: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mine.run(None)
    assert narrow_level(mine.store, mine.what, "grid") == AFTER_STOPPING
    assert end_of(mine.store, "grid")["what"] == other.what, "the first question goes on"
    monkeypatch.setattr(Rounds, "frame", lambda self: known.iloc[:0])
    stops(monkeypatch, mine, "nothing identified")
    monkeypatch.setattr(Rounds, "frame", lambda self: known)
    stops(monkeypatch, mine, "the budget is used up")
    noted = next(part for part in ends(mine.store) if part["what"] == mine.what)
    assert noted["stopped_answer"]["level"] == AFTER_STOPPING and noted["stopped_answer"]["answer"]
    assert noted["own_rounds"] == 1 < noted["rounds"]
    assert narrow_level(mine.store, mine.what, "elsewhere") is None
    assert noted["stopped_answer"]["factor"] is None, "no smaller until= goes on after another end"
    same, unlike = replace(mine, name="again"), replace(mine, cells=dict(list(mine.cells.items())[5:]), name="unlike")
    for grid, level in ((same, AFTER_STOPPING), (unlike, None)):
        one_round(grid, 3)
        stops(monkeypatch, grid, "the budget is used up")
        told = end_of(mine.store, grid.name)["stopped_answer"]
        assert (told and told["level"]) == level, "grids that share cells have one memory"


def ends(store):
    """The notes of ended questions."""
    notes = [json.loads(file.read_text()) for file in (store.root / "sweeps").glob("*.json")]
    return [note for note in notes if note.get("ended")]


def test_a_level_and_rounds_of_an_older_version_stay_noted(rounds):
    mine = rounds()
    note_sweep(mine.store, "grid", {}, about={"round": 1, "what": mine.what, "answer": None, "after_stop": True})
    assert narrow_level(mine.store, mine.what) == 0
    note_end(mine.store, "grid", mine.what, "narrow", None, {"level": 0.995, "answer": [2.5, 1.0, 4.0]})
    forget_end(mine.store, "grid", mine.what)
    assert narrow_level(mine.store, mine.what) == 0.995
    known = measured(mine)
    assert both_answers(known, mine.goal, 0.995)[1]["level"] == 0.995
    assert both_answers(known, mine.goal, 0.0)[1]["level"] == AFTER_STOPPING
    assert both_answers(known, mine.goal, None)[1] is None


def test_a_question_has_one_name_however_it_is_written(rounds):
    names = {rounds("next.goal=target", f"next.student={s}", f"next.data={d}").what for s, d in (
        ("40k", "6k"), ("40_000", "6000"), ("0.04m", "0.006m"))}  # fmt: skip
    assert names == {"best teacher of 40k at 6k tokens"}


def test_a_goal_s_student_and_tokens_are_those_of_its_rung(rounds):
    goal = rounds("next.goal=target", "next.student=80k", "next.data=20x").goal
    assert (goal.student_params, goal.data_tokens) == (80_160, 20 * 80_160)


def test_the_name_of_a_grid_does_not_depend_on_how_it_is_gone_through():
    cells = ["student=40k", "teacher=120k"]
    names = {
        _name([Job([*cells, *more], None)])
        for more in ([], ["strategy=adaptive", "until=3"], ["next.k=2", "budget_hours=1", "retries=2", "plan=true"])
    }
    assert len(names) == 1 and _name([Job([*cells, "seed=1"], None)]) not in names


def test_a_round_that_would_gain_too_little_is_not_run(rounds, monkeypatch):
    mine = rounds()
    known = measured(mine)
    monkeypatch.setattr(Rounds, "frame", lambda self: known.iloc[:20])
    one = Candidate({"cell": next(iter(mine.cells))}, 0.019, 1.0, "why", True)
    monkeypatch.setattr("capacity_gap.fit.next_cells", lambda *args, **more: [one])
    with pytest.raises(StopRounds, match="no remaining cell would help: the best 1 cell would remove 1.9%"):
        mine.next(set())
    monkeypatch.setattr("capacity_gap.fit.next_cells", lambda *args, **more: [replace(one, gain=0.021)])
    assert mine.next(set()).gain == 0.021


def test_simulated_rounds_end_where_these_do(rounds, monkeypatch):
    """`benchmarks.next_stops.end` beside `Rounds.next`, given the same answers and gains."""
    mine, rng, kinds = rounds("until=3"), np.random.default_rng(0), set()
    one = Candidate({"cell": next(iter(mine.cells))}, 0.0, 1.0, "why", True)
    for _ in range(60):
        found = [({}, *({0.95: (low, 4.0)} for low in (2.0, 1.0, 0.0)))[i] for i in rng.integers(0, 4, 6)]
        gains = rng.choice([0.5, 0.001], 6, p=[0.8, 0.2])
        first = int(rng.integers(0, 3))
        path = [Look(i, 0.1, 6 * (first + i), float(gains[i]), 2.5, found[i]) for i in range(6)]
        path = path[: next((i for i, p in enumerate(path) if too_little(p.gain, p.answer)), 5) + 1]
        for before, now in itertools.pairwise([None, *path]):
            monkeypatch.setattr(Rounds, "frame", lambda self, n=now.cells: pd.DataFrame(index=range(n)))
            monkeypatch.setattr("capacity_gap.fit.goal_answer.answer", lambda frame, goal, now=now: now.answer)
            monkeypatch.setattr(Rounds, "_last", lambda self, before=before: before and before.answer)
            monkeypatch.setattr("capacity_gap.fit.next_cells", lambda *a, now=now, **k: [replace(one, gain=now.gain)])
            try:
                mine.next(set())
            except StopRounds as why:
                kind = "narrow" if why.narrow else "gain"
                break
        else:
            kind = "budget"
        simulated, look = end(path, 3.0)
        assert (simulated, look.number) == (kind, now.number)
        kinds.add(kind)
    assert kinds == {"narrow", "gain", "budget"}


def test_until_needs_a_grid_that_it_could_end(rounds):
    mine = rounds("until=3")
    few = Rounds(dict(list(mine.cells.items())[: LEAST_CELLS - 1]), mine.store, "grid", mine.worker, mine.planned_speed)
    with pytest.raises(ConfigError, match=f"only after {LEAST_CELLS} cells, and it has {LEAST_CELLS - 1}. Leave out"):
        few.check()
    mine.check()


def test_rounds_that_end_for_another_reason_report_the_interval_itself(rounds, monkeypatch, capsys):
    mine = rounds("budget_hours=1e-9", "until=1000")
    cell, words = next(iter(mine.cells.values()))
    note_sweep(
        mine.store,
        "grid",
        {cell.record.key: {"name": "a", "overrides": words, "stages": {}}},
        about={"round": 1, "what": mine.what, "answer": None},
    )
    known = measured(mine)
    monkeypatch.setattr(Rounds, "frame", lambda self: known.iloc[:20])
    monkeypatch.setattr(Rounds, "unfinished", lambda self: None)
    mine.run(None)
    assert "the budget is used up" in end_of(mine.store, "grid")["ended"]
    assert end_of(mine.store, "grid")["stopped_answer"] is None
    assert "Report" not in capsys.readouterr().out


def test_it_goes_on_while_the_interval_is_wide(rounds, monkeypatch):
    mine = rounds("until=1.0001", "next.goal=target", "next.student=60k", "next.data=6k")
    known = measured(mine, noise=0.01).iloc[::2]
    monkeypatch.setattr(Rounds, "frame", lambda self: known)
    found = mine.next(set())
    assert not set(found.cells) & set(known["cell"]), "nothing is run twice"
    assert 0 < found.gain < 1


def test_the_budget_holds_the_first_cells_and_then_none(rounds):
    whole = rounds("next.k=4").next(set())
    some = rounds("next.k=4", f"budget_hours={0.9 * whole.device_hours}").next(set())
    assert 1 <= len(some.cells) < 4
    assert set(some.cells) < set(whole.cells)
    with pytest.raises(StopRounds, match="the budget is used up: 1e-09 hours of budget_hours=1e-09 are left"):
        rounds("budget_hours=1e-9").next(set())


def test_hours_of_rounds_count_what_their_stages_took(rounds):
    mine = rounds()
    cell, words = next(iter(mine.cells.values()))
    key = cell.record.key
    stages = dict.fromkeys(closure(cell.record), 1800.0)
    made = list(stages)[:2]
    note_sweep(
        mine.store,
        "grid",
        {key: {"name": "a", "overrides": words, "stages": stages, "made": made}},
        about={"round": 1, "what": mine.what},
    )
    assert mine.spent_hours() == 0, "nothing is made yet"
    folder = mine.store.root / made[0]
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text('{"wall_s": 720.0}')
    assert mine.spent_hours() == pytest.approx(0.2)
    (folder / "stage.json").write_text('{"wall_s": 720.0, "resumed": true}')
    assert mine.spent_hours() == pytest.approx(0.5), "of a resumed stage only the last part was timed"


def test_a_round_that_was_cut_short_comes_first(rounds):
    mine = rounds("next.k=3")
    digest, (cell, words) = list(mine.cells.items())[7]
    noted = {"name": "a", "overrides": words, "stages": {}, "reason": "because", "made": []}
    note_sweep(mine.store, "grid", {cell.record.key: noted}, about={"round": 1, "what": mine.what})
    first = next(iter(mine))
    assert (list(first.cells), first.reasons[digest], first.noted) == ([digest], "because", True)


def test_nothing_is_left_after_all_cells(rounds, monkeypatch):
    mine = rounds()
    known = measured(mine)
    monkeypatch.setattr(Rounds, "frame", lambda self: known)
    with pytest.raises(StopRounds, match="no cell is left to run"):
        mine.next(set(mine.cells))


def test_rounds_of_another_question_or_of_other_cells_are_not_this_one_s(rounds):
    mine, other = rounds(), rounds("next.goal=target", "next.student=60k", "next.data=6k")
    (_, (cell, words)), *_ = mine.cells.items()
    noted = {cell.record.key: {"name": "a", "overrides": words, "stages": {}}}
    note_sweep(mine.store, "grid", noted, about={"round": 1, "what": mine.what, "answer": [2.5, 2.4, 2.6]})
    note_sweep(mine.store, "grid", {"record/else": noted[cell.record.key]}, about={"round": 2, "what": mine.what})
    assert [part["round"] for part in mine.noted()] == [1]
    assert other.noted() == []
    assert mine._last() is not None and other._last() is None
    found = other.next(set())
    assert found.number == 3, "no note is overwritten"


def test_cells_of_a_round_that_failed_are_not_chosen_again_and_their_note_stays(rounds):
    mine = rounds("next.k=3")
    going = iter(mine)
    first = next(going)
    noted = {
        c.record.key: {"name": "a", "overrides": w, "stages": {}, "reason": "x", "made": []}
        for c, w in first.cells.values()
    }
    note_sweep(mine.store, "grid", noted, about=first.note(mine.what))
    again = iter(mine)
    assert set(next(again).cells) == set(first.cells), "what was cut short comes first"
    second = next(again)
    assert not set(second.cells) & set(first.cells)
    assert second.number == 2
    note_sweep(mine.store, "grid", noted)  # a factorial start with the same cells
    assert [part["round"] for part in mine.noted()] == [1]


def test_the_store_is_told_why_it_ended_and_that_it_goes_on(rounds, monkeypatch):
    mine = rounds("next.k=3")

    class Crew:
        """Runs nothing."""

        def note(self, noted, about):
            note_sweep(mine.store, "grid", noted, about=about)

        def run(self, cells, noted):
            seen.append(end_of(mine.store, "grid"))

    seen, left = [], iter(mine)
    planned = [next(left)]

    def rounds_left(self):
        while planned:
            yield planned.pop()
        raise StopRounds("nothing left would help")

    monkeypatch.setattr(Rounds, "__iter__", rounds_left)
    mine.store.create()
    note_end(mine.store, "grid", mine.what, "of an earlier start", None)
    mine.run(Crew())
    assert seen == [None], "while it runs it has not ended"
    end = end_of(mine.store, "grid")
    assert (end["ended"], end["what"], end["rounds"]) == ("nothing left would help", mine.what, 1)
    assert mine.noted()[0]["round"] == 1, "the note of its end is no round"


def test_fail_fast_ends_the_rounds(rounds, monkeypatch):
    mine = rounds("next.k=3", "fail_fast=true")
    first = next(iter(mine))

    class Crew:
        """Fails every cell."""

        causes: ClassVar[dict[str, str]] = {}

        def note(self, noted, about):
            note_sweep(mine.store, "grid", noted, about=about)

        def run(self, cells, noted):
            ran.append(cells)
            self.causes.update(dict.fromkeys(noted, "boom"))

    ran = []
    monkeypatch.setattr(Rounds, "__iter__", lambda self: iter([first, first]))
    mine.store.create()
    mine.run(Crew())
    assert len(ran) == 1, "no further round"
    assert end_of(mine.store, "grid")["ended"] == "fail_fast=true, and a cell failed"


@pytest.mark.parametrize("more", [["distill.kd_weight=0.5,1"], ["epochs=1,2"], ["prune.method=expressive,random"]])
def test_a_grid_over_more_than_a_question_knows_is_refused(tiny, tmp_path, more):
    for asked in (["strategy=adaptive"], ["budget_hours=1e-9"]):
        done = run_here("-m", *tiny, *AXES, *more, *asked, f"store={tmp_path}", cwd=tmp_path)
        assert done.returncode == 2
        assert "run in rounds, or cut to a budget, may vary only" in done.stderr, done.stderr
        assert more[0].split("=")[0].split(".")[-1].removeprefix("method") in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [
                "-m",
                *AXES,
                "strategy=adaptive",
                *["next.goal=break_even", "next.student=60k", "next.small=400k", "next.large=80k"],
            ],
            "next.small=400k is not below next.large=80k",
        ),
        (["until=3"], "until=3 applies only to strategy=adaptive"),
        (["strategy=adaptive"], "strategy=adaptive is for grids: add -m"),
    ],
)
def test_what_is_not_read_or_cannot_be_is_said(tiny, tmp_path, given, said):
    done = run_here(*given[:1], *tiny, *given[1:], f"store={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("found", "until", "enough"),
    [
        (None, 2, False),
        (Estimate(2.5, (2.0, 3.0)), None, False),
        (Estimate(2.5, (2.0, 3.0)), 1.5, True),
        (Estimate(2.5, (2.0, 3.01)), 1.5, False),
        (Estimate(2.5, (0.0, 3.0)), 1e6, False),
        (Estimate(2.5, (2.0, math.inf)), 1e6, False),
        (Estimate(math.nan, (2.0, 3.0)), 2, False),
    ],
)
def test_narrow_enough(found, until, enough):
    assert narrow_enough(found, until) is enough


def test_answers_in_words():
    assert bounds_text(None) == "not known yet"
    assert bounds_text([2.5, 2.0, 3.0]) == "2.5 (2 to 3, a factor of 1.5)"
    assert bounds_text([2.5, None, None]) == "2.5 (no bound)"
    assert bounds_text([120e3, None, 300e3]) == "120k (at most 300k)"
    note = {"round": 2, "cells": {"a": {}}, "device_hours": 0.5, "answer": [2.5, 2.0, None], "what": "ratio"}
    assert round_line(note) == "round 2: 1 cell, 0.5 device-hours; before it, ratio: 2.5 (95 %: at least 2)"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"goal": "target", "student": "80k"}, "next.data is missing. It takes next.student, next.data"),
        ({"goal": "law", "student": "80k"}, "next.student does not apply"),
        ({"goal": "break_even", "student": "80k", "small": "120k"}, "next.large is missing"),
    ],
)
def test_goals_take_what_they_need_and_no_more(given, said):
    with pytest.raises(ConfigError, match=said):
        NextConfig(**given)


def test_how_a_grid_is_gone_through_decides_no_digest(tiny):
    plain, other = (
        pipeline.resolve(compose([*tiny, *more])).record.digest
        for more in ([], ["strategy=adaptive", "until=1.5", "next.k=9"])
    )
    assert plain == other


def test_commands_of_a_part_run_it_and_nothing_else(rounds):
    mine = rounds()
    part = dict(list(mine.cells.items())[3:17:2])
    lines = budget.commands(part, [words for _, words in mine.cells.values()])
    made = set()
    for line in lines:
        values = dict(word.split("=") for word in line.split()[3:])
        axes = [values[k].split(",") for k in ("student", "teacher", "seed", "teacher_seed")]
        made |= set(itertools.product(*axes))
    asked = {tuple(word.split("=")[1] for word in words) for _, words in part.values()}
    assert made == asked


def test_a_grid_over_its_budget_is_told_the_part_that_fits(tiny, tmp_path):
    given = [*tiny, *AXES, f"store={tmp_path}", "throughput=1e9"]
    hours = float(run_here("-m", *given, "plan=true", cwd=tmp_path).stdout.split(" device-hours")[0].split()[-1])
    done = run_here("-m", *given, f"budget_hours={hours / 2}", cwd=tmp_path)
    assert done.returncode == 2
    assert "The best part that fits is" in done.stderr and "strategy=adaptive" in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.strip().startswith("python run.py -m"))
    assert "student=" in line and "Nothing was started" in done.stderr
    assert not (tmp_path / "store.json").exists()
    target = ["next.goal=target", "next.student=40k", "next.data=6k"]
    done = run_here("-m", *given, *target, "budget_hours=1e-9", cwd=tmp_path)
    assert "The cheapest cell would cost " in done.stderr and "FLOPs" not in done.stderr
    done = run_here("-m", *given, "budget_hours=1e-9", cwd=tmp_path)
    assert "3 students under 4 teachers would cost " in done.stderr and "next.goal=target next.student=" in done.stderr


def test_a_plan_shows_the_first_round_and_starts_nothing(tiny, tmp_path):
    done = run_here("-m", *tiny, *AXES, "strategy=adaptive", "plan=true", f"store={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "round 1: 6 cells" in done.stdout and "not known yet" in done.stdout
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.slow
def test_an_adaptive_grid_runs_rounds_stops_goes_on_and_tells_why(tiny, tmp_path):
    given = [*tiny, *AXES, "strategy=adaptive", "next.k=5", f"store={tmp_path}", "sweep=mine", "budget_hours=0.02"]
    words = [sys.executable, str(ROOT / "run.py"), "-m", *given]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("round 2"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=120)
    cut = rounds_of(Store(tmp_path), "mine")
    assert [part["round"] for part in cut] == [1, 2]
    done = run_py("-m", *given)
    assert "round 2: " in done.stdout and "ended: " in done.stdout, done.stdout
    noted = rounds_of(Store(tmp_path), "mine")
    assert [part["round"] for part in noted] == list(range(1, len(noted) + 1))
    keys = [key for part in noted for key in part["cells"]]
    assert len(keys) == len(set(keys)) == len(records.read(tmp_path)), "each cell is in one round, and is there"
    assert noted[1]["answer"] is None or len(noted[1]["answer"]) == 3
    state = subprocess.run(
        [sys.executable, "-m", "capacity_gap", "status", str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert f"round {len(noted)}: " in state.stdout and "round 1: 5 cells" in state.stdout
    page = tmp_path / "page.html"
    subprocess.run(
        [sys.executable, "-m", "capacity_gap", "report", str(tmp_path), "--out", str(page)], cwd=ROOT, check=True
    )
    assert "mine was run in rounds" in page.read_text()


def test_a_reported_interval_that_is_open_decides_nothing():
    said = stopped_text({"level": 0.995, "answer": [2.5, 1.6, None], "factor": 2.0})
    assert said.startswith(". Report only at least 1.6 (99.5 %). Rounds ended at a narrow 95 % interval")
    assert said.endswith(
        "nothing is decided: add seeds, or teachers of other sizes; until= below 2 goes on with this grid"
    )
    assert stopped_text({"level": 0.99, "answer": [2.5, 1.6, None]}).endswith("teachers of other sizes")
    assert stopped_text({"level": 0.99, "answer": [2.5, None, None]}).startswith(
        ". Report no interval: the 99 % one has no end. Rounds ended"
    )
    closed = stopped_text({"level": 0.99, "answer": [2.5, 1.6, 4.1], "factor": 2.0})
    assert closed.startswith(". Report 1.6 to 4.1 (99 %). Rounds ended") and "decided" not in closed
    assert stopped_text(None) == stopped_text({"level": 0.99, "answer": None}) == ""


@pytest.mark.parametrize(
    ("seeds", "said"), [("0", "teachers trained with other seeds"), ("0,1", "add teachers of other")]
)
def test_a_grid_that_has_not_decided_says_what_it_lacks(rounds, seeds, said):
    mine = rounds()
    some = {d: c for d, c in mine.cells.items() if str(c[0].description["teacher_seed"]) in seeds.split(",")}
    lacking = replace(mine, cells=some)._lacking(None)
    assert said in lacking
    assert f"next {mine.config.store} --goal law names cells beyond it" in lacking
    assert mine._lacking(Estimate(2.5, (2.0, 3.0))) == ""
