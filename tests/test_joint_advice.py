"""Recommendations by the model of all cells: an optimum, a break-even budget alone, guesses, own checkpoints."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.joint_coverage import QUIET
from capacity_gap.commands import cli
from capacity_gap.fit import fit_joint
from capacity_gap.models.ladders import family
from capacity_gap.report import page
from capacity_gap.report.joint_tables import best_table, even_table, plot_joint, ratio
from capacity_gap.report.recommend import read_fit, recommend
from tests.small_models import small_model
from tests.test_joint import NAMED, study_one, table
from tests.test_recommend import a_law

PICO = family("pico")


def held(fit):
    return json.loads(fit.to_json())


@pytest.fixture(scope="module")
def one():
    return held(fit_joint(study_one()))


@pytest.fixture(scope="module")
def two():
    frame = study_one()
    return held(fit_joint(frame[frame["teacher"].isin(["120k", "900k"])]))


def test_an_optimum_gives_each_rung_its_probability_and_says_what_it_rests_on(one):
    found = recommend(PICO, 55_000, 300_000, None, None, one)
    rungs = {r.name: r for r in found.rungs}
    assert (found.basis, found.best) == ("joint", "80k")
    assert sum(r.probability or 0 for r in found.rungs) == pytest.approx(1)
    assert rungs["80k"].probability > 0.5 and rungs["900k"].regret > rungs["80k"].regret
    assert rungs["55k"].probability is None, "a student as large as its teacher is not pruned"
    said = found.summary()
    assert "The model of all cells (provisional) puts the best teacher at 10" in said
    assert "rests on the rung 55k: without it there is no optimum" in said and "EXTRAPOLATES" not in said
    assert found.advice.startswith(
        "80k is the best guess so far (provisional: without the rung 55k there is no optimum). It has the least regret"
    )
    assert [r.name for r in found.rungs if r.beyond] == ["1m", "1.3m", "2m"], "teachers of 55k to 900k were tried"
    assert recommend(PICO, 55_000, 1_200_000, None, None, one).best == "900k", "the best teacher grows with tokens"


@pytest.fixture(scope="module")
def published():
    return read_fit(None)[2]


def test_the_published_fit_says_on_what_it_was_made_and_another_family_is_warned_of(published):
    assert (published["families"], published["cells"]) == (["pico"], 562)
    said = recommend(PICO, 80_000, 600_000, None, None, published).summary()
    assert (
        "made on 562 cells: students of 39.9k to 110k parameters, teachers of 55k to 999k, 150k to 2.4m tokens" in said
    )
    assert "family pico, prune.init=pruned, distill.kd_weight=0.5." in said
    assert said.endswith(
        "Take 330k. Nearly as good, at most 0.0014 nats worse on average: 460k; 330k costs fewest FLOPs."
    )
    assert " no larger than the student" in next(
        line for line in said.splitlines() if line.split()[:2] == ["80k", "1.00"]
    )
    other = recommend(family("pico_gpt2"), 80_000, 300_000, None, None, published)
    assert "no run of the fit is of family pico_gpt2 (it saw pico)" in other.warnings
    assert other.advice.startswith("180k is the best guess so far (see the warnings)")


def test_a_fit_of_unknown_family_warns_and_lends_no_effects_to_rungs_of_equal_names(published):
    known = recommend(PICO, 80_000, 600_000, None, None, published)
    found = recommend(PICO, 80_000, 600_000, None, None, published | {"families": []})
    assert found.warnings == (
        "the fit does not say of which family its runs are: make it from a table with a column family",
    )
    assert found.advice.startswith(f"{found.best} is the best guess so far (see the warnings)")
    ((one, two),) = {tuple(r.probability for f in (known, found) for r in f.rungs if r.name == "330k")}
    assert one > 1.5 * two, "the 330k teachers of the fit did better than their size"


@pytest.mark.parametrize("tokens", [1_600_000, 2_400_000])
def test_no_rung_beyond_the_teachers_of_a_fit_is_recommended(published, tokens):
    found = recommend(PICO, 80_160, tokens, None, None, published)
    beyond = sum(r.probability for r in found.rungs if r.beyond)
    assert beyond > 0.2
    assert found.advice.startswith(
        f"1m is the best guess so far (the best teacher may be larger than those of the fit: P is {beyond:.0%}"
    )


def test_a_best_teacher_below_the_student_and_a_rung_off_the_best_size_are_explained(published):
    said = recommend(PICO, 80_160, 150_000, None, None, published).summary()
    assert "at 73.4k parameters" in said and "That is smaller than the student: the smallest rungs" in said
    off = recommend(PICO, 80_160, 700_000, None, None, published).summary()
    assert "530k did better in the fit than its size says, or 460k, which is nearer to that size, did worse." in off


@pytest.mark.parametrize(("tokens", "best"), [(200_000, "120k"), (600_000, None), (1_200_000, "900k")])
def test_a_break_even_budget_alone_decides_by_tokens(two, tokens, best):
    found = recommend(PICO, 80_000, tokens, None, None, two)
    assert (found.basis, found.best) == ("joint", best)
    assert all(r.probability is None for r in found.rungs)
    said = found.summary()
    assert "900k is the better teacher, below it 120k" in said
    assert ("neither can be recommended" in said) == (best is None)
    assert found.advice == (f"Take {best}." if best else "No rung is recommended."), "which is established"


def test_without_an_optimum_no_command_gives_rungs_a_probability(tmp_path, capsys):
    """Without its largest teacher study one has a break-even budget and no optimum."""
    frame = study_one()
    for teachers, odds in ((frame["teacher"] != "900k", False), (frame["teacher"] != "", True)):
        frame[teachers].to_csv(tmp_path / "runs.csv", index=False)
        assert cli.main(["fit", str(tmp_path / "runs.csv"), "--joint"]) == 0
        said = capsys.readouterr().out
        assert ("best rung: " in said, "no rung has a probability of being best" in said) == (odds, not odds)
        assert ("cells: break_even" in said) is not odds
        fit = fit_joint(frame[teachers])
        found = recommend(PICO, 55_000, 300_000, None, None, held(fit))
        assert any(r.probability is not None for r in found.rungs) is odds
        tables = page._joint(SimpleNamespace(joint=fit))["tables"]
        assert len(tables) == 1 + odds, "the report has the table of likeliest rungs beside that of break-even budgets"


def test_what_lies_far_beyond_a_fit_is_called_a_guess_before_its_number(one, two):
    near = recommend(PICO, 150_000, 1_000_000, None, None, one).summary()
    assert "EXTRAPOLATES: the student lies 1.37 times beyond the 39.9k to 110k parameters" in near
    assert "GUESS" not in near
    far, other = (
        recommend(family("qwen2_5"), 1_000_000_000, 20_000_000_000, None, None, fit).summary() for fit in (one, two)
    )
    assert "No rung that can hold the student is near the teachers of the fit" in far
    assert "The fit compared teachers of 120k and 900k parameters; this ladder has no two rungs near these" in other
    for said in (far, other):
        assert said.endswith("`fit` then says at how many tokens the larger one begins to win.")
        assert "\nNo rung is recommended. Two teachers at two budgets near your own scale" in said
        assert said.count("EXTRAPOLATES") == 3 and "P(best)" in said
    guess = recommend(PICO, 55_000, 30_000_000, None, None, one)
    (line,) = (text for text in guess.findings if "GUESS" in text)
    assert line.startswith("GUESS: ") and guess.best is None
    assert all(r.probability is None for r in guess.rungs)
    assert "Two teachers at two budgets near your own scale" in guess.summary()


def test_fits_that_disagree_say_why(one):
    none = a_law(status="no_optimum")
    assert "Curve by curve there is no law" in recommend(PICO, 55_000, 300_000, none, None, one).summary()
    narrow = a_law(ratio=30.0, ratio_interval=[28.0, 32.0])
    clear = held(fit_joint(table("cubic +0.000, little noise")))
    assert (
        "which disagrees: that interval takes the shape"
        in recommend(PICO, 60_000, 300_000, narrow, None, clear).summary()
    )
    same = recommend(PICO, 60_000, 300_000, a_law(), None, clear)
    assert same.basis == "joint" and "disagrees" not in same.summary()


def test_nothing_established_falls_back_to_the_law():
    flat = held(fit_joint(table("flat")))
    found = recommend(PICO, 100_000, 1_000_000, a_law(), None, flat)
    assert found.basis == "law"
    bounds = recommend(PICO, 100_000, 1_000_000, a_law(status="no_optimum"), None, flat)
    assert "The model of all cells: no optimum and no break-even budget is established" in bounds.summary()


def test_the_command_reads_joint_json_and_a_ladder_of_ones_own(tmp_path, capsys, one):
    (tmp_path / "joint.json").write_text(json.dumps(one))
    (tmp_path / "law.json").write_text(json.dumps(a_law(status="no_optimum")))
    law, surface, joint = read_fit(tmp_path / "law.json")
    assert (law["status"], surface, joint["status"]) == ("no_optimum", None, "provisional")
    for name, hidden in (("small", 12), ("large", 24)):
        small_model("llama", hidden_size=hidden, vocab_size=500).save_pretrained(tmp_path / name)
    ladder = f"{tmp_path / 'small'},{tmp_path / 'large'}"
    words = ["recommend", "--student", "5324", "--family", ladder, "--data", "300k"]
    assert cli.main([*words, "--fit", str(tmp_path / "joint.json")]) == 0
    said = capsys.readouterr().out
    assert "small" in said and "large" in said and "EXTRAPOLATES: the student lies" in said
    (tmp_path / "joint.json").write_text(json.dumps({"model": {}}))
    assert cli.main([*words, "--fit", str(tmp_path / "joint.json")]) == 2
    assert "is no law.json, joint.json or surface.json" in capsys.readouterr().err


def test_tables_and_the_figure_say_the_same():
    fit = fit_joint(study_one())
    head, rows = best_table(fit)
    assert head == ["student", "150k tokens", "300k tokens", "600k tokens", "1.2m tokens"]
    assert [row[0] for row in rows] == ["40k", "55k", "80k", "110k"]
    best = fit.best_teacher(55e3, 3e5)
    assert rows[1][2].startswith(f"{best.params / 55e3:.1f} (") and rows[1][4].startswith("≥ ")
    assert [row[-1] for row in even_table(fit)[1]].count("yes") >= 3
    figure = plot_joint(fit)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["student 40k", "student 55k", "student 80k", "student 110k"]
    x, y = panels[1].lines[0].get_data()
    at = int(np.argmin(np.abs(np.log(x) - math.log(6e5))))
    assert y[at] == pytest.approx(fit.optimum(float(x[at]) * 0 + 55e3, float(x[at])).value / 55e3, rel=0.02)
    alone = fit_joint(replace(NAMED["study one: 8 rungs, 3 seeds"], noise=QUIET).table(np.random.default_rng(1)))
    assert even_table(alone)[1] == [] and len(plot_joint(alone).axes) == 1
    assert [ratio(3.0, ends, 1.0) for ends in ((0, 2), (2, math.inf), (0, math.inf))] == ["≤ 2.0", "≥ 2.0", "–"]


def test_rungs_that_cannot_hold_the_student_are_not_recommended():
    """And a ladder whose smallest rung lacks the common student's layers is answered at all."""
    clear = held(fit_joint(table("cubic +0.000, little noise")))
    found = recommend(family("qwen2_5"), 300_000_000, 4_000_000_000, a_law(), None, clear)
    assert any(r.note for r in found.rungs)


