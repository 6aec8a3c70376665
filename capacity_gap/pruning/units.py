"""From weights to units: sums over all weights that belong to a head, a neuron, a hidden dimension or an expert."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from capacity_gap.models.axes import pattern_of
from capacity_gap.store.checkpoint import whole
from capacity_gap.structure.architecture import Architecture, Dims, place
from capacity_gap.structure.layouts import LAYOUTS, Block


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, tied ones once."""
    return iter(model.named_parameters())


class UnitSums:
    """Adds up a quantity that every weight has, along the axes of the table; fp32 on the CPU."""

    def __init__(self, table: Architecture, sizes: Dims) -> None:
        self.table, self.sizes = table, sizes
        self.heads, self.neurons, self.hidden, self.queries, self.experts = zeros(table, sizes)

    @property
    def totals(self) -> list[Tensor]:
        """Heads [R, K], neurons [R, F], hidden [D], query heads [R, H], experts [L, E]; a row R a place and layer."""
        return [self.heads, self.neurons, self.hidden, self.queries, self.experts]

    def add(self, name: str, values: Tensor) -> None:
        """Adds the values of parameter `name`, of its own shape; sharded ones are summed over all ranks."""
        pattern, layer = pattern_of(self.table, name)
        # What all layers use, such as a relative bias, counts for each of them.
        layers = [layer] if "{i}" in pattern else list(range(self.sizes.layers))
        axes = self.table.parameters[pattern]
        if axes[0] == "experts":
            of_experts = values.flatten(1).sum(1) if values.ndim > 1 else values
            self.experts[layer] += whole(of_experts).float().cpu()
            for expert in range(self.sizes.experts):
                self._add(axes[1:], values[expert], [expert * self.sizes.layers + layer])
        else:
            self._add(axes, values, layers)

    def _add(self, axes: Sequence[str], values: Tensor, layers: Sequence[int]) -> None:
        """Adds values along each of their axes; of an expert, `layers` are its rows."""
        for dimension, axis in enumerate(axes):
            others = [d for d in range(values.ndim) if d != dimension]
            line = whole(values.sum(others) if others else values).float().cpu()
            kind, number = place(axis)
            self._add_line(kind, [number * self.sizes.layers + i for i in layers], line)

    def _add_line(self, axis: str, rows: list[int], line: Tensor) -> None:
        s = self.sizes
        if axis == "hidden" or (axis == "embed" and s.embed == s.hidden):
            self.hidden += line
        start = 0
        for block in LAYOUTS.get(axis, ()):
            units = getattr(s, block.of)
            rows_here = prod(block.shape(units, s.head_dim))
            mine = by_unit(block, line[start : start + rows_here], units, s.head_dim)
            start += rows_here
            if block.of == "neurons":
                self.neurons[rows] += mine.sum(-1)
                continue
            # A unit is a key-value head with its queries: the rows of both add to it.
            self.heads[rows] += mine.reshape(s.kv_heads, -1).sum(-1)
            if block.of == "heads":
                self.queries[rows] += mine.sum(-1)


def rows_of(block: Block, chosen: Tensor, units: int, width: int) -> Tensor:
    """The rows of a block that belong to the chosen ones of its units, as a smaller block of the same kind has them."""
    grid = torch.arange(prod(block.shape(units, width))).view(block.shape(units, width))
    if block.groups == 1:
        return grid.index_select(block.unit_dimensions[0], chosen).flatten()
    _, second = block.unit_dimensions  # the first dimension numbers the groups
    by_unit = grid.movedim(second, 1).flatten(0, 1)[chosen]
    return by_unit.unflatten(0, (block.groups, -1)).movedim(1, second).flatten()


def by_unit(block: Block, line: Tensor, units: int, width: int) -> Tensor:
    """A block's rows by unit: [units, rows of each], those of several maps added up."""
    grid = line.view(block.shape(units, width))
    if block.groups > 1:
        first, second = block.unit_dimensions
        return grid.movedim(second, first + 1).reshape(units, -1)
    (unit,) = block.unit_dimensions
    return (grid.sum(list(range(unit))) if unit else grid).reshape(units, -1)


def zeros(table: Architecture, sizes: Dims) -> list[Tensor]:
    """Zero arrays for the scores of heads, neurons, hidden, query heads, experts."""
    rows = {axis: table.rows(axis, sizes) for axis in ("heads", "neurons")}
    heads, queries = (torch.zeros(rows["heads"], n) for n in (sizes.kv_heads, sizes.heads))
    neurons, experts = torch.zeros(rows["neurons"], sizes.neurons), torch.zeros(sizes.layers, sizes.experts)
    return [heads, neurons, torch.zeros(sizes.hidden), queries, experts]
