"""Scores against the very masks they differentiate, surgery against the masked dense model."""

import contextlib
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from capacity_gap.errors import ConfigError, ImpossibleCell
from capacity_gap.models.axes import count_params, dims
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import save_model
from capacity_gap.pruning import choose_shape, common_shape, expressive_scores, prune
from capacity_gap.pruning.scores import Scores, random_scores
from capacity_gap.pruning.shape import Shape, student_config, unfit
from capacity_gap.pruning.surgery import choose_units, symmetric_layers

PICO = FAMILIES["pico"]


def model_of(**changes):
    """A small Llama with grouped queries, in double precision."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # transformers computes it in fp32, too coarse to differentiate
            module.forward = lambda x, n=module: _norm(x, x, n)
    return model


def _norm(x, over, module):
    return module.weight * x * torch.rsqrt(over.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


TOKENS = torch.randint(0, 40, (3, 4, 10), generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def masked(model, heads=None, neurons=None, hidden=None):
    """Multiplies by masks exactly where METHOD §2 puts them."""
    hooks = []
    width = model.config.head_dim * model.config.num_attention_heads // model.config.num_key_value_heads

    def times(mask):
        return lambda _m, inputs: (inputs[0] * mask,)

    def scale(_m, _i, output):
        return (output[0] * hidden, *output[1:]) if isinstance(output, tuple) else output * hidden

    for i, layer in enumerate(model.model.layers):
        if heads is not None:
            spread = heads[i].repeat_interleave(width)
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(times(spread)))
        if neurons is not None:
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(times(neurons[i])))
        if hidden is not None:
            hooks += [layer.self_attn.register_forward_hook(scale), layer.mlp.register_forward_hook(scale)]
            hooks.append(layer.register_forward_hook(scale))
            # The stream after attention is read twice, by the norm and by the next sum: scale it once, for both.
            hooks.append(_scale_mid_stream(layer, hidden))
    if hidden is not None:
        hooks.append(model.model.embed_tokens.register_forward_hook(scale))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


class _scale_mid_stream:  # noqa: N801
    """Runs a layer as written in the Llama paper, with the mid stream masked."""

    def __init__(self, layer, hidden):
        self.layer, self.plain = layer, layer.forward

        def forward(hidden_states, **kwargs):
            attended, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
            middle = (hidden_states + attended) * hidden
            return middle + layer.mlp(layer.post_attention_layernorm(middle))

        layer.forward = forward

    def remove(self):
        self.layer.forward = self.plain


def loss_of(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("axis", ["heads", "neurons", "hidden"])
def test_scores_are_central_differences_of_the_loss_under_those_masks(axis):
    model = model_of()
    scores = getattr(expressive_scores(model, TOKENS), axis)
    shape, step = scores.shape, 1e-5
    measured = torch.zeros(shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        for tokens in TOKENS:
            ends = []
            for sign in (1, -1):
                mask = torch.ones(shape, dtype=torch.float64)
                mask[tuple(index)] += sign * step
                with masked(model, **{axis: mask}):
                    ends.append(loss_of(model, tokens))
            measured[tuple(index)] += abs(ends[0] - ends[1]) / (2 * step)
    measured /= measured.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(scores.double(), measured, rtol=2e-4, atol=1e-6)


def test_scoring_leaves_the_model_as_it_was():
    model = model_of()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expressive_scores(model, TOKENS)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.embed_tokens.weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_permuting_units_permutes_scores():
    model, order = model_of(), torch.randperm(12, generator=torch.Generator().manual_seed(2))
    scores = expressive_scores(model, TOKENS)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.copy_(linear.weight[order])
            layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    torch.testing.assert_close(expressive_scores(model, TOKENS).neurons, scores.neurons[:, order])


def test_the_absolute_value_is_taken_per_batch():
    model = model_of()
    apart = expressive_scores(model, TOKENS)
    together = expressive_scores(model, [TOKENS.flatten(0, 1)])
    assert not torch.allclose(apart.neurons, together.neurons, rtol=1e-3)


def test_nan_weights_are_refused():
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(Exception, match="NaN or infinity"):
        expressive_scores(model, TOKENS)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        prune(model, random_scores(model, ()), Shape(16, 4, 2, 6, 8, 3, 0))


def sliced_and_masked(**sizes):
    model = model_of()
    scores = expressive_scores(model, TOKENS)
    full = dims(model.config)
    shape = Shape(full.hidden, full.heads, full.kv_heads, full.head_dim, full.neurons, full.layers, 0)
    shape = dataclasses.replace(shape, **sizes)
    kept = choose_units(scores, shape, full.layers)
    return model, prune(model, scores, shape), kept


def test_sliced_heads_and_neurons_equal_the_masked_dense_model():
    model, student, kept = sliced_and_masked(heads=2, kv_heads=1, neurons=5)
    heads, neurons = torch.zeros(3, 2).double(), torch.zeros(3, 12).double()
    heads.scatter_(1, kept.heads, 1.0)
    neurons.scatter_(1, kept.neurons, 1.0)
    with masked(model, heads=heads, neurons=neurons):
        expected = model(TOKENS[0]).logits
    torch.testing.assert_close(student(TOKENS[0]).logits, expected)


def test_sliced_hidden_equals_the_masked_dense_model_with_norms_over_the_kept_units():
    model, student, kept = sliced_and_masked(hidden=8)
    mask = torch.zeros(16).double()
    mask[kept.hidden] = 1.0
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    for norm in norms:
        norm.forward = lambda x, n=norm: _norm(x, x[..., kept.hidden], n)
    for norm in (m for m in student.modules() if type(m).__name__ == "LlamaRMSNorm"):
        norm.forward = lambda x, n=norm: _norm(x, x, n)
    with masked(model, hidden=mask):
        expected = model(TOKENS[0]).logits
    torch.testing.assert_close(student(TOKENS[0]).logits, expected)


def test_sliced_layers_equal_the_model_without_them():
    model, student, kept = sliced_and_masked(layers=1)
    assert kept.layers == [1]
    model.model.layers = torch.nn.ModuleList([model.model.layers[1]])
    torch.testing.assert_close(student(TOKENS[0]).logits, model(TOKENS[0]).logits)


def test_layers_go_evenly_from_both_ends():
    assert symmetric_layers(32, 24) == list(range(4, 28))
    assert symmetric_layers(4, 3) == [0, 1, 2]
    assert symmetric_layers(4, 4) == [0, 1, 2, 3]


def test_an_unpruned_student_is_its_teacher():
    model, student, _ = sliced_and_masked()
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in student.named_parameters())


def test_saved_then_loaded_by_plain_transformers_in_a_fresh_process(tmp_path):
    _, student, _ = sliced_and_masked(heads=2, kv_heads=1, neurons=5, hidden=8, layers=2)
    save_model(student, tmp_path)
    torch.save(student(TOKENS[0]).logits, tmp_path / "logits.pt")
    torch.save(TOKENS[0], tmp_path / "tokens.pt")
    script = (
        "import sys, torch, transformers as t\n"
        f"m = t.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float64).eval()\n"
        f"x = torch.load({str(tmp_path / 'tokens.pt')!r}, weights_only=True)\n"
        f"torch.testing.assert_close(m(x).logits, torch.load({str(tmp_path / 'logits.pt')!r}, weights_only=True))\n"
        "out = m.generate(x[:, :4], max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)\n"
        "slow = m.generate(x[:, :4], max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)\n"
        "assert out.shape == (4, 9) and torch.equal(out, slow)\n"
        "assert not any(name.split('.')[0] == 'capacity_gap' for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


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
    with pytest.raises(ConfigError, match=r"no student of 100 parameters.*nearest sizes that can: 1,173"):
        choose_shape(PICO.rungs["55k"], 100, multiple=1)
    with pytest.raises(ConfigError, match="nearest sizes"):
        choose_shape(PICO.rungs["55k"], 90_000, multiple=1)
    with pytest.raises(ConfigError, match="depth=9 is not between 1 and the 4 layers"):
        choose_shape(PICO.rungs["55k"], 40_000, depth=9, multiple=1)
    with pytest.raises(ConfigError, match=r"policy='sideways'.*Allowed: local"):
        choose_shape(PICO.rungs["55k"], 40_000, "sideways")
    with pytest.raises(ImpossibleCell, match="cannot hold the common student.*hidden"):
        student_config(PICO.rungs, PICO.rungs["55k"], 90_000, policy="common", multiple=1)


def test_unfit_names_every_axis():
    small = dims(PICO.rungs["55k"])
    assert unfit(Shape(999, 3, 3, 8, 999, 9, 0), small) == ["hidden 999 > 24", "neurons 999 > 73", "layers 9 > 4"]


def test_no_table_names_those_there_are():
    with pytest.raises(ConfigError, match=r"no axis table for the architecture 'bloom'.*llama, mistral"):
        count_params({"model_type": "bloom"})


def test_scores_round_trip_and_random_ones_follow_their_seed(tmp_path):
    model = model_of()
    one, two = (random_scores(model, (), seed=s) for s in (0, 1))
    assert torch.equal(one.hidden, random_scores(model, (), seed=0).hidden)
    assert not torch.equal(one.hidden, two.hidden)
    one.save(tmp_path)
    again = Scores.load(tmp_path)
    assert torch.equal(again.heads, one.heads)
    assert again.method == "random"
