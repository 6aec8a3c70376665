"""Tables as spreadsheets save them: read with the right values, or refused by column, line and value."""

import contextlib
import csv
import math
import re

import numpy as np
import pandas as pd
import pytest

from capacity_gap import records
from capacity_gap.commands import cli
from capacity_gap.evaluate.compare import table
from capacity_gap.evaluate.other_models import COLUMNS, add_rows, check_table
from capacity_gap.evaluate.task_scores import as_loss, metric_direction
from capacity_gap.fit import fit_law, locate_optima, student_growth
from capacity_gap.records import tables
from capacity_gap.report.frontier import record_points
from capacity_gap.settings.errors import ConfigError, UserError
from capacity_gap.surfaces.fitting import fit_surface
from tests.test_fit import grid, valley

SCORED = {"model": "m", "params": 1000, "dtype": "fp32", "batch_size": 8, "lm_eval": "0.4.9", "task": "t", "shots": 0}
SCORED |= {"metric": "acc", "value": 0.5, "stderr": 0.01, "higher_is_better": "True", "samples": 100}
RUNS = [
    {"student_params": s, "teacher_params": t, "loss": round(3 + 0.3 * (math.log(t / s) - 0.9) ** 2, 4), "seed": 0}
    for s in (40_000, 80_000)
    for t in (80_000, 120_000, 180_000, 270_000, 400_000)
]


def write(file, rows, *, encoding="utf-8", end="\n", comma=",", names=None):
    with file.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator=end, delimiter=comma)
        if names is None:
            writer.writeheader()
        else:
            stream.write(comma.join(names) + end)
        writer.writerows(rows)
    return file


def scores(file, given=SCORED, **options):
    """Two models whose scores are `given`."""
    rows = [{c: (given | {"model": m}).get(c, "") for c in COLUMNS} for m in ("m1", "m2")]
    return write(file, rows, **options)


def with_cell(name, value, row=3):
    return [run | {name: value} if i == row else run for i, run in enumerate(RUNS)]


@pytest.mark.parametrize("said", ["TRUE", "true", "True", " TRUE "])
def test_true_in_any_case_is_true(said, tmp_path):
    plain = table([scores(tmp_path / "plain.csv")])
    other = table([scores(tmp_path / "other.csv", SCORED | {"higher_is_better": said}, end="\r\n")])
    pd.testing.assert_frame_equal(plain, other)
    assert other["metrics/t/higher_is_better"].tolist() == [True, True]


@pytest.mark.parametrize("said", ["FALSE", "false"])
def test_false_in_any_case_is_false_and_nothing_is_nothing(said, tmp_path):
    found = table([scores(tmp_path / "s.csv", SCORED | {"higher_is_better": said})])
    assert found["metrics/t/higher_is_better"].tolist() == [False, False]
    empty = table([scores(tmp_path / "e.csv", SCORED | {"higher_is_better": ""})])
    assert empty["metrics/t/higher_is_better"].isna().all()


@pytest.mark.parametrize("said", ["1", "yes", "wahr", "0.0"])
def test_another_word_for_true_is_refused(said, tmp_path):
    file = scores(tmp_path / "s.csv", SCORED | {"higher_is_better": said})
    with pytest.raises(
        UserError, match=rf"s\.csv, line 2: could not convert column higher_is_better: '{said}' is neit"
    ):
        table([file])
    rows = [run | {"metrics/t": 0.5, "metrics/t/higher_is_better": "TRUE"} for run in RUNS]
    rows[4]["metrics/t/higher_is_better"] = said
    with pytest.raises(UserError, match=rf"w\.csv, line 6, column metrics/t/higher_is_better: '{said}' is neither"):
        records.load(write(tmp_path / "w.csv", rows))
    with pytest.raises(ConfigError, match=rf"column metrics/t/higher_is_better, row 4 .*'{said}' is neither true nor"):
        metric_direction("metrics/t", pd.DataFrame(rows))


