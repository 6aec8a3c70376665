"""What `python run.py` and `capacity-gap run` do: one cell, or with -m a grid of cells, through Hydra."""

import sys
from collections.abc import Sequence

try:
    import hydra
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: {error.name} is not installed for {sys.executable}. `make demo` installs everything into .venv: "
        "`source .venv/bin/activate`, or `.venv/bin/python run.py …`."
    ) from None

from hydra.core.config_store import ConfigStore

from capacity_gap.cell import config
from capacity_gap.commands.explain import ends_single_run, explained
from capacity_gap.commands.settings_help import settings_help
from capacity_gap.settings import extension
from capacity_gap.settings.places import CONF, RUN_WORDS


def job(composed: object) -> str:
    """One job of Hydra's: everything it does is in `capacity_gap.cell.pipeline`. Workers import it by its name."""
    from capacity_gap.runner import single
    from capacity_gap.runner.run_cell import run_config

    with ends_single_run() as overrides:
        settings = config.from_hydra(composed)
        return run_config(settings) if overrides is None else single.run_alone(settings, overrides)


def main(arguments: Sequence[str]) -> int:
    """Runs Hydra on these words of a command line; returns the exit status."""
    if {"--help", "-h"} & set(arguments):
        return explained(lambda: _help(arguments))
    sys.argv = [sys.argv[0], *arguments]  # where Hydra reads them
    # Hydra copies its sources for every question it asks of them, and with them all our settings: 90 ms each time, 90
    # times for a help text. What the store loads is a copy anyhow.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    return explained(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    extension.load_named_on(arguments)
    config.register()
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def _help(arguments: Sequence[str]) -> None:
    """What every setting is for; entries of modules that are named with it too."""
    extension.load_named_on(arguments)
    print(settings_help(" ".join(RUN_WORDS)))
