"""The model of all cells: its likelihood, its sets, its statuses, and what it says of study one."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks import joint_coverage
from benchmarks.joint_coverage import DESIGNS, NULLS, QUIET, Design, one, summary
from capacity_gap.commands import cli
from capacity_gap.commands.fit_commands import _joint_lines
from capacity_gap.estimators import mixed
from capacity_gap.estimators.mixed import SCALE, SHAPE, _Problem, fit_mixed
from capacity_gap.estimators.size_map import size_map
from capacity_gap.fit import fit_joint
from capacity_gap.fit.frame import curves as curves_of
from capacity_gap.fit.joint_curve import JointCurve
from capacity_gap.fit.joint_fit import Answers
from tests.conftest import ROOT

NAMED = {design.name: design for design in (*DESIGNS, *NULLS)}


def table(name="study one: 8 rungs, 3 seeds", seed=1, **changes):
    return replace(NAMED[name], **changes).table(np.random.default_rng(seed))


def crossed(rng, n=60):
    """Two crossed effects, a slope for each of six groups, and a row whose error is known."""
    one, two = rng.integers(0, 6, n), rng.integers(0, 15, n)
    x = rng.standard_normal(n)
    X = np.vstack([np.column_stack([np.ones(n), x, x**2]), [[0.0, 0.0, 1.0]]])
    groups = {"one": np.eye(6)[one], "two": np.eye(15)[two], "slope": np.eye(6)[one] * x[:, None]}
    groups = {name: np.vstack([Z, np.zeros(Z.shape[1])]) for name, Z in groups.items()}
    y = X @ [1.0, 0.5, 0.2] + sum(0.7 * Z @ rng.standard_normal(Z.shape[1]) for Z in groups.values())
    known = np.append(np.zeros(n), 0.3)
    return np.append(y[:-1] + 0.5 * rng.standard_normal(n), 0.0), X, groups, known


def dense(problem, groups, X, y, known, phi):
    """The same objective from matrices [n, n], written anew."""
    sds = dict(zip(problem.names, np.exp(phi), strict=True))
    V = np.diag(known) + np.diag((known == 0) * sds["error"] ** 2)
    V = V + sum(sds[name] ** 2 * Z @ Z.T for name, Z in groups.items())
    inverse = np.linalg.inv(V)
    A = X.T @ inverse @ X
    P = inverse - inverse @ X @ np.linalg.inv(A) @ X.T @ inverse
    value = np.linalg.slogdet(V)[1] + np.linalg.slogdet(A)[1] + y @ P @ y
    return value / 2 + sum(sds[n] / SCALE - (SHAPE - 1) * math.log(sds[n]) for n in groups)


@pytest.fixture(params=["dense", "sparse"])
def products(request, monkeypatch):
    """How the products with the absorbed component are kept."""
    if request.param == "sparse":
        monkeypatch.setattr(mixed, "LARGE", 0)
        monkeypatch.setattr(mixed, "FILLED", 2)
    return request.param


def test_the_restricted_likelihood_is_that_of_dense_matrices_and_so_is_its_gradient(products):
    y, X, groups, known = crossed(np.random.default_rng(0))
    problem = _Problem.of(groups, known, X, y)
    assert problem.names[-2] == "two", "the component with the most groups is absorbed"
    assert isinstance(problem._products[2], np.ndarray) is (products == "dense")
    points = [np.log([0.5, 0.4, 0.8, 0.6]), np.log([1.2, 0.1, 0.3, 0.9])]
    ours, theirs = (
        [f(p) for p in points]
        for f in (lambda p: problem.at(p).value, lambda p: dense(problem, groups, X, y, known, p))
    )
    # Up to a constant, which is that of the rows of known error.
    assert ours[0] - ours[1] == pytest.approx(theirs[0] - theirs[1], abs=1e-8)
    slope, _ = problem.curved(problem.at(points[0]))
    for i, step in enumerate(1e-5 * np.eye(4)):
        ends = [dense(problem, groups, X, y, known, points[0] + s * step) for s in (1, -1)]
        assert slope[i] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("products")
def test_coefficients_and_their_covariance_are_those_of_generalised_least_squares():
    y, X, groups, known = crossed(np.random.default_rng(1))
    found = fit_mixed(y, X, groups, known)
    whole = found.of(slice(None))
    V = np.diag(np.where(known > 0, known, found.sds["error"] ** 2))
    V = V + sum(found.sds[name] ** 2 * Z @ Z.T for name, Z in groups.items())
    covariance = np.linalg.inv(X.T @ np.linalg.solve(V, X))
    np.testing.assert_allclose(whole.covariance, covariance, rtol=1e-6)
    np.testing.assert_allclose(found.beta, covariance @ X.T @ np.linalg.solve(V, y), rtol=1e-6)
    # The derivative of that covariance by each log standard deviation.
    for i, name in enumerate(found.problem.names):
        more = V + (np.diag((known == 0) * 1.0) if name == "error" else groups[name] @ groups[name].T) * (
            found.sds[name] ** 2 * (math.exp(2e-5) - 1)
        )
        moved = np.linalg.inv(X.T @ np.linalg.solve(more, X))
        np.testing.assert_allclose(whole.sensitivity[i], (moved - covariance) / 1e-5, rtol=1e-3, atol=1e-7)
    part = found.part(np.arange(len(y)) % 7 != 0)
    keep = np.arange(len(y)) % 7 != 0
    rest = np.linalg.inv(X[keep].T @ np.linalg.solve(V[np.ix_(keep, keep)], X[keep]))
    np.testing.assert_allclose(part.of(slice(None)).covariance, rest, rtol=1e-6)


def test_without_random_effects_it_is_least_squares_with_its_t_test():
    rng = np.random.default_rng(2)
    x = rng.standard_normal(30)
    y = 1 + 0.3 * x + rng.standard_normal(30)
    found = fit_mixed(y, np.column_stack([np.ones(30), x]), {}).contrast(np.array([0.0, 1.0]))
    expected = stats.linregress(x, y)
    assert (found.value, found.error) == (pytest.approx(expected.slope), pytest.approx(expected.stderr, rel=1e-4))
    assert found.df == pytest.approx(28, rel=1e-3) and found.p() == pytest.approx(expected.pvalue, rel=1e-3)


def test_components_are_recovered():
    found = pd.DataFrame([fit_joint(table(seed=s, rungs=16, students=6)).sds for s in range(8)]).median()
    assert found["rung"] == pytest.approx(0.008, abs=0.004) and found["teacher"] == pytest.approx(0.016, rel=0.2)


@pytest.mark.parametrize("cubic", [-0.004, 0.0, 0.004])
def test_a_clear_optimum_is_a_law_and_lies_in_its_set(cubic):
    fit = fit_joint(table(noise=QUIET, cubic=cubic, curvature=0.03))
    assert fit.status == "law" and fit.inside == 4
    ratio = fit.ratio_at()
    assert ratio.interval[0] < 2.7 < ratio.interval[1] < 1.15 * ratio.interval[0]
    assert fit.tests()["b = 1"] > 0.01
    best = fit.best_teacher(55e3)
    assert best.interval[0] < 2.7 * 55e3 < best.interval[1]
    assert sum(best.probabilities.values()) == pytest.approx(1)
    assert min(best.regret, key=best.regret.get) in ("122k", "163k", "164k", "183k"), best.regret


@pytest.mark.parametrize(
    ("slope", "said"),
    [
        (-0.08, "The largest teachers are not shown to be worse"),
        (0.08, "The smallest teachers are not shown to be worse"),
        (0.0, "Neither end of the ladder is shown to be worse"),
    ],
)
def test_without_an_optimum_what_is_missing_is_said(slope, said):
    fit = fit_joint(table(seed=3, best=None, slope=slope))
    assert fit.status == "no_optimum" and fit.missing.startswith(said) and said in fit.verdict()
    assert not all(map(math.isfinite, fit.ratio_at().interval))


def test_a_break_even_budget_is_found_and_said():
    fit = fit_joint(table("break-even, 2 budgets", seed=8, curvature=0.0, best=None, slope=0.05, fade=-0.08))
    assert fit.status == "break_even"
    found = fit.break_even(math.exp(fit.joint.means[0]))
    true = 3e5 * math.exp(0.05 / 0.08)
    assert found.established and found.interval[0] < true < found.interval[1]
    assert (found.small, found.large) == (pytest.approx(121.7e3, rel=0.05), pytest.approx(900e3, rel=0.01))
    assert fit.verdict().startswith("above ") and "a teacher of 900k is better than" in fit.verdict()
    assert json.loads(fit.to_json())["break_even"]["established"]


def test_order_of_rows_and_units_do_not_matter():
    frame = table(seed=4)
    one = fit_joint(frame)
    other = fit_joint(frame.sample(frac=1, random_state=0))
    assert other.ratio_at().value == pytest.approx(one.ratio_at().value, rel=1e-4)
    larger = fit_joint(
        frame.assign(student_params=frame.student_params * 1e4, teacher_params=frame.teacher_params * 1e4)
    )
    assert larger.ratio_at().value == pytest.approx(one.ratio_at().value, rel=1e-4)
    nats = fit_joint(frame.assign(loss=3 * frame.loss))
    assert nats.ratio_at().value == pytest.approx(one.ratio_at().value, rel=1e-3)
    assert nats.sds["teacher"] == pytest.approx(3 * one.sds["teacher"], rel=1e-3)


def study_one():
    names = ("study_law", "study_scales")
    frame = pd.concat([pd.read_csv(ROOT / "results" / "pico" / f"{name}.csv", low_memory=False) for name in names])
    return frame[frame["teacher_data"] == "1m"]


def test_what_study_one_says():
    """Its break-even budgets agree with an analysis made by others, with other code (docs/joint.md)."""
    fit = fit_joint(study_one())
    assert fit.status == "provisional" and fit.rests_on == ("55k",)
    tests = fit.tests()
    assert tests["b = 1"] > 0.3 and tests["d = 0"] < 1e-4 and 0.003 < tests["b + d = 1"] < 0.05
    others = {40e3: 833e3, 55e3: 664e3, 80e3: 509e3, 110e3: 408e3}
    for student, tokens in others.items():
        found = fit.break_even(student, 120e3, 900e3)
        assert found.tokens == pytest.approx(tokens, rel=0.06) and found.interval[0] < tokens < found.interval[1]
    one_budget = fit_joint(study_one().query("data_tokens == 300000"))
    assert one_budget.status == "no_optimum"
    with pytest.raises(ValueError, match="needs cells of at least two budgets"):
        one_budget.break_even(40e3)


def test_two_teachers_have_a_break_even_budget_and_no_optimum():
    """What most people have: no curve, but an order that changes with tokens."""
    frame = study_one()
    fit = fit_joint(frame[frame["teacher"].isin(["120k", "900k"])])
    assert (
        fit.status == "break_even"
        and "An optimum of this model needs at least 5 teachers; there are 2." in fit.verdict()
    )
    tokens, (low, high) = fit.break_even(55e3)
    assert low < 664e3 < high and tokens == pytest.approx(664e3, rel=0.2)
    assert math.isnan(fit.optimum(55e3).value) and fit.exponents() == {} and list(fit.tests()) == ["d = 0"]
    assert not any("at 300k tokens" in line for line in _joint_lines(fit))


def test_the_model_is_read_back_from_its_file():
    fit = fit_joint(study_one())
    held = json.loads(fit.to_json())
    back = Answers(JointCurve.from_dict(held["model"]))
    assert back.optimum(55e3, 5e5) == fit.optimum(55e3, 5e5)
    assert back.break_even(55e3) == fit.break_even(55e3)
    assert back.best_teacher(55e3, 5e5) == fit.best_teacher(55e3, 5e5)
    assert back.tests() == fit.tests() and back.exponents() == fit.exponents()
    other = fit.best_teacher(55e3, 3e5, rungs={"60k": 60e3, "150k": 150e3, "2m": 2e6})
    assert sum(other.probabilities.values()) == pytest.approx(1) and other.regret["150k"] < other.regret["2m"]


def test_b_and_d_are_estimated_with_their_sets():
    design = replace(NAMED["optimum grows with tokens, 4 budgets"], noise=QUIET, rungs=12)
    found = fit_joint(design.table(np.random.default_rng(3))).exponents()
    for name, true in (("b", 1.0), ("d", 1.3)):
        low, high = found[name].interval
        assert low < true < high and high - low < 0.5


def by_loss(sign=-1.0, **changes):
    """A grid whose teachers have losses that follow from their sizes, one rung's being better than its size says."""
    frame = replace(NAMED["cubic +0.000, little noise"], **changes).table(np.random.default_rng(4))
    return frame.assign(teacher_loss=4 + sign * 0.25 * np.log(frame["teacher_params"] / 55e3))


