"""Which units of a teacher stay, and their places along each axis of each of its parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from capacity_gap.models.axes import cuttable, dims
from capacity_gap.pruning.kept_layers import kept_experts, kept_layers, top
from capacity_gap.pruning.scores import Scores
from capacity_gap.pruning.shape import Shape, sized
from capacity_gap.pruning.units import rows_of
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure.architecture import Architecture, Config, Dims, heads_of_same_slopes, place
from capacity_gap.structure.layouts import LAYOUTS

UNITS = ("hidden", "embed", "experts", *LAYOUTS)


@dataclass(frozen=True)
class Kept:
    """The units of a model that stay, in its order: indices, per row (`axes.py`) where they belong to one.

    `layers` lists those of each stack. `heads` are query heads, `kv_heads` key-value heads: one for each that the
    student has, repeated where a student without groups is cut from a teacher with them.
    """

    depth: int  # layers of a stack before any went
    layers: list[list[int]]
    hidden: Tensor
    heads: list[Tensor]
    kv_heads: list[Tensor]
    neurons: list[Tensor]
    experts: list[Tensor]  # of each layer; empty ones in a dense model
    vocab: int | None = None  # rows of the embedding that stay, the first ones; None: all

    def rows(self, axis: str, layer: int, sizes: Dims, expert: int = 0) -> Tensor | None:
        """Indices into one axis of a parameter of layer `layer`, in a mixture of one expert; None keeps all of it."""
        axis, number = place(axis)
        if axis == "experts":
            return self.experts[layer]
        number = number or expert
        row = number * self.depth + layer
        if axis == "hidden" or (axis == "embed" and sizes.embed == sizes.hidden):
            return self.hidden
        if axis in LAYOUTS:
            found, start = [], 0
            for block in LAYOUTS[axis]:
                units = getattr(self, block.of)[row]
                found.append(start + rows_of(block, units, getattr(sizes, block.of), sizes.head_dim))
                start += prod(block.shape(getattr(sizes, block.of), sizes.head_dim))
            return torch.cat(found)
        first = self.vocab or sizes.vocab
        return torch.arange(first) if axis == "vocab" and first < sizes.vocab else None

    def taken(self, axes: Sequence[str], layer: int, sizes: Dims, read: Callable[..., Tensor]) -> Tensor:
        """What stays of a parameter of layer `layer`.

        `read` gives it at some indices of each axis; with the number of an expert, of that expert's part alone.
        """
        if not by_expert(axes):
            return read([self.rows(a, layer, sizes) for a in axes], None)
        experts = self.experts[layer].tolist()
        return torch.stack([read([self.rows(a, layer, sizes, e) for a in axes[1:]], e) for e in experts])


def _spread(units: Tensor, width: int) -> Tensor:
    """Indices of all rows of the given units: unit u holds rows u·width … u·width + width − 1."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def choose_units(scores: Scores, shape: Shape, config: Config, *, layers: str = "symmetric") -> Kept:
    """The units with the highest scores, as many in each layer as the shape says."""
    table, sizes = cuttable(config), dims(config)
    stay = kept_layers(scores, config, shape.layers, layers)
    scores = _jointly(scores, table, sizes, stay)
    rows = range(table.rows("heads", sizes))
    heads, kv_heads = zip(*(_choose_heads(scores, shape, table, sizes, row) for row in rows), strict=True)
    counts = shape.layer_neurons or [shape.neurons] * table.rows("neurons", sizes)
    return Kept(
        sizes.layers,
        stay,
        top(scores.hidden, shape.hidden),
        list(heads),
        list(kv_heads),
        [top(scores.neurons[row], n) for row, n in enumerate(counts)],
        kept_experts(scores, sizes, shape.experts),
        sized(sizes, shape).vocab,
    )


def _jointly(scores: Scores, table: Architecture, sizes: Dims, stay: list[list[int]]) -> Scores:
    """Scores in which heads that all layers share have, in every layer, their sum over the layers that stay."""
    heads, stacks = scores.heads.clone(), table.stacks_of("heads")
    for number in table.one_set:
        mine = heads.view(-1, sizes.layers, sizes.kv_heads)[number]
        mine[:] = mine[stay[stacks[number]]].sum(0)
    return replace(scores, heads=heads)


def _choose_heads(scores: Scores, shape: Shape, table: Architecture, sizes: Dims, row: int) -> tuple[Tensor, Tensor]:
    """Query heads and key-value heads of one row.

    Under ALiBi those stay whose slopes the student's class gives its heads: scores have no say.

    A student with the teacher's groups takes whole groups. One with smaller groups takes the best queries of the best
    groups. One without groups takes the best queries anywhere, each with a copy of its key-value head.
    """
    if table.alibi:
        same = torch.tensor(heads_of_same_slopes(sizes.heads, shape.heads))
        return same, same
    keep = shape.layer_heads[row] if shape.layer_heads else shape.kv_heads
    queries = scores.heads if sizes.group == 1 else scores.queries
    if shape.group == sizes.group:
        units = top(scores.heads[row], keep)
        return _spread(units, sizes.group), units
    if queries is None:
        raise ConfigError(
            "the student groups queries differently from its teacher, but these scores contain no query-head scores."
        )
    if shape.group == 1:
        chosen = top(queries[row], keep)
        return chosen, chosen // sizes.group
    units = top(scores.heads[row], keep)
    best = top(queries[row].view(sizes.kv_heads, sizes.group)[units], shape.group)
    return (units[:, None] * sizes.group + best).flatten(), units


def by_expert(axes: Sequence[str]) -> bool:
    """Whether a parameter holds neurons of all experts: each keeps its own."""
    return axes[0] == "experts" and any(block.of == "neurons" for axis in axes for block in LAYOUTS.get(axis, ()))
