"""Packed tokens: one flat stream per split, memory-mapped; and which sequences a budget sees, in which order."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.scales import format_scale

BATCH = 1000  # documents encoded at once
PERMUTATION_SEED = 20231107  # of the one permutation that all budgets are prefixes of


def pack(texts: Iterable[str], tokenizer: Any, stem: Path, *, begin: int | None = None) -> int:
    """Writes the texts' tokens, each text ended by the end-of-text id, to `stem.bin`; returns how many.

    The file is a flat stream of little-endian uint16 (uint32 for a vocabulary above 65,536), described by `stem.json`.
    `begin`: the token that every sequence which is read from it begins with.
    """
    wide = len(tokenizer) > 2**16
    total = 0
    with stem.with_suffix(".bin").open("wb") as file:
        for group in _batches(texts):
            for ids in tokenizer(group, add_special_tokens=False, return_attention_mask=False)["input_ids"]:
                np.asarray([*ids, tokenizer.eos_token_id], dtype="<u4" if wide else "<u2").tofile(file)
                total += len(ids) + 1
    header = {"dtype": "<u4" if wide else "<u2", "tokens": total} | ({} if begin is None else {"begin": begin})
    stem.with_suffix(".json").write_text(json.dumps(header))
    return total


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == BATCH:
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True)
class Packed:
    """A token stream cut into sequences of T tokens; `batch` reads one token more, which is the last label.

    Sequence i is `stream[i·T : i·T + T + 1]`: inputs are its first T tokens, labels its last T, so every token but the
    stream's first is predicted once. Where the stream names a token that begins sequences, it takes the place of the
    first input; labels stay.
    """

    stem: Path
    sequence_length: int
    lengths: Sequence[int | None] | None = None  # bytes of each token id, where those beside the stream are not right

    def counting(self, lengths: Sequence[int | None] | None) -> "Packed":
        """The same stream with other bytes of its ids; with None as it is."""
        return self if lengths is None else replace(self, lengths=lengths)

    @cached_property
    def header(self) -> dict[str, Any]:
        """What describes the stream."""
        return json.loads(self.stem.with_suffix(".json").read_text())

    @cached_property
    def stream(self) -> np.ndarray:
        """All tokens, memory-mapped."""
        shape = (self.header["tokens"],)
        return np.memmap(self.stem.with_suffix(".bin"), dtype=self.header["dtype"], mode="r", shape=shape)

    @cached_property
    def bytes_per_id(self) -> np.ndarray:
        """UTF-8 bytes that each token id stands for [V], NaN where they are not known."""
        kept = self.lengths or json.loads((self.stem.parent / "bytes_per_id.json").read_text())
        return np.asarray(kept, dtype=np.float64)

    def __len__(self) -> int:
        return max(0, (len(self.stream) - 1) // self.sequence_length)

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Tokens [n, T+1], int64, of the sequences named by `indices` [n]."""
        starts = np.asarray(indices, dtype=np.int64)[:, None] * self.sequence_length
        rows = self.stream[starts + np.arange(self.sequence_length + 1)].astype(np.int64)
        if "begin" in self.header:
            rows[:, 0] = self.header["begin"]
        return rows


def subset(packed: Packed, tokens: int, *, epochs: int = 1, key: str = "data", skip: int = 0) -> np.ndarray:
    """The sequences of a budget: the first `tokens` tokens of one seed-independent permutation, so budgets nest.

    With `epochs` = k the budget is met by k passes over its k-th part. `skip`: tokens that it begins behind.

    Raises:
        ConfigError: the corpus holds fewer tokens than one pass needs, or a pass is less than one sequence.
    """
    each, first = tokens // (packed.sequence_length * epochs), skip // packed.sequence_length
    if tokens and not each:
        raise ConfigError(
            f"{key}={format_scale(tokens)} in {epochs} epochs is less than one sequence of {packed.sequence_length} "
            f"tokens: nothing would be trained. Give {packed.sequence_length * epochs} or more."
        )
    if first + each > len(packed):
        held = max(0, len(packed) - first) * packed.sequence_length
        behind = f" behind data_offset={format_scale(skip)}" if skip else ""
        passes = {"family.teacher_data": "family.teacher_epochs", "adapt.data": "adapt.epochs"}.get(key, "epochs")
        more = (
            f"Set at most {key}={held * epochs}, or set how often the text may be repeated: {passes}=%d."
            if held
            else ""
        )
        raise ConfigError(
            f"{key}={format_scale(tokens)} with {passes}={epochs} needs {each * packed.sequence_length:,} tokens per "
            f"epoch, but the training text holds {held:,}{behind}. " + (more % -(-tokens // held) if held else "")
        )
    return np.random.Generator(np.random.PCG64(PERMUTATION_SEED)).permutation(len(packed))[first : first + each]


def order(sequences: np.ndarray, seed: int, *, epochs: int = 1) -> np.ndarray:
    """The order in which a run sees its sequences: a fresh shuffle for each pass, decided by `seed`."""
    # PCG64 by name: numpy does not promise that `default_rng` will stay it.
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.concatenate([generator.permutation(sequences) for _ in range(epochs)])
