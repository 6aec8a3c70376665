"""The whole chain of a fit: forms, noise, bounds, covariates, the curse; planted truths and the nulls beside them."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from benchmarks import fit_coverage
from capacity_gap.estimators.censored import ABOVE, BELOW, SEEN, scatter, tobit
from capacity_gap.fit import fit_law, locate_optima, student_growth
from capacity_gap.fit.curse import curses
from capacity_gap.fit.frame import curves
from capacity_gap.fit.noise import components
from capacity_gap.fit.optimum import locate
from capacity_gap.fit.valley import SHAPES, Design, Grid, unwarp, warp
from tests.test_fit import RATIOS, STUDENTS, grid, valley


def located(frame, **options):
    return locate(curves(frame)[0], **options)


def linex(r, best=2.5, a=1.5):
    z = math.log(r / best)
    return 0.1 / a**2 * (math.exp(a * z) - a * z - 1)


@pytest.mark.parametrize("kappa", [-1.3, 0.0, 0.7])
def test_warp_and_unwarp_are_inverse(kappa):
    x = np.linspace(9, 14, 7)
    assert unwarp(warp(x, 11.0, kappa), 11.0, kappa) == pytest.approx(x)


@pytest.mark.parametrize("centre", [0.0, 3.0])
def test_the_fit_does_not_depend_on_the_centre_of_the_warp(centre):
    x, y = np.linspace(0, 2, 6), np.array([3.0, 2.8, 2.75, 2.74, 2.78, 2.9])
    w = warp(x, centre, 0.8)
    low = np.polynomial.Polynomial.fit(w, y, 2).deriv().roots()[0]
    w1 = warp(x, 1.0, 0.8)
    low1 = np.polynomial.Polynomial.fit(w1, y, 2).deriv().roots()[0]
    assert unwarp(low, centre, 0.8) == pytest.approx(unwarp(low1, 1.0, 0.8))


def test_coefficients_and_held_out_errors_are_those_of_plain_least_squares():
    found, _ = curves(grid(valley, noise=0.01, seeds=1))
    g = Grid.of(found)
    design = Design.of(g, g.count, SHAPES)
    q = len(SHAPES) // 2 + 8
    beta = design.coefficients(g.loss[None], np.array([q]))[0]
    for c in range(len(found)):
        w = warp(g.x[c], g.centre[c], design.kappas[q])
        X = np.stack([np.ones_like(w), w, w * w], 1)
        assert beta[c] == pytest.approx(np.linalg.lstsq(X, g.loss[c], rcond=None)[0])
        for k in range(len(w)):
            keep = np.arange(len(w)) != k
            without = np.linalg.lstsq(X[keep], g.loss[c][keep], rcond=None)[0]
            assert design.held_out[q][c, k] @ g.loss[c] == pytest.approx(g.loss[c, k] - X[k] @ without)


@pytest.mark.parametrize("steep", [-1.5, 1.5])
def test_an_asymmetric_curve_is_found_unbiased_where_a_parabola_is_not(steep):
    frame = grid(lambda r: linex(r, a=steep), noise=0.003, ratios=np.geomspace(1, 12, 9))
    bent, plain = (locate_optima(frame, method=m) for m in ("asymmetric", "quadratic"))
    off_bent, off_plain = (abs(np.mean([o.ratio for o in found]) - 2.5) for found in (bent, plain))
    assert off_bent < 0.12
    assert off_plain > 3 * off_bent
    assert np.sign(located(frame).kappa) == np.sign(steep)


def test_a_symmetric_curve_keeps_its_parabola():
    assert sum(located(grid(valley, noise=0.003, draw=d)).kappa == 0 for d in range(20)) >= 18


def test_methods():
    frame = grid(valley, noise=0.0005)
    for optimum in locate_optima(frame, method="argmin"):
        assert min(abs(optimum.ratio / RATIOS - 1)) < 1e-9, "the paper's optimum is a teacher that was tried"
    for optimum in locate_optima(frame, method="local"):
        assert optimum.ratio == pytest.approx(2.5, rel=0.05)
    with pytest.raises(ValueError, match="method='cubic' is not known. Allowed: asymmetric, quadratic, local, argmin"):
        locate_optima(frame, method="cubic")


def test_variance_components_are_recovered():
    found = []
    for draw in range(12):
        rng = np.random.default_rng(draw)
        design = fit_coverage.Design(
            "x", fit_coverage.quadratic, teachers=12, seeds=3, noise=0.006, luck=0.01, students=6
        )
        drawn = design.draw(rng)
        g = Grid.of(drawn)
        d = Design.of(g, g.count, (0.0,))
        noise = components(d, 0, drawn)
        found.append((noise.shared, noise.own.mean(), noise.df))
    luck, own, df = np.mean(found, axis=0)
    assert luck**0.5 == pytest.approx(0.01, rel=0.2)
    assert luck + own == pytest.approx(0.01**2 + 0.006**2 / 3, rel=0.25)
    assert df < 30, "six curves under one set of teachers are far from 6 × 9 free residuals"


def test_draws_have_the_noise_they_claim():
    L = located(grid(valley, noise=0.004, teacher_noise=0.004), bootstraps=4000)
    drawn = L.noise.draws(L.design, 4000, np.random.default_rng(1))
    inflated = L.noise.df / (L.noise.df - 2)
    assert drawn.var(0) / inflated == pytest.approx(L.noise.variance, rel=0.15)


def test_tobit_is_the_maximum_of_its_likelihood():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    X, s = np.stack([np.ones(12), x], 1), rng.uniform(0.1, 0.4, 12)
    latent = 0.3 + 0.8 * x + s * rng.normal(size=12)
    kind = np.where(latent > 0.8, ABOVE, np.where(latent < -0.6, BELOW, SEEN))
    y = np.clip(latent, -0.6, 0.8)
    assert {ABOVE, BELOW, SEEN} <= set(kind)

    def loss(beta):
        z = (y - X @ beta) / s
        parts = np.where(
            kind == SEEN, stats.norm.logpdf(z), np.where(kind == ABOVE, stats.norm.logsf(z), stats.norm.logcdf(z))
        )
        return -parts.sum()

    best = optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x
    assert tobit(X, y[None], kind[None], s)[0] == pytest.approx(best, abs=1e-4)


def test_without_bounds_tobit_is_weighted_least_squares():
    rng = np.random.default_rng(1)
    X, s = np.stack([np.ones(8), rng.normal(size=8)], 1), rng.uniform(0.1, 1, 8)
    y = rng.normal(size=(5, 8))
    expected = np.linalg.lstsq(X / s[:, None], (y / s).T, rcond=None)[0].T
    assert tobit(X, y, np.full((5, 8), SEEN), s) == pytest.approx(expected)


def test_scatter_solves_its_equation_and_is_zero_where_errors_explain_all():
    e, s = np.array([0.5, -0.4, 0.6, -0.7, 0.1]), np.full(5, 0.1)
    omega = scatter(e, s, 1)
    assert (e**2 / (s**2 + omega**2)).sum() == pytest.approx(4)
    assert scatter(e, np.full(5, 1.0), 1) == 0.0


def test_censored_optima_pull_the_ratio_their_way():
    """The largest students' best teachers lie beyond the ladder: bounds, not optima, and not to be thrown away."""
    students = (30e3, 40e3, 55e3, 75e3, 100e3, 150e3, 200e3)
    frame = grid(lambda r: valley(r, 3), noise=0.002, students=students)
    capped = frame[frame["teacher_params"] < 500e3]
    law = fit_law(capped)
    assert "right_edge" in {o.status for o in law.optima}
    assert law.status == "law"
    assert law.ratio_interval[0] < 3 < law.ratio_interval[1]


