"""What `python run.py` and `capacity-gap run` do: one cell, or with -m a grid of cells, through Hydra."""

import re
import sys
from collections.abc import Sequence
from typing import NoReturn

try:
    import hydra
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: {error.name} is not installed for {sys.executable}. `make demo` installs everything into .venv: "
        "`source .venv/bin/activate`, or `.venv/bin/python run.py …`."
    ) from None

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore

from capacity_gap.cell import config
from capacity_gap.commands.explain import ends_single_run, explained
from capacity_gap.commands.hydra_guard import guard
from capacity_gap.commands.settings_help import settings_help
from capacity_gap.settings import extension
from capacity_gap.settings.errors import ConfigError, shown
from capacity_gap.settings.places import CONF, RUN_WORDS

MULTIRUN = ("-m", "--multirun")


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
    several = [word for word in arguments if word in MULTIRUN]
    ordered = [*several, *(word for word in arguments if word not in MULTIRUN)]  # Hydra knows it before overrides only
    sys.argv = [sys.argv[0], *ordered]  # where Hydra reads them
    # Hydra copies its sources for every question it asks of them, and with them all our settings: 90 ms each time, 90
    # times for a help text. What the store loads is a copy anyhow.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    return explained(lambda: _run(ordered))


def _run(arguments: Sequence[str]) -> None:
    check_words(arguments)
    extension.load_named_on(arguments)
    config.register()
    guard()
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def check_words(arguments: Sequence[str]) -> None:
    """Raises `ConfigError` for an option that Hydra does not have, and for a number that no parser reads."""
    parser = get_args_parser()
    parser.error = _refuse  # Hydra's own prints its usage
    parser.parse_args(arguments)
    for word in arguments:
        if found := re.search(r"\d{1000,}", word):
            raise ConfigError(f"{shown(word)} holds a number of {len(found[0]):,} digits. No setting takes that.")


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{shown(message)}. `{' '.join(RUN_WORDS)} --help` says what it takes.")


def _help(arguments: Sequence[str]) -> None:
    """What every setting is for; entries of modules that are named with it too."""
    extension.load_named_on(arguments)
    print(settings_help(" ".join(RUN_WORDS)))
