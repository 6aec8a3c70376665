"""What belongs to a layer's number goes with the layer when others are cut away."""

import json

import pytest
import torch
from transformers import AutoConfig

from capacity_gap.cell import pipeline
from capacity_gap.commands import cli
from capacity_gap.models import loading
from capacity_gap.models.axes import config_with, dims
from capacity_gap.models.layers import of_kept_layers, renumbered, symmetric_layers
from capacity_gap.pruning.methods import random_scores
from capacity_gap.pruning.scores import Scores
from capacity_gap.pruning.shape import Shape, fixed_shape
from capacity_gap.pruning.surgery import prune, prune_checkpoint
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.stage import Store
from tests.conftest import compose
from tests.small_models import SMALL, TOKENS

WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
NUMBERED = {
    "qwen2": {**WINDOWS, "num_hidden_layers": 6},
    "qwen3": {**WINDOWS, "num_hidden_layers": 6, "layer_types": ["full_attention", "sliding_attention"] * 3},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 6, "n_positions": 64},
}


def numbered(kind):
    """A model of six layers in which a layer's number matters, every parameter random."""
    config = AutoConfig.for_model(kind, **{**SMALL[kind][1], **NUMBERED[kind]})
    model = loading.new_model(config.to_dict(), 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def logits_without(model, gone):
    """What the teacher itself computes when some of its layers pass their input on."""

    def passes(_module, inputs, named, output):
        stream = inputs[0] if inputs else named["hidden_states"]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hooks = [layers_of(model)[i].register_forward_hook(passes, with_kwargs=True) for i in gone]
    with torch.no_grad():
        found = model(TOKENS[0]).logits
    for hook in hooks:
        hook.remove()
    return found


def scored(model, best):
    """Scores by which the given layers stay, and all else of them."""
    ranks = torch.zeros(6)
    ranks[best] = 1.0
    found = random_scores(model, ())
    return Scores(found.heads, found.neurons, found.hidden, "random", found.queries, ranks)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("kept", [[1, 2, 3, 4], [0, 2, 5], [2, 3, 4, 5], [5]])
@pytest.mark.parametrize("kind", NUMBERED)
def test_a_student_of_fewer_layers_computes_what_they_did(kind, kept, on_disk, tmp_path):
    model = numbered(kind)
    sizes = dims(model.config)
    shape = fixed_shape(model.config, f"{len(kept)}x{sizes.hidden}x{sizes.heads}x{sizes.neurons}x{sizes.kv_heads}")
    if on_disk:
        loading.save_model(model, tmp_path / "teacher")
        (tmp_path / "student").mkdir()
        scores = scored(model, kept)
        prune_checkpoint(tmp_path / "teacher", scores, shape, tmp_path / "student", layers="block_influence")
        student = loading.load_model(tmp_path / "student")
    else:
        student = prune(model, scored(model, kept), shape, layers="block_influence")
    with torch.no_grad():
        found = student(TOKENS[0]).logits
    torch.testing.assert_close(found, logits_without(model, set(range(6)) - set(kept)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", NUMBERED)
def test_the_middle_layers_are_planned_as_they_are_cut(kind):
    model = numbered(kind)
    teacher, sizes = model.config.to_dict(), dims(model.config)
    shape = fixed_shape(teacher, f"4x{sizes.hidden}x{sizes.heads}x{sizes.neurons}x{sizes.kv_heads}")
    student = prune(model, random_scores(model, ()), shape)
    planned = config_with(teacher, dims(student.config))
    assert planned.get("layer_types") == getattr(student.config, "layer_types", None)
    torch.testing.assert_close(student(TOKENS[0]).logits, logits_without(model, {0, 5}), atol=1e-4, rtol=1e-4)


def qwen(**more):
    return {"model_type": "qwen2", "num_hidden_layers": 6, "num_attention_heads": 4, **more}


FULL, SLIDING = "full_attention", "sliding_attention"


def test_kinds_of_layers_follow_their_layers():
    said = qwen(layer_types=[FULL, FULL, SLIDING, SLIDING, SLIDING, FULL], max_window_layers=2)
    found = of_kept_layers(said, "num_hidden_layers", [1, 2, 5])
    assert found == {"layer_types": [FULL, SLIDING, FULL], "max_window_layers": 1}
    derived = qwen(use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert of_kept_layers(derived, "num_hidden_layers", [2, 3])["layer_types"] == [FULL, SLIDING]
    assert of_kept_layers(derived, "num_hidden_layers", range(6)) == {}, "nothing goes, nothing is said"
    assert of_kept_layers(derived, "num_hidden_layers", range(4)) == {}, "what transformers assumes is right"
    assert of_kept_layers(qwen(max_window_layers=3), "num_hidden_layers", [4, 5]) == {}, "all attend to all"


def test_other_lists_that_name_layers_are_refused_where_layers_go():
    config = {"model_type": "llama", "num_hidden_layers": 6, "mlp_only_layers": [0, 4], "hidden_size": 8}
    assert of_kept_layers(config, "num_hidden_layers", range(6)) == {}
    with pytest.raises(ConfigError, match=r"mlp_only_layers=\[0, 4\].*Keep all layers"):
        of_kept_layers(config, "num_hidden_layers", range(5))


def test_only_what_a_plan_does_not_show_is_named_in_an_identity():
    mixed, scaled = qwen(**WINDOWS), {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}
    assert not renumbered(mixed, 6, 4, symmetric=True), "its planned layer_types say it"
    assert renumbered(mixed, 6, 4, symmetric=False)
    assert renumbered(scaled, 6, 4, symmetric=True)
    assert not renumbered(scaled, 4, 3, symmetric=True), "the first three keep their numbers"
    assert not renumbered(scaled, 4, 4, symmetric=False)
    assert not renumbered(qwen(), 6, 4, symmetric=False)
    assert symmetric_layers(32, 24) == list(range(4, 28))


@pytest.fixture(scope="module")
def windows(tmp_path_factory, text_file):
    """A Qwen2 folder whose upper half attends through a window."""
    from capacity_gap.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("numbers") / "windows"
    shape = qwen(**WINDOWS, vocab_size=512, hidden_size=32, intermediate_size=64, num_key_value_heads=4)
    loading.save_model(loading.new_model(shape, 1), folder)
    train_tokenizer([text_file.read_text()], 512, folder)
    return folder


def test_the_predecessor_of_a_cell_that_loses_layers_is_stale(windows, tiny, tmp_path, monkeypatch, capsys):
    given = [g for g in tiny if not g.startswith(("family.", "data="))]
    local = ["family=folders", f"family.folders=[{windows}]", "teacher=windows", "student=74400", "data=0"]
    config = compose(
        [*given, *local, "prune.shape=fixed", "prune.fixed=4x32x4x64", "prune.layers=symmetric", f"store={tmp_path}"]
    )
    with monkeypatch.context() as before:
        before.setattr("capacity_gap.models.axes.of_kept_layers", _as_before)
        run_config(config)
    assert not Store(tmp_path).has(pipeline.resolve(config).record)
    cli.main(["status", str(tmp_path)])
    assert "settings of other layers" in capsys.readouterr().out
    run_config(config)
    made = Store(tmp_path).path(pipeline.resolve(config).student)
    assert json.loads((made / "config.json").read_text())["layer_types"] == [FULL, FULL, SLIDING, SLIDING]
    cli.main(["status", str(tmp_path)])
    assert "stale: 1 recorded" in capsys.readouterr().out, "the old one alone"


def _as_before(config, layers_key, stay):
    """The first entries of a list, whichever layers stay."""
    return {"layer_types": config["layer_types"][: len(stay)]} if "layer_types" in config else {}


def test_steps_of_pruning_choose_from_what_the_last_one_left(windows, tiny):
    given = [g for g in tiny if not g.startswith("family.")]
    local = ["family=folders", f"family.folders=[{windows}]", "teacher=windows", "student=60k", "prune.iterative=2"]
    cell = pipeline.resolve(compose([*given, *local, "prune.depth=3"]))
    (between,) = cell.shapes_between
    assert between["num_hidden_layers"] == 4
    assert between["layer_types"] == [FULL, FULL, SLIDING, SLIDING]
    assert cell.student_shape["layer_types"] == [FULL, FULL, SLIDING]
    assert isinstance(cell.shape, Shape)
