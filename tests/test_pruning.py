"""Scores against the very masks they differentiate, rivals against their formulas by hand, shapes."""

import time

import numpy as np
import pytest
import torch

from capacity_gap.cell.stages.score_units import Reread, _calibration
from capacity_gap.data import packing
from capacity_gap.models.axes import architecture, config_with, count_params, dims, pattern_of
from capacity_gap.models.building import auto_class
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.pruning import choose_shape, common_shape, expressive_scores
from capacity_gap.pruning.common_shape import student_config
from capacity_gap.pruning.hooks import layers_of
from capacity_gap.pruning.kept_units import Kept
from capacity_gap.pruning.lm_loss import lm_loss
from capacity_gap.pruning.methods import SCORES, block_influence, loss_increase, random_scores
from capacity_gap.pruning.scores import Scores
from capacity_gap.pruning.shape import Shape, sized, unfit
from capacity_gap.settings.errors import ConfigError, ImpossibleCell
from tests.small_models import SMALL, TOKENS, losses_of, masked, small_model

PICO = FAMILIES["pico"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("axis", ["queries", "neurons", "hidden"])
def test_expressive_scores_are_central_differences_of_the_loss_under_those_masks(name, axis):
    model, step = small_model(name), 1e-5
    sizes = dims(model.config)
    table = architecture(model.config)
    rows = {a: table.rows(a, sizes) for a in ("heads", "neurons")}
    shape = {"queries": (rows["heads"], sizes.heads), "neurons": (rows["neurons"], 12), "hidden": (16,)}[axis]
    units = torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape))
    measured = torch.zeros(len(TOKENS), *shape, dtype=torch.float64)
    for batch, tokens in enumerate(TOKENS):
        ends = []
        for sign in (1, -1):
            # One forward pass for all: each unit's mask meets a copy of the batch of its own.
            masks = torch.ones(len(units), *shape, dtype=torch.float64)
            masks[(torch.arange(len(units)), *units.T)] += sign * step
            masks = masks.movedim(0, -2).repeat_interleave(len(tokens), dim=-2).unsqueeze(-2)
            with masked(model, **{axis: masks}):
                ends.append(losses_of(model, tokens, copies=len(units)))
        measured[batch] = ((ends[0] - ends[1]) / (2 * step)).view(shape)
    scores = expressive_scores(model, TOKENS)
    found = {"queries": scores.queries, "neurons": scores.neurons, "hidden": scores.hidden}[axis]
    if found is not None:
        torch.testing.assert_close(found.double(), unit(measured.abs().sum(0)), rtol=2e-4, atol=1e-6)
    if axis == "queries":  # a unit is a key-value head with all its queries: one mask, one absolute value
        groups = measured.unflatten(2, (sizes.kv_heads, -1)).sum(-1).abs().sum(0)
        torch.testing.assert_close(scores.heads.double(), unit(groups), rtol=2e-4, atol=1e-6)


def unit(scores):
    return scores / scores.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("method", SCORES)
def test_scoring_leaves_the_model_as_it_was(method):
    model = small_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    SCORES[method](model, TOKENS)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.embed_tokens.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("name", ["llama", "t5 gated"])
def test_scores_repeat_to_the_bit(name, method):
    model = small_model(name)
    one, two = (SCORES[method](model, TOKENS) for _ in range(2))
    assert all(torch.equal(getattr(one, a), getattr(two, a)) for a in ("heads", "neurons", "hidden"))


