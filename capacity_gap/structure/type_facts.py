"""What the shapes of parameters do not say about an architecture: a line a type. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Axis → the keys of config.json that may hold its size, under transformers' standard names.
SIZE_KEYS = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "neurons": ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim"),
    "layers": ("num_hidden_layers",),
    "positions": ("max_position_embeddings",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active": ("num_experts_per_tok", "moe_topk", "top_k"),
}
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists with an entry a layer
# Entries of config.json that no parameter depends on.
STRUCTURELESS = {
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "tie_word_embeddings",
    "attn_implementation",
    "bos_token",
    "eos_token",
    "name_or_path",
    "sliding_window",
    "head_dim",
    "pretraining_tp",
    "task_specific_params",
    "is_decoder",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torchscript",
    "auto_map",
    "architectures",
    "cache_implementation",
    "query_pre_attn_scalar",
    "rope_theta",
    "clip_qkv",
    "logits_scaling",
    "use_flash_attn",
    "rotary_dim",
    "n_ctx",
    "original_max_position_embeddings",
    "unsloth_version",
    "unsloth_fixed",
}
ATTENTION = r"\.(self_attn|attn|attention|self_attention)(\.|$)"
ATTENTION_OUTPUT = r"\.?(o_proj|out_proj|dense|c_proj|wo)$"
MLP_OUTPUT = r"(down|fc2|c_proj|4h_to_h|out)"


@dataclass(frozen=True)
class Facts:
    """Of one type."""

    fused: str = ""  # the order inside a map of queries, keys and values (`layouts.py`)
    gated: str = ""  # the order inside a map of gates and inputs
    square: bool = False  # hidden = heads × head_dim, though its config.json may say otherwise
    position_offset: int = 0  # rows of the table of positions before the first position
    positions: str = ""  # "position" where the table's name does not say so
    alibi: bool = False  # the slope of a head depends on how many there are
    limit: str = ""  # the entry that limits sequences where there is no table of positions
    names: Mapping[str, str] = field(default_factory=dict)  # keys that older files of the type use → the class's own
    fixed_neurons: bool = False  # as many for each hidden unit whatever config.json says
    probe: Mapping[str, Any] = field(default_factory=dict)  # entries that let a small model be made


FACTS = {
    "gpt2": Facts(fused="qkv", positions="position"),
    "gpt_neox": Facts(fused="qkv_by_head"),
    "gpt_bigcode": Facts(fused="qkv_by_head", positions="position"),
    "gptj": Facts(probe={"rotary_dim": 4}),
    "codegen": Facts(fused="qkv_in_fours", probe={"rotary_dim": 4}),
    "persimmon": Facts(fused="qkv_by_head"),
    "bloom": Facts(fused="qkv_by_head", square=True, alibi=True, fixed_neurons=True, names={"n_embed": "hidden_size"}),
    "mpt": Facts(fused="qkv", square=True, alibi=True, limit="max_seq_len", fixed_neurons=True),
    "opt": Facts(position_offset=2),
    "biogpt": Facts(position_offset=2),
    "gpt_oss": Facts(gated="gate_up_by_neuron"),
    "olmoe": Facts(square=True),  # a norm inside attention is of this size
}

# The types in `derived_tables.json`, with the entries by which published models of each differ from its class.
COMMON: dict[str, tuple[dict[str, Any], ...]] = {
    "ministral": (),
    "gemma": (),
    "gemma2": (),
    "gemma3_text": ({"sliding_window_pattern": 6},),
    "phi": (),
    "phi3": (),
    "olmo": (),
    "olmo2": (),
    "olmo3": (),
    "smollm3": (),
    "granite": (),
    "starcoder2": (),
    "stablelm": ({"use_qkv_bias": True},),
    "cohere": ({"use_qk_norm": True},),
    "cohere2": (),
    "glm": ({"attention_bias": True},),
    "glm4": ({"attention_bias": True},),
    "exaone4": ({"sliding_window_pattern": "LLLG"},),
    "nemotron": (),
    "helium": (),
    "arcee": (),
    "seed_oss": (),
    "hunyuan_v1_dense": (),
    "ernie4_5": (),
    "apertus": (),
    "internlm3": (),
    "nanochat": (),
    "persimmon": (),
    "gptj": (),
    "codegen": (),
    "gpt_bigcode": (),
    "biogpt": (),
    "bloom": (),
    "mpt": (),
    "mixtral": (),
    "qwen3_moe": ({"norm_topk_prob": True},),
    "olmoe": (),
    "gpt_oss": (),
    "granitemoe": (),
    "phimoe": ({"attention_bias": True, "lm_head_bias": True},),
}
