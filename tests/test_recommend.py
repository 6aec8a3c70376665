"""Recommendations: from a law, from a surface, from bounds alone; and always at what scale the fit was made."""

import json
from dataclasses import replace

import numpy as np
import pytest

from capacity_gap.commands import cli
from capacity_gap.fit import fit_law
from capacity_gap.models.ladders import family
from capacity_gap.report.advice import Recommendation, Rung
from capacity_gap.report.recommend import bends, law_draws, read_fit, recommend
from capacity_gap.settings.errors import UserError
from capacity_gap.surfaces.surface import SurfaceFit, from_parameters
from tests.test_surface import QUICK, fit_surface, grid, valley

PICO = replace(family("pico"), rungs=family("pico").common_rungs)  # the rungs of study one


def optimum(student, status="interior", *, ratio=2.5, interval=(2.0, 3.0), tokens=1_000_000, family="pico"):
    best = student * ratio
    return {
        "student_params": student,
        "teacher_params": best if status == "interior" else None,
        "interval": [None if v is None else v * student for v in interval],
        "flat_interval": [best / 1.5, best * 1.5],
        "status": status,
        "family": family,
        "data_tokens": tokens,
        "student": str(student),
    }


def a_law(**more):
    optima = [optimum(n) for n in (50e3, 100e3, 200e3)]
    fit = {"status": "law", "axis": "total", "ratio": 2.5, "ratio_interval": [2.3, 2.7], "optima": optima}
    return {**fit, "slope": None, "slope_interval": None, **more}


def rungs(answer):
    return {r.name: r for r in answer.rungs}


def test_a_law_gives_each_rung_its_probability_regret_and_cost():
    answer = recommend(PICO, 100_000, 1_000_000, a_law(), None)
    found = rungs(answer)
    assert (answer.basis, answer.best) == ("law", "270k")
    assert list(found) == ["120k", "180k", "270k", "400k", "600k", "900k", "1.3m", "2m"]
    assert found["270k"].probability > 0.99
    assert sum(r.probability for r in answer.rungs) == pytest.approx(1)
    # The flat interval says 0.005 nats at 1.5 times the best: 0.005·(log(400/250)/log 1.5)² at 400k.
    assert found["400k"].regret == pytest.approx(0.005 * (np.log(1.6) / np.log(1.5)) ** 2, rel=0.1)
    costs = [r.flops for r in answer.rungs]
    assert costs == sorted(costs) and answer.warnings == ()


def test_a_law_far_from_its_fit_says_so_and_is_less_sure():
    near = recommend(PICO, 100_000, 1_000_000, a_law(slope=1.0, slope_interval=[0.9, 1.1]), None)
    far = recommend(family("qwen2_5"), 10**9, 20 * 10**9, a_law(slope=1.0, slope_interval=[0.9, 1.1]), None)
    assert max(r.probability for r in far.rungs) < max(r.probability for r in near.rungs)
    text = far.summary()
    assert "EXTRAPOLATES: the student is 5k times the largest in the fit" in text
    assert "The fit was made on students of 50k to 200k parameters, 1m tokens, family pico." in text
    assert "no run of the fit is of family qwen2_5 (it saw pico)" in text
    assert "[]" not in text and "nan" not in text


def test_rungs_nearly_as_good_are_named_after_the_one_to_take():
    sizes = {"a": 0.4, "d": 0.25, "b": 0.29, "c": 0.2, "e": None, "g": 0.31}
    rungs = [Rung(n, 1, float(ord(n)), ord(n), 0.2, r) for n, r in sizes.items()]
    rungs.append(Rung("f", 1, 1.0, 1.0, 0.2, 0.2, beyond=True))
    found = Recommendation(1, "x", 1, "total", "joint", "c", tuple(rungs), (), ())
    assert found.advice == "Take c. Nearly as good, at most 0.09 nats worse on average: b, d; b costs fewest FLOPs."
    assert replace(found, rungs=tuple(replace(r, regret=None) for r in rungs)).advice == "Take c."
    doubtful = replace(found, doubt="provisional").advice
    assert doubtful.startswith("c is the best guess so far (provisional)") and doubtful.endswith(
        ": b, d; b costs fewest FLOPs."
    )
    past = tuple(replace(r, probability=0.9 if r.beyond else 0.02) for r in rungs)
    assert replace(found, rungs=past).advice == "Take c.", "larger teachers than those of the fit are more likely best"


