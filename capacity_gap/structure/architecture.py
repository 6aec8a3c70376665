"""The sizes of a model and the table of its architecture: which named axis each dimension of each parameter is.

The tables themselves are in `architectures.py`; what is counted and cut from them is in `axes.py`. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod
from typing import Any

from capacity_gap.structure.layouts import LAYOUTS

Config = Mapping[str, Any] | Any  # the content of a config.json, or a transformers config object
NEURONS_PER_HIDDEN = 4  # where config.json does not say how many neurons there are


@dataclass(frozen=True)
class Dims:
    """The sizes of one model. `heads` and `kv_heads` count heads; a unit is one key-value head."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    layers: int
    tied: bool  # output matrix = embedding
    positions: int = 0  # rows of the table of learned positions
    embed: int = 0
    buckets: int = 0
    first_position: int = 0  # the row of the first position: those before it stand for none
    experts: int = 0  # of each layer, in a mixture; 0 in a dense model
    active: int = 0  # of them, how many a token goes through

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that learned positions allow; 0 where nothing limits it."""
        return self.positions - self.first_position

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def axis(self, name: str) -> int:
        """Length of a named axis, wherever it is."""
        name = place(name)[0]
        if name in LAYOUTS:
            return sum(prod(b.shape(getattr(self, b.of), self.head_dim)) for b in LAYOUTS[name])
        return int(name) if name.isdigit() else getattr(self, name)

    def with_units(
        self,
        *,
        hidden: int,
        kv_heads: int,
        neurons: int,
        layers: int,
        group: int | None = None,
        experts: int | None = None,
    ) -> "Dims":
        """The same model with other numbers of units; the same number of experts by default."""
        return replace(
            self,
            hidden=hidden,
            kv_heads=kv_heads,
            heads=kv_heads * (group or self.group),
            neurons=neurons,
            layers=layers,
            experts=self.experts if experts is None else experts,
            embed=hidden if self.embed == self.hidden else self.embed,
        )


@dataclass(frozen=True)
class Sublayer:
    """A module whose output joins the residual stream, and the linear map in it whose inputs a unit mask acts on."""

    module: str
    out: str


@dataclass(frozen=True)
class Stack:
    """One stack of layers, and the places in a layer where the masks of docs/method.md §2 act, as its submodules."""

    layer: str
    attentions: tuple[Sublayer, ...]
    mlp: Sublayer
    stream: tuple[str, ...] = ()  # read the stream after an addition inside the layer


@dataclass(frozen=True)
class Architecture:
    """The table of one architecture: `parameters` maps a name, with `{i}` for the layer, to its axes.

    A parameter of all experts has them as its first axis. Files may hold it otherwise than the model: `in_files` names,
    for such a parameter, the tensors that lie one after another along its second axis, `{e}` being the expert.
    """

    parameters: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]  # axis → config key
    output: str  # the output matrix, absent where it is the embedding
    stacks: tuple[Stack, ...]  # one; of an encoder–decoder both
    square: bool = False  # hidden = heads × head_dim: the two axes are tied
    in_checkpoints: Mapping[str, str] = field(default_factory=dict)  # names that differ in files
    one_set: tuple[int, ...] = ()  # attentions whose heads all layers share: one set stays, the same in every layer
    scaled: str = ""  # the weight that takes up the output's factor hidden^−½, which changes with the width
    position_offset: int = 0  # rows of the table of positions before the first position
    queries_by_layer: tuple[str, ...] = ()  # fused maps whose queries the model divides by the layer's number
    copies: Mapping[str, str] = field(default_factory=dict)  # names in files that repeat another parameter
    literal: bool = False  # axes are the lengths of one model's parameters: no other sizes can be had
    uncut: str = ""  # why its models cannot be scored or cut yet; then `stacks` say where layers are and no more
    kv_heads: int = 0  # key-value heads, where their number is fixed: 1 in multi-query attention
    root_scaled: bool = False  # embeddings are multiplied by √hidden, which changes with the width
    final_norm: str = ""  # the norm before the output matrix
    norm_offset: float = 0.0  # what is added to its weight: Gemma multiplies by 1 + weight
    in_files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names in files, with {i} and {e}: see below
    leftovers: tuple[str, ...] = ()  # endings of names in files that are no parameters: buffers of older releases
    alibi: bool = False  # each head has a slope of its own, which follows from how many heads there are

    @property
    def head_step(self) -> int:
        """What numbers of heads are multiples of: fused maps may deal them to groups."""
        axes = {axis for axes in self.parameters.values() for axis in axes}
        return max((b.groups for axis in axes for b in LAYOUTS.get(axis, ())), default=1)

    def neurons_of(self, hidden: int, otherwise: int) -> int:
        """Neurons of a layer of this hidden size: `otherwise`, unless the class fixes how many each hidden unit has."""
        return otherwise if "neurons" in self.keys else NEURONS_PER_HIDDEN * hidden

    @property
    def embedding(self) -> str:
        """The input embedding: the output matrix where the two are tied."""
        return next(n for n, axes in self.parameters.items() if axes[0] == "vocab" and n != self.output)

    def stacks_of(self, axis: str, experts: int = 0) -> list[int]:
        """The stack of each place that has units of `heads` or `neurons`; every expert is a place of neurons."""
        if axis == "neurons":
            return list(range(len(self.stacks))) * (experts or 1)
        return [number for number, stack in enumerate(self.stacks) for _ in stack.attentions]

    def unit_maps(self, axis: str, layers: int) -> list[str]:
        """The weights whose inputs the units of `heads` or `neurons` are.

        One for each row of the scores; of a mixture one for each layer, which holds those of all its experts.
        """
        places = [
            self.weight_of(stack, sublayer)
            for stack in self.stacks
            for sublayer in (stack.attentions if axis == "heads" else (stack.mlp,))
        ]
        return [name.replace("{i}", str(i)) for name in places for i in range(layers)]

    def weight_of(self, stack: Stack, sublayer: Sublayer) -> str:
        """The parameter of a sublayer's last map: experts hold theirs without a module of its own."""
        name = f"{stack.layer}.{sublayer.out}"
        return name if name in self.parameters else f"{name}.weight"

    @property
    def router(self) -> str:
        """The weight that says which experts a token goes to; empty in a dense model."""
        found = (n for n, axes in self.parameters.items() if axes == ("experts", "hidden") and n.endswith(".weight"))
        return next(found, "")

    def rows(self, axis: str, sizes: Dims) -> int:
        """Rows of the scores of `heads` or `neurons`: a place and a layer each."""
        return len(self.stacks_of(axis, sizes.experts)) * sizes.layers

    def stack_of(self, pattern: str) -> int:
        """The stack that a row of the table belongs to; the first for what is outside the layers."""
        return next((n for n, stack in enumerate(self.stacks) if pattern.startswith(stack.layer)), 0)


def heads_of_same_slopes(heads: int, fewer: int) -> list[int]:
    """Of a model with `heads` heads, those whose ALiBi slopes the heads of one with `fewer` have, in their order.

    Press et al. 2022 (arXiv 2108.12409): of n heads, n a power of two, head i has the slope 2^(−8i/n). Of another n
    come first those of the power of two below it, then every second one of the power above. So the slopes of fewer
    heads are always among those of more.
    """
    found = _slopes(heads)
    return [found.index(slope) for slope in _slopes(fewer)]


def _slopes(heads: int) -> list[Fraction]:
    """−log₂ of the slope of each head, as a share of the largest."""
    power = 1 << (heads - 1).bit_length()
    slopes = [Fraction(i, power) for i in range(1, power + 1)]
    return slopes if heads == power else (slopes[1::2] + slopes[::2])[:heads]


def place(axis: str) -> tuple[str, int]:
    """An axis and which of its places: `heads.2` is the heads of the third attention."""
    name, _, number = axis.partition(".")
    return name, int(number or 0)


def get(config: Config, key: str, default: Any = None) -> Any:
    """One entry of a config, be it a mapping or an object."""
    return config.get(key, default) if isinstance(config, Mapping) else getattr(config, key, default)
