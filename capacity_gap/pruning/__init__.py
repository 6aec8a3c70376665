"""Pruning in three ideas: score every unit, choose a shape, cut. Shapes need no torch; scores and surgery load it."""

from typing import TYPE_CHECKING, Any

from capacity_gap.pruning.common_shape import common_shape
from capacity_gap.pruning.shape import Shape, choose_shape

if TYPE_CHECKING:
    from capacity_gap.pruning.methods import expressive_scores
    from capacity_gap.pruning.scores import Scores
    from capacity_gap.pruning.surgery import prune

__all__ = ["Scores", "Shape", "choose_shape", "common_shape", "expressive_scores", "prune"]


def __getattr__(name: str) -> Any:
    if name == "Scores":
        from capacity_gap.pruning.scores import Scores

        return Scores
    if name == "expressive_scores":
        from capacity_gap.pruning.methods import expressive_scores

        return expressive_scores
    if name == "prune":
        from capacity_gap.pruning.surgery import prune

        return prune
    raise AttributeError(name)
