"""Cells beside published ones: the right cells, what differs, and the published cells' prediction."""

import pytest

from benchmarks import study
from capacity_gap.commands import cli
from capacity_gap.fit import fit_joint
from capacity_gap.report.beside import alike, answers, beside, loss_rows, next_commands
from capacity_gap.settings.errors import ConfigError


@pytest.fixture(scope="module")
def published():
    return study.load()


@pytest.fixture
def mine(published):
    main = study.main_of(study.arms_of(published)).frame
    cells = main[(main["data_tokens"] == 300_000) & (main["seed"] == 0) & main["student"].isin(["40k", "55k"])]
    return cells.assign(student_loss=cells["student_loss"] + 0.1)


def test_each_cell_stands_beside_the_mean_of_the_same_cell(mine, published):
    kept, notes = alike(mine, published)
    assert notes == [] and (kept["data_tokens"] > 0).all()
    assert set(kept["init"]) == {"pruned"} and set(kept["kd_weight"]) == {0.5}
    row = next(r for r in loss_rows(mine, kept) if r[:3] == ["40k", "120k", "300k"])
    same = kept[(kept["student"] == "40k") & (kept["teacher"] == "120k") & (kept["data_tokens"] == 300_000)]
    losses = same["student_loss"]
    assert row[4] == f"{losses.mean():.3f} ± {losses.std():.3f} ({len(losses)} runs)" and row[5] == "40k"
    one = mine[(mine["student"] == "40k") & (mine["teacher"] == "120k")]
    assert row[3] == f"{one['student_loss'].iloc[0]:.3f}"


def test_a_student_of_nearly_that_size_is_named_and_a_far_one_has_no_neighbour(mine, published):
    kept, _ = alike(mine, published)
    near = loss_rows(mine.assign(student="60k", student_params=60_000), kept)
    assert {row[5] for row in near} == {"55k"}
    far = loss_rows(mine.assign(student="1m", student_params=1_000_000), kept)
    assert {row[4] for row in far} == {"–"}


def test_settings_that_no_published_cell_has_are_named(mine, published):
    kept, notes = alike(mine.assign(teacher_data="600k", signal="online"), published)
    assert notes == ["teacher_data: 600k here, 1m there", "signal: online here, sampled-64 there"]
    assert len(kept) > 200
    assert alike(mine.assign(settings="data_offset=1m"), published)[1] == ["settings: data_offset=1m here, none there"]
    arms = mine.assign(init=["random", *["pruned"] * (len(mine) - 1)])
    with pytest.raises(ConfigError, match="differ in init"):
        beside(arms, published, source="the study")
    with pytest.raises(ConfigError, match="no published cells"):
        alike(mine, published.iloc[:0])


def test_the_prediction_is_that_of_the_joint_model(mine, published):
    kept, _ = alike(mine, published)
    fit = fit_joint(kept, metric="student_loss")
    lines = answers(fit, mine)
    assert len(lines) == 2 and lines[0].startswith("a 40k student at 300k tokens: the best teacher has ")
    rungs = {t: p for t, p in mine[["teacher", "teacher_params"]].drop_duplicates().to_numpy() if p > 40_000}
    found = fit.best_teacher(float(mine["student_params"].min()), 300_000, rungs=rungs)
    likely = max(found.probabilities, key=found.probabilities.get)
    assert f"of the teachers here {likely} is best" in lines[0]
    whole = beside(mine, published, source="the study")
    assert whole[0].startswith(f"{len(mine)} cells beside {len(kept)} alike of {len(published)} published ones")


def test_far_beyond_the_published_cells_nothing_is_predicted(mine, published):
    kept, _ = alike(mine, published)
    fit = fit_joint(kept, metric="student_loss")
    lines = answers(fit, mine.assign(data_tokens=4000))
    assert lines[0] == "a 40k student at 4k tokens: 37 times beyond the published cells, so nothing is predicted"


def test_what_to_type_next_can_be_typed(mine, capsys):
    lines = next_commands(mine, ("python", "-m", "capacity_gap"), ("python", "run.py"), "store", "quick")
    assert lines[0] == "python run.py -m +sweeps=quick seed=1,2"
    assert callable(cli.parser().parse_args(lines[1].split()[3:]).run)
    two = next_commands(mine.assign(seed=range(len(mine))), ("t",), ("r",), "store", "quick")
    assert len(two) == 1
    single = next_commands(mine, ("t",), ("r",), "store", "single")
    assert len(single) == 1, "there is no such sweep to run again"


def test_a_sweep_without_trained_cells_is_an_error(tiny_cell, capsys):
    assert cli.main(["beside", str(tiny_cell.store_path), "--sweep", "none"]) == 2
    assert "none" in capsys.readouterr().err
