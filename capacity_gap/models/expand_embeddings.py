"""A checkpoint with more rows: each new token starts as the mean of the tokens that spelt it before."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from capacity_gap.models.axes import architecture, dims
from capacity_gap.models.weights import INDEX, weight_files
from capacity_gap.settings.errors import StageError


def grown(matrix: Tensor, first: int, parts: Sequence[Sequence[int]], rows: int) -> Tensor:
    """The matrix [V, D] with `rows` rows: row first + i is the mean of old rows parts[i], padding the mean of all.

    The padding's rows belong to no token; the mean keeps them as harmless in a softmax as any row can be. A tokenizer
    may have more tokens than its model has rows: those that no row stood for begin at the mean as well.
    """
    wide = matrix.float()[:first]
    found = wide.mean(0).repeat(rows, 1)
    found[: len(wide)] = wide
    for i, ids in enumerate(parts):
        found[first + i] = wide[list(ids)].mean(0)
    return found.to(matrix.dtype)


def expand_checkpoint(
    folder: Path,
    out: Path,
    *,
    first: int,
    parts: Sequence[Sequence[int]],
    rows: int,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the safetensors checkpoint in `folder` with `rows` tokens to `out`, one shard in memory at a time.

    Args:
        folder: a model; every tensor with an axis of tokens grows, both matrices where the output is not tied.
        out: an existing folder.
        first: the id of the first new token.
        parts: for each new token the old ids that spelt it.
        rows: tokens afterwards, padding included.
        on_shard: told how many shards are done, of how many.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    table, old = architecture(config), dims(config).vocab
    if rows < first + len(parts) or rows < old:
        raise StageError(f"{rows} rows are too few for {max(old, first + len(parts))} tokens.")
    own = [name for name, axes in table.parameters.items() if "vocab" in axes]
    own += [copy for copy, of in table.copies.items() if of in own]
    names = {*own, *(n.partition(".")[2] for n in own), *(table.in_checkpoints.get(n, n) for n in own)}
    shards = weight_files(folder)
    for done, shard in enumerate(shards, 1):
        tensors = load_file(shard)
        for name in names & tensors.keys():
            tensors[name] = grown(tensors[name], first, parts, rows).contiguous()
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
        on_shard(done, len(shards))
    _write_listing(folder, out)
    (out / "config.json").write_text(json.dumps({**config, table.keys["vocab"]: rows}, indent=1))
    if (folder / "generation_config.json").exists():
        shutil.copy(folder / "generation_config.json", out)


def _write_listing(folder: Path, out: Path) -> None:
    """The index of the shards, which keep their names."""
    if (folder / INDEX).exists():
        listing = json.loads((folder / INDEX).read_text())
        total = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        (out / INDEX).write_text(json.dumps({**listing, "metadata": {"total_size": total}}, indent=1))
