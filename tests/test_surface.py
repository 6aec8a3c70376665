"""Loss surfaces: gradients, planted parameters, published laws, bounds, and surfaces without an optimum."""

import numpy as np
import pandas as pd
import pytest

from capacity_gap.estimators.batched import Problem, minimise
from capacity_gap.fit import (
    SurfaceFit,
    Teachers,
    best_teacher,
    compute_optimal,
    distil_or_direct,
    distil_or_direct_at_compute,
    fit_surface,
    published,
    select_surface,
    teachers_of,
)
from capacity_gap.settings.errors import ConfigError
from capacity_gap.surfaces.forms import FORMS, linex
from capacity_gap.surfaces.runs import mixed
from capacity_gap.surfaces.surface import PUBLISHED, from_parameters

LAW = published("distillation")
TEACHERS = Teachers(law=LAW.base)  # each trained on 20 tokens a parameter
RATIOS = np.geomspace(1, 8, 7)
QUICK = {"bootstraps": 40, "permutations": 39, "starts": 8}  # the smallest p-value is then 1/40


def crossed(*axes):
    return (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))


def distilled(students, tokens, teachers):
    """A noise-free grid of the published distillation law."""
    n, d, t = crossed(students, tokens, teachers)
    teacher_loss = LAW.base.predict(student_params=t, data_tokens=20 * t)
    loss = LAW.predict(student_params=n, data_tokens=d, teacher_loss=teacher_loss)
    return pd.DataFrame(
        {
            "student_params": n,
            "data_tokens": d,
            "teacher_params": t,
            "teacher_tokens": 20 * t,
            "teacher_loss": teacher_loss,
            "loss": loss,
        }
    )


def grid(curve, *, noise, seeds=2, draw=0):
    """Students of 50k to 200k under teachers of 1 to 8 times their size, at three data scales."""
    n, r, d, _ = crossed([50e3, 90e3, 200e3], RATIOS, [1e6, 3e6, 1e7], range(seeds))
    loss = 2 + (n / 1e4) ** -0.3 + (d / 1e5) ** -0.3 + curve(r)
    loss = loss + noise * np.random.default_rng(draw).standard_normal(len(n))
    return pd.DataFrame({"student_params": n, "teacher_params": n * r, "data_tokens": d, "loss": loss})


def valley(r, best=2.5):
    return 0.05 * np.log(r / best) ** 2


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_gradients_agree_with_central_differences(form):
    rng = np.random.default_rng(0)
    x = {k: rng.normal(size=12) for k in ("student_params", "data_tokens", "ratio", "tokens_per_param", "teacher_loss")}
    x |= {"log_teacher_loss": 0.1 * x["teacher_loss"] + 0.8, "own_loss": 0.9 + 0.1 * rng.normal(size=12)}
    low, high = np.nan_to_num(form.low, nan=0.5), np.nan_to_num(form.high, nan=1.5)
    theta = low + rng.random((5, len(low))) * (high - low)
    _, slopes = form.loss(theta, x, True)
    for i, name in enumerate(form.parameters):
        step = np.zeros(len(low))
        step[i] = 1e-6
        central = (form.loss(theta + step, x, False)[0] - form.loss(theta - step, x, False)[0]) / 2e-6
        np.testing.assert_allclose(slopes[:, i], central, rtol=1e-5, atol=1e-7, err_msg=name)


def test_linex_has_no_seam_where_its_series_ends():
    t = np.array([-3.0, -0.1000001, -0.0999999, -1e-9, 0.0, 1e-9, 0.0999999, 0.1000001, 3.0])
    value, slope = linex(t)
    assert np.abs(np.diff(value[[1, 2]])).max() < 1e-7 and np.abs(np.diff(slope[[6, 7]])).max() < 1e-7
    assert value[4] == 0.5 and slope[4] == pytest.approx(1 / 6)
    assert value[8] == pytest.approx((np.exp(3) - 4) / 9)