@pytest.mark.parametrize(("said", "direction"), [("TRUE", 1), ("FALSE", -1), ("false", -1), (False, -1), (True, 1)])
def test_a_direction_beside_a_score_is_read(said, direction, tmp_path):
    rows = [run | {"metrics/t": 0.5, "metrics/t/higher_is_better": said} for run in RUNS]
    rows[2]["metrics/t/higher_is_better"] = ""
    assert metric_direction("metrics/t", records.load(write(tmp_path / "w.csv", rows))) == direction
    assert metric_direction("metrics/t", pd.DataFrame(rows)) == direction


def test_compared_tables_take_a_mark_spaces_and_whole_numbers_with_a_point(tmp_path):
    plain = table([scores(tmp_path / "plain.csv")])
    marked = scores(tmp_path / "marked.csv", encoding="utf-8-sig", end="\r\n", names=[f" {c} " for c in COLUMNS])
    points = scores(tmp_path / "points.csv", SCORED | {"params": "1000.0", "shots": "0.0", "samples": "1e2"})
    for other in (marked, points):
        pd.testing.assert_frame_equal(plain, table([other]))


@pytest.mark.parametrize(
    ("column", "value"),
    [("params", "1,000"), ("params", "1000.5"), ("shots", "five"), ("value", "50%"), ("limit", "inf")],
)
def test_a_score_that_is_no_number_is_named(column, value, tmp_path):
    with pytest.raises(UserError, match=rf"s\.csv, line 2: could not convert column {column}: '{value}' is no"):
        table([scores(tmp_path / "s.csv", SCORED | {column: value})])


def test_scores_are_added_to_a_table_that_a_spreadsheet_saved(tmp_path):
    file = scores(tmp_path / "s.csv", encoding="utf-8-sig")
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    add_rows(file, [{c: (SCORED | {"model": "m3"}).get(c) for c in COLUMNS}])
    assert table([file])["model"].tolist() == ["m1", "m2", "m3"]
    for broken in (scores(tmp_path / "semi.csv", comma=";"), scores(tmp_path / "wide.csv", encoding="utf-16")):
        with pytest.raises(UserError, match="Save it as `CSV UTF-8`"):
            check_table(broken)


def test_a_table_with_a_mark_spaces_and_other_line_ends_is_the_plain_one(tmp_path):
    plain = records.load(write(tmp_path / "plain.csv", RUNS))
    marked = write(tmp_path / "m.csv", RUNS, encoding="utf-8-sig", end="\r\n", names=[f" {c} " for c in RUNS[0]])
    pd.testing.assert_frame_equal(records.load(marked), plain)
    pd.testing.assert_frame_equal(plain, pd.read_csv(tmp_path / "plain.csv"))
    assert fit_law(records.load(marked)) == fit_law(plain)


@pytest.mark.parametrize("value", ["400k", "1,000", "3,5", "5%", "TRUE", "failed", "1_000"])
@pytest.mark.parametrize("name", ["student_params", "teacher_params", "loss", "data_tokens", "metrics/t", "wall_s"])
def test_text_in_a_column_of_numbers_is_named(name, value, tmp_path):
    rows = [{"data_tokens": 5, "metrics/t": 0.5, "wall_s": 1.5} | run for run in RUNS]
    rows[3][name] = value
    with pytest.raises(
        UserError, match=rf"t\.csv, line 5, column {name}: '{value}' is not a number\. Write a plain number"
    ):
        records.load(write(tmp_path / "t.csv", rows))


def test_lines_are_counted_as_an_editor_does(tmp_path):
    rows = [run | {"note": "two\nlines" if i == 1 else ""} for i, run in enumerate(with_cell("loss", "3,5"))]
    file = write(tmp_path / "t.csv", rows)
    lines = file.read_text().split("\n")
    file.write_text("\n".join([lines[0], "", *lines[1:]]))
    where = next(i for i, line in enumerate(file.read_text().split("\n"), 1) if "3,5" in line)
    assert where == 7
    with pytest.raises(UserError, match=f"line {where}, column loss: '3,5'"):
        records.load(file)


def test_a_header_in_the_middle_is_named(tmp_path):
    rows = [*RUNS[:4], {c: c for c in RUNS[0]}, *RUNS[4:]]
    with pytest.raises(UserError, match=r"line 6, column student_params: the column's name again\. Delete the line"):
        records.load(write(tmp_path / "t.csv", rows))


