"""Settings of the distillation objective and of what the teacher says."""

from dataclasses import dataclass, field

from capacity_gap.settings.checks import need, positive, share
from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.settings.hashing import LATER

LOSSES = ("forward_kl", "soft_ce", "reverse_kl", "js", "skewed_forward_kl", "skewed_reverse_kl", "tvd")


SKEWED = ("js", "skewed_forward_kl", "skewed_reverse_kl")


SAMPLED = ("forward_kl", "soft_ce")  # what sampled signals estimate without bias


SIGNALS = ("online", "topk", "sampled")


@dataclass
class DistillConfig:
    """The objective (1 − kd_weight)·CE + kd_weight·KD (docs/method.md §4); kd_weight = 0 is direct training."""

    loss: str = "forward_kl"
    kd_weight: float = 0.5
    temperature: float = 1.0
    tau_squared: bool = True
    signal: str = "online"
    skew: float | None = field(default=None, metadata=LATER)  # β of js (null: 0.5), α of the skewed KLs (null: 0.1)
    signal_size: int | None = field(default=None, metadata=LATER)  # topk: k; sampled: draws; null: 64
    hidden_weight: float = field(default=0.0, metadata=LATER)  # of 1 − cos(last hidden states), added to the objective

    def __post_init__(self) -> None:
        choose("distill.loss", self.loss, LOSSES)
        choose("distill.signal", self.signal, SIGNALS)
        if self.signal == "sampled" and self.loss not in SAMPLED:
            raise ConfigError(
                f"distill.signal=sampled with distill.loss={self.loss}: samples estimate only {' and '.join(SAMPLED)} "
                "without bias. Use distill.signal=topk or online."
            )
        if self.skew is not None and self.loss not in SKEWED:
            raise ConfigError(f"distill.skew={self.skew} is for the losses {', '.join(SKEWED)}; {self.loss} has none.")
        need(self.skew is None or 0 < self.skew < 1, "distill.skew", self.skew, "between 0 and 1, or null")
        if self.signal_size is not None and self.signal == "online":
            raise ConfigError(f"distill.signal_size={self.signal_size} is for distill.signal=topk or sampled.")
        need(
            self.signal_size is None or 0 < self.signal_size < 256, "distill.signal_size", self.signal_size, "1 to 255"
        )
        need(self.hidden_weight >= 0, "distill.hidden_weight", self.hidden_weight, "zero or more")
        if self.hidden_weight and (self.signal != "online" or self.kd_weight == 0):
            raise ConfigError(
                f"distill.hidden_weight={self.hidden_weight} with distill.signal={self.signal} and "
                f"distill.kd_weight={self.kd_weight}: hidden states are compared with those of a teacher that runs "
                "beside the student. Use distill.signal=online and distill.kd_weight above zero."
            )
        share("distill", self, "kd_weight")
        positive("distill", self, "temperature")