def test_tokens_per_parameter_outside_the_fit_are_a_warning():
    assert "500 tokens per parameter lie outside" in recommend(PICO, 100_000, 50_000_000, a_law(), None).summary()


def test_rungs_beyond_the_teachers_of_a_law_are_marked_and_never_taken_firmly():
    """Ratios of 1.5 to 4 were tried: 120k is 1.2 times the student, and 600k six times."""
    optima = [optimum(n) | {"tried": [[1.5 * n, 4.0, 3], [4 * n, 4.0, 3]]} for n in (50e3, 100e3, 200e3)]
    found = recommend(PICO, 100_000, 1_000_000, a_law(optima=optima), None)
    assert [r.name for r in found.rungs if r.beyond] == ["120k", "600k", "900k", "1.3m", "2m"]
    rows = {line.split()[0]: line for line in found.summary().splitlines()[2:10]}
    assert rows["600k"].endswith("extrapolated: beyond the teachers of the fit")
    assert "extrapolated" not in rows["400k"] and found.advice == "Take 270k."
    assert rows["600k"].split()[2:4] == ["–", "–"] and rows["400k"].split()[2].endswith("%")
    high = a_law(optima=optima, draws=[[np.log(6.0), 1.0]])
    assert recommend(PICO, 100_000, 1_000_000, high, None).advice == (
        "600k is the best guess so far (extrapolated: beyond the teachers of the fit)."
    )


def test_every_column_of_the_table_is_explained_and_empty_ones_are_left_out():
    law = a_law(status="censored", ratio=None, ratio_interval=None)
    bounds, firm = (recommend(PICO, 100_000, 1_000_000, fit, None).summary() for fit in (law, a_law()))
    assert "Allowed: curves of the fit whose bounds do not rule a rung out." in bounds
    assert "allowed" in bounds.splitlines()[1] and "allowed" not in firm.lower()
    for said in (bounds, firm):
        assert "P(best): probability that a rung gives the least loss" in said and "Regret: its expected loss" in said


def test_draws_of_the_law_are_used_as_they_are():
    law = a_law(draws=[[np.log(2.5), 1.0]] * 3 + [[np.log(5.5), 1.0]])
    answer = recommend(PICO, 100_000, 1_000_000, law, None)
    assert rungs(answer)["270k"].probability == 0.75 and rungs(answer)["600k"].probability == 0.25
    np.testing.assert_array_equal(law_draws(law), law["draws"])


def test_intervals_stand_in_for_draws_and_turn_about_the_fits_middle():
    draws = law_draws(a_law(slope=1.0, slope_interval=[0.8, 1.2]))
    for student, width in ((100e3, 0.16), (100e6, 2.77)):
        low, middle, high = np.quantile(draws[:, 0] + draws[:, 1] * np.log(student), (0.025, 0.5, 0.975))
        assert middle == pytest.approx(np.log(2.5 * student), abs=0.15)
        assert high - low == pytest.approx(width, rel=0.1)


def test_a_side_without_a_flat_interval_takes_the_other():
    one = optimum(1e5) | {"flat_interval": [None, 2.5e5 * 1.5]}
    assert bends([one]) == pytest.approx((0.005 / np.log(1.5) ** 2,) * 2)
    none = a_law(optima=[optimum(n) | {"flat_interval": [None, None]} for n in (5e4, 1e5, 2e5)])
    answer = recommend(PICO, 100_000, 1_000_000, none, None)
    assert answer.best == "270k" and rungs(answer)["270k"].regret is None


def test_without_a_law_the_bounds_say_what_they_can():
    optima = [optimum(n, "right_edge", interval=(4.5, None)) for n in (5e4, 1e5)] + [
        optimum(2e5, "flat", interval=(None, None))
    ]
    law = a_law(status="censored", ratio=None, ratio_interval=None, optima=optima)
    answer = recommend(PICO, 100_000, 1_000_000, law, None)
    assert (answer.basis, answer.best) == ("bounds", "600k")
    assert [rungs(answer)[n].allowed for n in ("400k", "600k")] == [0, 2]
    assert all(r.probability is None and r.regret is None for r in answer.rungs)
    assert "There is NO LAW in this fit (status censored" in answer.summary()
    assert "That is no law." in answer.summary()


