"""Figures: where panels and marks stand."""

import math

import numpy as np
import pandas as pd
import pytest

from capacity_gap.fit.frame import curves
from capacity_gap.fit.law import law_from
from capacity_gap.fit.optimum import locate
from capacity_gap.report.plots import plot_curves, plot_law, ratio_ticks
from tests.test_fit import grid, valley


def both(students=(50e3, 80e3, 130e3), budgets=(300_000, 1_200_000)):
    """A table of which every budget has an optimum of its own."""
    tables = [grid(lambda r, n=n: valley(r, n / 200_000), students=students) for n in budgets]
    return [t.assign(data_tokens=n) for t, n in zip(tables, budgets, strict=True)]


def titles(figure):
    """The panels that show, row by row."""
    shown = [a for a in figure.axes if a.get_visible() and a.get_title()]
    return [
        [a.get_title().splitlines()[0] for a in shown if a.get_subplotspec().rowspan.start == row] for row in (0, 1)
    ]


def located(*tables):
    found, _ = curves(pd.concat(tables, ignore_index=True))
    return locate(found, bootstraps=50)


def test_students_stand_beside_one_another_and_budgets_below():
    short, longer = both()
    rows = titles(plot_curves(located(short, longer)))
    assert rows[0] == [f"student {s}, 300k tokens" for s in ("50k", "80k", "130k")]
    assert rows[1] == [f"student {s}, 1.2m tokens" for s in ("50k", "80k", "130k")]


def test_a_student_without_one_budget_leaves_a_gap():
    short, longer = both()
    rows = titles(plot_curves(located(short[short["student_params"] != 80e3], longer)))
    assert rows[0] == ["student 50k, 300k tokens", "student 130k, 300k tokens"]
    assert len(rows[1]) == 3


def test_optima_of_two_budgets_are_told_apart():
    short, longer = both()
    figure = plot_law(law_from(located(short, longer), axis="total"))
    said = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert said[:2] == ["300k tokens", "1.2m tokens"]
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert len({line.get_color() for line in marks}) == 2
    assert len({round(float(line.get_xdata()[0])) for line in marks}) == 6


@pytest.mark.parametrize(("low", "high"), [(0.9, 18), (1.1, 3.5), (2.1, 3.9), (0.3, 70)])
def test_the_ratio_axis_has_several_ticks_and_no_crowd(low, high):
    ticks = ratio_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert all(low <= t <= high for t in ticks)
    assert np.all(np.diff(ticks) > 0)
    assert all(math.isclose(float(f"{t:.2g}"), t) for t in ticks)


def test_panels_name_whatever_tells_their_curves_apart():
    short = both()[0]
    tables = [short.assign(family=f, kd_weight=0.5) for f in ("gpt2", "neox")]
    rows = titles(plot_curves(located(*tables)))
    assert rows == [[f"student {s}, 300k tokens, {f}" for s in ("50k", "80k", "130k")] for f in ("gpt2", "neox")]
