"""The fit: planted optima are found, and data without one yield none."""

import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from capacity_gap import records
from capacity_gap.commands import cli
from capacity_gap.fit import LawFit, fit_law, locate_optima
from capacity_gap.fit.frame import curves
from capacity_gap.settings.errors import UserError
from capacity_gap.settings.scales import short_scale

STUDENTS = (50e3, 80e3, 130e3, 200e3)
RATIOS = np.geomspace(1, 8, 7)


def grid(curve, *, noise=0.0, students=STUDENTS, ratios=RATIOS, seeds=3, teacher_noise=0.0, draw=0):
    """Losses `3 + curve(ratio)` plus the noise of a run and of a teacher that all students share."""
    rng = np.random.default_rng(draw)
    luck = {}
    rows = []
    for n in students:
        for r in ratios:
            teacher = round(n * r / 1000)
            luck.setdefault(teacher, teacher_noise * rng.normal())
            for seed in range(seeds):
                loss = 3 + curve(r) + luck[teacher] + noise * rng.normal()
                rows.append({"student_params": n, "teacher_params": n * r, "seed": seed, "loss": loss})
    return pd.DataFrame(rows)


def valley(r, best=2.5):
    return 0.05 * math.log(r / best) ** 2


def test_a_planted_optimum_is_found_exactly_without_noise():
    for optimum in locate_optima(grid(valley)):
        assert optimum.status == "interior"
        assert optimum.ratio == pytest.approx(2.5, rel=1e-6)


def test_a_planted_law_is_recovered_with_an_interval_that_holds_it():
    law = fit_law(grid(valley, noise=0.003))
    assert law.status == "law"
    assert law.ratio_interval[0] < 2.5 < law.ratio_interval[1]
    assert law.ratio_interval[1] / law.ratio_interval[0] < 1.2
    assert law.slope_interval[0] < 1 < law.slope_interval[1]
    assert law.null_p < 0.01
    assert law.predict(1e6) == pytest.approx(law.ratio * 1e6)


def test_starts_cut_from_two_references_are_two_curves():
    cut = [grid(lambda r, best=best: valley(r, best)).assign(reference=name) for name, best in (("a", 2), ("b", 4))]
    found = locate_optima(pd.concat(cut, ignore_index=True))
    assert sorted(round(o.ratio) for o in found) == [2] * len(STUDENTS) + [4] * len(STUDENTS)


@pytest.mark.parametrize("seeds", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("teacher_noise", [pytest.param(0.0, marks=pytest.mark.slow), 0.01])
@pytest.mark.parametrize("trend", [0.0, -0.02, 0.02])
def test_without_an_optimum_no_law_is_claimed(seeds, teacher_noise, trend):
    found = Counter(
        fit_law(
            grid(lambda r: trend * math.log(r), noise=0.005, teacher_noise=teacher_noise, seeds=seeds, draw=draw)
        ).status
        for draw in range(30)
    )
    assert found["law"] <= 2, found


@pytest.mark.parametrize(
    ("curve", "status", "interval"),
    [
        (lambda r: -0.05 * math.log(r), "right_edge", (True, False)),
        (lambda r: 0.05 * math.log(r), "left_edge", (False, True)),
        (lambda r: -valley(r), "not_unimodal", (False, False)),
        (lambda r: 0.0, "flat", (False, False)),
    ],
)
def test_curves_without_an_interior_optimum_say_so(curve, status, interval):
    for optimum in locate_optima(grid(curve, noise=0.001)):
        assert optimum.status == status
        assert optimum.teacher_params is None
        assert optimum.ratio is None
        assert tuple(bound is not None for bound in optimum.interval) == interval


def test_a_noise_free_difference_that_matters_to_nobody_is_flat():
    assert {o.status for o in locate_optima(grid(lambda r: 0.01 * valley(r)))} == {"flat"}


def test_a_broad_minimum_is_interior_with_a_wide_flat_interval():
    for optimum in locate_optima(grid(lambda r: 0.2 * valley(r), noise=1e-4)):
        assert optimum.status == "interior"
        assert optimum.flat_interval[1] / optimum.flat_interval[0] > 2


def test_too_few_teachers_and_too_few_students():
    assert {o.status for o in locate_optima(grid(valley, ratios=RATIOS[:3]))} == {"too_few"}
    assert fit_law(grid(valley, students=STUDENTS[:2], noise=0.001)).status == "too_few"
    assert fit_law(grid(valley, ratios=[2.0])).status == "too_few"


def test_optima_beyond_the_grid_are_censored_not_averaged():
    law = fit_law(grid(lambda r: -0.05 * math.log(r), noise=0.001))
    assert (law.status, law.ratio, law.ratio_interval, law.slope) == ("censored", None, None, None)
    with pytest.raises(ValueError, match="no law to predict from"):
        law.predict(1e6)


def test_curves_are_parted_by_data_family_and_start():
    both = pd.concat(
        [grid(valley).assign(data_tokens=1), grid(lambda r: valley(r, 4)).assign(data_tokens=2, family="x")]
    )
    found = locate_optima(both.assign(family=both["family"].fillna("y")))
    assert {(o.data_tokens, o.family, round(o.ratio, 3)) for o in found} == {(1, "y", 2.5), (2, "x", 4.0)}


def test_cells_that_differ_in_any_setting_are_not_replicates():
    for setting in ("teacher_data", "kd_weight", "prune_method", "shape", "settings"):
        both = pd.concat([grid(valley).assign(**{setting: "a"}), grid(valley).assign(**{setting: "b"})])
        assert len(locate_optima(both)) == 2 * len(STUDENTS), setting
        with pytest.warns(UserWarning, match=f"{setting} varies within a curve: its values are averaged like seeds"):
            assert len(locate_optima(both, by=())) == len(STUDENTS)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it has no header"), (b"a,b\n1,2,3\n1\n1,2,3,4\n", "Expected 2 fields"), (b"\xff\xfe\x00a", "UTF-8")],
)
def test_a_file_that_is_no_table_is_named(content, said, tmp_path):
    (tmp_path / "runs.csv").write_bytes(content)
    for source in (tmp_path / "runs.csv", tmp_path):
        with pytest.raises(UserError, match=f"runs.csv is not a readable table: .*{said}"):
            records.load(source)


