"""Study two: its analysis finds what was planted and nothing else, and its records were made after its registration."""

import hashlib
import json
import subprocess

import numpy as np
import pandas as pd
import pytest

from benchmarks import study2
from benchmarks.study import filled
from benchmarks.study2_after import own_disagreement, start_differences
from benchmarks.study2_answers import (
    PAIRS,
    Estimate,
    foretold,
    growth,
    judged,
    one_loss,
    optimum,
    recipe,
    seen,
    slope_of,
    stands,
    tuned,
)
from benchmarks.study2_corrected import (
    by_student,
    excess,
    hedged_brier,
    picks,
    pooled,
    set_held,
)
from benchmarks.study2_power import ALL, EIGHT, cells, expected, of_recipe, scatter
from capacity_gap.cell import pipeline
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "study2_registration.md"
RNG = np.random.default_rng(5)


def quiet(frame, rng=RNG):
    """Next to no noise: what is planted must be found."""
    return 1e-4 * rng.standard_normal(len(frame))


def test_a_slope_is_that_of_the_rungs_whatever_levels_students_and_seeds_have():
    frame = cells(("55k", "110k"), EIGHT, (300_000,), (10, 11))
    levels = frame["student"].map({"55k": 4.0, "110k": 3.0}) + 0.3 * frame["seed"]
    frame["loss"] = levels - 0.05 * np.log(frame["teacher_params"]) + quiet(frame)
    found = slope_of(frame)
    assert found.value == pytest.approx(-0.05, abs=1e-3) and found.sign == "falls" and found.units == 8
    assert found.interval[0] < -0.05 < found.interval[1] and not found.small


def test_growth_is_the_change_of_slope_with_every_doubling():
    frame = cells(("55k", "110k"), EIGHT, (300_000, 600_000, 1_200_000), (10, 11))
    doublings = np.log2(frame["data_tokens"] / 300_000)
    frame["loss"] = (0.02 - 0.03 * doublings) * np.log(frame["teacher_params"]) - doublings + quiet(frame)
    assert growth(frame).value == pytest.approx(-0.03, abs=1e-3)


def test_a_noisy_flat_start_is_left_open_and_an_equal_text_changes_little():
    frame = cells(("55k", "110k"), EIGHT, (300_000, 600_000), (10, 11)).assign(init="pruned", kd_weight=0.5)
    rng, signs = np.random.default_rng(1), []
    for _ in range(100):
        frame["loss"] = 4 + scatter(frame, rng)
        signs.append(slope_of(frame).sign)
    assert 86 <= signs.count("open") <= 100  # 95 on average
    found = seen(frame, frame.assign(loss=frame["loss"] + quiet(frame)))["mean of the budgets"]
    assert found.small and abs(found.value) < 1e-3


def test_an_optimum_with_little_noise_is_a_law_and_a_plain_slope_is_none():
    frame = cells(("40k", "55k", "80k", "110k"), ALL, (300_000, 600_000), (10, 11))
    rng = np.random.default_rng(2)
    bowl = optimum(frame.assign(loss=expected(frame, 0.0225) + 0.1 * scatter(frame, rng)))
    assert bowl.status == "law"
    low, high = bowl.ratio_at(600_000).interval
    assert low < 1.8 * 2**1.3 < high
    line = optimum(frame.assign(loss=expected(frame, 0.0225, bend=False) + 0.1 * scatter(frame, rng)))
    assert line.status not in ("law", "provisional")


def test_settings_are_never_chosen_on_the_seed_that_judges_them():
    frame = cells(("55k",), ("120k", "900k"), (300_000,), (10, 11, 12))
    grid = pd.concat(
        [frame.assign(learning_rate=rate, kd_weight=0.5, loss=4.0, student_loss_validation=4.0) for rate in (1, 2)]
    )
    best = (grid["seed"] == 10) & (grid["learning_rate"] == 2)  # at seed 10 alone, rate 2 looks best by far
    grid["student_loss_validation"] = np.where(best, 1.0, np.where(grid["learning_rate"] == 1, 3.9, 4.0))
    picked = tuned(grid).groupby("seed")["learning_rate"].unique().map(list).to_dict()
    assert picked == {10: [1], 11: [2], 12: [2]}


def test_a_contrast_that_tuning_removes_no_longer_stands():
    frame = cells(("55k", "110k"), ("120k", "330k", "900k"), (300_000, 1_200_000), (10, 11, 12))
    sign = np.where(frame["data_tokens"] == 300_000, 1, -1)
    turn = 0.06 * sign * np.where(frame["teacher"] == "900k", 1, 0)
    one = frame.assign(loss=4 + turn + quiet(frame))
    usual = frame.assign(learning_rate=2, kd_weight=0.5, loss=4 + turn + quiet(frame), student_loss_validation=4.0)
    flat = usual.assign(learning_rate=1, loss=3.9 + quiet(frame), student_loss_validation=3.9)
    same = usual.assign(learning_rate=1, loss=3.9 + turn + quiet(frame), student_loss_validation=3.9)
    assert stands(recipe(pd.concat([usual, same]), usual, one)) == "stands"
    assert stands(recipe(pd.concat([usual, flat]), usual, one)) == "undecided"
    other = usual.assign(learning_rate=1, loss=3.9 - turn + quiet(frame), student_loss_validation=3.9)
    assert stands(recipe(pd.concat([usual, other]), usual, one)) == "falls"
    assert of_recipe(np.random.default_rng(3), 1.0)["falls"] is False


