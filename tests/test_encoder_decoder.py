"""Encoder–decoders as prefix language models: what is read, what is predicted, what is counted, and whole cells."""

import dataclasses
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.data.packing import Packed
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.distill.signals import Signal, write_signal
from capacity_gap.evaluate.heldout import held_out
from capacity_gap.models import accounting
from capacity_gap.models.axes import count_params, dims
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import hidden_states, new_model, output_weight, predicted
from capacity_gap.pruning import prune
from capacity_gap.pruning.kept_units import choose_units
from capacity_gap.pruning.lm_loss import lm_loss
from capacity_gap.pruning.methods import random_scores
from capacity_gap.pruning.shape import shape_of, spread
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.stage import Store
from capacity_gap.training.loop import Plan, train
from capacity_gap.training.train_config import OptimConfig
from tests.conftest import compose
from tests.small_models import T5, TOKENS, small_model
from tests.test_surgery import shape_with

RUNGS = FAMILIES["pico_t5"].rungs
KINDS = ["t5", "t5 gated", "t5 gated, unscaled"]


class Text:
    """Random tokens of a small vocabulary, each worth as many bytes as its id."""

    sequence_length = 9
    rows = np.random.default_rng(0).integers(3, 40, (12, 10))
    bytes_per_id = np.arange(1024)

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        return self.rows[indices]


def plain_loss(model, tokens):
    """Transformers' own loss of the second half of the labels, given what comes before."""
    prefix = (tokens.shape[1] - 1) // 2 + 1
    return model(input_ids=tokens[:, :prefix], labels=tokens[:, prefix:].contiguous()).loss


@pytest.mark.parametrize("length", [2, 3, 9, 10])
@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_that_of_plain_transformers(name, length):
    model, tokens = small_model(name), TOKENS[0][:, :length]
    torch.testing.assert_close(lm_loss(model, tokens), plain_loss(model, tokens).to(torch.float64))
    labels = length - 1
    assert hidden_states(model, tokens[:, :-1]).shape[1] == predicted(model, labels) == labels - labels // 2


def test_the_decoder_reads_the_prefix_and_no_token_that_it_predicts():
    model, tokens = small_model("t5"), TOKENS[0][:1, :9].clone()
    before = hidden_states(model, tokens)  # of places 4 to 8, which predict tokens 5 to 9
    for place in range(9):
        other = tokens.clone()
        other[0, place] = 3 + (other[0, place] - 2) % 37
        changed = (hidden_states(model, other) - before).abs().amax(-1)[0] > 1e-9
        assert changed.tolist() == [place <= reader for reader in range(4, 9)]


def test_training_averages_over_the_labels_that_the_decoder_predicts(tmp_path):
    model, text = new_model(RUNGS["80k"], 0), Text()
    rows = torch.from_numpy(text.rows[:6])
    expected = plain_loss(model, rows).item()
    plan = Plan(np.arange(6), OptimConfig(batch_size=6), DistillConfig(kd_weight=0.0), 1e-3, micro_batch=4)
    result = train(model, text, plan, runtime=Runtime(), checkpoints=tmp_path)
    assert result.history[0]["ce"] == pytest.approx(expected, rel=1e-5)
    assert result.history[0]["tokens"] == result.tokens == 6 * 9, "tokens are those of the text"


def test_held_out_loss_and_bytes_are_of_the_predicted_half():
    model, text = new_model(RUNGS["80k"], 0), Text()
    found = held_out(model, text, tokens=1000, batch_size=5, runtime=Runtime())
    with torch.no_grad():
        assert found.loss == pytest.approx(plain_loss(model, torch.from_numpy(text.rows)).item(), rel=1e-5)
    assert found.tokens == 12 * 5
    assert found.bits_per_byte == pytest.approx(found.loss / np.log(2) * 60 / text.rows[:, 5:].sum())


def test_a_cached_signal_holds_the_predicted_half(tmp_path):
    teacher, text = new_model(RUNGS["80k"], 0), Text()
    given = {"size": 5, "temperature": 1.0, "seed": 0, "batch_size": 4, "autocast": nullcontext}
    write_signal(teacher, text, np.array([3, 1, 7]), tmp_path, kind="topk", **given)
    found = Signal(tmp_path).targets(np.array([7, 3]))
    with torch.no_grad():
        tokens = torch.from_numpy(text.rows[[7, 3], :-1])
        logits = hidden_states(teacher, tokens) @ output_weight(teacher).T
    expected = logits.log_softmax(-1).flatten(0, 1).topk(5)
    assert torch.equal(found.ids, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=2e-3, atol=2e-3)


def test_a_token_costs_the_stack_that_reads_it():
    shape = RUNGS["270k"]
    every = count_params(shape) - dims(shape).vocab * dims(shape).hidden
    assert accounting.train_flops(shape, 100) == 600 * (every + dims(shape).vocab * dims(shape).hidden) / 2


# Tied axes


def test_heads_that_share_a_bias_stay_together_and_the_others_are_free():
    model = small_model("t5")
    scores = random_scores(model, (), seed=1)
    kept = choose_units(scores, shape_with(model, heads=2, kv_heads=2), model.config)
    rows = [tuple(h.tolist()) for h in kept.heads]
    encoder, decoder, across = rows[:3], rows[3:6], rows[6:]
    assert len(set(encoder)) == len(set(decoder)) == 1
    assert len(set(across)) > 1
    assert list(encoder[0]) == sorted(scores.heads[:3].sum(0).topk(2).indices.tolist())


