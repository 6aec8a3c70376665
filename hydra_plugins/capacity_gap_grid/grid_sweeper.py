"""The grid sweeper: composes every cell, then lets `capacity_gap.runner.grid` run them in waves. Imports no torch."""

import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from capacity_gap.runner.grid import Job

MOST_CELLS = 100_000  # in one grid
MOST_WORKERS = 4096  # on one machine


@dataclass
class GridSweeperConf:
    """Settings of the sweeper; `params` are the axes of a named sweep."""

    _target_: str = "hydra_plugins.capacity_gap_grid.grid_sweeper.GridSweeper"
    params: dict[str, Any] | None = field(default_factory=dict)
    max_batch_size: int | None = None  # jobs given to the launcher at once: 1 or more


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridSweeperConf, provider="capacity_gap")


class Composer:
    """Composes the settings of one cell after another.

    Hydra takes 70 ms for each. But cells that choose the same groups differ in plain values only, which are set on a
    copy of the first one's.
    """

    def __init__(self, config: Any, loader: Any) -> None:
        self.config, self.loader = config, loader
        self.parser = OverridesParser.create(config_loader=loader)
        self.bases: dict[tuple, dict[str, Any]] = {}
        self.groups: dict[str, bool] = {}
        self.parsed: dict[str, Override] = {}

    def __call__(self, overrides: list[str]) -> dict[str, Any]:
        """The settings of the cell with these overrides; interpolations are not resolved yet."""
        for text in overrides:
            if text not in self.parsed:  # a grid says the same few over and over
                (self.parsed[text],) = self.parser.parse_overrides([text])
        parsed = [self.parsed[text] for text in overrides]
        plain = [o for o in parsed if self._is_plain(o)]
        chosen = tuple(o.input_line for o in parsed if not self._is_plain(o)) + tuple(o.key_or_group for o in plain)
        if chosen not in self.bases:
            composed = OmegaConf.to_container(self.loader.load_sweep_config(self.config, overrides))
            assert isinstance(composed, dict)
            self.bases[chosen] = {str(k): v for k, v in composed.items() if k != "hydra"}
        found = dict(self.bases[chosen])
        for o in plain:
            _set(found, o.key_or_group.split("."), o.value())
        return found

    def _is_plain(self, override: Override) -> bool:
        """Whether it sets a value, and does not choose a group, add or delete something, or configure Hydra."""
        key = override.key_or_group
        if key not in self.groups:
            self.groups[key] = bool(self.loader.get_group_options(key)) or key.split(".")[0] == "hydra"
        return override.type is OverrideType.CHANGE and not self.groups[key]


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets one nested value; the sections on its way are copied first, since other cells share them."""
    *sections, last = path
    for name in sections:
        values[name] = dict(values[name])
        values = values[name]
    values[last] = value


def _check_sizes(launcher: Any, max_batch_size: int | None) -> None:
    """Raises `ConfigError` for numbers of jobs that mean nothing; launchers would fail with errors of their own."""
    from capacity_gap.settings.checks import need

    batch = max_batch_size is None or 1 <= max_batch_size <= MOST_CELLS
    need(batch, "hydra.sweeper.max_batch_size", max_batch_size, f"1 to {MOST_CELLS:,}, or null")
    if _is_joblib(launcher):
        jobs = launcher.n_jobs
        need(jobs == -1 or 1 <= jobs <= MOST_WORKERS, "hydra.launcher.n_jobs", jobs, f"1 to {MOST_WORKERS:,}, or -1")


def _is_joblib(launcher: Any) -> bool:
    return launcher.get("_target_", "").endswith("JoblibLauncher")


def check_count(overrides: list[Override]) -> None:
    """Refuses a grid of so many combinations that composing them would take hours.

    Raises:
        ConfigError: there are more than `MOST_CELLS`.
    """
    from capacity_gap.settings.errors import ConfigError

    swept = {o.input_line: o.sweep_iterator() for o in overrides if o.is_sweep_override()}
    counts = {line: sum(1 for _ in itertools.islice(values, MOST_CELLS + 1)) for line, values in swept.items()}
    if prod(counts.values()) > MOST_CELLS:
        largest = max(counts, key=lambda line: counts[line])
        raise ConfigError(
            f"this grid has more than {MOST_CELLS:,} combinations, the maximum for one grid. The axis with most "
            f"values: {largest}. Split the grid."
        )


def own_ladder(composed: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The checkpoints among the teachers of a grid that names no ladder, as given and pinned: together they are one.

    A student's shape is the same under every teacher only if each cell knows them all. One that cannot be used raises:
    without it the others would be another ladder, with other students.
    """
    from capacity_gap.models.checkpoints import checkpoint, is_checkpoint
    from capacity_gap.models.folders import config_of

    named = {str(one["teacher"]): bool(one.get("plan")) for one in composed if not one["family"]["folders"]}
    found = {teacher: checkpoint(teacher) for teacher in named if is_checkpoint(teacher)}
    for teacher, one in found.items():
        config_of(one, planning=named[teacher])
    return {teacher: one.pinned for teacher, one in found.items()}


