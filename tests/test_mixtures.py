"""Mixtures of experts: neurons of each expert and whole experts are scored, cut, counted and read from files."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from capacity_gap.models.accounting import multiplied
from capacity_gap.models.axes import architecture, count_params, cuttable, dims
from capacity_gap.models.defaults import completed
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import new_model
from capacity_gap.models.weights import check_weights, tensors_of
from capacity_gap.pruning import experts as reading
from capacity_gap.pruning.common_shape import common_shape, student_shape
from capacity_gap.pruning.experts import router_mass
from capacity_gap.pruning.kept_units import choose_units
from capacity_gap.pruning.methods import SCORES
from capacity_gap.pruning.proof import RoutingAmong, masked
from capacity_gap.pruning.shape import choose_shape, fixed_shape, shape_of, spread
from capacity_gap.pruning.surgery import prune, prune_checkpoint
from capacity_gap.settings.errors import ConfigError, ImpossibleCell
from capacity_gap.structure.derive import probe_of
from capacity_gap.structure.probing import from_config, randomised
from capacity_gap.training.optimizer import make_optimizer
from capacity_gap.training.train_config import OptimConfig
from tests.small_models import TOKENS, small_model

DATA = [m for m in SCORES if m not in ("random", "magnitude")]


@pytest.fixture
def mixtral():
    return small_model("mixtral")


def small(kind, dtype=torch.float64):
    return randomised(probe_of({"model_type": kind, "tie_word_embeddings": False}), dtype=dtype)


def losses(model, batches=TOKENS):
    """Of each batch, through the model's own logits."""
    with torch.no_grad():
        logits = [model(b[:, :-1], use_cache=False).logits.double() for b in batches]
    return torch.stack(
        [F.cross_entropy(x.flatten(0, 1), b[:, 1:].flatten()) for x, b in zip(logits, batches, strict=True)]
    )


def routed(model, tokens):
    """Of each layer, what goes into its experts, which of them, and with which weights."""
    found, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith("experts"):
            hooks.append(module.register_forward_pre_hook(lambda _m, given: found.append(given)))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_scores_of_an_experts_neurons_are_what_the_loss_says_when_they_are_scaled(kind):
    model, step = small(kind), 1e-2  # norms are computed in fp32
    sizes, batches = dims(model.config), [torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(5))]
    found = SCORES["expressive"](model, batches)
    assert found.neurons.shape == (sizes.experts * sizes.layers, sizes.neurons)
    layer = 1
    down = model.get_parameter(f"model.layers.{layer}.mlp.experts.down_proj")
    for expert in (0, 3):
        slopes = []
        for neuron in range(5):
            mine = down.data[expert, neuron] if kind == "gpt_oss" else down.data[expert, :, neuron]
            before, ends = mine.clone(), []
            for factor in (1 + step, 1 - step):
                mine.copy_(factor * before)
                ends.append(losses(model, batches))
            mine.copy_(before)
            slopes.append((ends[0] - ends[1]).abs().sum() / (2 * step))
        slopes, scores = torch.stack(slopes), found.neurons[expert * sizes.layers + layer, :5].double()
        torch.testing.assert_close(scores / scores.norm(), slopes / slopes.norm(), rtol=0.03, atol=5e-3)


def test_router_mass_is_what_the_routers_give(mixtral):
    table, sizes = architecture(mixtral.config), dims(mixtral.config)
    with router_mass(mixtral, table, sizes) as mass:
        given = [routed(mixtral, tokens) for tokens in TOKENS]
    expected = torch.zeros(3, 4)
    for batch in given:
        for layer, (_, chosen, weights) in enumerate(batch):
            for expert in range(4):
                expected[layer, expert] += weights[chosen == expert].sum()
    torch.testing.assert_close(mass, expected)
    # A router of Mixtral deals each token's whole weight out.
    torch.testing.assert_close(mass.sum(1), torch.full((3,), float(TOKENS.numel())))


@pytest.mark.parametrize("method", DATA)
def test_whole_experts_are_ranked_by_router_mass(mixtral, method):
    table, sizes = architecture(mixtral.config), dims(mixtral.config)
    with router_mass(mixtral, table, sizes) as mass:
        losses(mixtral)
    found = SCORES[method](mixtral, list(TOKENS), seed=0).experts
    if method != "movement":  # it trains a copy between batches
        torch.testing.assert_close(found, mass / mass.norm(dim=1, keepdim=True))
        assert (found.argsort(1) == mass.argsort(1)).all()
    assert found.shape == mass.shape


