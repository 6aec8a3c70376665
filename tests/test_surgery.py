"""Every architecture, every axis: what is cut equals the dense model with the removed units masked."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from capacity_gap.models.axes import architecture, count, count_params, dims, pattern_of
from capacity_gap.models.layers import symmetric_layers
from capacity_gap.models.loading import save_model
from capacity_gap.pruning import choose_shape, expressive_scores, prune
from capacity_gap.pruning.kept_layers import kept_layers
from capacity_gap.pruning.kept_units import choose_units
from capacity_gap.pruning.lm_loss import lm_loss
from capacity_gap.pruning.methods import random_scores
from capacity_gap.pruning.shape import Shape, between, shape_of
from capacity_gap.pruning.surgery import prune_checkpoint
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure.architecture import place
from tests.small_models import SMALL, TOKENS, exact_norms, logits_of, masked, small_model

GROUPED = ("llama", "llama with biases", "mistral", "qwen2", "qwen3")


def shape_with(model, **sizes):
    return dataclasses.replace(shape_of(model.config), **sizes)


def smaller(model):
    """A shape that cuts every axis."""
    if architecture(model.config).square:
        return shape_with(model, hidden=8, heads=2, kv_heads=2, neurons=5, layers=2)
    return shape_with(model, hidden=8, heads=2, kv_heads=2 // dims(model.config).group, neurons=5, layers=2)


def query_mask(kept, sizes):
    mask = torch.zeros(len(kept.heads), sizes.heads).double()
    for layer, heads in enumerate(kept.heads):
        mask[layer, heads] = 1.0
    return mask


def neuron_mask(kept, sizes):
    mask = torch.zeros(len(kept.neurons), sizes.neurons).double()
    for layer, units in enumerate(kept.neurons):
        mask[layer, units] = 1.0
    return mask


def logits(model):
    return logits_of(model, TOKENS[0])


@pytest.mark.parametrize("name", SMALL)
def test_sliced_units_equal_the_masked_dense_model(name):
    """Heads, neurons and hidden at once: norms of the masked model take their statistics over the kept units."""
    model = small_model(name)
    shape = dataclasses.replace(smaller(model), layers=3)
    scores = expressive_scores(model, TOKENS)
    kept = choose_units(scores, shape, model.config)
    student = prune(model, scores, shape)
    exact_norms(student)
    mask = torch.zeros(16).double()
    mask[kept.hidden] = 1.0
    exact_norms(model, kept.hidden)
    sizes = dims(model.config)
    with masked(model, queries=query_mask(kept, sizes), neurons=neuron_mask(kept, sizes), hidden=mask):
        expected = logits(model)
    torch.testing.assert_close(logits(student), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("axis", ["neurons", "heads"])
def test_each_axis_alone(name, axis):
    model = small_model(name)
    square = architecture(model.config).square
    if axis == "heads" and square:
        pytest.skip("heads and hidden are tied here: cut together, above")
    cut = {"neurons": 5} if axis == "neurons" else {"heads": 2, "kv_heads": 2 // dims(model.config).group}
    shape, scores = shape_with(model, **cut), expressive_scores(model, TOKENS)
    kept, sizes = choose_units(scores, shape, model.config), dims(model.config)
    student = prune(model, scores, shape)
    exact_norms(student)
    with masked(model, queries=query_mask(kept, sizes), neurons=neuron_mask(kept, sizes)):
        expected = logits(model)
    torch.testing.assert_close(logits(student), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_sliced_layers_equal_the_model_without_them(name):
    model = small_model(name)
    scores = expressive_scores(model, TOKENS)
    student = prune(model, scores, shape_with(model, layers=1))
    exact_norms(student)
    for stack in architecture(model.config).stacks:
        parent, _, last = stack.layer.replace(".{i}", "").rpartition(".")
        holder = model.get_submodule(parent)
        first, middle = getattr(holder, last)[:2]
        if model.config.is_encoder_decoder:  # the first layer's relative bias serves all
            bias = first.layer[0].SelfAttention.relative_attention_bias
            middle.layer[0].SelfAttention.relative_attention_bias = bias
            middle.layer[0].SelfAttention.has_relative_attention_bias = True
        setattr(holder, last, torch.nn.ModuleList([middle]))
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_an_unpruned_student_is_its_teacher(name):
    model = small_model(name)
    student = prune(model, random_scores(model, ()), shape_of(model.config))
    weights = dict(model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in student.named_parameters())


@pytest.mark.parametrize("name", SMALL)
def test_counts_are_as_promised(name):
    model = small_model(name)
    assert count_params(model.config) == sum(p.numel() for p in model.parameters())
    shape = smaller(model)
    student = prune(model, random_scores(model, ()), shape)
    built = sum(p.numel() for p in student.parameters())
    assert built == count_params(student.config) == count_params(student.config.to_dict())


@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_cut_on_disk_is_the_model_cut_in_memory(name, tmp_path):
    model = small_model(name)
    (tmp_path / "student").mkdir()
    model.save_pretrained(tmp_path / "teacher", max_shard_size="4KB")
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 1
    scores, shape = random_scores(model, (), seed=3), smaller(model)
    prune_checkpoint(tmp_path / "teacher", scores, shape, tmp_path / "student", shard_bytes=2000)
    assert len(list((tmp_path / "student").glob("*.safetensors"))) > 1
    loaded = type(model).from_pretrained(tmp_path / "student").eval()
    expected = dict(prune(model, scores, shape).named_parameters())
    assert loaded.dtype == torch.float64
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], p) for n, p in expected.items())


def test_a_checkpoint_without_safetensors_is_refused(tmp_path):
    model = small_model()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pickled ones .* are not read"):
        prune_checkpoint(tmp_path, random_scores(model, ()), smaller(model), tmp_path)


@pytest.mark.slow
def test_saved_then_loaded_by_plain_transformers_in_a_fresh_process(tmp_path):
    kinds = []
    for number, name in enumerate(SMALL):
        student = prune(small_model(name), random_scores(small_model(name), ()), smaller(small_model(name)))
        save_model(student, tmp_path / str(number))
        torch.save(logits(student), tmp_path / str(number) / "logits.pt")
        kinds.append(student.config.is_encoder_decoder)
    torch.save(TOKENS[0], tmp_path / "tokens.pt")
    script = (
        "import sys, torch, transformers as t\n"
        f"x = torch.load({str(tmp_path / 'tokens.pt')!r}, weights_only=True)\n"
        f"for n, two in enumerate({kinds}):\n"
        f"    folder = {str(tmp_path)!r} + '/' + str(n)\n"
        "    kind = t.AutoModelForSeq2SeqLM if two else t.AutoModelForCausalLM\n"
        "    m = kind.from_pretrained(folder, dtype=torch.float64).eval()\n"
        "    found = m(input_ids=x[:, :5], labels=x[:, 5:].contiguous()) if two else m(x[:, :-1])\n"
        "    torch.testing.assert_close(found.logits, torch.load(folder + '/logits.pt', weights_only=True))\n"
        "    ends = {'do_sample': False, 'max_new_tokens': 5, 'pad_token_id': 1, 'eos_token_id': None}\n"
        "    out = m.generate(x[:, :4], use_cache=True, **ends)\n"
        "    slow = m.generate(x[:, :4], use_cache=False, **ends)\n"
        "    assert out.shape == (4, 6 if two else 9) and torch.equal(out, slow), folder\n"
        "assert not any(name.split('.')[0] == 'capacity_gap' for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


CUT_ON_DISK = """
import json, sys, threading
from pathlib import Path
import torch
from capacity_gap.models.axes import dims
from capacity_gap.pruning.scores import Scores
from capacity_gap.pruning.shape import choose_shape
from capacity_gap.pruning.surgery import prune_checkpoint
teacher, out = map(Path, sys.argv[1:])
config = json.loads((teacher / "config.json").read_text())
sizes = dims(config)
shapes = (sizes.layers, sizes.kv_heads), (sizes.layers, sizes.neurons), (sizes.hidden,)
scores, shape = Scores(*map(torch.rand, shapes), method="random"), choose_shape(config, 60_000_000)
import safetensors.torch
seen, done = [], threading.Event()
def held():  # memory of its own: pages of mapped files count as resident too, and the kernel may take them back
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
def watch():
    while not done.wait(0.002):
        seen.append(held())
