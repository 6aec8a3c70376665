"""Whether the files of a model folder hold just the weights that its config.json describes. Imports no torch.

transformers draws missing tensors at random and leaves unknown ones out, with one line in its log. Here both are
errors, before anything is computed.
"""

import json
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from capacity_gap.models.axes import architecture, dims, pattern_of
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure.architecture import Architecture

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LONGEST_HEADER = 100_000_000  # bytes: the limit of the format
NAMED = 3  # tensors that an error names of each kind
CHUNK = 2**24  # bytes read at once
# Of each floating type its words, and the bits that are all ones in an infinity or NaN.
EXPONENTS = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0xFF << 23), "F16": ("<u2", 0x1F << 10)}
EXPONENTS |= {"BF16": ("<u2", 0xFF << 7)}
_NOT_FINITE = "not finite (NaN or infinity)"
_NOT_SHARED = "of a matrix that its config.json ties to another"
_SAVE = (
    "The checkpoint does not belong to its config.json, or was saved from inside another model: save the whole model "
    "again with save_pretrained."
)
_ADVICE = {  # what to do, where it is not to save the model again
    _NOT_FINITE: "Copy it again, or use an earlier training checkpoint.",
    _NOT_SHARED: "Set tie_word_embeddings: false in config.json if both matrices are intended, or delete the copy.",
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its type, its shape, and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def parts(self) -> Iterator[bytes]:
        """The bytes, some at a time."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            for at in range(self.start, self.end, CHUNK):
                yield stream.read(min(CHUNK, self.end - at))

    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        import numpy as np

        # On bits, since numpy has no bfloat16; `CHUNK` is a multiple of every word, so no number is split.
        words, ones = EXPONENTS[self.dtype]
        return not any(((np.frombuffer(part, words) & ones) == ones).any() for part in self.parts())

    def equals(self, other: "Stored") -> bool:
        """Whether both hold the same numbers."""
        same = (self.dtype, self.shape) == (other.dtype, other.shape)
        return same and all(a == b for a, b in zip(self.parts(), other.parts(), strict=True))


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Checks names, shapes, types and values of a checkpoint's tensors; a folder that has not changed only once.

    Raises:
        ConfigError: tensors are missing, left over, of another shape or type, not finite, or an output matrix differs
            from the embedding that the config ties it to; there is an adapter; or the files cannot be read.
    """
    no_adapter(folder)
    files = [*weight_files(folder), *folder.glob(INDEX)]
    marks = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    if problem := _problem(folder, json.dumps(config, sort_keys=True, default=str), marks):
        raise ConfigError(problem)


def no_adapter(folder: Path) -> None:
    """Raises `ConfigError` if an adapter lies in a model folder: transformers would load it beside the weights."""
    if found := [name for name in ADAPTERS if (folder / name).exists()]:
        raise ConfigError(
            f"{folder} holds an adapter ({', '.join(found)}), which would be loaded with the model only where peft is "
            "installed. Merge it (peft: merge_and_unload, then save_pretrained to another folder), or remove its "
            "files to use the model without it."
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read: one, or the shards that the index lists.

    Raises:
        ConfigError: there is none, or not all, or more than one checkpoint.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise ConfigError(
            f"{folder} holds two checkpoints: {SINGLE}, and the shards of {INDEX}. It is unclear which one is "
            "intended: remove one of them."
        )
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ConfigError(_no_files(folder))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index} is not a shard index: it must be a JSON object with weight_map.") from error
    if outside := [n for n in names if Path(n).name != n]:
        raise ConfigError(f"{index} lists files of other folders: {_few(outside)}. Move them to its folder.")
    if lost := [n for n in names if not (folder / n).is_file()]:
        raise ConfigError(f"{folder} lacks {len(lost)} of the {len(names)} files that {INDEX} lists: {_few(lost)}.")
    return [folder / name for name in names]


def _no_files(folder: Path) -> str:
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    if shards:
        return (
            f"{folder} holds {_few(shards)}, but neither {SINGLE} nor {INDEX}, which lists the shards. Load the "
            "model once with transformers and save it again."
        )
    return (
        f"{folder} has no .safetensors weights; pickled ones (.bin, .pt) are not read. Load it once with "
        "transformers and save it again: save_pretrained writes safetensors."
    )


@cache
def stored_tensors(file: Path, size: int, changed: int) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name; `size` and `changed` (its time) say that it is still the same."""
    del changed
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(length) if 0 < length <= min(size, LONGEST_HEADER) else b""
    if start.startswith(b"version "):
        raise ConfigError(f"{file} is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`.")
    try:
        found = {
            name: Stored(file, t["dtype"], tuple(t["shape"]), *(8 + length + at for at in t["data_offsets"]))
            for name, t in json.loads(header).items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not a safetensors file: its header cannot be read. Copy or download it again."
        ) from error
    if found and max(t.end for t in found.values()) > size:
        raise ConfigError(f"{file} is cut short: {size:,} bytes of {max(t.end for t in found.values()):,}.")
    # Readers refuse a file with bytes of no tensor, or of two: here it is said before anything is computed.
    at = 8 + length
    for tensor in sorted(found.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != at or tensor.end < at:
            break
        at = tensor.end
    if at != size:
        raise ConfigError(
            f"{file} is not a valid safetensors file: its tensors do not cover it. Copy or download it again."
        )
    return found


def tensors_of(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint, by the names in its files.

    Raises:
        ConfigError: the files cannot be read, or two of the folder's hold a tensor of one name: loaders differ in which
            they take, and the folder's identity, the hash of its files, does not say it.
    """
    found: dict[str, Stored] = {}
    listed = weight_files(folder)
    for file in (*listed, *sorted(p for p in set(folder.glob("*.safetensors")) - set(listed) if p.is_file())):
        mine = stored_tensors(file, file.stat().st_size, file.stat().st_mtime_ns)
        if twice := sorted(found.keys() & mine.keys()):
            others = sorted({found[name].file.name for name in twice})
            raise ConfigError(f"{folder}: {_few(twice)} in {file.name} and in {_few(others)}. Remove one of them.")
        found |= mine
    return {name: tensor for name, tensor in found.items() if tensor.file in listed}


def check_names(folder: Path, config: Mapping[str, Any]) -> None:
    """`check_weights` without the values of single matrices, which takes long: names, shapes, types, copies."""
    no_adapter(folder)
    if problem := _misnamed(folder, config):
        raise ConfigError(problem)


@cache
def _problem(folder: Path, config_text: str, marks: tuple) -> str | None:
    """What is wrong with a checkpoint, in one paragraph; `marks` say that its files are still the same."""
    del marks
    config = json.loads(config_text)
    if problem := _misnamed(folder, config):
        return problem
    stored, wanted, spelt = _opened(folder, config)
    known = {spelt(name, wanted): name for name in stored}
    read = [known[n] for n in wanted if n in known]
    return _said(folder, {_NOT_FINITE: [n for n in read if not stored[n].is_finite()]})


def _misnamed(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Names, shapes and types that are not those of the config, and copies that differ, in one paragraph."""
    stored, wanted, spelt = _opened(folder, config)
    if architecture(config).literal:
        return _other_number(folder, stored, wanted)
    known = {spelt(name, wanted): name for name in stored}
    found = {
        "missing": [name for name in wanted if name not in known],
        "left over": [n for n in stored if known[spelt(n, wanted)] != n or not spelt.is_known(n, wanted)],
        "of another shape": [
            f"{known[n]} is {list(stored[known[n]].shape)}, its config.json says {list(shape)}"
            for n, shape in wanted.items()
            if n in known and stored[known[n]].shape != shape
        ],
        f"of a type other than {', '.join(EXPONENTS)}": [
            f"{n} ({t.dtype})" for n, t in stored.items() if t.dtype not in EXPONENTS and not spelt.is_buffer(n)
        ],
        _NOT_SHARED: [
            f"{name} differs from {known[of]}"
            for name, of in spelt.copies(stored, wanted)
            if of in known and not stored[name].equals(stored[known[of]])
        ],
    }
    return _said(folder, found)


def _other_number(folder: Path, stored: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    """Of models whose files name tensors otherwise than transformers does, such as experts: whether all can be there.

    Which of them is missing is said when they are loaded, before anything is computed with them.
    """
    held, described = (sum(map(prod, shapes)) for shapes in ([t.shape for t in stored.values()], wanted.values()))
    # A tied matrix may be stored twice, and buffers too.
    if 0 <= held - described <= max(map(prod, wanted.values())):
        return None
    return f"{folder} holds {held:,} numbers, but its config.json describes {described:,} parameters. {_SAVE}"


def _opened(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Stored], dict[str, tuple[int, ...]], "Spelling"]:
    """The tensors of a folder, those that its config describes, and how names are read."""
    stored = tensors_of(folder)
    return stored, expected(config, stored), Spelling(architecture(config), tied=dims(config).tied)


def expected(config: Mapping[str, Any], stored: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that `config` describes, tied ones once.

    Args:
        config: a config.json.
        stored: names in files. Where they hold a parameter otherwise than the model does, so does what is returned.
    """
    table, sizes = architecture(config), dims(config)
    found: dict[str, tuple[int, ...]] = {}
    for pattern, axes in table.parameters.items():
        if pattern == table.output and sizes.tied:
            continue
        shape = tuple(sizes.axis(a) for a in axes)
        for layer in range(sizes.layers) if "{i}" in pattern else (0,):
            found |= _as_stored(table, pattern.replace("{i}", str(layer)), shape, stored)
    return found


def _as_stored(
    table: Architecture, name: str, shape: tuple[int, ...], stored: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors in which files hold one parameter."""
    if (parts := expert_parts(table, name, 0)) and parts[0] in stored:
        experts, rows, *others = shape
        each = [expert_parts(table, name, expert) for expert in range(experts)]
        return {part: (rows // len(parts), *others) for names in each for part in names}
    return {next((n for n in _renamed(table, name) if n in stored), name): shape}


def whole_names(table: Architecture, name: str) -> list[str]:
    """The names under which files may hold a parameter in one tensor."""
    return [name, name.removeprefix(base_prefix(table)), table.in_checkpoints.get(name, name), *_renamed(table, name)]


def _renamed(table: Architecture, name: str) -> list[str]:
    """The name that published files have for a parameter that they hold in one tensor, if it is another."""
    pattern, layer = pattern_of(table, name)
    return [n.replace("{i}", str(layer)) for n in table.in_files.get(pattern, ()) if "{e}" not in n]


def expert_parts(table: Architecture, name: str, expert: int) -> list[str]:
    """The names of the tensors that hold one expert's part of a parameter, one after another; none where none may."""
    pattern, layer = pattern_of(table, name)
    names = [n for n in table.in_files.get(pattern, ()) if "{e}" in n]
    return [n.replace("{i}", str(layer)).replace("{e}", str(expert)) for n in names]


class Spelling:
    """The names under which files may hold a parameter: with or without the base model's, or an older one."""

    def __init__(self, table: Architecture, *, tied: bool) -> None:
        self.table = table
        self.prefix = base_prefix(table)
        self.older = {old: new for new, old in table.in_checkpoints.items()}
        self.repeated = {**table.copies, **({table.output: table.embedding} if tied else {})}

    def __call__(self, name: str, wanted: Mapping[str, Any]) -> str:
        """The parameter that a file calls `name`."""
        name = self.older.get(name, name)
        return self.prefix + name if name not in wanted and self.prefix + name in wanted else name

    def is_buffer(self, name: str) -> bool:
        """Whether it is something that older releases stored beside the parameters, and nothing reads."""
        return name.endswith(self.table.leftovers) if self.table.leftovers else False

    def is_known(self, name: str, wanted: Mapping[str, Any]) -> bool:
        """Whether it is a parameter, repeats one, or is one of those buffers."""
        spelt = self(name, wanted)
        return self.is_buffer(name) or spelt in wanted or spelt in self.repeated

    def copies(self, stored: Mapping[str, Stored], wanted: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The names in the files that repeat a parameter, each with it."""
        for name in stored:
            if (of := self.repeated.get(self(name, wanted))) is not None:
                yield name, of


def base_prefix(table: Architecture) -> str:
    """The name of the base model, which some published checkpoints leave out."""
    return next(n for n in table.parameters if n != table.output).split(".")[0] + "."


def _said(folder: Path, found: Mapping[str, list[str]]) -> str | None:
    parts = [f"{len(n)} tensor{'s' * (len(n) > 1)} {what} ({_few(n)})" for what, n in found.items() if n]
    advice = next((_ADVICE.get(what, _SAVE) for what, names in found.items() if names), _SAVE)
    return f"{folder}: {'; '.join(parts)}. {advice}" if parts else None


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
