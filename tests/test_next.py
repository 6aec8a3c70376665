"""Which cells to run next: the gain against a Bayesian model fitted anew, shared costs, reasons, and the command."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from capacity_gap.fit import Goal, next_cells, within_budget
from capacity_gap.fit.next_cells import BudgetTooSmall
from capacity_gap.fit.next_model import CURVATURE, LEVEL_SD, RATIO, STUDY, UNCERTAIN, WIDTHS, believe, lowest, row
from capacity_gap.fit.next_search import Search
from capacity_gap.records.bills import Arithmetic, Bills, spent

SIZES = {
    "40k": 40e3,
    "55k": 55e3,
    "80k": 80e3,
    "120k": 120e3,
    "180k": 180e3,
    "270k": 270e3,
    "400k": 400e3,
    "900k": 900e3,
}
STUDENTS, TEACHERS = ["40k", "55k", "80k"], ["120k", "180k", "270k", "400k", "900k"]


def cells(students=STUDENTS, teachers=TEACHERS, budgets=(3e5, 1.2e6), seeds=(0, 1)):
    rows = [
        (s, SIZES[s], t, SIZES[t], d, seed, seed)
        for s in students
        for t in teachers
        for d in budgets
        for seed in seeds
        if SIZES[t] > SIZES[s]
    ]
    names = ["student", "student_params", "teacher", "teacher_params", "data_tokens", "seed", "teacher_seed"]
    return pd.DataFrame(rows, columns=names)


def run(table, seed=0, noise=0.01):
    """Losses whose optimum is 2.5 times the student, with a teacher's own part."""
    rng = np.random.default_rng(seed)
    z = np.log(table["teacher_params"] / table["student_params"] / 2.5)
    own = table.groupby(["teacher", "teacher_seed"]).ngroup()
    return table.assign(
        loss=3 + 0.02 * z**2 + noise * rng.standard_normal(len(table)) + noise * rng.standard_normal(99)[own]
    )


EMPTY = cells().iloc[:0].assign(loss=0.0)


def place(cell):
    return (
        cell["student"],
        cell["teacher"],
        int(float(cell["data_tokens"])),
        str(cell["seed"]),
        str(cell["teacher_seed"]),
    )


def posterior(table, goal_row):
    """Variance of a contrast of the coefficients as a function of the cells that were run, by a Bayesian linear model.

    Written anew, with design rows for levels, coefficients and each effect, and precisions added up.
    """
    n, x, d = (np.log(table[c].to_numpy()) for c in ("student_params", "teacher_params", "data_tokens"))
    n0, d0 = n.mean(), d.mean()
    z = x - n - math.log(RATIO)
    curve = table.groupby(["student", "data_tokens"]).ngroup().to_numpy()
    middle = pd.Series(z).groupby(curve).transform("mean").to_numpy()
    blocks = [(row(z, n - n0, d - d0), np.array([*WIDTHS.values(), *UNCERTAIN.values()]) * CURVATURE)]
    levels = np.eye(curve.max() + 1)[curve]
    blocks += [(levels, LEVEL_SD), (levels * (z - middle)[:, None], STUDY["slope"])]
    groups = {
        "rung": ["teacher"],
        "teacher": ["teacher", "teacher_seed"],
        "teacher x student": ["teacher", "teacher_seed", "student"],
        "teacher x budget": ["teacher", "teacher_seed", "data_tokens"],
        "seed x budget": ["student", "seed", "data_tokens"],
    }
    for name, columns in groups.items():
        codes = table.groupby(columns).ngroup().to_numpy()
        blocks.append((np.eye(codes.max() + 1)[codes], STUDY[name]))
    W = np.hstack([Z for Z, _ in blocks])
    sds = np.concatenate([np.broadcast_to(sd, Z.shape[1]) for Z, sd in blocks])
    g = np.zeros(W.shape[1])
    g[:6] = goal_row

    def variance(rows):
        precision = np.diag(1 / sds**2) + W[rows].T @ W[rows] / STUDY["error"] ** 2
        return g @ np.linalg.solve(precision, g)

    return variance


