"""The frontier: who is on the line, what compute counts, and that the published numbers are the paper's."""

import numpy as np
import pandas as pd
import pytest

from capacity_gap import records
from capacity_gap.commands import cli
from capacity_gap.report.frontier import COMPUTE, PAPER, frontier_points, pareto, published_points
from capacity_gap.settings.errors import UserError


def test_pareto_by_hand():
    points = pd.DataFrame({"name": list("abcde"), "flops": [1, 2, 3, 4, 4], "score": [0.2, 0.1, 0.5, 0.5, 0.6]})
    assert list(pareto(points, higher_is_better=True)["name"]) == ["a", "c", "e"]
    assert list(pareto(points, higher_is_better=False)["name"]) == ["a", "b"]


def test_published_models_cost_what_the_conventions_say():
    by = {c: published_points("mmlu", c).set_index("name") for c in COMPUTE}
    llama = 6 * (32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 32000 * 4096) * 2e12
    assert by["student"].loc["LLaMA2-7B", "flops"] == pytest.approx(llama)
    mini = by["distillation"].loc["MiniMA-3B", "flops"] - by["student"].loc["MiniMA-3B", "flops"]
    assert mini == pytest.approx(llama / 2e12 / 3 * 126e9), "2·N a token for the teacher, 6·N for training"
    assert by["total"].loc["MiniMA-3B", "flops"] - by["distillation"].loc["MiniMA-3B", "flops"] == pytest.approx(llama)
    assert by["student"].loc["MiniChat-3B", "score"] == 0.384
    averages = published_points("average").set_index("name")["score"]
    assert averages["LLaMA2-7B"] == pytest.approx((46.00 + 34.40 + 31.57 + 12.80 + 32.02 + 14.10) / 600)


def test_records_and_published_models_in_one_figure(tmp_path, capsys):
    cells = pd.DataFrame(
        {
            "status": ["done", "done", "failed", "done"],
            "student": ["1b"] * 4,
            "teacher": ["3b", "7b", "7b", "3b"],
            "train_flops": [1e19, 1e20, 1e20, 0.0],
            "teacher_flops": [1e19, None, 1e20, 0.0],
            "metrics/mmlu": [0.30, 0.29, 0.9, 0.2],
            "student_loss": [2.0, 1.9, 1.0, 3.0],
        }
    )
    cells.to_csv(tmp_path / "cells.csv", index=False)
    points, notes = frontier_points(records.load(tmp_path), "mmlu")
    ours = points[points["kind"] == "ours"]
    assert list(ours["flops"]) == [2e19], "failed cells, cells without training and of unknown compute are left out"
    assert notes[0] == "1 cells lack teacher_flops of --compute distillation: 1b from 7b" and "not trained" in notes[1]
    assert list(points[points["pareto"]].sort_values("flops")["score"]) == [0.30, 0.384, 0.46]
    losses, _ = frontier_points(records.load(tmp_path), "student_loss", "student")
    assert set(losses["kind"]) == {"ours"} and losses["pareto"].all()
    assert cli.main(["frontier", str(tmp_path), "--metric", "mmlu", "--out", str(tmp_path / "f/frontier")]) == 0
    assert {p.suffix for p in (tmp_path / "f").iterdir()} == {".png", ".svg", ".csv"}
    assert cli.main(["frontier", str(tmp_path), "--metric", "pico_next"]) == 2
    assert "Recorded scores: metrics/mmlu" in capsys.readouterr().err
    assert cli.main(["frontier", "--metric", "pico_next"]) == 2
    assert "there is nothing to draw for pico_next" in capsys.readouterr().err
    assert cli.main(["frontier", "--compute", "none"]) == 2
    assert "--compute='none' is not known" in capsys.readouterr().err


def table(**columns):
    """Two cells of a table that comes without `status`, and without names of the scales."""
    same = {"student_params": [1e9, 1e9], "teacher_params": [3e9, 7e9], "metrics/mmlu": [0.30, 0.31]}
    return pd.DataFrame(same | {"train_flops": [1e19, 1e20], "teacher_flops": [2e19, 2e20]} | columns)


def test_what_a_teacher_cost_is_not_nothing_where_nobody_recorded_it():
    known = frontier_points(table(teacher_train_flops=[5e20, None]), "mmlu", "total")
    assert known[0].query("kind == 'ours'")["flops"].tolist() == [1e19 + 2e19 + 5e20]
    assert known[1] == ["1 cells lack teacher_train_flops of --compute total: 1b from 7b"]
    with pytest.raises(UserError, match="2 cells lack teacher_train_flops.*--compute distillation"):
        frontier_points(table(), "mmlu", "total")
    assert len(frontier_points(table(), "mmlu")[0].query("kind == 'ours'")) == 2


def test_the_average_takes_cells_that_have_all_six():
    six = {f"metrics/{task}": [0.1 * i, 0.2] for i, task in enumerate(PAPER)}
    points, _ = frontier_points(table(**six | {"metrics/gsm8k": [0.6, np.nan]}), "average")
    assert points.query("kind == 'ours'")["score"].tolist() == [pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.6) / 6)]
    assert len(points) > 1, "the published models are there too"
    with pytest.raises(UserError, match="no finished record has average.*ceval-valid.*Recorded scores: metrics/mmlu"):
        frontier_points(table(), "average")


def test_a_table_without_compute_draws_nothing(tmp_path, capsys):
    table().drop(columns=["train_flops", "teacher_flops"]).to_csv(tmp_path / "cells.csv")
    assert cli.main(["frontier", str(tmp_path), "--metric", "mmlu", "--out", str(tmp_path / "f/frontier")]) == 2
    assert "2 cells lack train_flops, teacher_flops" in capsys.readouterr().err and not (tmp_path / "f").exists()
    free = table(train_flops=[0.0, 0.0], teacher_flops=[0.0, 0.0]).rename(columns={"metrics/mmlu": "student_loss"})
    with pytest.raises(UserError, match="nothing to draw for student_loss.*2 cells left out: they were not trained"):
        frontier_points(free, "student_loss")