def test_what_is_not_finite_is_left_out_with_a_note_as_ever(tmp_path):
    values = {1: "nan", 2: "inf", 3: "", 4: "NA", 5: "-"}
    rows = [run | {"loss": values.get(i, run["loss"])} for i, run in enumerate(RUNS)]
    law = fit_law(records.load(write(tmp_path / "t.csv", rows)))
    assert law.notes == ("5 rows left out (failed, or no finite loss): rows 1, 2, 3, 4, 5",)


def test_labels_stay_labels(tmp_path):
    rows = [run | {"seed": f"seed{run['seed']}", "loss": "forward_kl", "student_loss": run["loss"]} for run in RUNS]
    found = records.load(write(tmp_path / "t.csv", rows))
    assert found["seed"].tolist() == ["seed0"] * len(RUNS) and found["loss"].tolist() == ["forward_kl"] * len(RUNS)
    assert locate_optima(found) == locate_optima(pd.DataFrame(RUNS))


def test_one_spoilt_loss_does_not_turn_the_fit_to_another_column(tmp_path):
    """With one `3,5` the column was no number, so that `student_loss` was fitted in its place."""
    rows = [run | {"student_loss": 1.0} for run in with_cell("loss", "3,5")]
    with pytest.raises(UserError, match="line 5, column loss: '3,5'"):
        records.load(write(tmp_path / "t.csv", rows))
    with pytest.raises(ValueError, match="column loss, row 3 .*'3,5' is not a number"):
        fit_law(pd.DataFrame(rows))


@pytest.mark.parametrize("name", ["student_params", "teacher_params", "loss"])
def test_text_in_a_frame_is_named(name):
    frame = pd.DataFrame(with_cell(name, "400k")).set_index(pd.Index(range(10, 10 + len(RUNS))))
    said = rf"column {name}, row 13 \(of the table's index\): '400k' is not a number"
    for call in (fit_law, locate_optima, student_growth):
        with pytest.raises(ValueError, match=said):
            call(frame)
    with pytest.raises(ValueError, match=said):
        fit_surface(frame.assign(data_tokens=1000))


def test_text_for_a_missing_number_is_missing():
    frame = pd.DataFrame(RUNS).astype(object)
    frame.loc[3, "loss"], frame["student_params"] = " NaN ", frame["student_params"].astype(str)
    assert fit_law(frame).notes == ("1 rows left out (failed, or no finite loss): rows 3",)


