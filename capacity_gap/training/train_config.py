"""Settings of training: optimiser, objective and how both are run; part of `config.py`, where they are described."""

import re
from dataclasses import dataclass, field

from capacity_gap.settings.checks import need, positive, runtime, share
from capacity_gap.settings.errors import choose
from capacity_gap.settings.hashing import LATER
from capacity_gap.settings.scales import parse_scale

SCHEDULES = ("cosine", "wsd", "constant")
PRECISIONS = ("fp32", "bf16")
SHARDINGS = ("none", "fsdp")


@dataclass
class OptimConfig:
    """One training run's optimiser: AdamW with decay on matrices only, a warm-up and a schedule (docs/method.md §4).

    The peak learning rate is `learning_rate`, or where that is not set `learning_rate_times_width` / hidden size: the
    best rate falls in proportion to the width, so one number serves a whole ladder.
    """

    batch_size: int = 16  # sequences in one optimiser step, over all devices
    learning_rate: float | None = None
    learning_rate_times_width: float = 0.4
    schedule: str = "cosine"
    warmup: float = 0.01  # share of all steps
    decay: float = 0.2  # share of all steps in which `wsd` falls to its end
    final: float = 0.1  # learning rate at the end, as a share of the peak (cosine, wsd)
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # gradient norm

    def __post_init__(self) -> None:
        name = self._section
        positive(name, self, "batch_size", "learning_rate_times_width", "epsilon", "clip")
        share(name, self, "warmup", "decay", "final", "beta1", "beta2")
        need(self.weight_decay >= 0, f"{name}.weight_decay", self.weight_decay, "zero or more")
        need(
            self.learning_rate is None or self.learning_rate > 0,
            f"{name}.learning_rate",
            self.learning_rate,
            "more than zero, or null for learning_rate_times_width / hidden size",
        )
        choose(f"{name}.schedule", self.schedule, SCHEDULES)

    @property
    def _section(self) -> str:
        return "train"

    def peak(self, hidden_size: int) -> float:
        """The peak learning rate for a model of this width."""
        return self.learning_rate or self.learning_rate_times_width / hidden_size


@dataclass
class PretrainConfig(OptimConfig):
    """How teachers that no one has published are pre-trained."""

    @property
    def _section(self) -> str:
        return "family.pretrain"


@dataclass
class AdaptOptimConfig(OptimConfig):
    """How teachers are trained on."""

    @property
    def _section(self) -> str:
        return "adapt.optim"


@dataclass
class TrainConfig(OptimConfig):
    """How students are trained, and where everything is run."""

    precision: str = "fp32"
    threads: int = 1  # CPU threads of one process: hashed, because sums depend on it
    device: str = runtime("auto")
    sharding: str = runtime("none")  # of student and optimiser over several ranks: none (DDP), or fsdp
    micro_batch_size: int | None = runtime(None)  # sequences on one device at once; null: the whole batch
    checkpoint_minutes: float = runtime(1.0)
    activation_checkpointing: bool = runtime(False)  # keep each layer's input only: less memory, a third more time
    compile: bool = field(default=False, metadata=LATER)  # torch.compile: other kernels, so other last bits
    evaluate_every: str = field(default="0", metadata=LATER)  # tokens between held-out losses on the way; 0: none
    peak_flops: float | None = runtime(None)  # of one device, for the MFU; null: by the device's name

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("train", self, "threads", "checkpoint_minutes")
        choose("train.precision", self.precision, PRECISIONS)
        choose("train.sharding", self.sharding, SHARDINGS)
        known = re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", self.device)
        need(known is not None, "train.device", self.device, "auto, cpu, cuda, cuda:N, mps, xpu or xpu:N")
        parse_scale(self.evaluate_every, key="train.evaluate_every", allow_zero=True)
        need(self.peak_flops is None or self.peak_flops > 0, "train.peak_flops", self.peak_flops, "more than zero")
        need(
            self.micro_batch_size is None or self.micro_batch_size > 0,
            "train.micro_batch_size",
            self.micro_batch_size,
            "more than zero, or null for the whole batch",
        )
