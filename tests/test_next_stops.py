"""When rounds may end at a narrow interval and what they report: chosen by its rule, judged on seeds of its own."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from benchmarks import next_stops
from benchmarks.next_cells import COSTS, study_of
from benchmarks.next_stops import Look, end
from benchmarks.next_surfaces import SURFACES
from benchmarks.study import filled
from capacity_gap.cell.config import RunConfig
from capacity_gap.fit.goal_answer import AFTER_STOPPING, LEAST_CELLS, LEAST_GAIN, answer, answers
from capacity_gap.fit.next_cells import next_cells
from capacity_gap.fit.next_model import Goal
from capacity_gap.settings.declare import walk
from tests.conftest import ROOT

JUDGED = pd.read_csv(ROOT / "results" / "next_stops.csv")


def test_the_rule_is_what_its_own_rule_chooses():
    rules = pd.read_csv(ROOT / "results" / "next_stops_levels.csv")
    tried = list(itertools.product(next_stops.LEAST, next_stops.LEVELS))
    assert list(zip(rules["least_cells"], rules["level"], strict=True)) == tried
    assert next_stops.chosen(rules) == (LEAST_CELLS, AFTER_STOPPING)


def test_the_setting_tells_the_rule():
    (said,) = [d.setting.meaning for d in walk(RunConfig) if d.key == "until"]
    assert f"after {LEAST_CELLS} cells or more. A {100 * AFTER_STOPPING:g} % interval is then reported" in said


def test_intervals_after_a_narrow_end_hold_where_the_model_fits():
    narrow = JUDGED[JUDGED["end"].eq("narrow") & JUDGED["until"].eq(3) & JUDGED["surface"].isin(next_stops.FITTED)]
    mine = narrow[narrow["goal"].isin(["law", "target"])].sum(numeric_only=True)
    assert mine["ends"] > 100
    assert mine["holds"] >= 0.95 * mine["ends"]
    assert mine["closed_holds"] >= 0.89 * mine["closed"]
    assert mine["holds_95"] < 0.93 * mine["ends"], "else no other interval would be needed"


def test_intervals_after_a_small_gain_hold_where_the_model_fits():
    gain = JUDGED[JUDGED["end"].eq("gain") & JUDGED["until"].eq(3) & JUDGED["surface"].isin(next_stops.FITTED)]
    assert gain["holds_95"].sum() >= 0.95 * gain["known"].sum() > 100


def test_every_path_ends_once_under_each_instruction():
    told = JUDGED.fillna({"until": 0, "budget": 0}).groupby(["surface", "goal", "until", "budget"])
    assert (told["ends"].sum() == told["paths"].first()).all()
    assert (
        (JUDGED["holds_95"] <= JUDGED["known"]).all()
        and (JUDGED["known"] <= JUDGED["ends"]).all()
        and (JUDGED["closed_holds"] <= JUDGED["closed"]).all()
    )
    assert JUDGED.loc[~JUDGED["goal"].str.contains("break"), "paths"].eq(2 * next_stops.STUDIES).all()


def test_the_page_has_the_table_of_its_results():
    page = next_stops.PAGE.read_text(encoding="utf-8")
    assert filled(page, {"stops": next_stops.page_table(JUDGED)}) == page
    assert "study one |" in page.partition("<!-- stops -->")[2]


def look(number, ratio, cells, *, share=0.1, gain=0.5, true=2.5, level=0.95):
    """An interval of a factor `ratio` about 2.5."""
    ends = (2.5 / math.sqrt(ratio), 2.5 * math.sqrt(ratio)) if math.isfinite(ratio) else (0.0, math.inf)
    return Look(number, share, cells, gain, true, {level: ends})


@pytest.mark.parametrize(
    ("path", "told", "why", "at"),
    [
        ([look(0, 2, 80), look(1, 2, 86), look(2, 2, 92)], {}, "narrow", 1),
        ([look(0, 2, 80), look(1, 4, 86), look(2, 2, 92), look(3, 3, 98)], {}, "narrow", 3),
        ([look(0, 2, 30), look(1, 2, 36), look(2, 2, 42, gain=0.01)], {"least": 60}, "gain", 2),
        ([look(0, 2, 30), look(1, 2, 36), look(2, 2, 42)], {"least": 36}, "narrow", 1),
        ([look(0, 2, 80), look(1, 2, 86, gain=LEAST_GAIN / 2)], {"until": None}, "gain", 1),
        ([look(0, 9, 80), look(1, math.inf, 86, share=0.8)], {}, "budget", 0),
        ([look(0, 9, 80, share=0.05), look(1, 9, 86, share=0.15), look(2, 2, 92)], {"budget": 0.1}, "budget", 0),
    ],
)
def test_where_simulated_rounds_end(path, told, why, at):
    found, where = end(path, **{"until": 3.0, "least": 0, **told})
    assert (found, where.number) == (why, at)


def test_what_a_look_holds():
    closed = look(0, 4, 80)
    assert closed.holds(0.95) and closed.closed(0.95) and not closed.holds(0.99)
    assert not look(0, 4, 80, true=math.inf).holds(0.95)
    both = look(0, math.inf, 80, true=math.inf)
    assert both.holds(0.95) and not both.closed(0.95)


def test_true_answers_are_those_of_the_surface_at_what_was_run():
    study, _ = study_of("steep", 1)
    some = study.table.iloc[:40]
    n, d = np.log(some["student_params"]).mean(), np.log(some["data_tokens"]).mean()
    middle = np.log(SURFACES["steep"]().budgets).mean()
    assert next_stops._true(study, Goal(), some) == pytest.approx(2.5 * math.exp(0.5 * (d - middle)), rel=1e-3)
    target = study.goals["target"]
    at = 2.5 * target.student_params * math.exp(0.5 * (math.log(target.data_tokens) - middle))
    assert next_stops._true(study, target, some) == pytest.approx(at, rel=1e-3)
    goals = dict(next_stops._break_even(study))
    even = goals["break_even"]
    tokens = next_stops._true(study, even, some)
    losses = [
        SURFACES["steep"]().loss(np.log([x]), np.log([even.student_params]), np.log([tokens]))[0]
        for x in (even.small, even.large)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert next_stops._true(study, goals["no_break_even"], some) == math.inf, "the smaller teacher wins at all budgets"
    assert n != pytest.approx(np.log(study.table["student_params"]).mean()), "else this would show nothing"
    other, _ = study_of("published", 1)
    assert next_stops._true(other, dict(next_stops._break_even(other))["no_break_even"], some) == 0.0


def test_a_summary_counts_each_kind_of_end():
    both = {0.95: (2.0, 3.0), AFTER_STOPPING: (1.0, math.inf)}
    stops = [Look(i, 0.1, LEAST_CELLS + 6 * i, 0.5, 3.5, both) for i in range(2)]
    small = [Look(0, 0.2, 90, 0.001, 2.5, {0.95: (0.0, 3.0)})]
    found = next_stops.summary({("a", 1, "law", "paid"): stops, ("a", 1, "law", "there"): small})
    rows = found[found["until"].eq(3)].set_index("end")
    assert (rows["paths"] == 2).all() and (rows["ends"] == 1).all()
    assert rows.loc["narrow", ["holds_95", "holds", "closed", "closed_holds"]].tolist() == [0, 1, 0, 0]
    assert rows.loc["gain", ["holds_95", "holds", "closed", "closed_holds"]].tolist() == [1, 1, 0, 0]


def test_a_higher_level_has_a_wider_interval_of_the_same_estimate():
    study, _ = study_of("joint", 3)
    for goal in (Goal(), study.goals["target"], Goal("break_even", 55e3, small=120_200.0, large=899_712.0)):
        narrow, wide = answer(study.table, goal), answer(study.table, goal, level=AFTER_STOPPING)
        assert wide.value == narrow.value
        assert wide.interval[0] <= narrow.interval[0] < narrow.interval[1] <= wide.interval[1]
        assert wide.interval != narrow.interval


@pytest.mark.slow
def test_a_sample_of_the_rounds_is_what_the_product_would_run():
    """The first judged study of one surface: its rounds of a law, made again by hand."""
    rows = pd.DataFrame(next_stops.one("steep", next_stops.FIRST_SEED))
    paths = next_stops.paths_of(rows)
    path = paths["steep", next_stops.FIRST_SEED, "law", "paid"]
    study, _ = study_of("steep", next_stops.FIRST_SEED)
    table, run = study.table.assign(index=range(len(study.table))), []
    for seen in path:
        assert seen.cells == len(run)
        found = answers(study.table.iloc[run].reset_index(drop=True), Goal(), next_stops.LEVELS) if run else {}
        assert seen.found.keys() == found.keys()
        assert all(seen.found[level] == pytest.approx(a.interval) for level, a in found.items())
        there = table["index"].isin(run)
        pool = table[~there].drop(columns="loss")
        more = next_cells(table[there], pool, goal=study.goals["law"], k=6, cost=COSTS["paid"])
        assert seen.gain == pytest.approx(sum(c.gain for c in more))
        run += [int(c.cell["index"]) for c in more]
    assert end(path, None)[0] == "gain" and path[-1].share < next_stops.MOST
    widths = rows.dropna(subset="level").pivot_table(
        index=[*next_stops.PATH, "round"], columns="level", values="high", aggfunc="first"
    )
    assert (widths.diff(axis=1).iloc[:, 1:].fillna(0) >= 0).all().all(), "a higher level has a wider interval"