def test_the_papers_own_line_is_recovered():
    """N_T* = 2.498·N_S − 11.498 (millions), docs/method.md §1."""
    rows, rng = [], np.random.default_rng(0)
    for n in (30e6, 56e6, 110e6, 220e6, 410e6, 640e6):
        best = 2.498 * n - 11.498e6
        for t in best * np.geomspace(0.4, 3.2, 9):
            rows += [
                {
                    "student_params": n,
                    "teacher_params": t,
                    "loss": 3 + 0.05 * math.log(t / best) ** 2 + rng.normal() * 0.001,
                }
                for _ in range(3)
            ]
    law = fit_law(pd.DataFrame(rows))
    affine = law.forms["affine"]
    a, r = affine.parameters["a"], affine.parameters["r"]
    assert a.interval[0] < -11.498e6 < a.interval[1] < 0
    assert r.interval[0] < 2.498 < r.interval[1]
    assert affine.left_out_error < law.forms["proportional"].left_out_error
    assert law.tests["b = 1"] < 0.05, "an affine law is no constant ratio"


def test_a_power_law_is_told_from_a_ratio():
    frame = pd.concat(
        [
            grid(
                lambda r, n=n: valley(r, 2.5 * (n / 1e5) ** 0.4),
                noise=0.001,
                students=[n],
                ratios=np.geomspace(1, 12, 9),
            )
            for n in (40e3, 70e3, 120e3, 200e3)
        ]
    )
    law = fit_law(frame)
    assert law.slope_interval[0] < 1.4 < law.slope_interval[1]
    assert law.tests["b = 1"] < 0.01
    assert "not constant over students" in law.verdict()


