"""Settings of a student's start: what is cut, by which scores, into which shape."""

from dataclasses import dataclass

from capacity_gap.settings.checks import need, positive
from capacity_gap.settings.errors import ConfigError, choose

METHODS = ("expressive", "random", "magnitude", "movement", "taylor", "activation", "wanda")


PRIORITIES = ("local", "global")


LAYERS = ("symmetric", "block_influence", "loss_increase")


INITS = ("pruned", "random", "shared")


SHAPES = ("common", "per_teacher", "fixed")


@dataclass
class PruneConfig:
    """Where a student starts: `pruned` from its teacher (docs/method.md §2, §3), from `random` weights, or `shared`.

    `shared`: one start for all teachers, pruned from the teacher named by `reference`. Like `random`, it holds the
    start fixed, so that what is left of the curve is the capacity gap and not the damage of pruning. With `random`
    nothing is cut: of what follows only the shape counts.
    """

    method: str = "expressive"
    init: str = "pruned"
    reference: str | None = None  # init=shared: the rung that the one start is pruned from
    shape: str = "common"
    batches: int = 32
    batch_size: int = 8  # the score depends on it: its absolute value comes after the batch's sum
    fixed: str | None = None  # shape=fixed: layers x hidden x heads x neurons, such as 24x3072x24x8192
    priority: str = "local"  # local: as many units in every layer; global: ranked across layers
    layers: str = "symmetric"  # which layers go: from both ends, or those with the lowest score
    depth: int | None = None  # layers of the student; null: the shape policy's
    iterative: int = 1  # prune in so many steps, scoring again before each
    step_data: str = "0"  # tokens of distillation between two steps

    def __post_init__(self) -> None:
        choose("prune.method", self.method, METHODS)
        choose("prune.init", self.init, INITS)
        choose("prune.shape", self.shape, SHAPES)
        choose("prune.priority", self.priority, PRIORITIES)
        choose("prune.layers", self.layers, LAYERS)
        positive("prune", self, "batches", "batch_size", "iterative")
        need(self.depth is None or self.depth > 0, "prune.depth", self.depth, "more than zero, or null")
        if (self.shape == "fixed") != (self.fixed is not None):
            raise ConfigError(
                f"prune.shape={self.shape} with prune.fixed={self.fixed}: a shape is named for shape=fixed, and only "
                "for it, such as prune.shape=fixed prune.fixed=24x3072x24x8192 (layers x hidden x heads x neurons)."
            )
        if self.fixed is not None and self.depth is not None:
            raise ConfigError(
                f"prune.depth={self.depth} with prune.fixed={self.fixed}: a fixed shape names its layers. Give one."
            )
        if self.step_data != "0" and self.iterative == 1:
            raise ConfigError(
                f"prune.step_data={self.step_data} is for pruning in steps: say prune.iterative=2 or more."
            )
        if (self.init == "shared") != (self.reference is not None):
            raise ConfigError(
                f"prune.init={self.init} with prune.reference={self.reference}: a reference teacher is named for "
                "init=shared, and only for it, such as prune.init=shared prune.reference=120k."
            )