def test_as_usual_is_a_setting_like_any_other():
    """Nothing said of one half of the curves, a schedule of the other: two ratios, not one with a larger error."""
    usual = grid(valley).assign(settings=None)
    other = grid(lambda r: valley(r, 4)).assign(settings="train.schedule=wsd")
    found = locate_optima(pd.concat([usual, other]))
    assert len(found) == 2 * len(STUDENTS)
    assert Counter(round(o.ratio, 3) for o in found) == {2.5: len(STUDENTS), 4.0: len(STUDENTS)}


def test_a_cell_that_was_recorded_again_with_its_settings_counts_once():
    """Records of an earlier release did not hold them."""
    before = grid(valley).assign(seed=0, settings=None)
    before["trained"] = [f"digest{i}" for i in range(len(before))]
    again = before.assign(settings="prune.batches=8")
    with pytest.warns(UserWarning, match="rows left out as duplicates:"):
        found = locate_optima(pd.concat([before, again]))
    assert len(found) == len(STUDENTS)


def test_one_model_recorded_twice_counts_once():
    """Cells that differ in how the student was tuned afterwards hold the same distilled student."""
    frame = grid(valley, noise=0.003)
    twice = pd.concat([frame.assign(prefer_rows=None), frame.assign(prefer_rows=800)], ignore_index=True)
    with pytest.warns(UserWarning, match="84 rows left out as duplicates: the same loss under the same seeds"):
        assert locate_optima(twice) == locate_optima(frame)


def test_pruning_alone_does_not_hide_what_training_shows():
    """Its scatter over seeds is a hundred times that of trained students, and all curves of a table share one noise."""
    trained = grid(valley, noise=0.002).assign(data_tokens=300_000)
    start = grid(lambda r: math.log(r), noise=0.3, draw=1).assign(data_tokens=0)
    with pytest.warns(UserWarning, match="84 rows without distillation left out"):
        both = locate_optima(pd.concat([trained, start]))
    assert both == locate_optima(trained)
    assert {o.data_tokens for o in locate_optima(start)} == {0}


def test_a_score_that_nobody_asked_for_says_how_to_get_it():
    with pytest.raises(ValueError, match=r"no run was scored on metrics/x\. Scores here: metrics/y\. .* evaluate=pico"):
        locate_optima(grid(valley).assign(**{"metrics/y": 0.5, "metrics/y/stderr": 0.1}), metric="metrics/x")


def test_settings_in_which_cells_of_one_seed_differ_part_curves():
    low, high = grid(valley, noise=0.001), grid(lambda r: valley(r, 4), noise=0.001, draw=1)
    both = pd.concat([low.assign(learning_rate=1e-3), high.assign(learning_rate=3e-3)])
    with pytest.warns(UserWarning, match="split by learning_rate"):
        assert len(locate_optima(both)) == 2 * len(STUDENTS)
    with pytest.warns(UserWarning, match="84 rows repeat student, teacher and seeds"):
        assert len(locate_optima(both.drop(columns="learning_rate"))) == len(STUDENTS)
    widths = low.assign(learning_rate=1 / low["student_params"])
    assert len(locate_optima(widths)) == len(STUDENTS), "rates that follow from the student's size part nothing"


