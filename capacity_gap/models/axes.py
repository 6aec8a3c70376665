"""Per architecture, which named axis each dimension of each parameter is: all that pruning needs to know of a model.

An axis is one of `vocab`, `hidden`, `heads` (query heads × head_dim), `kv_heads` (key-value heads × head_dim), `qkv`
(fused, all queries before all keys before all values), `qkv_by_head` (fused, head by head), `per_head` (one number a
query head), `head_dim`, `neurons`, `positions` (learned ones), `buckets` (of relative positions), `embed` (OPT's
narrower embedding); layers are the `{i}` in a parameter's name. Parameters are counted, and models cut, from these
tables alone (`architectures.py`); a new architecture is one table and one test. This file imports no torch.

An encoder–decoder has two stacks of equally many layers, and units in several places of each: `heads.1` are the heads
of its second attention (decoder, on itself), `heads.2` of its third (decoder, on the encoder). Scores have one row for
each such place and layer: place p of layer i is row p·L + i. A model with one stack has one place: row i is layer i.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from capacity_gap.errors import ConfigError
from capacity_gap.models.defaults import by_own_names, completed
from capacity_gap.models.layers import of_kept_layers, symmetric_layers

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
    positions: int = 0  # rows of the table of learned positions
    embed: int = 0
    buckets: int = 0
    first_position: int = 0  # the row of the first position: those before it stand for none

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that learned positions allow; 0 where nothing limits it."""
        return self.positions - self.first_position

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def axis(self, name: str) -> int:
        """Length of a named axis, wherever it is."""
        name = place(name)[0]
        if name in ("heads", "kv_heads"):
            return getattr(self, name) * self.head_dim
        if name == "per_head":
            return self.heads
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
class Sublayer:
    """A module whose output joins the residual stream, and the linear map in it whose inputs a unit mask acts on."""

    module: str
    out: str


@dataclass(frozen=True)
class Stack:
    """One stack of layers, and the places in a layer where the masks of docs/method.md §2 act, as its submodules."""

    layer: str
    attentions: tuple[Sublayer, ...]
    mlp: Sublayer
    stream: tuple[str, ...] = ()  # read the stream after an addition inside the layer


@dataclass(frozen=True)
class Architecture:
    """The table of one architecture: `parameters` maps a name, with `{i}` for the layer, to its axes."""

    parameters: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]  # axis → config key
    output: str  # the output matrix, absent where it is the embedding
    stacks: tuple[Stack, ...]  # one; of an encoder–decoder both
    square: bool = False  # hidden = heads × head_dim: the two axes are tied
    in_checkpoints: Mapping[str, str] = field(default_factory=dict)  # names that differ in files
    one_set: tuple[int, ...] = ()  # attentions whose heads all layers share: one set stays, the same in every layer
    scaled: str = ""  # the weight that takes up the output's factor hidden^−½, which changes with the width
    position_offset: int = 0  # rows of the table of positions before the first position
    queries_by_layer: tuple[str, ...] = ()  # fused maps whose queries the model divides by the layer's number
    copies: Mapping[str, str] = field(default_factory=dict)  # names in files that repeat another parameter
    leftovers: tuple[str, ...] = ()  # endings of names in files that are no parameters: buffers of older releases

    @property
    def embedding(self) -> str:
        """The input embedding: the output matrix where the two are tied."""
        return next(n for n, axes in self.parameters.items() if axes[0] == "vocab" and n != self.output)

    def stacks_of(self, axis: str) -> list[int]:
        """The stack of each place that has units of `heads` or `neurons`."""
        if axis == "neurons":
            return list(range(len(self.stacks)))
        return [number for number, stack in enumerate(self.stacks) for _ in stack.attentions]

    def unit_maps(self, axis: str, layers: int) -> list[str]:
        """The linear maps whose inputs the units of `heads` or `neurons` are, one for each row of the scores."""
        places = [
            f"{stack.layer}.{sublayer.out}"
            for stack in self.stacks
            for sublayer in (stack.attentions if axis == "heads" else (stack.mlp,))
        ]
        return [name.replace("{i}", str(i)) for name in places for i in range(layers)]

    def rows(self, axis: str, layers: int) -> int:
        """Rows of the scores of `heads` or `neurons`: a place and a layer each."""
        return len(self.stacks_of(axis)) * layers

    def stack_of(self, pattern: str) -> int:
        """The stack that a row of the table belongs to; the first for what is outside the layers."""
        return next((n for n, stack in enumerate(self.stacks) if pattern.startswith(stack.layer)), 0)


