"""Where the numbers of a cell are mirrored while it runs: one small protocol, W&B behind it.

The local JSONL history and the record are always written, by the stages themselves; a tracker only mirrors them, so
its troubles never stop the work.
"""

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from capacity_gap.config import TrackingConfig

log = logging.getLogger(__name__)
INIT_TIMEOUT_S = 25


class Tracker(Protocol):
    """What the pipeline says while a cell runs."""

    def log(self, point: Mapping[str, Any]) -> None: ...  # noqa: D102

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None: ...  # noqa: D102


class NoTracker:
    """Mirrors nothing."""

    def log(self, point: Mapping[str, Any]) -> None:
        """Does nothing."""

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Does nothing."""


class WandbTracker:
    """One W&B run for one cell; its id is the cell's digest, so a cell that is resumed stays one run."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.seen = -1

    def log(self, point: Mapping[str, Any]) -> None:
        """Logs one point at its step; points already logged (a resumed or replayed history) are passed over."""
        if point["step"] > self.seen:
            self.seen = point["step"]
            self.run.log({f"train/{k}": v for k, v in point.items() if k != "step"}, step=point["step"])

    def finish(self, summary: Mapping[str, Any], *, failed: bool) -> None:
        """Writes the record as the run's summary and ends the run, also after a failure."""
        self.run.summary.update({k: v for k, v in summary.items() if v is not None})
        self.run.finish(exit_code=1 if failed else 0)


def start(tracking: TrackingConfig, *, cell: str, name: str, config: Mapping[str, Any], folder: Path) -> Tracker:
    """Starts mirroring one cell; offline if online cannot be had, with one warning."""
    if tracking.mode == "disabled":
        return NoTracker()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # an offline run then touches no network at all
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    for mode in dict.fromkeys((tracking.mode, "offline")):
        with contextlib.suppress(wandb.errors.Error):
            settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off", x_disable_stats=True)
            run = wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                id=cell,
                name=name,
                config=dict(config),
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]
                resume="allow" if mode == "online" else None,
                settings=settings,
                reinit="finish_previous",
            )
            return WandbTracker(run)
        log.warning("W&B cannot be reached (no key or no network): this cell is tracked offline.")
    return NoTracker()