def test_only_layers_that_stay_choose_the_shared_heads():
    model = small_model("t5")
    scores = random_scores(model, ())
    scores.heads[:] = torch.tensor([1.0, 2, 3, 4])
    scores.heads[[0, 2]] = torch.tensor([99.0, 99, 0, 0])  # of the encoder's first and last layer, which go
    kept = choose_units(scores, shape_with(model, heads=2, kv_heads=2, layers=1), model.config)
    assert kept.layers == [[1], [1]]
    assert kept.heads[1].tolist() == [2, 3]


def test_the_bias_stays_when_its_layer_goes():
    """A global student that keeps every neuron is the local one, whichever layers go."""
    model = small_model("t5")
    scores = dataclasses.replace(random_scores(model, ()), layers=torch.tensor([0.0, 1, 2, 2, 0, 1]))
    shape = shape_with(model, heads=2, kv_heads=2, layers=2)
    local = prune(model, scores, shape, layers="block_influence")
    spread_out = spread(shape, model.config, scores, layers="block_influence", multiple=1)
    everywhere = prune(model, scores, spread_out, layers="block_influence")
    for (name, one), two in zip(local.named_parameters(), everywhere.parameters(), strict=True):
        assert torch.equal(one, two), name
    for stack in ("encoder", "decoder"):
        bias = local.get_submodule(f"{stack}.block.0.layer.0.SelfAttention").relative_attention_bias.weight
        assert bias.shape == (8, 2)
        assert (bias != 0).all()


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ConfigError, match="3 encoder and 2 decoder layers"):
        count_params({"model_type": "t5", **T5, "num_decoder_layers": 2})
    with pytest.raises(ConfigError, match="an output matrix of its own"):
        count_params({"model_type": "t5", **T5, "tie_word_embeddings": False})
    model = small_model("t5")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ConfigError, match=r"an output matrix of its own \(lm_head\.weight\)"):
        prune(model, random_scores(model, ()), shape_of(model.config))


# Whole cells


@pytest.fixture(scope="module")
def cells(tiny, tmp_path_factory):
    """Records by what was said of them, and the store."""
    store = tmp_path_factory.mktemp("store")
    given = [*tiny, "family=pico_t5", "student=50k", f"store={store}"]
    found = {}
    for name, more in {
        "online": ["teacher=80k"],
        "cached": ["teacher=80k", "distill.signal=sampled", "distill.signal_size=128"],
        "global, one layer": ["teacher=120k", "prune.priority=global", "prune.layers=block_influence", "prune.depth=1"],
    }.items():
        config = compose([*given, *more])
        found[name] = (pipeline.resolve(config), json.loads((Store(store).root / _run(config)).read_text()))
    return Store(store), found


def _run(config):
    return f"{run_config(config)}/record.json"


def test_benchmarks_that_ask_causal_models_are_refused(tiny, tmp_path):
    given = [*tiny, "family=pico_t5", "student=50k", "teacher=80k", "evaluate=pico", f"store={tmp_path / 'store'}"]
    with pytest.raises(ConfigError, match="encoder–decoder"):
        pipeline.resolve(compose(given))


def test_cells_end_in_records_that_say_what_was_predicted(cells):
    for cell, row in cells[1].values():
        assert (row["status"], row["family"], row["objective"]) == ("done", "pico_t5", "prefix_lm")
        assert abs(row["student_params"] / 50_000 - 1) < 0.005
        assert row["student_loss"] < row["init_loss"]
        assert row["train_flops"] == accounting.train_flops(cell.student_shape, 6000)
    assert cells[1]["global, one layer"][1]["stored_params"] > cells[1]["global, one layer"][1]["student_params"]
    near, exact = (cells[1][name][1]["student_loss"] for name in ("cached", "online"))
    assert near == pytest.approx(exact, abs=0.05)
    assert near != exact


@pytest.mark.parametrize("name", ["online", "global, one layer"])
def test_the_recorded_loss_is_what_plain_transformers_makes_of_the_saved_student(cells, name):
    from transformers import AutoModelForSeq2SeqLM

    store, found = cells
    cell, row = found[name]
    model = AutoModelForSeq2SeqLM.from_pretrained(store.path(cell.distilled)).eval()
    packed = Packed(store.path(cell.tokens) / "test", 32)
    tokens = torch.from_numpy(packed.batch(np.arange(min(len(packed), 2000 // 32))))
    with torch.no_grad():
        assert plain_loss(model, tokens).item() == pytest.approx(row["student_loss"], rel=1e-5)


def test_records_of_other_families_say_nothing_of_it(tiny_cell):
    (row,) = records.read(tiny_cell.store_path)
    assert row["objective"] is None


def test_a_t5_of_ones_own_is_cut_where_it_lies(cells, tiny, tmp_path):
    store, found = cells
    cell = found["online"][0]
    folder = tmp_path / "mine"
    shutil.copytree(store.path(cell.teacher), folder)
    for file in store.path(cell.tokenizer).glob("token*.json"):
        shutil.copy(file, folder)
    given = [g for g in tiny if not g.startswith("family.")]
    config = compose([*given, "family=folders", f"teacher={folder}", "student=50k", f"store={tmp_path / 'store'}"])
    run_config(config)
    (row,) = records.read(tmp_path / "store")
    assert (row["status"], row["objective"], row["teacher_tokens"]) == ("done", "prefix_lm", None)
    assert row["teacher_loss"] == found["online"][1]["teacher_loss"]