def test_scores_and_costs_as_text_are_named():
    frame = pd.DataFrame(RUNS).assign(train_flops=1e15, teacher_flops=1e14)
    frame["metrics/mmlu"] = [0.5] * 9 + ["50%"]
    with pytest.raises(UserError, match="column metrics/mmlu, row 9 .*'50%' is not a number"):
        as_loss(frame, "metrics/mmlu")
    with pytest.raises(UserError, match="column metrics/mmlu, row 9 .*'50%' is not a number"):
        record_points(frame, "mmlu")
    costs = frame.assign(**{"metrics/mmlu": 0.5, "teacher_flops": ["1e14"] * 9 + ["1e14 FLOPs"]})
    with pytest.raises(UserError, match="column teacher_flops, row 9 .*'1e14 FLOPs' is not a number"):
        record_points(costs, "mmlu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encoding": "utf-16"}, "UTF-16"),
        ({"encoding": "utf-16-le"}, "NUL bytes, like UTF-16"),
        ({"comma": ";"}, "semicolons between values"),
        ({"comma": "\t"}, "tabs between values"),
        ({"encoding": "latin-1", "names": ["Größe", "teacher_params", "loss", "seed"]}, "not UTF-8 text"),
        ({"names": ["student_params", "teacher_params", "loss", " loss"]}, "more than one column loss"),
    ],
)
def test_another_kind_of_table_is_refused_in_one_paragraph(options, said, tmp_path, capsys):
    assert cli.main(["fit", str(write(tmp_path / "t.csv", RUNS, **options))]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and "Traceback" not in told
    assert "Save it as `CSV UTF-8`, with commas" in told or "Rename or delete" in told


def test_decimal_commas_do_not_shift_columns(tmp_path):
    """Five values under four names were read as if the first were an index: each number one column too far left."""
    rows = [",".join(map(str, run.values())).replace(".", ",") for run in RUNS]
    (tmp_path / "t.csv").write_text("\n".join([",".join(RUNS[0]), *rows]))
    with pytest.raises(UserError, match=r"Expected 4 fields, as in its header, saw 5 in line 2.*decimals take a point"):
        records.load(tmp_path / "t.csv")


def test_two_columns_of_one_name_in_a_frame():
    frame = pd.DataFrame(RUNS)
    with pytest.raises(ValueError, match="more than one column loss"):
        fit_law(pd.concat([frame, frame[["loss"]]], axis=1))


def test_parquet(tmp_path, capsys):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    assert cli.main(["fit", str(tmp_path / "bad.parquet")]) == 2
    told = capsys.readouterr().err
    assert "bad.parquet is not a readable parquet file" in told and told.count("\n") == 1
    pd.DataFrame(RUNS).to_parquet(tmp_path / "good.parquet")
    pd.testing.assert_frame_equal(records.load(tmp_path / "good.parquet"), pd.DataFrame(RUNS))
    pd.DataFrame(with_cell("loss", "3,5")).astype({"loss": str}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(UserError, match=r"text\.parquet, row 3, column loss: '3,5' is not a number"):
        records.load(tmp_path / "text.parquet")


def test_records_of_the_study_are_read_as_pandas_reads_them():
    from pathlib import Path

    for file in sorted((Path(__file__).parents[1] / "results/pico").glob("*.csv")):
        pd.testing.assert_frame_equal(records.load(file), pd.read_csv(file))
        assert np.isfinite(records.load(file)["student_loss"].dropna()).all()


def test_text_that_begins_a_formula_is_written_as_text(tmp_path):
    names = ["=1+1", "+x", "-y", "@z", "\tq", "plain", "'quoted"]
    tables.write_csv(pd.DataFrame({"model": names, "value": [-1.5] * len(names)}), tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()[1:]
    assert [line.rpartition(",")[0].strip('"') for line in lines] == [*(f"'{n}" for n in names[:5]), *names[5:]]
    assert all(line.endswith(",-1.5") for line in lines), "numbers stay numbers"
    assert [tables.as_given(str(tables.no_formula(n))) for n in names] == names


THEIRS = {"student_params": "config.n_student", "teacher_params": "config.n_teacher", "loss": "val/loss"}


def foreign(folder, **more):
    """A table as someone else's tracker exports it."""
    frame = grid(valley, noise=0.002)[["student_params", "teacher_params", "loss", "seed"]]
    file = folder / "theirs.csv"
    frame.rename(columns=THEIRS).assign(**more).to_csv(file, index=False)
    return file


def test_a_table_from_elsewhere_is_fitted_and_reported_by_its_own_names(tmp_path, capsys):
    file = foreign(tmp_path)
    pairs = ",".join(f"{ours}={theirs}" for ours, theirs in THEIRS.items())
    assert cli.main(["fit", str(file), "--columns", pairs]) == 0
    mine = capsys.readouterr().out
    grid(valley, noise=0.002).to_csv(tmp_path / "ours.csv", index=False)
    assert cli.main(["fit", str(tmp_path / "ours.csv")]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == mine.splitlines()[:3]
    assert cli.main(["report", str(file), "--columns", pairs, "--out", str(tmp_path / "page.html")]) == 0
    assert "One model of all cells" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        ("student_params=config.n_studnet", {}, r"no column config.n_studnet \(nearest: config.n_student"),
        ("student_params=config.n_student", {"student_params": 1.0}, "already has a column student_params"),
        ("student_params=config.n_student", {"config.n_student": "many"}, "'many' is not a number"),
        ("student_params", {}, "cannot be read; write OURS=THEIRS"),
        ("a=b,a=c", {}, "cannot be read; write OURS=THEIRS"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, capsys, given, more, said):
    with contextlib.suppress(SystemExit):
        assert cli.main(["fit", str(foreign(tmp_path, **more)), "--columns", given]) == 2
    assert re.search(said, capsys.readouterr().err)