before, watcher = held(), threading.Thread(target=watch)
watcher.start()
prune_checkpoint(teacher, scores, shape, out)
done.set(), watcher.join()
print(max(seen) - before)
"""


@pytest.mark.slow
def test_surgery_on_disk_never_holds_the_teacher(tmp_path):
    """The same at 2.4 GB, libraries included: `python -m benchmarks.surgery`."""
    from benchmarks import surgery

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
    config = {**surgery.CONFIG, **sizes, "num_hidden_layers": 10, "vocab_size": 16000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "CONFIG", config)
        patch.setattr(surgery, "SHARD", 4e7)
        size = surgery.write_checkpoint(tmp_path / "teacher")
    (tmp_path / "student").mkdir()
    command = [sys.executable, "-c", CUT_ON_DISK, str(tmp_path / "teacher"), str(tmp_path / "student")]
    # What is freed goes back at once: else it depends on the allocator how much of it is held on.
    calm = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=calm)
    assert int(done.stdout) < 0.4 * size
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert abs(count_params(config) / 60e6 - 1) < 0.005


# Groups of queries


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 3), (1, 1)])
def test_a_student_with_smaller_groups_or_none_equals_the_masked_dense_model(name, heads, kv_heads):
    model = small_model(name, hidden_size=24)
    shape, scores = shape_with(model, heads=heads, kv_heads=kv_heads), expressive_scores(model, TOKENS)
    kept, sizes = choose_units(scores, shape, model.config), dims(model.config)
    student = prune(model, scores, shape)
    exact_norms(student)
    assert dims(student.config).group == heads // kv_heads
    with masked(model, queries=query_mask(kept, sizes)):
        expected = logits(model)
    torch.testing.assert_close(logits(student), expected, rtol=1e-9, atol=1e-9)


def test_smaller_groups_keep_the_best_queries_of_the_best_groups():
    model = small_model("llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=24)
    scores = random_scores(model, ())
    scores.heads[:] = torch.tensor([0.0, 1.0])
    scores.queries[:] = torch.tensor([9.0, 9, 9, 1, 3, 2])
    kept = choose_units(scores, shape_with(model, heads=2, kv_heads=1), model.config)
    assert kept.heads[0].tolist() == [4, 5]
    assert kept.kv_heads[0].tolist() == [1]
    kept = choose_units(scores, shape_with(model, heads=4, kv_heads=4), model.config)
    assert kept.heads[0].tolist() == [0, 1, 2, 4]
    assert kept.kv_heads[0].tolist() == [0, 0, 0, 1]


# Global priority


def uneven(model):
    shape = shape_with(model, neurons=6) if architecture(model.config).square else smaller(model)
    shape = dataclasses.replace(shape, layers=3, neurons=6)
    scores = expressive_scores(model, TOKENS)
    scores.neurons[0] *= 3  # so that layers do differ
    return choose_shape_global(model, shape, scores), scores


def choose_shape_global(model, shape, scores):
    from capacity_gap.pruning.shape import spread

    return spread(shape, model.config, scores, layers="symmetric", multiple=1)


@pytest.mark.parametrize("name", SMALL)
def test_a_global_student_equals_the_masked_dense_model(name):
    model = small_model(name)
    shape, scores = uneven(model)
    assert len(set(shape.layer_neurons)) > 1
    assert sum(shape.layer_neurons) == len(shape.layer_neurons) * shape.neurons
    kept, sizes = choose_units(scores, shape, model.config), dims(model.config)
    student = prune(model, scores, shape)
    assert dims(student.config).neurons == max(shape.layer_neurons)
    hidden = torch.zeros(16).double()
    hidden[kept.hidden] = 1.0
    exact_norms(student)
    exact_norms(model, kept.hidden)
    with masked(model, queries=query_mask(kept, sizes), neurons=neuron_mask(kept, sizes), hidden=hidden):
        expected = logits(model)
    torch.testing.assert_close(logits(student), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_training_leaves_the_zeros_of_a_global_student_zero(name):
    model = small_model(name)
    shape, scores = uneven(model)
    student = prune(model, scores, shape).train()
    table = architecture(model.config)
    row = min(range(len(shape.layer_neurons)), key=lambda i: shape.layer_neurons[i])
    name = table.unit_maps("neurons", 3)[row]
    down = student.get_parameter(name)
    axis = [place(a)[0] for a in table.parameters[pattern_of(table, name)[0]]].index("neurons")
    padding = down.detach().narrow(axis, shape.layer_neurons[row], down.shape[axis] - shape.layer_neurons[row])
    assert padding.numel()
    zeros = {n: p.detach() == 0 for n, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for tokens in TOKENS:
        lm_loss(student, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (padding == 0).all()
    for n, p in student.named_parameters():
        assert (p.detach()[zeros[n]] == 0).all(), n
        assert (p.detach()[~zeros[n]] != 0).all(), n


def test_global_counts_follow_the_scores_and_keep_multiples():
    model = small_model()
    scores = random_scores(model, ())
    scores.neurons[:] = torch.tensor([3.0, 2.0, 1.0])[:, None] + torch.linspace(0, 0.1, 12)
    shape = choose_shape_global(model, shape_with(model, neurons=8), scores)
    assert shape.layer_neurons == (12, 11, 1)
    four = dataclasses.replace(shape_with(model, neurons=8))
    from capacity_gap.pruning.shape import spread

    assert spread(four, model.config, scores, layers="symmetric", multiple=4).layer_neurons == (12, 8, 4)


def test_policy_global_needs_scores_and_keeps_the_size():
    model = small_model()
    target = int(0.6 * count_params(model.config))
    with pytest.raises(ConfigError, match="needs scores"):
        choose_shape(model.config, target, "global", multiple=1)
    scores = expressive_scores(model, TOKENS)
    shape = choose_shape(model.config, target, "global", scores=scores, multiple=1)
    student = prune(model, scores, shape)
    active = sum(int((p != 0).sum()) for p in student.parameters())
    assert active == shape.params == choose_shape(model.config, target, multiple=1).params
    assert abs(shape.params / target - 1) < 0.005
    assert count_params(student.config) > active


# Layers, steps, bad input


def test_layers_go_evenly_from_both_ends_or_by_score():
    assert symmetric_layers(32, 24) == list(range(4, 28))
    assert symmetric_layers(4, 3) == [0, 1, 2]
    assert symmetric_layers(4, 4) == [0, 1, 2, 3]
    llama, t5 = small_model().config, small_model("t5").config
    scores = dataclasses.replace(random_scores(small_model(), ()), layers=torch.tensor([0.3, 0.1, 0.2]))
    assert kept_layers(scores, llama, 2, "block_influence") == [[0, 2]]
    with pytest.raises(ConfigError, match=r"layers=loss_increase needs layer scores"):
        kept_layers(dataclasses.replace(scores, layers=None), llama, 2, "loss_increase")
    both = dataclasses.replace(scores, layers=torch.tensor([0.3, 0.1, 0.2, 0.1, 0.3, 0.2]))
    assert kept_layers(both, t5, 2, "block_influence") == [[0, 2], [1, 2]]
    assert kept_layers(both, t5, 1, "symmetric") == [[1], [1]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "t5"])
def test_shapes_on_the_way_are_legal_and_hold_the_end(name):
    model = small_model(name)
    table, full = architecture(model.config), dims(model.config)
    final = smaller(model)
    for share in (0.25, 0.5, 0.75):
        middle = between(full, final, share, table)
        for axis in ("hidden", "kv_heads", "neurons", "layers"):
            assert getattr(final, axis) <= getattr(middle, axis) <= getattr(full, axis)
        assert prune(model, random_scores(model, ()), middle).config is not None
    assert between(full, final, 1.0, table).neurons == final.neurons


def test_fixed_shapes():
    llama = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False}
    llama |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape = choose_shape(llama, 2_900_000_000, "fixed", fixed="24x3072x24x8192")
    assert (shape.layers, shape.hidden, shape.heads, shape.neurons) == (24, 3072, 24, 8192)
    expanded = choose_shape({**llama, "vocab_size": 49216}, 3_000_000_000, "fixed", fixed="24x3072x24x8192")
    assert abs(expanded.params / 3.0e9 - 1) < 0.01, "the published 3B, with its expanded vocabulary"
    with pytest.raises(ConfigError, match="cannot be read"):
        choose_shape(llama, 2_900_000_000, "fixed", fixed="24x3072")
    with pytest.raises(ConfigError, match=r"has 2,914,667,520 parameters.*Set student=2914667520"):
        choose_shape(llama, 1_000_000_000, "fixed", fixed="24x3072x24x8192")
    gpt2 = small_model("gpt2").config
    with pytest.raises(ConfigError, match=r"ties hidden = heads × 4.*Use hidden 8, or 3 heads"):
        choose_shape(gpt2, 2000, "fixed", fixed="2x12x2x8")


def test_a_quantised_model_is_refused():
    model = small_model()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(12, 16, dtype=torch.int8), False)
    with pytest.raises(ConfigError, match="a quantised teacher cannot be scored or pruned"):
        random_scores(model, ())


def test_a_shape_that_does_not_fit_names_every_axis():
    with pytest.raises(ConfigError, match=r"hidden 99 > 16; heads 8 > 4; neurons 99 > 12; layers 9 > 3"):
        prune(small_model(), random_scores(small_model(), ()), Shape(99, 8, 4, 6, 99, 9, 0))


def test_nan_weights_are_refused():
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(Exception, match="NaN or infinity"):
        expressive_scores(model, TOKENS)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        prune(model, random_scores(model, ()), shape_with(model, neurons=8))


def test_the_tables_know_every_parameter():
    for name in SMALL:
        model = small_model(name)
        table, sizes = architecture(model.config), dims(model.config)
        named = {n.replace(f".{i}.", ".{i}.", 1) for i in range(3) for n, _ in model.named_parameters()}
        named |= {n for n, _ in model.named_parameters()}
        assert set(table.parameters) <= named | {table.output}, name
        assert count(table, sizes) == sum(p.numel() for p in model.parameters()), name
        assert json.dumps(model.config.to_dict(), default=str)
