"""Settings of tracking."""

from dataclasses import dataclass

from capacity_gap.settings.declare import setting, validate

MODES = ("offline", "online", "disabled")
ARTIFACTS = ("none", "record", "model")


@dataclass
class TrackingConfig:
    """Weights & Biases: a mirror of the records, which are authoritative."""

    mode: str = setting(
        "offline",
        "Mirror cells to W&B: offline (files in the store), online, or disabled.",
        allowed=MODES,
        decides=False,
    )
    project: str = setting("capacity_gap", "W&B project.", decides=False)
    entity: str | None = setting(None, "W&B team or user; null: the account's own.", decides=False)
    artifacts: str = setting(
        "none",
        "Artifacts to upload: none, record and history, or the student's weights too.",
        allowed=ARTIFACTS,
        decides=False,
    )

    def __post_init__(self) -> None:
        validate("tracking", self)
