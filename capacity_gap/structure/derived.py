"""Axis tables of architectures that none was written for: looked up, and derived where they are not known yet.

A table depends on the type, the release of transformers, and the entries of config.json that change the structure.
Common ones are in `derived_tables.json`, which `python -m capacity_gap.structure.derived` makes anew. Another one is
derived once, in a process of its own if torch is not loaded here, and kept in the user's cache. Imports no torch.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import ConfigError, first_line, nearest, shown
from capacity_gap.settings.hashing import files_digest, fingerprint
from capacity_gap.structure.architecture import Architecture, Stack, Sublayer
from capacity_gap.structure.type_facts import PER_LAYER, STRUCTURELESS

COMMITTED = Path(__file__).with_name("derived_tables.json")
DERIVE_S = 300  # the longest that deriving one table may take


def table(config: Mapping[str, Any]) -> Architecture:
    """The table of a config.json. Raises `ConfigError` where transformers has no such decoder."""
    found = architecture_from(_entry(config)["table"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # Such factors are one for each pair of a head's numbers, and their class counts these as hidden / heads.
    return replace(found, square=True) if "short_factor" in rope else found


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers assumes for keys that this config.json leaves out, kinds of single layers among them."""
    entry = _entry(config)
    found: dict[str, Any] = {**entry["defaults"], **config}
    layers = found[entry["table"]["keys"]["layers"]]
    for key, pattern in entry["kinds"].items():
        if found.get(key) is None:
            found[key] = [pattern[i % len(pattern)] for i in range(layers)]
    return found


