"""Per architecture, which named axis each dimension of each parameter is: all that pruning needs to know of a model.

An axis is one of `vocab`, `hidden`, `heads` (query heads × head_dim), `kv_heads` (key-value heads × head_dim), `qkv`
(fused, all queries before all keys before all values), `qkv_by_head` (fused, head by head), `head_dim`, `neurons`,
`positions` (learned ones), `embed` (OPT's narrower embedding); layers are the `{i}` in a parameter's name. Parameters
are counted, and models cut, from these tables alone (`architectures.py`); a new architecture is one table and one test.
This file imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        return 3 * self.heads * self.head_dim if name in ("qkv", "qkv_by_head") else getattr(self, name)

    def with_units(self, *, hidden: int, kv_heads: int, neurons: int, layers: int, group: int | None = None) -> "Dims":
        """The same model with other numbers of units."""
        return replace(
            self,
            hidden=hidden,
            kv_heads=kv_heads,
            heads=kv_heads * (group or self.group),
            neurons=neurons,
            layers=layers,
            embed=hidden if self.embed == self.hidden else self.embed,
        )


@dataclass(frozen=True)
class Masks:
    """The places of one architecture where the masks of METHOD §2 act, as submodules of a layer."""

    layer: str
    attention: str  # its output joins the residual stream
    attention_out: str  # the linear map whose inputs the head mask acts on
    mlp: str  # its output joins the residual stream
    mlp_out: str  # the linear map whose inputs the neuron mask acts on
    stream: tuple[str, ...] = ()  # read the stream after an addition inside the layer


@dataclass(frozen=True)
class Architecture:
    """The table of one architecture: `parameters` maps a name, with `{i}` for the layer, to its axes."""

    parameters: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]  # axis → config key
    output: str  # the output matrix, absent where it is the embedding
    masks: Masks
    square: bool = False  # hidden = heads × head_dim: the two axes are tied
    in_checkpoints: Mapping[str, str] = field(default_factory=dict)  # names that differ in files


UNTIED_BY_DEFAULT = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt_neox",
)  # what transformers assumes where a config is silent
OPT_OFFSET = 2  # OPT's positions begin at 2


def get(config: Config, key: str, default: Any = None) -> Any:
    """One entry of a config, be it a mapping or an object."""
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)


def architecture(config: Config) -> Architecture:
    """The table for a config's `model_type`; one without a table raises and names those that have one."""
    from capacity_gap.models.architectures import ARCHITECTURES

    model_type = get(config, "model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"no axis table for the architecture {model_type!r}. There are tables for: {', '.join(ARCHITECTURES)}. "
            "A new one is added in capacity_gap/models/architectures.py."
        )
    return ARCHITECTURES[model_type](config)


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
    if layer_types := get(config, "layer_types"):
        found["layer_types"] = list(layer_types)[: sizes.layers]
    return found


def pattern_of(table: Architecture, name: str) -> tuple[str, int]:
    """The row of the table that parameter `name` belongs to, and its layer (0 outside the layers)."""
    found = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(found[0], ".{i}.", 1) if found else name
    if pattern not in table.parameters:
        raise ConfigError(f"parameter {name} is not in the axis table; its model cannot be pruned.")
    return pattern, int(found[1]) if found else 0


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