def test_the_batch_finds_what_a_median_is():
    """With δ far below the noise, the best constant is the median; weights are repetitions."""

    def constant(theta, x, slopes):
        loss = np.repeat(np.exp(theta), 5, axis=1)
        return loss, loss[:, None, :].copy() if slopes else None

    target = np.array([0.0, 1.0, 2.0, 3.0, 9.0])
    free = Problem(constant, {}, target, np.array([-50.0]), np.array([50.0]), np.array([True]), 1e-4)
    weights = np.array([[1, 1, 1, 1, 1], [9, 1, 1, 1, 1], [0, 0, 0, 1, 2.0]])
    found = minimise(free, np.full((3, 1), 0.5), weights)
    np.testing.assert_allclose(found.theta[:, 0], [2, 0, 9], atol=1e-3)
    bounded = Problem(constant, {}, target, np.array([-50.0]), np.array([1.5]), np.array([True]), 1e-4)
    assert minimise(bounded, np.full((1, 1), 0.5), weights[:1]).theta[0, 0] == 1.5


def test_chinchilla_refit_recovers_the_published_coefficients():
    rng = np.random.default_rng(1)
    n, d = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), 240)), np.exp(rng.uniform(np.log(5e8), np.log(1e12), 240))
    loss = published("chinchilla").predict(student_params=n, data_tokens=d)
    frame = pd.DataFrame({"student_params": n, "data_tokens": d, "loss": loss})
    exact = fit_surface(frame, "chinchilla", bootstraps=0)
    assert exact.status == "fitted"
    assert exact.parameters == pytest.approx(PUBLISHED["chinchilla"], rel=1e-3)
    frame["loss"] *= np.exp(0.005 * rng.standard_normal(240))
    noisy = fit_surface(frame, "chinchilla", bootstraps=400)
    for name, truth in PUBLISHED["chinchilla"].items():
        low, high = noisy.intervals[name]
        assert low < truth < high, name
    assert noisy.intervals["alpha"][1] - noisy.intervals["alpha"][0] < 0.1


def test_one_wild_run_hardly_moves_a_fit():
    rng = np.random.default_rng(1)
    n, d = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), 100)), np.exp(rng.uniform(np.log(5e8), np.log(1e12), 100))
    loss = published("chinchilla").predict(student_params=n, data_tokens=d)
    loss[7] *= 2
    fit = fit_surface(pd.DataFrame({"student_params": n, "data_tokens": d, "loss": loss}), "chinchilla", bootstraps=0)
    assert fit.parameters["E"] == pytest.approx(1.8172, rel=1e-2)


def test_the_distillation_law_is_recovered_with_its_optima():
    """Noise-free grids with the published coefficients: held-out losses within 0.1 %, each optimum within 5 %."""
    students, tokens = np.geomspace(1e8, 3e9, 4), np.geomspace(4e9, 5e11, 4)
    frame = distilled(students, tokens, np.geomspace(1e8, 1e11, 10))
    base = fit_surface(teachers_of(frame), "supervised", bootstraps=0)
    assert base.status in ("fitted", "at_bound")  # one line of N_T and D_T cannot tell A from B
    fit = fit_surface(frame, "distillation", base=LAW.base, bootstraps=0, permutations=0)
    held_out = distilled([2.2e8, 2e9], [7e9, 2e11], np.geomspace(1.5e8, 7e10, 7))
    inputs = {k: held_out[k] for k in ("student_params", "data_tokens", "teacher_loss")}
    np.testing.assert_allclose(fit.predict(**inputs), held_out["loss"], rtol=1e-3)
    for n, d in zip(*crossed(students, tokens), strict=True):
        at = {"student_params": n, "data_tokens": d, "teachers": TEACHERS, "teacher_range": (n, 1e3 * n)}
        truth, found = best_teacher(LAW, **at), best_teacher(fit, **at)
        assert truth.status == found.status == "interior"
        assert found.teacher_params == pytest.approx(truth.teacher_params, rel=0.05)


def test_best_teachers_agree_with_the_published_law_on_a_dense_grid():
    choice = best_teacher(LAW, student_params=1e9, data_tokens=1e11, teachers=TEACHERS)
    dense = np.geomspace(1e9, 1e12, 200_001)
    loss = LAW.predict(
        student_params=1e9,
        data_tokens=1e11,
        teacher_loss=LAW.base.predict(student_params=dense, data_tokens=20 * dense),
    )
    assert choice.teacher_params == pytest.approx(dense[loss.argmin()], rel=0.01)
    assert choice.loss == pytest.approx(loss.min(), abs=1e-5)
    assert choice.flat_interval[0] < choice.teacher_params < choice.flat_interval[1]