def test_covariates_take_their_part_and_are_reported():
    """The best ratio doubles when the data quadruple: exponent 0.5."""
    frame = pd.concat(
        [
            grid(lambda r, d=d: valley(r, 2 * d**0.5), noise=0.001, ratios=np.geomspace(0.8, 12, 9)).assign(
                data_tokens=int(1e6 * d), family="x"
            )
            for d in (1, 4)
        ]
    )
    law = fit_law(frame)
    effect = law.effects["log data_tokens"]
    assert effect.interval[0] < 0.5 < effect.interval[1]
    (agreement,) = law.agreements
    assert agreement.by == "data_tokens" and agreement.p < 0.01 and agreement.i2 > 0.9
    assert agreement.ratios["4000000"].value == pytest.approx(4, rel=0.05)
    assert "it depends on data_tokens" in law.verdict()


def test_families_that_agree_are_said_to_agree():
    rejected = 0
    for draw in range(15):
        frame = pd.concat([grid(valley, noise=0.004, draw=100 * draw + i).assign(family=f) for i, f in enumerate("xy")])
        rejected += fit_law(frame).agreements[0].p < 0.05
    assert rejected <= 4


def test_a_claim_that_rests_on_one_teacher_is_none():
    """All curves fall, and the largest teacher of all is badly trained: each curve has a fine minimum before it."""
    frame = grid(lambda r: -0.03 * math.log(r), noise=0.001, students=[50e3, 52e3, 54e3])
    frame["teacher_params"] = frame["teacher_params"].groupby(frame.index % 21 // 3).transform("first")
    top = frame["teacher_params"] == frame["teacher_params"].max()
    frame.loc[top, "loss"] += 0.08
    law = fit_law(frame)
    assert {o.status for o in law.optima} == {"interior"}
    assert law.status == "no_optimum" and law.ratio is None
    assert f"without the teacher of {frame['teacher_params'].max():,.0f}" in law.verdict()


def test_the_curse_is_found_where_it_is():
    for curse in curses(located(grid(valley, noise=0.003))):
        assert curse.p < 0.01
        assert curse.interval[0] < 0.05 * math.log(8 / 2.5) ** 2 < curse.interval[1] + 0.002
    falling = curses(located(grid(lambda r: -0.03 * math.log(r), noise=0.003)))
    assert all(c.interval[0] == 0.0 and c.p > 0.2 for c in falling)


def test_the_best_of_many_equal_teachers_is_no_curse():
    """The excess over the best is positive whatever the truth; its test keeps its level."""
    p = [c.p for d in range(50) for c in curses(located(grid(lambda r: 0.0, noise=0.01, draw=d), bootstraps=1))]
    assert np.mean(np.array(p) < 0.05) < 0.09
    excess = [c.excess for c in curses(located(grid(lambda r: 0.0, noise=0.01), bootstraps=1))]
    assert min(excess) >= 0


def test_student_growth():
    frame = grid(lambda r: 0.0, noise=0.001, ratios=[1.0])
    frame["teacher_params"] = 1e6
    frame["loss"] -= 0.1 * np.log2(frame["student_params"] / 50e3)
    (better,) = student_growth(frame)
    assert better.per_doubling == pytest.approx(-0.1, abs=0.002) and better.p < 1e-4 and better.worse == 0
    frame["loss"] = -frame["loss"]
    (worse,) = student_growth(frame)
    assert worse.p > 0.99 and worse.worse == worse.pairs == len(STUDENTS) - 1


def test_losses_are_adjusted_for_the_students_own_sizes():
    """Students shrunk by each teacher's proportions differ by 2 %; that must not bend their curves."""
    frame = grid(valley, noise=0.0002, students=50e3 * 8 ** (np.arange(4) / 6))
    frame = frame.assign(student=frame["student_params"].astype(str), teacher_params=frame["teacher_params"].round())
    nominal = frame["student_params"].to_numpy()
    off = 1 + 0.02 * np.sin(np.arange(len(frame)) // 3)
    frame["student_params"] = nominal * off
    frame["loss"] -= 0.3 * np.log(off) + 0.3 * np.log(nominal / 1e5)
    law = fit_law(frame)
    assert any("adjusted for student sizes that differ by up to 2." in n for n in law.notes), law.notes
    assert [o.ratio for o in law.optima] == pytest.approx([2.5] * 4, rel=0.05)
    raw = frame.assign(student_params=nominal)
    assert max(abs(o.ratio / 2.5 - 1) for o in locate_optima(raw) if o.ratio) > 0.05


def test_mixed_devices_are_said():
    frame = grid(valley, noise=0.003)
    frame["device"] = np.where(frame["seed"] == 0, "cpu", "NVIDIA H100")
    (note,) = fit_law(frame).notes
    assert note == "device differs between rows: NVIDIA H100 (56 rows), cpu (28 rows)"


@pytest.mark.parametrize("design", [d for d in fit_coverage.DESIGNS if d.identifiable][:3:2], ids=lambda d: d.name)
def test_intervals_cover_on_a_sample_of_the_evidence(design):
    """The whole table is `results/fit_coverage.csv`, by `make evidence`."""
    row = fit_coverage.summarise(design, fit_coverage.simulate(design, 40), null=False)
    assert row["law claimed"] > 0.9
    assert row["optimum covers"] > 0.9
    assert row["ratio covers"] > 0.86
    assert row["width"] < 1.7


@pytest.mark.parametrize("design", fit_coverage.NULLS, ids=lambda d: d.name)
def test_no_law_is_claimed_where_there_is_none(design):
    assert fit_coverage.simulate(design, 30)["law"].mean() <= 0.05


def test_a_level_of_which_only_bounds_are_known_gives_no_number():
    frame = pd.concat(
        [grid(valley, noise=0.002).assign(family="a"), grid(lambda r: valley(r, 60), noise=0.002).assign(family="b")]
    )
    law = fit_law(frame)
    assert law.status == "law"
    assert law.ratio_interval[0] < 2.5 < law.ratio_interval[1]
    assert "family=b is left out of the law: only bounds on its optima are known" in law.notes
    assert not law.effects


@pytest.mark.slow
def test_budgets_of_one_student_are_no_replicates_of_it():
    """Students differ by 25 % in their true ratio; four budgets each must not make four times as many students."""
    covered = []
    for draw in range(25):
        rng = np.random.default_rng(1000 + draw)
        parts = []
        for n in STUDENTS:
            best = 2.5 * math.exp(0.25 * rng.standard_normal())
            for d in range(4):
                part = grid(lambda r, b=best: valley(r, b), noise=0.002, students=[n], draw=10 * draw + d)
                parts.append(part.assign(data_tokens=10**6 * 2**d))
        law = fit_law(pd.concat(parts))
        covered.append(law.ratio_interval[0] < 2.5 < law.ratio_interval[1])
    assert np.mean(covered) > 0.75


def test_tokens_in_proportion_to_parameters_are_told_from_the_exponent_by_nobody():
    frame = grid(valley, noise=0.002, students=(*STUDENTS, 310e3)).assign(
        data_tokens=lambda f: (20 * f["student_params"]).astype(int)
    )
    law = fit_law(frame)
    assert law.status == "law"
    assert not law.effects
    assert any("confounded with the student's size" in n for n in law.notes)
    assert law.slope_interval[0] < 1 < law.slope_interval[1]


def test_settings_that_go_together_are_one():
    frame = pd.concat(
        [
            grid(valley, noise=0.002).assign(family="a", init="pruned"),
            grid(lambda r: valley(r, 3), noise=0.002).assign(family="b", init="random"),
        ]
    )
    law = fit_law(frame)
    assert len(law.effects) == 1
    assert sum("confounded with" in n for n in law.notes) == 1


def test_a_setting_of_one_student_alone_breaks_nothing():
    frame = pd.concat(
        [grid(valley, noise=0.002).assign(family="a"), grid(valley, noise=0.002, students=[2e5]).assign(family="b")]
    )
    assert fit_law(frame).status == "law"


def test_a_law_of_the_outer_rungs_is_none():
    """A line downwards with both ends lifted: without its outer rungs nothing has a minimum inside."""
    frame = grid(lambda r: -0.02 * math.log(r) + 0.06 * (r < 1.01 or r > 7.9), noise=0.001)
    assert fit_law(frame).status != "law"


def test_no_curse_where_no_noise_is_known():
    assert fit_law(grid(lambda r: 0.0, noise=0.01, ratios=[1, 2, 4], seeds=1)).curses == ()


def test_missing_settings_and_text_for_numbers():
    frame = grid(valley, noise=0.002).assign(data_tokens=float("nan"), family=None)
    frame["loss"] = frame["loss"].astype(object)
    frame.loc[frame.index[4], "loss"] = None
    frame["student_params"] = frame["student_params"].astype(str)
    law = fit_law(frame)
    assert law.status == "law"
    assert any("rows 4" in n for n in law.notes)
    frame.loc[frame.index[4], "loss"] = "failed"
    with pytest.raises(ValueError, match=r"column loss, row 4 .*'failed' is not a number"):
        fit_law(frame)
    with pytest.raises(ValueError, match=r"no usable row.*status: running"):
        fit_law(grid(valley).assign(status="running"))
    with pytest.raises(ValueError, match=r"scales must be positive.*rows \[2\]"):
        fit_law(grid(valley).assign(teacher_params=lambda f: f["teacher_params"].where(f.index != 2, np.inf)))
    with pytest.raises(ValueError, match=r"lacks famly"):
        fit_law(grid(valley).assign(family="x"), by=["famly"])


def test_argmin_at_the_end_of_the_grid_is_an_edge():
    for d in range(6):
        for o in locate_optima(grid(lambda r: valley(r, 5.5), noise=0.006, draw=d), method="argmin"):
            if o.status == "interior":
                assert 1.01 < o.ratio < 7.9
