"""The paper's 3B model as a plan, and what its long runs need: nothing here is downloaded."""

import pytest

from capacity_gap.cell import pipeline
from capacity_gap.models.accounting import training_memory
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.pruning.shape import fixed_shape
from capacity_gap.runner.plan import make_plan
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.stage import Store
from tests.conftest import compose


@pytest.fixture(scope="module")
def cells():
    return [pipeline.resolve(compose(["+sweeps=minima", f"teacher={t}"])) for t in ("7b", "13b", "70b")]


def test_minima_is_the_papers_student_under_every_teacher(cells, tmp_path):
    for cell in cells:
        assert cell.description["student_params"] == pytest.approx(3.0e9, rel=0.01)
        shape = cell.student_shape
        assert [shape[f"num_{n}"] for n in ("hidden_layers", "attention_heads")] == [24, 24]
        assert (shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]) == (3072, 8192, 49216)
        assert shape["num_key_value_heads"] == 24, "one student, whatever groups its teacher has"
        assert cell.data_tokens == 126_000_000_000
    said = "\n".join(make_plan(cells, Store(tmp_path)).lines)
    assert "student 3b: 3,020,442,624 parameters, 24x3072x24x8192, vocabulary 49,216" in said
    assert "(8 devices a worker)" in said
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_device_falls_with_shards_and_checkpointing(cells, tmp_path):
    shape = cells[0].student_shape
    given = {"tokens": 8 * 4096, "precision": "bf16"}
    whole = training_memory(shape, **given).total
    assert training_memory(shape, **given, shards=8).total == pytest.approx(whole - 16 * 3_020_442_624 * 7 / 8)
    assert training_memory(shape, **given, checkpointing=True).total < whole / 2
    plan = make_plan(cells[:1], Store(tmp_path))
    whole_teacher = pipeline.resolve(compose(["+sweeps=minima", "teacher=7b", "family.placement=one"]))
    more = make_plan([whole_teacher], Store(tmp_path)).memory
    assert 30e9 < more["distil"].total < 80e9
    assert more["scores"].weights == pytest.approx(8 * plan.memory["scores"].weights)
    assert more["distil"].teacher == pytest.approx(8 * plan.memory["distil"].teacher)
    assert plan.device_hours == pytest.approx(8 * plan.worker_s / 3600)


def test_a_fixed_shape_may_name_its_key_value_heads():
    llama = FAMILIES["llama2"].rungs["70b"]
    assert fixed_shape(llama, "24x3072x24x8192").kv_heads == 3
    assert fixed_shape(llama, "24x3072x24x8192x24").kv_heads == 24
    with pytest.raises(ConfigError, match="24 query heads do not divide among 5 key-value heads"):
        fixed_shape(llama, "24x3072x24x8192x5")