@pytest.mark.filterwarnings("ignore:losses adjusted for student sizes")
def test_students_within_three_percent_are_one_unless_named():
    frame = grid(valley)
    frame["student_params"] *= np.where(frame["seed"] == 0, 1.01, 1.0)
    assert len(locate_optima(frame)) == len(STUDENTS)
    assert len(locate_optima(frame.assign(student=frame["student_params"].astype(str)))) == 2 * len(STUDENTS)


def test_records_have_a_loss_that_is_a_name():
    frame = grid(valley)
    named = frame.rename(columns={"loss": "student_loss"}).assign(loss="forward_kl")
    assert locate_optima(named) == locate_optima(frame)


def test_failed_rows_are_left_out_with_a_note():
    frame = grid(valley, noise=0.001)
    frame["loss"] = frame["loss"].where(frame.index != 5)
    law = fit_law(frame)
    assert law.status == "law"
    assert law.notes == ("1 rows left out (failed, or no finite loss): rows 5",)


def test_bad_tables_are_refused_by_name():
    frame = grid(valley)
    with pytest.raises(ValueError, match=r"lacks teacher_params \(nearest: techer_params"):
        fit_law(frame.rename(columns={"teacher_params": "techer_params"}))
    with pytest.raises(ValueError, match=r"scales must be positive.*rows \[3\]"):
        fit_law(frame.assign(teacher_params=frame["teacher_params"].where(frame.index != 3, -1)))
    with pytest.raises(ValueError, match="axis='tokens'"):
        fit_law(frame, axis="tokens")


def test_the_other_axis_counts_other_parameters():
    frame = grid(valley)
    frame["student_params_non_embedding"] = frame["student_params"] / 2
    frame["teacher_params_non_embedding"] = frame["teacher_params"] / 4
    assert fit_law(frame, axis="non_embedding").ratio == pytest.approx(1.25, rel=1e-3)


def test_json_round_trips():
    for law in (fit_law(grid(valley, noise=0.003)), fit_law(grid(lambda r: 0.0, noise=0.01))):
        assert LawFit.from_json(law.to_json()) == law


def test_summary_says_what_was_found():
    text = fit_law(grid(valley, noise=0.003)).summary()
    assert "status: law" in text
    assert "The best teacher has 2.5" in text
    assert "permuted data do as well in" in text


def test_command_writes_law_optima_and_figures(tmp_path, capsys):
    grid(valley, noise=0.003).to_csv(tmp_path / "runs.csv", index=False)
    assert cli.main(["fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]) == 0
    assert "status: law" in capsys.readouterr().out
    out = tmp_path / "out"
    assert json.loads((out / "law.json").read_text())["status"] == "law"
    assert len(pd.read_csv(out / "optima.csv")) == len(STUDENTS)
    for name in ("curves", "law"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (out / f"{name}.png").stat().st_size < 300_000
        assert "<svg" in (out / f"{name}.svg").read_text()


@pytest.mark.slow
def test_figures_are_the_same_bytes_twice(tmp_path):
    grid(valley, noise=0.003).to_csv(tmp_path / "runs.csv", index=False)
    for name in "ab":
        cli.main(["fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / name)])
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_command_refuses_what_holds_no_records(tmp_path, capsys):
    assert cli.main(["fit", str(tmp_path)]) == 2
    assert "contains no records. Pass a store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"), [(119_873, "120k"), (1_300_056, "1.3m"), (55_032, "55k"), (80_160, "80k"), (124_439_808, "124m")]
)
def test_short_scales(count, text):
    assert short_scale(count) == text


def test_teachers_of_equal_size_and_other_names_are_named():
    rows = [
        {"student_params": 1e6, "teacher_params": t, "loss": 3 + n / 100, "seed": 0, "teacher": f"T{n}"}
        for n, t in enumerate((2e6, 4e6, 8e6, 16e6))
    ]
    assert not [note for note in curves(pd.DataFrame(rows))[1] if "averaged" in note]
    _, notes = curves(pd.DataFrame([*rows, rows[1] | {"teacher": "instructed", "loss": 4.0}]))
    assert "T1, instructed have 4,000,000 parameters each and are averaged like seeds" in notes[-1]
