"""Settings of tracking."""

from dataclasses import dataclass

from capacity_gap.settings.errors import choose

TRACKING_MODES = ("offline", "online", "disabled")


ARTIFACTS = ("none", "record", "model")


@dataclass
class TrackingConfig:
    """Weights & Biases: a mirror of the records, which are the truth."""

    mode: str = "offline"
    project: str = "capacity_gap"
    entity: str | None = None
    artifacts: str = "none"  # what goes along: nothing, record and history, or the student's weights too

    def __post_init__(self) -> None:
        choose("tracking.mode", self.mode, TRACKING_MODES)
        choose("tracking.artifacts", self.artifacts, ARTIFACTS)