def test_a_gain_is_the_drop_of_variance_of_a_bayesian_model_fitted_anew():
    pool = cells(budgets=(3e5,))
    goal = Goal("target", 55e3, 3e5)
    found = next_cells(EMPTY, pool, goal=goal, k=5)
    belief = believe(EMPTY, pool, goal)
    keys = list(zip(pool["student"], pool["teacher"], pool["seed"].astype(str), strict=True))
    picked = [keys.index(tuple(c.cell[k] for k in ("student", "teacher", "seed"))) for c in found]
    n, z = (
        math.log(55e3) - np.log(pool["student_params"]).mean(),
        np.log(pool["teacher_params"] / pool["student_params"]),
    )
    span = z.min() - math.log(RATIO), z.max() - math.log(RATIO)
    best = lowest(np.array([0, 0, 0, 1.0, 0, 0]), n, 0.0, span)
    assert abs(best) < 0.02
    variance = posterior(pool, row(best, n, 0.0, derivative=True)[0])
    values = [variance(picked[:i]) for i in range(len(picked) + 1)]
    assert belief.variance == pytest.approx(values[0], rel=1e-6)
    np.testing.assert_allclose([c.gain for c in found], -np.diff(values) / values[0], rtol=1e-4, atol=1e-8)


def test_gains_of_single_cells_given_others_too():
    pool = cells(budgets=(3e5,))
    known, rest = run(pool.iloc[:6]), pool.iloc[6:]  # too few for the joint model: the prior's noise
    goal = Goal("target", 55e3, 3e5)
    belief = believe(known, rest.reset_index(drop=True), goal)
    bills = Bills.of(rest, Arithmetic())
    search = Search.of(belief, bills, bills.paid(known, Arithmetic()))
    gain, variance = search.gain([3]), belief.variance
    # The same by the formula of the docstring.
    expected = belief.goal[3] ** 2 / (belief.error + belief.covariance[3, 3]) / variance
    assert gain == pytest.approx(expected) and 0 < gain < 1
    search.add(3)
    assert search.gains == [pytest.approx(gain)]
    assert search.gain([3]) < gain


def test_a_teacher_is_paid_for_once_and_not_at_all_where_it_is_there():
    pool = cells(students=["40k", "55k"], teachers=["400k"], budgets=(3e5,), seeds=(0,))
    cost = Arithmetic(teacher_tokens=1e6)
    bills = Bills.of(pool, cost)
    none = np.zeros(len(bills.parts), bool)
    teacher, signal, scores = 6 * 400e3 * 1e6, 2 * 400e3 * 3e5, 6 * 400e3 * 4096
    own = 6 * np.array([40e3, 55e3]) * 3e5
    np.testing.assert_allclose(bills.each(none), own + teacher + signal + scores)
    assert bills.total([0, 1], none) == pytest.approx(own.sum() + teacher + signal + scores)
    assert spent(pool, cost) == pytest.approx(bills.total([0, 1], none))
    np.testing.assert_allclose(bills.each(bills.paid(pool.iloc[:1], cost)), own)
    # A signal is one budget's; another seed's teacher is another one.
    other = cells(students=["40k"], teachers=["400k"], budgets=(1.2e6,), seeds=(0, 1))
    mixed = Bills.of(other, cost)
    paid = mixed.paid(pool, cost)
    assert mixed.each(paid)[0] == pytest.approx(6 * 40e3 * 1.2e6 + 4 * signal)
    assert mixed.each(paid)[1] == pytest.approx(6 * 40e3 * 1.2e6 + 4 * signal + teacher + scores)
    costs = [c.cost for c in next_cells(EMPTY, pool, goal=Goal("target", 40e3, 3e5), k=2, cost=cost)]
    assert sum(costs) == pytest.approx(spent(pool, cost)), "costs of candidates add up to what they cost together"


def test_without_a_cached_signal_each_cell_pays_for_its_teachers_outputs():
    pool = cells(students=["40k", "55k"], teachers=["400k"], budgets=(3e5,), seeds=(0,))
    more = spent(pool, Arithmetic(cached=False)) - spent(pool, Arithmetic())
    assert more == pytest.approx(2 * 400e3 * 3e5)


def test_cells_of_a_teacher_that_is_there_come_first():
    known = run(cells(students=["40k", "80k"], budgets=(3e5,), seeds=(0,)))
    pool = cells(students=["55k"], budgets=(3e5,), seeds=(0, 1))
    dear = Arithmetic(teacher_tokens=1e9)
    found = next_cells(known, pool, goal=Goal("target", 55e3, 3e5), k=4, cost=dear)
    assert {c.cell["seed"] for c in found} == {"0"}
    assert all("already trained" in c.reason for c in found)
    free = next_cells(known, pool, goal=Goal("target", 55e3, 3e5), k=10, cost=Arithmetic(teacher_tokens=None))
    assert {c.cell["seed"] for c in free} == {"0", "1"} and not any("teacher is" in c.reason for c in free)


