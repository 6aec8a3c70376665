"""How units lie along an axis: which of its rows belong to which head or neuron. Imports no torch.

A plain axis holds unit after unit. A fused axis holds several maps, and architectures order them differently: all
queries, keys and values one after another, or head by head. Each axis here is one or more blocks that follow each
other, and a block is a grid whose dimensions are numbers, `u` (the units) and `w` (the rows of one unit).
"""

from collections.abc import Mapping
from dataclasses import dataclass

WIDTH = "w"  # the rows of one head: head_dim
UNITS = "u"


@dataclass(frozen=True)
class Block:
    """A part of an axis: whose units it holds (`heads`, `kv_heads` or `neurons`), and the grid of its rows."""

    of: str
    grid: tuple[int | str, ...]

    def shape(self, units: int, width: int) -> tuple[int, ...]:
        """The grid in numbers. Where units are dealt to groups, the first number is that of the groups."""
        sizes = {UNITS: units, WIDTH: width, GROUPED: units // self.groups}
        return tuple(g if isinstance(g, int) else sizes[g] for g in self.grid)

    @property
    def groups(self) -> int:
        """How many groups the units are dealt to, each of which has its own rows together; 1 for most."""
        return int(self.grid[0]) if GROUPED in self.grid else 1

    @property
    def unit_dimensions(self) -> tuple[int, ...]:
        """The dimensions of the grid that number the units, in their order."""
        return (0, self.grid.index(GROUPED)) if GROUPED in self.grid else (self.grid.index(UNITS),)


GROUPED = "u of a group"

LAYOUTS: Mapping[str, tuple[Block, ...]] = {
    "neurons": (Block("neurons", (UNITS,)),),
    "heads": (Block("heads", (UNITS, WIDTH)),),
    "kv_heads": (Block("kv_heads", (UNITS, WIDTH)),),
    "per_head": (Block("heads", (UNITS,)),),
    "per_kv_head": (Block("kv_heads", (UNITS,)),),
    # All queries, all keys, all values.
    "qkv": (Block("heads", (3, UNITS, WIDTH)),),
    # Of each head its query, key and value.
    "qkv_by_head": (Block("heads", (UNITS, 3, WIDTH)),),
    # All queries; the keys of fewer heads; their values.
    "qkv_grouped": tuple(Block(of, (UNITS, WIDTH)) for of in ("heads", "kv_heads", "kv_heads")),
    # CodeGen: four groups of heads, each with its queries, values and keys.
    "qkv_in_fours": (Block("heads", (4, 3, GROUPED, WIDTH)),),
    # Gates and inputs of gated neurons: all gates first, or neuron by neuron.
    "gate_up": (Block("neurons", (2, UNITS)),),
    "gate_up_by_neuron": (Block("neurons", (UNITS, 2)),),
}