def test_teachers_count_by_their_loss():
    frame = by_loss()
    sized, rated = fit_joint(frame), fit_joint(frame, axis="teacher_loss")
    assert rated.optimum(60e3).value == pytest.approx(sized.optimum(60e3).value, rel=0.01)
    # A ladder whose losses scatter about a line: the set has the map's error too.
    noise = dict(zip(frame["teacher_params"].unique(), 0.03 * np.array([1, -1, 1, -1, -1, 1, -1, 1]), strict=True))
    rough = frame.assign(teacher_loss=frame["teacher_loss"] + frame["teacher_params"].map(noise))
    wide = fit_joint(rough, axis="teacher_loss").optimum(60e3).interval
    plain = rated.optimum(60e3).interval
    assert math.log(wide[1] / wide[0]) > math.log(plain[1] / plain[0]) + 0.1
    assert json.loads(rated.to_json())["axis"] == "teacher_loss"
    with pytest.raises(ValueError, match="needs losses that fall with teacher size"):
        fit_joint(by_loss(sign=1.0), axis="teacher_loss")
    with pytest.raises(ValueError, match="lacks teacher_loss"):
        fit_joint(frame.drop(columns="teacher_loss"), axis="teacher_loss")


def test_a_size_is_read_off_a_loss_inside_the_ladder_and_beyond():
    sizes = np.log(np.repeat([1e5, 2e5, 4e5, 8e5, 16e5], 2))
    loss = 3 - 0.2 * (sizes - 12) + 0.01 * (sizes - 12) ** 2
    found = size_map(sizes, loss, np.repeat(np.arange(5), 2))
    np.testing.assert_allclose(found.size(loss), sizes, atol=1e-3)
    assert found.sd < 1e-6
    assert found.size(np.array([loss.max() + 0.02]))[0] < sizes.min() < found.size(np.array([loss.max()]))[0] + 1e-6


