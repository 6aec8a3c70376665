"""What cells of a store cost: FLOPs of the stages that the store lacks, each counted once."""

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from capacity_gap.settings.errors import ConfigError, UserError

if TYPE_CHECKING:
    import pandas as pd

    from capacity_gap.cell.config import RunConfig
    from capacity_gap.store.stage import Store

OF_A_CELL = ("student", "teacher", "data", "seed", "teacher_seed")
OWN = ("student", "distil", "instruct", "prefer", "evaluate", "record")  # stages of one cell alone
LEAST = 1.0  # FLOPs: a cell whose stages are all there still is one


def shared_overrides(
    source: str, frame: "pd.DataFrame", named: Sequence[str], *, replaces: bool
) -> tuple[list[str], bool]:
    """The settings that the cells of a store were run with, except those in which they differ, and the store itself.

    Args:
        source: the store.
        frame: its records.
        named: overrides that name the ladder, for cells whose settings are not noted.
        replaces: they stand for the noted ladder too.

    Returns:
        Overrides, and whether they are known: those of a cell that was run alone are not noted.
    """
    from capacity_gap.runner.rerun import DROPPED, quoted
    from capacity_gap.store.contents import open_store, sweeps

    store = open_store(source)
    mine = set("record/" + frame["cell"].astype(str)) if "cell" in frame else set()
    noted = [cell for cells in sweeps(store).values() for key, cell in cells.items() if key in mine]
    kept = [*named] if replaces or not noted else []
    dropped = (*DROPPED, "family=", "family.folders=") if replaces else DROPPED
    for override in noted[-1]["overrides"] if noted else ():
        name = override.lstrip("+").partition("=")[0]
        if not override.startswith(dropped) and name not in OF_A_CELL:
            kept.append(override)
    return [*kept, f"store={quoted(str(store.root))}"], bool(noted) or not mine


def base_config(overrides: Sequence[str]) -> "RunConfig":
    """The settings that overrides make, of a cell that is planned.

    Raises:
        ConfigError: they were made with a module of the user's that this command has not loaded.
    """
    _check_modules(overrides)
    return _composed((*overrides, "plan=true"))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> "RunConfig":
    from hydra import compose, initialize_config_dir

    from capacity_gap.cell import config
    from capacity_gap.settings.places import CONF

    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config.from_hydra(compose("config", overrides=[*overrides]))


def cell_settings(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a row of a pool names."""
    named: dict[str, Any] = {k: str(cell[k]) for k in ("student", "teacher") if k in cell}
    named |= {"data": str(int(cell["data_tokens"]))} if "data_tokens" in cell else {}
    return named | {k: int(cell[k]) for k in ("seed", "teacher_seed") if k in cell and str(cell[k]).isdigit()}


@dataclass(frozen=True, eq=False)
class StageCost:
    """FLOPs of cells with the settings `base`, by their stages: those that several cells need are shared."""

    base: "RunConfig"
    store: "Store"
    known: dict[tuple, tuple[float, Mapping[Hashable, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, overrides: Sequence[str]) -> "StageCost":
        """Of cells that these overrides make."""
        from capacity_gap.store.stage import Store

        base = base_config(overrides)
        return cls(base, Store(base.store_path))

    def __call__(self, cell: Mapping[str, Any]) -> tuple[float, Mapping[Hashable, float]]:
        """FLOPs of a cell's own stages, and of those that it shares and the store lacks."""
        from capacity_gap.cell.pipeline import resolve
        from capacity_gap.store.stage import closure

        named = cell_settings(cell)
        place = tuple(named.items())
        if place not in self.known:
            try:
                stages = closure(resolve(replace(self.base, **named)).record)
            except UserError as error:
                raise ConfigError(f"the pool contains a cell that cannot run, {dict(place)}: {error}") from error
            own = math.fsum(s.cost for s in stages.values() if s.name in OWN and not self.store.has(s))
            shared = {k: s.cost for k, s in stages.items() if s.name not in OWN and s.cost > 0}
            kept: dict[Hashable, float] = {
                (s.name, k): 0.0 if self.store.has(s) else shared[k] for k, s in stages.items() if k in shared
            }
            self.known[place] = (max(LEAST, own), kept)
        return self.known[place]


def _check_modules(overrides: Sequence[str]) -> None:
    """Raises where cells name a module: a store may come from elsewhere, so it does not decide what code runs here."""
    from capacity_gap.settings import extension
    from capacity_gap.settings.errors import shown

    given = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("extend=")]
    names = [name for value in given for name in extension.listed(value)]
    if lacking := [name for name in names if name not in extension.named()]:
        every = shown(",".join(dict.fromkeys([*extension.named(), *names])))
        raise ConfigError(
            f"This store has cells of your module {shown(lacking[0])}: set {extension.VARIABLE}={every} and run this "
            "command where Python finds the module. A store runs no code by itself."
        )