def check_read(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where losses here would not be those of the model's own logits."""
    kind = str(config.get("model_type"))
    of_type = _type(kind)
    usual_ = of_type["defaults"]
    other = [k for k in of_type["head_keys"] if k in config and config[k] != usual_.get(k)]
    if of_type["unread"] or other:
        said = of_type["unread"] or f"{other[0]}={config[other[0]]} changes its logits in an unsupported way"
        raise ConfigError(f"models of the type {kind!r} cannot be trained, taught by or evaluated here: {said}.")


def is_committed(config: Mapping[str, Any]) -> bool:
    """Whether the package holds the table of this config.json, which its tests prove."""
    kind = str(config.get("model_type"))
    return _flags_text(config) in _committed()["types"].get(kind, {}).get("tables", {})


def is_known(kind: str) -> bool:
    """Whether transformers has a decoder of this `model_type`."""
    if found := _committed().get("decoders"):
        return kind in found
    try:
        return bool(_type(kind))
    except ConfigError:
        return False


def usual(kind: str) -> dict[str, Any]:
    """What the class of a `model_type` assumes."""
    return _type(kind)["defaults"]


def names(kind: str) -> dict[str, str]:
    """Other names by which the class of a `model_type` takes a key."""
    return _type(kind)["names"]


def pads(config: Mapping[str, Any]) -> bool:
    """Whether the class never trains the embedding of `pad_token_id`."""
    return _entry(config)["pads"]


def flags(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that may change the structure and are not as the class has them."""
    return {
        key: value for key, value in sorted(config.items()) if _is_flag(key, value, usual) and value != usual.get(key)
    }


def _is_flag(key: str, value: Any, usual: Mapping[str, Any]) -> bool:
    """Whether an entry is one that the class reads, and whose value may decide the structure or the kinds of layers."""
    if key == "sliding_window":  # without a window no layer slides
        return value is None and key in usual
    if key in LAYERS_APART and value:
        return True
    if value is None or isinstance(value, float | dict | list) or key.endswith("_token_id") or key in PER_LAYER:
        return False
    return (key in usual or key == "sliding_window_pattern") and key not in STRUCTURELESS and key not in DULL


LAYERS_APART = ("mlp_only_layers",)  # the numbers of layers that have no experts


def _flags_text(config: Mapping[str, Any]) -> str:
    kind = str(config.get("model_type"))
    mine = {k: v for k, v in flags(config, usual(kind)).items() if k not in _type(kind)["sizes"]}
    return json.dumps(mine, sort_keys=True)


def _entry(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(config.get("model_type"))
    found = _find(kind, _flags_text(config))
    return _as_it_is(kind, json.dumps(dict(config), default=str), found["uncut"]) if "uncut" in found else found


@functools.cache
def _committed() -> dict[str, Any]:
    found = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.exists() else {}
    return found if found.get("transformers") == version("transformers") else {"types": {}}


@functools.cache
def _type(kind: str) -> dict[str, Any]:
    if kind not in _committed().get("decoders", [kind]):
        raise ConfigError(
            f"transformers {version('transformers')} has no decoder of the type {shown(kind)!r}"
            f"{nearest(kind, _committed().get('decoders', []))}. If it is your own model, register its axis table "
            "with capacity_gap.models.architectures.ARCHITECTURES, in a module named by extend=[MODULE]."
        )
    return _committed()["types"].get(kind) or _made({"type": kind})


@functools.cache
def _find(kind: str, flags: str) -> dict[str, Any]:
    of_type = _type(kind)
    found = of_type.get("tables", {}).get(flags) or _made({"type": kind, "flags": json.loads(flags)})
    return {"defaults": of_type["defaults"], **found}


@functools.lru_cache(maxsize=256)
def _as_it_is(kind: str, config: str, why: str) -> dict[str, Any]:
    """The parameters of one model whose axes are not known: it can be counted, trained and taught by."""
    given = {k: v for k, v in json.loads(config).items() if k not in DULL and not k.startswith("_")}
    found = _made({"type": kind, "config": given, "uncut": why})
    return {"defaults": usual(kind), **found}


def _made(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `answer`, from the cache if possible."""
    name = fingerprint({**asked, "transformers": version("transformers"), "by": _sources()})
    file = cache_folder() / f"{name}.json"
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        _check_form(found, asked)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        found = answer(asked) if "torch" in sys.modules else _asked_outside(asked)
        _keep(file, found)
    if "error" in found:
        raise ConfigError(found["error"])
    return found


def _check_form(found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises where the cached entry does not match the request."""
    if "error" in found or "uncut" in found:
        return
    if "flags" in asked or "config" in asked:
        table = architecture_from(found["table"])
        _ = table.keys["layers"], table.keys["hidden"], found["pads"], found["kinds"].items
    else:
        _ = found["defaults"].items, found["sizes"], found["names"].items, found["unread"], found["head_keys"]


def _sources() -> str:
    """The digest of what derives: what another release of this package derived is not read."""
    return files_digest(sorted(Path(__file__).parent.glob("*.py")))


def cache_folder() -> Path:
    """Where derived tables are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # this user has no home
        root = root or str(Path.home() / ".cache")
    return Path(root or tempfile.gettempdir()) / "capacity_gap" / "tables"


def _keep(file: Path, found: Mapping[str, Any]) -> None:
    """Writes to the cache whole or not at all; one that cannot be written costs time, and nothing else."""
    beside = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(found), encoding="utf-8")
        beside.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _asked_outside(asked: Mapping[str, Any]) -> dict[str, Any]:
    """`answer` in a process of its own: importing torch takes longer than a plan, and this one may need none."""
    words = [sys.executable, "-m", __name__, json.dumps(asked)]
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=DERIVE_S, env=environment, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        why = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise ConfigError(
            f"the structure of {asked['type']!r} models could not be derived from transformers: "
            f"{why[-1] if why else ''}."
        ) from error


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Derives: of a type its defaults and size keys, of a type and flags the table. Needs torch."""
    from capacity_gap.structure import derive
    from capacity_gap.structure.probing import Underivable

    kind = asked["type"]
    try:
        if "config" in asked:
            try:
                table = derive.as_it_is(asked["config"], asked["uncut"])
            except Exception as error:  # whatever a class raises over a config.json
                return {"error": f"{kind}: transformers builds no decoder from its config.json ({first_line(error)})"}
            return {"table": _as_json(table), "pads": False, "kinds": {}}
        if "flags" not in asked:
            keys = derive.size_keys({"model_type": kind})
            usual = derive.class_defaults(kind)
            unread, head_keys = derive.read_wrongly(kind, usual)
            return {
                "defaults": _plain(usual),
                "sizes": sorted(keys.values()),
                "names": derive.other_names(kind),
                "unread": unread,
                "head_keys": head_keys,
            }
        config = {"model_type": kind, **asked["flags"]}
        try:
            found = derive.derive(config)
        except Underivable as error:
            return {"uncut": str(error)}
        except Exception as error:  # whatever a class raises over sizes that it did not expect
            return {"uncut": f"a small model of its kind cannot be built ({type(error).__name__}: {first_line(error)})"}
        return {"table": _as_json(found.table), "pads": found.pads, "kinds": derive.kinds(config)}
    except ConfigError as error:
        return {"error": str(error)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a plan may need: plain values."""
    return {
        k: v
        for k, v in values.items()
        if (v is None or isinstance(v, str | int | float)) and not k.startswith("_") and k not in DULL
    }


DULL = ("transformers_version", "return_dict", "chunk_size_feed_forward", "problem_type", "output_hidden_states")


def _as_json(found: Architecture) -> dict[str, Any]:
    usual = asdict(Architecture({}, {}, "", ()))
    return {k: v for k, v in asdict(found).items() if k in ("parameters", "keys", "output") or v != usual[k]}


def architecture_from(found: Mapping[str, Any]) -> Architecture:
    """The table that `_as_json` wrote down."""
    stacks = tuple(
        Stack(
            s["layer"],
            tuple(Sublayer(**a) for a in s["attentions"]),
            Sublayer(**s["mlp"]),
            tuple(s["stream"]),
        )
        for s in found["stacks"]
    )
    parameters = {name: tuple(axes) for name, axes in found["parameters"].items()}
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    return Architecture(**{**plain, "stacks": stacks, "parameters": parameters})


def main(words: list[str]) -> int:
    """Answers one question, or without any writes `derived_tables.json` anew."""
    if words:
        print(json.dumps(answer(json.loads(words[0]))))
        return 0
    COMMITTED.write_text(json.dumps(committed_tables(), indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    return 0


def committed_tables() -> dict[str, Any]:
    """The content of `derived_tables.json`: every common type as its class has it, and with its usual flags."""
    from capacity_gap.structure.type_facts import COMMON

    types: dict[str, Any] = {}
    for kind, variants in COMMON.items():
        types[kind] = {**answer({"type": kind}), "tables": {}}
        for given in ({}, *variants):
            mine = json.dumps(flags(given, types[kind]["defaults"]), sort_keys=True)
            types[kind]["tables"][mine] = answer({"type": kind, "flags": json.loads(mine)})
    return {"transformers": version("transformers"), "decoders": decoders(), "types": types}


def decoders() -> list[str]:
    """Every `model_type` that AutoModelForCausalLM makes a model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