def test_budgets_in_step_with_students_are_one_slope():
    frame = table("break-even, 2 budgets").query("data_tokens == 300000")
    frame = frame.assign(data_tokens=(20 * frame["student_params"]).round(-3))
    fit = fit_joint(frame)
    assert fit.curve.terms == ("1", "n") and fit.status in ("no_optimum", "provisional", "law")


def test_an_empty_seed_and_names_at_several_sizes():
    frame = table().assign(seed=lambda f: f["seed"].where(f.index != 3))
    assert fit_joint(frame).status
    twice = pd.concat([table(), table().assign(teacher_params=lambda f: 10 * f["teacher_params"])], ignore_index=True)
    named = twice.assign(teacher=twice["teacher_params"].rank(method="dense").mod(8).astype(int).astype(str))
    with pytest.raises(ValueError, match="teachers called . have from"):
        fit_joint(named)


def test_a_rungs_own_data_decide_where_it_alone_could_be_absorbed():
    """One seed and one budget: then the rung has the most groups of all components."""
    frame = replace(NAMED["24 rungs, 1 seed"], rungs=12).table(np.random.default_rng(5))
    best = frame["teacher_params"].unique()[6]
    frame.loc[frame["teacher_params"] == best, "loss"] -= 0.2
    fit = fit_joint(frame)
    name = next(n for n, size in fit.curve.rungs.items() if abs(size - math.log(best)) < 1e-6)
    assert fit.best_teacher(55e3).probabilities[name] > 0.5


