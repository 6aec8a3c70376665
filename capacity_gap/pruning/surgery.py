"""Cutting a student out of its teacher: `index_select` along named axes, nothing else.

`prune` cuts a model in memory; `prune_checkpoint` cuts one on disk, a tensor at a time, without ever holding it whole.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capacity_gap.models.axes import config_with, cuttable, dims, pattern_of
from capacity_gap.models.quiet import quiet, runnable
from capacity_gap.models.weights import INDEX, expert_parts, tensors_of, whole_names
from capacity_gap.pruning.kept_units import UNITS, Kept, choose_units
from capacity_gap.pruning.scores import Scores
from capacity_gap.pruning.shape import Shape, sized, unfit, with_rows
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure.architecture import Architecture, Dims, place

SHARDS = 48  # the student is written in shards of this part of the teacher's checkpoint (saving copies a shard once)
LEAST_SHARD = 2**25  # bytes, so that a small checkpoint is not cut into 48 files
BLOCK_NUMBERS = 2**23  # numbers of a large tensor read at once: 32 MB in fp32
Read = Callable[[str, Sequence[Tensor | None], int | None], Tensor]  # of a parameter, of one expert if one is named


def stored_sizes(sizes: Dims, shape: Shape, table: Architecture) -> Dims:
    """The student's dims as plain transformers can hold it: under global priority each layer as wide as the widest."""
    if shape.layer_heads is None or shape.layer_neurons is None:
        return sized(sizes, shape)
    heads = max(shape.layer_heads)
    while not table.square and shape.hidden % (heads * shape.group):
        heads += 1  # transformers requires a hidden size that the number of heads divides
    widest = sizes.with_units(
        hidden=shape.hidden,
        kv_heads=heads,
        neurons=max(shape.layer_neurons),
        layers=shape.layers,
        group=shape.group,
        experts=shape.experts,
    )
    return with_rows(widest, shape)


def prune(model: Any, scores: Scores, shape: Shape, *, layers: str = "symmetric") -> Any:
    """Returns the student: a new, smaller model of the same class, loadable by plain transformers; `model` stays whole.

    Under global priority layers differ in width, which plain transformers cannot hold: narrower ones are filled up with
    zeros on both sides of each unit that is not there, and training leaves such zeros zero.

    Raises:
        ConfigError: the shape is larger than the model along some axis, or the weights are not finite.
    """
    cut = _Cut(model.config.to_dict(), scores, shape, layers)
    source = dict(model.named_parameters())
    if cut.sizes.tied and cut.table.output in source:
        raise ConfigError(
            f"this model has an output matrix of its own ({cut.table.output}), but its config ties it to the "
            "embedding, so pruning would drop it."
        )
    student = _empty(model, cut.config)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(cut(name, partial(selected, source)))
    return quiet(student.eval())


def selected(source: Mapping[str, Tensor], name: str, indices: Sequence[Tensor | None], expert: int | None) -> Tensor:
    """`select` on a parameter of `source`, or on one expert's part of it."""
    return select(source[name] if expert is None else source[name][expert], indices, name)


def _empty(model: Any, settings: dict[str, Any]) -> Any:
    """An untrained model of the student's sizes and the teacher's class and dtype."""
    config = type(model.config).from_dict(settings)
    # These initial weights are all overwritten, and must not advance the caller's random state.
    with torch.random.fork_rng(devices=[]):
        student = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    if dims(settings).experts:
        student.set_experts_implementation(model.get_experts_implementation())
    return runnable(student)