def test_a_break_even_beyond_the_teachers_that_were_tried_is_not_established():
    fit = fit_joint(study_one())
    assert fit.break_even(55e3, 120e3, 900e3).established
    assert not fit.break_even(55e3, 120, 900).established and not fit.break_even(55e3, 1e5, 1e12).established
    with pytest.raises(ValueError, match="student_params=-1 must be positive"):
        fit.break_even(-1)


def test_rows_that_say_nothing_are_refused_or_counted_once():
    frame = study_one()
    twice = fit_joint(np_repeat(frame)).break_even(55e3)
    assert twice.tokens == pytest.approx(fit_joint(frame).break_even(55e3).tokens, rel=1e-6)
    assert twice.interval == fit_joint(frame).break_even(55e3).interval
    with pytest.raises(ValueError, match="data_tokens must be positive"):
        fit_joint(frame.assign(data_tokens=-frame["data_tokens"]))
    swapped = frame.rename(columns={"student_params": "teacher_params", "teacher_params": "student_params"})
    with pytest.raises(ValueError, match="no row has a positive size"):
        fit_joint(swapped)


def np_repeat(frame):
    return frame.loc[np.repeat(frame.index, 2)].assign(cell=lambda f: range(len(f)))


def test_a_rung_of_another_family_with_an_equal_name_has_no_effect_of_its_own(one):
    ladders = (replace(PICO, rungs=PICO.common_rungs), family("pico_gpt2"))
    mine, other = (recommend(ladder, 55_000, 600_000, None, None, one) for ladder in ladders)
    sure = [max(r.probability or 0 for r in found.rungs) for found in (mine, other)]
    assert sure[1] < sure[0] and other.best == "270k"


def test_a_fit_of_one_budget_says_so_at_another():
    fit = held(fit_joint(study_one().query("data_tokens == 600000")))
    fit = fit | {"status": "provisional"}
    assert (
        "EXTRAPOLATES: the budget lies 2 times beyond the 600k tokens"
        in recommend(PICO, 55_000, 1_200_000, None, None, fit).summary()
    )
    assert recommend(PICO, 55_000, 60_000_000, None, None, fit).best is None
