"""Settings of training: optimiser, schedule, precision, and where and how everything is run."""

from dataclasses import dataclass

from capacity_gap.runtime.process import check_device_name
from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.scales import parse_scale

SCHEDULES = ("cosine", "wsd", "constant")
PRECISIONS = ("fp32", "bf16")
AUTO = "auto"
RECIPE_NAMES = (AUTO, "pico", "small", "large")
SHARDINGS = ("none", "fsdp")
MOST_SEQUENCES = 2**20
MOST_THREADS = 1024
MOST_FLOPS = 1e21  # a second
HIGHEST_RATE = 1e30  # it diverges long before: a cell that fails says so in its record
WARM_UP = "Share of all steps in which the learning rate rises from zero."


@dataclass
class OptimConfig:
    """One training run's optimiser: AdamW with decay on matrices only, a warm-up and a schedule (docs/method.md §4).

    The peak learning rate is `learning_rate`, or where that is not set `learning_rate_times_width` / hidden size: the
    best rate falls in proportion to the width, so one number serves a whole ladder.
    """

    batch_size: int = setting(16, "Sequences in one optimiser step, over all devices.", least=1, most=MOST_SEQUENCES)
    learning_rate: float | None = setting(
        None, "Peak learning rate; null: learning_rate_times_width / hidden size.", above=0, most=HIGHEST_RATE
    )
    learning_rate_times_width: float = setting(0.4, "Peak learning rate times hidden size.", above=0, most=HIGHEST_RATE)
    schedule: str = setting("cosine", "How the learning rate falls after the warm-up.", allowed=SCHEDULES)
    warmup: float = setting(0.01, WARM_UP, least=0, most=1)
    decay: float = setting(0.2, "Share of all steps in which `wsd` falls to its end.", least=0, most=1)
    final: float = setting(0.1, "Learning rate at the end, as a share of the peak (cosine, wsd).", least=0, most=1)
    beta1: float = setting(0.9, "AdamW's decay of the mean of gradients.", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean of squared gradients.", least=0, below=1)
    epsilon: float = setting(1e-8, "AdamW's ε.", least=1e-16, most=1)
    weight_decay: float = setting(0.1, "Weight decay, on matrices only.", least=0, most=100)
    clip: float = setting(1.0, "Largest norm of the gradient; larger ones are scaled down.", above=0, most=1e30)

    def __post_init__(self) -> None:
        validate(self._section, self)

    @property
    def _section(self) -> str:
        return "train"

    def peak(self, hidden_size: int) -> float:
        """The peak learning rate for a model of this width."""
        return self.learning_rate or self.learning_rate_times_width / hidden_size


@dataclass
class PretrainConfig(OptimConfig):
    """How teachers that no one has published are pre-trained."""

    # At pico budgets more steps are worth more than larger ones, and without the warm-up the wider rungs do not bear
    # the rate that suits the narrow ones (docs/decisions.md).
    batch_size: int = setting(4, "Sequences in one optimiser step, over all devices.", least=1, most=MOST_SEQUENCES)
    warmup: float = setting(0.1, WARM_UP, least=0, most=1)

    @property
    def _section(self) -> str:
        return "family.pretrain"


@dataclass
class AdaptOptimConfig(OptimConfig):
    """The optimiser with which teachers are trained on."""

    @property
    def _section(self) -> str:
        return "adapt.optim"


@dataclass
class TrainConfig(OptimConfig):
    """How students are trained, and where everything is run.

    What is null is as the recipe for the student's size has it (cell/recipes.py); a plan says what it comes to.
    """

    recipe: str = setting(
        AUTO,
        "What decides settings that are null: auto takes it by the student's size.",
        allowed=RECIPE_NAMES,
        decides=False,
    )
    batch_size: int | None = setting(  # type: ignore[assignment]
        None,
        "Sequences in one optimiser step of the student, over all devices; null: the recipe's.",
        least=1,
        most=MOST_SEQUENCES,
        column="batch",
        parts=220,
    )
    warmup: float | None = setting(None, f"{WARM_UP} Null: the recipe's.", least=0, most=1)  # type: ignore[assignment]
    learning_rate_times_width: float | None = setting(  # type: ignore[assignment]
        None, "Peak learning rate times hidden size; null: the recipe's.", above=0, most=HIGHEST_RATE
    )
    precision: str | None = setting(
        None,
        "Type of the arithmetic; bf16 keeps weights in fp32; null: the recipe's.",
        allowed=PRECISIONS,
        column="precision",
        parts=200,
    )
    threads: int = setting(
        1,
        "CPU threads of one process; part of a result's identity, because sums depend on it.",
        least=1,
        most=MOST_THREADS,
        untold="the same quantities, rounded otherwise; the column `threads` says what was used",
    )
    device: str = setting("auto", "Where models run: auto, cpu, cuda, cuda:N, mps, xpu or xpu:N.", decides=False)
    sharding: str = setting(
        "none",
        "How student and optimiser are split over several ranks: none (DDP) or fsdp (teachers too: family.placement).",
        allowed=SHARDINGS,
        decides=False,
    )
    micro_batch_size: int | None = setting(
        None, "Sequences on one device at once; null: the whole batch.", least=1, most=MOST_SEQUENCES, decides=False
    )
    checkpoint_minutes: float = setting(1.0, "Minutes between checkpoints.", above=0, most=100_000, decides=False)
    activation_checkpointing: bool = setting(
        False, "Keep each layer's input only: less memory, a third more time.", decides=False
    )
    compile: bool = setting(False, "Use torch.compile: other kernels, so other last bits.", later=True)
    trunk: bool = setting(
        False,
        "Budgets that are doublings of one another share one run at a constant rate; the last train.decay of each "
        "branches off. Needs train.schedule=wsd.",
        later=True,
    )
    evaluate_every: str = setting(
        "0", "Tokens between held-out losses on the way; 0: none.", later=True, untold="only adds to the history"
    )
    peak_flops: float | None = setting(
        None,
        "Peak FLOP/s of one device, for the MFU; null: by the device's name.",
        least=1e6,
        most=MOST_FLOPS,
        decides=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device_name(self.device)
        parse_scale(self.evaluate_every, key="train.evaluate_every", allow_zero=True)
