"""What transformers assumes for keys that a config.json leaves out, for the architectures with an axis table.

Only keys that this package reads are here. Torch-free: importing transformers' own classes would import torch, and a
grid is planned without it. `tests/test_model_defaults.py` compares every value with those classes.
"""

from collections.abc import Mapping
from typing import Any

from capacity_gap.structure import derived

_GATED = {  # Llama and its relatives
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_QWEN = {
    **_GATED,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
ASSUMED: dict[str, dict[str, Any]] = {
    "llama": {
        **_GATED,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "head_dim": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        **_GATED,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_dim": None,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "pad_token_id": None,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "pad_token_id": None,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "num_attention_heads": 12,
        "pad_token_id": 1,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    "t5": {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
}
# Other names by which these classes take a key (their `attribute_map`).
ALIASES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "t5": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
}
# Architectures whose input embedding never trains the row of `pad_token_id` (torch's `padding_idx`).
PADDED = ("llama", "mistral", "qwen2", "qwen3", "opt")


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with every key that it leaves out as transformers fills it in; other keys stay as they are."""
    if (kind := str(config.get("model_type"))) not in ASSUMED:
        return derived.defaults(by_own_names(config)) if derived.is_known(kind) else dict(config)
    found = {**ASSUMED[kind], **by_own_names(config)}
    if "max_window_layers" in found and found.get("layer_types") is None:
        found["layer_types"] = _windowed(found)
    return found


def assumed(kind: str) -> Mapping[str, Any]:
    """What the class of a `model_type` assumes; nothing where it is not known."""
    return ASSUMED[kind] if kind in ASSUMED else derived.usual(kind) if derived.is_known(kind) else {}


def by_own_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose keys have the names of its class, not those that stand for them."""
    kind = str(config.get("model_type"))
    names = ALIASES.get(kind, {}) if kind in ASSUMED else derived.names(kind) if derived.is_known(kind) else {}
    return {names.get(key, key): value for key, value in config.items()}


def _windowed(config: Mapping[str, Any]) -> list[str]:
    """The kinds of Qwen's layers: from `max_window_layers` on attention slides, where sliding windows are used."""
    slides = config["use_sliding_window"] and config["sliding_window"] is not None
    first = config["max_window_layers"] if slides else config["num_hidden_layers"]
    return ["sliding_attention" if i >= first else "full_attention" for i in range(config["num_hidden_layers"])]


def training_only(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config.json by which transformers would compute otherwise in training than in evaluation.

    Dropout and layer drop above zero, and a padding token whose embedding would stay frozen. Training here ignores
    them (`models/quiet.py`), and stages that they once decided name them in their identity.
    """
    full = completed(config)
    read = assumed(str(full.get("model_type"))) or full  # the keys that its class reads
    noise = [
        key for key in read if acts_as_noise(key, str(full.get("model_type"))) and is_rate(full[key]) and full[key] > 0
    ]
    return sorted([*noise, *frozen_rows(full)])


def frozen_rows(config: Mapping[str, Any]) -> list[str]:
    """`["pad_token_id"]` where transformers would freeze, and zero at the start, the embedding of one token."""
    full = completed(config)
    kind = str(full.get("model_type"))
    pads = kind in PADDED if kind in ASSUMED else derived.is_known(kind) and derived.pads(config)
    return ["pad_token_id"] if pads and full.get("pad_token_id") is not None else []


def is_rate(value: Any) -> bool:
    """Whether a value may be a rate: a number, and no flag."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def acts_as_noise(name: str, kind: str) -> bool:
    """Whether a config key or module attribute of this name is a rate of random noise in training.

    In models of the type `kind`: Phi-MoE's `router_jitter_noise` is how far apart two experts may be, always.
    """
    if (name, kind) == ("router_jitter_noise", "phimoe"):
        return False
    if name.startswith(("summary_", "classifier_")):  # of heads that no language model has
        return False
    return "drop" in name or "jitter" in name
