"""Per architecture, which named axis each dimension of each parameter is: all that pruning needs to know of a model.

An axis is one of `vocab`, `hidden`, `heads` (query heads × head_dim), `kv_heads` (key-value heads × head_dim), `qkv`
(fused: three times heads), `neurons`, `positions` (learned ones), `embed` (OPT's narrower embedding); layers are the
`{i}` in a parameter's name. Parameters are counted, and models cut, from these tables alone; a new architecture is one
table and one test. This file imports no torch.
"""

from collections.abc import Callable, Mapping
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
    positions: int = 0
    embed: int = 0

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def axis(self, name: str) -> int:
        """Length of a named axis."""
        if name in ("heads", "kv_heads"):
            return getattr(self, name) * self.head_dim
        return 3 * self.heads * self.head_dim if name == "qkv" else getattr(self, name)

    def with_units(self, *, hidden: int, kv_heads: int, neurons: int, layers: int) -> "Dims":
        """The same model with other numbers of units."""
        return replace(
            self,
            hidden=hidden,
            kv_heads=kv_heads,
            heads=kv_heads * self.group,
            neurons=neurons,
            layers=layers,
            embed=hidden if self.embed == self.hidden else self.embed,
        )


@dataclass(frozen=True)
class Masks:
    """The places of one architecture where the masks of METHOD §2 act."""

    embedding: str
    layer: str
    attention: str  # submodules of a layer whose output joins the residual stream
    mlp: str
    mid_stream: str  # submodule of a layer whose input is the stream between attention and mlp
    attention_out: str  # linear maps whose inputs the head and neuron masks act on
    mlp_out: str


@dataclass(frozen=True)
class Architecture:
    """The table of one architecture: `parameters` maps a name, with `{i}` for the layer, to its axes."""

    parameters: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]  # axis → config key
    output: str  # the output matrix, absent where it is the embedding
    square: bool = False  # hidden = heads × head_dim: the two axes are tied
    masks: Masks | None = None  # None: counted and trained, but not yet pruned


def _llama(config: Config, *, qkv_bias: bool = False) -> Architecture:
    layer = "model.layers.{i}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    parameters: dict[str, tuple[str, ...]] = {
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
    if qkv_bias or get(config, "attention_bias"):
        parameters |= {attention + "q_proj.bias": ("heads",)}
        parameters |= {attention + f"{x}_proj.bias": ("kv_heads",) for x in "kv"}
    if get(config, "attention_bias"):
        parameters[attention + "o_proj.bias"] = ("hidden",)
    if get(config, "mlp_bias"):
        parameters |= {mlp + f"{x}_proj.bias": ("neurons",) for x in ("gate", "up")}
        parameters[mlp + "down_proj.bias"] = ("hidden",)
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
        output="lm_head.weight",
        masks=Masks(
            embedding="model.embed_tokens",
            layer="model.layers.{i}",
            attention="self_attn",
            mlp="mlp",
            mid_stream="post_attention_layernorm",
            attention_out="self_attn.o_proj",
            mlp_out="mlp.down_proj",
        ),
    )


def _qwen2(config: Config) -> Architecture:
    return _llama(config, qkv_bias=True)


