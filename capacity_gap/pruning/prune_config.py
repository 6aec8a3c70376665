"""Settings of a student's start: what is cut, by which scores, into which shape."""

from dataclasses import dataclass

from capacity_gap.pruning.methods import LAYER_SCORES, SCORES, SYMMETRIC
from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError

PRIORITIES = ("local", "global")
INITS = ("pruned", "random", "shared", "pretrained")
SHAPES = ("common", "per_teacher", "fixed")


@dataclass
class PruneConfig:
    """Where a student starts: `pruned` from its teacher (docs/method.md §2, §3), `random`, `shared` or `pretrained`.

    `shared`: one start for all teachers, pruned from the teacher named by `reference`. Like `random`, it holds the
    start fixed, so that what is left of the curve is the capacity gap and not the damage of pruning. With `random`
    and `pretrained` nothing is cut: of what follows only the shape counts. `pretrained`: the student is a trained
    model, the checkpoint that `student` names, or one of its shape that is trained here on `init_data` tokens.
    """

    method: str = setting("expressive", "Importance score of units.", allowed=SCORES, column="prune_method", parts=60)
    init: str = setting(
        "pruned",
        "Initial weights: pruned from the teacher, random, one initialisation shared by all teachers, or a trained "
        "model.",
        allowed=INITS,
        column="init",
        parts=30,
    )
    reference: str | None = setting(
        None,
        "init=shared: the teacher that the shared pruned initialisation is cut from.",
        column="reference",
        if_set=True,
        parts=40,
    )
    init_data: str | None = setting(
        None,
        "init=pretrained without a checkpoint: tokens, or `20x`, on which the initial student is pre-trained here.",
        column="start_tokens",
        computed=True,
    )
    shape: str = setting(
        "common",
        "The student's shape: one that fits into all teachers, each teacher's in proportion, or a fixed one.",
        allowed=SHAPES,
        column="shape",
        computed=True,
    )
    batches: int = setting(32, "Calibration batches for the scores.", least=1, most=10**6)
    calibration: int = setting(
        0,
        "Which block of training sequences is used for calibration: 0 the first, 1 the one after it, and so on.",
        least=0,
        most=10**6,
        later=True,
    )
    # The expressive score depends on the batch: its absolute value comes after the batch's sum.
    batch_size: int | None = setting(None, "Sequences per calibration batch; null: the recipe's.", least=1, most=2**20)
    fixed: str | None = setting(
        None,
        "shape=fixed: layers x hidden x heads x neurons, such as 24x3072x24x8192.",
        column="shape",
        computed=True,
    )
    priority: str = setting(
        "local",
        "local: the same number of units in every layer; global: units ranked across layers.",
        allowed=PRIORITIES,
        column="prune_priority",
        if_set=True,
        parts=70,
    )
    layers: str | None = setting(
        None,
        "Layers to remove: from both ends, or by lowest score; null: by loss_increase where any are removed.",
        allowed=lambda: (SYMMETRIC, *LAYER_SCORES),
        column="prune_layers",
        if_set=True,
        null_at=SYMMETRIC,
        parts=80,
    )
    multiple: int | None = setting(
        None,
        "Hidden size and neurons of a student are multiples of this; null: the recipe's, halved where nothing fits.",
        least=1,
        most=4096,
        untold="not recorded: see the student's parameters and its config.json",
    )
    depth: int | None = setting(None, "Layers of the student; null: the shape policy's.", least=1, most=10_000)
    experts: int | None = setting(
        None,
        "Mixtures of experts: experts per layer of the student; null: as many as its teacher's.",
        least=1,
        most=10_000,
        later=True,
    )
    iterative: int = setting(
        1,
        "Number of pruning steps, with new scores before each.",
        least=1,
        most=100,
        column="prune_steps",
        if_set=True,
        parts=90,
    )
    step_data: str = setting("0", "Tokens of distillation between two pruning steps.")

    def __post_init__(self) -> None:
        validate("prune", self)
        if (self.shape == "fixed") != (self.fixed is not None):
            raise ConfigError(
                f"prune.shape={self.shape} with prune.fixed={self.fixed}: prune.fixed is required by shape=fixed and "
                "allowed only there, such as prune.shape=fixed prune.fixed=24x3072x24x8192 (layers x hidden x heads x "
                "neurons)."
            )
        if self.fixed is not None and self.depth is not None:
            raise ConfigError(
                f"prune.depth={self.depth} with prune.fixed={self.fixed}: a fixed shape includes its layers. Set only "
                "one of them."
            )
        if self.step_data != "0" and self.iterative == 1:
            raise ConfigError(
                f"prune.step_data={self.step_data} applies only to iterative pruning: set prune.iterative=2 or more."
            )
        if (self.init == "shared") != (self.reference is not None):
            raise ConfigError(
                f"prune.init={self.init} with prune.reference={self.reference}: a reference teacher is required by "
                "init=shared and allowed only there, such as prune.init=shared prune.reference=120k."
            )
        if self.init_data is not None and self.init != "pretrained":
            raise ConfigError(
                f"prune.init_data={self.init_data} with prune.init={self.init}: only students of init=pretrained are "
                "pre-trained. Set prune.init=pretrained too."
            )
        if self.init == "pretrained" and self.iterative > 1:
            raise ConfigError(
                f"prune.iterative={self.iterative} with prune.init=pretrained: such a student is not pruned, so there "
                "are no steps."
            )

    @property
    def by_layer_score(self) -> bool:
        """Whether layers are removed by a score."""
        return self.layers not in (None, SYMMETRIC)

    @property
    def cuts(self) -> bool:
        """Whether the start is cut from a teacher."""
        return self.init in ("pruned", "shared")
