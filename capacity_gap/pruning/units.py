"""From weights to units: sums over all weights that belong to a head, a neuron or a hidden dimension."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from capacity_gap.models.architecture import Architecture, Dims, place
from capacity_gap.models.axes import pattern_of
from capacity_gap.store.checkpoint import whole


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, tied ones once."""
    return iter(model.named_parameters())


class UnitSums:
    """Adds up a quantity that every weight has, along the axes of the table; fp32 on the CPU."""

    def __init__(self, table: Architecture, sizes: Dims) -> None:
        self.table, self.sizes = table, sizes
        self.heads, self.neurons, self.hidden, self.queries = zeros(table, sizes)

    @property
    def totals(self) -> list[Tensor]:
        """Heads [R, K], neurons [R, F], hidden [D], query heads [R, H]; a row R a place and layer (`axes.py`)."""
        return [self.heads, self.neurons, self.hidden, self.queries]

    def add(self, name: str, values: Tensor) -> None:
        """Adds the values of parameter `name`, of its own shape; sharded ones are summed over all ranks."""
        pattern, layer = pattern_of(self.table, name)
        # What all layers use, such as a relative bias, counts for each of them.
        layers = [layer] if "{i}" in pattern else list(range(self.sizes.layers))
        for dimension, axis in enumerate(self.table.parameters[pattern]):
            others = [d for d in range(values.ndim) if d != dimension]
            line = whole(values.sum(others) if others else values).float().cpu()
            kind, number = place(axis)
            self._add_line(kind, [number * self.sizes.layers + i for i in layers], line)

    def _add_line(self, axis: str, rows: list[int], line: Tensor) -> None:
        s = self.sizes
        if axis == "hidden" or (axis == "embed" and s.embed == s.hidden):
            self.hidden += line
        elif axis == "neurons":
            self.neurons[rows] += line
        elif axis == "kv_heads":
            # A unit is a key-value head with its queries: the rows of both add to it.
            self.heads[rows] += line.view(s.kv_heads, -1).sum(-1)
        elif axis in ("heads", "per_head", "qkv", "qkv_by_head"):
            # In `qkv` a head's queries, keys and values lie a third of the axis apart.
            parts = line.view(3, s.heads, -1).sum(0) if axis == "qkv" else line.view(s.heads, -1)
            self.queries[rows] += parts.sum(-1)
            self.heads[rows] += parts.view(s.kv_heads, -1).sum(-1)


def zeros(table: Architecture, sizes: Dims) -> list[Tensor]:
    """Room for the scores of heads, neurons, hidden, query heads."""
    rows = {axis: table.rows(axis, sizes.layers) for axis in ("heads", "neurons")}
    heads, queries = (torch.zeros(rows["heads"], n) for n in (sizes.kv_heads, sizes.heads))
    return [heads, torch.zeros(rows["neurons"], sizes.neurons), torch.zeros(sizes.hidden), queries]
