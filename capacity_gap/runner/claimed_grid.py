"""The cells of a grid that records claim to be of: composed here from the words of its command, never run.

A cell's digest is a hash of every setting that decides its result, and of what its stages are. So it names the settings
that a record claims. Imports no torch.
"""

from collections.abc import Sequence

from capacity_gap.cell.pipeline import Cell
from capacity_gap.models.axes import dims
from capacity_gap.records.claims import Claim
from capacity_gap.runner.grid import Outcome, resolved
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import file_digest


def claimed_cells(words: Sequence[str]) -> dict[str, Claim]:
    """What a record of each cell must say, by the cell's digest.

    Args:
        words: what is typed behind `run.py -m`, such as `+sweeps=replicate_hour`, `data=10m,40m`.

    Raises:
        ConfigError: a word is no setting, or no cell of the grid is possible.
    """
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import HydraContext, RunMode
    from omegaconf import OmegaConf

    from capacity_gap.cell import config
    from capacity_gap.settings.places import CONF

    if not words:
        raise ConfigError("no grid is named. Give the words of its command, such as '+sweeps=replicate_hour'.")
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        # Hydra has looked for plugins by now: it imports each of them again, and classes from before no longer work.
        from hydra_plugins.capacity_gap_grid.grid_sweeper import GridSweeper

        hydra = GlobalHydra.instance().hydra
        composed = hydra.compose_config("config", list(words), RunMode.MULTIRUN, with_log_configuration=False)
        sweeper = GridSweeper(params=composed.hydra.sweeper.get("params"))
        sweeper.config = composed
        sweeper.hydra_context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
        typed = OmegaConf.to_container(composed.hydra.overrides.task, resolve=False)  # `${seed}` is that of each cell
        assert isinstance(typed, list)
        jobs = sweeper.jobs(typed)
    return {digest: _claim(cell) for digest, (cell, _) in resolved(jobs, Outcome()).items()}


def _claim(cell: Cell) -> Claim:
    registered, columns, stages = cell.config.registration, cell.description, cell.record.inputs
    measured_on = (cell.tokens.digest, cell.config.evaluate.tokens, cell.sequence_length, columns.get("objective"))
    return Claim(
        columns=columns,
        trained=cell.distilled.digest,
        held_out=" ".join(map(str, measured_on)),
        teacher=stages["evaluate_teacher"].digest,
        stored_params=None if cell.config.prune.priority == "global" else columns["student_params"],
        vocabulary=dims(cell.teacher_shape).vocab,
        registration=file_digest(registered, key="registration") if registered else None,
        name=cell.name,
    )
