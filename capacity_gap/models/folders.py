"""A ladder of the user's own model folders, checked before anything is computed. Imports no torch."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from capacity_gap.models.axes import count_params
from capacity_gap.models.config_files import AGAIN, MOST_UNITS, read_config, read_object
from capacity_gap.models.ladders import FOLDERS, Family
from capacity_gap.models.weights import check_weights
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import files_digest
from capacity_gap.settings.places import user_path
from capacity_gap.store.files import tell


def is_folder(teacher: str) -> bool:
    """Whether `teacher` names a local model folder rather than a scale."""
    return "/" in teacher or user_path(teacher).is_dir()


def local_family(folders: Sequence[str]) -> Family:
    """A family whose rungs are model folders, named by the folders' own names, smallest first.

    A folder that cannot be used is left out with a note, and its name says why it was when it is asked for.

    Raises:
        ConfigError: no folder can be used, two have one name, or their vocabularies differ.
    """
    paths = [user_path(f).absolute() for f in folders]
    if len({path.name for path in paths}) < len(set(paths)):
        raise ConfigError(
            f"family.folders={list(folders)}: two folders have the same name, which is what names a rung."
        )
    configs, wrong = {}, {}
    for path in paths:
        try:
            configs[path] = _config(path)
        except ConfigError as error:
            wrong[path] = str(error)
    if not configs:
        raise ConfigError(next(iter(wrong.values())))
    for path, why in wrong.items():
        _tell_once(f"{path.name} is left out of the ladder: {why}")
    _same_vocabulary(list(configs))
    order = sorted(configs, key=lambda p: count_params(configs[p]))
    left_out = {name: why for path, why in wrong.items() for name in (path.name, str(path))}
    rungs = {p.name: configs[p] for p in order}
    return Family(FOLDERS, rungs, 1, {p.name: str(p) for p in order}, left_out=left_out)


_tell_once = lru_cache(maxsize=None)(tell)


def _config(path: Path) -> dict[str, Any]:
    config = read_config(path)
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{path} has no tokenizer.json: save its (fast) tokenizer there too.")
    vocabulary(path)
    if end_of_text(path) is None:
        raise ConfigError(
            f"{path} names no token that ends a text, neither in tokenizer_config.json nor in config.json "
            "(eos_token_id). Set one and save again: tokenizer.eos_token = '...'; tokenizer.save_pretrained(FOLDER)."
        )
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


def vocabulary(path: Path) -> dict[str, int]:
    """Token → id of the tokenizer saved in a folder.

    Raises:
        ConfigError: its tokenizer.json cannot be read.
    """
    file = path / "tokenizer.json"
    return _vocabulary(file, file.stat().st_size, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _vocabulary(file: Path, size: int, changed: int) -> dict[str, int]:
    """The same; `size` and `changed` (its time) say that the file is still the same."""
    del size, changed
    content = read_object(file)
    try:
        vocab = content["model"]["vocab"]
        found = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        found |= {t["content"]: t["id"] for t in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is no tokenizer: it has no vocabulary that can be read. {AGAIN}") from error
    sound = all(isinstance(k, str) and isinstance(i, int) and 0 <= i < MOST_UNITS for k, i in found.items())
    if not found or not sound:
        raise ConfigError(f"{file} is no tokenizer: its vocabulary is not tokens with their numbers. {AGAIN}")
    return found


def end_of_text(path: Path) -> str | None:
    """The token that ends texts, as the tokenizer saved in a folder names it, else as its config.json does."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / file).is_file():
            named = read_object(path / file).get("eos_token")
            named = named.get("content") if isinstance(named, dict) else named
            if named and isinstance(named, str):
                return named
    return named_by_config(read_object(path / "config.json"), vocabulary(path))


def named_by_config(config: Mapping[str, Any], vocab: Mapping[str, int]) -> str | None:
    """The token whose id config.json gives as the end of a text; of several the first."""
    given = config.get("eos_token_id")
    wanted = given[0] if isinstance(given, list) and given else given
    return next((token for token, number in vocab.items() if number == wanted), None)


def in_text(path: Path, token: int) -> bool:
    """Whether packed text can hold a token of a folder's tokenizer: it ends texts, or is no control token."""
    content = read_object(path / "tokenizer.json")
    control = {t["id"] for t in content.get("added_tokens") or () if t.get("special")}
    return token not in control or vocabulary(path).get(end_of_text(path) or "", token) == token


def content_digest(path: Path) -> str:
    """SHA-256 over a model folder's config, tokenizer and weights: its identity, wherever it lies."""
    files = [path / "config.json", path / "tokenizer.json", *sorted(path.glob("*.safetensors"))]
    return files_digest(files)
