"""Students of unequal size within a curve: adjusted with the error of that, or refused."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from capacity_gap.fit import fit_law
from capacity_gap.fit.curse import curses
from capacity_gap.fit.frame import curves
from capacity_gap.fit.law import law_from
from capacity_gap.fit.optimum import locate
from tests.test_fit import grid, valley


def test_students_that_no_column_names_are_told_apart_by_size_and_that_is_said():
    rows = [{"student_params": 40_000 * 1.05**k, "teacher_params": 90_000 * 2**k, "loss": 3.0} for k in range(5)]
    _, notes = curves(pd.DataFrame(rows))
    assert any("each of the 5 has only one teacher: if several rows are one student, name it" in n for n in notes)


STEP = math.log(8) / 6
GAMMA, BOWL, BEST = -0.3, 0.1, 2.5


def table(*, spread, students=4, seed=0, noise=0.002, best=BEST, bend=0.0):
    """Small rungs make smaller students (tied to the teacher), by `spread` from the first to the last of a curve."""
    rng, rows = np.random.default_rng(seed), []
    for s in range(students):
        for k in range(7):
            off, teacher = spread * (k / 6 - 0.5), round(50e3 * math.exp(STEP * (s + k)))
            size = 50e3 * math.exp(STEP * s + off)
            z, u = math.log(teacher / size / best), math.log(size / 50e3)
            for run in range(2):
                loss = 3 + BOWL * z * z + GAMMA * u + bend * u * u + noise * rng.standard_normal()
                rows.append((f"s{s}", size, teacher, loss, run))
    return pd.DataFrame(rows, columns=["student", "student_params", "teacher_params", "loss", "seed"])


def slope_of(frame):
    (slope,) = {id(c.size_slope): c.size_slope for c in curves(frame)[0]}.values()
    return slope


def known(found):
    """The same curves, as if the slope had no error."""
    return [replace(c, size_off=None, size_slope=None) for c in found]


@pytest.mark.parametrize("best", [1.8, 2.5, 5.0])
def test_a_planted_slope_is_recovered(best):
    """γ is the slope at the mean distance m of teachers from students: far from the optimum the bowl adds to it."""
    frame = table(spread=0.17, best=best)
    m = float(np.log(frame["teacher_params"] / frame["student_params"]).mean())
    slope = slope_of(frame)
    error = np.sqrt((slope.spread**2).sum(0))
    assert abs(slope.value[1] - BOWL) < 4 * error[1]
    # c·(x−u−ρ)² = c·(x−u−m)² + 2c·(m−ρ)·(x−u−m) + …, of which −2c·(m−ρ) is linear in u
    planted = GAMMA - 2 * BOWL * (m - math.log(best))
    assert abs(slope.value[0] - planted) < 4 * error[0] + 1e-9


def test_without_a_way_to_tell_a_curve_is_refused_and_named():
    frame = table(spread=math.log(1.18), students=1).assign(student="tiny")
    with pytest.raises(
        ValueError, match=r"student tiny left out \(14 rows\): its sizes differ by 18\.0% \(46,0.* to 54,3"
    ):
        curves(frame)
    with pytest.raises(ValueError, match=r"prune\.shape=common, or add students of other sizes"):
        fit_law(frame)
    alone = grid(valley, noise=0.001).assign(student="40k", family="even", student_params=40e3)
    found, notes = curves(pd.concat([alone, frame.assign(family="uneven")]))
    assert [c.key["family"] for c in found] == ["even"] and found[0].size_slope is None
    assert any("student tiny, family=uneven left out" in n for n in notes), notes


def test_the_error_of_the_slope_is_in_every_interval():
    found, notes = curves(table(spread=0.4, noise=0.008, students=3))
    assert any("intervals include that error" in n and "differ by up to 20.0%" in n for n in notes)
    wide, narrow = locate(found), locate(known(found))
    assert wide.beta == pytest.approx(narrow.beta)
    spans = [[math.log(o.interval[1] / o.interval[0]) for o in fit.optima] for fit in (wide, narrow)]
    assert np.mean(spans[0]) > 1.2 * np.mean(spans[1])
    together = [float(fit.best_draws.mean(1).std()) for fit in (wide, narrow)]
    assert together[0] > 1.2 * together[1], "one slope moves all curves, so that no average over students removes it"
    ends = [np.mean([c.interval[1] - c.interval[0] for c in curses(fit)]) for fit in (wide, narrow)]
    assert ends[0] > ends[1]


@pytest.mark.slow
def test_intervals_cover_the_planted_optimum():
    """A slope taken to be the same under every teacher covers in no grid whose optimum is off the grid's middle."""
    held, laws = [], []
    for seed in range(40):
        best = (1.8, 2.5, 4.0)[seed % 3]
        found, _ = curves(table(spread=0.17, seed=seed, best=best, bend=0.05))
        fit = locate(found, method="quadratic", bootstraps=200)
        held += [(o.interval[0] or 0) <= best * o.student_params <= (o.interval[1] or math.inf) for o in fit.optima]
        law = law_from(fit, axis="total")
        laws += [law.ratio_interval[0] <= best <= law.ratio_interval[1]] if law.ratio_interval else []
    assert np.mean(held) >= 0.85 and np.mean(laws) >= 0.85, (np.mean(held), np.mean(laws))
    assert len(laws) > 30


def test_sizes_within_one_percent_are_adjusted_as_ever():
    """The formula as it was: one γ for the table, taken as known."""
    frame = table(spread=math.log(1.0099), noise=0.004)
    frame["teacher_params"] = frame["teacher_params"].astype(float)
    found, notes = curves(frame)
    logs = frame["student_params"].map(math.log)
    off = logs - logs.groupby([frame["student"]]).transform("mean")
    within = [v - v.groupby([frame["teacher_params"]]).transform("mean") for v in (logs, frame["loss"])]
    gamma = float((within[0] * within[1]).sum() / (within[0] ** 2).sum())
    adjusted = frame.assign(loss=frame["loss"] - gamma * off).groupby(["student", "teacher_params"])["loss"].mean()
    assert notes == [f"losses adjusted for student sizes that differ by up to 0.5% ({gamma:.3f} nats per log unit)"]
    for curve in found:
        assert curve.size_slope is None and curve.size_off is None
        assert curve.loss.tolist() == adjusted[curve.key["student"]].tolist()


def test_one_percent_exactly_is_within():
    frame = table(spread=0.0, students=1)
    frame["student_params"] = 1000.0 + 10.0 * (frame["teacher_params"] > 100e3)
    (curve,), notes = curves(frame)
    assert len(curve.x) == 7 and curve.size_slope is None
    assert notes == ["student sizes differ by up to 0.6% within a curve; not adjusted for: each has one size"]


def test_tables_from_elsewhere_group_within_three_percent():
    """Students without names that differ by 2 % are one curve, and adjusted with an error."""
    frame = table(spread=0.02).drop(columns="student")
    found, notes = curves(frame)
    assert len(found) == 4 and all(c.size_slope is not None for c in found)
    assert any("intervals include that error" in n for n in notes)