def test_the_sum_of_two_estimates_has_the_degrees_of_freedom_of_welch():
    one = Estimate(1.0, 3.0, 2).plus(Estimate(2.0, 4.0, 8))
    assert (one.value, one.error) == (3.0, 5.0)
    assert one.freedom == pytest.approx(25**2 / (9**2 / 2 + 16**2 / 8))


def test_two_measures_of_one_order_differ_no_more_than_their_seeds_do():
    frame = cells(("40k", "55k"), ALL, (300_000, 600_000), (10, 11))
    rng = np.random.default_rng(4)
    frame["loss"] = expected(frame, 0.0225) + 0.3 * scatter(frame, rng)
    same = one_loss(frame.assign(other=-frame["loss"] + quiet(frame)), "other", better=1, draws=100)
    assert same["excess_high"] < 0.10 and same["discordant"] < 0.05 and same["regret"] < 0.01 * same["range"]
    against = one_loss(frame.assign(other=frame["loss"]), "other", better=1, draws=100)
    assert against["excess_low"] > 0 and against["discordant"] > 0.9


def test_the_corrected_excess_is_zero_for_a_noisy_measure_of_the_same_order():
    frame, found = cells(("40k", "55k", "80k"), ALL, (300_000, 600_000), (10, 11)), []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        frame["loss"] = expected(frame, 0.0225) + scatter(frame, rng)
        noisy = (frame["loss"] + 0.05 * rng.standard_normal(len(frame))).round(2)
        found.append(excess(frame.assign(other=noisy), "other", better=-1, draws=100))
    assert abs(np.mean([f["excess"] for f in found])) < 0.02
    assert sum(f["excess_low"] > 0 for f in found) <= 2
    reverse = excess(frame.assign(other=-frame["loss"]), "other", better=-1, draws=100)
    assert reverse["excess_low"] > 0.2


def test_a_baseline_with_odds_is_punished_less_than_one_that_is_certain():
    frame = cells(("40k", "55k", "80k", "110k"), ALL, (150_000, 300_000, 600_000, 1_200_000), (0, 1))
    rng = np.random.default_rng(8)
    known = frame.assign(loss=expected(frame, 0.0225) + scatter(frame, rng))
    told = foretold(known[known["seed"] == 0], known[known["seed"] == 1])
    student, params, tokens = PAIRS[0]
    came = cells(("80k",), ALL, (tokens,), (10, 11)).assign(student=student, student_params=params)
    came["loss"] = expected(came, 0.0225) + scatter(came, rng)
    (row,) = hedged_brier(told, came, known).to_dict("records")
    (certain,) = judged(told, came, known).to_dict("records")
    assert 0.5 < row["hedge"] < 1 and row["brier"] == pytest.approx(certain["brier"])
    assert row["hedged"] < certain["brier, nearest budget"] + 0.02


def test_a_forecast_of_a_clear_law_beats_even_odds_and_its_regret_is_small():
    frame = cells(("40k", "55k", "80k", "110k"), ALL, (150_000, 300_000, 600_000, 1_200_000), (0, 1))
    rng = np.random.default_rng(6)
    known = frame.assign(loss=expected(frame, 0.0225) + 0.2 * scatter(frame, rng))
    told = foretold(known[known["seed"] == 0], known[known["seed"] == 1])
    student, params, tokens = PAIRS[1]
    came = cells(("55k",), ALL, (tokens,), (10, 11)).assign(student=student, student_params=params)
    came["loss"] = expected(came, 0.0225) + 0.2 * scatter(came, rng)
    (row,) = judged(told, came, known).to_dict("records")
    assert row["brier"] < 0.25 and row["regret"] < 0.3 * row["regret of the mean rung"]
    assert told["odds"].between(0, 1).all() and set(told["student"]) == {s for s, _, _ in PAIRS}


def test_tables_of_the_page_are_those_of_the_records():
    text = study2.PAGE.read_text(encoding="utf-8")
    tables = study2.answers()
    assert all(f"<!-- {name} -->" in text for name in tables)
    assert filled(text, tables) == text, "run `make study-figures`"


def test_the_command_of_a_rerun_makes_the_published_cell():
    for name in (name for name in study2.SWEEPS if len(study2.load(name))):
        for _, cell in study2.load(name).sort_values("cell").head(3).iterrows():
            assert composed(study2.overrides(name, cell)) == cell["cell"], name


def composed(words):
    from tests.conftest import compose

    return pipeline.resolve(compose(words)).record.digest


def test_every_record_carries_the_hash_of_the_registration():
    expected_hash = hashlib.sha256(PAGE.read_bytes()).hexdigest()
    for sweep in study2.SWEEPS:
        frame = study2.load(sweep)
        if len(frame):
            assert set(frame["registration"]) == {expected_hash}, sweep


