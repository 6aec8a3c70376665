"""Trunks: what budgets share, that a branch is one run to the last bit, and what does not go together."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from capacity_gap.cell import pipeline
from capacity_gap.cell.stages.run_training import STATE
from capacity_gap.data import packing
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.models.loading import load_model
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.stage import Store, closure
from capacity_gap.training.loop import Plan, train
from capacity_gap.training.train_config import OptimConfig
from capacity_gap.training.trunk import Branch, halves, leaves, nested_order, warm_steps
from tests.conftest import compose

TRUNK = ["train.trunk=true", "train.schedule=wsd"]


def test_budgets_are_halved_down_to_a_hundred_steps():
    assert halves(1_200_000, 128, 4) == [75_000, 150_000, 300_000, 600_000, 1_200_000]
    assert halves(300_000, 128, 4) == [75_000, 150_000, 300_000]
    assert halves(20_000, 128, 4) == [20_000], "too short to be halved"


def test_what_four_doublings_cost_is_less_than_two_thirds():
    length, batch = 128, 4
    trunk = leaves(1_200_000, length, batch, 0.2)
    tails = sum(n // length // batch - leaves(n, length, batch, 0.2) for n in (150_000, 300_000, 600_000, 1_200_000))
    alone = sum(n // length // batch for n in (150_000, 300_000, 600_000, 1_200_000))
    assert (trunk + tails) / alone == pytest.approx(0.627, abs=0.005)


def test_rates_rise_stay_and_fall_to_their_end():
    branch = Branch(warm=4, leave=16)
    rates = [branch.rate(step, 20, peak=1.0, final=0.1) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:16]) == {1.0}
    np.testing.assert_allclose(rates[16:], [0.775, 0.55, 0.325, 0.1])
    assert [Branch(4).rate(step, 20, peak=1.0, final=0.1) for step in range(20)] == rates[:16] + [1.0] * 4
    assert warm_steps([75_000, 150_000], 128, 4, 0.1) == 15


def test_orders_of_doublings_are_nested_and_shuffled_by_the_seed():
    sequences = np.random.default_rng(0).permutation(1000)[:800]
    whole = nested_order(sequences, [200, 400, 800], 0)
    assert np.array_equal(whole[:400], nested_order(sequences[:400], [200, 400], 0))
    assert set(whole[:200]) == set(sequences[:200]) and sorted(whole) == sorted(sequences)
    assert not np.array_equal(whole[:200], sequences[:200])
    assert not np.array_equal(whole, nested_order(sequences, [200, 400, 800], 1))


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """A cell that was halved once, run; its settings."""
    config = compose([*tiny, *TRUNK, "student=40k", "teacher=55k", "data=26k", f"store={tmp_path_factory.mktemp('t')}"])
    run_config(config)
    return config


def test_a_branch_is_one_uninterrupted_run_to_the_last_bit(ran, tmp_path):
    cell, store = pipeline.resolve(ran), Store(ran.store_path)
    last, parts = cell._branch
    assert [part.config["tokens"] for part in parts] == [13_000, 26_000]
    student, teacher = (load_model(store.path(stage)) for stage in (cell.student, cell.teacher))
    text = packing.Packed(store.path(cell.tokens) / "train", cell.sequence_length)
    edges = [n // cell.sequence_length for n in (13_000, 26_000)]
    order = nested_order(packing.subset(text, 26_000), edges, 0)
    trunk = last.config["trunk"]
    plan = Plan(
        order=order,
        optim=OptimConfig(**last.config["optim"], learning_rate=last.config["learning_rate"]),
        distill=DistillConfig(),
        peak=last.config["learning_rate"],
        micro_batch=cell.batch_size,
        branch=Branch(trunk["warm"], trunk["leave"]),
    )
    train(student, text, plan, runtime=Runtime(), checkpoints=tmp_path, teacher=teacher)
    ours = load_file(store.path(last) / "model.safetensors")
    theirs = student.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    history = [json.loads(line) for line in (store.path(last) / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in history[:3]] == [1, 11, 21], "the trunk's points come first"
    assert not (store.path(parts[0]) / "model.safetensors").exists()
    assert (store.path(parts[0]) / STATE).is_dir()


def test_doublings_share_their_trunk_and_other_settings_do_not(ran):
    half, third = (pipeline.resolve(replace(ran, data=data)) for data in ("13k", "20k"))
    keys = closure(pipeline.resolve(ran).record)
    assert half._branch[1][0].key in keys
    assert half.record.key not in keys
    assert third._branch[1][0].key not in keys
    cached = pipeline.resolve(replace(ran, distill=replace(ran.distill, signal="sampled")))
    assert [part.inputs["signal"].config["tokens"] for part in cached._branch[1]] == [13_000, 26_000]
    assert [wave[0].name for wave in cached.waves][-2:] == ["trunk", "trunk"]


def test_costs_are_those_of_the_tokens_that_a_stage_sees(ran):
    last, parts = pipeline.resolve(ran)._branch
    plain = pipeline.resolve(compose(["student=40k", "teacher=55k", "data=26k"])).distilled
    assert sum(stage.cost for stage in (last, *parts)) == pytest.approx(plain.cost)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["train.trunk=true"], "train.schedule=cosine .it takes wsd."),
        ([*TRUNK, "epochs=2"], "epochs=2 .it takes 1."),
        ([*TRUNK, "train.decay=0"], "train.decay=0 .it takes more than 0"),
        ([*TRUNK, "data=0"], "data=0"),
    ],
)
def test_what_does_not_go_with_a_trunk_is_said_before_anything_runs(given, said):
    with pytest.raises(ConfigError, match=said):
        pipeline.resolve(compose(given))


def test_without_a_trunk_no_digest_changes():
    plain = pipeline.resolve(compose([])).record.digest
    assert pipeline.resolve(compose(["train.trunk=false"])).record.digest == plain
