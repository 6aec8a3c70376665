"""A ladder of the user's own model folders, checked before anything is computed. Imports no torch."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from capacity_gap.models.axes import count_params
from capacity_gap.models.ladders import FOLDERS, Family
from capacity_gap.models.weights import check_weights
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import files_digest


def is_folder(teacher: str) -> bool:
    """Whether `teacher` names a local model folder rather than a scale."""
    return "/" in teacher or Path(teacher).expanduser().is_dir()


def local_family(folders: Sequence[str]) -> Family:
    """A family whose rungs are model folders, named by the folders' own names, smallest first.

    Raises:
        ConfigError: a folder is no model that can be read safely, two have one name, or their vocabularies differ.
    """
    paths = [Path(f).expanduser().absolute() for f in folders]
    configs = {path.name: _config(path) for path in paths}
    if len(configs) < len(set(paths)):
        raise ConfigError(
            f"family.folders={list(folders)}: two folders have the same name, which is what names a rung."
        )
    _same_vocabulary(paths)
    order = sorted(paths, key=lambda p: count_params(configs[p.name]))
    return Family(FOLDERS, {p.name: configs[p.name] for p in order}, 1, {p.name: str(p) for p in order})


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{path} is no model folder: it has no config.json. Give a folder that save_pretrained wrote, with "
            "config.json, tokenizer.json and .safetensors files."
        )
    config = json.loads(file.read_text())
    if config.get("quantization_config"):
        raise ConfigError(f"{path} is a quantised checkpoint; pruning needs its full-precision original.")
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{path} has no tokenizer.json: save its (fast) tokenizer there too.")
    check_weights(path, config)  # an architecture without a table says so here
    return config


def _same_vocabulary(paths: Sequence[Path]) -> None:
    """Students are compared by loss per token and distilled on their teachers' logits: ids must mean the same."""
    first = vocabulary(paths[0])
    for path in paths[1:]:
        other = vocabulary(path)
        if other != first:
            changed = sorted(set(first.items()) ^ set(other.items()))[:3]
            raise ConfigError(
                f"{path.name} and {paths[0].name} have different vocabularies ({len(other)} and {len(first)} tokens; "
                f"the first differences: {changed}). Teachers of one grid must share a tokenizer."
            )


@lru_cache(maxsize=64)
def vocabulary(path: Path) -> dict[str, int]:
    """Token → id of the tokenizer saved in a folder."""
    content = json.loads((path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    found = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    return found | {t["content"]: t["id"] for t in content.get("added_tokens", ())}


def end_of_text(path: Path) -> str | None:
    """The token that ends texts, as the tokenizer saved in a folder names it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / file).is_file():
            named = json.loads((path / file).read_text(encoding="utf-8")).get("eos_token")
            if named:
                return named["content"] if isinstance(named, dict) else str(named)
    return None


def in_text(path: Path, token: int) -> bool:
    """Whether packed text can hold a token of a folder's tokenizer: it ends texts, or is no control token."""
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    control = {t["id"] for t in content.get("added_tokens", ()) if t.get("special")}
    return token not in control or vocabulary(path).get(end_of_text(path) or "", token) == token


def content_digest(path: Path) -> str:
    """SHA-256 over a model folder's config, tokenizer and weights: its identity, wherever it lies."""
    files = [path / "config.json", path / "tokenizer.json", *sorted(path.glob("*.safetensors"))]
    return files_digest(files)