def test_where_nothing_is_known_nothing_is_recommended():
    law = a_law(status="no_optimum", optima=[optimum(1e5, "flat", interval=(None, None))])
    answer = recommend(PICO, 100_000, 1_000_000, law, None)
    assert (answer.basis, answer.best) == ("nothing", None)
    assert "No rung is recommended." in answer.summary()


@pytest.mark.parametrize("status", ["flat", "right_edge"])
def test_far_from_a_fit_without_a_law_the_last_line_says_what_to_run(status):
    """Whether no curve bounds the best teacher or bounds alone are known."""
    optima = [optimum(n, status, interval=(4.5, None)) for n in (5e4, 1e5)]
    law = a_law(status="no_optimum", ratio=None, ratio_interval=None, optima=optima)
    far = recommend(family("qwen2_5"), 10**9, 20 * 10**9, law, None)
    assert far.advice.startswith("No rung is recommended")
    assert far.advice.endswith("`fit` then says at how many tokens the larger one begins to win.")
    assert "Two teachers at two budgets" not in recommend(PICO, 100_000, 1_000_000, law, None).summary()


def test_far_from_a_surface_the_last_line_says_what_to_run():
    surface = fit_surface(grid(valley, noise=0.002).assign(family="pico"), **QUICK)
    untested = replace(surface, span={**surface.span, "ratio": (900.0, 1000.0)})
    far = recommend(PICO, 100_000, 1_000_000, None, untested)
    assert (far.basis, far.best) == ("nothing", None) and "Two teachers at two budgets near your own" in far.advice


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("joint.json", "fit STORE --joint --out DIR`, then `recommend … --fit DIR/joint.json`"),
        ("law.json", "fit STORE --surface --out DIR`, then `recommend … --fit DIR/law.json`"),
        ("other.json", "fit STORE --joint --out DIR`, then `recommend … --fit DIR/joint.json`"),
    ],
)
def test_a_missing_fit_names_the_command_that_makes_that_file(tmp_path, name, said):
    with pytest.raises(UserError) as error:
        read_fit(tmp_path / name)
    assert said in str(error.value)


def test_a_surface_stands_in_where_there_is_no_law():
    surface = fit_surface(grid(valley, noise=0.002).assign(family="pico"), **QUICK)
    law = a_law(status="too_few", optima=[])
    answer = recommend(PICO, 100_000, 3_000_000, law, surface)
    assert (answer.basis, answer.best) == ("surface", "270k")
    assert rungs(answer)["270k"].probability > 0.9
    assert rungs(answer)["2m"].probability is None and rungs(answer)["2m"].note == "ratio never tested"
    assert answer.warnings == ()
    far = recommend(family("qwen2_5"), 10**9, 10**10, law, surface)
    assert any("EXTRAPOLATES in student_params, fitted on 50k to 200k" in w for w in far.warnings)
    assert any("no run of the fit is of family qwen2_5" in w for w in far.warnings)


def test_a_flat_surface_recommends_the_cheapest_and_claims_no_probability():
    flat = from_parameters(
        "additive",
        {"E": 2.0, "A": 20.0, "alpha": 0.3, "B": 60.0, "beta": 0.3, "c": 0.0, "k": 0.0, "ratio": 2.0, "nu": 0.0},
    )
    given = json.loads(flat.to_json()) | {"span": {"ratio": [1, 8], "student_params": [5e4, 2e5]}}
    answer = recommend(PICO, 100_000, 3_000_000, None, SurfaceFit.from_json(json.dumps(given)))
    assert (answer.basis, answer.best) == ("surface", "120k")
    assert all(r.probability is None for r in answer.rungs)
    assert "no teacher can be told from another" in answer.summary()


def test_the_other_axis_counts_other_parameters():
    total = recommend(PICO, 100_000, 1_000_000, a_law(), None)
    other = recommend(PICO, 100_000, 1_000_000, a_law(axis="non_embedding"), None)
    assert rungs(other)["270k"].ratio > rungs(total)["270k"].ratio
    assert rungs(other)["270k"].flops == rungs(total)["270k"].flops