def _with_biases(parameters: dict[str, tuple[str, ...]], outputs: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Adds a bias over the given axis for each named module, and both halves of its layer norms' parameters."""
    return parameters | {f"{name}.bias": (axis,) for name, axis in outputs.items()}


def _gpt2(config: Config) -> Architecture:
    layer = "transformer.h.{i}."
    norms = (layer + "ln_1", layer + "ln_2", "transformer.ln_f")
    parameters: dict[str, tuple[str, ...]] = {
        "transformer.wte.weight": ("vocab", "hidden"),
        "transformer.wpe.weight": ("positions", "hidden"),
        # GPT-2 stores its maps transposed (Conv1D): inputs first.
        layer + "attn.c_attn.weight": ("hidden", "qkv"),
        layer + "attn.c_proj.weight": ("heads", "hidden"),
        layer + "mlp.c_fc.weight": ("hidden", "neurons"),
        layer + "mlp.c_proj.weight": ("neurons", "hidden"),
        "lm_head.weight": ("vocab", "hidden"),
        **{f"{n}.weight": ("hidden",) for n in norms},
    }
    biased = {layer + "attn.c_attn": "qkv", layer + "attn.c_proj": "hidden"}
    biased |= {layer + "mlp.c_fc": "neurons", layer + "mlp.c_proj": "hidden", **dict.fromkeys(norms, "hidden")}
    keys = {"vocab": "vocab_size", "hidden": "n_embd", "heads": "n_head", "neurons": "n_inner", "layers": "n_layer"}
    return Architecture(
        _with_biases(parameters, biased), keys | {"positions": "n_positions"}, "lm_head.weight", square=True
    )


def _gpt_neox(config: Config) -> Architecture:
    layer = "gpt_neox.layers.{i}."
    norms = (layer + "input_layernorm", layer + "post_attention_layernorm", "gpt_neox.final_layer_norm")
    parameters: dict[str, tuple[str, ...]] = {
        "gpt_neox.embed_in.weight": ("vocab", "hidden"),
        layer + "attention.query_key_value.weight": ("qkv", "hidden"),
        layer + "attention.dense.weight": ("hidden", "heads"),
        layer + "mlp.dense_h_to_4h.weight": ("neurons", "hidden"),
        layer + "mlp.dense_4h_to_h.weight": ("hidden", "neurons"),
        "lm_head.weight": ("vocab", "hidden"),
        **{f"{n}.weight": ("hidden",) for n in norms},
    }
    biased = {layer + "attention.query_key_value": "qkv", layer + "attention.dense": "hidden"}
    biased |= {layer + "mlp.dense_h_to_4h": "neurons", layer + "mlp.dense_4h_to_h": "hidden"}
    keys = {"vocab": "vocab_size", "hidden": "hidden_size", "heads": "num_attention_heads"}
    keys |= {"neurons": "intermediate_size", "layers": "num_hidden_layers"}
    biased |= dict.fromkeys(norms, "hidden")
    return Architecture(_with_biases(parameters, biased), keys, "lm_head.weight", square=True)


def _opt(config: Config) -> Architecture:
    decoder = "model.decoder."
    layer = decoder + "layers.{i}."
    norms = [layer + "self_attn_layer_norm", layer + "final_layer_norm"]
    if get(config, "do_layer_norm_before", True):
        norms.append(decoder + "final_layer_norm")
    parameters: dict[str, tuple[str, ...]] = {
        decoder + "embed_tokens.weight": ("vocab", "embed"),
        decoder + "embed_positions.weight": ("positions", "hidden"),
        **{layer + f"self_attn.{x}_proj.weight": ("heads", "hidden") for x in "qkv"},
        layer + "self_attn.out_proj.weight": ("hidden", "heads"),
        layer + "fc1.weight": ("neurons", "hidden"),
        layer + "fc2.weight": ("hidden", "neurons"),
        "lm_head.weight": ("vocab", "embed"),
        **{f"{n}.weight": ("hidden",) for n in norms},
    }
    if get(config, "word_embed_proj_dim", get(config, "hidden_size")) != get(config, "hidden_size"):
        parameters[decoder + "project_in.weight"] = ("hidden", "embed")
        parameters[decoder + "project_out.weight"] = ("embed", "hidden")
    biased = {layer + f"self_attn.{x}_proj": "heads" for x in "qkv"} | {layer + "self_attn.out_proj": "hidden"}
    biased |= {layer + "fc1": "neurons", layer + "fc2": "hidden", **dict.fromkeys(norms, "hidden")}
    keys = {"vocab": "vocab_size", "hidden": "hidden_size", "heads": "num_attention_heads", "neurons": "ffn_dim"}
    keys |= {"layers": "num_hidden_layers", "positions": "max_position_embeddings", "embed": "word_embed_proj_dim"}
    return Architecture(_with_biases(parameters, biased), keys, "lm_head.weight", square=True)


ARCHITECTURES: dict[str, Callable[[Config], Architecture]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}
UNTIED_BY_DEFAULT = ("llama", "mistral", "qwen2", "gpt_neox")  # what transformers assumes where a config is silent
OPT_OFFSET = 2  # OPT's positions begin at 2


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
    return ARCHITECTURES[model_type](config)


def masks(config: Config) -> Masks:
    """Where masks act; an architecture that cannot be pruned yet raises and names those that can."""
    found = architecture(config).masks
    if found is None:
        able = [name for name, table in ARCHITECTURES.items() if table({}).masks]
        raise ConfigError(
            f"models of the architecture {get(config, 'model_type')!r} can be trained and distilled here, but not "
            f"pruned yet. Prunable: {', '.join(able)}. prune.init=random starts the student from random weights."
        )
    return found


def dims(config: Config) -> Dims:
    """The sizes of the model that `config` describes."""
    keys, model_type = architecture(config).keys, get(config, "model_type")
    hidden, heads = get(config, keys["hidden"]), get(config, keys["heads"])
    positions = get(config, keys["positions"]) if "positions" in keys else 0
    return Dims(
        vocab=get(config, keys["vocab"]),
        hidden=hidden,
        heads=heads,
        kv_heads=(get(config, keys["kv_heads"]) or heads) if "kv_heads" in keys else heads,
        head_dim=get(config, "head_dim") or hidden // heads,
        neurons=get(config, keys["neurons"]) or 4 * hidden,
        layers=get(config, keys["layers"]),
        tied=bool(get(config, "tie_word_embeddings", model_type not in UNTIED_BY_DEFAULT)),
        positions=positions + (OPT_OFFSET if model_type == "opt" else 0),
        embed=(get(config, keys["embed"]) or hidden) if "embed" in keys else 0,
    )


def config_with(config: Mapping[str, Any], sizes: Dims) -> dict[str, Any]:
    """A config.json like `config` with these sizes; head_dim is said where hidden does not imply it."""
    table = architecture(config)
    found = dict(config)
    for axis in ("hidden", "heads", "kv_heads", "neurons", "layers"):
        if axis in table.keys:
            found[table.keys[axis]] = getattr(sizes, axis)
    if not table.square:
        found["head_dim"] = sizes.head_dim
    elif "embed" in table.keys and get(config, table.keys["embed"]) == get(config, table.keys["hidden"]):
        found[table.keys["embed"]] = sizes.hidden
    return found


def count(table: Architecture, sizes: Dims, *, non_embedding: bool = False) -> int:
    """Parameters of a model of these sizes, tied matrices once.

    `non_embedding` leaves out the input and output matrices and learned positions.
    """
    total = 0
    for name, axes in table.parameters.items():
        if name == table.output and sizes.tied:
            continue
        if non_embedding and ("vocab" in axes or "positions" in axes):
            continue
        total += prod(sizes.axis(a) for a in axes) * (sizes.layers if "{i}" in name else 1)
    return total


def count_params(config: Config, *, non_embedding: bool = False) -> int:
    """Parameters of the model that `config` describes, counted without building it."""
    return count(architecture(config), dims(config), non_embedding=non_embedding)
