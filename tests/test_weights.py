"""A folder whose tensors are not those of its config.json is refused by name, before anything is computed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from capacity_gap.judge.answers import _load as load_answerer
from capacity_gap.models import loading
from capacity_gap.models.folders import checkpoint_family
from capacity_gap.models.weights import INDEX, SINGLE, check_names, check_weights
from capacity_gap.settings.errors import ConfigError, StageError, UserError
from tests.small_models import EVERY, small_model


def saved(folder, name="llama", **changes):
    """A small model in a folder, and its config.json."""
    model = small_model(name, **changes).float()
    loading.save_model(model, folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE)
    save_file({k: v.contiguous() for k, v in change(dict(tensors)).items()}, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_transformers_saves_is_right(tmp_path, name, dtype):
    config = saved(tmp_path, name)
    rewrite(tmp_path, lambda t: {k: v.to(dtype) for k, v in t.items()})
    check_weights(tmp_path, config)


def without(t, name):
    return {k: v for k, v in t.items() if k != name}


def poisoned(t, value):
    t["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    return t


WRONG = {
    "prefixed": (lambda t: {"module.net." + k: v for k, v in t.items()}, "missing", "left over (module.net."),
    "without its output": (lambda t: without(t, "lm_head.weight"), "1 tensor missing (lm_head.weight)"),
    "without a map": (lambda t: without(t, "model.layers.2.mlp.up_proj.weight"), "missing (model.layers.2.mlp.up_proj"),
    "a layer too many": (lambda t: t | {"model.layers.3.x": torch.ones(2)}, "1 tensor left over (model.layers.3.x)"),
    "of another shape": (
        lambda t: t | {"model.norm.weight": torch.ones(17)},
        "of another shape (model.norm.weight is [17], its config.json says [16])",
    ),
    "not a number": (lambda t: poisoned(t, float("nan")), "1 tensor not finite (NaN or infinity) (model.layers.1.mlp"),
    "infinite": (lambda t: poisoned(t, float("-inf")), "not finite"),
    "whole numbers": (lambda t: t | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}, "of a type other than"),
    "twice": (lambda t: t | {"layers.0.mlp.up_proj.weight": torch.ones(12, 16)}, "left over (layers.0.mlp.up_proj"),
    "an adapter's tensors": (lambda t: t | {"base_model.lora_A.weight": torch.ones(2)}, "left over (base_model.lora_A"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_wrong_is_named(tmp_path, kind, sharded):
    change, *said = WRONG[kind]
    config = saved(tmp_path)
    rewrite(tmp_path, change)
    if sharded:
        shard(tmp_path)
    with pytest.raises(ConfigError) as error:
        checkpoint_family([str(tmp_path)])
    assert all(words in str(error.value) for words in said), error.value
    with pytest.raises(ConfigError):
        check_weights(tmp_path, config)


def shard(folder):
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    files = {n: f"model-{1 + (i % 2):05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_type_is_looked_through(tmp_path, dtype, value):
    config = saved(tmp_path)
    rewrite(tmp_path, lambda t: {k: v.to(dtype) for k, v in t.items()})
    check_weights(tmp_path, config)
    rewrite(tmp_path, lambda t: poisoned(t, value))
    with pytest.raises(ConfigError, match="not finite"):
        check_weights(tmp_path, config)
    check_names(tmp_path, config)  # reads no values


def test_a_tied_output_matrix_may_be_stored_if_it_is_the_embedding(tmp_path):
    config = saved(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": embedding.clone()})
    check_weights(tmp_path, config)
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": embedding + 0.01})
    for check in (check_weights, check_names):
        with pytest.raises(ConfigError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
            check(tmp_path, config)
    with pytest.raises(StageError, match="not shared, though its config says so"):
        loading.load_model(tmp_path)


def test_a_config_that_is_silent_on_ties_is_read_as_transformers_reads_it(tmp_path):
    config = saved(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="missing \\(lm_head.weight\\)"):
        check_weights(tmp_path, without(config, "tie_word_embeddings"))


def test_buffers_of_older_releases_and_shorter_names_are_fine(tmp_path):
    config = saved(tmp_path, "gpt2")
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in range(3)}
    rewrite(tmp_path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()} | mask)
    check_weights(tmp_path, config)
    assert loading.load_model(tmp_path).num_parameters() == small_model("gpt2").num_parameters()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_model_is_refused_wherever_models_are_read(tmp_path, file):
    saved(tmp_path)
    (tmp_path / file).write_text("{}")
    for read in (lambda: checkpoint_family([str(tmp_path)]), lambda: loading.load_model(tmp_path)):
        with pytest.raises(ConfigError, match=f"holds an adapter \\({file}\\)"):
            read()


FILES = {
    "two checkpoints": (lambda f: (f / INDEX).write_text("{}"), "holds two checkpoints"),
    "a lost shard": (lambda f: (shard(f), (f / "model-00002-of-00002.safetensors").unlink()), "lacks 1 of the 2 files"),
    "shards without index": (lambda f: (shard(f), (f / INDEX).unlink()), f"neither {SINGLE} nor {INDEX}"),
    "an index that is none": (lambda f: (shard(f), (f / INDEX).write_text("[]")), "is not a shard index"),
    "a file cut short": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-50]), "is cut short"),
    "a file cut in its header": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:50]), "header cannot"),
    "an empty file": (lambda f: (f / SINGLE).write_bytes(b""), "header cannot be read"),
    "an LFS pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_cannot_be_read_say_why(tmp_path, kind):
    change, said = FILES[kind]
    saved(tmp_path)
    change(tmp_path)
    with pytest.raises(ConfigError) as error:
        checkpoint_family([str(tmp_path)])
    assert said in str(error.value)


def test_models_that_only_answer_or_are_scored_must_be_whole_too(tmp_path, text_file):
    from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer

    saved(tmp_path)
    rewrite(tmp_path, lambda t: without(t, "lm_head.weight"))
    train_tokenizer([text_file.read_text()], 300, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"missing: lm_head.weight"):
        load_answerer(tmp_path, "cpu")


def test_a_folder_that_changes_is_looked_at_again(tmp_path):
    config = saved(tmp_path / "a")
    check_weights(tmp_path / "a", config)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rewrite(tmp_path / "b", lambda t: poisoned(t, float("nan")))
    shutil.copy(tmp_path / "b" / SINGLE, tmp_path / "a" / SINGLE)
    with pytest.raises(ConfigError, match="not finite"):
        check_weights(tmp_path / "a", config)


def test_what_says_which_file_is_meant_is_part_of_the_folder_or_refused(tmp_path):
    saved(tmp_path)
    shard(tmp_path)
    listing = json.loads((tmp_path / INDEX).read_text())
    first = next(iter(listing["weight_map"]))
    copy = tmp_path / "other.safetensors"
    tensors = load_file(tmp_path / listing["weight_map"][first])
    save_file({k: v + 1 for k, v in tensors.items()}, copy, metadata={"format": "pt"})
    for read in (lambda: checkpoint_family([str(tmp_path)]), lambda: loading.load_model(tmp_path)):
        with pytest.raises(ConfigError, match=r"in other.safetensors and in model-0000"):
            read()
    save_file({"consolidated." + k: v for k, v in tensors.items()}, copy, metadata={"format": "pt"})
    checkpoint_family([str(tmp_path)])
    listing["weight_map"][first] = "../elsewhere.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(listing))
    with pytest.raises(ConfigError, match="lists files of other folders"):
        checkpoint_family([str(tmp_path)])


def test_a_shape_that_does_not_match_is_named_when_a_model_is_loaded(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, lambda t: t | {"model.norm.weight": torch.ones(17)})
    with pytest.raises(StageError, match=r"mismatched: .*model.norm.weight"):
        loading.load_model(tmp_path)


def test_copies_of_the_embedding_grow_with_it(tmp_path):
    from capacity_gap.models.expand_embeddings import expand_checkpoint

    saved(tmp_path / "old", "t5")
    shared = load_file(tmp_path / "old" / SINGLE)["shared.weight"]
    rewrite(tmp_path / "old", lambda t: t | {"encoder.embed_tokens.weight": shared.clone()})
    (tmp_path / "new").mkdir()
    expand_checkpoint(tmp_path / "old", tmp_path / "new", first=40, parts=[[1, 2]], rows=48)
    assert loading.load_model(tmp_path / "new").shared.weight.shape == (48, 16)
