"""The grid sweeper: composes every cell, then lets `capacity_gap.grid` run them in waves. Imports no torch."""

import os
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser


@dataclass
class GridSweeperConf:
    """Settings of the sweeper; `params` are the axes of a named sweep."""

    _target_: str = "hydra_plugins.capacity_gap_grid.grid_sweeper.GridSweeper"
    params: dict[str, Any] | None = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="capacity_gap")


class GridSweeper(BasicSweeper):
    """Hydra's grid, run in waves over what its cells share, through whatever launcher is set."""

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        super().__init__(max_batch_size=None, params=dict(params or {}))

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Gives joblib one worker a core, where its own default is ten whatever the machine; `n_jobs=` still wins."""
        launcher = config.hydra.launcher
        asked = any(o.startswith("hydra.launcher.n_jobs=") for o in config.hydra.overrides.hydra)
        if launcher.get("_target_", "").endswith("JoblibLauncher") and not asked:
            launcher.n_jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Runs the grid; the exit status is 1 if a cell failed."""
        from capacity_gap.grid import Job, run_grid

        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        parsed = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        cells = [list(overrides) for batch in self.split_arguments(parsed, None) for overrides in batch]
        self.validate_batch_is_legal(cells[:1])
        load = self.hydra_context.config_loader.load_sweep_config
        jobs = [Job(overrides, load(self.config, overrides)) for overrides in cells]
        if not run_grid(jobs, self.launcher.launch):
            raise SystemExit(1)
