"""Cached teacher outputs: written once for a teacher and a budget of tokens, read by every student, seed and loss.

A signal is a folder of blocks, each memory-mapped arrays for `BLOCK` sequences in the order of the corpus's seed-free
permutation: token ids [n, T, k], their values [n, T, k] and the teacher's entropy [n, T]. A block is written whole, so
a killed process loses one block.

Shape suffixes: n sequences, T tokens of a sequence, k values of a token, V vocabulary.
"""

import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capacity_gap.distill.divergences import Softmax
from capacity_gap.distill.losses import cap, chunks
from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.distill.sparse import SparseTargets
from capacity_gap.models.loading import output_weight
from capacity_gap.models.placing import gathered_states
from capacity_gap.runtime.ranks import Ranks
from capacity_gap.store.files import note_crc
from capacity_gap.structure.head import logit_cap

BLOCK = 256  # sequences
HEADER = "signal.json"
ARRAYS = ("ids", "values", "entropy")


@torch.no_grad()
def write_signal(
    teacher: Any,
    sequences: Any,
    order: np.ndarray,
    out: Path,
    *,
    kind: str,
    size: int,
    temperature: float,
    seed: int,
    batch_size: int,
    vocabulary: int | None = None,
    autocast: Callable[[], Any],
    ranks: Ranks | None = None,
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the blocks that `out` lacks and at last the header.

    Args:
        teacher: a causal language model, on the device that computes.
        sequences: packed text, `batch(indices)` gives tokens [n, T + 1].
        order: the sequences of the budget, in their permutation.
        out: folder; blocks that are there already are kept.
        kind: a name of `SIGNALS`.
        size: values a token: k, or draws.
        temperature: of the teacher's softmax.
        seed: of the draws; each block has its own generator, so that a resumed signal is the same.
        batch_size: sequences in one forward pass.
        vocabulary: tokens of the tokenizer; further rows of the teacher's output matrix are padding, and left out.
        autocast: context manager of the teacher's precision.
        ranks: those that hold a sharded teacher; the one that leads writes, the others help.
        on_block: called with blocks done and in all.
    """
    leads = ranks is None or ranks.leads
    out.mkdir(parents=True, exist_ok=True)
    blocks, most = -(-len(order) // BLOCK), logit_cap(teacher.config)
    for block in range(blocks):
        there = _block(out, block, "entropy").exists()
        if not (there if ranks is None else ranks.tell(there)):
            # No two pairs of seed and block share a generator below 1,000,003 blocks.
            generator = torch.Generator(device=teacher.device).manual_seed(seed * 1_000_003 + block)
            indices = order[block * BLOCK : (block + 1) * BLOCK]
            parts = []
            for start in range(0, len(indices), batch_size):
                tokens = torch.from_numpy(sequences.batch(indices[start : start + batch_size])).to(teacher.device)
                with autocast():
                    hidden = gathered_states(teacher, tokens[:, :-1])
                    weight = output_weight(teacher)[:vocabulary].to(hidden.device)
                if leads:
                    parts.append(_targets(hidden, weight, kind, size, temperature, generator, most))
            if leads:
                _write_block(out, block, [torch.cat(p) for p in zip(*parts, strict=True)], weight.shape[0])
        on_block(block + 1, blocks)
    if not leads:
        return
    np.save(out / "order.npy", order)
    header = {"kind": kind, "size": size, "temperature": temperature, "sequences": len(order)}
    bytes_ = sum(f.stat().st_size for f in out.glob("block-*.npy"))
    header["bytes_per_token"] = round(bytes_ / max(1, len(order) * sequences.sequence_length), 2)
    (out / HEADER).write_text(json.dumps(header))


def _targets(
    hidden: Tensor,
    weight: Tensor,
    kind: str,
    size: int,
    temperature: float,
    generator: torch.Generator,
    most: float | None = None,
) -> tuple[Tensor, ...]:
    """Ids, values [n, T, k] and entropy [n, T] of one batch, a chunk of tokens at a time."""
    flat, found = hidden.flatten(0, -2), []
    for part in chunks(len(flat), weight.shape[0], flat.device):
        logits = (flat[part] @ weight.to(flat.dtype).T).float()
        cap(logits, most)
        softmax = Softmax.of(logits / temperature)
        found.append((*SIGNALS[kind].targets(softmax, size, generator), softmax.entropy()))
    return tuple(torch.cat(p).unflatten(0, hidden.shape[:2]).cpu() for p in zip(*found, strict=True))


def _block(folder: Path, block: int, array: str) -> Path:
    return folder / f"block-{block:05d}-{array}.npy"


def _write_block(folder: Path, block: int, arrays: list[Tensor], vocabulary: int) -> None:
    """The entropy comes last: where it is, the block is whole."""
    dtypes = (np.uint16 if vocabulary <= 2**16 else np.uint32, None, np.float32)
    for name, tensor, dtype in zip(ARRAYS, arrays, dtypes, strict=True):
        beside = folder / f".{block}-{name}.tmp.npy"
        np.save(beside, tensor.numpy() if dtype is None else tensor.numpy().astype(dtype))
        note_crc(beside, _block(folder, block, name).name)
        os.replace(beside, _block(folder, block, name))


class Signal:
    """What `write_signal` wrote, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header: Mapping[str, Any] = json.loads((folder / HEADER).read_text())

    @property
    def bytes_per_token(self) -> float:
        """What it takes on disk."""
        return self.header["bytes_per_token"]

    @cached_property
    def _places(self) -> np.ndarray:
        """Sequence index → place in the signal; −1 where it holds nothing."""
        order = np.load(self.folder / "order.npy")
        places = np.full(order.max() + 1, -1)
        places[order] = np.arange(len(order))
        return places

    @cached_property
    def _arrays(self) -> list[list[np.ndarray]]:
        blocks = range(-(-self.header["sequences"] // BLOCK))
        return [[np.load(_block(self.folder, b, name), mmap_mode="r") for b in blocks] for name in ARRAYS]

    def targets(self, indices: np.ndarray) -> SparseTargets:
        """The targets of all tokens of the named sequences, flattened."""
        places = self._places[indices]
        if (places < 0).any():
            raise IndexError("the cached teacher logits lack some of these sequences")
        ids, values, entropy = (np.stack([blocks[p // BLOCK][p % BLOCK] for p in places]) for blocks in self._arrays)
        given = torch.from_numpy(values).float()
        if SIGNALS.entry(self.header["kind"]).traits["draws"]:
            given = given / self.header["size"]  # shares of the draws
        return SparseTargets(
            self.header["kind"],
            torch.from_numpy(ids.astype(np.int64)).flatten(0, 1),
            given.flatten(0, 1),
            torch.from_numpy(entropy).flatten(),
        )