def _pinned(given: str) -> str:
    """A checkpoint by a name that stands for the same in every process: of the hub with its commit."""
    from capacity_gap.models.checkpoints import checkpoint

    return checkpoint(given).pinned


def _in_ladder(
    overrides: list[str], one: dict[str, Any], ladder: Mapping[str, str]
) -> tuple[list[str], dict[str, Any]]:
    """A cell's overrides and settings, with checkpoints pinned, and with the ladder that its teacher is one of."""
    from capacity_gap.cell.named_models import UNSAID
    from capacity_gap.models.checkpoints import is_checkpoint
    from capacity_gap.models.ladders import FOLDERS
    from capacity_gap.runner.rerun import quoted

    teacher, student, family = str(one["teacher"]), str(one["student"]), one["family"]
    own = {"teacher": ladder[teacher]} if teacher in ladder else {}
    own |= {"student": _pinned(student)} if is_checkpoint(student) else {}
    found = {**one, **own}
    given = [f"{key}={quoted(name)}" for key, name in own.items() if name != str(one[key])]
    if teacher in ladder and family["name"] in (FOLDERS, UNSAID):
        folders = list(ladder.values())
        found["family"] = {**family, "name": FOLDERS, "folders": folders}
        overrides = [o for o in overrides if not o.startswith("family=")]
        given += [f"family={FOLDERS}", f"family.folders=[{','.join(map(quoted, folders))}]"]
    return [*overrides, *given], found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class GridSweeper(BasicSweeper):
    """Hydra's grid, run in waves over what its cells share, through whatever launcher is set."""

    def __init__(self, params: dict[str, Any] | None = None, max_batch_size: int | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params=dict(params or {}))

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Gives joblib one worker a GPU, else a core, where its own default is ten; `n_jobs=` still wins."""
        from capacity_gap.runtime.process import gpus

        launcher = config.hydra.launcher
        _check_sizes(launcher, self.max_batch_size)
        asked = any(o.startswith("hydra.launcher.n_jobs=") for o in config.hydra.overrides.hydra)
        if _is_joblib(launcher) and not asked:
            launcher.n_jobs = gpus() or _cores()
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def jobs(self, arguments: list[str]) -> "list[Job]":
        """Every combination of the sweep's axes and these overrides, each with its composed settings."""
        from capacity_gap.runner.grid import Job

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*self._parse_config(), *arguments])
        check_count(parsed)
        cells = [list(overrides) for batch in self.split_arguments(parsed, None) for overrides in batch]
        self.validate_batch_is_legal(cells[:1])
        compose = Composer(self.config, loader)
        composed = [compose(overrides) for overrides in cells]
        ladder = own_ladder(composed)
        return [Job(*_in_ladder(overrides, one, ladder)) for overrides, one in zip(cells, composed, strict=True)]

    def sweep(self, arguments: list[str]) -> None:
        """Runs the grid; the exit status is 1 if a cell failed."""
        from capacity_gap.runner.grid import check_grid, run_grid
        from capacity_gap.runner.machines import Machines
        from capacity_gap.settings.places import run_command

        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        jobs = self.jobs(arguments)
        launcher = self.config.hydra.launcher
        if getattr(self.launcher, "detach", False) and not any(job.composed.get("plan") for job in jobs):
            self.launcher.submit_grid([*run_command(), *sys.argv[1:]], check_grid(jobs).root)
            return
        batch, pool = self.max_batch_size, _is_joblib(launcher)
        launch = self.launcher.launch
        here = pool or launcher.get("_target_", "").startswith("hydra._internal.")  # joblib, or one after another
        machines = Machines.of(launcher)
        if not run_grid(jobs, launch, machines=machines, max_batch_size=batch, pool=pool, here=here):
            raise SystemExit(1)
