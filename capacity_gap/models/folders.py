"""A ladder of the user's own checkpoints, checked before anything is computed. Imports no torch."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from capacity_gap.models.axes import architecture, count_params, dims
from capacity_gap.models.checkpoints import Checkpoint, checkpoint, is_checkpoint
from capacity_gap.models.config_files import AGAIN, MOST_UNITS, read_config, read_object
from capacity_gap.models.hub import NotHad
from capacity_gap.models.ladders import CHECKPOINTS, FAMILIES, FOLDERS, Family, family
from capacity_gap.models.weights import check_weights
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import user_path
from capacity_gap.store.files import tell


def named_family(given: str) -> Family:
    """The ladder that `--family` names: a registered one, or models of the user's, `FOLDER,ORG/NAME,FILE.gguf`.

    Raises:
        ConfigError: it is neither, or no model of it can be used.
    """
    own = [name for name in given.split(",") if name]
    if own and given not in FAMILIES and (len(own) > 1 or is_checkpoint(given)):
        return checkpoint_family(own, planning=True)
    return family(given)


def checkpoint_family(given: Sequence[str], *, planning: bool = False) -> Family:
    """A family whose rungs are checkpoints that a user names, by their own names, smallest first.

    A folder or file that cannot be used is left out with a note, and requesting it raises with the reason.

    Args:
        given: folders, repositories of the hub, GGUF files.
        planning: nothing is run, so that a folder may lack its weights and its tokenizer.

    Raises:
        ConfigError: none can be used, two have one name, or their vocabularies differ.
    """
    found, wrong = {}, {}
    for name in given:
        try:
            one = checkpoint(name)
            found[one] = config_of(one, planning=planning)
        except NotHad:
            raise  # another process may have it, and would make another ladder of the same names
        except ConfigError as error:
            wrong[name] = str(error)
    if not found:
        raise ConfigError(next(iter(wrong.values())))
    if len({one.name for one in found}) < len(found):
        raise ConfigError(f"family.folders={list(given)}: two of them have the same name, but names identify rungs.")
    for name, why in wrong.items():
        _tell_once(f"{name.rstrip('/').rpartition('/')[2]} is left out of the ladder: {why}")
    same_vocabulary(list(found))
    order = sorted(found, key=lambda one: count_params(found[one]))
    left_out = {alias: why for name, why in wrong.items() for alias in _aliases(name)}
    return Family(
        FOLDERS if all(not one.revision and not one.is_gguf for one in order) else CHECKPOINTS,
        {one.name: found[one] for one in order},
        1,
        {one.name: one.source for one in order},
        aliases={alias: one.name for one in order for alias in one.aliases},
        left_out=left_out,
        checkpoints={one.name: one for one in order},
    )


_tell_once = lru_cache(maxsize=None)(tell)


def _aliases(given: str) -> tuple[str, ...]:
    path = user_path(given).absolute()
    return given, path.name, str(path)


def config_of(one: Checkpoint, *, planning: bool = False) -> dict[str, Any]:
    """The config.json of a checkpoint, once it is clear that the checkpoint can be used.

    Raises:
        ConfigError: it cannot.
    """
    path, config = one.folder, read_config(one.folder)
    if planning and (lacks := _lacks(one)):
        pickled = " (pickled ones are not read)" if "weights" in lacks and any(path.glob("*.bin")) else ""
        _tell_once(f"{one.name} has no {' and no '.join(lacks)}{pickled}: it can be used in plans but not in runs.")
        if "tokenizer.json" in lacks:
            return config
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{one.source} has no tokenizer.json: save its (fast) tokenizer there.")
    vocabulary(path)
    if end_of_text(path) is None:
        raise ConfigError(
            f"{one.source} has no end-of-text token in tokenizer_config.json or config.json (eos_token_id). Set one "
            "and save again: tokenizer.eos_token = '...'; tokenizer.save_pretrained(FOLDER)."
        )
    if one.revision or one.is_gguf:  # the weights are fetched, and checked, by the stage that needs them
        architecture(config)  # one without a table says so here
    elif not (planning and _lacks(one)):
        check_weights(path, config)
    return config


def _lacks(one: Checkpoint) -> list[str]:
    """What a folder does not hold at all; of other checkpoints it is fetched later."""
    if one.revision or one.is_gguf:
        return []
    weights = any(one.folder.glob("*.safetensors"))
    return ([] if (one.folder / "tokenizer.json").is_file() else ["tokenizer.json"]) + ([] if weights else ["weights"])


def same_vocabulary(models: Sequence[Checkpoint]) -> None:
    """Students are compared by loss per token and distilled on their teachers' logits: ids must mean the same.

    Raises:
        ConfigError: they do not.
    """
    read = [one for one in models if (one.folder / "tokenizer.json").is_file()]
    if len(read) < len(models):
        _tell_of_rows(models)
    for one in read[1:]:
        first, other = vocabulary(read[0].folder), vocabulary(one.folder)
        if other != first:
            changed = sorted(set(first.items()) ^ set(other.items()))[:3]
            raise ConfigError(
                f"{one.name} and {read[0].name} have different vocabularies ({len(other)} and {len(first)} tokens; "
                f"the first differences: {changed}). Models of one grid must share a tokenizer."
            )


MOST_PADDING = 1.02  # rows of one embedding by those of another with the same tokens: padding differs by so much


def _tell_of_rows(models: Sequence[Checkpoint]) -> None:
    """Says what seems to have other tokens where tokenizers are missing, which only a plan may go without."""
    rows = {one.name: dims(read_config(one.folder)).vocab for one in models}
    if max(rows.values()) > MOST_PADDING * min(rows.values()):
        listed = ", ".join(f"{name} {count:,}" for name, count in rows.items())
        _tell_once(
            f"their embeddings have different numbers of rows ({listed}). Models of one grid must share a vocabulary, "
            "which cannot be checked without each tokenizer.json."
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
        raise ConfigError(f"{file} is not a tokenizer: it has no readable vocabulary. {AGAIN}") from error
    sound = all(isinstance(k, str) and isinstance(i, int) and 0 <= i < MOST_UNITS for k, i in found.items())
    if not found or not sound:
        raise ConfigError(f"{file} is not a tokenizer: its vocabulary does not map tokens to ids. {AGAIN}")
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
    """Whether packed text can hold a token of a folder's tokenizer: it ends texts, or is no control token.

    Of a folder that has none yet, which can only be planned with, it may.
    """
    if not (path / "tokenizer.json").is_file():
        return True
    content = read_object(path / "tokenizer.json")
    control = {t["id"] for t in content.get("added_tokens") or () if t.get("special")}
    return token not in control or vocabulary(path).get(end_of_text(path) or "", token) == token