@pytest.mark.parametrize("method", ["expressive", "taylor", "activation", "wanda", "magnitude"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5 gated"])
def test_a_bf16_model_is_scored_in_fp32(name, method):
    config = small_model(name).config
    torch.manual_seed(0)  # else its weights depend on the tests before
    kinds = {
        dtype: auto_class(config).from_config(config, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)
    }
    kinds[torch.bfloat16].load_state_dict(kinds[torch.float32].state_dict())
    exact, rough = (SCORES[method](m, TOKENS) for m in kinds.values())
    for axis in ("heads", "neurons", "hidden"):
        found, expected = getattr(rough, axis), getattr(exact, axis)
        assert found.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.98


@pytest.mark.parametrize("method", [m for m in SCORES if m != "random"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "t5 gated"])
def test_permuting_units_permutes_scores(name, method):
    """Heads and neurons of every layer, and hidden units of the whole model, in another order: the same function."""
    model = small_model(name)
    table, sizes = architecture(model.config), dims(model.config)
    scores = SCORES[method](model, TOKENS)
    generator = torch.Generator().manual_seed(2)
    units, neurons, hidden = (torch.randperm(n, generator=generator) for n in (sizes.kv_heads, 12, 16))
    queries = (units[:, None] * sizes.group + torch.arange(sizes.group)).flatten()
    rows = {axis: table.rows(axis, sizes) for axis in ("heads", "neurons")}
    per_row = [queries] * rows["heads"], [units] * rows["heads"], [neurons] * rows["neurons"]
    order = Kept(3, [[0, 1, 2]] * len(table.stacks), hidden, *per_row, experts=[])
    with torch.no_grad():
        before = lm_loss(model, TOKENS[0])
        for parameter_name, parameter in model.named_parameters():
            for dimension, axis in enumerate(table.parameters[pattern_of(table, parameter_name)[0]]):
                if (index := order.rows(axis, 0, sizes)) is not None:
                    parameter.copy_(parameter.index_select(dimension, index))
        torch.testing.assert_close(lm_loss(model, TOKENS[0]), before)
    again = SCORES[method](model, TOKENS)
    torch.testing.assert_close(again.heads, scores.heads[:, units], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.neurons, scores.neurons[:, neurons], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.hidden, scores.hidden[hidden], rtol=1e-4, atol=1e-6)


def test_the_absolute_value_is_taken_per_batch():
    model = small_model()
    apart = expressive_scores(model, TOKENS)
    together = expressive_scores(model, [TOKENS.flatten(0, 1)])
    assert not torch.allclose(apart.neurons, together.neurons, rtol=1e-3)


# The rivals, by hand: neuron 2 of layer 1 of a small Llama is one row of gate and up and one column of down.


def neuron_weights(model):
    mlp = model.model.layers[1].mlp
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T


def relative(scores, raw):
    """Scores are normalised per layer: compare what two neurons have in proportion."""
    torch.testing.assert_close(scores[1, 2] / scores[1, 5], (raw[2] / raw[5]).float(), rtol=1e-4, atol=1e-6)


def test_magnitude_by_hand():
    model = small_model()
    raw = sum(w.detach().square().sum(1) for w in neuron_weights(model)).sqrt()
    relative(SCORES["magnitude"](model, ()).neurons, raw)


def test_taylor_by_hand():
    model = small_model()
    raw = torch.zeros(12).double()
    for tokens in TOKENS:
        model.zero_grad()
        lm_loss(model, tokens).backward()
        mlp = model.model.layers[1].mlp
        grads = mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad, mlp.down_proj.weight.grad.T
        raw += sum((w.detach() * g).abs().sum(1) for w, g in zip(neuron_weights(model), grads, strict=True))
    relative(SCORES["taylor"](model, TOKENS).neurons, raw)


def test_movement_by_hand():
    model = small_model()
    scores = SCORES["movement"](model, TOKENS)
    raw = torch.zeros(12).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for tokens in TOKENS:
        optimizer.zero_grad()
        lm_loss(model, tokens).backward()
        mlp = model.model.layers[1].mlp
        grads = mlp.gate_proj.weight.grad, mlp.up_proj.weight.grad, mlp.down_proj.weight.grad.T
        raw -= sum((w.detach() * g).sum(1) for w, g in zip(neuron_weights(model), grads, strict=True))
        optimizer.step()
    relative(scores.neurons, raw)


def test_activation_by_hand():
    model, seen = small_model(), []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    for tokens in TOKENS:
        model(tokens[:, :-1])
    hook.remove()
    relative(SCORES["activation"](model, TOKENS).neurons, torch.cat(seen).abs().flatten(0, 1).mean(0))


def test_wanda_by_hand():
    model, seen = small_model(), {}
    mlp = model.model.layers[1].mlp
    hooks = [
        m.register_forward_pre_hook(lambda m, x, n=n: seen.setdefault(n, []).append(x[0].detach()))
        for n, m in (("gate", mlp.gate_proj), ("up", mlp.up_proj), ("down", mlp.down_proj))
    ]
    for tokens in TOKENS:
        model(tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    norms = {n: torch.cat(x).flatten(0, 1).norm(dim=0) for n, x in seen.items()}
    gate, up, down = (w.detach().abs() for w in neuron_weights(model))
    raw = (gate * norms["gate"]).sum(1) + (up * norms["up"]).sum(1) + down.sum(1) * norms["down"]
    relative(SCORES["wanda"](model, TOKENS).neurons, raw)


# Whole layers


@pytest.mark.parametrize("name", SMALL)
def test_a_layer_that_does_nothing_has_no_influence(name):
    model = small_model(name)
    layer = layers_of(model, architecture(model.config), dims(model.config))[1]
    t5 = model.config.is_encoder_decoder  # its layers hand the position biases on
    layer.forward = lambda hidden_states, *args, **kwargs: (hidden_states, args[1], args[4]) if t5 else hidden_states
    influence, rise = block_influence(model, TOKENS), loss_increase(model, TOKENS)
    assert len(influence) == len(rise) == 3 * len(architecture(model.config).stacks)
    assert influence[1].abs() < 1e-6
    assert rise[1].abs() < 1e-9
    assert influence[0] > 1e-3
    assert rise[0].abs() > 1e-3


def test_scores_of_layers_tell_how_far_they_are():
    """Thirty layers take minutes: without this neither progress was shown nor a request to stop seen."""
    read = []
    again = Reread(TOKENS, read.append)
    assert torch.equal(loss_increase(small_model("llama"), again), loss_increase(small_model("llama"), TOKENS))
    assert read == list(range((1 + 3) * len(TOKENS))), "the whole model, then without each layer"


@pytest.mark.parametrize("rung", list(PICO.rungs))
def test_counts_are_those_of_the_built_model(rung):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(PICO.rungs[rung])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert count_params(PICO.rungs[rung]) == sum(p.numel() for p in built.parameters())
    embedded = built.get_input_embeddings().weight.numel()
    assert count_params(PICO.rungs[rung], non_embedding=True) == count_params(PICO.rungs[rung]) - embedded


def test_the_common_shape_is_one_for_all_teachers_and_exact():
    for target in (30_000, 45_000, 60_000, 90_000, 150_000, 400_000, 1_000_000):
        able = [r for r in PICO.rungs.values() if count_params(r) > target]
        students = [student_config(PICO.rungs, t, target, policy="common", multiple=1) for t in able]
        axes = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
        shapes = {tuple(s[a] for a in axes) for s in students}
        assert len(shapes) == 1, target
        assert abs(common_shape(PICO.rungs, target, multiple=1).params / target - 1) < 0.005


def test_a_student_the_size_of_a_rung_has_its_shape():
    for rung, config in PICO.rungs.items():
        shape = common_shape(PICO.rungs, PICO.params[rung], multiple=1)
        assert (shape.hidden, shape.neurons) == (config["hidden_size"], config["intermediate_size"])


def test_per_teacher_keeps_the_teachers_proportions():
    teacher = PICO.rungs["2m"]
    shape = choose_shape(teacher, 600_000, multiple=1)
    kept = (shape.hidden / 192, shape.kv_heads / 24, shape.neurons / 526)
    assert max(kept) / min(kept) < 1.15
    assert abs(shape.params / 600_000 - 1) < 0.005


def test_shapes_that_cannot_be_say_what_can():
    with pytest.raises(ConfigError, match=r"no student of 100 parameters.*nearest possible sizes: 1,173"):
        choose_shape(PICO.rungs["55k"], 100, multiple=1)
    with pytest.raises(ConfigError, match="nearest possible sizes"):
        choose_shape(PICO.rungs["55k"], 90_000, multiple=1)
    with pytest.raises(ConfigError, match="depth=9 is not between 1 and the teacher's 4 layers"):
        choose_shape(PICO.rungs["55k"], 40_000, depth=9, multiple=1)
    with pytest.raises(ConfigError, match=r"policy='sideways'.*Allowed: local, global, fixed"):
        choose_shape(PICO.rungs["55k"], 40_000, "sideways")
    with pytest.raises(ImpossibleCell, match="the common student .*does not fit into the teacher: hidden"):
        student_config(PICO.rungs, PICO.rungs["55k"], 90_000, policy="common", multiple=1)


def test_a_7b_is_planned_to_3b_in_seconds_and_the_count_is_exact():
    from transformers import AutoConfig, AutoModelForCausalLM

    teacher = FAMILIES["llama2"].rungs["7b"]
    began = time.monotonic()
    shape = choose_shape(teacher, 3_000_000_000, depth=24)
    assert time.monotonic() - began < 20
    settings = config_with(teacher, sized(dims(teacher), shape))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in built.parameters()) == shape.params
    assert abs(shape.params / 3e9 - 1) < 0.005
    assert config.num_hidden_layers == 24


def test_unfit_names_every_axis():
    small = dims(PICO.rungs["55k"])
    too_large = Shape(999, 4, 4, 8, 999, 9, 0)
    assert unfit(too_large, small) == ["hidden 999 > 24", "heads 4 > 3", "neurons 999 > 73", "layers 9 > 4"]
    assert unfit(Shape(24, 3, 3, 4, 9, 4, 0), small) == ["head_dim 4 of the student ≠ 8 of the teacher"]
    grouped = dims(small_model("llama").config)  # two key-value heads with two queries each
    forbidden = unfit(Shape(16, 3, 1, 6, 12, 3, 0), grouped)
    assert forbidden == ["1 key-value heads with 3 queries each, teacher 2 with 2"]


def test_a_ladder_that_mixes_groups_and_head_sizes_has_a_common_student():
    """Qwen2.5: heads of 64 at 0.5b and of 128 above, groups of 5 to 8."""
    rungs = FAMILIES["qwen2_5"].rungs
    shape = common_shape(rungs, FAMILIES["qwen2_5"].params["0.5b"])
    assert (shape.head_dim, shape.group) == (128, 5)
    for teacher in ("1.5b", "3b", "7b", "14b", "72b"):
        assert student_config(rungs, rungs[teacher], FAMILIES["qwen2_5"].params["0.5b"], policy="common", multiple=8)
    with pytest.raises(ImpossibleCell, match="head_dim 128 of the student ≠ 64 of the teacher"):
        student_config(rungs, rungs["0.5b"], 300_000_000, policy="common", multiple=8)
    llama = common_shape(FAMILIES["llama2"].rungs, 3_000_000_000)
    assert llama.group == 1, "7b has no groups; 70b repeats its key-value heads"
    assert not unfit(llama, dims(FAMILIES["llama2"].rungs["70b"]))


def test_scores_round_trip_and_random_ones_follow_their_seed(tmp_path):
    model = small_model()
    one, two = (random_scores(model, (), seed=s) for s in (0, 1))
    assert torch.equal(one.hidden, random_scores(model, (), seed=0).hidden)
    assert not torch.equal(one.hidden, two.hidden)
    one.save(tmp_path)
    again = Scores.load(tmp_path)
    assert torch.equal(again.heads, one.heads)
    assert again.method == "random"


def test_calibration_sets_follow_one_another_and_share_nothing():
    packed = type("Packed", (), {"sequence_length": 8, "__len__": lambda self: 100})()
    first, second = (_calibration(packed, 20, which) for which in (0, 1))
    assert np.array_equal(np.concatenate([first, second]), packing.subset(packed, 40 * 8))
    with pytest.raises(ConfigError, match="holds 800"):
        _calibration(packed, 20, 5)
