"""The axis table of a decoder, read off transformers' own class. Needs torch; nothing is downloaded.

The model is built on the meta device with sizes that are all different, so that the shape of a parameter says which
axes it has. What it does with them is seen in `probing.py`, and what neither shows is listed in `type_facts.py`. A
derived table is a claim: `pruning/proof.py` proves it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure.architecture import NEURONS_PER_HIDDEN, Architecture, Stack, Sublayer
from capacity_gap.structure.probing import Underivable, disagreement, from_config, names_in_files, with_sites
from capacity_gap.structure.type_facts import ATTENTION, ATTENTION_OUTPUT, FACTS, PER_LAYER, SIZE_KEYS, Facts

# Entries that a small model does without: its numbers are fp32, its layers are of kinds chosen here.
NO_PART = (
    *("dtype", "torch_dtype", "rope_parameters", "rope_scaling", "quantization_config", "auto_map"),
    "sliding_window_pattern",
)
PROBE = {
    "vocab": 211,
    "hidden": 84,  # heads must divide it, in some classes
    "heads": 12,
    "kv_heads": 3,
    "head_dim": 24,
    "neurons": 176,
    "layers": 4,
    "positions": 67,
    "experts": 6,
    "active": 2,
}
SQUARE_HIDDEN = 96  # where hidden = heads × head_dim, heads are of size 8
WINDOW = 5  # tokens of attention that slides, fewer than a probe reads


@dataclass(frozen=True)
class Derived:
    """What was found: the table, and what it does not say."""

    table: Architecture
    pads: bool  # whether the embedding never trains the row of `pad_token_id`


def derive(config: Mapping[str, Any]) -> Derived:
    """The table of the architecture and the flags of `config`; its sizes do not matter.

    Raises:
        ConfigError: transformers has no such decoder.
        Underivable: a parameter has an axis that is none of the known ones, or layers differ.
    """
    keys, facts = size_keys(config), FACTS.get(str(config["model_type"]), Facts())
    if lacking := [a for a in NEEDED if a not in keys and not (a == "neurons" and facts.fixed_neurons)]:
        raise Underivable(f"its config.json lacks {', '.join(lacking)}")
    probe, square = _probe(config, keys)
    with torch.device("meta"):
        model = from_config(probe)
    if any(p.ndim > 2 + ("experts" in keys) for p in model.parameters()):
        raise Underivable("it has convolutions, which are not supported")
    table = _parameters(model, probe, keys, square)
    table = replace(table, in_files=names_in_files(table, probe)) if "experts" in keys else table
    return Derived(with_sites(table, probe), _pads(probe))


NEEDED = ("vocab", "hidden", "heads", "neurons", "layers")


def as_it_is(config: Mapping[str, Any], why: str) -> Architecture:
    """The table of one model that cannot be cut: the lengths of its parameters instead of axes.

    Args:
        config: its config.json.
        why: it cannot be cut.
    """
    with torch.device("meta"):
        model = from_config(config)
    keys = size_keys(config)
    vocab, layers = getattr(model.config, keys["vocab"]), getattr(model.config, keys["layers"])
    layer = layer_prefix(model, layers)
    shapes = {
        name: tuple("vocab" if n == vocab else str(n) for n in parameter.shape)
        for name, parameter in model.named_parameters()
    }
    output = next(n for n, m in model.named_modules() if m is model.get_output_embeddings()) + ".weight"
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings()) + ".weight"
    shapes.setdefault(output, shapes[embedding])
    kept = {axis: key for axis, key in keys.items() if axis in ("vocab", "hidden", "heads", "layers")}
    stack = Stack(f"{layer}.{{i}}", (), Sublayer("", ""))
    return Architecture(shapes, kept, output, (stack,), uncut=why, literal=True)


def class_defaults(model_type: str) -> dict[str, Any]:
    """The defaults of this type for keys that its config.json omits."""
    from transformers import AutoConfig

    made = AutoConfig.for_model(model_type)
    # What the class fills in from other entries, such as key-value heads, stays open.
    open_ = {f.name: None for f in fields(made) if f.default is None}
    return {**made.to_dict(), **open_}


def other_names(model_type: str) -> dict[str, str]:
    """Names by which the class takes keys that it calls otherwise."""
    from transformers import AutoConfig

    given = getattr(AutoConfig.for_model(model_type), "attribute_map", None) or {}
    return {**given, **FACTS.get(model_type, Facts()).names}


def size_keys(config: Mapping[str, Any]) -> dict[str, str]:
    """Axis → the key of config.json that holds its size, under the name that the type's class uses."""
    from transformers import AutoConfig

    kind = str(config["model_type"])
    try:
        made = AutoConfig.for_model(kind)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"transformers does not support model_type {kind!r}.") from error
    if made.is_encoder_decoder:
        raise ConfigError(f"{kind!r} is an encoder-decoder; only T5 is supported.")
    names, known = getattr(made, "attribute_map", {}) or {}, made.to_dict()
    found = {}
    for axis, candidates in SIZE_KEYS.items():
        if axis == "neurons" and FACTS.get(kind, Facts()).fixed_neurons:
            continue
        for key in (names.get(c, c) for c in candidates):
            if key in known or key in config:
                found[axis] = key
                break
    return found


