"""The grid sweeper: composes every cell, then lets `capacity_gap.grid` run them in waves. Imports no torch."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser


@dataclass
class GridSweeperConf:
    """Settings of the sweeper; `params` are the axes of a named sweep."""

    _target_: str = "hydra_plugins.capacity_gap_grid.grid_sweeper.GridSweeper"
    params: dict[str, Any] | None = field(default_factory=dict)
    max_batch_size: int | None = None  # jobs given to the launcher at once


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="capacity_gap")


def _gpus() -> int:
    """NVIDIA GPUs that this process may use, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([v for v in visible.split(",") if v and v != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class GridSweeper(BasicSweeper):
    """Hydra's grid, run in waves over what its cells share, through whatever launcher is set."""

    def __init__(self, params: dict[str, Any] | None = None, max_batch_size: int | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params=dict(params or {}))

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Gives joblib one worker a GPU, else a core, where its own default is ten; `n_jobs=` still wins."""
        launcher = config.hydra.launcher
        asked = any(o.startswith("hydra.launcher.n_jobs=") for o in config.hydra.overrides.hydra)
        if launcher.get("_target_", "").endswith("JoblibLauncher") and not asked:
            launcher.n_jobs = _gpus() or _cores()
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Runs the grid; the exit status is 1 if a cell failed."""
        from capacity_gap.grid import Job, check_grid, run_grid

        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        parsed = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        cells = [list(overrides) for batch in self.split_arguments(parsed, None) for overrides in batch]
        self.validate_batch_is_legal(cells[:1])
        load = self.hydra_context.config_loader.load_sweep_config
        jobs = [Job(overrides, load(self.config, overrides)) for overrides in cells]
        launcher = self.config.hydra.launcher
        if getattr(self.launcher, "detach", False):
            self.launcher.submit_grid(sys.argv, check_grid(jobs).root)
            return
        workers = launcher.get("n_jobs") or launcher.get("max_jobs") or 1
        if not run_grid(jobs, self.launcher.launch, workers=max(1, workers), max_batch_size=self.max_batch_size):
            raise SystemExit(1)
