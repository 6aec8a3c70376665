"""The tables and the figure of the runs with real models say what their records say."""

import pandas as pd
import pytest

from benchmarks import real, real_chain, real_gemma


def _row(student, **more):
    row = {"status": "done", "cell": "c", "settings": "prune.depth=23 train.schedule=cosine", "data_tokens": 16_384}
    row |= {"student": student, "student_params": {"110m": 109_734_336, "80m": 80_058_816}.get(student, 1)}
    row |= {"teacher": "SmolLM2", "teacher_params": 134_515_008, "teacher_loss": 3.16, "teacher_loss_ood": 2.97}
    losses = {"init_loss": 4.0, "student_loss": 3.2, "student_loss_stderr": 0.08, "student_loss_ood": 3.6}
    return {**row, **losses, "student_bits_per_byte": 0.9, **more}


def test_the_figure_of_make_real_draws_each_student_from_its_teacher_on():
    found = real.table(pd.DataFrame([_row("80m", init_loss=5.3), _row("110m"), _row("50m", status="failed")]))
    assert list(found["student"]) == ["110m", "80m"] and set(found["layers"]) == {23}
    axes = real.figure(found).axes[0]
    drawn = {tuple(line.get_ydata()) for line in axes.get_lines() if len(line.get_ydata()) == 3}
    assert drawn == {(3.16, 4.0, 3.2), (3.16, 5.3, 3.2)}
    assert [text.get_text() for text in axes.texts] == ["4.00", "3.20", "5.30", "3.20"]


def test_arms_are_the_cut_training_without_a_teacher_and_distillation():
    rows = [
        _row("80m", kd_weight=0.5),
        _row("80m", kd_weight=0.0, student_loss=3.3),
        _row("80m", data_tokens=0, kd_weight=0.5),
    ]
    found = real.arms(pd.DataFrame(rows))
    assert list(found["arm"]) == ["right after the cut", "without a teacher", "distilled"]
    assert list(found["student_loss"]) == [3.2, 3.3, 3.2]


def test_the_chain_refuses_an_export_that_is_another_model():
    second = [_row("110m", init_loss=3.2, teacher=name) for name in ("itself", "SmolLM2")]
    found = real_chain.table(_row("110m"), second)
    assert list(found["step"]) == [1, 2, 2] and list(found["loss before"]) == [4.0, 3.2, 3.2]
    with pytest.raises(ValueError, match=r"another loss than the trained one, by 0\.1 nats"):
        real_chain.table(_row("110m"), [*second[:1], _row("110m", init_loss=3.3)])


def test_the_table_of_gemma_has_its_teacher_twice_and_each_student_once():
    without = _row("110m", settings="corpus.bos=False", teacher_loss=4.17)
    found = real_gemma.table([without, _row("110m"), _row("80m")]).set_index("model")
    assert list(found.index) == ["teacher", "cut to 110m", "cut to 80m", "teacher, sequences without <bos>"]
    assert list(found["loss"]) == [3.16, 3.2, 3.2, 4.17]
