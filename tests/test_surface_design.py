"""The next runs of a loss surface: gains against brute force, costs, the start, what is refused, and random order."""

import numpy as np
import pandas as pd
import pytest

from capacity_gap.fit import fit_surface, next_runs
from capacity_gap.records.bills import Arithmetic, Bills
from capacity_gap.settings.errors import ConfigError
from capacity_gap.surfaces.design import Design, Errors, Law, covariance, slopes, training_flops
from capacity_gap.surfaces.forms import FORMS
from capacity_gap.surfaces.surface import from_parameters

TRUTH = from_parameters(
    "supervised", {"E": 0.3, "A": 115.0, "alpha": 0.39, "B": 800.0, "beta": 0.42, "gamma": 0.52}, axis="total"
)


def grid(sizes=8, tokens=8, *, noise=0.0, seed=0):
    """Runs of 100m to 6b parameters on 1b to 500b tokens under TRUTH, the cheapest first."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 6e9, sizes), np.geomspace(1e9, 5e11, tokens)))
    loss = TRUTH.predict(student_params=n, data_tokens=d)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    runs = pd.DataFrame({"student_params": n, "data_tokens": d, "loss": loss, "cost": 6 * n * d})
    return runs.sort_values("cost", ignore_index=True)


RUNS = grid()
POOL, TARGET = RUNS[:-8], RUNS[-8:]
SCALES = ["student_params", "data_tokens"]


def columns(table):
    return {name: table[name].to_numpy() for name in SCALES}


@pytest.fixture
def linear():
    """A law, the runs known, and a design of the candidates."""
    law = Law(FORMS["supervised"], np.array(TRUTH.theta), np.full(6, 0.5), TRUTH.centre)
    known, pool, target = columns(POOL[:9]), columns(POOL[9:]), columns(TARGET)
    error = Errors(0.003, 0.002, target)
    bills = Bills.of(POOL[9:], training_flops)
    S = covariance(law, known, error.of(known))
    paid = np.ones(len(bills.parts), bool)
    return law, error, Design(S, slopes(law, pool), slopes(law, target), error.of(pool), bills, paid, 0.5)


def test_slopes_are_those_of_the_log_loss(linear):
    law, _, _ = linear
    runs, step = columns(RUNS), 1e-6
    for i in range(6):
        up, down = (Law(law.form, law.theta + side * step * np.eye(6)[i], law.sd, law.centre) for side in (1, -1))
        numeric = (up.log_loss(runs) - down.log_loss(runs)) / (2 * step)
        assert np.allclose(slopes(law, runs)[:, i], numeric, atol=1e-6)


def test_a_drop_is_what_the_prediction_variance_loses_when_the_run_is_known(linear):
    law, error, design = linear

    def variance(table):
        runs = columns(table)
        J = slopes(law, columns(TARGET))
        return float(np.mean(np.sum(J @ covariance(law, runs, error.of(runs)) * J, axis=1)))

    before = variance(POOL[:9])
    assert design.variance == pytest.approx(before)
    brute = [before - variance(POOL.iloc[[*range(9), i]]) for i in range(9, len(POOL))]
    assert np.allclose(design.drops(), brute, rtol=1e-6, atol=0)
    first = int(np.argmax(np.array(brute) / POOL["cost"][9:] ** 0.5))
    while len(design.chosen) < 4:
        assert design.add(np.inf)
    assert design.chosen[0] == first
    taken = POOL.iloc[[*range(9), *(9 + i for i in design.chosen)]]
    assert design.variance == pytest.approx(variance(taken))
    assert before - sum(design.gains) == pytest.approx(variance(taken))


def test_error_grows_with_the_distance_to_the_nearest_target():
    goal = {"student_params": np.array([1e9, 1e6]), "data_tokens": np.array([1e9, 1e6])}
    runs = {"student_params": np.array([1e9, 1e9 / np.e]), "data_tokens": np.array([1e9, 1e9 / np.e])}
    assert np.allclose(Errors(0.003, 0.01, goal).of(runs), [0.003**2, 0.003**2 + 2 * 0.01**2])


def test_misfit_moves_runs_towards_the_targets():
    far = [
        np.mean([np.log(c.cost) for c in next_runs(POOL[:12], POOL, k=8, target=TARGET, misfit=m)]) for m in (0, 0.02)
    ]
    assert far[1] > far[0] + 0.5


def test_gains_are_shares_and_fall():
    found = next_runs(grid(noise=0.002)[:12], POOL, k=6, target=TARGET, exponent=0)
    gains = [c.gain for c in found]
    assert 0 < sum(gains) < 1 and gains == sorted(gains, reverse=True)
    assert "of the variance at the targets" in found[0].reason and "so far" in found[0].reason


def test_costs_and_the_budget_are_respected():
    dear = next_runs(POOL[:12], POOL, k=5, target=TARGET)
    budget = 0.5 * sum(c.cost for c in dear)
    found = next_runs(POOL[:12], POOL, k=5, target=TARGET, budget=budget)
    assert all(c.cost == 6 * c.cell["student_params"] * c.cell["data_tokens"] for c in dear)
    assert len(found) == 5 and sum(c.cost for c in found) <= budget
    by_own = next_runs(POOL[:12], POOL, k=1, target=TARGET, cost=lambda run: (2.0, {}), exponent=1)
    free = next_runs(POOL[:12], POOL, k=1, target=TARGET, exponent=0)
    assert by_own[0].cell == free[0].cell and by_own[0].cost == 2


@pytest.mark.parametrize("form", ["chinchilla", "supervised"])
def test_a_start_from_nothing_identifies_the_form_and_is_cheap(form):
    start = next_runs(pd.DataFrame(), POOL, form=form, k=40, target=TARGET)
    runs = pd.DataFrame([c.cell for c in start])
    assert len(runs) <= len(FORMS[form].parameters) + 3
    assert runs["cost"].sum() < 0.01 * POOL["cost"].sum()
    fit = fit_surface(runs, form, bootstraps=0, permutations=0)
    assert fit.status == "fitted" and fit.held == () and not any("two values" in note for note in fit.notes)
    if form == "supervised":
        given = fit.predict(**columns(TARGET))
        assert np.abs(given / TARGET["loss"] - 1).max() < 0.01


def test_runs_that_do_not_identify_the_form_are_completed():
    line = POOL[POOL["student_params"] == POOL["student_params"].min()]
    assert len(line) > 6
    found = next_runs(line, POOL, k=20, target=TARGET)
    sizes = {c.cell["student_params"] for c in found} | set(line["student_params"])
    assert 1 <= len(found) < 6 and len(sizes) >= 3
    assert all("part of an initial design" in c.reason for c in found)


def test_runs_that_were_made_are_left_out_but_not_those_that_failed_or_have_another_seed():
    made, tried = POOL[:20], POOL.iloc[[25]]
    rest = {tuple(c.cell[s] for s in SCALES) for c in next_runs(made, POOL[:26], k=99, target=TARGET)}
    assert rest == set(POOL[20:26][SCALES].itertuples(index=False, name=None))
    with pytest.raises(ConfigError, match="exist already"):
        next_runs(made, made, target=TARGET)
    assert len(next_runs(made.assign(seed=0), made.assign(seed=1), k=3, target=TARGET)) == 3
    failed = pd.concat([made.assign(status="done"), tried.assign(status="failed", loss=np.nan)])
    assert len(next_runs(failed, tried, target=TARGET)) == 1


def test_teachers_are_charged_once():
    n, d, t = (v.ravel() for v in np.meshgrid([1e8, 2e8, 4e8, 8e8], [1e9, 4e9, 1.6e10], [2, 4, 8, 16]))
    pool = pd.DataFrame({"student_params": n, "data_tokens": d, "teacher_params": n * t})
    start = next_runs(pd.DataFrame(), pool, form="additive", k=30, target=pool[-3:])
    cells = pd.DataFrame([c.cell for c in start])
    bills = Bills.of(cells, Arithmetic())
    alone = bills.each(np.zeros(len(bills.parts), bool)).sum()
    together = bills.total(range(len(cells)), np.zeros(len(bills.parts), bool))
    assert sum(c.cost for c in start) == pytest.approx(together) and together < alone


def test_it_predicts_better_than_random_order_at_the_same_cost():
    """TRUTH with noise and a bend that the form does not have, as real runs have."""
    runs = grid(10, 10, noise=0.001)
    runs["loss"] *= 1 + 5e-4 * np.log(runs["cost"] / runs["cost"].max()) ** 2 / 10
    pool, target = runs[:-10], runs[-10:]
    budget, first = 0.05 * pool["cost"].sum(), pool[:12:1]

    def error(taken):
        assert taken["cost"].sum() <= budget
        fit = fit_surface(taken, "supervised", bootstraps=0, permutations=0, starts=8)
        return float(np.abs(fit.predict(**columns(target)) / target["loss"] - 1).mean())

    taken = first
    while (pool.drop(taken.index)["cost"] <= budget - taken["cost"].sum()).any() and len(taken) < 40:
        found = next_runs(taken, pool, k=2, target=target, budget=budget - taken["cost"].sum())
        rows = pool.reset_index().merge(pd.DataFrame([c.cell for c in found])[SCALES], on=SCALES)
        taken = pd.concat([taken, rows.set_index("index")])
    others = []
    for seed in range(10):
        order = pool.drop(first.index).sample(frac=1, random_state=seed)
        rows, left = list(first.index), budget - first["cost"].sum()
        for index, cost in order["cost"].items():
            if cost <= left:
                rows.append(index)
                left -= cost
        others.append(error(pool.loc[rows]))
    assert error(taken) < np.median(others)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 0}, "k=0"),
        ({"budget": 0}, "budget=0"),
        ({"budget": 1.0}, "is too small for any run"),
        ({"exponent": 1.5}, "exponent=1.5"),
        ({"misfit": -1}, "misfit=-1"),
        ({"misfit": float("nan")}, "misfit=nan"),
        ({"form": "cubic"}, "cubic"),
        ({"axis": "depth"}, "axis='depth'"),
        ({"target": TARGET[["student_params"]]}, "data_tokens"),
        ({"target": TARGET[:0]}, "target: 0 of its 0 rows"),
        ({"pool": POOL.assign(data_tokens=-1.0)}, "positive"),
        ({"pool": POOL.assign(data_tokens=np.nan)}, "pool: 0 of its"),
        ({"frame": pd.DataFrame(), "pool": POOL[:5]}, "do not identify supervised"),
        ({"frame": POOL[:12].drop(columns="loss")}, "loss"),
    ],
)
def test_what_cannot_be_done_is_refused(change, told):
    given = {"frame": POOL[:12], "pool": POOL, "target": TARGET, **change}
    with pytest.raises(ConfigError, match=told):
        next_runs(given.pop("frame"), given.pop("pool"), **given)
