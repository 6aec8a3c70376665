"""What a config.json leaves out, and what it switches off, is counted as transformers builds it."""

import itertools

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from capacity_gap.cell.config import RunConfig
from capacity_gap.cell.lengths import check_positions
from capacity_gap.data.corpus_config import CorpusConfig
from capacity_gap.models.axes import check_head, count_params, dims
from capacity_gap.models.building import auto_class
from capacity_gap.models.defaults import ALIASES, ASSUMED, completed
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.settings.errors import ConfigError
from tests.small_models import SMALL

BARE = {  # sizes alone: the rest is left to transformers
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "t5": {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4},
}
BARE |= dict.fromkeys(("mistral", "qwen2", "qwen3", "olmo2", "gemma3_text", "gpt_neox"), BARE["llama"])
SWITCHES = {
    "llama": ("attention_bias", "mlp_bias", "tie_word_embeddings"),
    "mistral": ("attention_bias", "mlp_bias", "tie_word_embeddings"),
    "qwen2": ("attention_bias", "use_sliding_window", "tie_word_embeddings"),
    "qwen3": ("attention_bias", "mlp_bias", "tie_word_embeddings"),
    "olmo2": ("attention_bias", "mlp_bias", "tie_word_embeddings"),
    "gemma3_text": ("attention_bias", "mlp_bias", "tie_word_embeddings"),
    "gpt2": ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"),
    "gpt_neox": ("attention_bias", "use_parallel_residual", "tie_word_embeddings"),
    "opt": ("enable_bias", "layer_norm_elementwise_affine", "do_layer_norm_before", "_remove_final_layer_norm"),
    "t5": (),
}


def built(config):
    """Parameters of the model that transformers makes of a config.json."""
    made = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    with torch.device("meta"):
        return sum(p.numel() for p in auto_class(made).from_config(made).parameters())


@pytest.mark.parametrize("kind", ASSUMED)
def test_what_is_assumed_is_what_transformers_assumes(kind):
    made = CONFIG_MAPPING[kind]()
    told = made.to_dict()
    filled = completed({"model_type": kind})
    derived = {"num_key_value_heads", "head_dim", "word_embed_proj_dim", "num_decoder_layers", "sliding_window"}
    assert {k: told[k] for k in ASSUMED[kind] if k not in derived} == {
        k: v for k, v in ASSUMED[kind].items() if k not in derived
    }
    assert filled.get("layer_types") == told.get("layer_types")
    assert ALIASES.get(kind, {}) == getattr(made, "attribute_map", {})
    assert dims({"model_type": kind}) == dims(made)


@pytest.mark.parametrize("kind", BARE)
def test_sizes_alone_are_counted_as_they_are_built(kind):
    bare = {"model_type": kind, **BARE[kind]}
    assert count_params(bare) == built(bare)
    assert count_params({**bare, "vocab_size": 500}) == built({**bare, "vocab_size": 500})


@pytest.mark.parametrize("kind", BARE)
def test_every_combination_of_switches_is_counted_as_it_is_built(kind):
    bare = {"model_type": kind, "vocab_size": 500, **BARE[kind]}
    for chosen in itertools.product((False, True), repeat=len(SWITCHES[kind])):
        config = bare | dict(zip(SWITCHES[kind], chosen, strict=True))
        assert count_params(config) == built(config), config


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma3_text"])
def test_heads_are_counted_as_they_are_built(kind):
    said = [{"head_dim": 8}, {"num_key_value_heads": 2}]
    if kind not in ("mistral", "gemma3_text"):  # whose configs want a number
        said.append({"num_key_value_heads": None})
    for more in said:
        config = {"model_type": kind, "vocab_size": 500, **BARE[kind], **more}
        assert count_params(config) == built(config)


def test_names_that_stand_for_others_are_read():
    plain = {"model_type": "gpt2", "vocab_size": 500, **BARE["gpt2"]}
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    renamed = {names.get(k, k): v for k, v in plain.items()} | {"max_position_embeddings": 64}
    assert count_params(renamed) == built(renamed) == count_params({**plain, "n_positions": 64})


def test_a_head_size_that_a_class_does_not_read_counts_for_nothing():
    for kind in ("gpt_neox", "opt", "gpt2"):
        config = {"model_type": kind, "vocab_size": 500, **BARE[kind]}
        assert count_params({**config, "head_dim": 64}) == count_params(config)


def test_cross_attention_is_refused():
    with pytest.raises(ConfigError, match="cross-attention"):
        count_params({"model_type": "gpt2", **BARE["gpt2"], "add_cross_attention": True})


def test_the_layers_of_gemma_alternate_as_transformers_has_them():
    for said in ({}, {"sliding_window_pattern": 3}, {"layer_types": ["full_attention"] * 9}):
        config = {**BARE["gemma3_text"], "num_hidden_layers": 9, **said}
        made = AutoConfig.for_model("gemma3_text", **config)
        assert completed({"model_type": "gemma3_text", **config})["layer_types"] == made.layer_types


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "use_bidirectional_attention"])
def test_a_gemma_whose_losses_would_be_wrong_is_refused(key):
    config = {"model_type": "gemma3_text", **BARE["gemma3_text"]}
    check_head(config)
    with pytest.raises(ConfigError, match=f"{key}=30.0, which is not supported for scoring, training"):
        check_head({**config, key: 30.0})


@pytest.mark.parametrize(("family", "longest"), [("opt", 2048), ("gpt2", 1024), ("cerebras_gpt", 2048)])
def test_the_longest_sequence_is_what_positions_allow(family, longest):
    ladder = FAMILIES[family]
    shape = next(iter(ladder.rungs.values()))
    check_positions(RunConfig(corpus=CorpusConfig(sequence_length=longest)), ladder, shape)
    with pytest.raises(ConfigError, match=f"learned positions for {longest} tokens"):
        check_positions(RunConfig(corpus=CorpusConfig(sequence_length=longest + 1)), ladder, shape)


def test_an_opt_model_reads_as_many_tokens_as_it_says():
    made = AutoConfig.for_model("opt", **SMALL["opt"][1])
    model = auto_class(made).from_config(made)
    longest = dims(made).longest
    assert longest == made.max_position_embeddings
    assert model(torch.ones(1, longest, dtype=torch.long)).logits.shape[1] == longest
    with pytest.raises(IndexError):
        model(torch.ones(1, longest + 1, dtype=torch.long))