class _Cut:
    """What is selected from each of the teacher's tensors, and where it goes in the student's."""

    def __init__(self, config: dict[str, Any], scores: Scores, shape: Shape, layers: str) -> None:
        self.table, self.sizes = cuttable(config), dims(config)
        if reasons := unfit(shape, self.sizes):
            raise ConfigError(f"a student of shape {shape} cannot be cut from this teacher: {'; '.join(reasons)}.")
        self.kept = choose_units(scores, shape, config, layers=layers)
        self.stored = stored_sizes(self.sizes, shape, self.table)
        self.config = config_with(config, self.stored, self.kept.layers[0])
        self.padded = shape.layer_heads is not None
        self.targets = _positions(self.kept, self.stored)

    def __call__(self, name: str, read: Read) -> Tensor:
        """The student's parameter `name`."""
        pattern, own = pattern_of(self.table, name)
        layer = self.kept.layers[self.table.stack_of(pattern)][own] if "{i}" in pattern else 0
        axes = self.table.parameters[pattern]
        source = self.table.embedding if pattern == self.table.output and self.sizes.tied else pattern
        source = source.replace("{i}", str(layer))

        def part(indices: Sequence[Tensor | None], expert: int | None) -> Tensor:
            return self._in_place(read(source, indices, expert), axes, layer, expert)

        tensor = self.kept.taken(axes, layer, self.sizes, part)
        if pattern in self.table.queries_by_layer and own != layer:  # the model divides what they give by layer + 1
            tensor = _queries_times(tensor, axes.index("qkv"), (own + 1) / (layer + 1))
        if pattern == self.table.scaled:  # the model multiplies what follows by hidden^−½, and hidden has changed
            tensor = tensor * math.sqrt(self.stored.hidden / self.sizes.hidden)
        if self.table.root_scaled:
            tensor = self._rescaled(pattern, tensor)
        return tensor

    def _in_place(self, tensor: Tensor, axes: Sequence[str], layer: int, expert: int | None) -> Tensor:
        """What stays of a parameter, or of one expert's part of it, filled up with zeros if layers differ in width."""
        for dimension, axis in enumerate(axes[expert is not None :] if self.padded else ()):
            if place(axis)[0] in UNITS:
                rows = self.targets.rows(axis, layer, self.stored, expert or 0)
                tensor = _filled(tensor, dimension, rows, self.stored.axis(axis))
        return tensor

    def _rescaled(self, pattern: str, tensor: Tensor) -> Tensor:
        """Makes up for embeddings that the model multiplies by √hidden, which has changed.

        Where they are the output matrix too, the norm before it takes the factor back.
        """
        factor = math.sqrt(self.sizes.hidden / self.stored.hidden)
        if pattern == self.table.embedding:
            return tensor * factor
        if self.stored.tied and pattern.rpartition(".")[0] == self.table.final_norm:
            offset = self.table.norm_offset if pattern.endswith(".weight") else 0.0
            return (tensor + offset) / factor - offset
        return tensor


def select(tensor: Tensor, indices: Sequence[Tensor | None], name: str) -> Tensor:
    """The given indices of each dimension (None: all) of the teacher's tensor `name`, which must be finite."""
    if not tensor.isfinite().all():
        raise ConfigError(f"the teacher's {name} holds NaN or infinity; check its checkpoint.")
    for dimension, index in enumerate(indices):
        if index is not None:
            tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor


