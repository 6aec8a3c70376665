"""Statuses, open intervals and next teachers in plain sentences."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from capacity_gap.commands import cli, fit_commands
from capacity_gap.evaluate.task_scores import measured
from capacity_gap.fit import fit_law
from capacity_gap.fit.law_fit import LawFit
from capacity_gap.fit.optimum import SURE, Optimum
from capacity_gap.fit.valley import LEAST_TEACHERS
from capacity_gap.surfaces.surface import published
from capacity_gap.wording import curve_words as words_of_curves
from capacity_gap.wording.curve_words import COUNTED, ENOUGH, STATUSES, curve_names, curve_words, ladder
from capacity_gap.wording.fit_words import JOINTS, LAWS, curves_words, joint_words
from capacity_gap.wording.intervals import marks, span
from tests.conftest import ROOT

PICO = ladder("pico")


def optimum(status="right_edge", tried=("80k", "120k", "180k", "270k", "400k"), best="270k", runs=1, **more):
    """Of the student of 60k at 300k tokens, under rungs of pico."""
    losses = [(PICO[name], 4.0 if name == best else 4.1, runs) for name in tried]
    known = {"right_edge": (176_957.0, None), "left_edge": (None, 207_059.0), "interior": (453e3, 588e3)}
    return Optimum(
        student_params=60_000.0,
        teacher_params=498_355.0 if status == "interior" else None,
        interval=known.get(status, (None, None)),
        flat_interval=(None, None),
        status=status,
        family="pico",
        data_tokens=300_000,
        student="60k",
        init="pruned",
        teachers=len(tried),
        noise=0.01,
        gain=0.02,
        curve="60k at 300k tokens",
        tried=tuple(losses),
        **{"falls": 0.99, "rises": 0.5, **more},
    )


def said(found, rungs=PICO, **more):
    return str(curve_words(found, rungs, **more))


@pytest.mark.parametrize(
    ("interval", "prose", "table"),
    [
        ((177e3, 400e3), "177k to 400k", "177k to 400k"),
        ((177e3, None), "at least 177k", "≥ 177k"),
        ((177e3, math.inf), "at least 177k", "≥ 177k"),
        ((None, 400e3), "at most 400k", "≤ 400k"),
        ((0.0, 400e3), "at most 400k", "≤ 400k"),
        ((0.0, math.inf), "no bound", "–"),
        ((math.nan, None), "no bound", "–"),
        ((400e3, 400e3), "400k", "400k"),
    ],
)
def test_open_intervals(interval, prose, table):
    assert (span(interval), marks(interval)) == (prose, table)


def test_an_exponent_may_be_negative():
    assert span((-0.5, 1.0), "{:.1f}".format, least=-math.inf) == "-0.5 to 1.0"
    assert span((-math.inf, 1.0), "{:.1f}".format, least=-math.inf) == "at most 1.0"


def test_a_lower_bound_says_which_end_is_open_and_what_to_run():
    assert said(optimum()) == (
        "60k at 300k tokens: the best teacher has at least 177k parameters (the loss is not shown to rise at the "
        "largest tried, 400k); the best tried was 270k; next: 400k and 600k, three seeds."
    )
    assert "(the loss still falls at the largest tried, 400k)" in said(optimum(rises=1 - SURE))
    assert said(optimum(runs=3)).endswith("next: 600k and 900k, three seeds.")
    top = optimum(tried=("80k", "400k", "900k", "2m"), best="2m", runs=3)
    assert said(top).endswith("next: larger teachers, of about 3m and 4.5m, beyond the rungs of pico.")


def test_an_upper_bound_says_which_end_is_open_and_what_to_run():
    low = optimum("left_edge", tried=("120k", "180k", "270k", "400k"), best="120k", falls=0.5)
    assert said(low) == (
        "60k at 300k tokens: the best teacher has at most 207k parameters (the loss is not shown to fall at the "
        "smallest tried, 120k); the best tried was 120k; next: 80k and 120k, three seeds."
    )
    assert "(the loss already rises at the smallest tried, 120k)" in said(replace(low, falls=0.0))
    ended = optimum("left_edge", tried=("80k", "180k", "270k", "400k"), best="80k", runs=3)
    assert said(ended).endswith("next: nothing, since no smaller teacher is larger than the student.")


def test_without_a_bound_no_teacher_is_shown_to_be_best():
    flat = said(optimum("flat"))
    assert "no teacher is shown to be best (no difference in loss between them is beyond noise)" in flat
    assert flat.endswith("next: 80k, 270k and 400k, three seeds.")
    assert said(optimum("flat", runs=3)).endswith("six seeds."), "three were not enough"
    middle = optimum("not_unimodal")
    middle = replace(
        middle, tried=tuple((n, 4.5 if i == 2 else loss, 1) for i, (n, loss, _) in enumerate(middle.tried))
    )
    assert "the loss rises from the smallest and falls towards the largest" in said(middle)
    assert said(middle).endswith("next: 180k, three seeds."), "the teacher that looks worst"
    few = said(optimum("too_few", tried=("80k", "270k"), falls=None, rises=None))
    assert "(two teachers were tried, and a curve alone takes four)" in few
    assert few.endswith("next: 180k and 400k, three seeds.") or few.endswith("next: 220k and 330k, three seeds.")


def test_an_optimum_says_its_interval_and_the_nearest_rung():
    assert said(optimum("interior")) == (
        "60k at 300k tokens: the best teacher has 500k parameters (95 % 453k to 590k; 8.31 times the student's); the "
        "best tried was 270k; next: nothing; the nearest rung is 530k."
    )
    wide = replace(optimum("interior"), interval=(150e3, 900e3))
    assert said(wide).endswith("next: 460k and 530k, three seeds."), "rungs inside a wide interval narrow it"
    tried = replace(wide, interval=(150e3, 450e3), tried=tuple((n, loss, 3) for n, loss, _ in wide.tried))
    assert said(tried).endswith("next: 220k and 330k, three seeds."), "those that were not tried, at three seeds each"


def test_teachers_that_are_no_rungs_are_named_by_size():
    mine = replace(optimum(), family=None)
    assert said(mine, rungs={}).endswith("next: 400k, three seeds.")
    assert said(replace(optimum(runs=3), family=None), rungs={}).endswith(
        "next: larger teachers, of about 600k and 900k."
    )
    assert "error rate of cloze" in said(optimum(), measure=measured("1 − metrics/cloze"))


def test_every_status_has_words():
    statuses = {"interior", "left_edge", "right_edge", "flat", "not_unimodal", "too_few"}
    assert statuses == STATUSES.keys() == COUNTED.keys()
    for status in statuses:
        text = said(optimum(status))
        assert "_" not in text and text.endswith(".") and "next: " in text
    assert LAWS.keys() == {"law", "no_optimum", "censored", "too_few"}
    assert JOINTS.keys() == {"law", "provisional", "break_even", "no_optimum"}
    assert ENOUGH == LEAST_TEACHERS and words_of_curves.SURE == SURE
    assert curves_words([optimum(), optimum("flat")]) == "Of 2 curves: 1 flat within noise, 1 with only a lower bound"


def test_curves_are_named_by_student_budget_and_what_else_differs():
    keys = [
        {"student": "60k", "data_tokens": d, "init": i, "settings": "as usual"} for d, i in ((3e5, "a"), (6e5, "b"))
    ]
    assert curve_names(keys) == ["60k at 300k tokens, init a", "60k at 600k tokens, init b"]
    assert curve_names(keys[:1]) == ["60k at 300k tokens"]
    assert curve_names([{"student": "60k", "data_tokens": 0}, {"student": "1b"}]) == ["60k without distillation", "1b"]
    other = {**keys[0], "settings": "train.schedule=wsd"}
    assert curve_names([keys[0], other])[0] == "60k at 300k tokens, default settings"


def test_the_model_of_all_cells_in_words():
    def joint(status, *, rests_on=(), even=None, missing=""):
        pair = (120e3, 900e3) if even else None
        return joint_words(
            status, ratio=(2.6, (2.1, math.inf)), rests_on=rests_on, pair=pair, even=even, missing=missing
        )

    assert joint("law") == "the best teacher has 2.6 times its student's parameters (95 % at least 2.1)."
    assert joint("provisional", rests_on=["55k"]).endswith("but without 55k there is no optimum.")
    assert joint("provisional", missing="2 of 4 students.").endswith("(95 % at least 2.1). 2 of 4 students.")
    assert joint("break_even", even=(694e3, (485e3, 980e3))).startswith(
        "above 694k tokens (95 % 485k to 980k) a teacher of 900k is better than one of 120k."
    )


@pytest.fixture(scope="module")
def study():
    frame = pd.read_csv(ROOT / "results" / "pico" / "study_law.csv", low_memory=False)
    return frame[(frame.teacher_data == "1m") & (frame.data_tokens > 0) & (frame.student == "55k")]


def test_a_fit_keeps_what_its_sentences_are_made_of(study):
    law = fit_law(study)
    again = LawFit.from_json(law.to_json())
    assert again == law and again.sentences() == law.sentences()
    found = law.optima[0]
    mine = study[study.data_tokens == found.data_tokens].groupby("teacher_params").student_loss
    assert [t[0] for t in found.tried] == list(mine.mean().index)
    assert np.allclose([t[1] for t in found.tried], mine.mean()) and {t[2] for t in found.tried} == {3}


def test_a_fit_of_an_earlier_version_still_has_sentences():
    law = LawFit.from_json((ROOT / "results" / "pico" / "law.json").read_text())
    old = replace(law, optima=tuple(replace(o, curve="", tried=(), falls=None, rises=None) for o in law.optima))
    for sentence, o in zip(old.sentences(), old.optima, strict=True):
        assert sentence.startswith(f"{o.student} at ") and "next" not in sentence


def test_fit_prints_a_sentence_a_curve_and_keeps_the_statuses(study, tmp_path, capsys):
    study.to_csv(tmp_path / "runs.csv", index=False)
    assert cli.main(["fit", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    law = LawFit.from_json((tmp_path / "out" / "law.json").read_text())
    assert len(law.optima) == 3 and all(sentence in text for sentence in law.sentences())
    table = pd.read_csv(tmp_path / "out" / "optima.csv")
    assert list(table.status) == [o.status for o in law.optima] and "right_edge" in text
    assert list(table.sentence) == law.sentences() and "tried" not in table
    assert not [f.name for f in (tmp_path / "out").iterdir() if f.name.startswith(".")]
    assert json.loads((tmp_path / "out" / "joint.json").read_text())["status"] in JOINTS


@pytest.mark.parametrize("name", ["law.json", "surface.json"])
def test_a_fit_that_is_stopped_leaves_the_files_of_the_one_before(study, tmp_path, monkeypatch, name):
    study.to_csv(tmp_path / "runs.csv", index=False)
    words = ["fit", str(tmp_path / "runs.csv"), "--surface", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(fit_commands, "_surface", lambda *given: published("chinchilla"))  # fitting one takes long
    assert cli.main(words) == 0
    before, replace_file = (tmp_path / "out" / name).read_text(), os.replace

    def stop(source, target):
        if str(target).endswith(name):
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.main(words)
    assert (tmp_path / "out" / name).read_text() == before
    assert not [f.name for f in (tmp_path / "out").iterdir() if f.name.endswith(".tmp")]
