"""The identity of a computation: a hash of its name, version, settings and inputs, equal on every machine.

Only types with one canonical spelling are hashed; anything else raises, because an identity that depends on `repr` or
on memory addresses would silently recompute, or worse, silently reuse. A field of a dataclass takes part unless its
declaration (`declare.py`) says otherwise:

* `decides=False` (device, paths, tracking): how a result is made, not which result it is; never hashed;
* `later=True`: added after the first release; left out at its default, so that old results stay found.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from capacity_gap.settings.declare import KEY, Setting, default_of
from capacity_gap.settings.errors import ConfigError, shown
from capacity_gap.settings.places import ROOT, user_path


def canonical(value: Any) -> Any:
    """Returns `value` as JSON types with one spelling, or raises `TypeError` for what has none."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} cannot be part of an identity: only finite numbers are hashed")
        return {"float": value.hex()}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if isinstance(value, Mapping):
        return _canonical_mapping(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _canonical_mapping(identity_fields(value))
    raise TypeError(f"a {type(value).__name__} cannot be hashed deterministically: {value!r}")


def plain(value: Any) -> Any:
    """What `canonical` was given, from what it gave: numbers as numbers again."""
    if isinstance(value, Mapping):
        if set(value) == {"float"}:
            return float.fromhex(value["float"])
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def identity_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that decide its results, by name."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if _counts(f, getattr(value, f.name))}


def _counts(field: dataclasses.Field, value: Any) -> bool:
    known: Setting | None = field.metadata.get(KEY)
    return known is None or (known.decides and not (known.later and value == default_of(field)))


def _canonical_mapping(mapping: Mapping) -> dict[str, Any]:
    if not all(isinstance(k, str) for k in mapping):
        raise TypeError(f"only string keys are hashed; given {sorted(map(repr, mapping))}")
    return {k: canonical(mapping[k]) for k in sorted(mapping)}


def fingerprint(value: Any) -> str:
    """Returns 20 hexadecimal digits (80 bits) of the SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the content of files, in order: the identity of data, independent of its path.

    A grid calls it for each of its cells, so a file is read again only if its size or time has changed.
    """
    return _files_digest(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def file_digest(given: str, *, key: str) -> str:
    """SHA-256 of the content of a file that a setting names: seen from the working directory, else from the project.

    Raises:
        ConfigError: there is no such file.
    """
    named = user_path(given)
    for file in (named, ROOT / named):
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    raise ConfigError(f"{key}={shown(given)} is not a file (looked in {Path.cwd()} and {ROOT}).")


@lru_cache(maxsize=256)
def _files_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in files:
        with open(name, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
