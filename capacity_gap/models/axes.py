"""Per architecture, which named axis each dimension of each parameter is: all that pruning needs of a model.

An axis is one of `vocab`, `hidden`, `heads` (query heads × head_dim), `kv_heads` (key-value heads × head_dim), `qkv`
(fused, all queries before all keys before all values), `qkv_by_head` (fused, head by head), `per_head` (one number a
query head), `head_dim`, `neurons`, `experts`, `positions` (learned ones), `buckets` (of relative positions), `embed`
(OPT's narrower embedding); layers are the `{i}` in a parameter's name. Parameters are counted, and models cut, from
these tables alone (`architectures.py`); a new architecture is one table and one test. This file imports no torch.

An encoder–decoder has two stacks of equally many layers, and units in several places of each: `heads.1` are the heads
of its second attention (decoder, on itself), `heads.2` of its third (decoder, on the encoder). Scores have one row for
each such place and layer: place p of layer i is row p·L + i. A model with one stack has one place: row i is layer i.
In a mixture each expert is such a place of neurons. A parameter of all experts has `experts` as its first axis.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from capacity_gap.models.architectures import ARCHITECTURES
from capacity_gap.models.defaults import by_own_names, completed
from capacity_gap.models.layers import of_kept_layers, symmetric_layers
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure import derived
from capacity_gap.structure.architecture import NEURONS_PER_HIDDEN, Architecture, Config, Dims, get


def architecture(config: Config) -> Architecture:
    """The table for a config's `model_type`: one that was written, else one derived from transformers' own class.

    Raises:
        ConfigError: there is none, and transformers has no such decoder.
    """
    if isinstance(config, Mapping):
        return _read(_maker(config), _text(config))[0]
    return _maker(config)(config) if is_written(config) else architecture(config.to_dict())


def is_written(config: Config) -> bool:
    """Whether a table was written, or registered, for its `model_type`."""
    return get(config, "model_type") in ARCHITECTURES


def _maker(config: Config) -> Callable[[Config], Architecture]:
    return ARCHITECTURES[get(config, "model_type")] if is_written(config) else derived.table


def _text(config: Mapping[str, Any]) -> str:
    """A config.json as text, by which its table and sizes are looked up: a plan asks for them thousands of times."""
    return json.dumps(dict(config), default=str)


@functools.lru_cache(maxsize=4096)
def _read(make: Callable[[Config], Architecture], text: str) -> tuple[Architecture, Dims]:
    config = completed(json.loads(text))
    table = make(config)
    return table, _sizes(table, config)


def cuttable(config: Config) -> Architecture:
    """The table of a model that is to be scored or cut.

    Raises:
        ConfigError: it can be counted, trained and taught by, and no more.
    """
    table = architecture(config)
    if table.uncut:
        raise ConfigError(
            f"models of the architecture {get(config, 'model_type')!r} cannot be scored or cut yet: {table.uncut}. "
            "They can teach a student that is a separate model: student=ORG/NAME or student=FOLDER, with the same "
            "tokens. To cut students, use teachers such as qwen3, llama3, gemma3 or smollm2."
        )
    return table


def check_head(config: Config) -> None:
    """Raises `ConfigError` where a model would be computed wrongly.

    An attention in both directions sees what it should predict. Fast kernels leave out the cap of attention's logits;
    Gemma 2 has no fast one here.
    """
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if (value := get(config, key)) and (key, get(config, "model_type")) != ("attn_logit_softcapping", "gemma2"):
            raise ConfigError(
                f"this {get(config, 'model_type')} has {key}={value}, which is not supported for scoring, training or "
                "evaluation yet. Use a model without it, such as Gemma 3."
            )
    if not is_written(config):
        derived.check_read(config if isinstance(config, Mapping) else config.to_dict())


def architecture_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage that scores or cuts a model hashes of its table: nothing for the package's own."""
    if not is_written(config):
        return {}
    return ARCHITECTURES.entry(str(completed(config)["model_type"])).identity_as("architecture")


def dims(config: Config) -> Dims:
    """The sizes of the model that `config` describes."""
    if isinstance(config, Mapping):
        return _read(_maker(config), _text(config))[1]
    return _sizes(architecture(config), config) if is_written(config) else dims(config.to_dict())


def _sizes(table: Architecture, config: Config) -> Dims:
    keys = table.keys
    hidden, heads = get(config, keys["hidden"]), get(config, keys["heads"]) if "heads" in keys else 1
    positions = get(config, keys["positions"]) if "positions" in keys else 0
    return Dims(
        vocab=get(config, keys["vocab"]),
        hidden=hidden,
        heads=heads,
        kv_heads=table.kv_heads or ((get(config, keys["kv_heads"]) or heads) if "kv_heads" in keys else heads),
        head_dim=(not table.square and get(config, keys.get("head_dim", "head_dim"))) or hidden // heads,
        neurons=(get(config, keys["neurons"]) if "neurons" in keys else None) or NEURONS_PER_HIDDEN * hidden,
        layers=get(config, keys["layers"]),
        tied=bool(get(config, "tie_word_embeddings")),
        positions=positions + table.position_offset,
        embed=(get(config, keys["embed"]) or hidden) if "embed" in keys else 0,
        buckets=get(config, keys["buckets"]) if "buckets" in keys else 0,
        first_position=table.position_offset,
        experts=get(config, table.keys["experts"]) if "experts" in table.keys else 0,
        active=get(config, table.keys["active"]) if "active" in table.keys else 0,
    )


def config_with(config: Mapping[str, Any], sizes: Dims, stay: Sequence[int] | None = None) -> dict[str, Any]:
    """A config.json like `config` with these sizes; head_dim is written where hidden does not imply it.

    `stay`: the numbers of the layers that stay, by default those in the middle. An encoder–decoder, whose stacks may
    keep different ones, has no entries for single layers.
    """
    table, old = architecture(config), dims(config)
    found = by_own_names(config)
    for axis in ("hidden", "heads", "kv_heads", "neurons", "layers", "experts"):
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
    if stay is None:
        stay = symmetric_layers(old.layers, sizes.layers)
    return found | of_kept_layers(config, table.keys["layers"], stay)


def pattern_of(table: Architecture, name: str) -> tuple[str, int]:
    """The row of the table that parameter `name` belongs to, and its layer (0 outside the layers)."""
    if name in table.parameters:
        return name, 0
    # The first number is the layer's: later ones, as in T5's `block.0.layer.1`, belong to the pattern.
    found = re.search(r"\.(\d+)\.", name)
    pattern = name.replace(found[0], ".{i}.", 1) if found else name
    if pattern not in table.parameters:
        raise ConfigError(f"parameter {name} is not in the axis table, so the model cannot be pruned.")
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
    if isinstance(config, Mapping):
        return _counted(_maker(config), _text(config), non_embedding)
    return count(architecture(config), dims(config), non_embedding=non_embedding)


@functools.lru_cache(maxsize=4096)
def _counted(make: Callable[[Config], Architecture], text: str, non_embedding: bool) -> int:
    return count(*_read(make, text), non_embedding=non_embedding)


def padded(vocab: int, multiple: int) -> int:
    """`vocab` rounded up to a multiple: kernels and shards are fastest with such numbers of rows."""
    return -(-vocab // multiple) * multiple
