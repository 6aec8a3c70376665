"""The level of intervals after rounds stopped: chosen by its rule, judged on other seeds, as its page says."""

import math

import numpy as np
import pandas as pd
import pytest

from benchmarks import next_stops
from benchmarks.next_cells import FIRST_SEED, study_of
from benchmarks.next_surfaces import SURFACES
from capacity_gap.fit.goal_answer import AFTER_STOPPING, answer
from capacity_gap.fit.next_model import Goal
from tests.conftest import ROOT


def test_the_level_is_the_least_that_covered_where_it_was_chosen():
    chosen = pd.read_csv(ROOT / "results" / "next_stops_levels.csv")
    assert tuple(chosen["level"]) == next_stops.LEVELS
    assert chosen[chosen["covers"] >= 0.95]["level"].min() == AFTER_STOPPING


def test_it_covers_on_the_seeds_that_judge_where_the_model_fits():
    found = pd.read_csv(ROOT / "results" / "next_stops.csv")
    mine = found[found["surface"].isin(next_stops.FITTED) & found["until"].eq(3)]
    assert (found["studies"] == next_stops.STUDIES).all()
    assert mine["covers_stopped"].min() > 0.93
    assert mine[mine["goal"] != "break_even"]["covers_95"].max() < 0.85, "else no other interval would be needed"


def test_true_answers_are_those_of_the_surface_at_what_was_run():
    study, _ = study_of("steep", 1)
    some = study.table.iloc[:40]
    n, d = np.log(some["student_params"]).mean(), np.log(some["data_tokens"]).mean()
    middle = np.log(SURFACES["steep"]().budgets).mean()
    assert next_stops._true(study, Goal(), some) == pytest.approx(2.5 * math.exp(0.5 * (d - middle)), rel=1e-3)
    target = study.goals["target"]
    at = 2.5 * target.student_params * math.exp(0.5 * (math.log(target.data_tokens) - middle))
    assert next_stops._true(study, target, some) == pytest.approx(at, rel=1e-3)
    (even,) = next_stops._break_even(study)
    tokens = next_stops._true(study, even, some)
    losses = [
        SURFACES["steep"]().loss(np.log([x]), np.log([even.student_params]), np.log([tokens]))[0]
        for x in (even.small, even.large)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert n != pytest.approx(np.log(study.table["student_params"]).mean()), "else this would show nothing"


def test_a_summary_counts_paths_that_did_not_stop():
    rows = [
        {
            "surface": "a",
            "seed": 1,
            "goal": "law",
            "mode": "paid",
            "until": 3.0,
            "share": 0.2,
            "cells": 30,
            "level": level,
        }
        | {"holds": level > 0.98, "open": level > 0.99}
        for level in next_stops.LEVELS
    ]
    never = {"surface": "a", "seed": 1, "goal": "law", "mode": "there", "until": 3.0}
    (row,) = next_stops.summary(pd.DataFrame([*rows, never])).to_dict("records")
    assert (row["studies"], row["stopped"], row["share"]) == (1, 0.5, 0.2)
    assert (row["covers_95"], row["covers_stopped"], row["open"]) == (0, 1, 1)
    assert (row["stops"], row["closed"], row["closed_hold"]) == (1, 0, 0)


def test_a_higher_level_has_a_wider_interval_of_the_same_estimate():
    study, _ = study_of("joint", 3)
    for goal in (Goal(), study.goals["target"], Goal("break_even", 55e3, small=120_200.0, large=899_712.0)):
        narrow, wide = answer(study.table, goal), answer(study.table, goal, level=AFTER_STOPPING)
        assert wide.value == narrow.value
        assert wide.interval[0] <= narrow.interval[0] < narrow.interval[1] <= wide.interval[1]
        assert wide.interval != narrow.interval


@pytest.mark.slow
def test_a_sample_of_the_rounds_stops_where_its_answers_say():
    rows = pd.DataFrame(next_stops.one("steep", FIRST_SEED))
    stops = rows.dropna(subset="level")
    assert len(stops)
    assert set(stops["level"]) == set(next_stops.LEVELS)
    held = stops.pivot_table(index=["goal", "mode", "until"], columns="level", values="holds", aggfunc="first")
    assert (held.astype(int).diff(axis=1).iloc[:, 1:] >= 0).all().all(), (
        "a wider interval holds what a narrower one does"
    )
    shares = stops.drop_duplicates(["goal", "mode", "until"]).pivot(
        index=["goal", "mode"], columns="until", values="share"
    )
    assert (shares.diff(axis=1).iloc[:, 1:].fillna(0) <= 0).all().all(), "less is asked for by a larger until"