FEW = """40,55,150,0,3.2796 40,120,150,0,3.2942 40,400,150,0,3.3850 40,55,300,0,3.2164 40,120,300,0,3.1691
40,400,300,0,3.2444 40,55,300,1,3.1998 55,80,300,0,3.0843 55,400,300,0,3.1244 110,120,300,0,2.8801
110,400,300,0,2.8927 110,600,300,0,2.9243"""


def test_an_optimum_rests_on_a_rung_without_which_the_model_is_not_determined():
    rows = [[float(x) for x in row.split(",")] for row in FEW.split()]
    frame = pd.DataFrame(rows, columns=["student_params", "teacher_params", "data_tokens", "seed", "loss"])
    sizes = {name: 1e3 * frame[name] for name in ("student_params", "teacher_params", "data_tokens")}
    names = {of: frame[f"{of}_params"].map("{:.0f}k".format) for of in ("student", "teacher")}
    fit = fit_joint(frame.assign(**sizes, **names))
    assert fit.status == "provisional"
    assert "400k" in fit.rests_on


def test_what_is_printed_of_study_one():
    said = list(_joint_lines(fit_joint(study_one())))
    assert said[0] == "one model of all 264 cells: provisional"
    assert said[1].endswith("but without 55k there is no optimum.")
    assert "  student 55k: 900k beats 120k above 694k tokens (95 % 485k to 980k)" in said
    (line,) = (text for text in said if "student 110k at 1.2m tokens" in text)
    assert "900k 8" in line and " 80k" not in line, "rungs smaller than the student are no teachers"