def test_additive_surface_finds_a_planted_optimum_and_its_shift():
    truth = from_parameters(
        "additive",
        {"E": 2.0, "A": 20.0, "alpha": 0.3, "B": 60.0, "beta": 0.3, "c": 0.1, "k": 0.3, "ratio": 1.2, "nu": 0.25},
    )
    n, r, d = crossed([50e3, 90e3, 200e3], RATIOS, [1e6, 3e6, 1e7])
    loss = truth.predict(student_params=n, teacher_params=n * r, data_tokens=d)
    noise = np.exp(0.0005 * np.random.default_rng(3).standard_normal(len(n)))
    frame = pd.DataFrame({"student_params": n, "teacher_params": n * r, "data_tokens": d, "loss": loss * noise})
    fit = fit_surface(frame, **QUICK)
    assert fit.null_p <= 0.05
    low, high = fit.intervals["nu"]
    assert low < 0.25 < high and high - low < 0.2
    choice = best_teacher(fit, student_params=1e5, data_tokens=3e6)
    assert choice.status == "interior" and choice.extrapolated == ()
    assert choice.ratio == pytest.approx(1.2 * 30**0.25, rel=0.1)
    assert choice.interval[0] < 1.2 * 30**0.25 * 1e5 < choice.interval[1]


@pytest.mark.parametrize(
    ("curve", "noise", "status"),
    [
        (lambda r: 0.0 * r, 1e-6, "flat"),
        (lambda r: 0.0 * r, 0.005, "flat"),
        (lambda r: -0.03 * np.log(r), 0.002, "right_edge"),
        (lambda r: 0.2 * r**-0.7, 1e-6, "right_edge"),
        (lambda r: 0.03 * np.log(r), 0.002, "left_edge"),
    ],
    ids=["flat", "noise", "falls", "decays", "rises"],
)
def test_without_an_interior_optimum_none_is_reported(curve, noise, status):
    choice = best_teacher(fit_surface(grid(curve, noise=noise), **QUICK), student_params=9e4, data_tokens=3e6)
    assert choice.status == status
    assert choice.teacher_params is None and choice.ratio is None


@pytest.mark.slow
def test_noise_alone_rarely_has_an_optimum():
    found = [
        best_teacher(
            fit_surface(grid(lambda r: 0.0 * r, noise=0.01, seeds=1, draw=draw), **QUICK),
            student_params=9e4,
            data_tokens=3e6,
        ).status
        for draw in range(20)
    ]
    assert found.count("interior") <= 3, found


def test_a_parameter_at_its_bound_is_named():
    fit = fit_surface(grid(lambda r: 0.0 * r, noise=1e-9), bootstraps=0, permutations=0)
    assert fit.status == "at_bound" and "c" in fit.at_bound
    assert "no capacity gap in these data" in fit.summary() and "at a bound" in fit.summary()


def test_what_the_data_cannot_tell_is_held_and_said():
    one = grid(valley, noise=0.001).query("data_tokens == 3e6")
    fit = fit_surface(one, **QUICK)
    assert fit.held == ("B", "beta") and fit.parameters["B"] == 0.0
    assert "data_tokens takes one value: log_B, beta held" in fit.notes
    step = one.assign(data_tokens=20 * one["student_params"])
    fit = fit_surface(step, bootstraps=0, permutations=0)
    assert set(fit.held) == {"B", "beta", "nu"}


def test_bootstraps_by_cluster_are_wider_when_teachers_have_luck():
    frame = grid(valley, noise=0.001)
    luck = dict(zip(RATIOS, 0.01 * np.random.default_rng(5).standard_normal(7), strict=True))
    frame["rung"] = np.round(frame["teacher_params"] / frame["student_params"], 6)
    frame["loss"] += frame["rung"].map({round(k, 6): v for k, v in luck.items()})
    plain, clustered = (fit_surface(frame, cluster=c, **QUICK | {"permutations": 0}) for c in (None, "rung"))
    width = [np.log(f.intervals["ratio"][1] / f.intervals["ratio"][0]) for f in (plain, clustered)]
    assert width[1] > 1.5 * width[0]


def test_json_round_trips_and_predicts_the_same():
    fit = fit_surface(grid(valley, noise=0.002), **QUICK)
    read = SurfaceFit.from_json(fit.to_json())
    assert read == fit
    at = {"student_params": 9e4, "data_tokens": 3e6, "teacher_params": [1e5, 3e5]}
    np.testing.assert_array_equal(read.predict_draws(**at), fit.predict_draws(**at))
    assert SurfaceFit.from_json(LAW.to_json()) == LAW


