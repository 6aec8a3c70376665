"""The published tables of the study are those of its records."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import study, study_elsewhere, study_surface, study_tables


@pytest.fixture(scope="module")
def arms():
    return study.arms_of(study.load())


@pytest.mark.slow
def test_tables_of_the_pages_are_those_of_the_records(arms):
    tables = study.pages(study.load(), arms)
    for page in study.PAGES:
        assert study.filled(page.read_text(), tables) == page.read_text(), "run `make study-figures`"
    assert all(f"<!-- {name} -->" in study.PAGES[0].read_text() for name in tables)


def test_the_published_surface_is_that_of_the_tables():
    from capacity_gap.fit import SurfaceFit

    kept = SurfaceFit.from_json((study.RECORDS / "surface.json").read_text())
    assert study_surface.surface_table(kept) in study.PAGES[0].read_text()


def test_a_cell_is_published_once():
    frame = study.load()
    assert frame["cell"].is_unique
    assert set(frame["status"]) == {"done"}


def test_the_published_fit_is_that_of_the_records(arms):
    from capacity_gap.fit import LawFit

    kept = LawFit.from_json((study.RECORDS / "law.json").read_text())
    made = study.main_of(arms).law
    assert (kept.status, kept.ratio) == (made.status, made.ratio)
    assert [o.status for o in kept.optima] == [o.status for o in made.optima]


@pytest.fixture
def main(arms):
    """The cells of the main arm that were distilled."""
    return study.main_of(arms).frame


def test_arms_are_told_apart_by_what_was_changed(main):
    held = main.assign(init="random", cell="x" + main["cell"])
    found = study.arms_of(pd.concat([main, held], ignore_index=True))
    assert [(a.name, sorted(a.differs)) for a in found] == [("main", []), ("random start", ["init"])]
    contrast = study_tables.contrasts_table(found).splitlines()
    assert len(contrast) > 2
    differences = [cell.strip() for cells in contrast[2:] for cell in cells.split("|")[7:9]]
    assert set(differences) == {"0.000 ± 0.000"}, "the same cells"


def budgets(short: pd.DataFrame, more: float) -> list[list[str]]:
    """Rows of the budget table where four times the tokens raise the loss under the largest teacher by `more`."""
    longer = short.assign(data_tokens=1_200_000, cell="x" + short["cell"])
    longer["student_loss"] += more * (longer["teacher_params"] == study_tables.LARGE)
    arm = study.arms_of(pd.concat([short, longer], ignore_index=True))[0]
    return [[c.strip() for c in row.split("|")] for row in study_tables.budget_table(arm).splitlines()[2:]]


def test_what_a_budget_changes_is_told_per_doubling(main):
    short = main.query("data_tokens == 300_000")
    same, changed = budgets(short, 0.0), budgets(short, 0.1)
    assert [row[1] for row in same] == ["40k", "55k", "80k", "110k"]
    assert all(row[3].startswith("1.00 (") and row[4] == "0.000 ± 0.000" for row in same)
    assert all(row[4] == "0.050 ± 0.000" for row in changed)


def test_a_line_through_all_teachers_gives_the_difference_of_a_straight_curve(main):
    short = main.query("data_tokens == 300_000 and student == '55k' and seed == 0")
    straight = short.assign(student_loss=0.1 * np.log(short["teacher_params"]))
    assert study_tables.line(straight).tolist() == pytest.approx(study_tables.rise(straight).tolist())


def test_the_rest_of_a_table_is_what_rows_and_columns_leave():
    additive = np.add.outer([0.0, 1.0, 3.0], [0.0, 2.0])
    assert study_tables.remainder(additive) == pytest.approx(0)
    noise = np.array([[1.0, -1.0], [-1.0, 1.0]])
    assert study_tables.remainder(np.add.outer([0.0, 1.0], [0.0, 2.0]) + noise) == pytest.approx(2.0)


def rows_of(table: str) -> list[list[str]]:
    return [[c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()[2:]]


def test_what_the_largest_teacher_costs_elsewhere_is_compared_with_the_main_arm(main):
    """Another architecture under which it costs 0.1 nats less than in the main arm, in every seed."""
    short = main.query("data_tokens == 300_000")
    other = short.assign(family="other", cell="x" + short["cell"])
    other["student_loss"] -= 0.1 * (other["teacher"] == "900k")
    ours, theirs = rows_of(study_elsewhere.prices_table(study.arms_of(pd.concat([short, other], ignore_index=True))))
    assert (ours[0], theirs[0], ours[3:]) == ("main", "other", [""] * 4)
    assert all(said.startswith("-0.100 ± ") for said in theirs[3:]), "whatever the variance, teacher and students"
    by_seed = [[float(v) for v in row[1].split(",")] for row in (ours, theirs)]
    assert np.subtract(*by_seed) == pytest.approx([0.1] * 3, abs=0.0011)
    assert float(ours[2].split()[0]) == pytest.approx(np.mean(by_seed[0]), abs=0.0006)


def test_what_a_shape_costs_is_told_where_it_is_another(main):
    short = main.query("data_tokens == 300_000 and student == '55k'")
    common = short.assign(family="other", cell="x" + short["cell"])
    own = common.assign(shape="per_teacher", cell="y" + short["cell"])
    own["student_loss"] += 0.05 * (own["teacher"] == "270k")
    (row,) = rows_of(study_elsewhere.shapes_table(study.arms_of(pd.concat([short, common, own], ignore_index=True))))
    assert row[:2] == ["other", "55k"]
    assert sorted(row[2:]) == ["+0.050", *["–"] * 7]


def test_students_of_their_teachers_size_are_left_out_of_the_pruned_ones(arms, main):
    kept = study_elsewhere.pruned_only(study.main_of(arms)).frame
    left = main[~main["cell"].isin(kept["cell"])]
    assert set(zip(left["student"], left["teacher"], strict=True)) == {("55k", "55k"), ("80k", "80k")}