@pytest.mark.slow
def test_the_command_prints_the_model_and_writes_it(tmp_path, capsys):
    study_one().to_csv(tmp_path / "one.csv", index=False)
    assert cli.main(["fit", str(tmp_path / "one.csv"), "--joint", "--out", str(tmp_path / "out")]) == 0
    assert "one model of all 264 cells: provisional" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "joint.json").read_text())["rests_on"] == ["55k"]
    assert cli.main(["fit", str(tmp_path / "one.csv"), "--axis", "teacher_loss", "--out", str(tmp_path / "rated")]) == 0
    assert json.loads((tmp_path / "rated" / "joint.json").read_text())["axis"] == "teacher_loss"
    assert (tmp_path / "rated" / "joint.png").stat().st_size > 10_000
    assert cli.main(["fit", str(ROOT / "results" / "pico" / "study_architectures.csv"), "--joint"]) == 0
    assert "no model of all cells: one joint model needs cells that differ only in" in capsys.readouterr().out


def two_starts(frame):
    return frame.assign(init=np.where(np.arange(len(frame)) % 2, "random", "pruned"))


def two_losses(frame):
    """As records of a loss of the user's beside a usual one are: its source is a setting without a column."""
    own = np.arange(len(frame)) % 2 == 1
    losses = frame["loss"].to_numpy()
    return frame.assign(
        student_loss=losses,
        loss=np.where(own, "square", "forward_kl"),
        settings=np.where(own, "distill.loss.source=0a1b", None),
    )


def of_many_sizes(frame):
    return frame.assign(student="s", student_params=frame["student_params"] * np.linspace(1, 1.1, len(frame)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (two_starts, r"these also differ in init \(pruned, random\)\. .* such as --where init=(pruned|random)\."),
        (
            two_losses,
            r"settings \(default settings, distill.loss.source=0a1b\)\. .* --where loss=(square|forward_kl)\.",
        ),
        (lambda frame: frame[frame["teacher_params"] < 6e4], "all cells have one teacher"),
        (lambda frame: frame.drop(columns="teacher_params"), "the table lacks"),
        (of_many_sizes, "differ by .* in size"),
    ],
)
def test_tables_that_cannot_be_fitted_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        fit_joint(change(table()))


def test_teachers_of_which_none_is_smaller_than_another_are_refused():
    fit = fit_joint(table("break-even, 2 budgets"))
    with pytest.raises(ValueError, match="is not below"):
        fit.break_even(55e3, small=9e5, large=1e5)


SAMPLE = 20
SAMPLED = [("study one: 8 rungs, 3 seeds", 0.2, 0.95), pytest.param("flat", 0.0, 0.1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "least", "most"), SAMPLED)
def test_a_sample_of_the_evidence(name, least, most):
    design = NAMED[name]
    rows = pd.DataFrame([one(design, joint_coverage.FIRST_SEED + i) for i in range(SAMPLE)])
    found = summary(design, rows)
    assert least <= found["claims"] <= most
    if design.best is not None:
        assert found["coverage"] >= 0.85


def test_the_evidence_is_of_these_designs():
    held = pd.read_csv(ROOT / "results" / "joint_coverage.csv")
    assert list(held["design"]) == list(NAMED) and isinstance(DESIGNS[0], Design)
    assert held["coverage"].dropna().min() > 0.92
    nulls = held[~held["optimum"]]
    assert nulls["claims"].max() <= 0.05 and nulls["break_even_claims"].dropna().max() <= 0.05


def test_one_cell_of_two_origins_is_two_results_and_the_same_bits_are_one():
    cells = table(students=4, rungs=8, seeds=1).assign(cell=lambda f: [f"c{i}" for i in f.index])
    other = cells.assign(origin="them", loss=cells["loss"] + 0.01)
    both = pd.concat([cells.assign(origin="us"), other], ignore_index=True)
    assert len(fit_joint(both).joint.cells.y) == 2 * len(fit_joint(cells).joint.cells.y)
    again = pd.concat([both, other.assign(origin="a copy")], ignore_index=True)
    assert len(fit_joint(again).joint.cells.y) == len(fit_joint(both).joint.cells.y)
    curves, notes = curves_of(both.assign(data_tokens=300_000))
    assert {c.count.max() for c in curves} == {2.0}, "origins part no curves"
    assert "averaged like seeds" in " ".join(notes)