def test_fits_repeat():
    frame = grid(valley, noise=0.002)
    few = {"bootstraps": 10, "permutations": 9, "starts": 4}
    assert fit_surface(frame, **few) == fit_surface(frame, **few)


def test_budgets_are_spent_and_a_paid_teacher_is_smaller():
    at = {"student_params": 1e9, "flops": 1e21, "teachers": TEACHERS}
    free, forward, training = (compute_optimal(LAW, teacher_cost=c, **at) for c in ("none", "forward", "training"))
    for choice in (free, forward, training):
        assert choice.student_flops + choice.forward_flops + choice.teacher_flops == pytest.approx(1e21)
        assert choice.status == "interior"
    assert free.teacher_params > forward.teacher_params > training.teacher_params
    assert free.loss < forward.loss < training.loss
    other = compute_optimal(LAW, teacher_cost="forward", teacher_range=(forward.teacher_params * 1.2, 1e12), **at)
    assert other.loss > forward.loss and other.status == "left_edge"


def test_distilling_wins_with_few_tokens_and_loses_when_the_teacher_is_paid_for():
    few = distil_or_direct(LAW, LAW.base, student_params=1e9, data_tokens=1e10, teachers=TEACHERS)
    assert few.better == "distil" and few.gain == pytest.approx(few.direct - few.distilled) and few.gain > 0.1
    paid = distil_or_direct_at_compute(
        LAW, LAW.base, student_params=1e9, flops=1e21, teacher_cost="training", teachers=TEACHERS
    )
    assert paid.better == "direct" and paid.gain_interval is None


def test_a_gain_within_its_doubt_is_undecided():
    frame = grid(lambda r: 0.0 * r, noise=0.02)
    fit = fit_surface(frame, **QUICK | {"permutations": 0})
    direct = fit_surface(grid(lambda r: 0.0 * r, noise=0.02, draw=1), "chinchilla", bootstraps=40)
    found = distil_or_direct(fit, direct, student_params=9e4, data_tokens=3e6)
    assert found.better == "undecided"
    assert found.gain_interval[0] < 0 < found.gain_interval[1]


def test_too_little_is_a_status():
    frame = grid(valley, noise=0.001)
    few = fit_surface(frame.head(5))
    assert few.status == "too_few" and few.parameters == {}
    assert "5 runs for" in few.summary()
    with pytest.raises(ConfigError, match="no surface to predict from: status too_few"):
        few.predict(student_params=1e5, data_tokens=1e6, teacher_params=2e5)
    one = fit_surface(frame.assign(teacher_params=4e5))
    assert one.status == "too_few" and "all runs have the same teacher_params" in one.notes[-1]
    assert SurfaceFit.from_json(few.to_json()) == few


def test_bad_tables_are_refused_by_name():
    frame = grid(valley, noise=0.001)
    with pytest.raises(ConfigError, match=r"lacks data_tokens \(nearest: data_token\)"):
        fit_surface(frame.rename(columns={"data_tokens": "data_token"}))
    with pytest.raises(ConfigError, match=r"must be positive.*rows 3\."):
        fit_surface(frame.assign(teacher_params=frame["teacher_params"].where(frame.index != 3, -1)))
    with pytest.raises(ConfigError, match=r"form='additiv' is not known \(did you mean 'additive'\?\)"):
        fit_surface(frame, "additiv")
    with pytest.raises(ConfigError, match="base, the surface of students trained on text alone"):
        fit_surface(frame, "distillation")
    with pytest.raises(ConfigError, match="axis='tokens' is not known"):
        fit_surface(frame, axis="tokens")
    fit = fit_surface(frame.assign(loss=frame["loss"].where(frame.index != 5)), bootstraps=0, permutations=0)
    assert fit.notes[0] == "1 of 126 runs left out (failed, or without " + (
        "student_params, data_tokens, teacher_params, loss): rows 5"
    )


def test_bad_questions_are_refused():
    with pytest.raises(ConfigError, match="takes student_params, data_tokens, teacher_loss; given: student_params"):
        LAW.predict(student_params=1e9)
    with pytest.raises(ConfigError, match="must be positive"):
        LAW.predict(student_params=-1, data_tokens=1e9, teacher_loss=2)
    with pytest.raises(ConfigError, match="describes a teacher by its loss: pass teachers="):
        best_teacher(LAW, student_params=1e9, data_tokens=1e10)
    with pytest.raises(ConfigError, match="is too small for any teacher"):
        compute_optimal(LAW, student_params=1e9, flops=1e3, teachers=TEACHERS)
    with pytest.raises(ConfigError, match="teacher_cost='all' is not known"):
        compute_optimal(LAW, student_params=1e9, flops=1e20, teachers=TEACHERS, teacher_cost="all")
    with pytest.raises(ConfigError, match="form='chinchilla' is not known"):
        best_teacher(published("chinchilla"), student_params=1e9, data_tokens=1e10)