def probe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a small model with the structure of `config`, whose sizes are all different."""
    return _probe(config, size_keys(config))[0]


def _probe(config: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    """The same, and whether hidden must be heads × head_dim."""
    left_out, names = (*NO_PART, *PER_LAYER), other_names(str(config["model_type"]))
    config = {names.get(k, k): v for k, v in config.items()}
    given = {k: v for k, v in config.items() if k not in left_out and not k.endswith("_token_id")}
    given |= {keys[a]: n for a, n in PROBE.items() if a in keys} | {"pad_token_id": None, "eos_token_id": None}
    given |= {"bos_token_id": None, "use_cache": True}
    # Layers of different kinds beside each other, so that a kind that stays with the wrong layer shows.
    for key, pattern in kinds(config).items():
        some = list(dict.fromkeys(pattern))
        given[key] = [some[i % len(some)] for i in range(PROBE["layers"])]
    slides = {**class_defaults(str(config["model_type"])), **config}.get("sliding_window")
    given |= {"sliding_window": WINDOW} if isinstance(slides, int) else {}
    given |= FACTS.get(str(config["model_type"]), Facts()).probe
    free = {**given, keys.get("head_dim", "head_dim"): PROBE["head_dim"]}
    if not FACTS.get(str(config["model_type"]), Facts()).square and _has_output_map(free):
        return free, False
    square = {**given, keys["hidden"]: SQUARE_HIDDEN}
    square |= {keys["head_dim"]: SQUARE_HIDDEN // PROBE["heads"]} if "head_dim" in keys else {}
    return square, True


def _has_output_map(probe: Mapping[str, Any]) -> bool:
    """Whether some map takes heads whose sizes do not add up to the hidden size."""
    wide = PROBE["heads"] * PROBE["head_dim"]
    try:
        with torch.device("meta"):
            return any(
                sorted(p.shape) == sorted((PROBE["hidden"], wide))
                and re.search(ATTENTION_OUTPUT, n.removesuffix(".weight"))
                for n, p in from_config(probe).named_parameters()
            )
    except Exception:
        return False


def _sizes(keys: Mapping[str, str], square: bool) -> dict[str, int]:
    """The lengths that a dimension of the probe may have, by axis; of two that are equal the first is meant."""
    hidden = SQUARE_HIDDEN if square else PROBE["hidden"]
    width = hidden // PROBE["heads"] if square else PROBE["head_dim"]
    heads, neurons = PROBE["heads"], PROBE["neurons"] if "neurons" in keys else NEURONS_PER_HIDDEN * hidden
    kv_heads = PROBE["kv_heads"] if "kv_heads" in keys else heads
    return {
        "vocab": PROBE["vocab"],
        "hidden": hidden,
        "neurons": neurons,
        "gate_up": 2 * neurons,
        "heads": heads * width,
        "kv_heads": kv_heads * width,
        "qkv": 3 * heads * width,
        "qkv_grouped": (heads + 2 * kv_heads) * width,
        "qkv_multi": (heads + 2) * width,  # of one key-value head
        "head_dim": width,
        "per_head": heads,
        "per_kv_head": kv_heads,
        "positions": PROBE["positions"],
        **({"experts": PROBE["experts"]} if "experts" in keys else {}),
        "1": 1,
    }


def _parameters(model: Any, probe: Mapping[str, Any], keys: Mapping[str, str], square: bool) -> Architecture:
    facts = FACTS.get(str(probe["model_type"]), Facts())
    sizes = _sizes(keys, square)
    layer = layer_prefix(model, PROBE["layers"])
    of_layers: dict[str, list[tuple[str, ...]]] = {}
    for name, parameter in model.named_parameters():
        pattern = re.sub(rf"^{re.escape(layer)}\.\d+\.", f"{layer}.{{i}}.", name)
        axes = tuple(_axis(model, name, d, n, sizes, facts, square) for d, n in enumerate(parameter.shape))
        of_layers.setdefault(pattern, []).append(axes)
    if numbered := [p for p in of_layers if re.search(r"\.\d+(\.|$)", p)]:
        raise Underivable(f"it has separate parameters for single heads or experts ({numbered[0]})")
    for pattern, found in of_layers.items():
        if len(set(found)) > 1 or ("{i}" in pattern and len(found) != PROBE["layers"]):
            raise Underivable(f"the layers of {probe['model_type']!r} differ in {pattern.replace('{i}', '·')}.")
    parameters = {pattern: found[0] for pattern, found in of_layers.items()}
    output = next(n for n, m in model.named_modules() if m is model.get_output_embeddings()) + ".weight"
    parameters.setdefault(output, ("vocab", "hidden"))
    fused = {axis for axes in parameters.values() for axis in axes}
    one = 1 if any(sizes["qkv_multi"] in p.shape for p in model.parameters()) else 0
    if "positions" in keys and not any("positions" in axes for axes in parameters.values()):
        keys = {axis: key for axis, key in keys.items() if axis != "positions"}
    keys = {**keys, "positions": facts.limit} if facts.limit else keys
    keys = {a: k for a, k in keys.items() if not (a == "kv_heads" and (one or fused & {*ONE_TO_ONE}))}
    offset = facts.position_offset if "positions" in keys else 0
    return Architecture(
        parameters,
        keys,
        output,
        (Stack(f"{layer}.{{i}}", (), Sublayer("", "")),),
        square=square,
        kv_heads=one,
        position_offset=offset,
        leftovers=BUFFERS,
        alibi=facts.alibi,
    )


# Endings of names in files of older releases, which are no parameters.
BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")
ONE_TO_ONE = ("qkv", "qkv_by_head", "qkv_in_fours")  # fused maps of as many key-value heads as query heads


def layer_prefix(model: Any, layers: int) -> str:
    """The name of the list of layers."""
    named = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not named:
        raise Underivable("its layers are not in a list")
    return min(named, key=lambda n: n.count("."))


def _axis(
    model: Any, name: str, dimension: int, length: int, sizes: Mapping[str, int], facts: Facts, square: bool
) -> str:
    """Which axis one dimension of one parameter is."""
    if length == sizes["positions"] + facts.position_offset and "position" in name + facts.positions:
        return "positions"
    axis = next((a for a, n in sizes.items() if n == length), None)
    if axis is None:
        raise Underivable(
            f"dimension {dimension} of {name}, of length {length} in a small model, is not an axis that can be cut"
        )
    if axis == "qkv":
        return facts.fused or axis
    if axis == "qkv_multi":
        return "qkv_grouped"
    if axis == "gate_up":
        return facts.gated or axis
    module, _, kind = name.rpartition(".")
    if axis == "hidden" and square and re.search(ATTENTION, module):
        return _square_axis(model, module, dimension, kind)
    return axis


def _square_axis(model: Any, module: str, dimension: int, kind: str) -> str:
    """`hidden` or `heads`, where both are as long: maps into heads give heads, the one behind them takes heads."""
    if not isinstance(model.get_submodule(module), nn.Linear) and not _is_conv1d(model.get_submodule(module)):
        return "heads"  # a norm inside attention runs over all heads
    gives = kind == "bias" or dimension == int(_is_conv1d(model.get_submodule(module)))
    is_output = re.search(ATTENTION_OUTPUT, module) is not None
    return "hidden" if gives == is_output else "heads"


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _pads(probe: Mapping[str, Any]) -> bool:
    with torch.device("meta"):
        return from_config({**probe, "pad_token_id": 1}).get_input_embeddings().padding_idx is not None


def kinds(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Entries for single layers that the class fills in by itself: the pattern that it repeats, by key."""
    from transformers import AutoConfig

    keys = size_keys(config)
    given = {k: v for k, v in config.items() if k not in PER_LAYER and k != "model_type"}
    try:
        made = AutoConfig.for_model(str(config["model_type"]), **{**given, keys["layers"]: LONG}).to_dict()
    except Exception:
        return {}
    found = {}
    for key in PER_LAYER:
        listed = made.get(key)
        if isinstance(listed, list) and len(listed) == LONG:
            repeats = (n for n in range(1, LONG) if all(listed[i] == listed[i % n] for i in range(LONG)))
            if period := next(repeats, None):
                found[key] = listed[:period]
    return found


LONG = 48  # layers, of which a pattern is seen


HEAD_WORDS = re.compile("logit|scal|cap|mult|temperature")


def read_wrongly(kind: str, usual: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Why losses here would not be those of the class's own logits, and the entries that would make them so.

    Args:
        kind: the `model_type`.
        usual: what its class assumes.

    Returns:
        The reason, empty where a small model agrees; and each entry that, changed, would make it disagree.
    """
    config = {"model_type": kind, "tie_word_embeddings": False}
    try:
        probe = probe_of(config)
        if reason := disagreement(probe):
            return reason, []
    except Exception as error:
        return f"a small model of its kind cannot be built ({type(error).__name__})", []
    numbers = {k: v for k, v in usual.items() if HEAD_WORDS.search(k) and (v is None or isinstance(v, float))}
    wrong = []
    for key, value in numbers.items():
        try:
            if disagreement({**probe, key: 0.37 * (value or 1.0)}):
                wrong.append(key)
        except Exception:
            continue
    return "", wrong
