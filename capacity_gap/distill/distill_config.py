"""Settings of the distillation objective, and of how teacher outputs are obtained."""

from dataclasses import dataclass

from capacity_gap.distill.divergences import LOSSES
from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError

SIGNAL_SIZE = 64  # values per token of cached teacher logits, by default


@dataclass
class DistillConfig:
    """The objective (1 − kd_weight)·CE + kd_weight·KD (docs/method.md §4); kd_weight = 0 is direct training."""

    loss: str = setting(
        "forward_kl",
        "Divergence between teacher and student (not a held-out loss).",
        allowed=LOSSES,
        column="loss",
    )
    kd_weight: float = setting(
        0.5,
        "Weight of KD in the objective; 0 is cross-entropy on the text alone.",
        least=0,
        most=1,
        column="kd_weight",
        parts=110,
    )
    temperature: float = setting(
        1.0, "Divides the logits of both models in KD.", least=0.01, most=1000, column="temperature", parts=120
    )
    tau_squared: bool = setting(True, "Multiply KD by the squared temperature, which preserves the gradient scale.")
    signal: str = setting(
        "online",
        "Teacher outputs: `online`, computed during training; or cached teacher logits, a few values per token.",
        allowed=SIGNALS,
        column="signal",
        computed=True,
    )
    skew: float | None = setting(
        None,
        "β of js (null: 0.5), α of the skewed KLs (null: 0.1); other losses: as registered.",
        above=0,
        below=1,
        later=True,
        column="skew",
        if_set=True,
        parts=140,
    )
    signal_size: int | None = setting(
        None,
        f"Values per token of cached teacher logits: k of topk, draws of sampled; null: {SIGNAL_SIZE}.",
        least=1,
        most=255,
        later=True,
        column="signal",
        computed=True,
    )
    hidden_weight: float = setting(
        0.0,
        "Weight of 1 − cos(last hidden states), added to the objective.",
        least=0,
        most=1e6,
        later=True,
        column="hidden_weight",
        if_set=True,
        parts=150,
    )

    def __post_init__(self) -> None:
        validate("distill", self)
        loss, kind = LOSSES.entry(self.loss), SIGNALS.entry(self.signal)
        if kind.traits["draws"] and not (loss.is_ours and loss.traits["samples"]):
            raise ConfigError(
                f"distill.signal={self.signal} with distill.loss={self.loss}: samples estimate only "
                f"{' and '.join(LOSSES.that(samples=True))} without bias. Use distill.signal=topk or online."
            )
        if self.skew is not None and loss.traits["skew"] is None:
            skewed = ", ".join(name for name in LOSSES if LOSSES.entry(name).traits["skew"] is not None)
            raise ConfigError(f"distill.skew={self.skew} applies only to the losses {skewed}; {self.loss} has no skew.")
        if self.signal_size is not None and self.signal == "online":
            raise ConfigError(f"distill.signal_size={self.signal_size} applies only to distill.signal=topk or sampled.")
        if self.hidden_weight and (self.signal != "online" or self.kd_weight == 0):
            raise ConfigError(
                f"distill.hidden_weight={self.hidden_weight} with distill.signal={self.signal} and "
                f"distill.kd_weight={self.kd_weight}: hidden states can be matched only to those of an online "
                "teacher. Use distill.signal=online and distill.kd_weight above zero."
            )