def test_command(tmp_path, capsys):
    file = tmp_path / "law.json"
    file.write_text(json.dumps(a_law()))
    command = ["recommend", "--student", "1b", "--family", "qwen2_5", "--data", "10b", "--fit", str(file)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "Student of 1b parameters, family qwen2_5, 10b tokens (10 per parameter). Basis: law" in text
    last = text.rstrip().splitlines()[-1]
    assert "EXTRAPOLATES" in text and last.startswith("3b is the best guess so far (see the warnings).")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--student", "1b", "--family", "qwen2_5", "--fit", "none.json"], "--fit=none.json does not exist. Make one"),
        (["--student", "1b", "--family", "qwen", "--fit", "x"], "family='qwen' is not known"),
        (["--student", "x", "--family", "pico", "--fit", "x"], "--student=x cannot be read as a scale"),
        (["--student", "1b", "--family", "pico", "--data", "y", "--fit", "x"], "--data=y cannot be read"),
        (
            ["--student", "1b", "--family", "pico", "--fit", "law.json"],
            "student=1b is larger than every rung of family",
        ),
        (["--student", "1b", "--family", "pico", "--fit", "bad.json"], "is no law.json, joint.json or surface.json"),
    ],
)
def test_bad_questions_are_one_clear_paragraph(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law.json").write_text(json.dumps(a_law()))
    (tmp_path / "bad.json").write_text('{"some": "thing"}')
    assert cli.main(["recommend", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_published_fit_is_asked_for_by_name_until_it_is_there(tmp_path, monkeypatch):
    from capacity_gap.report import recommend as module

    monkeypatch.setattr(module, "PUBLISHED_FIT", tmp_path / "law.json")
    with pytest.raises(UserError, match="the published fit.*is not here.*capacity_gap fit STORE --surface --out DIR"):
        module.read_fit(None)
    (tmp_path / "law.json").write_text(json.dumps(a_law()))
    assert module.read_fit(None)[0]["status"] == "law"


def test_fit_writes_a_surface_that_recommend_reads(tmp_path, capsys):
    runs = grid(valley, noise=0.002, seeds=1).query("data_tokens == 3e6")
    fit = str(tmp_path / "out" / "surface.json")
    said = {}
    for named in (True, False):
        table = runs.assign(family="pico") if named else runs
        table.to_csv(tmp_path / "runs.csv", index=False)
        assert cli.main(["fit", str(tmp_path / "runs.csv"), "--surface", "--out", str(tmp_path / "out")]) == 0
        assert "Loss surface: additive" in capsys.readouterr().out
        assert cli.main(["recommend", "--student", "100k", "--family", "pico", "--data", "3m", "--fit", fit]) == 0
        said[named] = capsys.readouterr().out
    assert "Take 270k." in said[True]
    assert "270k is the best guess so far (see the warnings)" in said[False]
    assert "does not say of which family its runs are: make it from a table with a column family" in said[False]


def test_a_law_from_data_and_its_own_draws_agree_with_its_prediction(tmp_path):
    law = fit_law(grid(valley, noise=0.002, seeds=1).query("data_tokens == 3e6"))
    law.save(tmp_path / "law.json")
    given, surface, _ = read_fit(tmp_path / "law.json")
    assert surface is None and given["status"] == "law" and len(given["draws"]) > 100
    draws = law_draws(given)
    middle = np.median(draws[:, 0] + draws[:, 1] * np.log(1e5))
    assert np.exp(middle) == pytest.approx(law.predict(1e5), rel=0.05)
    assert recommend(PICO, 100_000, 3_000_000, given, None).best == "270k"


def test_a_surface_is_not_fitted_through_runs_of_several_kinds(tmp_path, capsys):
    runs = grid(valley, noise=0.002, seeds=1)
    runs.assign(init=np.where(runs.index % 2, "pruned", "random")).to_csv(tmp_path / "runs.csv", index=False)
    assert cli.main(["fit", str(tmp_path / "runs.csv"), "--surface"]) == 0
    assert "no surface: the runs differ in init (pruned, random)" in capsys.readouterr().out


def test_recommend_needs_no_torch():
    import subprocess
    import sys

    check = (
        "import sys, capacity_gap.report.recommend; assert not {'torch', 'wandb', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