def _queries_times(tensor: Tensor, dimension: int, factor: float) -> Tensor:
    """A fused map whose queries, the first third along `dimension`, are multiplied by `factor`."""
    queries, others = tensor.split([tensor.shape[dimension] // 3, 2 * tensor.shape[dimension] // 3], dimension)
    return torch.cat([queries * factor, others], dimension)


def _positions(kept: Kept, stored: Dims) -> Kept:
    """Where the kept units go: to the front of each axis of the student."""

    def front(chosen: list[Tensor]) -> list[Tensor]:
        return [torch.arange(len(units)) for units in chosen]

    hidden = torch.arange(stored.hidden)
    heads, kv_heads, neurons, experts = map(front, (kept.heads, kept.kv_heads, kept.neurons, kept.experts))
    return Kept(kept.depth, kept.layers, hidden, heads, kv_heads, neurons, experts, kept.vocab)


def _filled(tensor: Tensor, dimension: int, index: Tensor | None, length: int) -> Tensor:
    """`tensor` at `index` of a longer axis, zeros elsewhere."""
    if index is None or tensor.shape[dimension] == length:
        return tensor
    whole = tensor.new_zeros([*tensor.shape[:dimension], length, *tensor.shape[dimension + 1 :]])
    return whole.index_copy(dimension, index.to(tensor.device), tensor)


def prune_checkpoint(
    folder: Path,
    scores: Scores,
    shape: Shape,
    out: Path,
    *,
    layers: str = "symmetric",
    shard_bytes: int | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Cuts the checkpoint in `folder` (safetensors, sharded or not) and writes the student to `out`, shard by shard.

    Some rows of one tensor of the teacher and one shard of the student are in memory at once. Raises as `prune` does.
    """
    config = json.loads((folder / "config.json").read_text())
    cut = _Cut(config, scores, shape, layers)
    names = list(_names(cut))
    index: dict[str, str] = {}
    limit = shard_bytes or max(LEAST_SHARD, sum(f.stat().st_size for f in folder.glob("*.safetensors")) // SHARDS)
    source, dtype = _Checkpoint(folder, cut.table), ""
    for number, shard in enumerate(_shards(cut, names, source, limit, on_tensor), 1):
        file = f"model-{number:05d}.safetensors"
        dtype = str(next(iter(shard.values())).dtype).removeprefix("torch.")
        _save(shard, out / file)
        index |= dict.fromkeys(shard, file)
    total = sum(f.stat().st_size for f in out.glob("model-*.safetensors"))
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (out / INDEX).write_text(json.dumps(listing, indent=1))
    (out / "config.json").write_text(json.dumps({**cut.config, "dtype": dtype}, indent=1))
    if (folder / "generation_config.json").exists():
        shutil.copy(folder / "generation_config.json", out)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def _names(cut: _Cut) -> Iterator[str]:
    """The student's parameters; a tied output matrix is not stored."""
    for pattern in cut.table.parameters:
        if pattern == cut.table.output and cut.stored.tied:
            continue
        for layer in range(cut.stored.layers) if "{i}" in pattern else (0,):
            yield pattern.replace("{i}", str(layer))


def _shards(
    cut: _Cut, names: list[str], source: "_Checkpoint", limit: int, on_tensor: Callable[[int, int], None]
) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held = 0
    for done, name in enumerate(names, 1):
        tensors = as_published(cut.table, name, cut(name, source.read))
        size = sum(t.nbytes for t in tensors.values())
        if shard and held + size > limit:
            yield shard
            shard, held = {}, 0
        shard |= tensors
        held += size
        on_tensor(done, len(names))
    yield shard


def as_published(table: Architecture, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter under the names that published files have: those of experts may be a tensor or more for each."""
    pattern, layer = pattern_of(table, name)
    names = table.in_files.get(pattern, (name,))
    if "{e}" not in names[0]:
        return {names[0].replace("{i}", str(layer)): tensor.contiguous()}
    return {
        part_name: part.contiguous()
        for expert, whole in enumerate(tensor)
        for part_name, part in zip(expert_parts(table, name, expert), whole.chunk(len(names)), strict=True)
    }


class _Checkpoint:
    """The tensors of a safetensors checkpoint by name; each is read when `read` names it."""

    def __init__(self, folder: Path, table: Architecture) -> None:
        self.folder = folder
        self.tensors = tensors_of(folder)
        self.table = table
        self.opened: dict[Path, Any] = {}

    def read(self, name: str, indices: Sequence[Tensor | None], expert: int | None = None) -> Tensor:
        """The given indices of one tensor, or of one expert's part of it, under whatever name files hold it.

        Raises:
            ConfigError: there is no such tensor.
        """
        if expert is not None and (parts := expert_parts(self.table, name, expert)) and self._has(parts[0]):
            return self._of_parts(parts, indices, name)
        for spelling in whole_names(self.table, name):
            if self._has(spelling):
                return self._of(spelling, indices, name, expert)
        raise ConfigError(f"{self.folder} has no tensor {name}: the checkpoint does not belong to its config.json.")

    def _has(self, spelling: str) -> bool:
        return spelling in self.tensors

    def _of_parts(self, parts: Sequence[str], indices: Sequence[Tensor | None], name: str) -> Tensor:
        """The same of tensors that lie one after another along the first dimension."""
        found, start, (first, *others) = [], 0, indices
        for part in parts:
            stop = start + self.tensors[part].shape[0]
            mine = None if first is None else first[(first >= start) & (first < stop)] - start
            found.append(self._of(part, [mine, *others], name))
            start = stop
        return torch.cat(found)

    def _of(self, spelling: str, indices: Sequence[Tensor | None], name: str, expert: int | None = None) -> Tensor:
        stored = self._opened(spelling).get_slice(spelling)
        return _select_in_blocks(stored, indices, name) if expert is None else select(stored[expert], indices, name)

    def _opened(self, spelling: str) -> Any:
        from safetensors import safe_open

        file = self.tensors[spelling].file
        if file not in self.opened:
            self.opened[file] = safe_open(file, framework="pt")
        return self.opened[file]


def _select_in_blocks(stored: Any, indices: Sequence[Tensor | None], name: str) -> Tensor:
    """`select` on a tensor that is read a few rows at a time; indices ascend, so the parts come in order."""
    rows, *others = stored.get_shape()
    step = max(1, BLOCK_NUMBERS // max(1, prod(others)))
    first, rest = indices[0], indices[1:]
    lengths = [n if index is None else len(index) for n, index in zip((rows, *others), indices, strict=True)]
    found, filled = None, 0
    for start in range(0, rows, step):
        mine = None if first is None else first[(first >= start) & (first < start + step)] - start
        part = select(stored[start : start + step], [mine, *rest], name)
        found = part.new_empty(lengths) if found is None else found
        found[filled : filled + len(part)] = part
        filled += len(part)
    assert found is not None
    return found