def test_runs_of_several_kinds_are_noticed():
    frame = grid(valley, noise=0.001)
    assert mixed(frame.assign(init="pruned")) == ""
    both = pd.concat([frame.assign(init="pruned"), frame.assign(init="random")])
    assert mixed(both) == "init (pruned, random)"


def of_text(**noise):
    """Runs of the published law of text alone, whose form `chinchilla` cannot follow."""
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(1e9, 5e11, 7)))
    frame = pd.DataFrame({"student_params": n, "data_tokens": d})
    loss = published("supervised").predict(student_params=n, data_tokens=d)
    return frame.assign(loss=loss * (1 + noise.get("sd", 0.0) * np.random.default_rng(0).standard_normal(len(n))))


def test_the_form_that_foretells_the_dearest_runs_is_chosen():
    found = select_surface(of_text(sd=0.001), bootstraps=0)
    by_form = {t.form: t for t in found.trials}
    assert found.surface.form == "supervised" and found.foretold == 4
    assert by_form["supervised"].error < 0.003 < by_form["chinchilla"].error
    assert by_form["supervised"].r2 > 0.9
    assert found.surface.runs == 42, "the chosen form is fitted to all runs"


def test_forms_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match="take different inputs"):
        select_surface(of_text(), ("chinchilla", "additive"))
    with pytest.raises(ConfigError, match="too few to predict"):
        select_surface(of_text().head(8))
    with pytest.raises(ConfigError, match="form='cubic' is not"):
        select_surface(of_text(), ("cubic",))


def planted(b, d, *, noise=0.0):
    """Students under teachers whose best is log N_T* = a + b·log N_S + d·log D, off the means of the grid."""
    n, data, t = (
        x.ravel()
        for x in np.meshgrid(np.log([1e8, 2e8, 4e8]), np.log([2e9, 6e9, 2e10]), np.log(np.geomspace(1.5e8, 2e10, 9)))
    )
    keep = t > n + 0.1
    n, data, t = n[keep], data[keep], t[keep]
    u = t - (np.log(8e8) + b * (n - np.log(2e8)) + d * (data - np.log(6e9)))
    loss = 1.8 + 0.9 * np.exp(-0.3 * (n - np.log(2e8))) + 0.5 * np.exp(-0.3 * (data - np.log(6e9))) + 0.02 * u**2
    loss = loss + noise * np.random.default_rng(1).standard_normal(len(n))
    sizes = {"student_params": np.exp(n), "teacher_params": np.exp(t), "data_tokens": np.exp(data)}
    return pd.DataFrame({**sizes, "loss": loss})


def test_b_and_d_are_found_where_they_are_free_and_nu_is_an_artefact_where_not():
    frame = planted(1.0, 1.3, noise=1e-4)
    free = fit_surface(frame, "additive_free", bootstraps=50, permutations=0)
    assert free.parameters["b"] == pytest.approx(1.0, abs=0.03)
    assert free.parameters["d"] == pytest.approx(1.3, abs=0.03)
    assert free.intervals["d"][0] < 1.3 < free.intervals["d"][1] and free.intervals["d"][0] > 1.2
    tied = fit_surface(frame, "additive", bootstraps=0, permutations=0)
    assert tied.residual > 5 * free.residual
    assert 0.1 < tied.parameters["nu"] < 1.2, "neither d nor 1 - b: the form holds b + d = 1"
    choice = best_teacher(free, student_params=2e8, data_tokens=6e9)
    assert choice.teacher_params is None or choice.teacher_params == pytest.approx(8e8, rel=0.03)


def test_a_single_student_or_budget_holds_b_or_d():
    frame = planted(1.0, 0.5)
    one_budget = frame[np.isclose(frame["data_tokens"], 6e9)]
    found = fit_surface(one_budget, "additive_free", bootstraps=0, permutations=0)
    assert "d" in found.held and found.parameters["b"] == pytest.approx(1.0, abs=0.05)
