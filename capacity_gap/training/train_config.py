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
WARM_UP = "Share of all steps used for linear learning-rate warm-up."


@dataclass
class OptimConfig:
    """One training run's optimiser: AdamW with decay on matrices only, a warm-up and a schedule (docs/method.md §4).

    The peak learning rate is `learning_rate`, or where that is not set `learning_rate_times_width` / hidden size: the
    best rate falls in proportion to the width, so one number serves a whole ladder.
    """

    batch_size: int = setting(16, "Sequences per optimiser step, over all devices.", least=1, most=MOST_SEQUENCES)
    learning_rate: float | None = setting(
        None, "Peak learning rate; null: learning_rate_times_width / hidden size.", above=0, most=HIGHEST_RATE
    )
    learning_rate_times_width: float = setting(0.4, "Peak learning rate times hidden size.", above=0, most=HIGHEST_RATE)
    schedule: str = setting("cosine", "Learning-rate schedule after the warm-up.", allowed=SCHEDULES)
    warmup: float = setting(0.01, WARM_UP, least=0, most=1)
    decay: float = setting(0.2, "wsd: share of all steps used for the decay.", least=0, most=1)
    final: float = setting(0.1, "cosine, wsd: final learning rate as a share of the peak.", least=0, most=1)
    beta1: float = setting(0.9, "AdamW's β₁.", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's β₂.", least=0, below=1)
    epsilon: float = setting(1e-8, "AdamW's ε.", least=1e-16, most=1)
    weight_decay: float = setting(0.1, "Weight decay, applied to matrices only.", least=0, most=100)
    clip: float = setting(1.0, "Gradient clipping: maximum global norm.", above=0, most=1e30)

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
    """Pre-training of teachers that are trained here."""

    # At pico budgets more steps are worth more than larger ones, and without the warm-up the wider rungs do not bear
    # the rate that suits the narrow ones (docs/decisions.md).
    batch_size: int = setting(4, "Sequences per optimiser step, over all devices.", least=1, most=MOST_SEQUENCES)
    warmup: float = setting(0.1, WARM_UP, least=0, most=1)

    @property
    def _section(self) -> str:
        return "family.pretrain"


@dataclass
class AdaptOptimConfig(OptimConfig):
    """The optimiser of continued pre-training."""

    @property
    def _section(self) -> str:
        return "adapt.optim"


@dataclass
class TrainConfig(OptimConfig):
    """How students are trained, and where everything is run.

    Null settings take the recipe for the student's size (cell/recipes.py); a plan prints the values.
    """

    recipe: str = setting(
        AUTO,
        "Defaults for settings that are null; auto chooses by the student's size.",
        allowed=RECIPE_NAMES,
        decides=False,
    )
    batch_size: int | None = setting(  # type: ignore[assignment]
        None,
        "Sequences per optimiser step of the student, over all devices; null: the recipe's.",
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
        "Precision of training; bf16 is autocast with fp32 weights; null: the recipe's.",
        allowed=PRECISIONS,
        column="precision",
        parts=200,
    )
    threads: int = setting(
        1,
        "CPU threads per process; part of a result's identity, because sums depend on it.",
        least=1,
        most=MOST_THREADS,
        untold="`threads`, as used",
    )
    device: str = setting("auto", "Where models run: auto, cpu, cuda, cuda:N, mps, xpu or xpu:N.", decides=False)
    sharding: str = setting(
        "none",
        "How student and optimiser are split over several ranks: none (DDP) or fsdp (teachers too: family.placement).",
        allowed=SHARDINGS,
        decides=False,
    )
    micro_batch_size: int | None = setting(
        None,
        "Sequences per device and forward pass; null: the whole batch.",
        least=1,
        most=MOST_SEQUENCES,
        decides=False,
    )
    checkpoint_minutes: float = setting(1.0, "Minutes between checkpoints.", above=0, most=100_000, decides=False)
    activation_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, a third more time.", decides=False
    )
    compile: bool = setting(False, "Use torch.compile; results differ in their last bits.", later=True)
    trunk: bool = setting(
        False,
        "Budgets that are doublings of one another share one run at a constant learning rate; the last train.decay of "
        "each is a decay branch of its own. Needs train.schedule=wsd.",
        later=True,
    )
    evaluate_every: str = setting(
        "0",
        "Tokens between held-out losses during training; 0: none.",
        later=True,
        untold="not recorded: only adds to the history",
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
