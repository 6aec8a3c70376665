"""Which layers of a teacher stay, and the rows of its scores that belong to them."""

import torch
from torch import Tensor

from capacity_gap.models.axes import architecture, dims
from capacity_gap.models.layers import symmetric_layers
from capacity_gap.pruning.methods import SYMMETRIC
from capacity_gap.pruning.scores import Scores
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure.architecture import Architecture, Config, Dims


def kept_layers(scores: Scores, config: Config, keep: int, by: str) -> list[list[int]]:
    """Which layers of each stack stay: the middle ones (`symmetric`), or those with the highest scores.

    An encoder and its decoder keep equally many.
    """
    layers, stacks = dims(config).layers, len(architecture(config).stacks)
    if by == SYMMETRIC or keep == layers:
        return [symmetric_layers(layers, keep)] * stacks
    if scores.layers is None:
        raise ConfigError(f"layers={by} needs layer scores: compute them with prune.layers={by}.")
    return top(scores.layers.unflatten(0, (stacks, layers)), keep).tolist()


def kept_rows(
    table: Architecture, axis: str, sizes: Dims, stay: list[list[int]], experts: list[Tensor] | None = None
) -> list[int]:
    """The rows of the scores of `heads` or `neurons` that lie in layers, and belong to experts, which stay.

    `experts`: of each layer.
    """
    of_experts = experts if experts is not None and axis == "neurons" else None
    return [
        n * sizes.layers + i
        for n, stack in enumerate(table.stacks_of(axis, sizes.experts))
        for i in stay[stack]
        if of_experts is None or n in of_experts[i]
    ]


def kept_experts(scores: Scores, sizes: Dims, keep: int | None) -> list[Tensor]:
    """The experts of each layer that stay, those with the highest scores; of a dense model none."""
    if keep in (None, sizes.experts):
        return [torch.arange(sizes.experts)] * sizes.layers
    if scores.experts is None:
        raise ConfigError("experts are removed, but these scores contain no expert scores.")
    return list(top(scores.experts, keep))


def top(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest along the last dimension, ascending; ties go to the earlier unit."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values