def place(axis: str) -> tuple[str, int]:
    """An axis and which of its places: `heads.2` is the heads of the third attention."""
    name, _, number = axis.partition(".")
    return name, int(number or 0)


def get(config: Config, key: str, default: Any = None) -> Any:
    """One entry of a config, be it a mapping or an object."""
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)


def architecture(config: Config) -> Architecture:
    """The table for a config's `model_type`; one without a table raises and names those that have one."""
    from capacity_gap.models.architectures import ARCHITECTURES

    if isinstance(config, Mapping):
        config = completed(config)
    model_type = get(config, "model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"no axis table for the architecture {model_type!r}. There are tables for: {', '.join(ARCHITECTURES)}. "
            "A new one is added in capacity_gap/models/architectures.py."
        )
    return ARCHITECTURES[model_type](config)


def dims(config: Config) -> Dims:
    """The sizes of the model that `config` describes."""
    if isinstance(config, Mapping):
        config = completed(config)
    table = architecture(config)
    keys = table.keys
    hidden, heads = get(config, keys["hidden"]), get(config, keys["heads"])
    positions = get(config, keys["positions"]) if "positions" in keys else 0
    return Dims(
        vocab=get(config, keys["vocab"]),
        hidden=hidden,
        heads=heads,
        kv_heads=(get(config, keys["kv_heads"]) or heads) if "kv_heads" in keys else heads,
        head_dim=(not table.square and get(config, keys.get("head_dim", "head_dim"))) or hidden // heads,
        neurons=get(config, keys["neurons"]) or 4 * hidden,
        layers=get(config, keys["layers"]),
        tied=bool(get(config, "tie_word_embeddings")),
        positions=positions + table.position_offset,
        embed=(get(config, keys["embed"]) or hidden) if "embed" in keys else 0,
        buckets=get(config, keys["buckets"]) if "buckets" in keys else 0,
        first_position=table.position_offset,
    )


def config_with(config: Mapping[str, Any], sizes: Dims, stay: Sequence[int] | None = None) -> dict[str, Any]:
    """A config.json like `config` with these sizes; head_dim is said where hidden does not imply it.

    `stay`: the numbers of the layers that stay, by default those in the middle. An encoder–decoder, whose stacks may
    keep different ones, has no entries that speak of single layers.
    """
    table, old = architecture(config), dims(config)
    found = by_own_names(config)
    for axis in ("hidden", "heads", "kv_heads", "neurons", "layers"):
        if axis in table.keys:
            found[table.keys[axis]] = getattr(sizes, axis)
    if "decoder_layers" in table.keys:
        found[table.keys["decoder_layers"]] = sizes.layers
    if not table.square:
        found[table.keys.get("head_dim", "head_dim")] = sizes.head_dim
    elif "embed" in table.keys and old.embed == old.hidden and found.get(table.keys["embed"]) is not None:
        found[table.keys["embed"]] = sizes.hidden
    if sizes.vocab != old.vocab:
        found[table.keys["vocab"]] = sizes.vocab
    if sizes.tied != old.tied:
        found["tie_word_embeddings"] = sizes.tied
    kept = symmetric_layers(old.layers, sizes.layers) if stay is None else stay
    return found | of_kept_layers(config, table.keys["layers"], kept)


def pattern_of(table: Architecture, name: str) -> tuple[str, int]:
    """The row of the table that parameter `name` belongs to, and its layer (0 outside the layers)."""
    if name in table.parameters:
        return name, 0
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


def padded(vocab: int, multiple: int) -> int:
    """`vocab` rounded up to a multiple: kernels and shards want round numbers of rows."""
    return -(-vocab // multiple) * multiple