def test_from_nothing_a_law_takes_three_students_under_four_teachers():
    found = next_cells(EMPTY, cells(), goal="law", k=12)
    picked = pd.DataFrame([c.cell for c in found])
    grid = picked.groupby(["student", "teacher"]).size().unstack()
    assert grid.shape == (3, 4) and grid.notna().all(axis=None)
    assert picked["data_tokens"].nunique() == 1 and picked["seed"].nunique() == 1


def test_what_was_run_of_these_is_not_run_again():
    pool = cells()
    first = next_cells(EMPTY, pool, goal="law", k=12)
    known = run(pd.DataFrame([c.cell for c in first[:7]]))
    rest = next_cells(known, cells(seeds=(1,)), goal="law", k=5)
    grid = pd.concat([known, pd.DataFrame([c.cell for c in rest])]).groupby(["student", "teacher"]).size().unstack()
    assert grid.shape == (3, 4) and (grid == 1).all(axis=None)


def test_a_repeated_cell_is_no_candidate_and_gaps_in_seeds_do_not_matter():
    pool = cells(budgets=(3e5,))
    known = run(pool.iloc[:20]).assign(seed=lambda t: t["seed"].astype(float))
    found = next_cells(known, pool, goal="law", k=50)
    assert len(found) == len(pool) - 20
    places = {(c.cell["student"], c.cell["teacher"], c.cell["seed"]) for c in found}
    assert not places & {(s, t, str(int(x))) for s, t, x in known[["student", "teacher", "seed"]].to_numpy()}


def test_a_budget_is_kept_and_filled():
    pool = cells()
    whole = spent(pool, Arithmetic())
    found = within_budget(EMPTY, pool, goal="law", budget=0.4 * whole)
    total = sum(c.cost for c in found)
    assert total <= 0.4 * whole
    places = {place(c.cell) for c in found}
    rest = pool[[place(cell) not in places for cell in pool.to_dict("records")]]
    bills = Bills.of(rest, Arithmetic())
    left = bills.each(bills.paid(pool.drop(rest.index), Arithmetic()))
    assert total + left.min() > 0.4 * whole, "a cell that still fits is left out"
    grid = pd.DataFrame([c.cell for c in found]).groupby(["student", "teacher"]).size().unstack().notna()
    assert (grid.sum() == 3).sum() >= 4
    more = within_budget(EMPTY, pool, goal="law", budget=0.9 * whole)
    assert sum(c.gain for c in more) > sum(c.gain for c in found)
    with pytest.raises(BudgetTooSmall, match="too small for 3 students under 4 teachers.*choose a target") as law:
        within_budget(EMPTY, pool, goal="law", budget=1e-3 * whole)
    assert law.value.for_what == "3 students under 4 teachers"
    alone = Bills.of(pool, Arithmetic())
    cheapest = alone.each(alone.paid(EMPTY, Arithmetic())).min()
    target = Goal("target", SIZES["80k"], 1.2e6)
    with pytest.raises(BudgetTooSmall, match="too small for any cell of this pool: the cheapest takes") as one:
        within_budget(EMPTY, pool, goal=target, budget=0.5 * cheapest)
    assert (one.value.needed, one.value.for_what) == (pytest.approx(cheapest), "the cheapest cell")
    with pytest.raises(ValueError, match="too small for any cell of this pool"):
        within_budget(EMPTY, pool, goal=Goal("target", 55e3, 3e5), budget=1e3)


def test_greedy_cells_narrow_a_goal_more_than_random_ones_of_the_same_cost():
    pool, cost = cells(seeds=(0, 1, 2)), Arithmetic(teacher_tokens=1e6)
    known = run(pool.sample(20, random_state=1))
    for goal in (Goal("law"), Goal("target", 80e3, 1.2e6), Goal("break_even", 55e3, small=120e3, large=900e3)):
        chosen = next_cells(known, pool, goal=goal, k=12, cost=cost)
        total, best = sum(c.cost for c in chosen), sum(c.gain for c in chosen)
        rest = pool.drop(known.index).reset_index(drop=True)
        labelled = rest.assign(seed=rest["seed"].astype(str), teacher_seed=rest["teacher_seed"].astype(str))
        old = known.assign(seed=known["seed"].astype(str), teacher_seed=known["teacher_seed"].astype(str))
        belief, bills = believe(old, labelled, goal), Bills.of(rest, cost)
        paid, gains = bills.paid(known, cost), []
        for seed in range(20):
            order, taken = np.random.default_rng(seed).permutation(len(rest)), []
            for i in order:
                if bills.total([*taken, i], paid) <= total:
                    taken.append(int(i))
            gains.append(Search.of(belief, bills, paid).gain(taken))
        assert best > 1.3 * np.median(gains) and best > np.quantile(gains, 0.9), goal


