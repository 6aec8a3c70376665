"""Cutting a student out of its teacher: `index_select` along named axes, nothing else."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capacity_gap.errors import ConfigError
from capacity_gap.models.axes import Architecture, Dims, architecture, dims, masks
from capacity_gap.pruning.scores import Scores
from capacity_gap.pruning.shape import Shape, sized, unfit


@dataclass(frozen=True)
class Kept:
    """The units that stay, in the teacher's order: `layers`, `hidden` [D'], `heads` [L, K'], `neurons` [L, F']."""

    layers: list[int]
    hidden: Tensor
    heads: Tensor
    neurons: Tensor

    def rows(self, axis: str, layer: int, sizes: Dims) -> Tensor | None:
        """Indices into one axis of a parameter of a teacher's layer; None keeps the whole axis."""
        if axis == "hidden":
            return self.hidden
        if axis == "neurons":
            return self.neurons[layer]
        if axis == "kv_heads":
            return _spread(self.heads[layer], sizes.head_dim)
        if axis == "heads":
            return _spread(self.heads[layer], sizes.head_dim * sizes.group)
        return None


def _spread(units: Tensor, width: int) -> Tensor:
    """Indices of all rows of the given units: unit u holds rows u·width … u·width + width − 1."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def symmetric_layers(layers: int, keep: int) -> list[int]:
    """Which layers stay when they are removed evenly from both ends, one more from the top if odd (METHOD §3)."""
    bottom = (layers - keep) // 2
    return list(range(bottom, bottom + keep))


def choose_units(scores: Scores, shape: Shape, layers: int) -> Kept:
    """The units with the highest scores, the same number in every layer (*local priority*)."""
    return Kept(
        symmetric_layers(layers, shape.layers),
        _top(scores.hidden, shape.hidden),
        _top(scores.heads, shape.kv_heads),
        _top(scores.neurons, shape.neurons),
    )


def _top(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest along the last dimension, ascending; ties go to the earlier unit."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values


def prune(model: Any, scores: Scores, shape: Shape) -> Any:
    """Returns the student: a new, smaller model of the same class, loadable by plain transformers; `model` stays whole.

    Raises:
        ConfigError: the shape is larger than the model along some axis, or the weights are not finite.
    """
    table, sizes = architecture(model.config), dims(model.config)
    masks(model.config)  # refuses what cannot be pruned yet
    if reasons := unfit(shape, sizes):
        raise ConfigError(f"a student of shape {shape} cannot be cut from this teacher: {'; '.join(reasons)}.")
    student = _empty(model, table, sized(sizes, shape))
    kept = choose_units(scores, shape, sizes.layers)
    source = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(_cut(name, source, table, kept, sizes))
    return student.eval()


def _empty(model: Any, table: Architecture, sizes: Dims) -> Any:
    """An untrained model of the student's sizes and the teacher's class and dtype."""
    config = type(model.config).from_dict(model.config.to_dict())
    for axis, key in table.keys.items():
        setattr(config, key, getattr(sizes, axis))
    config.head_dim = sizes.head_dim
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: sizes.layers]
    with torch.random.fork_rng(devices=[]):
        return type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )


def _cut(name: str, source: dict[str, Tensor], table: Architecture, kept: Kept, sizes: Dims) -> Tensor:
    """One parameter of the student, selected from the teacher's along each of its axes."""
    pattern = re.sub(r"\.\d+\.", ".{i}.", name, count=1)
    if pattern not in table.parameters:
        raise ConfigError(f"parameter {name} is not in the axis table; its model cannot be pruned.")
    found = re.search(r"\.(\d+)\.", name)
    layer = kept.layers[int(found[1])] if found else 0
    tensor = source[pattern.replace("{i}", str(layer))]
    if not tensor.isfinite().all():
        raise ConfigError(f"the teacher's {name} holds NaN or infinity; check its checkpoint.")
    for dimension, axis in enumerate(table.parameters[pattern]):
        index = kept.rows(axis, layer, sizes)
        if index is not None:
            tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor
