"""Per architecture, which named axis each dimension of each parameter is: all that pruning needs to know of a model.

An axis is one of `vocab`, `hidden`, `heads` (query heads × head_dim), `kv_heads` (key-value heads × head_dim),
`neurons`; layers are the `{i}` in a parameter's name. Parameters are counted, and models cut, from these tables alone;
a new architecture is one table and one test. This file imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from capacity_gap.errors import ConfigError

Config = Mapping[str, Any] | Any  # the content of a config.json, or a transformers config object


@dataclass(frozen=True)
class Dims:
    """The sizes of one model. `heads` and `kv_heads` count heads; a unit is one key-value head."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    layers: int
    tied: bool  # output matrix = embedding

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def axis(self, name: str) -> int:
        """Length of a named axis."""
        if name in ("heads", "kv_heads"):
            return getattr(self, name) * self.head_dim
        return getattr(self, name)

    def with_units(self, *, hidden: int, kv_heads: int, neurons: int, layers: int) -> "Dims":
        """The same model with other numbers of units."""
        return replace(
            self, hidden=hidden, kv_heads=kv_heads, heads=kv_heads * self.group, neurons=neurons, layers=layers
        )


@dataclass(frozen=True)
class Architecture:
    """The table of one architecture.

    `parameters` maps a name, with `{i}` for the layer, to its axes; the rest names the places where masks act.
    """

    parameters: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]  # axis → config key
    embedding: str
    output: str
    layer: str
    attention: str  # submodules of a layer whose output joins the residual stream
    mlp: str
    mid_stream: str  # submodule of a layer whose input is the stream between attention and mlp
    attention_out: str  # linear maps whose inputs the head and neuron masks act on
    mlp_out: str


def _llama(*, qkv_bias: bool = False) -> Architecture:
    layer = "model.layers.{i}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    parameters = {
        "model.embed_tokens.weight": ("vocab", "hidden"),
        attention + "q_proj.weight": ("heads", "hidden"),
        attention + "k_proj.weight": ("kv_heads", "hidden"),
        attention + "v_proj.weight": ("kv_heads", "hidden"),
        attention + "o_proj.weight": ("hidden", "heads"),
        mlp + "gate_proj.weight": ("neurons", "hidden"),
        mlp + "up_proj.weight": ("neurons", "hidden"),
        mlp + "down_proj.weight": ("hidden", "neurons"),
        layer + "input_layernorm.weight": ("hidden",),
        layer + "post_attention_layernorm.weight": ("hidden",),
        "model.norm.weight": ("hidden",),
        "lm_head.weight": ("vocab", "hidden"),
    }
    if qkv_bias:
        parameters |= {attention + "q_proj.bias": ("heads",)}
        parameters |= {attention + f"{x}_proj.bias": ("kv_heads",) for x in "kv"}
    return Architecture(
        parameters=parameters,
        keys={
            "vocab": "vocab_size",
            "hidden": "hidden_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "neurons": "intermediate_size",
            "layers": "num_hidden_layers",
        },
        embedding="model.embed_tokens",
        output="lm_head.weight",
        layer="model.layers.{i}",
        attention="self_attn",
        mlp="mlp",
        mid_stream="post_attention_layernorm",
        attention_out="self_attn.o_proj",
        mlp_out="mlp.down_proj",
    )


ARCHITECTURES = {"llama": _llama(), "mistral": _llama(), "qwen2": _llama(qkv_bias=True)}


def get(config: Config, key: str, default: Any = None) -> Any:
    """One entry of a config, be it a mapping or an object."""
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)


def architecture(config: Config) -> Architecture:
    """The table for a config's `model_type`; one without a table raises and names those that have one."""
    model_type = get(config, "model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"no axis table for the architecture {model_type!r}. There are tables for: {', '.join(ARCHITECTURES)}. "
            "A new one is added in capacity_gap/models/axes.py."
        )
    if get(config, "attention_bias") or get(config, "mlp_bias"):
        raise ConfigError(f"the axis table of {model_type} covers no optional biases (attention_bias, mlp_bias).")
    return ARCHITECTURES[model_type]


def dims(config: Config) -> Dims:
    """The sizes of the model that `config` describes."""
    keys = architecture(config).keys
    heads = get(config, keys["heads"])
    return Dims(
        vocab=get(config, keys["vocab"]),
        hidden=get(config, keys["hidden"]),
        heads=heads,
        kv_heads=get(config, keys["kv_heads"]) or heads,
        head_dim=get(config, "head_dim") or get(config, keys["hidden"]) // heads,
        neurons=get(config, keys["neurons"]),
        layers=get(config, keys["layers"]),
        tied=bool(get(config, "tie_word_embeddings", False)),
    )


def config_with(config: Mapping[str, Any], sizes: Dims) -> dict[str, Any]:
    """A config.json like `config` with these sizes; head_dim is said, since hidden no longer implies it."""
    keys = architecture(config).keys
    return {**config, **{key: getattr(sizes, axis) for axis, key in keys.items()}, "head_dim": sizes.head_dim}


def count(table: Architecture, sizes: Dims, *, non_embedding: bool = False) -> int:
    """Parameters of a model of these sizes, tied matrices once; `non_embedding` leaves out input and output matrix."""
    total = 0
    for name, axes in table.parameters.items():
        if name == table.output and sizes.tied:
            continue
        if non_embedding and "vocab" in axes:
            continue
        total += prod(sizes.axis(a) for a in axes) * (sizes.layers if "{i}" in name else 1)
    return total


def count_params(config: Config, *, non_embedding: bool = False) -> int:
    """Parameters of the model that `config` describes, counted without building it."""
    return count(architecture(config), dims(config), non_embedding=non_embedding)