def test_the_registration_was_in_the_tree_that_made_each_record():
    commits = {c for s in study2.SWEEPS if len(f := study2.load(s)) for c in f["git_commit"].unique()}
    for commit in sorted(commits):
        assert not commit.endswith("+"), "made with a changed tree"
        named = ["git", "show", f"{commit}:docs/study2_registration.md"]
        shown = subprocess.run(named, cwd=ROOT, capture_output=True)
        if (
            shown.returncode
            and subprocess.run(["git", "cat-file", "-e", commit], cwd=ROOT, capture_output=True).returncode
        ):
            continue  # a checkout without history
        assert shown.stdout == PAGE.read_bytes(), commit


def test_the_registered_analysis_and_page_are_as_they_were_registered():
    """Corrections stand in benchmarks/study2_corrected.py, beside what was registered."""
    registered = {
        "benchmarks/study2_answers.py": "e8ca7751c7a59d7fcd784e99c42e047f6d68523cd1a106e1d8a4acda98f89c46",
        "docs/study2_registration.md": "067c43eb04868e0474244d97197ef7eb8fe9b267ce3322d9b37ca385ac11abf1",
    }
    assert {f: hashlib.sha256((ROOT / f).read_bytes()).hexdigest() for f in registered} == registered


def test_reruns_gave_the_published_losses():
    file = study2.RECORDS / "rerun.csv"
    if file.exists():
        again = pd.read_csv(file)
        assert (again["difference"].abs() <= 1e-5).all() and set(again["part"]) <= set(study2.SWEEPS)


def test_the_published_fit_is_that_of_the_records():
    kept = json.loads((study2.RECORDS / "joint.json").read_text(encoding="utf-8"))
    fit = study2.published()
    assert (kept["status"], kept["rests_on"]) == (fit.status, list(fit.rests_on))
    assert kept["ratio"]["value"] == pytest.approx(fit.ratio_at().value, rel=1e-3)
    assert kept["model"]["beta"] == pytest.approx(json.loads(fit.to_json())["model"]["beta"], rel=1e-2, abs=1e-4)


def test_starts_less_pruned_ones_have_the_slope_that_was_planted():
    frame = cells(("55k", "110k"), EIGHT, (300_000, 600_000), (10, 11)).assign(kd_weight=0.5)
    tilt = 0.03 * np.log(frame["teacher_params"])
    both = pd.concat([frame.assign(init="pruned", loss=3.0), frame.assign(init="pretrained", loss=3.0 - tilt)])
    found = start_differences(both)
    assert [round(s.value, 6) for s in found.values()] == [-0.03, -0.03]
    assert set(by_student(both)) == {"55k", "110k"}


def test_own_disagreement_is_none_for_equal_seeds_and_all_for_opposite_ones():
    frame = cells(("55k",), EIGHT, (300_000,), (10, 11))
    order = np.log(frame["teacher_params"])
    assert own_disagreement(frame.assign(score=order), "score") == 0
    assert own_disagreement(frame.assign(score=order * np.where(frame["seed"] == 10, 1, -1)), "score") == 1


def test_picks_count_where_in_the_grid_the_chosen_settings_lie():
    frame = cells(("55k", "110k"), ("120k", "900k"), (300_000,), (10, 11, 12))
    grid = pd.concat(
        [
            frame.assign(learning_rate=rate * frame["student_params"], kd_weight=weight, loss=4.0)
            for rate in (1, 2, 4)
            for weight in (0.25, 0.5, 1.0)
        ]
    )
    highest = (grid["learning_rate"] == 4 * grid["student_params"]) & (grid["kd_weight"] == 0.25)
    found = picks(grid.assign(student_loss_validation=np.where(highest, 3.0, 4.0)))
    assert found["teacher"].to_list() == ["120k", "900k"]
    assert set(found["rate: lowest, middle, highest"]) == {"0, 0, 6"}
    assert set(found["weight: lowest, middle, highest"]) == {"6, 0, 0"}


def test_a_set_holds_the_best_rung_or_not():
    student, _, tokens = PAIRS[0]
    came = cells(("55k",), ("120k", "900k"), (tokens,), (10, 11)).assign(student=student)
    came["loss"] = np.where(came["teacher"] == "900k", 3.0, 4.0)
    told = pd.DataFrame({"student": [student], "data_tokens": [tokens], "best_low": [100e3], "best_high": [300e3]})
    assert set_held(told, came)["in the set"].to_list() == ["no"]
    assert set_held(told.assign(best_high=None), came)["in the set"].to_list() == ["yes"]


def test_both_studies_are_one_model():
    frame = cells(("40k", "55k", "80k", "110k"), ALL, (300_000, 600_000), (10, 11))
    frame["loss"] = expected(frame, 0.0225) + 0.1 * scatter(frame, np.random.default_rng(2))
    again = cells(("40k", "55k", "80k", "110k"), EIGHT, (300_000, 600_000), (0, 1))
    again["loss"] = expected(again, 0.0225) + 0.1 * scatter(again, np.random.default_rng(3))
    assert len(pooled(again, frame).joint.cells.y) == len(optimum(frame).joint.cells.y) + len(again)
