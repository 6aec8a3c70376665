"""The report's first screen: which teacher, how sure, what next, what it cost; and its structure for all readers."""

import json
import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from capacity_gap.commands import cli
from capacity_gap.report import content
from capacity_gap.report.answer import answer_of, sentences
from tests.test_report import Page, grid, report

panels = pytest.importorskip("capacity_gap.report.panels")  # plotly
charts = pytest.importorskip("capacity_gap.report.charts")


def gathered(frame, tmp_path, **options):
    frame.to_csv(tmp_path / "runs.csv", index=False)
    return content.gather(str(tmp_path / "runs.csv"), **options)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Of a grid with planted optima at two budgets."""
    return gathered(grid(), tmp_path_factory.mktemp("full"))


def test_four_questions_are_answered_in_sentences(full):
    answer = answer_of(full)
    assert [q for q, _ in answer.questions] == ["Which teacher?", "How sure?", "What next?", "What did it cost?"]
    assert all(told for _, told in answer.questions)
    assert all(
        re.search(r"[.)]$", said) or said.startswith("Their commands, where ")
        for _, t in answer.questions
        for said in t
    )
    assert answer.which[0].startswith("The best teacher has ")
    students = [said.partition(" ")[0] for said in answer.which[1:]]
    assert students == ["50k", "60k", "75k"] and all("at 1m tokens" in said for said in answer.which[1:])


def test_costs_are_summed_and_what_was_not_recorded_is_said(full, tmp_path):
    (said,) = answer_of(full).cost
    count = len(grid())
    assert said.startswith(f"{count} cells done; ") and f"training the students {count * 1e9:.2g}" in said
    bare = grid().drop(columns=["train_flops", "teacher_flops", "teacher_train_flops"])
    (said,) = answer_of(gathered(bare, tmp_path)).cost
    assert said == f"{count} cells done; FLOPs were not recorded."
    (said,) = answer_of(gathered(grid(wall_s=60.0), tmp_path)).cost
    assert f"{count / 60:.1f} hours of distillation on one worker" in said


def test_without_a_ratio_each_student_has_its_own_claim_and_its_next_teachers(tmp_path):
    falling = grid(seeds=1, budgets=(300_000,), family="pico")
    noise = np.random.default_rng(1).normal(0, 0.001, len(falling))
    falling["student_loss"] = 4 - 0.05 * np.log(falling.teacher_params / 5e4) + noise
    answer = answer_of(gathered(falling, tmp_path))
    assert answer.which[0] == "No ratio of teacher to student is shown that holds for all students."
    assert all("the best teacher has at least" in said for said in answer.which[1:])
    assert "one seed only" in " ".join(answer.sure)
    assert any(said.startswith("For one curve alone: ") and "50k at 300k tokens: " in said for said in answer.more)


def test_many_students_do_not_fill_the_first_screen(tmp_path):
    many = gathered(grid(students=(40, 45, 50, 55, 60, 66, 72), seeds=1), tmp_path)
    assert len(answer_of(many).which) == 6 and answer_of(many).which[-1] == "3 more students are below."
    assert len(sentences(many)) == 14


def test_nothing_done_yet_is_an_answer_too(tmp_path):
    failed = grid().assign(status="failed", student_loss=np.nan, error="boom")
    answer = answer_of(gathered(failed, tmp_path))
    assert answer.which[0].startswith("Not known yet: ") and "108 cells failed: see Failures." in answer.more


def test_the_command_prints_the_answer(tmp_path, capsys):
    grid().to_csv(tmp_path / "runs.csv", index=False)
    assert cli.main(["report", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "r.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Which teacher?" and lines[1].startswith("  The best teacher has ")
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A page with failures, scores and every section that a table fills."""
    folder = tmp_path_factory.mktemp("page")
    failed = grid(seeds=1, budgets=(300_000,)).assign(status="failed", student_loss=np.nan, error="boom")
    text = report(pd.concat([grid(), failed.assign(cell=[f"f{i}" for i in range(len(failed))])]), folder)
    return text, Page(text)


def test_the_answer_stands_before_any_chart_and_each_curve_has_a_sentence(read, full):
    text, page = read
    assert text.index('id="answer"') < text.index('id="students"') < text.index('id="chart-')
    for _, words in sentences(full):
        assert words.curve in page.text and words.claim in page.text
    assert "<code>interior</code>" in text, "the machine status is kept"


def test_headings_go_in_order(read):
    levels = [int(tag[1]) for tag, _ in read[1].elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_landmarks_tables_and_charts_are_labelled(read):
    page = read[1]
    tags = [tag for tag, _ in page.elements]
    assert all(tags.count(tag) == 1 for tag in ("header", "nav", "main", "footer"))
    ids = page.ids()
    assert len(ids) == len(set(ids))
    named = [a for tag, a in page.elements if tag in ("section", "nav")]
    assert all(a.get("aria-label") or a["aria-labelledby"] in ids for a in named)
    assert tags.count("table") == tags.count("caption") > 2
    assert all(a.get("scope") in ("col", "row") for tag, a in page.elements if tag == "th")
    assert all(a.get("tabindex") == "0" for _, a in page.elements if "scroll" in a.get("class", "").split())
    shown = [a for _, a in page.elements if a.get("class") == "chart"]
    assert shown and all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in shown)
    links = [a for tag, a in page.elements if tag == "a"]
    assert links[0] == {"class": "skip", "href": "#answer"}, "the first thing that a key reaches"
    assert all(a["href"].removeprefix("#") in ids for a in links)


def test_a_phone_has_one_panel_a_row_and_room_for_every_name(read):
    for name, figure in json.loads(read[1].scripts[1]).items():
        wide, one = figure["layout"], figure["narrower"]["1"]
        assert set(figure["narrower"]) == {"1", "2"}
        axes = [axis for axis in one if re.fullmatch(r"xaxis\d*", axis)]
        assert all(one[axis]["domain"] == pytest.approx([0, 1]) for axis in axes), name
        drawn = {t.get("xaxis", "x").replace("x", "xaxis") for t in figure["data"]}
        assert drawn <= set(axes) and drawn <= set(wide), name
        assert one["height"] >= wide["height"] - 30, name
        entries = [t["name"] for t in figure["data"] if t.get("name") and t.get("showlegend") is not False]
        assert all(len(line) <= 40 for entry in entries for line in entry.split("<br>")), name


def test_long_names_of_arms_are_broken_in_the_legend():
    assert panels.entry("corpus embedded, settings train.schedule=wsd x=1, 300k tokens").count("<br>") == 2
    assert panels.entry("a<b") == "a&lt;b"