def test_reasons_are_true():
    pool = cells(seeds=(0, 1, 2))
    known = run(cells(students=["40k"], teachers=["120k", "180k"], budgets=(3e5,), seeds=(0,)))
    found = next_cells(known, pool, goal="law", k=40, cost=Arithmetic(teacher_tokens=1e5))
    seen = [tuple(map(str, r)) for r in known[["student", "teacher", "data_tokens", "teacher_seed"]].to_numpy()]
    said = set()
    for c in found:
        cell, reason = c.cell, c.reason
        student, teacher, tokens, seed = (str(cell[k]) for k in ("student", "teacher", "data_tokens", "teacher_seed"))
        assert reason.startswith(
            f"{teacher} for {student} at {'300k' if tokens == '300000.0' else '1.2m'} tokens, seed {seed}: "
        )
        there, trained = ((teacher, seed) in {(t, s) for _, t, _, s in part} for part in (seen[: len(known)], seen))
        assert ("is already trained" in reason) == there and ("must be trained" in reason) != trained
        assert ("is trained for a cell above" in reason) == (trained and not there)
        assert ("a new teacher size" in reason) == (teacher not in {t for _, t, _, _ in seen})
        sizes = [SIZES[t] for s, t, d, _ in seen if (s, d) == (student, tokens)]
        assert ("first cell of this student and budget" in reason) == (not sizes)
        if "the largest of this student" in reason:
            assert SIZES[teacher] > max(sizes) and "above" in reason
        if "the smallest of this student" in reason:
            assert SIZES[teacher] < min(sizes) and "below" in reason
        if number := re.search(r"trained teacher number (\d)", reason):
            assert int(number[1]) == len({s for _, t, _, s in seen if t == teacher}) + 1
        if "a new student" in reason:
            assert student not in {s for s, _, _, _ in seen}
        if "a new budget" in reason:
            assert tokens not in {d for _, _, d, _ in seen}
        seen.append((student, teacher, tokens, seed))
        said |= set(re.split(r"[:;] |\.$", re.sub(r"\d+", "N", reason))[1:])
    assert len(said) >= 7, said


@pytest.mark.parametrize(
    "goal", [Goal("target", SIZES["80k"], 1.2e6), Goal("break_even", SIZES["80k"], small=120e3, large=400e3), Goal()]
)
def test_reasons_say_how_cells_of_other_curves_serve_the_question(goal):
    said = set()
    for c in next_cells(EMPTY, cells(seeds=(0,)), goal=goal, k=20):
        students = goal.kind != "law" and c.cell["student"] != "80k"
        budgets = goal.kind == "target" and c.cell["data_tokens"] != 1.2e6
        other = " and ".join(["students"] * students + ["budgets"] * budgets)
        words = [part for part in re.split(r"[:;] |\.$", c.reason) if part.startswith("linked")]
        assert words == [f"linked to the question by the model's trend over {other}"] * bool(other)
        said.add(other)
    assert len(said) >= {"target": 3, "break_even": 2, "law": 1}[goal.kind], said
    if goal.kind == "target":
        found = next_cells(EMPTY, cells(seeds=(0,), budgets=(1.2e6,)), goal=goal, k=20)
        assert not any("budgets" in c.reason for c in found) and any("over students" in c.reason for c in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"goal": "laws"}, "goal='laws' is not known. Allowed: law, target, break_even"),
        ({"goal": "target"}, "goal target needs student_params, data_tokens, positive"),
        ({"k": 0}, "k=0 must be one or more"),
        ({"pool": cells().drop(columns="teacher_params")}, "lacks teacher_params"),
        ({"pool": cells().assign(student_params=1e6)}, "none of the pool's 60 cells can be run"),
        ({"cost": lambda cell: (-1.0, {})}, "cost must give FLOPs"),
        ({"frame": run(cells()).assign(init=["pruned", "random"] * 30)}, "these also differ in init"),
    ],
)
def test_what_cannot_be_asked_is_said(change, said):
    asked = {"frame": EMPTY, "pool": cells(), "goal": "law", "k": 6} | change
    with pytest.raises(ValueError, match=re.escape(said)):
        next_cells(asked.pop("frame"), asked.pop("pool"), **asked)


def test_a_break_even_budget_needs_two_budgets():
    with pytest.raises(ValueError, match="needs cells of at least two budgets"):
        next_cells(EMPTY, cells(budgets=(3e5,)), goal=Goal("break_even", 55e3, small=120e3, large=900e3))