def test_activations_and_wanda_are_those_of_each_experts_own_tokens(mixtral):
    """Computed anew from what goes into the experts, by the formulas of the two methods."""
    inner, norms_in, norms_down = torch.zeros(12, 12), torch.zeros(12, 16), torch.zeros(12, 12)
    for tokens in TOKENS:
        for layer, (hidden, chosen, _) in enumerate(routed(mixtral, tokens[:, :-1])):
            experts = mixtral.get_submodule(f"model.layers.{layer}.mlp.experts")
            for expert in range(4):
                x = hidden[(chosen == expert).any(-1)]
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
                active, row = F.silu(gate) * up, expert * 3 + layer
                inner[row] += active.abs().sum(0).float()
                norms_in[row] += x.square().sum(0).float()
                norms_down[row] += active.square().sum(0).float()
    found = SCORES["activation"](mixtral, list(TOKENS)).neurons
    torch.testing.assert_close(found, by_layer(inner), rtol=1e-4, atol=1e-6)
    wanda = torch.zeros(12, 12)
    for row in range(12):
        experts = mixtral.get_submodule(f"model.layers.{row % 3}.mlp.experts")
        gate, up = (experts.gate_up_proj[row // 3].abs().float() * norms_in[row].sqrt()).sum(1).chunk(2)
        down = (experts.down_proj[row // 3].abs().float() * norms_down[row].sqrt()).sum(0)
        wanda[row] = gate + up + down
    found = SCORES["wanda"](mixtral, list(TOKENS)).neurons
    torch.testing.assert_close(found, by_layer(wanda), rtol=1e-4, atol=1e-6)


def by_layer(neurons):
    """Normalised over all experts of a layer; row e·3 + i is expert e of layer i."""
    norms = torch.stack([neurons[layer::3].norm() for layer in range(3)])
    return neurons / norms.repeat(4)[:, None]


@pytest.mark.parametrize("method", [m for m in SCORES if m not in ("random", "movement")])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "phimoe"])
def test_experts_in_another_order_have_their_scores_in_that_order(kind, method):
    model = small(kind, torch.float32)
    sizes, batches = dims(model.config), [torch.randint(3, 200, (2, 9))]
    before = SCORES[method](model, batches)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for parameter in model.parameters():
            if len(parameter) == sizes.experts:
                parameter.copy_(parameter[order])
    after = SCORES[method](model, batches)
    by_expert = before.neurons.view(sizes.experts, sizes.layers, -1)[order].flatten(0, 1)
    torch.testing.assert_close(after.neurons, by_expert, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after.experts, before.experts[:, order], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(after.hidden, before.hidden, rtol=1e-3, atol=1e-5)


def test_an_implementation_of_experts_is_put_back(mixtral):
    mixtral.set_experts_implementation("batched_mm")
    SCORES["wanda"](mixtral, list(TOKENS))
    assert mixtral.get_experts_implementation()[""] == "batched_mm"


@pytest.mark.parametrize("layers", [2, 3])
def test_under_global_priority_each_expert_has_a_width_of_its_own(mixtral, layers):
    scores = SCORES["magnitude"](mixtral, [])
    even = replace(shape_of(mixtral.config), neurons=6, experts=3, layers=layers)
    shape = spread(even, mixtral.config, scores, layers="symmetric", multiple=1)
    assert sum(shape.layer_neurons) == 6 * 3 * layers and len(set(shape.layer_neurons)) > 2
    student, config = prune(mixtral, scores, shape), mixtral.config.to_dict()
    kept = choose_units(scores, shape, config)
    with torch.no_grad():
        dense = masked(mixtral, student, kept, config)
        with RoutingAmong(kept, dense, config):
            expected = dense(TOKENS[0]).logits
        torch.testing.assert_close(student(TOKENS[0]).logits, expected, rtol=1e-9, atol=1e-9)


def cut(model):
    scores = SCORES["magnitude"](model, [])
    sizes = dims(model.config)
    shape = replace(shape_of(model.config), hidden=sizes.hidden // 2, neurons=5, experts=3, layers=2)
    return scores, shape


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe"])
def test_files_are_cut_as_the_model_in_memory(kind, tmp_path):
    """As transformers saves them, a tensor for each expert or one for all, and as they are called in memory."""
    model = small(kind, torch.float32)
    config = model.config.to_dict()
    scores, shape = cut(model)
    expected = prune(model, scores, shape)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "merged").mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "merged" / "model.safetensors")
    (tmp_path / "merged" / "config.json").write_text((tmp_path / "saved" / "config.json").read_text())
    for source in ("saved", "merged"):
        check_weights(tmp_path / source, config)
        out = tmp_path / f"student of {source}"
        out.mkdir()
        prune_checkpoint(tmp_path / source, scores, shape, out)
        found = AutoModelForCausalLM.from_pretrained(out)
        for (name, one), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
            assert torch.equal(one, other), (source, name)
        check_weights(out, json.loads((out / "config.json").read_text()))
        # Under the names of published files, now and when what was loaded is saved again, as `export` does.
        published = dict.fromkeys(tensors_of(tmp_path / "saved"))
        found.save_pretrained(tmp_path / f"again of {source}")
        for folder in (out, tmp_path / f"again of {source}"):
            names = tensors_of(folder)
            assert names.keys() <= published.keys()
            assert count_params(found.config.to_dict()) == sum(prod(t.shape) for t in names.values())


@pytest.mark.parametrize("multiple", [1, 4])
def test_experts_of_any_width_train(multiple):
    """Fused kernels take rows of a multiple of 16 bytes; others run one after another."""
    sizes = {"hidden_size": 5 * multiple, "intermediate_size": 3 * multiple, "head_dim": 4, "num_attention_heads": 1}
    model = new_model({**MIXTRAL, **sizes, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 40}, 0)
    assert model.get_experts_implementation()[""] == ("eager" if multiple == 1 else "grouped_mm")
    model.train()(TOKENS[0], labels=TOKENS[0]).loss.backward()
    assert model.get_parameter("model.layers.0.mlp.experts.down_proj").grad.abs().sum() > 0


def test_a_tensor_of_an_expert_that_is_missing_is_named(mixtral, tmp_path):
    mixtral.float().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    del held[lost]
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"1 tensor missing \({lost}\)"):
        check_weights(tmp_path, mixtral.config.to_dict())


@pytest.mark.parametrize("method", ["activation", "wanda"])
def test_inputs_of_experts_that_lie_on_several_ranks_are_refused(mixtral, method, monkeypatch):
    """What runs there are not the model's own parameters: every neuron would have a score of zero."""
    monkeypatch.setattr(reading, "DTensor", torch.nn.Parameter)
    with pytest.raises(ConfigError, match="sharded over ranks"):
        SCORES[method](mixtral, list(TOKENS))


def test_biases_of_experts_do_not_decay():
    model = small("gpt_oss", torch.float32)
    decaying, others = make_optimizer(model, OptimConfig()).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert [n for n in (names[id(p)] for p in decaying["params"]) if n.endswith("bias")] == []
    assert any("down_proj_bias" in names[id(p)] for p in others["params"])


def test_layers_without_experts_are_told_from_those_with(tmp_path):
    """Of such a model no table is known: it is counted as it is, and can teach."""
    config = completed({**probe_of({"model_type": "qwen3_moe"}), "mlp_only_layers": [0, 1]})
    with torch.device("meta"):
        built = sum(p.numel() for p in from_config(config).parameters())
    assert count_params(config) == built
    with pytest.raises(ConfigError, match="cannot be scored or cut yet"):
        cuttable(config)


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def test_shapes_have_as_many_experts_as_asked_for():
    full = count_params(MIXTRAL)
    for share, experts in ((0.5, None), (0.3, 4), (0.2, 2)):
        shape = choose_shape(MIXTRAL, int(share * full), experts=experts)
        assert shape.params == pytest.approx(share * full, rel=0.005) and shape.experts == (experts or 8)
    assert fixed_shape(MIXTRAL, "16x2048x32x4096", experts=4).experts == 4
    rungs = {"8": MIXTRAL, "4": {**MIXTRAL, "num_local_experts": 4}}
    assert common_shape(rungs, int(0.2 * full)).experts == 4
    assert common_shape(rungs, int(0.1 * full), experts=2).experts == 2
    with pytest.raises(ConfigError, match=r"prune.experts=2 leaves at most 12,879,138,816 parameters"):
        choose_shape(MIXTRAL, 20_000_000_000, experts=2)
    others = {"8": MIXTRAL, "9": MIXTRAL, "k": {**MIXTRAL, "num_experts_per_tok": 4}}
    with pytest.raises(ImpossibleCell, match=r"a token is routed to 4 of its experts, but to 2 of the student's"):
        student_shape(others, others["k"], int(0.2 * full), policy="common", multiple=8)


@pytest.mark.parametrize(
    ("config", "experts", "why"),
    [
        (MIXTRAL, 1, "8 experts in each layer, and routes each token to 2 of them. Set a number from 2 to 8"),
        (MIXTRAL, 9, "Set a number from 2 to 8"),
        (FAMILIES["pico"].rungs["120k"], 2, "not a mixture of experts"),
    ],
)
def test_a_number_of_experts_that_cannot_be_is_refused(config, experts, why):
    with pytest.raises(ConfigError, match=why):
        choose_shape(config, int(0.5 * count_params(config)), experts=experts, multiple=1)


def test_flops_are_those_of_the_experts_that_a_token_goes_through():
    """Mixtral 8x7B: 46.7B parameters, of which a token reads 12.9B (arXiv 2401.04088, §2.1)."""
    assert count_params(MIXTRAL) == pytest.approx(46.7e9, rel=0.001)
    assert multiplied(MIXTRAL) == pytest.approx(12.9e9 - 32000 * 4096, rel=0.002)
