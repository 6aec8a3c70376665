"""The JSON files of a model folder, read without trust: whatever is in them, what comes out is a model or an error.

Imports no torch; whether transformers makes a model of a config.json is asked in `building.py`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from capacity_gap.models.architectures import ARCHITECTURES
from capacity_gap.models.axes import architecture, count_params, dims
from capacity_gap.models.defaults import ASSUMED, assumed, by_own_names
from capacity_gap.settings.errors import ConfigError, UserError, nearest, shown
from capacity_gap.structure import derived

# The most that a size may be: far beyond every model, and small enough to be counted with.
MOST = {"layers": 10_000, "decoder_layers": 10_000, "heads": 10_000, "kv_heads": 10_000}
MOST_UNITS = 10_000_000
MOST_PARAMS = 10**15
MOST_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "num_decoder_layers")
AGAIN = "Copy or download the folder again, or save the model with save_pretrained."


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: it is no JSON, no object, or not UTF-8.
    """
    try:
        found = json.loads(file.read_bytes().decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {shown(error)}. {AGAIN}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is not a JSON object but a {type(found).__name__}. {AGAIN}")
    return found


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder, whose sizes can be counted with.

    Raises:
        ConfigError: there is none, it cannot be read, or it describes no model that is known here.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise ConfigError(f"{folder} does not exist{nearest(folder.name, beside)}.")
    if not file.is_file():
        raise ConfigError(
            f"{folder} is not a model folder: it has no config.json. Use a folder written by save_pretrained, with "
            "config.json, tokenizer.json and .safetensors files."
        )
    config = read_object(file)
    _check_kind(file, config)
    if config.get("quantization_config"):
        raise ConfigError(f"{folder} is a quantised checkpoint; pruning needs its full-precision original.")
    if wrong := next(_wrong_sizes(config), None):
        raise ConfigError(f"{file}: {wrong} {AGAIN}")
    try:
        params = count_params(config)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"{file} describes a model whose parameters cannot be counted ({type(error).__name__}: {shown(error)}). "
            f"{AGAIN}"
        ) from error
    if params > MOST_PARAMS:
        raise ConfigError(f"{file} describes a model of {params:,} parameters. {AGAIN}")
    return config


def _check_kind(file: Path, config: Mapping[str, Any]) -> None:
    """Raises for models without a table: those with custom code, and multimodal ones."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"{file}: model_type is {shown(repr(kind))}; it should be a name such as 'llama'. {AGAIN}")
    if kind in ASSUMED or kind in ARCHITECTURES:
        return
    inner = config.get("text_config") or config.get("llm_config")
    if isinstance(inner, Mapping):
        raise ConfigError(
            f"{file}: {shown(kind)!r} is a multimodal model; only language models can be distilled. Save "
            f"its language model ({shown(inner.get('model_type'))}) to a separate folder."
        )
    if config.get("auto_map") and not derived.is_known(kind):
        raise ConfigError(
            f"{file}: the architecture {shown(kind)!r} is custom code in the folder (auto_map), which is never run. "
            "Use a model that transformers supports, or register a table for it with extend=[MODULE]."
        )


def _wrong_sizes(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with numbers, before anything is counted with them."""
    own = by_own_names(config)
    for key in MOST_LAYERS:  # before the table: it lists every layer
        if key in own and not _is_size(own[key], MOST["layers"]) and own[key] is not None:
            yield f"{key}={shown(repr(own[key]))} is not a valid number of layers (1 to {MOST['layers']:,})."
    table = architecture({k: v for k, v in config.items() if k == "model_type"})
    for axis, key in table.keys.items():
        if key in own and own[key] is None and assumed(str(config["model_type"])).get(key) is None:
            continue
        most = MOST.get(axis, MOST_UNITS)
        if key in own and not _is_size(own[key], most):
            yield f"{key}={shown(repr(own[key]))} is not a valid size (a whole number, 1 to {most:,})."
    if (dim := own.get("head_dim")) is not None and not _is_size(dim, MOST_UNITS):
        yield f"head_dim={shown(repr(dim))} is not a valid size (a whole number, 1 to {MOST_UNITS:,})."
    for key, value in own.items():
        if key.endswith(("_eps", "_epsilon")) and _is_number(value) and not 0 < value < 1:
            yield f"{key}={shown(repr(value))} is not a number between 0 and 1."
    sizes = dims(config)
    if sizes.heads % sizes.kv_heads:
        yield f"{sizes.heads} query heads do not divide among {sizes.kv_heads} key-value heads."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
