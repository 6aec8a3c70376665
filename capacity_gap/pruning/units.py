"""From weights to units: sums over all weights that belong to a head, a neuron or a hidden dimension."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from capacity_gap.models.axes import Architecture, Dims, pattern_of


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, tied ones once."""
    return iter(model.named_parameters())


class UnitSums:
    """Adds up a quantity that every weight has, along the axes of the table; fp32 on the CPU."""

    def __init__(self, table: Architecture, sizes: Dims) -> None:
        self.table, self.sizes = table, sizes
        self.heads = torch.zeros(sizes.layers, sizes.kv_heads)
        self.neurons = torch.zeros(sizes.layers, sizes.neurons)
        self.hidden = torch.zeros(sizes.hidden)
        self.queries = torch.zeros(sizes.layers, sizes.heads)

    @property
    def totals(self) -> list[Tensor]:
        """Heads [L, K], neurons [L, F], hidden [D], query heads [L, H]."""
        return [self.heads, self.neurons, self.hidden, self.queries]

    def add(self, name: str, values: Tensor) -> None:
        """Adds the values of parameter `name`, of its own shape."""
        pattern, layer = pattern_of(self.table, name)
        for dimension, axis in enumerate(self.table.parameters[pattern]):
            others = [d for d in range(values.ndim) if d != dimension]
            line = (values.sum(others) if others else values).float().cpu()
            self._add_line(axis, layer, line)

    def _add_line(self, axis: str, layer: int, line: Tensor) -> None:
        s = self.sizes
        if axis == "hidden" or (axis == "embed" and s.embed == s.hidden):
            self.hidden += line
        elif axis == "neurons":
            self.neurons[layer] += line
        elif axis == "kv_heads":
            self.heads[layer] += line.view(s.kv_heads, -1).sum(-1)
        elif axis in ("heads", "qkv", "qkv_by_head"):
            parts = line.view(3, s.heads, -1).sum(0) if axis == "qkv" else line.view(s.heads, -1)
            self.queries[layer] += parts.sum(-1)
            self.heads[layer] += parts.view(s.kv_heads, -1).sum(-1)
